"""llmcli env: print environment information for bug reports."""

import platform
import sys
from importlib.metadata import version
from importlib.util import find_spec

from llmcli import __version__, config
from llmcli.io.output import print_lines, to_json
from llmcli.models import registry, store
from llmcli.models.memory import available_memory
from llmcli.options import Json, Quiet, Verbose, expand_options

PACKAGES = ("transformers", "torch", "accelerate", "huggingface_hub", "tokenizers", "safetensors", "typer", "rich",
            "bitsandbytes")  # fmt: skip


@expand_options
def env(json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Print environment information for bug reports.

    \b
    llmcli env
    """
    from huggingface_hub import constants

    info = {
        "llmcli": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        **{name: version(name) for name in PACKAGES if find_spec(name)},
        **_devices(),
        "cache": str(config.cache_dir()),
        "config": str(config.config_file()),
        "hub cache": str(constants.HF_HUB_CACHE),
        "offline": config.settings().offline,
        "cached": [spec.name for spec in registry.models().values() if store.find_or_none(spec)],
    }
    if json:
        print_lines([to_json(info)])
    else:
        width = max(map(len, info))
        print_lines(f"{key:{width}}  {_format(value)}" for key, value in info.items())


def _devices() -> dict[str, object]:
    import torch

    from llmcli.models import loading

    device = loading.choose_device("auto")
    names = [f"cpu ({torch.get_num_threads()} threads)"]
    if device != "cpu":
        names += [f"{device}:{i}" for i in range(torch.accelerator.device_count())]
    return {
        "devices": names,
        "default": f"{device}, {str(loading.choose_dtype('auto', device)).removeprefix('torch.')}",
        "memory": f"{available_memory() / 1e9:.1f} GB available",
    }


def _format(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "nothing"
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)
