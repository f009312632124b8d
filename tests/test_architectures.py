"""Every architecture of transformers: a record has the same output alone, in a batch, and with a shared beginning.

`python tests/test_architectures.py` prints what Transformers itself and llmcli do, as a table.
"""

import copy
import functools
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from architectures import make_model, small_config
from transformers.models.auto import modeling_auto

from llmcli import pipelines
from llmcli.engines.batch_runner import BatchRunner
from llmcli.engines.batching import BatchPolicy
from llmcli.engines.memory import MemoryEstimator, MemoryUsage
from llmcli.engines.requests import Request
from llmcli.errors import RecordError
from llmcli.models import generation, loading
from llmcli.pipelines.base import TextPipeline, position_limit
from llmcli.pipelines.slots import PREFILL_TOKENS

NEW_TOKENS = 8
LENGTHS = (1, 2, 3, 5, 8, 12, 18, 26)  # of 8 texts, in words of about 3 tokens
TOLERANCE = 2e-3  # of sums over a text in float32
RANDOM = {"reformer"}  # hashes by chance: no two runs are the same
NO_TEXT = {"xlm"}  # ends every text at once
# Models that see the tokens to come, so that a text has another probability as a part of a longer one.
NOT_CAUSAL = {"axk2", "cpmant", "deepseek_v32", "glm_moe_dsa", "hy_v4", "prophetnet", "xlnet"}
FLAT = {"big_bird", "marian"}  # say one thing to all texts, unless their weights are larger
LISTED = {family: {*table["alone"], *table["batched"], *table["shared"]}
          for family in ("causal", "seq2seq", "encoders") if (table := loading.architectures()[family])}  # fmt: skip
CAUSAL = sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - RANDOM - NO_TEXT)
SEQ2SEQ = sorted(LISTED["seq2seq"] & modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.keys())
ENCODERS = sorted((LISTED["encoders"] - RANDOM) & modeling_auto.MODEL_MAPPING_NAMES.keys())
QA_HEADS = sorted((LISTED["encoders"] - RANDOM) & modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES.keys())
NO_TINY_HEAD = {"bros", "layoutlmv3", "lilt", "mistral4"}  # parts of other sizes than their configurations say
SEQUENCE_HEADS = sorted(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.keys() - RANDOM - NO_TINY_HEAD)
TOKEN_HEADS = sorted(modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.keys() - RANDOM - NO_TINY_HEAD)

pytestmark = pytest.mark.slow


