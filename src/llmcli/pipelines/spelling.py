"""Token IDs -> what each token stands for, as people can read it."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmcli.compat.tokenizers import byte_alphabet, is_byte_level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT_TOKENS = 4  # decoded with a token, whose text may depend on them: a space, the rest of a character
PENDING = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of a part of a character


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """Return the text of each token: of a special one its name, of a part of a character its bytes, `\\xe4`."""
    special, texts, begin = set(tokenizer.all_special_ids), list[str](), 0
    has_bytes = is_byte_level(tokenizer)
    for i, token in enumerate(ids):
        piece = tokenizer.convert_ids_to_tokens(token)
        if token in special:
            begin = i + 1
            texts.append(piece)
            continue
        tail = list(ids[max(begin, i - CONTEXT_TOKENS) : i])
        before = _decode(tokenizer, tail)
        text = _decode(tokenizer, [*tail, token]).removeprefix(before.rstrip(PENDING))
        if PENDING in text or before.endswith(PENDING):
            parts = _to_bytes(piece, has_bytes)
            text = "".join(chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}" for byte in parts) or text
        texts.append(text)
    return texts


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
    alphabet = byte_alphabet()
    return bytes(map(alphabet.__getitem__, piece)) if has_bytes and alphabet.keys() >= set(piece) else b""
