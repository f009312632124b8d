"""Prompts, or chats, -> new text, by a causal language model. A transformers.Pipeline."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline

from llmcli.errors import RecordError, UsageError

Prompt = str | list[dict[str, Any]]
Decode = Callable[[list[int]], str]


class CausalPipeline(Pipeline):  # type: ignore[misc]  # transformers has no types
    """What the steps hand to each other, for a batch of B prompts, the longest of P tokens, with N
    sequences of at most T new tokens each. `transformers.pipeline("llmcli-causal", ...)` makes one too.

    preprocess   input_ids, attention_mask (1, P); is_chat; cut: tokens that --truncate took away
    _forward     sequences (B, N, T), and what preprocess gave, padded on the left
    postprocess  {"generated_text", "finish_reason", "usage"} of one prompt
    """

    auto_class = "AutoModelForCausalLM"
    spare = None
    _load_tokenizer = True
    _load_feature_extractor = False
    _load_image_processor = False
    _load_processor = False

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.tokenizer.padding_side = "left"  # a causal model continues what stands at the right end

    @staticmethod
    def check(config: Any) -> str | None:
        """Why a model of that configuration cannot be used. AutoModelForCausalLM does take encoders, and the decoders
        of encoder-decoder models, to train them further: as they are, they talk nonsense."""
        is_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or ())
        is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True)
        is_causal = is_own_code or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        usable = is_causal and not is_encoder and not getattr(config, "is_encoder_decoder", False)
        return None if usable else "do not continue text"

    def _sanitize_parameters(self, generation_config: Any = None, truncate: int | None = None) -> tuple[Any, Any, Any]:
        config = {} if generation_config is None else {"generation_config": generation_config}
        return {"truncate": truncate}, config, config

    @property
    def context(self) -> int | None:
        """Tokens that prompt and answer may take together."""
        config = self.model.config.get_text_config()
        length: int | None = getattr(config, "max_position_embeddings", None)
        return length if length and length > 0 else None

    def room(self, inputs: Mapping[str, Any]) -> int | None:
        """Tokens that the context leaves for the answer."""
        return self.context - inputs["input_ids"].shape[1] if self.context else None

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def preprocess(self, prompt: Prompt, truncate: int | None = None) -> dict[str, Any]:
        """Token ids of one prompt. One that is longer than the context raises RecordError or, where `truncate`
        says how many tokens to leave for the answer, is cut: its end stays, and a token that begins every text.
        """
        ids = self._chat_ids(prompt) if isinstance(prompt, list) else self.tokenizer(prompt)["input_ids"]
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = ids or [token for token in (first, last) if token is not None][:1]
        if not ids:
            raise RecordError("no_tokens", "the text has no tokens")
        length, context = len(ids), self.context
        if context and length >= context:
            if truncate is None:
                raise RecordError(
                    "too_long",
                    f"the prompt has {length} tokens, the model's context holds {context}",
                    hint="shorten it, or let --truncate cut its start",
                )
            head = ids[:1] if ids[0] == first else []
            keep = context - min(truncate, context // 2) - len(head)
            ids = head + ids[-keep:]
        input_ids = torch.tensor([ids])
        cut = length - len(ids)
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "is_chat": isinstance(prompt, list),
            "cut": cut,
        }

    def _chat_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        if not self.tokenizer.chat_template:
            raise UsageError("this model has no chat template", hint="use `llmcli generate`, or a chat model: -m NAME")
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
        except Exception as problem:  # whatever a template, which is a program, raises
            raise RecordError("bad_messages", f"the chat template refuses the messages: {problem}") from problem
        return ids

    def _forward(
        self, inputs: dict[str, Any], generation_config: Any = None, streamer: BaseStreamer | None = None
    ) -> dict[str, Any]:
        config = copy.copy(generation_config or self.model.generation_config)
        prompts, stops = inputs["input_ids"], config.stop_strings
        # transformers' own stop strings are found in the prompt's end and in special tokens too
        config.stop_strings = None
        criteria = [StopTexts(self._decoders(inputs), stops, prompts.shape[1])] if stops else []
        sequences = self.model.generate(
            input_ids=prompts,
            attention_mask=inputs["attention_mask"],
            generation_config=config,
            stopping_criteria=StoppingCriteriaList(criteria),
            streamer=streamer,
        )
        sequences = getattr(sequences, "sequences", sequences)[:, prompts.shape[1] :]
        return {"sequences": sequences.reshape(len(prompts), -1, sequences.shape[1]), **inputs}

    def postprocess(self, output: dict[str, Any], generation_config: Any = None) -> dict[str, Any]:
        """The fields of a result; `generated_texts` where more than one sequence was asked for."""
        config: GenerationConfig = generation_config or self.model.generation_config
        (decode,) = self._decoders(output)
        answers = [self._answer(sequence.tolist(), decode, config) for sequence in output["sequences"][0]]
        text, reason, _ = answers[0]
        result: dict[str, Any] = {"generated_text": text}
        if len(answers) > 1:
            result["generated_texts"] = [text for text, _, _ in answers]
        if output["cut"]:
            result["truncated"] = output["cut"]
        usage = {
            "prompt_tokens": int(output["attention_mask"].sum()),
            "completion_tokens": sum(count for _, _, count in answers),
        }
        return result | {"finish_reason": reason, "usage": usage}

    def decoder(self, item: Mapping[str, Any]) -> Decode:
        """New token ids -> text, for one preprocessed prompt."""
        (decode,) = self._decoders(item)
        return decode

    def _decoders(self, batch: Mapping[str, Any]) -> list[Decode]:
        """New token ids -> text, for each prompt of a batch. What follows a prompt is decoded together with the
        prompt's last tokens: alone, a SentencePiece tokenizer would lose the space in front of it."""
        is_chat = batch["is_chat"] if isinstance(batch["is_chat"], list) else [batch["is_chat"]]
        rows = zip(is_chat, batch["input_ids"], batch["attention_mask"], strict=True)
        tails = [[] if chat else ids[mask.bool()][-4:].tolist() for chat, ids, mask in rows]
        return [functools.partial(self._decode_after, tail, self._decode(tail)) for tail in tails]

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _decode_after(self, tail: list[int], known: str, ids: list[int]) -> str:
        return self._decode(tail + ids).removeprefix(known)

    def _answer(self, ids: list[int], decode: Decode, config: GenerationConfig) -> tuple[str, str, int]:
        """Text, finish reason, and how many tokens were generated, of one row of a batch."""
        eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        end = next((i + 1 for i, token in enumerate(ids) if token in eos), None)
        text = decode(ids[:end])
        if (cut := first_stop(text, config.stop_strings or ())) is not None:
            count = next(n for n in range(1, len(ids) + 1) if first_stop(decode(ids[:n]), config.stop_strings) == cut)
            return text[:cut], "stop", count
        return text, "stop" if end else "length", end or len(ids)