@dataclass
class Texts:
    """Texts of random words: 8 of different lengths, and 8 with a common beginning that fit in a window, or do not."""

    choose: random.Random = field(default_factory=lambda: random.Random(7))

    def __post_init__(self) -> None:
        self.different = [self.text(3 * words // 2 + 1) for words in LENGTHS]
        begin = self.text(9)
        self.near = [f"{begin} {self.text(words)}" for words in (1, 2, 3, 4, 5, 6, 7, 8)]
        self.far = [f"{begin} {self.text(words)}" for words in (1, 4, 30, 40)]

    def text(self, words: int) -> str:
        return " ".join("".join(self.choose.choices("abcdefgh", k=3)) for _ in range(words))


TEXTS = Texts()


@functools.cache
def tokenizer() -> Any:
    """A token for each of 512 pairs of letters, or letters with a space before them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<bos>", "<eos>", "<sep>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([Texts(random.Random(1)).text(2000)], trainer)
    separate = [(token, backend.token_to_id(token)) for token in ("<sep>",)]
    backend.post_processor = processors.TemplateProcessing("$A", "$A <sep> <sep> $B:1 <sep>:1", separate)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", sep_token="<sep>"
    )


def make_pipeline(kind: str, model: Any) -> TextPipeline:
    pipelines.pipeline_class(kind)
    return pipelines._make(kind, model, copy.deepcopy(tokenizer()))  # A causal pipeline changes its tokenizer.


def run(pipeline: TextPipeline, inputs: list[Any], size: int, **parameters: Any) -> list[Any]:
    """Return the outputs of a job in batches of at most that size."""
    policy = BatchPolicy(size, "cpu", MemoryEstimator(lambda: MemoryUsage(0, 0, 2**40)))
    runner = BatchRunner(pipeline, policy, parameters, truncate=False)
    requests = [Request(value) for value in inputs]
    runner.add(requests)
    while runner.queue:
        runner.step()
    assert not [request.failure for request in requests if request.failure]
    return [request.output for request in requests]


def generate(pipeline: TextPipeline, texts: list[str], size: int, beams: int = 1) -> list[str]:
    own = pipeline.model.generation_config
    asked = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": beams}
    config = generation.merge(own, asked, {}, {}, counts_prompt=pipeline.family == "causal")
    config.pad_token_id = pipeline.tokenizer.pad_token_id
    outputs = run(pipeline, texts, size, generation_config=config)
    return [output["generated_text"] for output in outputs]


def compare_generation(pipeline: TextPipeline, texts: list[str], beams: int = 1) -> bool:
    alone = [generate(pipeline, [text], 1, beams)[0] for text in texts]
    assert len(set(alone)) > 1, f"degenerate: {alone}"
    return generate(pipeline, texts, 8, beams) == alone


def compare_scores(pipeline: TextPipeline) -> tuple[bool, bool]:
    """Return whether scores are those of each text alone, and of a plain forward pass."""
    inputs = [{"text": text, "condition": ""} for text in TEXTS.different]
    alone = [run(pipeline, [value], 1)[0]["logprob"] for value in inputs]
    together = [output["logprob"] for output in run(pipeline, inputs, 8)]
    plain = [plain_logprob(pipeline.model, text) for text in TEXTS.different]
    return [is_close(scores, alone) for scores in (together, plain)]


def plain_logprob(model: Any, text: str) -> float:
    ids = torch.tensor([tokenizer()(text)["input_ids"]])
    with torch.inference_mode():
        logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
    return float(logprobs[:-1].gather(1, ids[0, 1:, None]).sum())


def is_close(values: list[float], expected: list[float]) -> bool:
    return values == pytest.approx(expected, rel=1e-4, abs=TOLERANCE)


def make(auto_class: Any, model_type: str, **settings: Any) -> Any:
    """Return a tiny model, or skip the test if there is none: it needs images, audio or another library."""
    is_causal = auto_class is transformers.AutoModelForCausalLM
    try:
        config = small_config(model_type, is_causal=is_causal)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in auto_class.from_config(config).parameters())
        if size > 4_000_000:
            raise ValueError(f"{size} parameters")
        model = make_model(auto_class, config, **settings)
    except Exception as exc:
        pytest.skip(f"no tiny {model_type}: {type(exc).__name__}: {exc}")
    return model


def compare_causal(model_type: str, *, is_forced: bool = False) -> dict[str, bool]:
    """Return what is the same; if forced, with transformers' batches and prefix caching where llmcli does without."""
    model = make(transformers.AutoModelForCausalLM, model_type, std=0.3 if model_type in FLAT else None)
    causal, scoring = (make_pipeline(kind, model) for kind in ("causal", "scoring"))
    if is_forced:
        causal.max_shared_tokens = causal.max_batched_tokens = scoring.max_batched_tokens = None
    scores, plain = compare_scores(scoring)
    return {
        "batch": compare_generation(causal, TEXTS.different),
        "shared": compare_generation(causal, TEXTS.near),
        "shared, beyond windows": compare_generation(causal, TEXTS.far),
        "score": scores,
        "score, plain": plain or model_type in NOT_CAUSAL,
    }


@pytest.mark.parametrize("model_type", CAUSAL)
def test_causal_output_is_the_same_in_every_batch(model_type):
    assert [name for name, is_same in compare_causal(model_type).items() if not is_same] == []


@pytest.mark.parametrize("model_type", ["gpt_neo", "llama4_text", "minimax", "mpt", "openai-gpt", "rwkv", "xlnet"])
def test_generate_prints_the_same_text_for_any_batch_size(llmcli, model_type, tmp_path):
    make(transformers.AutoModelForCausalLM, model_type).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    options = ("--lines", "--temperature", "0", "--dtype", "float32", "--max-new-tokens", NEW_TOKENS, "-m", tmp_path)
    lines = "".join(f"{text}\n" for text in TEXTS.far + TEXTS.near + TEXTS.different).encode()
    runs = [llmcli("generate", *options, "--batch-size", size, stdin=lines) for size in (1, 8, "auto")]
    assert [ran.exit_status for ran in runs] == [0, 0, 0]
    assert runs[0].stdout == runs[1].stdout == runs[2].stdout
    assert len(set(runs[0].stdout.splitlines())) > 8


@pytest.mark.parametrize("model_type", SEQ2SEQ)
def test_seq2seq_output_is_the_same_in_every_batch(model_type):
    pipeline = make_pipeline("seq2seq", make(transformers.AutoModelForSeq2SeqLM, model_type, std=0.3))
    texts = [*TEXTS.different[:-1], *TEXTS.far[-1:]]
    assert [beams for beams in (1, 4) if not compare_generation(pipeline, texts, beams)] == []


def test_experts_with_little_room_run_records_alone():
    config = small_config("nllb-moe", moe_eval_capacity_token_fraction=0.1)
    pipeline = make_pipeline("seq2seq", make_model(transformers.AutoModelForSeq2SeqLM, config, std=0.3))
    assert compare_generation(pipeline, TEXTS.different)
    pipeline.max_batched_tokens = None
    assert not compare_generation(pipeline, TEXTS.different)


@pytest.mark.parametrize("model_type", ENCODERS)
def test_embeddings_are_the_same_in_every_batch(model_type):
    model = make(transformers.AutoModel, model_type)
    if model.config.is_encoder_decoder:
        pytest.skip("not an encoder")
    pipeline = make_pipeline("embedding", model)
    texts = [*TEXTS.different[:-1], *TEXTS.far[-1:]]
    alone = [run(pipeline, [text], 1)[0]["embedding"] for text in texts]
    together = [output["embedding"] for output in run(pipeline, texts, 8)]
    assert [i for i in range(8) if together[i] != pytest.approx(alone[i], abs=1e-4)] == []


@pytest.mark.parametrize("model_type", QA_HEADS)
def test_answers_are_the_same_in_every_batch(model_type):
    pipeline = make_pipeline("extractive_qa", make(transformers.AutoModelForQuestionAnswering, model_type))
    inputs = [{"question": TEXTS.different[1], "context": text} for text in TEXTS.far + TEXTS.different[2:6]]
    alone = [run(pipeline, [value], 1, max_seq_len=80, doc_stride=20)[0] for value in inputs]
    together = run(pipeline, inputs, 8, max_seq_len=80, doc_stride=20)
    assert [i for i in range(8) if together[i]["answer"] != alone[i]["answer"]] == []
    assert [output["score"] for output in together] == pytest.approx([output["score"] for output in alone], abs=1e-4)


@pytest.mark.parametrize("model_type", SEQUENCE_HEADS)
def test_labels_are_the_same_in_every_batch(model_type):
    from tokenizers.processors import TemplateProcessing

    pipeline = make_pipeline(
        "sequence_classification", make(transformers.AutoModelForSequenceClassification, model_type)
    )
    if pipeline.model.config.is_encoder_decoder:  # The head reads the end of a text.
        pipeline.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            "$A <eos>", special_tokens=[("<eos>", 2)]
        )
    inputs = [{"text": text} for text in [*TEXTS.different[:-1], *TEXTS.far[-1:]]]
    alone = [run(pipeline, [value], 1)[0]["logits"][0] for value in inputs]
    together = [output["logits"][0] for output in run(pipeline, inputs, 8)]
    assert [i for i in range(8) if together[i] != pytest.approx(alone[i], abs=1e-4)] == []


@pytest.mark.parametrize("model_type", TOKEN_HEADS)
def test_entities_are_the_same_in_every_batch(model_type):
    pipeline = make_pipeline("token_classification", make(transformers.AutoModelForTokenClassification, model_type))
    texts = [*TEXTS.different[:-1], *TEXTS.far[-1:]]
    alone = [run(pipeline, [text], 1, aggregation="none")[0] for text in texts]
    for own, other in zip(alone, run(pipeline, texts, 8, aggregation="none"), strict=True):
        assert [entity["score"] for entity in own] == pytest.approx([entity["score"] for entity in other], abs=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "mamba"])
