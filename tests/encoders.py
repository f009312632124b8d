"""Tiny encoders and cross-encoders in the folders that releases 1 to 6 of sentence-transformers write."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import make_model, small_config
from heads import GOLDEN, TOKENIZERS, save_head
from safetensors.torch import save_file

MEAN, CLS = {"pooling_mode_mean_tokens": True}, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
LAST = {"word_embedding_dimension": 32, "pooling_mode_lasttoken": True, "include_prompt": True}
NORMALIZE = ("Normalize", {})
INSTRUCT = "Instruct: Given a question, find passages\nQuery:"
IDENTITY = "torch.nn.modules.linear.Identity"
Modules = list[tuple[str, dict[str, Any]]]


def dense(inputs: int, outputs: int, **settings: Any) -> tuple[str, dict[str, Any]]:
    return "Dense", {"in_features": inputs, "out_features": outputs, "bias": True, **settings}


SHAPES: dict[str, dict[str, Any]] = {  # by the name of the published model, or of what is special
    "e5": {"kind": "xlm-roberta", "modules": [("Pooling", MEAN), NORMALIZE], "prompts": {"query": "query: "}},
    "bge": {"kind": "bert", "modules": [("Pooling", CLS), NORMALIZE], "lower": True},
    "arctic": {"kind": "bert", "modules": [("Pooling", CLS)], "prompts": {"query": "Represent this: "}},
    "nomic": {
        "kind": "nomic_bert", "modules": [("Pooling", MEAN)],
        "prompts": {"query": "search_query: ", "document": "search_document: "},
    },
    "qwen3": {"kind": "qwen3", "modules": [("Pooling", LAST), NORMALIZE], "prompts": {"query": INSTRUCT}, "left": True},
    "gemma": {
        "kind": "gemma3_text", "config": {"use_bidirectional_attention": True},
        "modules": [
            ("Pooling", {"pooling_mode": "mean"}), dense(32, 64, bias=False, activation_function=IDENTITY),
            dense(64, 32, bias=False, activation_function=IDENTITY), NORMALIZE,
        ],
        "prompts": {"query": "task: search result | query: ", "document": "title: none | text: "},
    },
    "labse": {"kind": "bert", "modules": [("Pooling", CLS), dense(32, 32), NORMALIZE]},
    "gtr": {"kind": "t5", "modules": [("Pooling", MEAN), dense(32, 24, bias=False), NORMALIZE]},
    "instructor": {
        "kind": "t5", "modules": [("Pooling", {**MEAN, "include_prompt": False}), NORMALIZE],
        "prompts": {"query": "Represent the question: ", "document": "Represent the text: "},
    },
    "sgpt": {"kind": "gpt2", "modules": [("Pooling", {"pooling_mode": "weightedmean"})]},
    "default": {"kind": "mpnet", "modules": [("Pooling", MEAN)], "prompts": {"sts": "similar: "}, "default": "sts"},
    "joined": {
        "kind": "distilbert", "prompts": {"query": "find: "},
        "modules": [
            ("Pooling", {"pooling_mode": ["max", "mean_sqrt_len_tokens", "cls", "lasttoken"], "include_prompt": False}),
            ("Dropout", {"dropout": 0.1}),
            dense(128, 16, activation_function="torch.nn.modules.activation.GELU", use_residual=True),
        ],
    },
    "tokens": {  # modules that precede the pooling
        "kind": "modernbert",
        "modules": [
            dense(32, 12, module_input_name="token_embeddings"),
            ("Normalize", {"module_input_name": "token_embeddings"}),
            ("Pooling", {"pooling_mode": "weightedmean", "include_prompt": False}),
        ],
        "prompts": {"query": "find: "},
    },
}  # fmt: skip
KINDS = {"nomic_bert": "bert-qa", "qwen3": "bart", "gemma3_text": "t5"}  # tokenizers of tests/golden


def save_encoder(
    folder: Path, kind: str, modules: Modules, *, prompts: dict[str, str] | None = None, default: str | None = None,
    config: dict[str, Any] | None = None, lower: bool = False, left: bool = False, max_length: int = 64,
) -> Path:  # fmt: skip
    """Save an encoder with the modules that follow the transformer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(GOLDEN / {**TOKENIZERS, **KINDS}[kind])
    tokenizer.padding_side = "left" if left else "right"
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    settings = small_config(kind, vocab_size=max(len(tokenizer), 600), **ids, **(config or {}))
    auto_class = transformers.AutoModelForTextEncoding if kind == "t5" else transformers.AutoModel
    make_model(auto_class, settings, std=0.3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    types = [("Transformer", ""), *((name, f"{i}_{name}") for i, (name, _) in enumerate(modules, start=1))]
    write(folder / "modules.json", [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(types)
    ])  # fmt: skip
    write(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": lower})
    write(folder / "config_sentence_transformers.json", {"prompts": prompts or {}, "default_prompt_name": default})
    for (name, path), (_, own) in zip(types[1:], modules, strict=True):
        (folder / path).mkdir()
        if name == "Pooling" and not own.keys() & {"embedding_dimension", "word_embedding_dimension"}:
            own = {"word_embedding_dimension": 12 if types[1][0] == "Dense" else 32, **own}
        write(folder / path / "config.json", own)
        if weights := make_weights(name, own):
            save_file(weights, folder / path / "model.safetensors")
    return folder


def save_cross_encoder(folder: Path, kind: str, activation: str | None = None, **settings: Any) -> Path:
    """Save a model with one score; `activation` as release 4 writes it."""
    own = {"sentence_transformers": {"activation_fn": activation, "version": "4.0.1"}} if activation else {}
    return save_head(folder, kind, "SequenceClassification", {0: "LABEL_0"}, **own, **settings)


def make_weights(name: str, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(len(str(config)))
    if name != "Dense":
        return {}
    outputs, inputs = config["out_features"], config["in_features"]
    weights = {"linear.weight": torch.randn(outputs, inputs) / inputs}
    if config["bias"]:
        weights["linear.bias"] = torch.randn(outputs)
    if config.get("use_residual") and inputs != outputs:
        weights["residual.weight"] = torch.randn(outputs, inputs) / inputs
    return weights


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
