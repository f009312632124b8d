"""Tiny models with classification heads, with fixed random weights and the tokenizers of tests/golden."""

from pathlib import Path
from typing import Any

import transformers
from architectures import make_model, small_config

GOLDEN = Path(__file__).parent / "golden"
TOKENIZERS = {  # word pieces, bytes, SentencePiece
    "bert": "bert-qa", "roberta": "roberta-qa", "deberta-v2": "t5", "bart": "bart", "llama": "bart",
    "distilbert": "distilbert-qa", "modernbert": "roberta-qa", "xlm-roberta": "nllb", "albert": "t5",
    "electra": "bert-qa", "t5": "t5", "qwen2": "bart", "gpt2": "bart", "mpnet": "bert-qa", "xlnet": "t5",
}  # fmt: skip
NO_PADDING = ("gpt2", "llama")  # no pad_token_id, as most causal models are published
WINDOW = 64  # tokens that fit
EMOTIONS = {0: "anger", 1: "joy", 2: "fear", 3: "love"}
SENTIMENTS = {0: "NEGATIVE", 1: "POSITIVE"}
ENTITIES = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}
NLI = {0: "contradiction", 1: "neutral", 2: "entailment"}


def save_head(folder: Path, model_type: str, head: str, id2label: dict[int, str], **settings: Any) -> Path:
    """Save a tiny model with a head such as TokenClassification, and a tokenizer that knows its window."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(GOLDEN / TOKENIZERS[model_type])
    tokenizer.model_max_length = WINDOW
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    if model_type in NO_PADDING:
        ids["pad_token_id"] = None
        if head == "SequenceClassification":  # The pipeline for tokens pads windows.
            tokenizer.pad_token = None
    labels = {"id2label": id2label, "label2id": {name: id for id, name in id2label.items()}}
    settings = {"vocab_size": max(len(tokenizer), 600), **ids, **labels, **settings}
    auto_class = getattr(transformers, f"AutoModelFor{head}")
    make_model(auto_class, small_config(model_type, **settings), std=0.3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