PIPELINE_REGISTRY.register_pipeline("llmcli-causal", pipeline_class=CausalPipeline)


class StopTexts(StoppingCriteria):  # type: ignore[misc]
    """Ends each row of a batch where a stop text stands in its new text. `start` is the prompts' padded length;
    there may be several rows, sequences or beams, for each of the `decoders`."""

    def __init__(self, decoders: Sequence[Decode], stops: Sequence[str], start: int) -> None:
        self.decoders, self.stops, self.start = decoders, stops, start
        # A token is a byte at least: no stop text reaches further back, from the newest token, than this.
        self.reach = max(len(stop.encode()) for stop in stops) + 8

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        rows = input_ids[:, max(self.start, input_ids.shape[1] - self.reach) :].tolist()
        decoders = (self.decoders[i * len(self.decoders) // len(rows)] for i in range(len(rows)))
        stopped = [first_stop(decode(row), self.stops) is not None for decode, row in zip(decoders, rows, strict=True)]
        return torch.tensor(stopped, device=input_ids.device)


class Deltas(BaseStreamer):  # type: ignore[misc]
    """Passes text on as it is generated, only what no later token can change.

    Held back: the bytes of an unfinished character, and an ending that may become a stop text.
    """

    def __init__(self, decode: Decode, stops: Sequence[str], on_text: Callable[[str], None]) -> None:
        self.decode, self.stops, self.on_text = decode, stops, on_text
        self.ids: list[int] = []
        self.sent = 0
        self.is_prompt = True

    def put(self, value: Any) -> None:
        if self.is_prompt:
            self.is_prompt = False
            return
        self.ids += value.flatten().tolist()
        text = self.decode(self.ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return
        end = first_stop(text, self.stops)
        end = len(text) - stop_prefix(text, self.stops) if end is None else end
        if end > self.sent:
            self.on_text(text[self.sent : end])
            self.sent = end

    def end(self) -> None:
        """The result brings the rest."""


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stop texts begins in `text`."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return min(found, default=None)


def stop_prefix(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop text."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
        default=0,
    )
