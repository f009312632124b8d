"""Quantized copies of models: made once from the weights in a directory, and kept as long as these exist."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from llmcli import config
from llmcli.models.store import cache

FORMAT = 1  # version of what `pipelines/quantizer.py` writes; a new one invalidates older copies
SOURCE = "quantized-from.txt"  # in a copy: the directories that it was made from
CONFIGURATION = ("*.json", "*.txt", "*.model", "*.spm", "*.jinja", "*.py", "[0-9]*/*.json", "[0-9]*/*.safetensors")


def get_or_create(folder: Path, variant: str, make: Callable[[Path], None], adapter: str | None = None) -> Path:
    """Return the copy of a model that `variant` names; if there is none of these weights, `make` writes them to it."""
    source = folder.resolve()
    sources = [source, Path(adapter)] if adapter else [source]
    variant = f"{cache.digest(adapter)}-{variant}" if adapter else variant
    patterns = ("*.safetensors", "*.bin", "config.json")
    files = sorted(file for place in sources for kind in patterns for file in place.glob(kind))
    state = FORMAT, [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files if file.is_file()]
    stem = f"{folder.name}-{cache.digest(str(source))}-{variant}"
    home = config.cache_dir() / "quantized" / f"{stem}-{cache.digest(repr(state))}"
    if home.is_dir():
        return home

    def copy(staging: Path) -> Path:
        made = staging / "ready"
        for file in (file for pattern in CONFIGURATION for file in source.glob(pattern)):
            if file.is_file() and not file.name.endswith(".index.json"):  # of the weights' shards
                to = made / file.relative_to(source)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, to)
        make(made)
        (made / SOURCE).write_text("\n".join(map(str, sources)), encoding="utf-8")
        return made

    with cache.writing(), cache.lock(stem, f"{folder.name} is being quantized by another process"):
        if not home.is_dir():
            cache.publish(home, copy)
            cache.remove_older(home)
            prune_orphans()
    return home


def prune_orphans() -> None:
    """Delete the copies of models that no longer exist."""
    for home in (config.cache_dir() / "quantized").glob("*"):
        source = home / SOURCE
        if source.is_file() and not all(map(os.path.isdir, source.read_text(encoding="utf-8").split("\n"))):
            cache.remove(home)
