"""What fast tokenizers tell of themselves: their decoder, and how to decode a stream of tokens."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def is_byte_level(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether the vocabulary is written in GPT-2's alphabet for bytes."""
    return "ByteLevel" in repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))


def read_as_text(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Let a tokenizer read the names of special tokens, such as `</s>`, in a text as text."""
    tokenizer.split_special_tokens = True
    names = special_names(tokenizer)
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


def special_names(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    return [token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special]


def hide_names(tokenizer: "PreTrainedTokenizerBase", names: Iterable[str]) -> str:
    """Return a fast tokenizer as JSON in which special tokens have other names, so that no text is read as one."""
    text: str = tokenizer.backend_tokenizer.to_str()
    for name in names:
        text = text.replace(json.dumps(name, ensure_ascii=False), json.dumps(f"\0{name}", ensure_ascii=False))
    return text


def decode_stream(tokenizer: "PreTrainedTokenizerBase", before: Sequence[int]) -> Callable[[int], str | None] | None:
    """Return a function from the next token after `before` to new text; None for slow tokenizers.

    It returns nothing while a character is unfinished, and raises if the text before it would change.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(ids=list(before), skip_special_tokens=True)
    return lambda token: stream.step(backend, token)
