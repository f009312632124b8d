"""Batches whose rows leave when they end, and give their places to others: the text is that of `generate` alone."""

import gc
import random
import weakref

import pytest
import torch
import transformers
from architectures import make_model, small_config
from conftest import WORDS
from test_architectures import CAUSAL, TEXTS, make, make_pipeline

from llmcli import console
from llmcli.compat.transformers import uses_sdpa
from llmcli.errors import RecordError
from llmcli.models import generation, loading
from llmcli.pipelines import decoding, slots
from llmcli.pipelines.decoding import SEED_STRIDE, RowSampler
from llmcli.pipelines.running import BatchSettings, GeneratingRow
from llmcli.pipelines.slots import SlotBatch

UNRECORDED = {"big_bird", "dbrx", "jetmoe", "longcat_flash", "megatron-bert", "rembert"}
OTHER_CACHES = {"gemma3n_text", "minimax_m3_vl_text"}
SHARED = sorted({*loading.architectures()["causal"]["shared"]} & {*CAUSAL} - OTHER_CACHES)
WAYS = ["plain", "captured", "recorded"]
BEGIN = " ".join(TEXTS.near[0].split()[:9])


@pytest.fixture
def captured(monkeypatch):
    """Take the way of a GPU: static keys and values. The step is run again where a GPU would replay it."""
    shapes = []

    def capture(step, device):
        logits = step().clone()
        shapes.append(logits.shape)
        return (lambda: logits.copy_(step())), logits

    monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", "0")  # which is for CPUs
    monkeypatch.setattr(decoding, "capture_graph", capture)
    monkeypatch.setattr(slots, "GRAPH_STEPS", 1)
    created = SlotBatch.__init__

    def create(batch, *args):
        created(batch, *args)
        batch._can_capture, batch._is_cpu = uses_sdpa(batch._model), False

    monkeypatch.setattr(SlotBatch, "__init__", create)
    return shapes


@pytest.fixture
def recorded(monkeypatch):
    """Record the step of each number of rows."""
    monkeypatch.setattr(slots, "GRAPH_STEPS", 1)


def make_config(pipeline, **options):
    asked = {"max_new_tokens": 12, "do_sample": False, **options}
    config = generation.merge(pipeline.model.generation_config, asked, {}, {})
    config.pad_token_id = pipeline.tokenizer.pad_token_id
    return config


def run_alone(pipeline, texts, limits, **options):
    """Return the tokens that transformers' `generate` makes of each text."""
    found = []
    for text, limit in zip(texts, limits, strict=True):
        config = make_config(pipeline, **{**options, "max_new_tokens": limit})
        output = pipeline.forward(pipeline.preprocess(text), generation_config=config)
        found.append(output["sequences"][0, 0].tolist())
    return found


def run_batch(pipeline, texts, limits, size, prefix=None, **options):
    """Return the tokens of a batch of at most that many rows, which others join when places are free."""
    rows = [GeneratingRow(pipeline.preprocess(text), limit) for text, limit in zip(texts, limits, strict=True)]
    longest = max(len(row.inputs["input_ids"]) + row.max_new_tokens for row in rows)
    batch = pipeline.start(BatchSettings(make_config(pipeline, **options), max_rows=size, max_length=longest))
    found, waiting, unfinished = {}, list(rows), 0
    while waiting or unfinished:
        if waiting and (not unfinished or batch.can_add):
            joining, waiting = waiting[: size - unfinished], waiting[size - unfinished :]
            batch.add(joining, prefix)
            unfinished += len(joining)
        ended = batch.step()
        unfinished -= len(ended)
        found |= {i: output["sequences"][0, 0].tolist() for i, output in ended.items()}
    assert isinstance(batch, SlotBatch)
    return [found[i] for i in range(len(rows))]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SHARED)
def test_rows_that_join_later_have_the_text_of_generate(model_type, monkeypatch, captured):
    pipeline = make_pipeline("causal", make(transformers.AutoModelForCausalLM, model_type))
    if pipeline.max_shared_tokens == 0:
        pytest.skip("rows are at different positions")
    texts = TEXTS.different[:-2] + TEXTS.near[:6]
    limits = random.Random(3).choices(range(1, 13), k=len(texts))
    expected = run_alone(pipeline, texts, limits)
    assert len({*map(tuple, expected)}) > 3
    assert run_batch(pipeline, texts, limits, 4) == expected
    assert bool(captured) == uses_sdpa(pipeline.model)
    monkeypatch.undo()
    assert run_batch(pipeline, texts, limits, 4) == expected
    monkeypatch.setattr(slots, "GRAPH_STEPS", 1)
    assert run_batch(pipeline, texts, limits, 4) == expected
    if pipeline.can_read_in_parts(100):
        found = [run_batch(pipeline, [text], [limit], 1)[0] for text, limit in zip(texts, limits, strict=True)]
        assert found == expected
    if model_type not in UNRECORDED:
        assert not any(step.has_failed for step in pipeline.recorded_steps.values())


