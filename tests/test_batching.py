"""Which rows run together, and that it changes no text."""

import json

import pytest

from llmcli.engines.batching import BatchSize, alike, neighbours
from llmcli.engines.memory import MemoryEstimator, MemoryUsage
from llmcli.prefix import common


def test_the_oldest_row_and_those_nearest_to_it_in_length():
    assert sorted(neighbours([10, 50, 11, 9, 200, 12], 3)) == [0, 2, 3]
    assert sorted(neighbours([5, 1], 8)) == [0, 1]


def test_rows_are_dealt_into_equal_batches():
    lengths = [40, 300, 10, 41, 9, 290, 42, 11, 310, 8]  # alone, the nearest four to 40 would leave 8..11 with 300
    assert sorted(lengths[i] for i in neighbours(lengths, 4)) == [11, 40, 41]


@pytest.mark.parametrize(("speeds", "sizes"), [([100, 190, 300], [32, 64, 64]), ([100, 20, 500], [32, 16, 16])])
def test_a_batch_grows_until_a_token_gets_dearer(speeds, sizes):
    size = BatchSize(None, "cpu")
    found = []
    for speed in speeds:
        size.learn(size.now, speed)
        found.append(size.now)
    assert found == sizes


def test_a_batch_size_asked_for_stays():
    size = BatchSize(5, "cpu")
    size.learn(5, 100)
    assert size.now == 5
    size.halve()
    assert size.now == 2


def test_what_all_begin_with():
    assert common([[1, 2, 3], [1, 2], [1, 2, 9]]) == [1, 2]
    assert common([[1], [2]]) == []


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


def test_a_batch_for_which_memory_does_not_suffice_is_not_tried():
    now = MemoryUsage(taken=1000, peak=1000, free=10_000)
    memory = MemoryEstimator(lambda: now)
    assert memory.fits(10**9)  # nothing is known yet
    now = MemoryUsage(taken=1500, peak=3000, free=9500)
    memory.learn(100)  # 20 bytes a token
    assert memory.fits(400)
    assert not memory.fits(401)
    now = MemoryUsage(taken=1500, peak=9000, free=1000)
    memory.learn(500)  # 16 a token, which is less
    assert memory.fits(60)
    assert not memory.fits(61)


@pytest.mark.parametrize("size", [2, 7, 40])
def test_batches_are_as_great_as_memory_allows(llmcli, tiny, monkeypatch, size):
    from llmcli.pipelines.causal import CausalPipeline

    sizes, whole = [], CausalPipeline._forward

    def forward(self, rows, **settings):
        sizes.append(len(rows["cut"]))
        return whole(self, rows, **settings)

    monkeypatch.setattr(CausalPipeline, "_forward", forward)
    monkeypatch.setattr(MemoryEstimator, "fits", lambda self, tokens: tokens <= size * (2 + 4))
    texts = "the fox\n" * 75
    ran = llmcli("generate", "-m", tiny, "--lines", "--max-new-tokens", 4, "-o", "do_sample=true", stdin=texts.encode())
    assert ran.exit_status == 0
    assert max(sizes) <= size
    assert sum(sizes) == 75
    if size < 16:
        assert max(sizes) > size // 2


def test_batches_of_so_many_tokens_are_of_like_length():
    lengths = [10, 50, 11, 9, 200, 12, 10]
    assert sorted(alike(lengths, 44)) == [0, 2, 3, 6]
    assert alike([200, 10, 11], 100) == [0]  # one goes, however long
    assert sorted(alike([1] * 5, 3)) == [0, 1, 2]
