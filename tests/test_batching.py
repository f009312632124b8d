"""Which rows run together, and that it changes no text."""

import json

import pytest

from llmcli.engines.batching import BatchSize, common, neighbours


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
