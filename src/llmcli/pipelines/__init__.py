"""transformers pipelines of our own, one per kind of head: the file's name is the kind, `llmcli-KIND` its id."""

import importlib
from pathlib import Path
from typing import Any

from llmcli import loader
from llmcli.job import Placement


def load(kind: str, folder: Path, placement: Placement) -> Any:
    """A ready transformers.Pipeline. Raises what `loader.load` raises."""
    importlib.import_module(f"llmcli.pipelines.{kind}")  # registers itself with transformers
    from transformers import pipeline
    from transformers.pipelines import PIPELINE_REGISTRY

    _, implementation, _ = PIPELINE_REGISTRY.check_task(f"llmcli-{kind}")
    model, tokenizer = loader.load(folder, placement, implementation["impl"])
    # A model that accelerate spread says where it is; one on a single device would be moved to the first GPU.
    device = None if getattr(model, "hf_device_map", None) else model.device
    return pipeline(f"llmcli-{kind}", model=model, tokenizer=tokenizer, device=device)
