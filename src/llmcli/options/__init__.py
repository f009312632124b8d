"""Options that commands share. Each group is a dataclass, and a section of --help."""

from llmcli.options.expand import expand_options
from llmcli.options.figure import FigureOptions
from llmcli.options.generation import (
    CommonGenerationOptions,
    GenerationOptions,
    Temperature,
    TopK,
    TopP,
    parse_key_value,
)
from llmcli.options.input_output import InputOptions, Json, OutputOptions, Prompt, Quiet, Texts, Verbose
from llmcli.options.model import (
    AllowPickle,
    BatchModelOptions,
    Model,
    ModelOptions,
    Offline,
    ServedModelOptions,
    TrustRemoteCode,
)

__all__ = [
    "AllowPickle", "BatchModelOptions", "CommonGenerationOptions", "FigureOptions", "GenerationOptions", "InputOptions",
    "Json", "Model", "ModelOptions", "Offline", "OutputOptions", "Prompt", "Quiet", "ServedModelOptions", "Temperature",
    "Texts", "TopK", "TopP", "TrustRemoteCode", "Verbose", "expand_options", "parse_key_value",
]  # fmt: skip
