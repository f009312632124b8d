"""Checks a model's directory before it is loaded: no file outside is read, and its settings choose no code."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmcli.errors import ModelUnavailableError

READ = ("*", "[0-9]*/*", "additional_chat_templates/*")
FILE_KEYS = {"configuration_files", "fast_tokenizer_files", "transformers_weights", "weight_map"}
SETTINGS = ("config.json", "config.*.json", "*_config.json", "*.index.json")
MAX_TEXT_BYTES = 2 * 10**8  # of settings, tokenizers and templates; the largest tokenizers have 40 MB
INTERNAL_KEYS = {
    "_attn_implementation_internal", "_experts_implementation_internal", "_auto_class", "__class__", "__dict__",
}  # fmt: skip


def check_folder(folder: Path, *, trusts_code: bool) -> None:
    """Raise ModelUnavailableError if a file is outside the directory, or if a setting chooses code to run.

    A file is outside if it is a link to one outside, or if a setting names it. A link to nothing is ignored. What would
    be read without end is refused too: pipes, devices and huge settings.
    """
    home = folder.resolve()
    # The Hub's cache keeps the files of a snapshot elsewhere.
    roots = [home, *[(home.parents[1] / "blobs").resolve()] * (home.parent.name == "snapshots")]

    def require_inside(path: Path, description: str) -> None:
        target = Path(os.path.realpath(path))  # Path.resolve raises for a link to itself.
        if os.path.isfile(target) and not any(map(target.is_relative_to, roots)):
            hint = "put the file itself in the directory, if you trust whoever made the model"
            raise ModelUnavailableError(f"{description} is '{target}', outside the model's directory", hint)
        if os.path.exists(target) and not os.path.isfile(target) and not os.path.isdir(target):
            raise ModelUnavailableError(f"{description} is a pipe, a socket or a device", "expected a file")

    for file in (file for pattern in READ for file in folder.glob(pattern)):
        require_inside(file, f"'{file}'")
        if file.suffix in (".json", ".jinja") and file.is_file() and (size := file.stat().st_size) > MAX_TEXT_BYTES:
            raise ModelUnavailableError(f"'{file}' has {size} bytes; the maximum is {MAX_TEXT_BYTES}")
    for file in (file for pattern in SETTINGS for file in folder.glob(pattern)):
        names = set()
        for keys, value in _walk(read_json(file)):
            text = value if isinstance(value, str) else ""
            if not trusts_code and _chooses_code(keys, value, text):
                hint = "if you trust whoever made the model, pass --trust-remote-code"
                raise ModelUnavailableError(f"'{file}' cannot set {'.'.join(keys[1:])!r}, which may run code", hint)
            is_name = keys[-1].endswith("_file") or not FILE_KEYS.isdisjoint(keys)
            if is_name and "\0" not in text and keys[-1] != "special_tokens_map_file":  # which nothing reads
                names.add(text)
        for name in names:
            require_inside(folder / name, f"{name!r} in '{file}'")


def _chooses_code(keys: tuple[str, ...], value: object, text: str) -> bool:
    is_kernel = "/" in text and any(key.endswith("_implementation") for key in keys)
    is_internal = not INTERNAL_KEYS.isdisjoint(keys)
    is_model = keys[-1] == "tokenizer_class" and bool(text) and not re.search("Tokenizer|Backend", text)
    return is_kernel or is_internal or is_model or (keys[-1] == "trust_remote_code" and bool(value))


def _walk(settings: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield all values that hold no others, with the keys that lead to them; the first is empty."""
    waiting: list[tuple[tuple[str, ...], Any]] = [(("",), settings)]
    while waiting:
        keys, value = waiting.pop()
        if value and isinstance(value, dict):
            waiting += [((*keys, key), item) for key, item in value.items()]
        elif value and isinstance(value, list):
            waiting += [(keys, item) for item in value]
        else:
            yield keys, value


def read_json(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError):
        return {}  # Transformers says what is wrong with it.
    return settings if isinstance(settings, dict) else {}
