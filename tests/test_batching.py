"""Which rows run together, and that it changes no text."""

import json
import time
import weakref

import pytest

from llmcli import engines
from llmcli.engines.batching import BatchPolicy, TokenBatchPolicy
from llmcli.engines.memory import MemoryEstimator, MemoryUsage
from llmcli.job import Job, Record


def plenty() -> MemoryUsage:
    return MemoryUsage(used=0, peak=0, free=10**12)


@pytest.fixture
def memory() -> MemoryEstimator:
    """Memory of which there is always enough."""
    return MemoryEstimator(plenty)


def test_the_oldest_row_and_those_nearest_to_it_in_length(memory):
    assert sorted(BatchPolicy(3, "cpu", memory).choose([10, 50, 11, 9, 200, 12])) == [0, 2, 3]
    assert sorted(BatchPolicy(8, "cpu", memory).choose([5, 1])) == [0, 1]


def test_rows_are_dealt_into_equal_batches(memory):
    lengths = [40, 300, 10, 41, 9, 290, 42, 11, 310, 8]  # alone, the nearest four to 40 would leave 8..11 with 300
    assert sorted(lengths[i] for i in BatchPolicy(4, "cpu", memory).choose(lengths)) == [11, 40, 41]


def test_policy_starts_full_where_no_rows_join_later(memory):
    policies = [BatchPolicy(*args, memory, starts_full=True) for args in ((None, "cpu"), (3, "cpu"), (None, "cuda"))]
    assert [policy.size for policy in policies] == [64, 3, 256]


@pytest.mark.parametrize(("speeds", "sizes"), [([100, 190, 300], [32, 64, 64]), ([100, 20, 500], [32, 16, 16])])
def test_policy_auto_grows_while_throughput_improves(memory, speeds, sizes):
    policy = BatchPolicy(None, "cpu", memory)
    seen = []
    for speed in speeds:
        policy.observe([10] * policy.size, speed)
        seen.append(policy.size)
    assert seen == sizes


