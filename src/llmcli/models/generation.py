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
OLD_MAX_LENGTH = 20  # what transformers 4 wrote into a generation config that had none
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")


def greedy(given: Mapping[str, Any]) -> dict[str, Any]:
    """The user's options, where a temperature of 0 means not to sample."""
    if given.get("temperature") != 0:
        return dict(given)
    return {name: value for name, value in given.items() if name not in SAMPLING} | {"do_sample": False}


def check(explicit: Mapping[str, Any], defaults: Mapping[str, Any], *, counts_prompt: bool = True) -> None:
    """Let transformers judge the user's options, before any model is loaded. Raises UsageError."""
    from transformers import GenerationConfig

    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    for name, value in explicit.items():
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
        merge(GenerationConfig(), explicit, defaults, counts_prompt=counts_prompt).validate()
    except (ValueError, TypeError) as exc:
        raise UsageError(str(exc).strip().splitlines()[0]) from exc


def merge(
    model_config: Any,
    explicit: Mapping[str, Any],
    defaults: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    *,
    counts_prompt: bool = True,
) -> Any:
    """What the user gave, over the task's own settings for this model, over the model's generation config, over the
    task's defaults. Where the model `counts_prompt` in its lengths, they say nothing of the answer: max_new_tokens
    alone does.

    Asking for a sampling parameter asks for sampling; asking for beams, without one, asks for none.
    """
    given = {name: float(value) if name in FRACTIONS else value for name, value in explicit.items()}
    if counts_prompt and (total := next((name for name in TOTALS if name in given), None)):
        raise UsageError(f"{total} counts the prompt too, and its padding", hint=f"take {TOTALS[total]}")
    if isinstance(given.get("stop_strings"), str):
        given["stop_strings"] = [given["stop_strings"]]
    merged = copy.deepcopy(model_config)
    stated = {**model_config.to_diff_dict(), **(settings or {})}
    if "do_sample" not in given:
        if any(name in given for name in SAMPLING):
            given["do_sample"] = True
        elif given.get("num_beams", 1) > 1 or ("do_sample" not in stated and stated.get("num_beams", 1) > 1):
            given["do_sample"] = False
    silent = {name: value for name, value in defaults.items() if name not in stated}
    merged.update(**{**silent, **(settings or {}), **given})
    task = {**defaults, **(settings or {})}
    merged.max_new_tokens, merged.max_length = _lengths(given, stated, task, counts_prompt)
    if not merged.do_sample:
        for name in SAMPLING:
            setattr(merged, name, None)
    return merged


def _lengths(
    given: Mapping[str, Any], stated: Mapping[str, Any], task: Mapping[str, Any], counts_prompt: bool
) -> tuple[int | None, int | None]:
    """max_new_tokens and max_length, one of them None."""
    for source in (given, task if counts_prompt else stated):
        if most := source.get("max_new_tokens"):
            return most, None
        if (length := source.get("max_length")) and length != OLD_MAX_LENGTH:
            return None, length
    return task["max_new_tokens"], None
