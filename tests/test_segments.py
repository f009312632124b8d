"""Rows that leave their batch when they end: the outputs are those of a batch that goes on until all have ended."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import transformers
from test_architectures import CAUSAL, SEQ2SEQ, TEXTS, make, make_pipeline

from llmcli.models import generation, loading
from llmcli.pipelines import answers, segments, seq2seq
from llmcli.pipelines.running import BatchSettings, GeneratingRow, RunningBatch, WholeBatch
from llmcli.pipelines.segments import SegmentedBatch
from llmcli.text.constraints import to_grammar

NEW_TOKENS = 24
ENDS = [*range(2, 340, 9)]  # tokens that end an answer: one in nine
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 50}
SHARED = loading.architectures()["causal"]["shared"]
KINDS = [("seq2seq", name) for name in SEQ2SEQ] + [("causal", name) for name in CAUSAL if name not in SHARED]
FAST = ("bart", "t5", "mamba", "lfm2", "recurrent_gemma")
STAY = {"recurrent_gemma", "rwkv", "xlnet", "xlstm", "minimax"}  # keep what no cache of transformers keeps
Make = Callable[[Any, BatchSettings], RunningBatch]


def load(family: str, model_type: str) -> Any:
    auto_class = transformers.AutoModelForSeq2SeqLM if family == "seq2seq" else transformers.AutoModelForCausalLM
    return make_pipeline(family, make(auto_class, model_type, std=0.3 if family == "seq2seq" else None))


def make_config(pipeline: Any, **options: Any) -> Any:
    asked = {"max_new_tokens": NEW_TOKENS, "eos_token_id": ENDS, "num_beams": 1, "do_sample": False, **options}
    counts_prompt = pipeline.family == "causal"
    config = generation.merge(pipeline.model.generation_config, asked, {}, {}, counts_prompt=counts_prompt)
    config.pad_token_id = pipeline.tokenizer.pad_token_id
    return config


def run(
    pipeline: Any, make_batch: Make, limits: Sequence[int] | None = None, grammars: Sequence[str | None] | None = None,
    **options: Any,
) -> list[list[Any]]:  # fmt: skip
    """Return for each step of a batch of 8 texts its outputs, as (number of the row, output)."""
    config, count = make_config(pipeline, **options), len(TEXTS.different)
    batch = make_batch(pipeline, BatchSettings(config, max_rows=count, max_length=256))
    limits, grammars = limits or [NEW_TOKENS] * count, grammars or [None] * count
    inputs = map(pipeline.preprocess, TEXTS.different)
    batch.add([*map(GeneratingRow, inputs, limits, grammars, range(count))])
    steps, total = [], 0
    while total < count:
        outputs = batch.step()
        steps.append([(i, pipeline.postprocess(output, generation_config=config)) for i, output in outputs.items()])
        total += len(outputs)
    return steps


def flatten(steps: list[list[Any]]) -> list[Any]:
    return [output for _, output in sorted(pair for step in steps for pair in step)]


def count_tokens(output: Any) -> int:
    return output["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    ("family", "model_type"),
    [pytest.param(*kind, marks=[pytest.mark.slow] * (kind[1] not in FAST)) for kind in KINDS],
)
def test_rows_leave_when_they_end_with_equal_outputs(family, model_type, monkeypatch):
    read, read_next = [], segments.read_next
    monkeypatch.setattr(segments, "read_next", lambda *args: (read.append(len(args[1])), read_next(*args))[1])
    pipeline = load(family, model_type)
    ((*whole,),) = run(pipeline, WholeBatch, **SAMPLED)
    steps = run(pipeline, SegmentedBatch, **SAMPLED)
    assert flatten(steps) == [output for _, output in whole]
    lengths = {count_tokens(output) for _, output in whole}
    assert len(lengths) > 2
    if model_type in STAY:
        assert len(steps) == 1
    else:
        assert [{count_tokens(output) for _, output in step} for step in steps] == [{n} for n in sorted(lengths)]
        assert min(read) < len(whole)


@pytest.mark.parametrize("model_type", ["t5", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {"min_new_tokens": 6, "stop_strings": ["a", "bc"]},
        {"forced_bos_token_id": 7, "begin_suppress_tokens": [5, 11, 20], "forced_eos_token_id": 2},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"encoder_no_repeat_ngram_size": 1},
        {"encoder_repetition_penalty": 1.5, "suppress_tokens": [3, 4, 50]},
        {"exponential_decay_length_penalty": (3, 1.3), "bad_words_ids": [[5], [7, 8]]},
        {"use_cache": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_count_as_in_one_call_of_generate(model_type, options):
    pipeline = load("seq2seq" if model_type == "t5" else "causal", model_type)
    limits = [NEW_TOKENS, 3, NEW_TOKENS, 9, 5, NEW_TOKENS, 12, 7]
    whole, steps = (run(pipeline, kind, limits, **SAMPLED, **options) for kind in (WholeBatch, SegmentedBatch))
    assert flatten(steps) == flatten(whole)
    assert len(steps) > 2


def test_constrained_rows_leave_with_equal_outputs():
    pipeline = load("seq2seq", "t5")
    values = [{"regex": f"[a-c]{{{i + 1}}}"} for i in range(4)]
    grammars = [*map(to_grammar, values), None, *map(to_grammar, values[:3])]
    whole, steps = (run(pipeline, kind, None, grammars, eos_token_id=2) for kind in (WholeBatch, SegmentedBatch))
    assert flatten(steps) == flatten(whole)
    assert [len(output["generated_text"]) for output in flatten(steps)[:4]] == [1, 2, 3, 4]
    assert len(steps) > 3


@pytest.mark.parametrize(
    ("settings", "options", "expected"),
    [
        ({"max_rows": 8}, {}, SegmentedBatch),
        ({"max_rows": 8}, SAMPLED, SegmentedBatch),
        ({"max_rows": 1}, {}, WholeBatch),
        ({"max_rows": 8, "logprobs": 2}, {}, WholeBatch),
        ({"max_rows": 8}, {"num_beams": 2}, WholeBatch),
        ({"max_rows": 8}, {**SAMPLED, "num_return_sequences": 2}, WholeBatch),
        ({"max_rows": 8}, {"prompt_lookup_num_tokens": 2}, WholeBatch),
    ],
)
def test_batch_is_segmented_in_plain_decoding_alone(settings, options, expected):
    pipeline = load("seq2seq", "t5")
    batch = pipeline.start(BatchSettings(make_config(pipeline, **options), **settings))
    assert type(batch) is expected


SOURCES = loading.architectures()["sources"]


@pytest.mark.parametrize("model_type", [pytest.param(m, marks=[pytest.mark.slow] * (m not in FAST)) for m in SEQ2SEQ])
def test_beams_of_a_source_share_its_keys_and_values(model_type, monkeypatch):
    caches, growing_cache = [], seq2seq.growing_cache
    monkeypatch.setattr(seq2seq, "growing_cache", lambda *args: (caches.append(growing_cache(*args)), caches[-1])[1])
    pipeline, options = load("seq2seq", model_type), {"num_beams": 3, "min_new_tokens": 4}
    outputs = run(pipeline, WholeBatch, **options)
    with monkeypatch.context() as patch:
        patch.setattr(seq2seq, "growing_cache", lambda *_: None)
        patch.setattr(answers, "search_beams", None)
        assert run(pipeline, WholeBatch, **options) == outputs
    if caches[0] is not None:
        kept = caches[0].cross_attention_cache.layers[0].keys.shape[0]
        is_shared = model_type in SOURCES and pipeline.model.config._attn_implementation == "sdpa"
        assert kept == len(TEXTS.different) * (1 if is_shared else 3)


@pytest.mark.parametrize(
    "options", [{"bad_words_ids": [[5], [7]]}, {"bad_words_ids": [[5], [7, 8]]}, {"min_length": 9, "num_beams": 2}]
)
def test_excluded_tokens_are_those_of_generate(options):
    pipeline = load("seq2seq", "bart")
    config = make_config(pipeline, min_new_tokens=5, **options)
    ids, mask = pipeline.pad([pipeline.preprocess(text)["input_ids"] for text in TEXTS.different])
    plain = pipeline.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    steps = run(pipeline, SegmentedBatch if config.num_beams == 1 else WholeBatch, min_new_tokens=5, **options)
    count = [count_tokens(output) for output in flatten(steps)]
    ends = [next((i for i, token in enumerate(row) if token in ENDS), len(row)) for row in plain[:, 1:].tolist()]
    assert count == [min(end + 1, NEW_TOKENS) for end in ends]
    assert min(count) > 5


@pytest.mark.parametrize("option", ["encoder_no_repeat_ngram_size", "guidance_scale"])
def test_options_that_read_the_batch_of_prompts_keep_its_rows(option):
    pipeline, options = load("causal", "llama"), {option: 2}
    batch = pipeline.start(BatchSettings(make_config(pipeline, **options), max_rows=8, max_length=60))
    assert type(batch) is SegmentedBatch
    whole, steps = (run(pipeline, kind, **SAMPLED, **options) for kind in (WholeBatch, SegmentedBatch))
    assert flatten(steps) == flatten(whole)


def test_batch_calls_on_token_which_may_raise():
    pipeline, calls = load("seq2seq", "t5"), []

    def on_token() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    config = make_config(pipeline, eos_token_id=None)
    batch = pipeline.start(BatchSettings(config, max_rows=2, on_token=on_token))
    batch.add([GeneratingRow(pipeline.preprocess(text), NEW_TOKENS) for text in TEXTS.different[:2]])
    with pytest.raises(KeyboardInterrupt):
        batch.step()


@pytest.mark.slow
def test_summarize_prints_the_same_text_for_any_batch_size(llmcli, tmp_path):
    pipeline = load("seq2seq", "m2m_100")
    pipeline.model.generation_config.eos_token_id = ENDS
    for part in (pipeline.model, pipeline.tokenizer):
        part.save_pretrained(tmp_path)
    options = ("--lines", "-m", tmp_path, "--dtype", "float32", "--max-new-tokens", NEW_TOKENS, "-o", "num_beams=1")
    lines = "".join(f"{text}\n" for text in TEXTS.different).encode()
    runs = [llmcli("summarize", *options, "--batch-size", size, stdin=lines) for size in (1, 3, 8)]
    assert [ran.exit_status for ran in runs] == [0, 0, 0], runs[0].stderr
    assert runs[0].stdout == runs[1].stdout == runs[2].stdout
