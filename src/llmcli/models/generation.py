"""The user's options, the model's own configuration and our defaults -> one GenerationConfig."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llmcli import config
from llmcli.errors import UsageError, first_line
from llmcli.job import JsonObject

if TYPE_CHECKING:
    from transformers import GenerationConfig

FRACTIONS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty")
COUNTS = ("num_beams", "num_return_sequences", "max_new_tokens")
NUMBERS = (*FRACTIONS, *COUNTS, "top_k", "min_new_tokens", "no_repeat_ngram_size")
TOTALS = {"max_length": "--max-new-tokens", "min_length": "--min-new-tokens"}
MIN_TEMPERATURE = 1e-6  # A float32 cannot hold the logits divided by much less.
OLD_MAX_LENGTH = 20  # tokens; what transformers 4 wrote into a generation config that had none
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")


def greedy(options: JsonObject) -> dict[str, Any]:
    """Return options, with a temperature of (nearly) 0 turned into greedy decoding."""
    temperature = options.get("temperature")
    if not (isinstance(temperature, int | float) and 0 <= temperature < MIN_TEMPERATURE):
        return dict(options)
    return {name: value for name, value in options.items() if name not in SAMPLING} | {"do_sample": False}


def override(options: JsonObject, own: JsonObject) -> dict[str, Any]:
    """Return the options of a job with those of a record over them."""
    is_greedy = own.get("do_sample") is False
    return {name: value for name, value in options.items() if not (is_greedy and name in SAMPLING)} | dict(own)


def check_known(names: Iterable[str], source: str = "") -> None:
    """Raise UsageError for a name that GenerationConfig does not have; `source` says who wrote it."""
    from transformers import GenerationConfig

    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    for name in (name for name in names if name not in known):
        message = f"{source and f'{source}: '}unknown generation option {name!r}{config.did_you_mean(name, known)}"
        raise UsageError(message, hint=None if source else "-o sets a field of transformers' GenerationConfig")


def check(options: JsonObject, defaults: JsonObject, *, counts_prompt: bool = True) -> None:
    """Raise UsageError for options of the user that no model can use, before one is loaded."""
    from transformers import GenerationConfig

    check_known(options)
    for name, value in options.items():
        if name in NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UsageError(f"invalid {name} {value!r}: expected a number")
        if (name in COUNTS and value < 1) or (name == "repetition_penalty" and value <= 0):
            raise UsageError(f"invalid {name} {value!r}: must be positive")
    with _refusing_invalid_values():
        merge(GenerationConfig(), options, defaults, counts_prompt=counts_prompt).validate()


def merge(
    model_config: "GenerationConfig",
    options: JsonObject,
    defaults: JsonObject,
    settings: JsonObject | None = None,
    *,
    counts_prompt: bool = True,
) -> "GenerationConfig":
    """Return the generation config of a job.

    The first that has a value counts: the user's options, the task's settings for this model, the model's config, the
    task's defaults. But a sampling parameter of the user implies sampling, and beams without one imply none. With
    `counts_prompt`, as in causal models, the lengths in the model's config include the prompt.
    """
    given = {name: float(value) if name in FRACTIONS else value for name, value in options.items()}
    if isinstance(given.get("stop_strings"), str):
        given["stop_strings"] = [given["stop_strings"]]
    settings, model = settings or {}, model_config.to_diff_dict()
    if counts_prompt and (total := next((name for name in TOTALS if name in given), None)):
        raise UsageError(f"{total} includes the prompt and its padding", hint=f"use {TOTALS[total]}")
    known = {**model, **settings}
    if "do_sample" not in given:
        if any(name in given for name in SAMPLING):
            given["do_sample"] = True
        elif given.get("num_beams", 1) > 1 or ("do_sample" not in known and known.get("num_beams", 1) > 1):
            given["do_sample"] = False

    merged = copy.deepcopy(model_config)
    with _refusing_invalid_values():
        merged.update(**{name: value for name, value in defaults.items() if name not in model})
        merged.update(**{**settings, **given})
    if model.get("max_length") == OLD_MAX_LENGTH:
        del model["max_length"]
    # One of the two lengths counts, from the first layer that has either.
    layers = (given, settings, defaults) if counts_prompt else (given, settings, model, defaults)
    layer = next(layer for layer in layers if layer.get("max_new_tokens") or layer.get("max_length"))
    merged.max_new_tokens = layer.get("max_new_tokens") or None
    merged.max_length = None if merged.max_new_tokens else layer["max_length"]
    if not merged.do_sample:
        for name in SAMPLING:
            setattr(merged, name, None)
    return merged


@contextmanager
def _refusing_invalid_values() -> Iterator[None]:
    """Raise UsageError for what Transformers finds wrong with a GenerationConfig."""
    try:
        yield
    except (ValueError, TypeError) as exc:
        raise UsageError(first_line(exc)) from exc