def test_policy_of_an_accelerator_begins_large(memory):
    policy, reading = BatchPolicy(None, "cuda", memory), TokenBatchPolicy(None, "cuda", memory)
    assert len(policy.choose([10] * 2000)) in range(128, 257)
    assert len(reading.choose([10] * 9000)) == 2**16 // 10
    assert (policy.window, reading.window) == (8 * 256, 8 * 2**16 // 10)
    for size in (256, 512, 1024):
        policy.observe([10] * size, size)
    assert policy.size == 1024


def test_policy_joins_rows_as_far_as_memory_allows(memory, monkeypatch):
    monkeypatch.setattr(MemoryEstimator, "fits", lambda self, tokens, rows: tokens <= 20 * 30)
    policy = BatchPolicy(None, "cuda", memory, answer_tokens=20)
    assert len(policy.choose([10] * 100, [10] * 15, 40)) == 5  # 25 are halved until they fit
    assert policy.choose([10] * 100, [10] * 20, 40) == []
    assert policy.plan([10] * 100, [10] * 12) == (20, 10)
    assert policy.plan([10] * 90 + [40] * 10, [10] * 12) == (20, 10)  # 12 rows of 40 and an answer do not fit


def test_policy_leaves_out_the_few_rows_that_are_far_longer(memory):
    policy = BatchPolicy(None, "cpu", memory, answer_tokens=20)
    assert policy.plan([10] * 90 + [35] * 5 + [900] * 5, [10] * 16) == (16, 35)
    assert policy.plan([10] * 50 + [900] * 50, [10] * 16) == (16, 900)


def test_policy_takes_the_speed_of_full_steps(memory):
    policy = BatchPolicy(None, "cpu", memory)
    policy.largest = [10] * 16
    for ended, speed in ((0, 90.0), (8, 100.0), (7, 110.0)):
        policy.observe_step(ended, speed, is_full=True)
    assert policy.size == 16  # not as many have ended as the batch has
    policy.observe_step(1, 1.0, is_full=False)
    assert policy.size == 32


def test_policy_keeps_the_batch_size_of_the_user(memory):
    policy = BatchPolicy(5, "cpu", memory)
    policy.observe([10] * 5, 100)
    assert len(policy.choose([10] * 20)) == 5
    policy.observe_out_of_memory([10] * 5)
    assert len(policy.choose([10] * 20)) == 2


def test_policy_out_of_memory_limits_tokens_not_rows(memory):
    policy = BatchPolicy(64, "cpu", memory, answer_tokens=20)
    policy.observe_out_of_memory([10] * 63 + [1000])
    assert len(policy.choose([10] * 63 + [1000])) >= 32  # the short rows alone are far below what failed
    assert policy.choose([1000] + [10] * 63) != list(range(64))


def test_policy_fixed_ignores_speed_and_free_memory():
    policy = BatchPolicy(None, "cpu", MemoryEstimator(lambda: MemoryUsage(0, 10**6, 0)), is_fixed=True)
    policy.observe([10] * 16, 100)
    assert (policy.size, len(policy.choose([10] * 40))) == (16, 13)


def test_token_policy_measures_padded_tokens(memory):
    policy = TokenBatchPolicy(None, "cpu", memory)
    assert len(policy.choose([1] * 400)) == 256  # 16 rows of 16 tokens
    assert len(policy.choose([64] * 400)) == 4


def test_a_shared_beginning_is_computed_once_and_changes_no_text(llmcli, chatty, monkeypatch):
    from llmcli.pipelines.causal import CausalPipeline

    computed: list[int] = []
    prefill = CausalPipeline.prefill
    monkeypatch.setattr(CausalPipeline, "prefill", lambda self, ids: (computed.append(len(ids)), prefill(self, ids))[1])
    texts = ["the fox", "a lazy dog sleeps in the warm sun", "dog", "the quick brown fox and then the dog"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    args = ("chat", "--jsonl", "-m", chatty, "--prompt", f"{'the quick brown fox ' * 6}: {{text}}",
            "--temperature", 0, "--max-new-tokens", 8, "--dtype", "float32")  # fmt: skip
    alone, together = (llmcli(*args, "--batch-size", size, stdin=lines).records for size in (1, 4))
    assert alone == together
    assert len(computed) == 1
    assert computed[0] >= 16


def test_equal_records_of_a_greedy_job_run_once(llmcli, tiny, monkeypatch):
    from llmcli.pipelines.causal import CausalPipeline

    seen: list[str] = []
    preprocess = CausalPipeline.preprocess
    monkeypatch.setattr(
        CausalPipeline, "preprocess", lambda self, text, **rest: (seen.append(text), preprocess(self, text, **rest))[1]
    )
    ran = llmcli("generate", "--lines", "-m", tiny, "--temperature", 0, "--max-new-tokens", 4, stdin=b"the fox\n" * 5)
    assert len(set(ran.stdout.splitlines())) == 1
    assert len(ran.stdout.splitlines()) == 5
    assert len(seen) < 5


@pytest.mark.parametrize("size", [2, 7, 40])
def test_batches_are_as_great_as_memory_allows(llmcli, tiny, monkeypatch, size, joins):
    monkeypatch.setattr(MemoryEstimator, "fits", lambda self, tokens, rows: tokens <= size * (2 + 4))
    texts = "the fox\n" * 75
    ran = llmcli("generate", "-m", tiny, "--lines", "--max-new-tokens", 4, "-o", "do_sample=true", stdin=texts.encode())
    assert ran.exit_status == 0
    assert joins.largest <= size
    assert sum(joins) == 75
    if size < 16:
        assert joins.largest > size // 2


def test_batches_of_so_many_tokens_are_of_like_length(memory):
    lengths = [10, 50, 11, 9, 200, 12, 10]
    assert sorted(TokenBatchPolicy(3, "cpu", memory).choose(lengths)) == [0, 2, 3, 6]  # 48 tokens
    assert TokenBatchPolicy(6, "cpu", memory).choose([200, 10, 11]) == [0]  # one goes, however long
    assert sorted(TokenBatchPolicy(1, "cpu", memory).choose([5] * 5)) == [0, 1, 2]


@pytest.fixture
def joins(monkeypatch):
    """How many rows joined a batch each time. A batch of more padded tokens than `joins.budget` is out of memory."""
    from llmcli.pipelines.slots import SlotBatch

    class Joins(list[int]):
        budget = 10**9
        largest = 0  # rows of a batch

    seen, add, running = Joins(), SlotBatch.add, weakref.WeakKeyDictionary()

    def spy(self, rows, prefix=None):
        lengths = running.setdefault(self, {})
        lengths |= {len(lengths) + i: len(row.inputs["input_ids"]) for i, row in enumerate(rows)}
        together = [lengths[number] for number in self._rows] + [len(row.inputs["input_ids"]) for row in rows]
        if len(together) * max(together) > seen.budget:
            raise MemoryError
        seen.append(len(rows))
        seen.largest = max(seen.largest, len(together))
        return add(self, rows, prefix)

    monkeypatch.setattr(SlotBatch, "add", spy)
    return seen


def test_one_long_record_does_not_shrink_later_batches(llmcli, chatty, joins):
    lines = [f"the fox {i}" for i in range(300)]
    lines[3] = "the quick brown fox " * 60
    args = ("generate", "--lines", "-m", chatty, "--max-new-tokens", 1, "--batch-size", 64, "--temperature", 0)
    text = "".join(f"{line}\n" for line in lines).encode()
    whole = llmcli(*args, stdin=text)
    joins.clear()
    joins.budget = 64 * 20
    ran = llmcli(*args, stdin=text)
    assert (ran.exit_status, ran.stdout) == (0, whole.stdout)
    assert sum(joins) == 300
    assert joins.largest > 32  # 64 without the long record
    assert "warning: out of memory with a batch of " in ran.stderr


def test_record_too_long_for_memory_fails_alone(llmcli, chatty, joins):
    joins.budget = 64
    lines = "the fox\n" * 20 + "the quick brown fox " * 40 + "\n"
    ran = llmcli("generate", "--jsonl", "-m", chatty, "--max-new-tokens", 1, stdin=b"", is_terminal=False)
    ran = llmcli("generate", "--lines", "--json", "-m", chatty, "--max-new-tokens", 1, stdin=lines.encode())
    assert [record["error"]["type"] for record in ran.records if "error" in record] == ["out_of_memory"]
    assert ran.exit_status == 3


def test_seed_repeats_a_run_whatever_the_speed(llmcli, tiny, monkeypatch):
    from llmcli.engines import batching

    lines = "".join(f"the fox {i}\n" for i in range(120)).encode()
    args = ("generate", "--lines", "-m", tiny, "--max-new-tokens", 4, "--seed", 7, "--temperature", 1)
    first = llmcli(*args, stdin=lines)
    observe = batching.BatchPolicy.observe
    speeds = iter([100.0, 1.0] * 100)
    monkeypatch.setattr(
        batching.BatchPolicy, "observe", lambda self, lengths, speed: observe(self, lengths, next(speeds))
    )
    assert llmcli(*args, stdin=lines).stdout == first.stdout


def test_rows_near_the_context_length_share_batches(llmcli, tiny, joins):
    words = [" ".join(["the fox"] * (1 + i % 12)) for i in range(64)]
    text = "".join(f"{line}\n" for line in words).encode()
    args = (
        "generate",
        "--lines",
        "--json",
        "-m",
        tiny,
        "--max-new-tokens",
        64,
        "--temperature",
        0,
        "--dtype",
        "float32",
    )
    alone = llmcli(*args, "--batch-size", 1, stdin=text).records
    joins.clear()
    together = llmcli(*args, stdin=text).records
    assert together == alone
    assert len(joins) <= 5


def test_long_records_are_few_in_flight(tiny):
    read = []

    def records(length):
        for number in range(2000):
            read.append(number)
            yield Record({"text": "", "note": "x" * length})

    job = Job("generate", str(tiny), keep_alive=0)
    for length, expected in ((2**20, range(2, 80)), (10, range(512, 1100))):
        read.clear()
        results = engines.engine_for(job).run(job, records(length))
        next(results)
        time.sleep(0.2)
        assert len(read) in expected
        assert len(list(results)) == 1999


def test_token_policy_leaves_out_the_shared_beginning(memory):
    policy = TokenBatchPolicy(3, "cpu", memory)
    policy.shared_tokens = 1000
    assert len(policy.choose([5] * 9)) == 9  # 45 of 48 tokens
    policy.observe_out_of_memory([5] * 9)
    assert len(policy.choose([5] * 9)) == 3  # A batch has its own copy of the beginning.


def test_labels_after_a_long_prompt_share_large_batches(llmcli, chatty, monkeypatch):
    from llmcli.pipelines.labels import LabelPipeline

    sizes, whole = list[int](), LabelPipeline._forward

    def forward(self, inputs, **settings):
        sizes.append(len(inputs["input_ids"]))
        return whole(self, inputs, **settings)

    monkeypatch.setattr(LabelPipeline, "_forward", forward)
    prompt = "the quick brown fox " * 60 + "{text}"
    lines = "".join(f"the fox {i}\n" for i in range(100))
    ran = llmcli("classify", "--lines", "-m", chatty, "--labels", "a,b", "--prompt", prompt, stdin=lines.encode())
    assert (ran.exit_status, sum(sizes)) == (0, 100)
    assert len(sizes) < 10
