"""New tokens -> text: where an answer ends, why, and what of it may be shown before it has ended."""

import bisect
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from llmcli.compat.cache import cache_argument
from llmcli.errors import RecordError, UsageError
from llmcli.pipelines.base import Inputs, Parameters, TextPipeline, as_batch
from llmcli.pipelines.constraints import ConstraintProcessor, GrammarCompiler, RowConstraints
from llmcli.pipelines.decoding import RowSampler, sample_with
from llmcli.pipelines.logprobs import TokenLogprobs, describe_logprobs
from llmcli.pipelines.running import BatchSettings, RunningBatch, WholeBatch
from llmcli.pipelines.segments import SegmentedBatch, decode_in_segments, search_beams
from llmcli.pipelines.spelling import PENDING
from llmcli.pipelines.stopping import NewTextStopCriteria, RowLimitCriteria
from llmcli.text.splitting import first_stop, stop_prefix
from llmcli.text.thoughts import ThoughtFilter, Thoughts


class TokenDecoder:
    """Decode new tokens with the prompt's last ones, `before`: alone, SentencePiece would lose the space between.

    There may be `thoughts` before the answer; `marks`, the special tokens that mark them, are kept.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = (), marks: Mapping[int, str] | None = None,
        thoughts: Thoughts | None = None, **settings: bool,
    ) -> None:  # fmt: skip
        self.thoughts, self._marks, self._before = thoughts, marks or {}, list(before)
        self._decode: Callable[[list[int]], str] = partial(tokenizer.decode, skip_special_tokens=True, **settings)
        self._known = self._decode(self._before) if before else ""

    def __call__(self, ids: list[int]) -> str:
        if self._marks and not self._marks.keys().isdisjoint(ids):
            runs = ((mark, list(run)) for mark, run in groupby(ids, self._marks.get))
            return "".join(self._decode(run) if mark is None else mark * len(run) for mark, run in runs)
        return self._decode(self._before + ids).removeprefix(self._known)

    def find_stop(self, text: str, stops: Sequence[str], reason: str | None = None) -> int | None:
        """Return where the first stop text begins in the decoded text of all new tokens, except in a thought."""
        _, begin, has_begun = self.thoughts.find(text, reason) if self.thoughts else ([], 0, True)
        return first_stop(text, stops, begin) if has_begun else None

    def stream(self) -> Callable[[int], str | None]:
        """Return a function from the next new token to the text that it completes, if any."""
        ids, begin, end = list(self._before), 0, len(self._before)

        def step(token: int) -> str | None:
            """Decode it after the tokens of the last piece of text alone: a space may depend on these."""
            nonlocal begin, end
            ids.append(token)
            if mark := self._marks.get(token):
                begin = end = len(ids)
                return mark
            known, text = self._decode(ids[begin:end]), self._decode(ids[begin:])
            if text.endswith(PENDING) or len(text) <= len(known):
                return None
            begin, end = end, len(ids)
            return text[len(known) :]

        return step


class DeltaStreamer(BaseStreamer):  # type: ignore[misc]  # transformers has no types
    """Pass text on while it is generated, except for an unfinished character and the beginning of a stop text."""

    def __init__(self, decoder: TokenDecoder, stops: Sequence[str], on_text: Callable[[str], None]) -> None:
        self._step, self._stops, self._on_text = decoder.stream(), stops, on_text
        self._filter = ThoughtFilter(decoder.thoughts)
        self._held, self._is_prompt, self._is_over = "", True, False

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt or self._is_over:
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            self._held += self._filter.feed(self._step(token) or "")
        end = first_stop(self._held, self._stops)
        self._is_over = end is not None
        end = len(self._held) - stop_prefix(self._held, self._stops) if end is None else end
        if end:
            self._on_text(self._held[:end])
            self._held = self._held[end:]

    def end(self) -> None:
        """Leave the rest to the result."""


def make_result(output: Mapping[str, Any], decode: TokenDecoder, config: GenerationConfig) -> Inputs:
    """Return the fields of one input's result, from `sequences` (1, N, T) of new tokens."""
    limit = output.get("max_new_tokens")
    answers = [_finish(sequence.tolist()[:limit], decode, config) for sequence in output["sequences"][0]]
    for i, state in enumerate(output["completion"][0] if "completion" in output else ()):
        answers[i] = *_check_completion(*answers[i][:3], state), ""
    text, reason, _, thoughts = answers[0]
    result: Inputs = {"generated_text": text}
    if len(answers) > 1:
        result["generated_texts"] = [text for text, *_ in answers]
    if thoughts:
        result["reasoning"] = thoughts
    if output["cut"]:
        result["truncated"] = output["cut"]
    completion_tokens = sum(count for _, _, count, _ in answers)
    usage = {"prompt_tokens": len(output["input_ids"]), "completion_tokens": completion_tokens}
    return {**result, "finish_reason": reason, "usage": usage}


