"""Texts -> texts, by an encoder-decoder model: translation, summarization. A transformers.Pipeline."""

import copy
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmcli.compat.cache import growing_cache
from llmcli.compat.transformers import is_seq2seq_lm
from llmcli.models import loading
from llmcli.pipelines.answers import GeneratingPipeline, TokenDecoder
from llmcli.pipelines.base import UNLIMITED_TOKENS, Inputs, as_batch

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig

OTHER_HEADS = ("ForQuestionAnswering", "ForSequenceClassification", "ForTokenClassification")


class Seq2SeqPipeline(GeneratingPipeline):
    """Turn text into text.

    For a batch of B texts, the longest of P tokens, with N sequences of at most T tokens each:

    preprocess   input_ids, P of them; cut: tokens that --truncate took away
    _forward     sequences, int64 (B, N, T), without the token that starts every decoder; what preprocess gave, and
                 max_new_tokens if rows have their own, in lists of B
    postprocess  {"generated_text", "finish_reason", "usage"} of one text
    """

    auto_class = "AutoModelForSeq2SeqLM"
    family = "seq2seq"
    can_mix_limits = True  # all rows have the same

    @staticmethod
    def find_incompatibility(config: "PreTrainedConfig") -> str | None:
        has_other_head = any(name.endswith(OTHER_HEADS) for name in config.architectures or [])
        return None if is_seq2seq_lm(config) and not has_other_head else "do not turn text into text"

    @functools.cached_property
    def context_length(self) -> int | None:
        """Maximum number of tokens of a text, special ones included; None if the model has no limit."""
        limits = (self._positions("encoder"), self.tokenizer.model_max_length)
        return min((limit for limit in limits if limit and 0 < limit < UNLIMITED_TOKENS), default=None)

    def remaining_context(self, inputs: Mapping[str, Any]) -> int | None:
        """Return the number of tokens that the decoder has positions for."""
        positions = self._positions("decoder")
        return positions - 1 if positions else None

    def _positions(self, side: str) -> int | None:
        config = self.model.config
        length: int | None = getattr(config, f"max_{side}_position_embeddings", None)
        length = length or loading.max_positions(lambda name: getattr(config, name, None))
        window = getattr(config, "attention_window", None)
        if length and window and side == "encoder":  # LED fills the last window with padding, which has positions too
            length -= length % (window if isinstance(window, int) else max(window))
        return length

    def preprocess(self, text: str | Mapping[str, str], truncate: int | None = None) -> Inputs:
        """Return the token IDs of one text, or of {"text", "source"} if the tokenizer has a code for its language."""
        text, source = (text, None) if isinstance(text, str) else (text["text"], text.get("source"))
        if source:
            self.tokenizer.src_lang = source
        return self.tokenize(text, self.context_length, truncate=truncate is not None)

    def _forward(self, inputs: Inputs, generation_config: "GenerationConfig | None" = None, **settings: Any) -> Inputs:
        config = copy.copy(generation_config or self.model.generation_config)
        ids, mask = self.pad(as_batch(inputs)["input_ids"])
        cache = growing_cache(self.model, config)
        return self._generate(inputs, ids, mask, config, start=1, cache=cache, **settings)

    def decoder(self, inputs: Mapping[str, Any]) -> TokenDecoder:
        return TokenDecoder(self.tokenizer, clean_up_tokenization_spaces=False)
