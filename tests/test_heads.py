"""Classification heads: the labels, entities and scores of transformers' own pipelines, alone and in a batch.

`python tests/test_heads.py` prints the largest difference for each pipeline, architecture and kind of problem.
"""

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from architectures import make_model, small_config
from packaging.version import Version

from llmcli import pipelines
from llmcli.engines.local import LocalEngine
from llmcli.errors import ModelUnavailableError, RecordError, UsageError
from llmcli.job import Job, LoadOptions, Record

GOLDEN = Path(__file__).parent / "golden"  # tokenizers: word pieces, bytes, SentencePiece
ARCHITECTURES = {
    "bert": "bert-qa", "roberta": "roberta-qa", "deberta-v2": "t5", "bart": "bart", "llama": "bart",
    "distilbert": "distilbert-qa", "modernbert": "roberta-qa", "xlm-roberta": "nllb", "albert": "t5",
    "electra": "bert-qa", "t5": "t5", "qwen2": "bart", "gpt2": "bart", "mpnet": "bert-qa", "xlnet": "t5",
}  # fmt: skip
NO_PADDING = ("gpt2", "llama")  # no pad_token_id, as most causal models are published
NO_TAGS = ("bart",)
QUICK = ("bert", "roberta", "deberta-v2", "bart", "llama")
WINDOW, OVERLAP = 64, 16
TOLERANCE = 1e-3
NAMES = {0: "anger", 1: "joy", 2: "fear", 3: "love"}
TAGS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}
NLI = {0: "contradiction", 1: "neutral", 2: "entailment"}
PROBLEMS: dict[str, dict[str, Any]] = {
    "single label": {"id2label": NAMES},
    "multiple labels": {"id2label": NAMES, "problem_type": "multi_label_classification"},
    "one label": {"id2label": {0: "toxic"}},
    "regression": {"id2label": {0: "stars"}, "problem_type": "regression"},
    "two regressions": {"id2label": {0: "stars", 1: "length"}, "problem_type": "regression"},
    "declared": {"id2label": NAMES, "problem_type": "single_label_classification"},
}
STRATEGIES = ("none", "simple", "first", "average", "max")
CANDIDATES = ["travel", "cooking and food", "war"]
TEXTS = [
    "Ada Lovelace was born in London, not in Paris.",
    "  The clock-maker's  apprentice\nrepaired it\tin Zürich 🕰️👩🏽‍🔧, naïve café.",
    "三位石匠和一位画家修复了圆顶，近两百位邻居给他们送来了汤。",
    "Yes.",
    "cafe\u0301 \u1e9b\u0323 ﬁne \u200d\u00a0x",
    "نص عربي and Ελληνικά",
]
LONG = [*TEXTS, " ".join(TEXTS) * 3, "One more sentence about the old town hall. " * 30]


