"""transformers pipelines of our own, one per kind of head, under ids of our own."""

from pathlib import Path
from typing import Any

from llmcli.job import Placement

IDS = {"causal": "llmcli-causal"}


def load(kind: str, folder: Path, placement: Placement) -> Any:
    """A ready transformers.Pipeline. Raises what `loader.load` raises."""
    from llmcli import loader

    model, tokenizer = loader.load(folder, placement)
    # transformers' registry, rather than the class itself: `transformers.pipeline("llmcli-causal")` works too.
    from transformers.pipelines import PIPELINE_REGISTRY

    from llmcli.pipelines.causal import CausalPipeline

    if IDS[kind] not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(IDS[kind], pipeline_class=CausalPipeline)
    return PIPELINE_REGISTRY.check_task(IDS[kind])[1]["impl"](model=model, tokenizer=tokenizer)