def _finish(ids: list[int], decode: TokenDecoder, config: GenerationConfig) -> tuple[str, str, int, str]:
    """Return answer, finish reason, number of tokens and thoughts of one sequence."""
    end = _find_end(ids, config)
    text, stops = decode(ids[:end]), config.stop_strings or ()
    reason, count = "stop" if end else "length", end or len(ids)
    if (cut := decode.find_stop(text, stops, "length")) is not None:
        # Once a stop text is complete, it stays: bisect for the token that completes it.
        reason, is_cut = "stop", lambda i: decode.find_stop(decode(ids[:i]), stops, "length") == cut
        count = bisect.bisect_left(range(len(ids)), True, key=is_cut)
    text = text[:cut]
    text, thoughts, reason = decode.thoughts.split(text, reason) if decode.thoughts else (text, "", reason)
    return text, reason, count, thoughts


def _check_completion(text: str, reason: str, count: int, state: int) -> tuple[str, str, int]:
    """Return a constrained answer, or raise RecordError if its grammar does not let it end (0). 2: it has to end."""
    if not state and reason == "length":
        message = f"answer ends before it is complete: {count} tokens"
        raise RecordError("incomplete", message, hint="increase --max-new-tokens")
    if not state:
        raise RecordError("invalid_constraint", "constraint is too complex for this answer", hint="simplify it")
    return text, "stop" if state == 2 else reason, count


def _answer_tokens(
    output: Mapping[str, Any], decode: TokenDecoder, config: GenerationConfig, reason: str
) -> tuple[list[int], int]:
    """Return the tokens up to the end of the first answer's text, without a stop text, and how many precede it."""
    ids: list[int] = output["sequences"][0, 0].tolist()[: output.get("max_new_tokens")]
    if last := _find_end(ids, config):
        ids = ids[: last - 1]
    text = decode(ids)
    begin, end = 0, decode.find_stop(text, config.stop_strings or (), "length")
    if decode.thoughts:
        _, begin, end = decode.thoughts.locate(text[:end], reason)

    def count(length: int) -> int:
        return bisect.bisect_right(range(len(ids) + 1), length, key=lambda i: len(decode(ids[:i]))) - 1

    return ids if end in (None, len(text)) else ids[: count(end)], count(begin) if begin else 0


def _find_end(ids: Sequence[int], config: GenerationConfig) -> int | None:
    """Return how many tokens an answer has with the one that ends it, None if none does."""
    ends = end_tokens(config)
    return next((i + 1 for i, token in enumerate(ids) if token in ends), None)


def end_tokens(config: GenerationConfig) -> list[int]:
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return [token for token in eos if token is not None]


