"""transformers pipelines of our own, one for each kind of thing that tasks ask of a model."""

import functools
import importlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmcli.job import LoadOptions
from llmcli.models import loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmcli.pipelines.base import TextPipeline

CLASSES = {  # kind: module of this package, and class
    "attention": ("attention", "AttentionPipeline"),
    "causal": ("causal", "CausalPipeline"),
    "causal_attention": ("attention", "CausalAttentionPipeline"),
    "embedding": ("embedding", "EmbeddingPipeline"),
    "extractive_qa": ("extractive_qa", "ExtractiveQaPipeline"),
    "label": ("labels", "LabelPipeline"),
    "next_token": ("causal", "NextTokenPipeline"),
    "reranking": ("reranking", "RerankingPipeline"),
    "scoring": ("scoring", "ScoringPipeline"),
    "seq2seq": ("seq2seq", "Seq2SeqPipeline"),
    "sequence_classification": ("classification", "SequenceClassificationPipeline"),
    "token_classification": ("token_classification", "TokenClassificationPipeline"),
}


def load(kind: str, folder: Path, load_options: LoadOptions) -> "TextPipeline":
    """Load a model from its directory, and return its pipeline of that kind."""
    pipeline_type = pipeline_class(kind)
    from llmcli.pipelines import quantizer

    scheme, source, quantization = load_options.quantize, folder, None
    if scheme != "none":
        device = loading.choose_device(load_options.device)
        quantizer.check_options(folder, load_options, device)
        if device == "cpu":
            source = quantizer.make_copy(folder, load_options, pipeline_type)
            load_options = replace(load_options, dtype="bfloat16", adapter=None)  # The kernels read no other rows.
        else:
            quantization = quantizer.bitsandbytes_config(load_options, device)
    model, tokenizer = loading.load(source, load_options, pipeline_type, quantization)
    if quantization:
        quantizer.check_layers(model, folder, scheme)
    if model.device.type == "cpu" and not (load_options.offload_folder or load_options.tensor_parallel):
        quantizer.pack(model)
    return _make(kind, model, tokenizer)


def wrap_as(kind: str, pipeline: "TextPipeline") -> "TextPipeline":
    """Return a pipeline of that kind on the model of another."""
    return pipeline if type(pipeline) is pipeline_class(kind) else _make(kind, pipeline.model, pipeline.tokenizer)


def check_compatibility(folder: Path, load_options: LoadOptions, kinds: Iterable[str]) -> dict[str, str | None]:
    """Return for each kind why the model in that directory is unsuitable; None if it is suitable."""
    loading.quiet_libraries()
    config = loading.read_config(folder, load_options)
    with loading.translated_errors(folder):
        reasons = {kind: pipeline_class(kind).find_incompatibility(config) for kind in kinds}
    return {kind: reason and f"{config.model_type} models {reason}" for kind, reason in reasons.items()}


@functools.cache
def pipeline_class(kind: str) -> type["TextPipeline"]:
    """Return the class of that kind, and let transformers know it as the task `llmcli-KIND`."""
    loading.quiet_libraries()
    from transformers.pipelines import PIPELINE_REGISTRY

    module, name = CLASSES[kind]
    found: type[TextPipeline] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    PIPELINE_REGISTRY.register_pipeline(f"llmcli-{kind}", pipeline_class=found)
    return found


def _make(kind: str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> "TextPipeline":
    from transformers import pipeline

    # A model that accelerate spread says where it is; one on a single device would be moved to the first GPU.
    device = None if getattr(model, "hf_device_map", None) else model.device
    return pipeline(f"llmcli-{kind}", model=model, tokenizer=tokenizer, device=device)  # type: ignore[no-any-return]
