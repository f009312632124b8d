"""What fast tokenizers tell of themselves: their decoder, and how to decode a stream of tokens."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def is_byte_level(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether the vocabulary is written in GPT-2's alphabet for bytes."""
    return "ByteLevel" in repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))


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
