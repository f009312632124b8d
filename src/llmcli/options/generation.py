"""Options for generating text."""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Annotated

from typer import Option

from llmcli.errors import UsageError
from llmcli.job import JsonObject
from llmcli.models import generation

Temperature = Annotated[float | None, Option(metavar="X", min=0, help="Sampling temperature; 0 means greedy decoding.")]
TopP = Annotated[float | None, Option(metavar="X", min=0, max=1,
    help="Nucleus sampling: cumulative probability cutoff.")]  # fmt: skip
TopK = Annotated[int | None, Option(metavar="N", min=0, help="Sample from the N most likely tokens.")]


@dataclass
class CommonGenerationOptions:
    """Generation"""

    # fmt: off
    max_new_tokens: Annotated[int | None, Option("--max-new-tokens", "--max-tokens", metavar="N", min=1,
        help="Maximum number of tokens to generate. [default: 128 for generate, 512 for chat, else by the model]",
    )] = None
    min_new_tokens: Annotated[int | None, Option(metavar="N", min=0,
        help="Minimum number of tokens to generate.")] = None
    temperature: Temperature = None
    top_p: TopP = None
    repetition_penalty: Annotated[float | None, Option(metavar="X",
        help="Penalty for repeated tokens; 1.0 means none.")] = None
    num_beams: Annotated[int | None, Option(metavar="N", min=1, help="Number of beams for beam search.")] = None
    num_return_sequences: Annotated[int | None, Option("--num-return-sequences", "-n", metavar="N", min=1,
        help="Number of sequences to generate per record.")] = None
    stop: Annotated[list[str], Option(metavar="TEXT",
        help="Stop sequence, excluded from the output; repeatable.")] = field(default_factory=list)
    seed: Annotated[int | None, Option(metavar="N", min=0, max=2**32 - 1,
        help="Random seed for reproducible sampling.")] = None
    option: Annotated[list[str], Option("--option", "-o", metavar="KEY=VALUE",
        help="Set another GenerationConfig field; repeatable.")] = field(default_factory=list)
    truncate: Annotated[bool, Option("--truncate", help="Truncate inputs longer than the context length.")] = False
    # fmt: on

    def config(self) -> JsonObject:
        """Return the GenerationConfig fields that the user gave."""
        if "" in self.stop:
            raise UsageError("--stop must not be empty")
        values = {**dataclasses.asdict(self), "stop_strings": self.stop or None}
        others = ("stop", "seed", "option", "truncate")
        given = {name: value for name, value in values.items() if value is not None and name not in others}
        return generation.greedy(given | dict(map(parse_key_value, self.option)))


@dataclass
class GenerationOptions(CommonGenerationOptions):
    """Generation"""

    top_k: TopK = None


def parse_key_value(item: str, option: str = "-o") -> tuple[str, object]:
    """Return the key and the value of KEY=VALUE, e.g. ("top_k", 5). The value is JSON or a string."""
    key, equals, text = item.partition("=")
    if not (key and equals):
        hint = f"to write to a file: --output {item}" if re.search(r"[./\\]", item) else None
        raise UsageError(f"{option} requires KEY=VALUE, got {item!r}", hint=hint)
    try:
        return key, json.loads(text)
    except json.JSONDecodeError:
        return key, {"True": True, "False": False, "None": None}.get(text, text)
