"""What transformers 4.57.6's pipelines answered, in float32: the commands answer the same, alone and in a batch."""

import json
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "golden"
GOLD = json.loads((HERE / "gold.json").read_text(encoding="utf-8"))
TEXTS = {
    "marian": ("marian", "translate", "--from", "en", "--to", "fr"),
    "t5-translate": ("t5", "translate", "--from", "en", "--to", "fr"),
    "t5-summarize": ("t5", "summarize"),
    "bart-summarize": ("bart", "summarize"),
    "nllb": ("nllb", "translate", "--from", "en", "--to", "fr"),
    "nllb-zh": ("nllb", "translate", "--from", "eng_Latn", "--to", "zh-Hans"),
}
ANSWERS = ("bert-qa", "distilbert-qa", "roberta-qa")
FLAGS = {"top_k": "--top-k", "max_answer_len": "--max-answer-len", "doc_stride": "--doc-stride",
         "max_seq_len": "--max-seq-len"}  # fmt: skip


def runs(group, key):
    """The group's cases, by the settings that they share."""
    found: dict[str, list] = {}
    for case in GOLD[group]["cases"]:
        found.setdefault(json.dumps(case[key]), []).append(case)
    return found.items()


def outputs(llmcli, args, cases, fields, batch_size):
    lines = "".join(json.dumps({field: case[field] for field in fields}) + "\n" for case in cases)
    ran = llmcli(*args, "--jsonl", "--dtype", "float32", "--batch-size", batch_size, stdin=lines.encode())
    assert (ran.stderr, ran.exit_status) == ("", 0)
    return ran.records


@pytest.mark.parametrize("batch_size", [1, 100])
@pytest.mark.parametrize("group", TEXTS)
def test_texts(llmcli, group, batch_size):
    model, command, *options = TEXTS[group]
    name = "translation_text" if command == "translate" else "summary_text"
    for settings, cases in runs(group, "gen"):
        given = [item for key, value in json.loads(settings).items() for item in ("-o", f"{key}={json.dumps(value)}")]
        args = (command, "-m", HERE / model, *options, *given)
        found = outputs(llmcli, args, cases, ["text"], batch_size)
        assert [record[name] for record in found] == [case["output"] for case in cases]


@pytest.mark.parametrize("batch_size", [1, 100])
@pytest.mark.parametrize("group", ANSWERS)
def test_answers(llmcli, group, batch_size):
    for settings, cases in runs(group, "args"):
        given = json.loads(settings)
        options = [str(item) for key, flag in FLAGS.items() if key in given for item in (flag, given[key])]
        options += ["--allow-no-answer"] * given.get("handle_impossible_answer", False)
        found = outputs(llmcli, ("qa", "-m", HERE / group, *options), cases, ["question", "context"], batch_size)
        for record, case in zip(found, cases, strict=True):
            for answer, gold in zip(record.get("answers", [record]), case["output"], strict=True):
                assert {key: answer[key] for key in ("answer", "start", "end")} == {
                    key: gold[key] for key in ("answer", "start", "end")
                }
                assert answer["score"] == pytest.approx(gold["score"], rel=1e-3)


def test_one_argument(llmcli):
    """The texts of the first cases, each as a person would type it."""
    for group, (model, command, *options) in TEXTS.items():
        case = GOLD[group]["cases"][0]
        ran = llmcli(command, case["text"], "-m", HERE / model, *options, "--num-beams", 1, "--max-new-tokens", 24,
                     "--dtype", "float32")  # fmt: skip
        assert ran.stdout == case["output"] + "\n", group
