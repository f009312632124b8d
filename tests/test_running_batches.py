"""Batches whose rows end one by one, and that others join: which rows run when, and that none is lost."""

import os
import random
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest

from llmcli import engines
from llmcli.engines import engine
from llmcli.job import Job, Record
from llmcli.pipelines.causal import CausalPipeline
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
    monkeypatch.setattr(CausalPipeline, "start", lambda pipeline, settings: SteppedBatch(pipeline, settings, trace))
    return trace


def texts(count):
    words = ["the", "quick", "brown", "fox", "a", "lazy", "dog", "and", "then", "sleeps"]
    return [f"{words[i % 10]} {words[i // 10 % 10]} {words[i // 100]} " * (1 + i % 5) for i in range(count)]


def lines(count):
    return "".join(f"{text}\n" for text in texts(count)).encode()


def run(model, records, *, on_result=None, **generation):
    """Return the results of an engine as they come."""
    generation = {"do_sample": False, "max_new_tokens": 6, **generation}
    job = Job("generate", str(model), generation=generation, seed=3 if generation["do_sample"] else None, keep_alive=0)
    return engines.engine_for(job).run(job, records, on_result=on_result)


def test_rows_that_end_at_random_keep_their_order(llmcli, tiny, trace, monkeypatch):
    ran = llmcli("generate", "--lines", "-m", tiny, *GREEDY, stdin=lines(300))
    assert len(trace.batches) <= 2
    assert sum(trace.joins) == 300
    assert len(trace.joins) < 60  # not for each row that ends
    monkeypatch.undo()
    assert ran.stdout == llmcli("generate", "--lines", "-m", tiny, *GREEDY, stdin=lines(300)).stdout


def test_seeded_runs_let_the_same_rows_join(tiny, trace, monkeypatch):
    monkeypatch.setattr(engine, "MIN_WINDOW", 64)

    def arrive(pause):
        for text in texts(150):
            time.sleep(pause * random.random())
            yield Record({"text": text})

    seen = []
    for pause in (0, 0.002):
        trace.joins.clear()
        outputs = [result.output for result in run(tiny, arrive(pause), do_sample=True, max_new_tokens=2)]
        seen.append((outputs, [*trace.joins]))
    assert seen[0] == seen[1]
    assert len(seen[0][0]) == 150


def test_slow_record_does_not_stop_the_others(tiny, trace):
    trace.steps = lambda number: 400 if number == 0 else 1
    known = []
    results = run(tiny, ({"text": text} and Record({"text": text}) for text in texts(900)), on_result=known.append)
    next(results)
    assert len(known) > 800
    assert [result.record.fields["text"] for result in results] == texts(900)[1:]


def test_results_that_wait_are_few_if_they_are_long(tiny, trace):
    trace.steps = lambda number: 400 if number == 0 else 1
    read = []

    def arrive():
        for text in texts(300):
            read.append(text)
            yield Record({"text": text, "note": "x" * 2**20})

    results = run(tiny, arrive())
    next(results)
    assert len(read) < 80
    assert len(list(results)) == 299


def test_batch_out_of_memory_loses_no_record(llmcli, tiny, trace):
    args = ("generate", "--lines", "-m", tiny, *GREEDY)
    whole = llmcli(*args, stdin=lines(200)).stdout
    trace.budget = 10
    ran = llmcli(*args, stdin=lines(200))
    assert (ran.exit_status, ran.stdout) == (0, whole)
    assert 1 <= ran.stderr.count("warning: out of memory") <= 4


