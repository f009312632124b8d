"""What the directory of a sentence encoder states, read without loading anything."""

import json
from pathlib import Path
from typing import Any

from llmcli.errors import ModelUnavailableError

DEFAULT_WINDOW_TOKENS = 512


def window(folder: Path) -> int:
    """Return the maximum number of tokens of a text, special ones included."""
    limits = (
        _read(folder / "sentence_bert_config.json").get("max_seq_length"),
        _read(folder / "tokenizer_config.json").get("model_max_length"),
        _read(folder / "config.json").get("max_position_embeddings"),
    )
    return int(min(filter(None, limits), default=DEFAULT_WINDOW_TOKENS))


def pooling(folder: Path) -> str:
    """Return how one vector is made of many: mean_tokens, or cls_token."""
    modes = _read(folder / "1_Pooling" / "config.json")
    modes_on: list[str] = [name.removeprefix("pooling_mode_") for name, is_on in modes.items() if is_on is True]
    modules = _read(folder / "modules.json") or []
    layers = {str(module["type"]).rpartition(".")[2] for module in modules} - {"Transformer", "Pooling", "Normalize"}
    if layers or (modes_on and modes_on not in (["mean_tokens"], ["cls_token"])):
        reason = f"pooling by {', '.join(sorted(layers) or modes_on)} is not supported"
        raise ModelUnavailableError(f"{folder}: {reason}", hint="use another sentence encoder")
    return modes_on[0] if modes_on else "mean_tokens"


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
