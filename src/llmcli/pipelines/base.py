"""What the pipelines have in common: rows of token IDs, padded batches, and limits of length."""

import functools
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from transformers.pipelines.base import Pipeline

from llmcli.compat.transformers import TextPipelineMixin, is_causal_lm
from llmcli.errors import RecordError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CHARACTERS_PER_TOKEN = 16  # more than nearly all texts have
Inputs = dict[str, Any]  # what the steps of a pipeline hand to each other, by name
Parameters = tuple[Inputs, Inputs, Inputs]  # of preprocess, _forward and postprocess


class Usage(TypedDict, total=False):
    """Tokens of a record."""

    prompt_tokens: int
    completion_tokens: int


class TextPipeline(TextPipelineMixin, Pipeline):  # type: ignore[misc]  # transformers has no types
    """A pipeline that reads text alone.

    Attributes:
        auto_class: The class of transformers that loads its models.
        ignorable_weight_prefix: Prefix of weights that a checkpoint may lack: a head for another task.
    """

    auto_class: str
    ignorable_weight_prefix: str | None = None

    @staticmethod
    def find_incompatibility(config: "PreTrainedConfig") -> str | None:
        """Return why a model of that configuration cannot be used, to follow its name; None if it can."""
        raise NotImplementedError

    def pad(self, rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Return input_ids and attention_mask, int64 (B, P), of B rows of at most P tokens."""
        return pad_rows(rows, self.tokenizer.pad_token_id, self.device, left=left)


class CausalTextPipeline(TextPipeline):
    """A pipeline that runs a causal language model."""

    auto_class = "AutoModelForCausalLM"

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        self.tokenizer.padding_side = "left"  # A causal model continues the right end of a row.

    @staticmethod
    def find_incompatibility(config: "PreTrainedConfig") -> str | None:
        return None if is_causal_lm(config) else "do not continue text"

    @functools.cached_property
    def context_length(self) -> int | None:
        """Maximum number of tokens of prompt and answer together."""
        config = self.model.config.get_text_config()
        length: int | None = getattr(config, "max_position_embeddings", None)
        return length if length and length > 0 else None


def make_row(ids: Sequence[int]) -> "array[int]":
    """Return the tokens of one row as `preprocess` gives them.

    A tensor would cost more time than all else that is done for a record, and a list five times the memory.
    """
    return array("q", ids)


def as_batch(inputs: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return a list for each field of what `preprocess` gave, for one row (transformers' own way) or for a batch."""
    is_batch = isinstance(inputs["input_ids"], list)
    return {name: value if is_batch else [value] for name, value in inputs.items()}


def pad_rows(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device | str, *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input_ids and attention_mask, int64 (B, P), of B rows of at most P tokens."""
    length = max(map(len, rows))
    ids, mask = np.full((len(rows), length), pad, np.int64), np.zeros((len(rows), length), np.int64)
    for i, row in enumerate(rows):
        place = slice(length - len(row), None) if left else slice(len(row))
        ids[i, place] = row
        mask[i, place] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def check_length(text: str, maximum: int, count_tokens: Callable[[str], int]) -> None:
    """Raise RecordError if a beginning of the text has more than twice the tokens that fit.

    A tokenizer needs a second and 200 MB for each million characters of a text. A beginning may end inside a word,
    so its count is not exact: hence twice.
    """
    size = CHARACTERS_PER_TOKEN * maximum
    while size < len(text):
        if count_tokens(text[:size]) > 2 * maximum:
            raise too_long("text", f"over {2 * maximum}", maximum)
        size *= 8


def too_long(what: str, length: int | str, maximum: int) -> RecordError:
    """Return the error of a text or prompt that does not fit the model's context."""
    return RecordError(
        "context_length_exceeded",
        f"{what} has {length} tokens, which exceeds the context length of {maximum}",
        hint="shorten it or pass --truncate",
    )


def check_tokens(ids: Sequence[int]) -> None:
    """Raise RecordError for a text without tokens."""
    if not ids:
        raise RecordError("no_tokens", "the text has no tokens")


def check_finite(numbers: object) -> None:
    """Raise RecordError if a number, or one of an array, is not finite."""
    if not np.isfinite(np.asarray(numbers)).all():
        raise RecordError("not_finite", "model returned NaN or infinite values", hint="try --dtype float32")