def save_head(folder: Path, model_type: str, head: str, **settings: Any) -> Path:
    """Save a tiny model with that head, and a tokenizer that knows its window."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(GOLDEN / ARCHITECTURES[model_type])
    tokenizer.model_max_length = WINDOW
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    if model_type in NO_PADDING:
        tokenizer.pad_token = ids["pad_token_id"] = None
    settings["label2id"] = {name: id for id, name in settings["id2label"].items()}
    config = small_config(model_type, vocab_size=max(len(tokenizer), 600), **ids, **settings)
    make_model(getattr(transformers, f"AutoModelFor{head}"), config, std=0.3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(task: str, folder: Path, texts: list[str], size: int, **parameters: Any) -> list[Any]:
    """Return the outputs of a job for records with these texts."""
    options = LoadOptions(device="cpu", dtype="float32")
    job = Job(task, str(folder), parameters=parameters, load_options=options, batch_size=size)
    results = list(LocalEngine().run(job, [Record({"text": text}) for text in texts]))
    assert [result.failure for result in results if result.failure] == []
    return [result.output for result in results]


def pipeline(task: str, folder: Path, **settings: Any) -> Any:
    return transformers.pipeline(task, model=str(folder), device="cpu", dtype=torch.float32, **settings)


Scores = list[tuple[Any, float]]  # what was found, and its score, in order


def difference(outputs: list[Scores], expected: list[Scores]) -> float:
    """Return the largest difference of scores; labels, places and order have to be the same."""
    largest = 0.0
    for own, theirs in zip(outputs, expected, strict=True):
        assert len(own) == len(theirs)
        for (name, score), (other, gold) in zip(own, theirs, strict=True):
            assert name == other
            largest = max(largest, abs(score - gold))
    return largest


def compare(own: Callable[[int], list[Scores]], expected: list[Scores]) -> tuple[float, float]:
    """Return the differences of records one by one, and in a batch."""
    return difference(own(1), expected), difference(own(16), expected)


def compare_labels(folder: Path) -> tuple[float, float]:
    theirs = pipeline("text-classification", folder)
    expected = [
        [(item["label"], item["score"]) for item in theirs([text], top_k=None, truncation=True)[0]] for text in LONG
    ]
    return compare(lambda size: [ranking(output) for output in run("classify", folder, LONG, size)], expected)


def compare_inference(folder: Path, *, multi_label: bool) -> tuple[float, float]:
    theirs = pipeline("zero-shot-classification", folder)
    results = [theirs(text, candidate_labels=CANDIDATES, multi_label=multi_label) for text in LONG]
    expected = [list(zip(result["labels"], result["scores"], strict=True)) for result in results]
    labels = dict.fromkeys(CANDIDATES, "")
    return compare(
        lambda size: [
            ranking(output) for output in run("classify", folder, LONG, size, labels=labels, multi_label=multi_label)
        ],
        expected,
    )


def compare_tags(folder: Path, aggregation: str, texts: list[str], **windows: int) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Bytes have no real words.
        theirs = pipeline("token-classification", folder, aggregation_strategy=aggregation, **windows)
        expected = [places(theirs(text)) for text in texts]
    assert sum(map(len, expected)) > 8
    return compare(
        lambda size: [places(output["entities"]) for output in run("tag", folder, texts, size, aggregation=aggregation)],
        expected,
    )


def ranking(output: Any) -> Scores:
    assert (output["label"], output["score"]) == tuple(output["scores"][0].values())
    return [(item["label"], item["score"]) for item in output["scores"]]


def places(entities: list[Any]) -> Scores:
    names = ("entity_group", "entity", "word", "start", "end")
    return [(tuple(entity.get(name) for name in names), float(entity["score"])) for entity in entities]


def architectures(*excluded: str) -> list[Any]:
    names = [name for name in ARCHITECTURES if name not in excluded]
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in names]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`head("bert", "TokenClassification", id2label=TAGS)` is the folder of a tiny model."""
    folders: dict[str, Path] = {}

    def make(model_type: str, kind: str, **settings: Any) -> Path:
        key = f"{model_type} {kind} {settings}"
        if key not in folders:
            folders[key] = save_head(tmp_path_factory.mktemp(model_type), model_type, kind, **settings)
        return folders[key]

    return make


@pytest.mark.parametrize("model_type", architectures())
def test_labels_are_those_of_text_classification(head, model_type):
    assert max(compare_labels(head(model_type, "SequenceClassification", **PROBLEMS["single label"]))) < TOLERANCE


@pytest.mark.parametrize("problem", list(PROBLEMS)[1:])
@pytest.mark.parametrize("model_type", ["bert", *[pytest.param(name, marks=pytest.mark.slow) for name in QUICK[1:]]])
def test_scores_of_each_problem_type(head, model_type, problem):
    assert max(compare_labels(head(model_type, "SequenceClassification", **PROBLEMS[problem]))) < TOLERANCE


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("model_type", architectures())
def test_labels_are_those_of_zero_shot_classification(head, model_type, multi_label):
    folder = head(model_type, "SequenceClassification", id2label=NLI)
    assert max(compare_inference(folder, multi_label=multi_label)) < TOLERANCE


@pytest.mark.parametrize("aggregation", STRATEGIES)
@pytest.mark.parametrize("model_type", architectures(*NO_TAGS))
def test_entities_are_those_of_token_classification(head, model_type, aggregation):
    folder = head(model_type, "TokenClassification", id2label=TAGS)
    assert max(compare_tags(folder, aggregation, TEXTS)) < TOLERANCE


@pytest.mark.skipif(
    Version("0.23.1") <= Version(tokenizers.__version__) <= Version("0.23.2"), reason="returns only two windows"
)
@pytest.mark.parametrize("aggregation", STRATEGIES[1:])
@pytest.mark.parametrize("model_type", architectures(*NO_TAGS))
def test_entities_of_long_texts_are_those_with_stride(head, model_type, aggregation):
    folder = head(model_type, "TokenClassification", id2label=TAGS)
    assert max(compare_tags(folder, aggregation, LONG, stride=OVERLAP)) < TOLERANCE
