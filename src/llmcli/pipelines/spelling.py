"""Token IDs -> what each token stands for, as people can read it."""

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from llmcli.compat.tokenizers import is_byte_level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT_TOKENS = 4  # decoded with a token, whose text may depend on them: a space, the rest of a character
PENDING = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of a part of a character


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """Return the text of each token: of a special one its name, of a part of a character its bytes, `\\xe4`."""
    spell = speller(tokenizer)
    return [spell(ids[max(0, i - CONTEXT_TOKENS) : i], token)[0] for i, token in enumerate(ids)]


def speller(tokenizer: "PreTrainedTokenizerBase") -> Callable[[Sequence[int], int], tuple[str, bytes]]:
    """Return a function from a token, after the tokens before it, to its text and the bytes of the text."""
    special, has_bytes = set(tokenizer.all_special_ids), is_byte_level(tokenizer)

    def spell(before: Sequence[int], token: int) -> tuple[str, bytes]:
        piece: str = tokenizer.convert_ids_to_tokens(token)
        if token in special:
            return piece, piece.encode()
        tail = list(before[-CONTEXT_TOKENS:])
        while special.intersection(tail):
            del tail[0]
        known = _decode(tokenizer, tail)
        text = _decode(tokenizer, [*tail, token]).removeprefix(known.rstrip(PENDING))
        data = _to_bytes(piece, has_bytes) if PENDING in text or known.endswith(PENDING) else b""
        if not data:
            return text, text.encode()
        return "".join(chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}" for byte in data), data

    return spell


def tokens_of(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[dict[str, object]]:
    """Return the tokens of a text: each with its text, its ID, how the vocabulary writes it, whether it is special."""
    ids, special = tokenizer(text)["input_ids"], set(tokenizer.all_special_ids)
    rows = zip(token_texts(tokenizer, ids), ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
    return [{"token": token, "id": id, "piece": piece, "special": id in special} for token, id, piece in rows]


def first_token_bytes(tokenizer: "PreTrainedTokenizerBase", token: int) -> int:
    """Return the number of bytes of a text that its first token stands for; none for a special token."""
    if token in tokenizer.all_special_ids:
        return 0
    data = _to_bytes(tokenizer.convert_ids_to_tokens(token), is_byte_level(tokenizer))
    return len(data or _decode(tokenizer, [token]).encode())


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) if ids else ""


def _to_bytes(piece: str, has_bytes: bool) -> bytes:
    """Return the bytes of a token that is one, `<0xE4>`, or that is written in GPT-2's alphabet; else none."""
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(match[1])
    alphabet = _alphabet()
    return bytes(map(alphabet.__getitem__, piece)) if has_bytes and alphabet.keys() >= set(piece) else b""


@cache
def _alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: a printable byte is its own character, the others have those from 256 on, in order."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    printable = {letter: ord(letter) for letter in letters if ord(letter) < 256}
    others = [letter for letter in letters if ord(letter) >= 256]
    return printable | dict(zip(others, sorted(set(range(256)) - set(printable.values())), strict=True))
