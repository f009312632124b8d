"""Classification heads: the labels, entities and scores of transformers' own pipelines, alone and in a batch.

`python tests/test_heads.py` prints the largest difference for each pipeline, architecture and kind of problem.
"""

import itertools
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from heads import EMOTIONS, ENTITIES, GOLDEN, NLI, TOKENIZERS, WINDOW, save_head
from packaging.version import Version

from llmcli import pipelines
from llmcli.engines.batch_runner import BatchRunner
from llmcli.engines.engine import MIN_WINDOW
from llmcli.engines.local import LocalEngine
from llmcli.errors import ModelUnavailableError, RecordError, UsageError
from llmcli.job import Job, LoadOptions, Record

NO_TAGS = ("bart",)  # no head for tokens
QUICK = ("bert", "deberta-v2", "bart", "llama")
OVERLAP = WINDOW // 4
TOLERANCE = 1e-3
PROBLEMS: dict[str, dict[str, Any]] = {
    "single label": {"id2label": EMOTIONS},
    "declared": {"id2label": EMOTIONS, "problem_type": "single_label_classification"},
    "multiple labels": {"id2label": EMOTIONS, "problem_type": "multi_label_classification"},
    "one label": {"id2label": {0: "toxic"}},
    "regression": {"id2label": {0: "stars"}, "problem_type": "regression"},
    "two regressions": {"id2label": {0: "stars", 1: "length"}, "problem_type": "regression"},
}
STRATEGIES = ("none", "simple", "first", "average", "max")
CANDIDATES = ["travel", "cooking and food", "war"]
TEXTS = [
    "Ada Lovelace was born in London, not in Paris.",
    "  The clock-maker's  apprentice\nrepaired it\tin Zürich 🕰️👩🏽‍🔧, naïve café.",
    "三位石匠和一位画家修复了圆顶，近两百位邻居给他们送来了汤。",
    "Yes.",
    "cafe\u0301 \u1e9b\u0323 \ufb01ne \u200d\u00a0x",
    "نص عربي and Ελληνικά",
]
LONG = [*TEXTS, " ".join(TEXTS), "One more sentence about the old town hall. " * 12]
CPU = LoadOptions(device="cpu", dtype="float32")
ENGINE = LocalEngine()  # keeps models loaded
Scores = list[tuple[Any, float]]  # what was found, and its score, in order


def run(task: str, folder: Path, texts: list[str], size: int, **parameters: Any) -> list[Any]:
    """Return the outputs of a job for records with these texts."""
    job = Job(task, str(folder), parameters=parameters, load_options=CPU, batch_size=size)
    results = list(ENGINE.run(job, [Record({"text": text}) for text in texts]))
    assert [result.failure for result in results if result.failure] == []
    return [result.output for result in results]


def reference(task: str, folder: Path, **settings: Any) -> Any:
    return transformers.pipeline(task, model=str(folder), device="cpu", dtype=torch.float32, **settings)


def difference(outputs: list[Scores], expected: list[Scores]) -> float:
    """Return the largest difference of scores; labels, places and order have to be the same."""
    largest = 0.0
    for own, theirs in zip(outputs, expected, strict=True):
        assert [name for name, _ in own] == [name for name, _ in theirs]
        largest = max([largest, *(abs(one - other) for (_, one), (_, other) in zip(own, theirs, strict=True))])
    return largest


def compare(own: Callable[[int], list[Scores]], expected: list[Scores]) -> tuple[float, float]:
    """Return the differences of records one by one, and in a batch."""
    return difference(own(1), expected), difference(own(16), expected)


def compare_labels(folder: Path) -> tuple[float, float]:
    theirs = reference("text-classification", folder)
    results = [theirs([text], top_k=None, truncation=True)[0] for text in LONG]
    expected = [[(item["label"], item["score"]) for item in result] for result in results]
    return compare(lambda size: [ranking(output) for output in run("classify", folder, LONG, size)], expected)


def compare_inference(folder: Path, *, multi_label: bool) -> tuple[float, float]:
    theirs = reference("zero-shot-classification", folder)
    results = [theirs(text, candidate_labels=CANDIDATES, multi_label=multi_label) for text in LONG]
    expected = [list(zip(result["labels"], result["scores"], strict=True)) for result in results]
    parameters = {"labels": dict.fromkeys(CANDIDATES, ""), "multi_label": multi_label}
    return compare(
        lambda size: [ranking(output) for output in run("classify", folder, LONG, size, **parameters)], expected
    )


