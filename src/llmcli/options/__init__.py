"""Options that commands share. Each group is a dataclass, and a section of --help."""

from llmcli.options.expand import expand_options
from llmcli.options.figure import FigureOptions
from llmcli.options.generation import CommonGenerationOptions, GenerationOptions, parse_key_value
from llmcli.options.input_output import InputOptions, Json, OutputOptions, Prompt, Quiet, Texts, Verbose
from llmcli.options.model import AllowPickle, BatchModelOptions, ChatModelOptions, ModelOptions, Offline

__all__ = [
    "AllowPickle", "BatchModelOptions", "ChatModelOptions", "CommonGenerationOptions", "FigureOptions",
    "GenerationOptions", "InputOptions", "Json", "ModelOptions", "Offline", "OutputOptions", "Prompt", "Quiet", "Texts",
    "Verbose", "expand_options", "parse_key_value",
]  # fmt: skip