class GeneratingPipeline(TextPipeline):
    """A pipeline whose model generates text."""

    end_of_turn: int | None = None  # the token that ends an answer, beside those of the generation config

    def _sanitize_parameters(
        self, generation_config: object = None, truncate: int | None = None, **template: object
    ) -> Parameters:
        config = {"generation_config": generation_config} if generation_config else {}
        return {"truncate": truncate, **template}, config, config

    def find_end_tokens(self, config: GenerationConfig) -> list[int] | None:
        """Return the tokens that end an answer: those of a generation config, its special stop texts, the turn's end.

        A model whose configuration names several knows better than its template.
        """
        ends = end_tokens(config)
        if len(ends) < 2 and self.end_of_turn is not None:
            ends.append(self.end_of_turn)
        if config.stop_strings:
            known = self.tokenizer.get_added_vocab()
            ends += [known[stop.strip()] for stop in config.stop_strings if stop.strip() in known]
        return [*dict.fromkeys(ends)] or None

    def decoder(self, inputs: Mapping[str, Any]) -> TokenDecoder:
        """Return a decoder of the new tokens for one preprocessed input."""
        raise NotImplementedError

    def start(self, settings: BatchSettings) -> RunningBatch:
        """Return an empty batch."""
        return SegmentedBatch(self, settings) if SegmentedBatch.is_possible(settings) else WholeBatch(self, settings)

    def _generate(
        self, inputs: Inputs, ids: torch.Tensor, mask: torch.Tensor, config: GenerationConfig, *, start: int,
        max_new_tokens: Sequence[int] | None = None, criteria: Sequence[StoppingCriteria] = (),
        streamer: BaseStreamer | None = None, cache: DynamicCache | None = None,
        constraints: Sequence[str | None] | None = None, seeds: Sequence[int | None] | None = None,
        logprobs: int | None = None, is_segmented: bool = False,
    ) -> Inputs:  # fmt: skip
        """Return the new sequences: what the model puts after `start` tokens, padding included.

        Rows may have grammars and seeds of their own. `logprobs` is the number of alternatives to each token. If
        segmented, return as `parts` an iterator, which goes on until rows end, over what there is and those rows.
        """
        ends = [*criteria]
        if config.stop_strings:
            batch = as_batch(inputs)
            rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            ends.append(NewTextStopCriteria([*map(self.decoder, rows)], config.stop_strings, start))
            config.stop_strings = None
        if limits := max_new_tokens:
            if config.max_length and not config.max_new_tokens:
                limits = [min(limit, config.max_length - start) for limit in limits]
            config.max_new_tokens, config.max_length = max(limits), None
            if min(limits) < max(limits):
                ends.append(RowLimitCriteria(limits, start))
        is_plain = config.get_generation_mode() in ("greedy_search", "sample")
        recorder = None
        if logprobs is not None:
            if not is_plain:
                raise UsageError("--logprobs requires greedy decoding or sampling")
            ends.append(recorder := TokenLogprobs(self.model, logprobs))
        settings, copies, constraint = dict[str, Any](), config.num_return_sequences or 1, None
        if constraints and any(constraints):
            grammars = RowConstraints(self.compile_grammar, end_tokens(config))
            constraint = ConstraintProcessor(grammars, constraints, start, max(config.num_beams or 1, copies))
            settings["logits_processor"] = LogitsProcessorList([constraint])
        if (constraint or seeds) and not is_plain and config.do_sample:
            raise UsageError("sampled beams cannot be used with a constraint or with seeds of records")
        sampler = RowSampler(ids.device)
        if config.do_sample and is_plain and (seeds or ids.device.type != "cpu"):
            for i, seed in enumerate(seeds or ()):
                for copy in range(copies if seed is not None else 0):
                    sampler.add(i * copies + copy, seed or 0, copy)
            settings["custom_generate"] = sample_with(sampler)
        if config.get_generation_mode() in ("beam_search", "beam_sample"):
            settings["custom_generate"] = search_beams
        if is_segmented:
            settings["custom_generate"] = decode_in_segments(sampler)
        with recorder or nullcontext():
            sequences = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList(ends),
                streamer=streamer,
                **cache_argument(self.model, cache),
                **settings,
            )

        def describe(sequences: torch.Tensor, rows: Sequence[int]) -> Inputs:
            sequences = sequences[:, start:]
            outputs = {} if recorder is None else recorder.outputs(len(ids))
            if constraint:
                states = constraint.completion(sequences.tolist(), max_new_tokens, rows)
                outputs["completion"] = states.reshape(len(ids), -1)
            if max_new_tokens:
                outputs["max_new_tokens"] = max_new_tokens
            sequences = sequences.reshape(len(ids), -1, sequences.shape[1]).numpy(force=True)
            return {"sequences": sequences, **outputs, **inputs}

        if is_segmented:
            parts = sequences if isinstance(sequences, Iterator) else [(sequences, range(len(ids)))]
            return {"parts": ((describe(*part), part[1]) for part in parts)}
        return describe(getattr(sequences, "sequences", sequences), range(len(ids)))

    @functools.cached_property
    def compile_grammar(self) -> GrammarCompiler:
        """Compiles grammars of constraints, to be used with `end_tokens` of a generation config."""
        return GrammarCompiler(self.tokenizer, self.model.config.get_text_config().vocab_size)

    def postprocess(self, output: Inputs, generation_config: GenerationConfig | None = None) -> Inputs:
        decode, config = self.decoder(output), generation_config or self.model.generation_config
        result = make_result(output, decode, config)
        if "token_logprobs" in output:
            ids, begin = _answer_tokens(output, decode, config, result["finish_reason"])
            result |= describe_logprobs(output, ids, self.tokenizer, begin)
        return result
