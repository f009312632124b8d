"""transformers pipelines of our own, one for each kind of thing that is asked of a head: the file's name is the
kind, `llmcli-KIND` its id."""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmcli import loader
from llmcli.job import Placement


def load(kind: str, folder: Path, placement: Placement) -> Any:
    """A ready transformers.Pipeline. Raises what `loader.load` raises; UsageError where --quantize does not go with the
    device or the model."""
    head = implementation(kind)
    from llmcli.pipelines import quantizer

    if placement.quantize != "none":
        folder = quantizer.quantized(folder, placement, head)
    model, tokenizer = loader.load(folder, placement, head)
    if model.device.type == "cpu" and not placement.offload_folder:
        quantizer.pack(model)
    return _made(kind, model, tokenizer)


def seen_as(kind: str, pipeline: Any) -> Any:
    """A pipeline of that kind on the model of another."""
    return pipeline if type(pipeline) is implementation(kind) else _made(kind, pipeline.model, pipeline.tokenizer)


def judge(folder: Path, placement: Placement, kinds: Iterable[str]) -> dict[str, str | None]:
    """For each kind, why the model in that folder cannot be one of it; None where it can. Raises ModelUnavailable."""
    loader.quiet_libraries()
    config = loader.read_config(folder, placement)
    reasons = {kind: implementation(kind).check(config) for kind in kinds}
    return {kind: reason and f"{config.model_type} models {reason}" for kind, reason in reasons.items()}


def implementation(kind: str) -> Any:
    """The pipeline's class; its module registers it with transformers."""
    loader.quiet_libraries()
    importlib.import_module(f"llmcli.pipelines.{kind}")
    from transformers.pipelines import PIPELINE_REGISTRY

    _, about, _ = PIPELINE_REGISTRY.check_task(f"llmcli-{kind}")
    return about["impl"]


def _made(kind: str, model: Any, tokenizer: Any) -> Any:
    from transformers import pipeline

    # A model that accelerate spread says where it is; one on a single device would be moved to the first GPU.
    device = None if getattr(model, "hf_device_map", None) else model.device
    return pipeline(f"llmcli-{kind}", model=model, tokenizer=tokenizer, device=device)
