"""Quantized copies of models: made once of the weights in a folder, and kept as long as these are there."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from llmcli import config
from llmcli.models.store import cache

FORMAT = 1  # what `pipelines/quantizer.py` writes; another makes older copies out of date
SOURCE = "quantized-from.txt"  # in a copy: the folder that it was made of
CONFIGURATION = ("*.json", "*.txt", "*.model", "*.spm", "*.jinja", "*.py", "[0-9]*/*.json")


def ready(folder: Path, variant: str, make: Callable[[Path], None]) -> Path:
    """The copy of that folder which `variant` names, made if it is not there, or if the weights are others than it was
    made of. `make` writes weights and configuration to a folder, where tokenizer and all else that is no weights
    already are.

    Raises ModelUnavailable where there is no space left, and what `make` raises.
    """
    source = folder.resolve()
    stem = f"{folder.name}-{_digest(str(source))}-{variant}"
    home = config.cache_dir() / "quantized" / f"{stem}-{_digest(_state(source))}"
    if home.is_dir():
        return home

    def copy(staging: Path) -> Path:
        made = staging / "ready"
        for file in (file for pattern in CONFIGURATION for file in source.glob(pattern)):
            if not file.name.endswith(".index.json"):  # of the weights' shards
                to = made / file.relative_to(source)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, to)
        make(made)
        (made / SOURCE).write_text(str(source), encoding="utf-8")
        return made

    with cache.writing(), cache.lock(stem, f"{folder.name} is being quantized by another process"):
        if not home.is_dir():
            cache.put(home, copy)
            for older in home.parent.glob(f"{stem}-*"):
                if older != home:
                    cache.drop(older)
            forget_orphans()
    return home


def forget_orphans() -> None:
    """Delete the copies of models that are no more."""
    for home in (config.cache_dir() / "quantized").glob("*"):
        source = home / SOURCE
        if source.is_file() and not Path(source.read_text(encoding="utf-8")).is_dir():
            cache.drop(home)


def _state(folder: Path) -> str:
    """Changes when the weights do."""
    files = sorted(file for kind in ("*.safetensors", "*.bin", "config.json") for file in folder.glob(kind))
    found = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    return repr((FORMAT, found))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
