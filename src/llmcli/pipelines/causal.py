"""Prompts, or chats, -> new text, or the next token, by a causal language model. Two transformers.Pipelines."""

import copy
import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList

from llmcli.compat.cache import cache_argument, filled_cache, growing_cache, key_value_cache, repeat_cache
from llmcli.compat.transformers import (
    has_fixed_rotary_positions,
    read_processors,
    rope_limit,
    takes_position_ids,
)
from llmcli.errors import UsageError
from llmcli.models import loading
from llmcli.pipelines import base
from llmcli.pipelines.answers import GeneratingPipeline, TokenDecoder
from llmcli.pipelines.base import CausalTextPipeline, Inputs
from llmcli.pipelines.chat_template import ChatTemplate
from llmcli.pipelines.decoding import RecordedStep, can_adjust
from llmcli.pipelines.running import BatchSettings, Prefix, RunningBatch, WholeBatch
from llmcli.pipelines.slots import PREFILL_TOKENS, SlotBatch
from llmcli.pipelines.spelling import CONTEXT_TOKENS, token_texts
from llmcli.tasks import Prompt
from llmcli.text.thoughts import Thoughts

DECODED_TOKENS = 4  # of the prompt's end, decoded together with what follows


class CausalPipeline(GeneratingPipeline, CausalTextPipeline):
    """Generate text. `transformers.pipeline("llmcli-causal", ...)` makes one too.

    For a batch of B prompts, the longest of P tokens, with N sequences of at most T new tokens each:

    preprocess   input_ids, P of them; is_chat; thoughts; cut: tokens that --truncate took away
    _forward     sequences, int64 (B, N, T); what preprocess gave, and max_new_tokens if rows have their own, in lists
                 of B
    postprocess  {"generated_text", "finish_reason", "usage"} of one prompt
    """

    @functools.cached_property
    def can_mix_limits(self) -> bool:
        """Whether rows with different limits may share a batch.

        A row that has reached its limit goes on with the batch, beyond the context. Only rotary positions that do not
        depend on the length of the batch allow that: learned positions end there, and others change the other rows.
        """
        return has_fixed_rotary_positions(self.model)

    @functools.cached_property
    def recorded_steps(self) -> defaultdict[int, RecordedStep]:
        """Steps of decoding on a CPU by number of rows."""
        return defaultdict(RecordedStep)

    @functools.cached_property
    def max_shared_tokens(self) -> int | None:  # type: ignore[override]
        """Maximum length of rows, answers included, that may begin with the keys and values of a common prefix.

        Padding then is between the prefix and the rest. It counts in models that read positions off the sequence, and
        moves the prefix out of an attention window. None: no maximum; 0: the model cannot do it.
        """
        is_safe = self.model.config.model_type in self._known["shared"] and takes_position_ids(self.model)
        config = self.model.config.get_text_config()
        windows = [getattr(config, name, None) for name in loading.architectures()["windows"]]
        limits = [value for value in (*windows, rope_limit(config)) if isinstance(value, int) and value > 0]
        return min(limits, default=None) if is_safe else 0

    def start(self, settings: BatchSettings) -> RunningBatch:
        """Return an empty batch whose rows leave when they end, if the model and the settings allow that."""
        if self.model.tp_size:  # Rows would join and leave at other times in other processes.
            return WholeBatch(self, settings)
        if (processors := self._find_processors(settings)) is not None:
            return SlotBatch(self, settings, processors)
        return super().start(settings)

    def _find_processors(self, settings: BatchSettings) -> LogitsProcessorList | None:
        """Return what changes the scores of a `SlotBatch`; None if it cannot be used."""
        config, maximum = settings.config, self.max_shared_tokens
        is_plain = config.get_generation_mode() in ("greedy_search", "sample") and key_value_cache(self.model)
        if settings.max_rows == 1:
            fits = self.can_read_in_parts(settings.max_length)
        else:
            fits = maximum is None or settings.max_length <= maximum
        if not (fits and is_plain) or config.cache_implementation or config.use_cache is False:
            return None
        processors = read_processors(self.model, config)
        return processors if can_adjust(processors) else None

    @property
    def is_chat(self) -> bool:
        """Whether prompts are messages, for the model's chat template."""
        return bool(self.tokenizer.chat_template)

    @functools.cached_property
    def chat_template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    @property
    def end_of_turn(self) -> int | None:  # type: ignore[override]
        return self.chat_template.end_of_turn if self.is_chat else None

    def remaining_context(self, inputs: Mapping[str, Any]) -> int | None:
        """Return the number of tokens that the context leaves for the answer."""
        return self.context_length - len(inputs["input_ids"]) if self.context_length else None

    def count_prompt_tokens(self, prompt: Prompt) -> int:
        return len(self.preprocess(prompt)["input_ids"])

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def preprocess(
        self, prompt: Prompt, truncate: int | None = None, can_think: bool = True, is_constrained: bool = False,
        **template: Any,
    ) -> Inputs:  # fmt: skip
        """Return the token IDs of one prompt, for which `template` has settings of the chat template.

        Without `can_think`, thinking is off by default, and an answer that ends in its thought is none. A constrained
        answer has no thoughts.
        One that is too long raises RecordError or, if `truncate` says how many tokens to leave for the answer, is cut:
        its end stays, and a token that begins every text.
        """
        context, is_chat = self.context_length, not isinstance(prompt, str)
        maximum = None if truncate is not None else context
        ids, thoughts = self.read_prompt(prompt, maximum, can_think, is_constrained, **template)
        length = len(ids)
        if context and length >= context:
            if truncate is None:
                raise base.too_long("prompt", length, context)
            head = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
            keep = context - min(truncate, context // 2) - len(head)
            ids = head + ids[-keep:]
        return {"input_ids": base.make_row(ids), "is_chat": is_chat, "thoughts": thoughts, "cut": length - len(ids)}

    def read_prompt(
        self, prompt: Prompt, maximum: int | None, can_think: bool, is_constrained: bool = False, **template: Any
    ) -> tuple[list[int], Thoughts | None]:
        """Return the tokens of a prompt, and the thoughts that may follow. One far above the maximum is not read."""
        is_chat = not isinstance(prompt, str)
        if is_chat and not self.is_chat:
            raise UsageError("model has no chat template", hint="use `llmcli generate`, or a chat model: -m NAME")
        if is_constrained:
            template = {**template, "think": False}
        text = prompt if isinstance(prompt, str) else self.chat_template.render(prompt, can_think, **template)
        if maximum:
            base.check_length(text, maximum, self.count_tokens)
        ids = self.chat_template.encode(text) if is_chat else self.chat_template.encode_text(text)
        special = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = ids or [token for token in special if token is not None][:1]
        base.check_tokens(ids)
        return ids, self.chat_template.find_thoughts(text, can_think) if is_chat and not is_constrained else None

    def prefill(self, ids: list[int]) -> DynamicCache | None:
        """Return the keys and values of a shared prefix, as a cache of one row; None if the model keeps more."""
        if self.max_shared_tokens == 0:
            return None
        with self.device_placement(), torch.inference_mode():
            prefix = torch.tensor([ids], device=self.model.device)
            cache = growing_cache(self.model, self.model.generation_config)
            return filled_cache(self.model(prefix, use_cache=True, **cache_argument(self.model, cache)))

    def _forward(self, inputs: Inputs, generation_config: GenerationConfig | None = None, **settings: Any) -> Inputs:
        config = copy.copy(generation_config or self.model.generation_config)
        ids, mask, cache = self._begin(inputs, config, settings.pop("prefix", None))
        return self._generate(inputs, ids, mask, config, start=ids.shape[1], cache=cache, **settings)

    def _begin(
        self, inputs: Inputs, config: GenerationConfig, prefix: Prefix | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, DynamicCache | None]:
        """Return input_ids and attention_mask (B, P) of a batch, and a cache: that of their prefix, or an empty one."""
        known = len(prefix[0]) if prefix else 0
        ids, mask = self.pad([row[known:] for row in base.as_batch(inputs)["input_ids"]], left=True)
        if prefix:  # at the very start; padding comes after it
            begin = torch.tensor(prefix[0], device=ids.device).expand(len(ids), -1)
            ids, mask = torch.cat([begin, ids], 1), torch.cat([torch.ones_like(begin), mask], 1)
            return ids, mask, repeat_cache(prefix[1], len(ids))
        cache = growing_cache(self.model, config)
        if cache and self.can_read_in_parts(ids.shape[1]):
            config.prefill_chunk_size = config.prefill_chunk_size or max(16, PREFILL_TOKENS["cpu"] // len(ids))
        return ids, mask, cache

    def _read_next(
        self, ids: torch.Tensor, mask: torch.Tensor, config: GenerationConfig, cache: DynamicCache | None = None
    ) -> Any:
        """Return what `generate` returns for one new token: its logits and scores (B, V), in tuples, and the cache."""
        config.max_new_tokens, config.max_length, config.num_beams = 1, None, 1
        config.return_dict_in_generate = config.output_logits = config.output_scores = True
        return self.model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, **cache_argument(self.model, cache)
        )

    def decoder(self, inputs: Mapping[str, Any]) -> TokenDecoder:
        if not inputs["is_chat"]:
            return TokenDecoder(self.tokenizer, inputs["input_ids"][-DECODED_TOKENS:])
        marks = self.chat_template.thought_marks if inputs["thoughts"] else None
        return TokenDecoder(self.tokenizer, marks=marks, thoughts=inputs["thoughts"])


class NextTokenPipeline(CausalPipeline):
    """Compute the distribution of the next token.

    For a batch of B texts, the longest of P tokens, with a vocabulary of V:

    preprocess   as of CausalPipeline
    _forward     probability, the softmax of the model's logits, and sampling_probability, that of what `generate` makes
                 of these before it draws a token, 1 for a single one if it is greedy: float32 (B, V)
    postprocess  both, (V,); of one text its input_ids, and as `sampling` the settings by which a token is drawn;
                 truncated, if tokens were cut
    """

    def start(self, settings: BatchSettings) -> RunningBatch:
        return WholeBatch(self, settings)

    def token_texts(self, token: int, before: Sequence[int]) -> str:
        return token_texts(self.tokenizer, [*before[-CONTEXT_TOKENS:], token])[-1]

    def _forward(self, inputs: Inputs, generation_config: GenerationConfig | None = None, **settings: Any) -> Inputs:
        config = copy.copy(generation_config or self.model.generation_config)
        config.remove_invalid_values = True  # NaN would end `multinomial`, and the whole batch; postprocess reports it
        ids, mask = self.pad(base.as_batch(inputs)["input_ids"], left=True)
        output = self._read_next(ids, mask, config)
        (logits,), (scores,) = output.logits, output.scores
        sampling = scores.float().softmax(-1)
        if not config.do_sample:
            sampling = torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).float()
        computed = {"probability": logits.float().softmax(-1), "sampling_probability": sampling}
        return {**{name: tensor.numpy(force=True) for name, tensor in computed.items()}, **inputs}

    def postprocess(self, output: Inputs, generation_config: GenerationConfig | None = None) -> Inputs:
        base.check_finite(output["probability"])
        config = generation_config or self.model.generation_config
        sampling: Mapping[str, float] = {"temperature": 0}
        if config.do_sample:
            sampling = {name: value for name in ("temperature", "top_k", "top_p") if (value := getattr(config, name))}
        fields: Inputs = {name: output[name][0] for name in ("probability", "sampling_probability")}
        fields |= {"input_ids": output["input_ids"].tolist(), "sampling": sampling}
        return {**fields, "truncated": output["cut"]} if output["cut"] else fields
