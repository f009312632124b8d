"""Batches whose rows leave when they end, and give their places to others: the text is that of `generate` alone."""

import random

import pytest
import torch
import transformers
from test_architectures import CAUSAL, TEXTS, make, make_pipeline

from llmcli.models import generation, loading
from llmcli.pipelines import decoding, slots
from llmcli.pipelines.decoding import DecodeGraph
from llmcli.pipelines.running import BatchSettings, GeneratingRow
from llmcli.pipelines.slots import SlotBatch

SHARED = sorted({*loading.architectures()["causal"]["shared"]} & {*CAUSAL})
BEGIN = " ".join(TEXTS.near[0].split()[:9])


@pytest.fixture
def captured(monkeypatch):
    """Take the way of a GPU: static keys and values. The step is run again where a GPU would replay it."""
    shapes = []

    def capture(step, device):
        logits = step().clone()
        shapes.append(logits.shape)
        return (lambda: logits.copy_(step())), logits

    monkeypatch.setattr(decoding, "capture_graph", capture)
    monkeypatch.setattr(slots, "GRAPH_STEPS", 1)
    created = SlotBatch.__init__

    def create(batch, *args):
        created(batch, *args)
        batch._can_capture, batch._is_cpu = batch._model.config._attn_implementation == "sdpa", False

    monkeypatch.setattr(SlotBatch, "__init__", create)
    return shapes


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
    is_captured = pipeline.model.config._attn_implementation == "sdpa"
    assert run_batch(pipeline, texts, limits, 4) == expected
    assert bool(captured) == is_captured
    monkeypatch.undo()
    assert run_batch(pipeline, texts, limits, 4) == expected