def compare_tags(folder: Path, aggregation: str, texts: list[str], **windows: int) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Bytes have no real words.
        theirs = reference("token-classification", folder, aggregation_strategy=aggregation, **windows)
        expected = [places(theirs(text)) for text in texts]
        assert sum(map(len, expected)) > 8
        return compare(
            lambda size: [
                places(output["entities"]) for output in run("tag", folder, texts, size, aggregation=aggregation)
            ],
            expected,
        )


def ranking(output: Any) -> Scores:
    assert (output["label"], output["score"]) == tuple(output["scores"][0].values())
    return [(item["label"], item["score"]) for item in output["scores"]]


def places(entities: list[Any]) -> Scores:
    names = ("entity_group", "entity", "word", "start", "end")
    return [(tuple(entity.get(name) for name in names), float(entity["score"])) for entity in entities]


def architectures(*excluded: str, cases: tuple[Any, ...] = (None,)) -> list[Any]:
    """Return the architectures with all cases; fast tests take the first architecture, and the first case of others."""
    names = [name for name in TOKENIZERS if name not in excluded]
    return [
        pytest.param(*([name] if case is None else [name, case]), marks=[] if is_quick else [pytest.mark.slow])
        for name, case in itertools.product(names, cases)
        for is_quick in [name in QUICK and (name == QUICK[0] or case == cases[0])]
    ]


