"""What fast tokenizers tell of themselves: their decoder, and their special tokens."""

import json
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def is_byte_level(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether the vocabulary is written in GPT-2's alphabet for bytes."""
    return "ByteLevel" in repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))


@cache
def byte_alphabet() -> dict[str, int]:
    """Return the byte that each letter of GPT-2's alphabet stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


def read_as_text(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Let a tokenizer read the names of special tokens, such as `</s>`, in a text as text."""
    tokenizer.split_special_tokens = True
    names = [token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not names:
        return
    from tokenizers import normalizers

    # The vocabularies of Unigram and others have these names too. A similar first character keeps all offsets.
    try:
        read = tokenizer(names, add_special_tokens=False)["input_ids"]
    except Exception:  # tokenizers': the vocabulary does not have all characters
        return
    ids = zip(names, tokenizer.convert_tokens_to_ids(names), read, strict=True)
    known = [name for name, id, row in ids if id in row and id != tokenizer.unk_token_id and len(name) > 1]
    if known:
        usual = [backend.normalizer] if backend.normalizer else []
        changes = [normalizers.Replace(name, f"‹{name[1:]}") for name in known]
        backend.normalizer = normalizers.Sequence([*usual, *changes])


def hide_names(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a fast tokenizer as JSON, for llguidance: no text has the names of its special tokens.

    llguidance also takes an added token as special if its name is in angle brackets. The text of such a name would have
    to be this token, which is not allowed in a text. Raises ValueError for a slow tokenizer.
    """
    if not (backend := getattr(tokenizer, "backend_tokenizer", None)):
        raise ValueError("only fast tokenizers are supported")
    data = json.loads(backend.to_str()) | {"padding": None, "truncation": None, "post_processor": None}
    names = {}
    for token in data["added_tokens"]:
        name = token["content"]
        if token["special"] or (name.startswith("<") and name.endswith(">")):
            token["content"] = names[name] = f"\0{name}"
    model, vocab = data["model"], data["model"]["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): id for piece, id in vocab.items()}
        model["unk_token"] = names.get(model.get("unk_token"), model.get("unk_token"))
    else:  # of Unigram models
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    return json.dumps(data)
