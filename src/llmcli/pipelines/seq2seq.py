"""Texts -> texts, by an encoder-decoder model: translation, summarization. A transformers.Pipeline."""

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from llmcli.compat.transformers import is_seq2seq_lm
from llmcli.pipelines.answers import GeneratedText, TokenDecoder, make_result, stopping_criteria
from llmcli.pipelines.base import Inputs, Parameters, TextPipeline, as_batch, make_row, too_long

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig

OTHER_HEADS = ("ForQuestionAnswering", "ForSequenceClassification", "ForTokenClassification")
UNLIMITED_TOKENS = 10**6  # Tokenizers write a huge number where they know no limit.


class Seq2SeqPipeline(TextPipeline):
    """Turn text into text.

    What the steps hand to each other, for a batch of B texts, the longest of P tokens, with N sequences of at most
    T tokens each:

    preprocess   input_ids, P of them; cut: tokens that --truncate took away
    _forward     sequences, int64 (B, N, T), without the token that starts every decoder; what preprocess gave, and
                 max_new_tokens if rows have their own, in lists of B
    postprocess  {"generated_text", "finish_reason", "usage"} of one text
    """

    auto_class = "AutoModelForSeq2SeqLM"

    @staticmethod
    def find_incompatibility(config: "PreTrainedConfig") -> str | None:
        has_other_head = any(name.endswith(OTHER_HEADS) for name in config.architectures or [])
        return None if is_seq2seq_lm(config) and not has_other_head else "do not turn text into text"

    def _sanitize_parameters(
        self, generation_config: "GenerationConfig | None" = None, truncate: int | None = None
    ) -> Parameters:
        config = {} if generation_config is None else {"generation_config": generation_config}
        return {"truncate": truncate}, config, config

    @functools.cached_property
    def context_length(self) -> int | None:
        """Maximum number of tokens of a text, special ones included; None if the model has no limit."""
        config = self.model.config
        positions = getattr(config, "max_encoder_position_embeddings", None)
        positions = positions or getattr(config, "max_position_embeddings", None)
        limits = (positions, self.tokenizer.model_max_length)
        return min((limit for limit in limits if limit and 0 < limit < UNLIMITED_TOKENS), default=None)

    can_share_prefix = False
    can_mix_limits = True  # all rows have the same

    def remaining_context(self, inputs: Mapping[str, Any]) -> int | None:
        """Return the number of tokens that the decoder has positions for."""
        config = self.model.config
        positions: int | None = getattr(config, "max_decoder_position_embeddings", None)
        positions = positions or getattr(config, "max_position_embeddings", None)
        return positions - 1 if positions else None

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, special ones included."""
        return len(self.tokenizer(text)["input_ids"])

    def preprocess(self, text: str | Mapping[str, str], truncate: int | None = None) -> Inputs:
        """Return the token IDs of one text, or of {"text", "source"} if the tokenizer has a code for its language.

        A text that is too long raises RecordError or, if `truncate` is a number, loses its end.
        """
        text, source = (text, None) if isinstance(text, str) else (text["text"], text.get("source"))
        if source:
            self.tokenizer.src_lang = source
        ids = self.tokenizer(text)["input_ids"]
        length, context = len(ids), self.context_length
        if context and length > context:
            if truncate is None:
                raise too_long("text", length, context)
            ids = self.tokenizer(text, truncation=True, max_length=context)["input_ids"]
        return {"input_ids": make_row(ids), "cut": length - len(ids)}

    def _forward(
        self,
        inputs: Inputs,
        generation_config: "GenerationConfig | None" = None,
        streamer: BaseStreamer | None = None,
        criteria: Sequence[StoppingCriteria] = (),
        max_new_tokens: Sequence[int] | None = None,
    ) -> Inputs:
        config = copy.copy(generation_config or self.model.generation_config)
        ids, mask = self.pad(as_batch(inputs)["input_ids"])
        ends = stopping_criteria(config, [self.decoder(inputs)], max_new_tokens, start=1)
        sequences = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([*criteria, *ends]),
            streamer=streamer,
        )
        sequences = getattr(sequences, "sequences", sequences)[:, 1:]
        limits = {"max_new_tokens": max_new_tokens} if max_new_tokens else {}
        return {"sequences": sequences.reshape(len(ids), -1, sequences.shape[1]).numpy(force=True), **limits, **inputs}

    def postprocess(self, output: Inputs, generation_config: "GenerationConfig | None" = None) -> GeneratedText:
        """Return the fields of a result."""
        return make_result(output, self.decoder(output), generation_config or self.model.generation_config)

    def decoder(self, inputs: Mapping[str, Any]) -> TokenDecoder:
        """Return a decoder of the new tokens for one preprocessed text."""
        return TokenDecoder(self.tokenizer, clean_up_tokenization_spaces=False)
