"""transformers pipelines of our own, one for each kind of thing that is asked of a head: the file's name is the
kind, `llmcli-KIND` its id."""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmcli.job import LoadOptions
from llmcli.models import loading


def load(kind: str, folder: Path, load_options: LoadOptions) -> Any:
    """A ready transformers.Pipeline. Raises what `loading.load` raises; UsageError where --quantize does not go with
    the device or the model."""
    head = implementation(kind)
    from llmcli.pipelines import quantizer

    if load_options.quantize != "none":
        folder = quantizer.quantized(folder, load_options, head)
    model, tokenizer = loading.load(folder, load_options, head)
    if model.device.type == "cpu" and not load_options.offload_folder:
        quantizer.pack(model)
    return _made(kind, model, tokenizer)


def wrap_as(kind: str, pipeline: Any) -> Any:
    """A pipeline of that kind on the model of another."""
    return pipeline if type(pipeline) is implementation(kind) else _made(kind, pipeline.model, pipeline.tokenizer)


def check_compatibility(folder: Path, load_options: LoadOptions, kinds: Iterable[str]) -> dict[str, str | None]:
    """For each kind, why the model in that folder cannot be one of it; None where it can. Raises ModelUnavailable."""
    loading.quiet_libraries()
    config = loading.read_config(folder, load_options)
    reasons = {kind: implementation(kind).check(config) for kind in kinds}
    return {kind: reason and f"{config.model_type} models {reason}" for kind, reason in reasons.items()}


def implementation(kind: str) -> Any:
    """The pipeline's class; its module registers it with transformers."""
    loading.quiet_libraries()
    importlib.import_module(f"llmcli.pipelines.{kind}")
    from transformers.pipelines import PIPELINE_REGISTRY

    _, about, _ = PIPELINE_REGISTRY.check_task(f"llmcli-{kind}")
    return about["impl"]


def _made(kind: str, model: Any, tokenizer: Any) -> Any:
    from transformers import pipeline

    # A model that accelerate spread says where it is; one on a single device would be moved to the first GPU.
    device = None if getattr(model, "hf_device_map", None) else model.device
    return pipeline(f"llmcli-{kind}", model=model, tokenizer=tokenizer, device=device)
