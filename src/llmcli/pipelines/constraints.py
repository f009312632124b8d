"""Grammars that answers must match: which tokens each row of a batch may have next."""

import functools
import os.path
from collections.abc import Collection, Sequence

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from llmcli.compat.tokenizers import hide_names
from llmcli.errors import RecordError, UsageError, first_line

TABLES = 4
COMPILED_GRAMMARS = 64  # kept for later batches


class GrammarCompiler:
    """Compiles llguidance's grammars for one tokenizer, and keeps its table of tokens and the last grammars."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        self.vocab_size = max(vocab_size, len(tokenizer))
        self._tokenizer = tokenizer
        self._table = functools.lru_cache(TABLES)(self._make_table)
        self.compile = functools.lru_cache(COMPILED_GRAMMARS)(self._compile)

    def _compile(self, grammar: str, ends: tuple[int, ...]) -> LLMatcher:
        """Return the matcher, to be copied, of a grammar for answers that end with one of these tokens."""
        matcher = LLMatcher(self._table(ends), grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().partition("\n")[0]
            raise RecordError("invalid_constraint", f"invalid constraint: {reason}")
        return matcher

    def _make_table(self, ends: tuple[int, ...]) -> LLTokenizer:
        """Return llguidance's table of all tokens, which may take seconds."""
        if not ends:
            raise UsageError("model cannot have constrained answers: it has no token that ends an answer")
        try:
            return LLTokenizer(hide_names(self._tokenizer), self.vocab_size, list(ends))
        except ValueError as exc:  # slow tokenizers, and WordPiece, which does not keep a text as it is
            raise UsageError(
                f"model cannot have constrained answers: {first_line(exc)}",
                hint="use a model with a fast BPE or SentencePiece tokenizer: -m NAME",
            ) from exc


class RowConstraints:
    """The grammars of rows, by number: which tokens each row may have next. Rows without one may have any.

    `ends` are the tokens that end an answer.
    """

    def __init__(self, compiler: GrammarCompiler, ends: list[int]) -> None:
        self.compiler, self.ends = compiler, ends
        self._matchers: dict[int, LLMatcher] = {}
        self._tokens: dict[int, list[int]] = {}  # which each matcher has read
        self._executor = LLExecutor()

    def add(self, number: int, grammar: str) -> None:
        self._matchers[number] = self.compiler.compile(grammar, tuple(self.ends)).deep_copy()
        self._tokens[number] = []

    def mask(self, numbers: Sequence[int], scores: torch.Tensor) -> torch.Tensor:
        """Return scores (R, V) of R rows, whose matchers have read all tokens, -inf for what must not follow these."""
        known = {place: matcher for place, i in enumerate(numbers) if (matcher := self._matchers.get(i))}
        if not known:
            return scores
        places = [*known]
        bits = allocate_token_bitmask(len(places), self.compiler.vocab_size)
        jobs = [(matcher, index) for index, matcher in enumerate(known.values())]
        fill_next_token_bitmask_par(self._executor, jobs, bits)
        refused = torch.from_numpy(np.unpackbits((~bits).view(np.uint8), axis=1, bitorder="little").view(np.bool_))
        # A model may have more or fewer logits than its tokenizer has tokens.
        refused = torch.nn.functional.pad(refused, (0, scores.shape[1] - refused.shape[1]), value=True)
        refused = refused.to(scores.device)
        masked = scores[places].masked_fill_(refused, -torch.inf)
        # Where other settings, such as min_new_tokens, exclude all that a grammar allows, the grammar counts.
        if (stuck := masked.amax(1) == -torch.inf).any():
            masked[stuck] = torch.zeros_like(masked[stuck]).masked_fill_(refused[stuck], -torch.inf)
        if len(places) == len(scores):
            return masked
        scores = scores.clone()
        scores[places] = masked
        return scores

    def advance(self, number: int, tokens: list[int]) -> None:
        """Let the matcher of a row read the row's new tokens, as far as it allows them."""
        matcher, known = self._matchers.get(number), self._tokens.get(number, [])
        if matcher is None:
            return
        if tokens[: len(known)] != known:  # another beam, or tokens that a limit has cut off
            kept = os.path.commonprefix([known, tokens])  # noqa: RUF071  # of tokens
            matcher.rollback(len(known) - len(kept))
            known = list(kept)
        if not (known and known[-1] in self.ends):  # Padding follows an answer's end.
            count = matcher.try_consume_tokens(tokens[len(known) :])
            known = tokens[: len(known) + count]
        self._tokens[number] = known

    def read_forced_tokens(self, number: int, tokens: list[int]) -> list[int]:
        """Let a row have these new tokens; return those that must follow, which its matcher has read then too."""
        self.advance(number, tokens)
        matcher = self._matchers.get(number)
        if matcher is None or (tokens and tokens[-1] in self.ends):
            return []
        forced = matcher.compute_ff_tokens()
        self.advance(number, [*tokens, *forced])
        return [*forced, self.ends[0]] if matcher.is_stopped() else forced

    def end(self, number: int, tokens: list[int]) -> int:
        """Forget a row, and return 0 if its answer is incomplete, 1 if complete, 2 if nothing can follow it."""
        self.advance(number, tokens)
        matcher = self._matchers.pop(number, None)
        self._tokens.pop(number, None)
        return 1 if matcher is None else int(matcher.is_accepting() and 1 + matcher.is_stopped())


class ConstraintProcessor(LogitsProcessor):  # type: ignore[misc]  # transformers has no types
    """Allow each row of `generate` only the tokens that its grammar allows.

    `start` is the padded length of the prompts, and each prompt has as many rows as there are `copies`: sequences, or
    beams, which may take each other's place between calls.
    """

    def __init__(self, rows: RowConstraints, grammars: Sequence[str | None], start: int, copies: int) -> None:
        self._rows, self._start, self._copies, self._count = rows, start, copies, len(grammars)
        for i, grammar in enumerate(grammars):
            for copy in range(copies if grammar else 0):
                rows.add(i * copies + copy, grammar or "")

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for i, tokens in enumerate(input_ids[:, self._start :].tolist()):
            self._rows.advance(i, tokens)
        return self._rows.mask(range(len(scores)), scores)

    def completion(
        self, sequences: Sequence[list[int]], limits: Sequence[int] | None, ended: Collection[int]
    ) -> np.ndarray:
        """Return the state of each sequence of new tokens, as `RowConstraints.end` does, if its prompt's have ended.

        Padding follows the limit of a prompt, if it has one.
        """
        count = len(sequences) // self._count  # returned for each prompt
        states = np.ones(len(sequences), np.uint8)
        for place, tokens in enumerate(sequences):
            if place // count not in ended:
                continue
            i = place // count * self._copies + place % count
            states[place] = self._rows.end(i, tokens[: limits[place // count]] if limits else tokens)
        return states