def test_row_that_fails_later_fails_alone(llmcli, tiny, trace, monkeypatch):
    step, counts = SteppedBatch.step, []

    def fails(self):
        counts.append(len(self.left))
        if any(
            "sleeps" in self.pipeline.tokenizer.decode(output["input_ids"].tolist()) for output in self.outputs.values()
        ):
            raise RuntimeError("no sleep")
        return step(self)

    monkeypatch.setattr(SteppedBatch, "step", fails)
    ran = llmcli("generate", "--lines", "--json", "-m", tiny, *GREEDY, stdin=lines(100))
    failed = [i for i, record in enumerate(ran.records) if "error" in record]
    assert failed == [i for i, text in enumerate(texts(100)) if "sleeps" in text]
    assert max(counts) > 8


def test_closed_run_frees_its_batch(tiny, trace):
    trace.steps = lambda number: 1 + number
    results = run(tiny, (Record({"text": text}) for text in texts(50)))
    next(results)
    assert trace.batches[-1]() is not None
    results.close()
    assert trace.batches[-1]() is None


def test_record_that_streams_runs_alone(llmcli, tiny, trace):
    args = ("generate", "the quick", "-m", tiny, *GREEDY)
    watched = llmcli(*args, is_terminal=True)
    assert trace.joins == [1]
    assert watched.stdout == llmcli(*args).stdout


def test_records_of_several_parts_finish(llmcli, chatty, trace):
    text = " ".join(f"The quick brown fox sleeps in the warm sun {i}." for i in range(400))
    ran = llmcli("summarize", "-m", chatty, "--max-new-tokens", 8, "--temperature", 0, "--json", text)
    assert ran.exit_status == 0
    assert sum(trace.joins) > 3


BLOCKED = """
import sys
import test_running_batches as tests
from llmcli.cli import main
from llmcli.pipelines.causal import CausalPipeline
trace = tests.Trace()
trace.steps = lambda number: 1 if number < 20 else 10**9
CausalPipeline.start = lambda pipeline, settings: tests.SteppedBatch(pipeline, settings, trace)
sys.exit(main())
"""


@pytest.mark.slow
def test_killed_run_has_written_what_had_ended(tiny, tmp_path, llmcli, monkeypatch):
    words = ["the", "dog", "fox", "sun", "and", "then"]  # of one token each, so that the records run in their order
    equal = [f"{a} {b} {c}" for a in words for b in words for c in words][:200]
    (tmp_path / "in.txt").write_text("".join(f"{text}\n" for text in equal))
    path, command = tmp_path / "out.txt", ("generate", "-f", tmp_path / "in.txt", "--lines", "-m", tiny, *GREEDY)
    whole = llmcli(*command).stdout
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    args = [*command, "--batch-size", 64, "--output", path, "--resume"]
    running = subprocess.Popen([sys.executable, "-c", BLOCKED, *map(str, args)])
    try:
        while running.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") >= 10):
            time.sleep(0.05)
    finally:
        running.kill()
        running.wait()
    written = path.read_bytes().decode()
    assert whole.startswith(written)
    assert 10 <= written.count("\n") <= 20
    assert llmcli(*args).exit_status == 0
    assert path.read_bytes().decode() == whole


def test_longer_record_of_slow_input_joins_the_first_one(tiny, trace):
    trace.steps = lambda number: 50 if number else 200_000
    texts = ["the fox", "the quick brown fox"]

    def arrive():
        yield Record({"text": texts[0]})
        while not trace.joins:
            time.sleep(0.001)
        yield Record({"text": texts[1]})

    known = []
    list(run(tiny, arrive(), on_result=lambda result: known.append(result.record.fields["text"])))
    assert known == texts[::-1]
    assert len(trace.batches) == 1


def test_long_record_of_slow_input_is_not_passed_by_all(tiny, trace):
    trace.steps = lambda number: 400 + 100 * (number % 8)
    known = []

    def arrive():
        for i in range(200):
            while len(known) < i - 12:
                time.sleep(0.0001)
            yield Record({"text": "the " * 20 if i == 20 else f"the {i}"})

    list(run(tiny, arrive(), on_result=lambda result: known.append(result.record.fields["text"])))
    assert len(known) == 200
    assert known.index("the " * 20) < 60
