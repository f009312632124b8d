"""Texts -> texts, by an encoder-decoder model: translation, summarization. A transformers.Pipeline."""

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline

from llmcli.errors import RecordError
from llmcli.pipelines import answers, rows
from llmcli.pipelines.answers import Decode

OTHER_HEADS = ("ForQuestionAnswering", "ForSequenceClassification", "ForTokenClassification")


class Seq2SeqPipeline(rows.RowPipeline, Pipeline):  # type: ignore[misc]  # transformers has no types
    """What the steps hand to each other, for a batch of B texts, the longest of P tokens, with N sequences of at most
    T tokens each:

    preprocess   input_ids, P of them; cut: tokens that --truncate took away
    _forward     sequences, int64 (B, N, T), without the token that starts every decoder; what preprocess gave, in
                 lists of B
    postprocess  {"generated_text", "finish_reason", "usage"} of one text
    """

    auto_class = "AutoModelForSeq2SeqLM"

    @staticmethod
    def check(config: Any) -> str | None:
        """Why a model of that configuration cannot be used."""
        heads = config.architectures or []
        other = any(head.endswith(OTHER_HEADS) for head in heads)
        usable = type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING and config.is_encoder_decoder and not other
        return None if usable else "do not turn text into text"

    def _sanitize_parameters(self, generation_config: Any = None, truncate: int | None = None) -> tuple[Any, Any, Any]:
        config = {} if generation_config is None else {"generation_config": generation_config}
        return {"truncate": truncate}, config, config

    @functools.cached_property
    def context_length(self) -> int | None:
        """Tokens that a text may have, special ones included; None where the model knows no limit."""
        config = self.model.config
        positions = getattr(config, "max_encoder_position_embeddings", None)
        positions = positions or getattr(config, "max_position_embeddings", None)
        known = [length for length in (positions, self.tokenizer.model_max_length) if length and 0 < length < 10**6]
        return min(known, default=None)

    can_share_prefix = False
    can_mix_limits = True  # all rows have the same

    def remaining_context(self, inputs: Mapping[str, Any]) -> int | None:
        """Tokens that the decoder has places for."""
        config = self.model.config
        positions: int | None = getattr(config, "max_decoder_position_embeddings", None)
        positions = positions or getattr(config, "max_position_embeddings", None)
        return positions - 1 if positions else None

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, special ones included."""
        return len(self.tokenizer(text)["input_ids"])

    def preprocess(self, text: str | Mapping[str, Any], truncate: int | None = None) -> dict[str, Any]:
        """Token ids of one text, or of {"text", "source"} where the tokenizer has a code for the text's language. One
        that is longer than the context raises RecordError or, where `truncate` is a number, loses its end."""
        text, source = (text, None) if isinstance(text, str) else (text["text"], text.get("source"))
        if source:
            self.tokenizer.src_lang = source
        ids = self.tokenizer(text)["input_ids"]
        length, context = len(ids), self.context_length
        if context and length > context:
            if truncate is None:
                raise RecordError(
                    "context_length_exceeded",
                    f"the text has {length} tokens, the model takes {context}",
                    hint="shorten it, or let --truncate cut its end",
                )
            ids = self.tokenizer(text, truncation=True, max_length=context)["input_ids"]
        return {"input_ids": rows.row(ids), "cut": length - len(ids)}

    def _forward(
        self,
        inputs: dict[str, Any],
        generation_config: Any = None,
        streamer: BaseStreamer | None = None,
        criteria: Sequence[StoppingCriteria] = (),
        max_new_tokens: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        config = copy.copy(generation_config or self.model.generation_config)
        ids, mask = rows.padded(rows.listed(inputs)["input_ids"], self.tokenizer.pad_token_id, self.device)
        stops, config.stop_strings = config.stop_strings, None
        found = [answers.NewTextStopCriteria([self._decode], stops, 1)] if stops else []
        found += answers.limit_rows(config, max_new_tokens, 1)
        sequences = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([*criteria, *found]),
            streamer=streamer,
        )
        sequences = getattr(sequences, "sequences", sequences)[:, 1:]
        limits = {"max_new_tokens": max_new_tokens} if max_new_tokens else {}
        return {"sequences": sequences.reshape(len(ids), -1, sequences.shape[1]).numpy(force=True), **limits, **inputs}

    def postprocess(self, output: dict[str, Any], generation_config: Any = None) -> dict[str, Any]:
        """The fields of a result; `generated_texts` where more than one sequence was asked for."""
        return answers.fields(output, self._decode, generation_config or self.model.generation_config)

    def decoder(self, item: Mapping[str, Any]) -> Decode:
        """New token ids -> text."""
        return self._decode

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


PIPELINE_REGISTRY.register_pipeline("llmcli-seq2seq", pipeline_class=Seq2SeqPipeline)
