"""Batches whose rows end one by one, and that others join: which rows run when, and that none is lost."""

import random
import weakref

import pytest

from llmcli.pipelines.answers import GeneratingPipeline
from llmcli.pipelines.running import RunningBatch, WholeBatch

GREEDY = ("--temperature", 0, "--max-new-tokens", 6, "--dtype", "float32")


class Trace:
    """What the batches of a test did. `steps(number)` is how many steps a row takes; `rows` may be out of memory."""

    def __init__(self):
        self.batches, self.joins, self.warnings = [], [], []
        self.budget = 10**9
        self.steps = lambda number: random.Random(number).randint(1, 40)


class SteppedBatch(RunningBatch):
    """Computes rows as soon as they are added, and then holds the output of each back for a number of steps."""

    can_add = True
    speed = 10.0

    def __init__(self, pipeline, settings, trace):
        self.pipeline, self.settings, self.trace = pipeline, settings, trace
        self.left, self.outputs, self.count = {}, {}, 0
        self.trace.batches.append(weakref.ref(self))

    def add(self, rows, prefix=None):
        self.trace.joins.append(len(rows))
        whole = WholeBatch(self.pipeline, self.settings)
        whole.add(rows, prefix)
        for output in whole.step().values():
            self.outputs[self.count], self.left[self.count] = output, self.trace.steps(self.count)
            self.count += 1
        assert max(len(row.inputs["input_ids"]) + row.max_new_tokens for row in rows) <= self.settings.max_length
        assert len(self.left) <= self.settings.max_rows
        if len(self.left) > self.trace.budget:
            raise MemoryError

    def step(self):
        self.left = {number: steps - 1 for number, steps in self.left.items()}
        ended = [number for number, steps in self.left.items() if steps <= 0]
        return {number: self.outputs.pop(number) for number in ended if self.left.pop(number) <= 0}


@pytest.fixture
def trace(monkeypatch):
    trace = Trace()
    monkeypatch.setattr(GeneratingPipeline, "start", lambda pipeline, settings: SteppedBatch(pipeline, settings, trace))
    return trace


def lines(count):
    words = ["the", "quick", "brown", "fox", "a", "lazy", "dog", "and", "then", "sleeps"]
    texts = (f"{words[i % 10]} {words[i // 10 % 10]} {words[i // 100 % 10]} " * (1 + i % 5) for i in range(count))
    return "".join(f"{text}\n" for text in texts).encode()


def test_rows_that_end_at_random_keep_their_order(llmcli, tiny, trace, monkeypatch):
    ran = llmcli("generate", "--lines", "-m", tiny, *GREEDY, stdin=lines(300))
    assert len(trace.batches) <= 2
    assert sum(trace.joins) == 300
    assert len(trace.joins) < 60  # not for each row that ends
    monkeypatch.undo()
    assert ran.stdout == llmcli("generate", "--lines", "-m", tiny, *GREEDY, stdin=lines(300)).stdout