@pytest.fixture(scope="module")
def llama():
    return make_pipeline("causal", make(transformers.AutoModelForCausalLM, "llama"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 9},
        {"suppress_tokens": list(range(4, 300))},
        {"bad_words_ids": [[token] for token in range(100, 400)]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_apply_to_rows_that_join_later(llama, options, way, request):
    if way != "plain":
        request.getfixturevalue(way)
    limits = [3, 12, 12, 5, 9, 12, 1, 12]
    ends = {"eos_token_id": [2, *range(300, 340)]}
    expected = run_alone(llama, TEXTS.different, limits, **options, **ends)
    assert run_batch(llama, TEXTS.different, limits, 3, **options, **ends) == expected


def test_copies_of_a_row_may_end_when_others_go_on(llama):
    limits = [12] * len(TEXTS.different)
    ends = {"eos_token_id": [2, *range(300, 500)], "do_sample": True, "temperature": 2.0, "num_return_sequences": 3}
    transformers.set_seed(1)
    assert len(run_batch(llama, TEXTS.different, limits, 4, **ends)) == len(limits)


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_join_may_share_a_prefix(llama, way, request):
    if way != "plain":
        request.getfixturevalue(way)
    limits = [3, 12, 12, 5, 9, 12, 1, 12]
    tokens = llama.preprocess(BEGIN)["input_ids"].tolist()[:-1]
    prefix = tokens, llama.prefill(tokens)
    assert run_batch(llama, TEXTS.near, limits, 3, prefix) == run_alone(llama, TEXTS.near, limits)


def test_columns_are_moved_when_there_is_no_room(llama, monkeypatch):
    monkeypatch.setattr(slots, "SPARE_COLUMNS", 2)
    limits = [40, 3, 40, 5, 9, 40, 1, 20]
    assert run_batch(llama, TEXTS.different, limits, 3) == run_alone(llama, TEXTS.different, limits)


def test_long_prompts_are_read_in_parts(llama, monkeypatch):
    monkeypatch.setitem(slots.PREFILL_TOKENS, "cpu", 16)
    limits = [12] * 8
    assert run_batch(llama, TEXTS.different, limits, 8) == run_alone(llama, TEXTS.different, limits)


def test_a_step_ends_when_a_quarter_of_the_places_is_free(llama):
    rows = [GeneratingRow(llama.preprocess(text), limit) for text, limit in zip(TEXTS.near, range(1, 9), strict=True)]
    batch = llama.start(BatchSettings(make_config(llama, eos_token_id=None), max_rows=8, max_length=200))
    batch.add(rows)
    assert not batch.can_add
    assert sorted(batch.step()) == [0, 1]
    assert batch.can_add


def test_time_limit_ends_a_row(llama):
    config = make_config(llama, max_new_tokens=200, max_time=1e-9, eos_token_id=None)
    batch = llama.start(BatchSettings(config, max_rows=1, max_length=300))
    batch.add([GeneratingRow(llama.preprocess(TEXTS.near[0]), 200)])
    assert batch.step()[0]["sequences"].shape == (1, 1, 1)


def test_a_model_that_cannot_be_captured_decodes_without_a_graph(llama, monkeypatch, captured):
    def capture(step, device):
        step()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decoding, "capture_graph", capture)
    limits = [12] * 8
    assert run_batch(llama, TEXTS.different, limits, 3) == run_alone(llama, TEXTS.different, limits)


class Odd(torch.nn.Module):
    """A layer that computes what cannot be recorded."""

    def __init__(self, compute):
        super().__init__()
        self.compute, self.state = compute, torch.ones(1)

    def forward(self, x):
        return self.compute(self, x)


def add_count(odd, x):
    odd.count = getattr(odd, "count", 0) + 1
    return x + odd.count / 100


def keep_state(odd, x):
    odd.state = odd.state * 1.01
    return x * odd.state


@torch.jit.script
def double(x):
    return x * 2


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        (lambda _, x: x * 2 if x.sum() > 0 else x, "reads numbers with __bool__"),
        (lambda _, x: x * x[0, 0].tolist()[0], "reads numbers with tolist"),
        (lambda _, x: x * torch.where(x > 0)[0].shape[0], "aten.where.default"),
        (lambda _, x: x * len(x[x > 0]), "aten.index.Tensor"),
        (lambda _, x: double(x), "TorchScript"),
        (lambda _, x: x * torch.from_numpy(x.numpy() + 1), "reads numbers with numpy"),
        (lambda _, x: x + torch.rand(1) / 1e6, "in each step"),
        (add_count, "in each step"),
        (keep_state, "in each step"),
    ],
    ids=["branch", "list", "where", "mask", "script", "numpy", "random", "count", "state"],
)
def test_a_step_that_differs_each_time_is_not_recorded(compute, reason, recorded, monkeypatch, capsys):
    pipeline = make_pipeline("causal", make(transformers.AutoModelForCausalLM, "llama"))
    pipeline.model.model.norm = Odd(compute)
    monkeypatch.setattr(console, "verbose", True)
    run_batch(pipeline, TEXTS.near, [12] * 8, 4)
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == len(pipeline.recorded_steps)
    assert all("without a recorded step" in note and reason in note for note in notes)


