"""What the pipelines have in common: rows of token IDs, padded batches, and limits of length."""

import functools
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.pipelines.base import ChunkPipeline, Pipeline

from llmcli.compat.tokenizers import read_as_text
from llmcli.compat.transformers import TextPipelineMixin, is_causal_lm, rope_limit, takes
from llmcli.errors import ModelUnavailableError, RecordError
from llmcli.models import loading

CHARACTERS_PER_TOKEN = 16  # more than nearly all texts have
UNLIMITED_TOKENS = 10**6  # Tokenizers write a huge number where they know no limit.
PROBE_TEXTS = "The quick fox.", "Once upon a time, an old clock in a small town by the sea ran late. " * 2
PROBE = {
    "max_new_tokens": 4,
    "do_sample": False,
    "num_beams": 1,
    "output_logits": True,
    "return_dict_in_generate": True,
}
Inputs = dict[str, Any]  # what the steps of a pipeline hand to each other, by name
Parameters = tuple[Inputs, Inputs, Inputs]  # of preprocess, _forward and postprocess


class TextPipeline(TextPipelineMixin, Pipeline):  # type: ignore[misc]  # transformers has no types
    """A pipeline that reads text alone."""

    auto_class: str  # of transformers, which loads its models
    auto_classes: Mapping[str, str] = {}  # by model type, where it is another
    ignorable_weight_prefix: str | None = None  # of weights that a checkpoint may lack: a head for another task
    family = "encoders"  # the table of architectures.toml that applies
    pads_left = False
    max_shared_tokens: int | None = 0  # of rows that may begin with the keys and values of a common prefix

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        read_as_text(self.tokenizer)

    @staticmethod
    def find_incompatibility(config: PreTrainedConfig) -> str | None:
        """Return why a model of that configuration cannot be used, to follow its name; None if it can."""
        raise NotImplementedError

    def pad(
        self, rows: Sequence[Sequence[int]], *, left: bool = False, fill: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return input_ids and attention_mask, int64 (B, P), of B rows of at most P tokens."""
        length = max(map(len, rows))
        ids = np.full((len(rows), length), self.tokenizer.pad_token_id if fill is None else fill, np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            place = slice(length - len(row), None) if left else slice(len(row))
            ids[i, place] = row
            mask[i, place] = 1
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device)

    @functools.cached_property
    def max_batched_tokens(self) -> int | None:
        """Maximum length of rows, answers included, that may share a batch; longer ones run alone. None: no maximum.

        It is 0 if padding changes what the model computes: architectures.toml says so, or a probe of the model.
        """
        config, known = self.model.config, self._known
        is_known = config.model_type in known["batched"] + known["shared"]
        is_safe = is_known or (config.model_type not in known["alone"] and self._ignores_padding())
        with loading.translated_errors(Path(self.model.name_or_path)):
            # In NLLB-MoE, the tokens of all rows may compete for the room in each expert.
            has_room = getattr(config, "moe_eval_capacity_token_fraction", 1) >= 1
            return rope_limit(config) if is_safe and has_room else 0

    @property
    def _known(self) -> dict[str, list[str]]:
        return loading.architectures()[self.family]  # type: ignore[no-any-return]

    def _ignores_padding(self) -> bool:
        """Return whether a short text has the same logits, or the same states, alone and beside a longer one."""
        rows, results = [self.tokenizer(text)["input_ids"] for text in PROBE_TEXTS], []
        try:
            for batch in (rows[:1], rows):
                ids, mask = self.pad(batch, left=self.pads_left)
                inputs = {"input_ids": ids, "attention_mask": mask}
                with torch.inference_mode():
                    if self.model.can_generate():  # Some models misread padding only after the first new token.
                        steps = self.model.generate(**inputs, **PROBE).logits
                        results.append(torch.stack([logits[0] for logits in steps]).float())
                    else:
                        results.append(self.model(**inputs)[0][0, : len(rows[0])].float())
            alone, together = results
            scale = alone.std() if alone.numel() > 1 else alone.abs()  # A regression has a single logit.
            tolerance = (1e-3 if self.model.dtype == torch.float32 else 0.1) * scale
            return bool((alone - together[: len(alone)]).abs().max() <= tolerance)
        except Exception:  # A model may raise anything at input that it cannot read.
            return False

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer(text)["input_ids"])

    def tokenize(self, text: str, maximum: int | None, *, truncate: bool) -> Inputs:
        """Return the token IDs of a text. If it is too long, raise RecordError or, with `truncate`, cut its end."""
        ids = self.tokenizer(text)["input_ids"]
        length = len(ids)
        if maximum and length > maximum:
            if not truncate:
                raise too_long("text", length, maximum)
            # Tokenize again, so that the token that ends every text stays.
            ids = self.tokenizer(text, truncation=True, max_length=maximum)["input_ids"]
        return {"input_ids": make_row(ids), "cut": length - len(ids)}


class HeadPipeline(TextPipeline, ChunkPipeline):  # type: ignore[misc]  # transformers has no types
    """A pipeline for a head that reads texts, in windows if they are long, on an encoder or a decoder."""

    needs_offsets = False  # from tokens to characters

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        if self.needs_offsets and not self.tokenizer.is_fast:
            raise ModelUnavailableError(
                f"{self.model.name_or_path}: the tokenizer does not return the positions of its tokens",
                hint="use a model that has a tokenizer.json",
            )
        self.model.config.use_cache = False  # a decoder's cache would serve later tokens, and there are none
        self.context_length = position_limit(self.model.config, self.tokenizer)
        self.input_names = [name for name in self.tokenizer.model_input_names if name != "attention_mask"]

    @classmethod
    def find_incompatibility(cls, config: PreTrainedConfig) -> str | None:
        head = cls.auto_class.removeprefix("AutoModelFor")
        usable = any(name.endswith(f"For{head}") for name in config.architectures or ())
        return None if usable else f"of this kind have no {re.sub('(?<!^)(?=[A-Z])', '-', head).lower()} head"

    def run_model(self, inputs: Inputs) -> Any:
        """Return the output of the model for B rows of at most P tokens."""
        batch = as_batch(inputs)
        known = {name: self.pad(batch[name], fill=0)[0] for name in self.input_names}
        known["input_ids"], known["attention_mask"] = self.pad(batch["input_ids"])  # on the right: no token moves
        return self.model(**{name: value for name, value in known.items() if takes(self.model, name)})

    def _forward(self, inputs: Inputs) -> Inputs:
        return {"logits": self.run_model(inputs).logits.float().cpu(), **inputs}


class CausalTextPipeline(TextPipeline):
    """A pipeline that runs a causal language model."""

    auto_class = "AutoModelForCausalLM"
    family = "causal"
    pads_left = True  # A causal model continues the right end of a row.

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        self.tokenizer.padding_side = "left"

    @staticmethod
    def find_incompatibility(config: PreTrainedConfig) -> str | None:
        return None if is_causal_lm(config) else "do not continue text"

    @functools.cached_property
    def context_length(self) -> int | None:
        """Maximum number of tokens of prompt and answer together."""
        return position_limit(self.model.config)

    def can_read_in_parts(self, length: int) -> bool:
        """Return whether the keys and values of a part of a row are the same as if all is read at once."""
        limit = rope_limit(self.model.config)
        return self.model.config.model_type in self._known["shared"] and (limit is None or length <= limit)


def position_limit(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> int | None:
    """Return the maximum number of tokens of a row, special ones included, that a model and its tokenizer allow."""
    text_config = config.get_text_config()
    positions = loading.max_positions(lambda name: getattr(text_config, name, None))
    stated = tokenizer.model_max_length if tokenizer else UNLIMITED_TOKENS
    return positions if stated >= UNLIMITED_TOKENS else min(stated, positions or stated)


def cut_windows(
    rows: Inputs, parts: list[int | None], size: int, overlap: int, part: int = 0, is_full: bool = False
) -> Iterator[Inputs]:
    """Yield windows of `size` tokens that overlap in one part; if `is_full`, the last one is no shorter."""
    begin = parts.index(part) if part in parts else len(parts)
    end = begin + parts.count(part)
    room = size - len(parts) + end - begin
    if parts[begin:end].count(part) < end - begin:
        raise RuntimeError(f"windows of {room} tokens do not cover tokens {begin} to {end}")
    for start in range(begin, max(end - overlap, begin + 1), max(room - overlap, 1)):
        start = max(begin, min(start, end - room)) if is_full else start
        tokens = range(start, min(start + room, end))
        window = {name: row[:begin] + row[start : tokens.stop] + row[end:] for name, row in rows.items()}
        yield {**window, "tokens": tokens, "shift": start - begin, "is_last": tokens.stop == end}


def make_row(ids: Sequence[int]) -> "array[int]":
    """Return one row. A tensor would take longer to make than all else, and a list five times the memory."""
    return array("q", ids)


def as_batch(inputs: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return a list for each field of what `preprocess` gave, for one row (transformers' own way) or for a batch."""
    is_batch = not isinstance(inputs["input_ids"][0], int)
    return {name: value if is_batch else [value] for name, value in inputs.items()}


def check_length(text: str, maximum: int, count_tokens: Callable[[str], int]) -> None:
    """Raise RecordError if a beginning of the text has more than twice the tokens that fit.

    A tokenizer needs a second and 200 MB for each million characters of a text. A beginning may end inside a
    word, so its count is not exact.
    """
    size = CHARACTERS_PER_TOKEN * maximum
    while size < len(text):
        if count_tokens(text[:size]) > 2 * maximum:
            raise too_long("text", f"over {2 * maximum}", maximum)
        size *= 8


def too_long(what: str, length: int | str, maximum: int) -> RecordError:
    return RecordError(
        "context_length_exceeded",
        f"{what} has {length} tokens, which exceeds the context length of {maximum}",
        hint="shorten it or pass --truncate",
    )


def check_tokens(ids: Sequence[int]) -> None:
    if not ids:
        raise RecordError("no_tokens", "text has no tokens")


def check_finite(numbers: object) -> None:
    if not np.isfinite(np.asarray(numbers)).all():
        raise RecordError("not_finite", "model returned NaN or infinite values", hint="try --dtype float32")