def test_probe_accepts_models_that_ignore_padding(model_type, monkeypatch):
    assert probe(model_type, monkeypatch) is None


@pytest.mark.parametrize("model_type", ["bart", "rwkv", "minimax", "xlnet", "deepseek_v4"])
def test_probe_rejects_models_that_padding_changes(model_type, monkeypatch):
    assert probe(model_type, monkeypatch) == 0


def probe(model_type: str, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Return how long rows may be that share a batch, if the architecture is not listed."""
    empty: dict[str, list[str]] = {"alone": [], "batched": [], "shared": []}
    known = {**loading.architectures(), "causal": empty, "encoders": empty}
    monkeypatch.setattr(loading, "architectures", lambda: known)
    is_encoder = model_type == "bert"
    model = make(transformers.AutoModel if is_encoder else transformers.AutoModelForCausalLM, model_type)
    pipeline = make_pipeline("embedding" if is_encoder else "causal", model)
    return pipeline.max_batched_tokens


def make_phi3_with_two_scales() -> Any:
    """A model whose rotary positions have another scale if any row of the batch is longer than 32 tokens."""
    factors = [1.0, 1.5, 2.0, 3.0]
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    rope |= {"short_factor": factors, "long_factor": [8 * factor for factor in factors]}
    config = small_config("phi3", rope_parameters=rope, original_max_position_embeddings=32, sliding_window=None)
    return make_model(transformers.AutoModelForCausalLM, config)


@pytest.mark.parametrize("texts", [TEXTS.different, TEXTS.near, TEXTS.far], ids=["different", "near", "far"])
def test_long_rope_does_not_change_shorter_records(texts, monkeypatch):
    monkeypatch.setitem(PREFILL_TOKENS, "cpu", 128)  # parts of 16 tokens
    monkeypatch.setattr("llmcli.pipelines.scoring.LOGITS", 16 * 600)
    model = make_phi3_with_two_scales()
    causal = make_pipeline("causal", model)
    assert compare_generation(causal, texts)
    assert compare_scores(make_pipeline("scoring", model)) == [True, True]


def test_prompts_are_read_in_parts_with_equal_text(monkeypatch):
    causal = make_pipeline("causal", make(transformers.AutoModelForCausalLM, "llama"))
    whole = generate(causal, TEXTS.different, 8)
    monkeypatch.setitem(PREFILL_TOKENS, "cpu", 128)
    assert generate(causal, TEXTS.different, 8) == whole


@pytest.mark.parametrize(
    ("model_type", "window"),
    [("gpt_neo", "window_size"), ("mistral", "sliding_window"), ("llama4_text", "attention_chunk_size")],
)
def test_prefix_is_shared_within_the_window_alone(model_type, window, monkeypatch):
    config = small_config(model_type, is_causal=True, **{window: 64})
    causal = make_pipeline("causal", make_model(transformers.AutoModelForCausalLM, config))
    assert causal.max_shared_tokens == 64
    joined = []  # how long the rows are that begin together, and whether they share a prefix
    find = BatchRunner._find_prefix

    def find_prefix(runner, rows):
        prefix = find(runner, rows)
        joined.append((max(row.total for row in rows), prefix is not None))
        return prefix

    monkeypatch.setattr(BatchRunner, "_find_prefix", find_prefix)
    generate(causal, TEXTS.near, 8)
    assert [is_shared for _, is_shared in joined] == [True]
    generate(causal, TEXTS.far, 8)
    assert max(length for length, _ in joined) > 64
    assert all(length <= 64 for length, is_shared in joined if is_shared)


@pytest.mark.parametrize("pooling", ["cls_token", "mean_tokens"])
def test_embeddings_of_tokenizers_that_pad_on_the_left(pooling):
    model = make_model(transformers.AutoModel, small_config("gpt2"))
    embedding = make_pipeline("embedding", model)
    embedding.takes_first_token = pooling == "cls_token"
    embedding.tokenizer.padding_side = "left"
    alone = [run(embedding, [text], 1)[0]["embedding"] for text in TEXTS.different]
    together = [output["embedding"] for output in run(embedding, TEXTS.different, 8)]
    assert [vector == pytest.approx(other, abs=1e-4) for vector, other in zip(alone, together, strict=True)] == [
        True
    ] * 8


@pytest.mark.parametrize(
    ("kind", "auto_class", "model_type", "expected"),
    [
        *[("embedding", "AutoModel", name, 256) for name in ("bert", "electra", "distilbert", "gpt2")],
        *[("embedding", "AutoModel", name, 255) for name in ("roberta", "xlm-roberta", "camembert", "longformer")],
        *[("embedding", "AutoModel", name, 255) for name in ("roberta-prelayernorm", "data2vec-text", "ibert", "esm")],
        *[("embedding", "AutoModel", name, 255) for name in ("xmod", "xlm-roberta-xl", "markuplm")],
        ("embedding", "AutoModel", "mpnet", 254),
        *[("scoring", "AutoModelForCausalLM", name, 255) for name in ("roberta", "xmod", "camembert")],
        *[("causal", "AutoModelForCausalLM", name, 255) for name in ("roberta", "xmod", "camembert")],
        *[("causal", "AutoModelForCausalLM", name, 256) for name in ("opt", "biogpt", "mpt", "ctrl", "gpt2", "bart")],
        *[("causal", "AutoModelForCausalLM", name, 256) for name in ("openai-gpt", "gpt_neo", "codegen", "xglm")],
        *[("seq2seq", "AutoModelForSeq2SeqLM", name, 256) for name in ("bart", "marian", "mbart", "m2m_100", "led")],
        ("seq2seq", "AutoModelForSeq2SeqLM", "prophetnet", 255),
        *[("attention", "AutoModel", name, 255) for name in ("roberta", "camembert")],
    ],
)
def test_longest_accepted_text_runs(kind, auto_class, model_type, expected):
    changes = {"pad_token_id": 1} if model_type == "mpnet" else {}  # MPNet has no other
    config = small_config(model_type, is_causal="Causal" in auto_class, **changes)
    model = make_model(getattr(transformers, auto_class), config)
    pipeline = make_pipeline(kind, model)
    if kind == "embedding":
        pipeline.context_length = position_limit(config, pipeline.tokenizer)
    ids = (tokenizer()(TEXTS.text(400))["input_ids"])[:expected]
    if kind == "causal":  # The last token is generated.
        generated = model.generate(torch.tensor([ids[:-1]]), max_new_tokens=1)
        assert (pipeline.context_length, generated.shape[1]) == (expected, expected)
        return
    if kind == "attention":
        model(torch.tensor([ids]))
        with pytest.raises(RecordError, match=f"expected 1 to {expected}"):
            pipeline.preprocess(TEXTS.text(400))
        return
    assert pipeline.context_length == expected
    if kind == "scoring":
        assert run(pipeline, [{"text": TEXTS.text(400), "condition": ""}], 8)[0]["tokens"] > expected
        return
    accepted = next(text for text in map(TEXTS.text, range(200, 0, -1)) if pipeline.count_tokens(text) <= expected)
    assert pipeline.count_tokens(accepted) > expected - 6
    settings = {"max_new_tokens": 2, "do_sample": False}
    generation_config = {"generation_config": transformers.GenerationConfig(**settings)} if kind == "seq2seq" else {}
    run(pipeline, [accepted], 8, **generation_config)
    model(input_ids=torch.tensor([ids]), **({"decoder_input_ids": torch.tensor([[2]])} if kind == "seq2seq" else {}))
    with pytest.raises(RecordError, match=f"exceeds the context length of {expected}"):
        pipeline.preprocess(TEXTS.text(400))


def print_table() -> None:
    """Print for each causal architecture what transformers does in a batch, and what llmcli does, as Markdown."""
    listed = loading.architectures()["causal"]
    ways = {"alone": "alone", "batched": "in batches, without a shared beginning", "shared": "in batches"}
    print("| model type | batch | shared | beyond windows | score | transformers itself | llmcli runs it |")
    print("|---|---|---|---|---|---|---|")
    for model_type in CAUSAL:
        try:
            results = compare_causal(model_type)
        except pytest.skip.Exception as exc:
            print(f"| {model_type} | | | | | {str(exc)[:90]} | |", flush=True)
            continue
        try:
            itself = [name for name, is_same in compare_causal(model_type, is_forced=True).items() if not is_same]
        except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as exc:
            itself = [f"{type(exc).__name__}"]
        way = next((text for name, text in ways.items() if model_type in listed[name]), "after a probe")
        score = results.pop("score") and results.pop("score, plain")
        cells = ["=" if is_same else "DIFFERS" for is_same in (*results.values(), score)]
        print(f"| {' | '.join([model_type, *cells, ', '.join(itself) or '=', way])} |", flush=True)


if __name__ == "__main__":
    print_table()
