"""Tiny causal models of several kinds, and a batch of prompts through the pipeline of one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmcli import pipelines
from llmcli.errors import RecordError
from llmcli.job import LoadOptions
from llmcli.pipelines.running import BatchSettings, GeneratingRow

KINDS = ("llama", "gpt2", "gemma3", "mamba", "bloom")
FAST_KINDS = [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "llama")) for kind in KINDS]


def make_model(kind: str, tiny: Path, folder: Path, *, more_logits: int = 0) -> Path:
    """Save a model of that kind with the tiny Llama's tokenizer, and weights that make a difference."""
    import torch
    import transformers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    size = {"vocab_size": len(tokenizer) + more_logits, **ids}
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    layers |= {"num_key_value_heads": 2, "max_position_embeddings": 1024, "head_dim": 8}
    classes, settings = {
        "llama": (("LlamaConfig", "LlamaForCausalLM"), layers),
        "gpt2": (("GPT2Config", "GPT2LMHeadModel"), {"n_embd": 32, "n_layer": 2, "n_head": 4}),
        "gemma3": (("Gemma3TextConfig", "Gemma3ForCausalLM"), {**layers, "sliding_window": 8}),
        "mamba": (("MambaConfig", "MambaForCausalLM"), {"hidden_size": 32, "num_hidden_layers": 2}),
        "bloom": (("BloomConfig", "BloomForCausalLM"), {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    }[kind]
    config, model = (getattr(transformers, name) for name in classes)
    torch.manual_seed(3)
    made = model(config(**settings, **size))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    return pipelines.load("causal", folder, LoadOptions(device="cpu", dtype="float32"))


def generate(pipeline: Any, prompts: Sequence[Any], options: dict[str, Any], **settings: Any) -> list[Any]:
    """Return the outputs of one batch, or the errors of its rows, as the runner of batches makes them."""
    from llmcli.models import generation

    defaults = {"max_new_tokens": 200, "do_sample": False}
    config = generation.merge(pipeline.model.generation_config, options, defaults)
    config.pad_token_id = pipeline.tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
    config.eos_token_id = pipeline.find_end_tokens(config)
    columns = {name: settings.get(name) or [None] * len(prompts) for name in ("max_new_tokens", "constraints", "seeds")}
    limits = [limit or config.max_new_tokens for limit in columns.pop("max_new_tokens")]
    rows = [
        GeneratingRow(*row) for row in zip(map(pipeline.preprocess, prompts), limits, *columns.values(), strict=True)
    ]
    length = max(len(row.inputs["input_ids"]) + row.max_new_tokens for row in rows)
    shared = {name: settings.get(name) for name in ("logprobs", "streamer")}
    batch = pipeline.start(BatchSettings(config, **shared, max_rows=len(rows), max_length=length))
    batch.add(rows, settings.get("prefix"))
    outputs: dict[int, Any] = {}
    while len(outputs) < len(rows):
        outputs |= batch.step()
    made = []
    for i in range(len(rows)):
        try:
            made.append(pipeline.postprocess(outputs[i], generation_config=config))
        except RecordError as exc:
            made.append(exc)
    return made
