"""Token ids -> what each token stands for, as people can read it."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

BEFORE = 4  # tokens that are decoded with one, for what it says may depend on them: a space, the rest of a character
PENDING = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of a part of a character


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token. Joined they are the text again, but for two kinds: special tokens go by their names, and
    parts of a character are bytes, `\\xe4`."""
    special, texts, begin = set(tokenizer.all_special_ids), list[str](), 0
    of_bytes = _is_of_bytes(tokenizer)
    for i, token in enumerate(ids):
        piece = tokenizer.convert_ids_to_tokens(token)
        if token in special:
            begin = i + 1
            texts.append(piece)
            continue
        tail = list(ids[max(begin, i - BEFORE) : i])
        known = _decode(tokenizer, tail)
        text = _decode(tokenizer, [*tail, token]).removeprefix(known.rstrip(PENDING))
        if PENDING in text or known.endswith(PENDING):
            text = "".join(_shown(byte) for byte in _bytes(piece, of_bytes)) or text
        texts.append(text)
    return texts


def tokens_of(tokenizer: Any, text: str) -> list[dict[str, Any]]:
    """A text's tokens: what each stands for, its id, how the vocabulary writes it, and whether it is a special one."""
    ids, special = tokenizer(text)["input_ids"], set(tokenizer.all_special_ids)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    return [
        {"token": token, "id": each, "piece": piece, "special": each in special}
        for token, each, piece in zip(token_texts(tokenizer, ids), ids, pieces, strict=True)
    ]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False) if ids else ""
    return text


def size_of(tokenizer: Any, token: int) -> int:
    """Bytes of a text that a token at its beginning stands for; a special one for none."""
    if token in tokenizer.all_special_ids:
        return 0
    data = _bytes(tokenizer.convert_ids_to_tokens(token), _is_of_bytes(tokenizer))
    return len(data or _decode(tokenizer, [token]).encode())


def _is_of_bytes(tokenizer: Any) -> bool:
    """Whether its vocabulary is written in GPT-2's alphabet."""
    return "ByteLevel" in repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))


def _bytes(piece: str, of_bytes: bool) -> bytes:
    """Of a token that is a byte, `<0xE4>`, or is written in GPT-2's alphabet of 256 characters; else nothing."""
    if found := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(found[1])
    known = _alphabet()
    return bytes(known[each] for each in piece) if of_bytes and all(each in known for each in piece) else b""


@cache
def _alphabet() -> dict[str, int]:
    """GPT-2's: a printable byte is its own character, the others have those from 256 on, in order."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    own = {each: ord(each) for each in letters if ord(each) < 256}
    others = [each for each in letters if ord(each) >= 256]
    return own | dict(zip(others, sorted(set(range(256)) - set(own.values())), strict=True))


def _shown(byte: int) -> str:
    return chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}"