def test_a_graph_is_made_again_for_another_size(llama, captured):
    limits, config = [12] * 4, make_config(llama, eos_token_id=None)
    batch = llama.start(BatchSettings(config, max_rows=32))
    found = {}
    for texts in (TEXTS.near[:4], TEXTS.far * 4):  # more rows, and longer ones
        batch.add([GeneratingRow(llama.preprocess(text), 12) for text in texts])
    while len(found) < 20:
        found |= batch.step()
    expected = run_alone(llama, TEXTS.near[:4] + TEXTS.far, limits * 2, eos_token_id=None)
    assert [found[i]["sequences"][0, 0].tolist() for i in range(8)] == expected
    assert captured == [(24, 600)]
    batch.add([GeneratingRow(llama.preprocess(text), 12) for text in TEXTS.near * 4])
    batch.step()
    assert captured == [(24, 600), (32, 600)]


@pytest.mark.parametrize("way", WAYS)
def test_records_have_the_same_text_at_every_batch_size(llmcli, tiny, way, request):
    choose = random.Random(5)
    lines = "".join(f"{' '.join(choose.choices(WORDS, k=choose.randint(1, 30)))}\n" for _ in range(60)).encode()
    ends = ["-o", f"eos_token_id={list(range(5, 300, 9))}"]
    options = ("-m", tiny, "--lines", "--temperature", "0", "--dtype", "float32", "--max-new-tokens", "30", *ends)
    alone = llmcli("generate", *options, "--batch-size", "1", stdin=lines)
    assert alone.exit_status == 0
    if way != "plain":
        request.getfixturevalue(way)
    for size in ("7", "auto"):
        ran = llmcli("generate", *options, "--batch-size", size, stdin=lines)
        assert (ran.exit_status, ran.stdout) == (0, alone.stdout)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text"])
def test_a_row_beyond_the_window_has_the_text_of_generate(model_type, way, request):
    config = small_config(model_type, sliding_window=8)
    pipeline = make_pipeline("causal", make_model(transformers.AutoModelForCausalLM, config))
    if way != "plain":
        request.getfixturevalue(way)
    options = {"max_new_tokens": 60, "eos_token_id": None}
    assert run_batch(pipeline, TEXTS.far, [60] * 4, 1, **options) == run_alone(pipeline, TEXTS.far, [60] * 4, **options)


@pytest.mark.parametrize("way", WAYS)
def test_values_that_overflow_stay_in_their_row(way, request):
    pipeline = make_pipeline("causal", make(transformers.AutoModelForCausalLM, "llama"))
    if way != "plain":
        request.getfixturevalue(way)
    bad = pipeline.preprocess(TEXTS.different[0])["input_ids"][-1]
    texts = [text for text in TEXTS.different + TEXTS.near if bad not in pipeline.preprocess(text)["input_ids"]]
    pipeline.model.get_input_embeddings().weight.data[bad] = float("nan")
    options = {"eos_token_id": None, "suppress_tokens": [bad]}
    limits = [2, *[12] * len(texts)]
    found = run_batch(pipeline, [TEXTS.different[0], *texts], limits, 2, **options)
    assert len(texts) > 3
    assert found[1:] == run_alone(pipeline, texts, limits[1:], **options)


def test_a_dropped_batch_frees_its_memory_at_once(llama):
    batch = llama.start(BatchSettings(make_config(llama), max_rows=4, max_length=100))
    batch.add([GeneratingRow(llama.preprocess(text), 12) for text in TEXTS.near[:4]])
    keys = weakref.ref(batch._cache.layers[0].keys)
    gc.disable()
    try:
        del batch
        assert keys() is None
    finally:
        gc.enable()


def test_draws_are_those_of_multinomial():
    scores, sampler = torch.randn(3, 600), RowSampler(torch.device("cpu"))
    sampler.add(7, 5, 0)
    sampler.add(9, 6, 1)
    generators = [torch.Generator().manual_seed(seed % 2**64) for seed in (5, 6 + SEED_STRIDE)]
    for _ in range(3):
        drawn = sampler.draw([7, 9], scores[:2])
        rows = zip(scores[:2].softmax(-1), generators, strict=True)
        assert drawn.tolist() == [torch.multinomial(row, 1, generator=one).item() for row, one in rows]
    with pytest.raises(RecordError, match="NaN"):
        sampler.draw([7, 9, 3], scores.index_fill(0, torch.tensor([1]), float("nan")))


def test_a_record_that_overflows_fails_alone_while_sampling(llmcli, tiny, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, tie_word_embeddings=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    lines = ["red lamp", "an old clock", "green"]
    bad = tokenizer(lines[1])["input_ids"][-1]
    model.get_input_embeddings().weight.data[bad] = float("nan")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = ("-m", tmp_path, "--lines", "--json", "--temperature", "1", "--seed", "3", "--max-new-tokens", "4")
    ran = llmcli("generate", *options, stdin="\n".join(lines).encode())
    kinds = [record.get("error", {}).get("type") for record in ran.records]
    assert kinds == [None, "not_finite", None]