has_all_windows = pytest.mark.skipif(
    Version("0.23.1") <= Version(tokenizers.__version__) <= Version("0.23.2"), reason="tokenizers returns two windows"
)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`head("bert", "TokenClassification", ENTITIES)` is the folder of a tiny model."""
    folders: dict[str, Path] = {}

    def make(model_type: str, kind: str, *args: Any, **settings: Any) -> Path:
        key = f"{model_type} {kind} {args} {settings}"
        if key not in folders:
            folders[key] = save_head(tmp_path_factory.mktemp(model_type), model_type, kind, *args, **settings)
        return folders[key]

    return make


@pytest.fixture
def tagger(head):
    return head("bert", "TokenClassification", ENTITIES)


@pytest.mark.parametrize("model_type", architectures())
def test_labels_are_those_of_text_classification(head, model_type):
    assert max(compare_labels(head(model_type, "SequenceClassification", EMOTIONS))) < TOLERANCE


@pytest.mark.parametrize("problem", list(PROBLEMS)[2:])
@pytest.mark.parametrize("model_type", ["bert", *[pytest.param(name, marks=pytest.mark.slow) for name in QUICK[1:]]])
def test_scores_follow_the_problem_type(head, model_type, problem):
    assert max(compare_labels(head(model_type, "SequenceClassification", **PROBLEMS[problem]))) < TOLERANCE


@pytest.mark.parametrize(("model_type", "multi_label"), architectures(cases=(False, True)))
def test_labels_are_those_of_zero_shot_classification(head, model_type, multi_label):
    folder = head(model_type, "SequenceClassification", NLI)
    assert max(compare_inference(folder, multi_label=multi_label)) < TOLERANCE


def test_records_with_many_labels_wait_their_turn(head, monkeypatch):
    """The rows of all records in flight at once would take memory, and time to choose a batch among them."""
    lengths, step = [], BatchRunner.step
    monkeypatch.setattr(
        BatchRunner, "step", lambda self, *args: [lengths.append(len(self.queue)), step(self, *args)][1]
    )
    labels = dict.fromkeys(map(str, range(100)), "")
    texts = [f"{i}." for i in range(12)]
    outputs = run("classify", head("bert", "SequenceClassification", NLI), texts, 64, labels=labels)
    assert [len(output["scores"]) for output in outputs] == [100] * len(texts)
    assert 500 < max(lengths) < MIN_WINDOW + len(labels)


@pytest.mark.parametrize("ids", [{0: "ENTAILMENT", 1: "not"}, {0: "neutral", 1: "Entailed", 2: "contradiction"}])
def test_entailment_may_be_any_label(head, ids):
    folder = head("bert", "SequenceClassification", ids)
    assert max(compare_inference(folder, multi_label=True)) < TOLERANCE


@pytest.mark.parametrize(("model_type", "aggregation"), architectures(*NO_TAGS, cases=STRATEGIES))
def test_entities_are_those_of_token_classification(head, model_type, aggregation):
    assert max(compare_tags(head(model_type, "TokenClassification", ENTITIES), aggregation, TEXTS)) < TOLERANCE


@has_all_windows
@pytest.mark.parametrize("aggregation", STRATEGIES[1:])
@pytest.mark.parametrize(
    "model_type", ["bert", *[pytest.param(name, marks=pytest.mark.slow) for name in ("roberta", "t5")]]
)
def test_entities_of_long_texts_are_those_with_stride(head, model_type, aggregation):
    folder = head(model_type, "TokenClassification", ENTITIES)
    assert max(compare_tags(folder, aggregation, LONG, stride=OVERLAP)) < TOLERANCE


@pytest.mark.parametrize("model_type", architectures())
def test_pairs_have_the_logits_of_text_classification(head, model_type):
    folder = head(model_type, "SequenceClassification", EMOTIONS)
    pipeline, theirs = pipelines.load("sequence_classification", folder, CPU), reference("text-classification", folder)
    inputs = [{"text": text, "pair": pair} for text, pair in zip(LONG, itertools.cycle(TEXTS[3:]), strict=False)]
    rows = [row for item in inputs for row in pipeline.preprocess(item)]
    together = pipeline.forward({name: [row[name] for row in rows] for name in rows[0]})["logits"]
    for item, logits in zip(inputs, together, strict=True):
        pair = {"text": item["text"], "text_pair": item["pair"]}
        scores = theirs(pair, top_k=None, truncation="only_first", function_to_apply="none")
        expected = {score["label"]: score["score"] for score in scores}
        for own in (pipeline(item)["logits"][0], *[logits.tolist()] * (pipeline.max_batched_tokens is None)):
            assert dict(zip(EMOTIONS.values(), own, strict=True)) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(("model_type", "pad_token_id"), [("llama", -1), ("gpt2", None), ("gpt2", 2)])
def test_last_token_is_read_whatever_padding_is(head, model_type, pad_token_id):
    # Each text ends with token 2. Transformers reads the last token that is not the padding token.
    folder = head(model_type, "SequenceClassification", EMOTIONS, pad_token_id=pad_token_id)
    assert max(compare_labels(folder)) < TOLERANCE


def test_single_logit_passes_the_probe(head):
    folder = head("electra", "SequenceClassification", **PROBLEMS["regression"])
    assert pipelines.load("sequence_classification", folder, CPU)._ignores_padding() is True


@pytest.mark.parametrize("long", ["mean", "max"])
def test_long_text_is_read_in_windows_of_one_length(head, long):
    pipeline = pipelines.load("sequence_classification", head("bert", "SequenceClassification", EMOTIONS), CPU)
    for text in LONG:
        whole = pipeline.tokenizer(text)["input_ids"]
        windows = list(pipeline.preprocess({"text": text}, long=long))
        assert {len(window["input_ids"]) for window in windows} == {min(WINDOW, len(whole))}
        assert all(window["input_ids"][-1] == whole[-1] and window["input_ids"][0] == whole[0] for window in windows)
        own, place = whole[1:-1], 0
        for window in windows:  # Each begins where or before the one before it ends.
            part = window["input_ids"][1:-1]
            begin = next(i for i in range(place, -1, -1) if own[i : i + len(part)] == part)
            place = begin + len(part)
        assert place == len(own)
        assert [len(row) for row in pipeline({"text": text}, long=long)["logits"]] == [4] * len(windows)


def test_long_premise_is_cut_and_hypothesis_is_kept(head):
    pipeline = pipelines.load("sequence_classification", head("bert", "SequenceClassification", NLI), CPU)
    hypothesis = pipeline.tokenizer("", "About war.")["input_ids"][1:]
    (row,) = pipeline.preprocess({"text": LONG[-1], "pair": "About war."})
    assert row["input_ids"][-len(hypothesis) :] == hypothesis
    assert len(row["input_ids"]) == WINDOW
    assert row["cut"] == len(pipeline.tokenizer(LONG[-1], "About war.")["input_ids"]) - WINDOW
    for window in pipeline.preprocess({"text": LONG[-1], "pair": "About war."}, long="mean"):
        assert window["input_ids"][-len(hypothesis) :] == hypothesis
        assert set(window["token_type_ids"][-len(hypothesis) + 1 :]) == {1}
    with pytest.raises(RecordError, match="which leaves no room for the text"):
        list(pipeline.preprocess({"text": LONG[-1], "pair": LONG[-1]}))


def test_slow_tokenizer_labels_but_has_no_windows(head):
    folder = head("bert", "SequenceClassification", EMOTIONS)
    slow = transformers.AutoTokenizer.from_pretrained(GOLDEN / "marian")
    slow.model_max_length = WINDOW
    fast = pipelines.load("sequence_classification", folder, CPU)
    pipeline = type(fast)(model=fast.model, tokenizer=slow)
    (row,) = pipeline.preprocess({"text": LONG[-1]})
    assert len(row["input_ids"]) == WINDOW
    assert len(pipeline({"text": LONG[-1]})["logits"][0]) == 4
    with pytest.raises(UsageError, match="--long max requires a tokenizer"):
        list(pipeline.preprocess({"text": LONG[-1]}, long="max"))


def test_tagger_requires_offsets(tagger):
    fast = pipelines.load("token_classification", tagger, CPU)
    slow = transformers.AutoTokenizer.from_pretrained(GOLDEN / "marian")
    with pytest.raises(ModelUnavailableError, match="does not return the positions of its tokens"):
        type(fast)(model=fast.model, tokenizer=slow)


def test_tag_prints_a_line_for_each_entity(llmcli, tagger):
    text = "  Ada Lovelace\nwas born in London."
    entities = llmcli("tag", "-m", tagger, "--dtype", "float32", "--json", text).records[0]["entities"]
    ran = llmcli("tag", "-m", tagger, "--dtype", "float32", text)
    assert (ran.stderr, ran.exit_status) == ("", 0)
    lines = [line.split("\t") for line in ran.stdout.splitlines()]
    assert lines == [
        [" ".join(text[item["start"] : item["end"]].split()), item["entity_group"], f"{item['start']}-{item['end']}"]
        for item in entities
    ]
    assert len(lines) > 2


@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta"])
def test_places_of_entities_slice_the_text(llmcli, head, model_type):
    folder = head(model_type, "TokenClassification", ENTITIES)
    for text in LONG[1:5]:
        for line in llmcli("tag", "-m", folder, "--dtype", "float32", text).stdout.splitlines():
            shown, label, place = line.split("\t")
            start, end = map(int, place.split("-"))
            assert label in ("PER", "LOC")
            assert shown  # not the white space alone that a byte-level token may be
            assert " ".join(text[start:end].split()) == shown
            assert text[start:end] == text[start:end].strip()


def test_tag_prints_one_line_for_each_line(llmcli, tagger):
    lines = ["Ada in London", "", "  ", "Bob\tand Zoë 🦊", "Yes."]
    ran = llmcli("tag", "-m", tagger, "--lines", stdin="\n".join(lines).encode())
    printed = ran.stdout.split("\n")[:-1]
    assert len(printed) == len(lines)
    assert printed[1:3] == ["", ""]
    for text, line in zip(lines, printed, strict=True):
        cells = line.split("\t") if line else []
        for shown, label, place in zip(cells[::3], cells[1::3], cells[2::3], strict=True):
            start, end = map(int, place.split("-"))
            assert label in ("PER", "LOC")
            assert text[start:end] == shown


def test_tag_without_entities_prints_nothing(llmcli, head):
    folder = head("bert", "TokenClassification", {0: "O"})
    ran = llmcli("tag", "-m", folder, "Ada in London", " ")
    assert (ran.stdout, ran.stderr, ran.exit_status) == ("", "", 0)
    ran = llmcli("tag", "-m", folder, "--json", "Ada in London", " ")
    assert [record["entities"] for record in ran.records] == [[], []]


def test_tag_reads_records_and_names_of_special_tokens(llmcli, tagger):
    records = [{"id": i, "body": text} for i, text in enumerate([*LONG, "A [SEP] B [PAD] [CLS]"])]
    lines = "".join(json.dumps(record) + "\n" for record in [*records, {"id": 9}]).encode()
    options = ("--jsonl", "--field", "body", "--dtype", "float32", "--aggregation", "none")
    ran = llmcli("tag", "-m", tagger, *options, stdin=lines)
    assert ran.exit_status == 3
    *results, failed = ran.records
    assert failed["error"]["type"] == "missing_field"
    for record, result in zip(records, results, strict=True):
        assert (result["id"], result["body"]) == (record["id"], record["body"])
        for entity in result["entities"]:
            assert entity.keys() == {"entity", "score", "word", "start", "end"}
            assert 0 <= entity["start"] <= entity["end"] <= len(record["body"])
    slices = [records[-1]["body"][entity["start"] : entity["end"]] for entity in results[-1]["entities"]]
    assert not {"[SEP]", "[PAD]", "[CLS]"} & set(slices)
    assert len("".join(slices)) > 10


def test_tokens_of_long_texts_are_tagged_once(head):
    for model_type in ("bert", "deberta-v2"):
        folder = head(model_type, "TokenClassification", {0: "A", 1: "B"})
        (output,) = run("tag", folder, [LONG[-1]], 8, aggregation="none")
        tokens = pipelines.load("token_classification", folder, CPU).tokenizer(LONG[-1], return_offsets_mapping=True)
        spans = [(entity["start"], entity["end"]) for entity in output["entities"]]
        assert spans == sorted({span for span in tokens["offset_mapping"] if span[0] < span[1]})


def test_text_without_tokens_fails(llmcli, tmp_path):
    letters = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate("abcd")}, []))
    for head, command in (("TokenClassification", "tag"), ("SequenceClassification", "classify")):
        folder = save_head(tmp_path / command, "electra", head, ENTITIES)
        transformers.PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="a").save_pretrained(folder)
        ran = llmcli(command, "-m", folder, "--json", "x")
        assert ran.records[0]["error"]["type"] == "no_tokens"


def test_tag_without_a_model_names_one(llmcli):
    ran = llmcli("tag", "Ada in London")
    assert (ran.stdout, ran.exit_status) == ("", 2)
    assert ran.stderr == "error: tag has no default model\nhint: pass one: -m bert-ner\n"


def test_tag_refuses_other_heads(llmcli, head):
    ran = llmcli("tag", "-m", head("bert", "SequenceClassification", EMOTIONS), "Ada in London")
    assert ran.exit_status == 4
    assert "bert models of this kind have no token-classification head" in ran.stderr
    assert "hint: it can classify" in ran.stderr


def test_commands_answer_as_the_pipelines(llmcli, head, tagger):
    options = ("--jsonl", "--dtype", "float32")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in LONG).encode()
    folder = head("bart", "SequenceClassification", NLI)
    theirs = reference("zero-shot-classification", folder)
    template = "It is about {}, I think."
    ran = llmcli("classify", "-m", folder, "--labels", '"a, b",war', "--hypothesis", template, *options, stdin=lines)
    for text, record in zip(LONG, ran.records, strict=True):
        expected = theirs(text, candidate_labels=["a, b", "war"], hypothesis_template=template)
        assert [item["label"] for item in record["scores"]] == expected["labels"]
        assert [item["score"] for item in record["scores"]] == pytest.approx(expected["scores"], abs=TOLERANCE)
    theirs = reference("token-classification", tagger, aggregation_strategy="max")
    ran = llmcli("tag", "-m", tagger, "--aggregation", "max", *options, stdin=lines)
    outputs = [places(record["entities"]) for record in ran.records[: len(TEXTS)]]
    assert difference(outputs, [places(theirs(text)) for text in TEXTS]) < TOLERANCE


def print_table() -> None:
    """Print the largest difference of a score from that of transformers' pipeline, as Markdown."""
    print("| pipeline | architecture | problem | alone | in a batch |\n|---|---|---|---|---|")
    for model_type in TOKENIZERS:
        with tempfile.TemporaryDirectory() as name:
            for problem, settings in PROBLEMS.items():
                folder = save_head(Path(name), model_type, "SequenceClassification", **settings)
                print_row("text-classification", model_type, problem, compare_labels(folder))
            folder = save_head(Path(name), model_type, "SequenceClassification", NLI)
            for problem, is_multiple in (("one label", False), ("multiple labels", True)):
                differences = compare_inference(folder, multi_label=is_multiple)
                print_row("zero-shot-classification", model_type, problem, differences)
            if model_type not in NO_TAGS:
                folder = save_head(Path(name), model_type, "TokenClassification", ENTITIES)
                for aggregation in STRATEGIES:
                    texts, windows = (TEXTS, {}) if aggregation == "none" else (LONG, {"stride": OVERLAP})
                    differences = compare_tags(folder, aggregation, texts, **windows)
                    print_row("token-classification", model_type, aggregation, differences)


def print_row(pipeline: str, model_type: str, problem: str, differences: tuple[float, float]) -> None:
    print(f"| {pipeline} | {model_type} | {problem} | {differences[0]:.0e} | {differences[1]:.0e} |", flush=True)


if __name__ == "__main__":
    print_table()
