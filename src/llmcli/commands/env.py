"""llmcli env: versions, devices, paths, and what is cached."""

import platform
import sys
from importlib.metadata import version
from typing import Any

from llmcli import __version__, config
from llmcli.io.output import print_lines, to_json
from llmcli.models import registry, store
from llmcli.options import Json, Quiet, Verbose
from llmcli.options.expand import expand_options

PACKAGES = ("transformers", "torch", "accelerate", "huggingface_hub", "tokenizers", "safetensors", "typer", "rich")


@expand_options
def env(json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Show versions, devices, paths: for a bug report.

    \b
    llmcli env
    """
    about: dict[str, Any] = {"llmcli": __version__, "python": f"{platform.python_version()} ({sys.executable})"}
    about["platform"] = platform.platform()
    about |= {name: version(name) for name in PACKAGES}
    about |= _devices()
    about |= {"cache": str(config.cache_dir()), "config": str(config.config_file()), "hub cache": _hub_cache()}
    about["offline"] = config.settings().offline
    about["cached"] = [spec.name for spec in registry.models().values() if store.find_or_none(spec)]
    if json:
        print_lines([to_json(about)])
    else:
        width = max(map(len, about))
        print_lines(f"{key:{width}}  {_plain(value)}" for key, value in about.items())


def _devices() -> dict[str, Any]:
    import psutil
    import torch

    from llmcli.models import loading

    device = loading.choose_device("auto")
    names = [f"cpu ({torch.get_num_threads()} threads)"]
    if device != "cpu":
        names += [f"{device}:{i}" for i in range(torch.accelerator.device_count())]
    return {
        "devices": names,
        "default": f"{device}, {str(loading.choose_dtype('auto', device)).removeprefix('torch.')}",
        "memory": f"{psutil.virtual_memory().available / 1e9:.1f} GB available",
    }


def _hub_cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "nothing"
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)
