"""The user's options, the model's own configuration and our defaults -> one GenerationConfig."""

import copy
from collections.abc import Mapping
from typing import Any

from llmcli import config
from llmcli.errors import UsageError

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")


def check(explicit: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Let transformers judge the user's options, before any model is loaded. Raises UsageError."""
    from transformers import GenerationConfig

    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    for name in explicit:
        if name not in known:
            raise UsageError(
                f"unknown generation option {name!r}{config.did_you_mean(name, known)}",
                hint="-o takes the fields of transformers' GenerationConfig",
            )
    try:
        merge(GenerationConfig(), explicit, defaults).validate()
    except (ValueError, TypeError) as problem:
        raise UsageError(str(problem).strip().splitlines()[0]) from problem


def merge(model_config: Any, explicit: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    """What the user gave, over the model's generation config, over the task's defaults.

    Asking for a sampling parameter asks for sampling; asking for beams, without one, asks for none.
    """
    merged = copy.deepcopy(model_config)
    silent = {name: value for name, value in defaults.items() if name not in model_config.to_diff_dict()}
    given = dict(explicit)
    if "max_length" in given:
        silent.pop("max_new_tokens", None)
    else:
        merged.max_length = None
    if "do_sample" not in given:
        if any(name in given for name in SAMPLING):
            given["do_sample"] = True
        elif given.get("num_beams", 1) > 1:
            given["do_sample"] = False
    merged.update(**{**silent, **given})
    if not merged.do_sample:
        for name in SAMPLING:
            setattr(merged, name, None)
    return merged
