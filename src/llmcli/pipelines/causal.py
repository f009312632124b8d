"""Prompts, or chats, -> new text, by a causal language model. A transformers.Pipeline."""

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import (
    DynamicCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.pipelines import PIPELINE_REGISTRY

from llmcli.errors import RecordError, UsageError
from llmcli.pipelines import answers, lengths, rows
from llmcli.pipelines.answers import Decode
from llmcli.pipelines.cache import growing
from llmcli.pipelines.head import CausalHead

PREFILL = 4096  # tokens that a processor reads at once: more would not stay in its caches
Prompt = str | list[dict[str, Any]]


class CausalPipeline(CausalHead):
    """What the steps hand to each other, for a batch of B prompts, the longest of P tokens, with N
    sequences of at most T new tokens each. `transformers.pipeline("llmcli-causal", ...)` makes one too.

    preprocess   input_ids, P of them; is_chat; cut: tokens that --truncate took away
    _forward     sequences, int64 (B, N, T), and what preprocess gave, in lists of B
    postprocess  {"generated_text", "finish_reason", "usage"} of one prompt
    """

    def _sanitize_parameters(self, generation_config: Any = None, truncate: int | None = None) -> tuple[Any, Any, Any]:
        config = {} if generation_config is None else {"generation_config": generation_config}
        return {"truncate": truncate}, config, config

    @functools.cached_property
    def can_share_prefix(self) -> bool:
        """Whether keys and values of a common prefix may be computed once for many prompts."""
        return True

    @functools.cached_property
    def can_mix_limits(self) -> bool:
        """Whether rows with different limits may share a batch.

        A row that has reached its limit goes on with the batch, beyond the context. Only rotary positions that do not
        depend on the length of the batch allow that: learned positions end there, and others change the other rows.
        """
        config = self.model.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        kinds = [value.get("rope_type") for value in rope.values() if isinstance(value, dict)] or [
            rope.get("rope_type")
        ]
        names = [type(module).__name__ for module in self.model.modules()]
        is_rotary = any(name.endswith("RotaryEmbedding") for name in names)
        is_learned = any(name.endswith("PositionalEmbedding") for name in names)
        return is_rotary and not is_learned and set(kinds) <= {None, "default", "linear", "llama3", "yarn"}

    def remaining_context(self, inputs: Mapping[str, Any]) -> int | None:
        """Tokens that the context leaves for the answer."""
        return self.context_length - len(inputs["input_ids"]) if self.context_length else None

    @property
    def is_chat(self) -> bool:
        """Whether it takes messages."""
        return bool(self.tokenizer.chat_template)

    def count_prompt_tokens(self, prompt: Prompt) -> int:
        """Tokens of a prompt as it goes in."""
        return len(self.preprocess(prompt)["input_ids"])

    def count_tokens(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def preprocess(self, prompt: Prompt, truncate: int | None = None) -> dict[str, Any]:
        """Token ids of one prompt. One that is longer than the context raises RecordError or, where `truncate`
        says how many tokens to leave for the answer, is cut: its end stays, and a token that begins every text.
        """
        if self.context_length and truncate is None:
            text = prompt if isinstance(prompt, str) else self._templated(prompt, tokenize=False)
            lengths.check(text, self.context_length, self.count_tokens)
        encoded = self.tokenizer(prompt) if isinstance(prompt, str) else self._templated(prompt, return_dict=True)
        ids = encoded["input_ids"]
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = ids or [token for token in (first, last) if token is not None][:1]
        if not ids:
            raise RecordError("no_tokens", "the text has no tokens")
        length, context = len(ids), self.context_length
        if context and length >= context:
            if truncate is None:
                raise RecordError(
                    "context_length_exceeded",
                    f"the prompt has {length} tokens, the model's context holds {context}",
                    hint="shorten it, or let --truncate cut its start",
                )
            head = ids[:1] if ids[0] == first else []
            keep = context - min(truncate, context // 2) - len(head)
            ids = head + ids[-keep:]
        return {"input_ids": rows.row(ids), "is_chat": isinstance(prompt, list), "cut": length - len(ids)}

    def _templated(self, messages: list[dict[str, Any]], **settings: Any) -> Any:
        if not self.tokenizer.chat_template:
            raise UsageError("this model has no chat template", hint="use `llmcli generate`, or a chat model: -m NAME")
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, **settings)
        except Exception as exc:  # whatever a template, which is a program, raises
            raise RecordError("bad_messages", f"the chat template refuses the messages: {exc}") from exc

    def prefill(self, ids: list[int]) -> Any:
        """Keys and values of what many prompts begin with, as a cache of one row; None where the model keeps anything
        else or forgets."""
        config = self.model.config.get_text_config()
        if getattr(config, "sliding_window", None) and len(ids) + 512 > config.sliding_window:
            return None
        with torch.inference_mode():
            read = torch.tensor([ids], device=self.model.device)
            output = self.model(read, use_cache=True, past_key_values=growing(self.model, self.model.generation_config))
        cache = getattr(output, "past_key_values", None)
        return cache if type(cache) is DynamicCache else None

    def _forward(
        self,
        inputs: dict[str, Any],
        generation_config: Any = None,
        streamer: BaseStreamer | None = None,
        criteria: Sequence[StoppingCriteria] = (),
        max_new_tokens: Sequence[int] | None = None,
        prefix: tuple[list[int], Any] | None = None,
    ) -> dict[str, Any]:
        config = copy.copy(generation_config or self.model.generation_config)
        batch, settings = rows.listed(inputs), dict[str, Any]()
        known = len(prefix[0]) if prefix else 0
        ids, mask = rows.padded(
            [row[known:] for row in batch["input_ids"]], self.tokenizer.pad_token_id, self.device, left=True
        )
        if prefix:  # at the very start, and the padding after it
            begin = torch.tensor(prefix[0], device=ids.device).expand(len(ids), -1)
            ids, mask = torch.cat([begin, ids], 1), torch.cat([torch.ones_like(begin), mask], 1)
            settings["past_key_values"] = copy.deepcopy(prefix[1])
            settings["past_key_values"].batch_repeat_interleave(len(ids))
        elif cache := growing(self.model, config):
            settings["past_key_values"] = cache
            config.prefill_chunk_size = config.prefill_chunk_size or max(16, PREFILL // len(ids))
        # transformers' own stop strings are found in the prompt's end and in special tokens too
        stops, config.stop_strings = config.stop_strings, None
        found = [answers.NewTextStopCriteria(self._decoders(batch), stops, ids.shape[1])] if stops else []
        found += answers.limit_rows(config, max_new_tokens, ids.shape[1])
        sequences = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([*criteria, *found]),
            streamer=streamer,
            **settings,
        )
        sequences = getattr(sequences, "sequences", sequences)[:, ids.shape[1] :]
        limits = {"max_new_tokens": max_new_tokens} if max_new_tokens else {}
        return {"sequences": sequences.reshape(len(ids), -1, sequences.shape[1]).numpy(force=True), **limits, **inputs}

    def postprocess(self, output: dict[str, Any], generation_config: Any = None) -> dict[str, Any]:
        """The fields of a result; `generated_texts` where more than one sequence was asked for."""
        config = generation_config or self.model.generation_config
        return answers.fields(output, self.decoder(output), config)

    def decoder(self, item: Mapping[str, Any]) -> Decode:
        """New token ids -> text, for one preprocessed prompt."""
        return self._decoder(item["input_ids"], item["is_chat"])

    def _decoders(self, inputs: Mapping[str, Any]) -> list[Decode]:
        return [*map(self._decoder, inputs["input_ids"], inputs["is_chat"])]

    def _decoder(self, prompt: Any, is_chat: bool) -> Decode:
        """New token ids -> text. What follows a prompt is decoded together with the prompt's last tokens: alone, a
        SentencePiece tokenizer would lose the space in front of it."""
        if is_chat:
            return self._decode
        tail = prompt[-4:].tolist()
        return functools.partial(self._decode_after, tail, self._decode(tail))

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _decode_after(self, tail: list[int], known: str, ids: list[int]) -> str:
        return self._decode(tail + ids).removeprefix(known)


PIPELINE_REGISTRY.register_pipeline("llmcli-causal", pipeline_class=CausalPipeline)
