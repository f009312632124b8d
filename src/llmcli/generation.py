"""The user's options, the model's own configuration and our defaults -> one GenerationConfig."""

import copy
from collections.abc import Mapping
from typing import Any

from llmcli import config
from llmcli.errors import UsageError

FRACTIONS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty")
COUNTS = ("num_beams", "num_return_sequences", "max_new_tokens")
NUMBERS = (*FRACTIONS, *COUNTS, "top_k", "min_new_tokens", "no_repeat_ngram_size")
TOTALS = {"max_length": "--max-new-tokens", "min_length": "--min-new-tokens"}
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")


def check(explicit: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Let transformers judge the user's options, before any model is loaded. Raises UsageError."""
    from transformers import GenerationConfig

    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    for name, value in explicit.items():
        if name in TOTALS:
            raise UsageError(f"{name} counts the prompt too, and its padding", hint=f"take {TOTALS[name]}")
        if name not in known:
            raise UsageError(
                f"unknown generation option {name!r}{config.did_you_mean(name, known)}",
                hint="-o takes the fields of transformers' GenerationConfig",
            )
        if name in NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UsageError(f"{name} takes a number, not {value!r}")
        if (name in COUNTS and value < 1) or (name == "repetition_penalty" and value <= 0):
            raise UsageError(f"{name} has to be above 0, not {value!r}")
    try:
        merge(GenerationConfig(), explicit, defaults).validate()
    except (ValueError, TypeError) as problem:
        raise UsageError(str(problem).strip().splitlines()[0]) from problem


def merge(model_config: Any, explicit: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    """What the user gave, over the model's generation config, over the task's defaults; but the task alone says
    how many tokens are enough.

    Asking for a sampling parameter asks for sampling; asking for beams, without one, asks for none.
    """
    merged = copy.deepcopy(model_config)
    stated = model_config.to_diff_dict()
    merged.max_length = None
    silent = {name: value for name, value in defaults.items() if name not in stated or name == "max_new_tokens"}
    given = {name: float(value) if name in FRACTIONS else value for name, value in explicit.items()}
    if isinstance(given.get("stop_strings"), str):
        given["stop_strings"] = [given["stop_strings"]]
    if "do_sample" not in given:
        if any(name in given for name in SAMPLING):
            given["do_sample"] = True
        elif given.get("num_beams", 1) > 1 or ("do_sample" not in stated and stated.get("num_beams", 1) > 1):
            given["do_sample"] = False
    merged.update(**{**silent, **given})
    if not merged.do_sample:
        for name in SAMPLING:
            setattr(merged, name, None)
    return merged
