"""Fields that a record came with: results do not replace them silently, and `error` is not always llmcli's own."""

import csv
import io
import json
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
SHORT = ("--max-new-tokens", 2, "--num-beams", 1)
MAIL = {"text": "Hi.", "from": "bob@x.org", "to": "amy@y.org", "model": "iPhone 12", "usage": "daily"}
SQUAD = {"question": "Who?", "context": "The dog.", "answer": "Rex", "answers": {"text": ["Rex"]}, "score": 5}
FAILED = {"type": "old", "message": "m"}


@pytest.fixture
def generate(llmcli, tiny):
    return lambda *args, **settings: llmcli("generate", "-m", tiny, "--max-new-tokens", 2, *args, **settings)


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def table(*rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_overwritten_fields_are_named_once(llmcli):
    ran = llmcli("translate", "--to", "fr", "-m", GOLDEN / "marian", *SHORT, "--jsonl", stdin=lines(MAIL, MAIL))
    warning = "warning: results replace these fields of the records: from, to, usage, model; to keep both: --rename "
    assert (ran.stderr, ran.exit_status) == (f"{warning}from=NEW\n", 0)
    assert ran.records[0]["to"] == "fr"


@pytest.mark.parametrize("form", ["--jsonl", "--csv"])
def test_rename_keeps_both_fields(llmcli, form):
    renames = [f"--rename={name}=new_{name}" for name in ("from", "to", "usage", "model")]
    data = lines(MAIL) if form == "--jsonl" else table(MAIL)
    ran = llmcli("translate", "--to", "fr", "-m", GOLDEN / "marian", *SHORT, form, *renames, stdin=data)
    assert (ran.stderr, ran.exit_status) == ("", 0)
    (record,) = ran.records if form == "--jsonl" else rows(ran.stdout)
    assert record.items() >= MAIL.items()
    assert record["new_to"] == "fr"


def test_qa_names_replaced_fields_of_squad(llmcli):
    ran = llmcli("qa", "-m", GOLDEN / "bert-qa", "--jsonl", stdin=lines(SQUAD))
    assert "fields of the records: answer, score; to keep both: --rename answer=NEW" in ran.stderr
    assert ran.records[0]["answers"] == SQUAD["answers"]
    several = llmcli("qa", "-m", GOLDEN / "bert-qa", "--jsonl", "--top-k", 2, stdin=lines(SQUAD))
    assert "records: answer, score, answers; to keep both" in several.stderr
    renames = ("--rename", "answer=predicted", "--rename", "score=p")
    kept = llmcli("qa", "-m", GOLDEN / "bert-qa", "--jsonl", *renames, stdin=lines(SQUAD))
    assert kept.stderr == ""
    assert kept.records[0].items() >= SQUAD.items()


def test_equal_and_empty_fields_are_not_replaced(generate, tiny):
    ran = generate("--csv", stdin=table({"text": "a", "model": tiny, "error": "", "usage": ""}))
    assert (ran.stderr, ran.exit_status) == ("", 0)


def test_own_error_and_file_of_a_record_are_kept(generate, tmp_path):
    own = {"text": 5, "error": "E42", "file": "a.txt"}
    (tmp_path / "in").write_bytes(lines(own))
    ran = generate("--jsonl", "-f", tmp_path / "in", "--rename", "error=failure", "--rename", "file=source")
    assert ran.records[0].items() >= own.items()
    assert (ran.records[0]["failure"]["type"], ran.records[0]["source"]) == ("wrong_type", str(tmp_path / "in"))
    assert "warning" not in ran.stderr
    plain = generate("--jsonl", "-f", tmp_path / "in")
    assert "fields of the records: error; to keep both: --rename error=NEW" in plain.stderr
    assert plain.records[0]["file"] == "a.txt"


def test_rename_to_own_field_warns(generate):
    ran = generate("--jsonl", "--rename", "generated_text=text", stdin=lines({"text": "a"}))
    assert "fields of the records: text; to keep both: --rename generated_text=NEW" in ran.stderr


@pytest.mark.parametrize("form", ["--jsonl", "--csv"])
def test_select_writes_only_these_result_fields(generate, form):
    data = lines({"id": "1", "text": "a"}) if form == "--jsonl" else table({"id": 1, "text": "a"})
    ran = generate(form, "--select", "generated_text, model", "--rename", "generated_text=label", stdin=data)
    (record,) = ran.records if form == "--jsonl" else rows(ran.stdout)
    assert list(record) == ["id", "text", "label", "model"]


def test_select_keeps_errors_in_json(generate):
    good, bad = generate("--jsonl", "--select", "generated_text", stdin=lines({"text": "a"}, {"text": 5})).records
    assert (list(good), list(bad)) == (["text", "generated_text"], ["text", "error"])
    ran = generate("--csv", "--select", "generated_text", stdin=b"id,text\n1,a\n2\n")
    assert (ran.stdout.splitlines()[0], ran.exit_status) == ("id,text,generated_text", 3)


def test_select_and_rename_in_every_command(llmcli, encoder, tiny, base, tmp_path):
    (tmp_path / "in").write_text("the fox\n")
    for command, name in (
        (("embed", "-m", encoder), "embedding"), (("score", "-m", tiny, "--jsonl"), "perplexity"),
        (("chat", "-m", tiny, "--jsonl", *SHORT), "generated_text"),
        (("summarize", "-m", GOLDEN / "bart", *SHORT, "--jsonl"), "summary_text"),
        (("qa", "Who?", "-m", base, "--jsonl", *SHORT[:2], "--field", "context=text"), "answer"),
    ):  # fmt: skip
        ran = llmcli(*command, "--select", name, "--rename", f"{name}=x", stdin=lines({"text": "the fox"}))
        assert (ran.exit_status, list(ran.records[0])[-1], "model" in ran.records[0]) == (0, "x", False), ran
    search = ("search", "fox", tmp_path / "in", "-m", encoder, "--json")
    (match,) = llmcli(*search, "--select", "score,file", "--rename", "score=similarity").records
    assert list(match) == ["line", "text", "similarity", "file"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rename", "generated_txt=x"), "unknown result field 'generated_txt'; did you mean 'generated_text'?"),
        (("--select", "generated_text,usag"), "unknown result field 'usag'; did you mean 'usage'?"),
        (("--select", ""), "unknown result field ''"),
        (("--rename", "x"), "--rename requires RESULT=NEW"),
        (("--rename", "model="), "--rename requires RESULT=NEW"),
        (("--rename", "model=a", "--rename", "model=b"), "once for each field"),
        (("--rename", "model=usage"), "several result fields the name 'usage'"),
    ],
)
def test_invalid_rename_and_select_are_refused(generate, options, message):
    ran = generate("--jsonl", *options, stdin=lines({"text": "a"}))
    assert (ran.exit_status, ran.stdout, message in ran.stderr) == (2, "", True), ran.stderr


def test_swapped_names_are_allowed(generate):
    swap = ("--rename", "model=usage", "--rename", "usage=model")
    (record,) = generate("--jsonl", *swap, stdin=lines({"text": "a"})).records
    assert isinstance(record["model"], dict)


def test_rename_requires_fields(generate):
    for option in (("--rename", "model=m"), ("--select", "model")):
        ran = generate("the", *option)
        assert (ran.exit_status, ran.stderr) == (
            2,
            f"error: {option[0]} requires --json, --jsonl, --csv or --parquet\n",
        )


def test_resume_refuses_another_rename(generate, tmp_path):
    args = ("--jsonl", "--output", tmp_path / "out", "--resume")
    assert generate(*args, stdin=lines({"text": "a"})).exit_status == 0
    ran = generate(*args, "--rename", "model=m", stdin=lines({"text": "a"}))
    assert (ran.exit_status, "the command has changed" in ran.stderr) == (2, True)


def test_csv_columns_are_fixed_by_the_header(generate, llmcli, encoder, tmp_path):
    (tmp_path / "e.csv").write_text("id,error,text\n1,E42,Hi\n2,,Second\n")
    ran = generate("--csv", "-f", tmp_path / "e.csv")
    assert (ran.exit_status, [row["error"] for row in rows(ran.stdout)]) == (0, ["E42", ""])
    (tmp_path / "f.csv").write_bytes(table({"error": json.dumps(FAILED), "text": "a"}, {"error": "", "text": "b"}))
    passed, run = rows(generate("--csv", "-f", tmp_path / "f.csv").stdout)
    assert (passed["file"], passed["generated_text"], run["file"]) == ("", "", str(tmp_path / "f.csv"))
    (tmp_path / "t.csv").write_text("text\nb\n")
    ran = llmcli("embed", "-m", encoder, "--csv", "text\na", "-f", tmp_path / "t.csv")
    assert (ran.exit_status, [row["file"] for row in rows(ran.stdout)]) == (0, ["", str(tmp_path / "t.csv")])


def test_undecodable_cell_of_the_first_row_keeps_its_column(generate):
    bad, good = rows(generate("--csv", stdin=b"text,size\na,\xdc\nb,L\n").stdout)
    assert (bad["size"], good["size"]) == ("", "L")


USER_ERRORS = ["TypeError", "", 5, True, [], {}, None, {"type": "a"}, {"type": 1, "message": "m"}, json.dumps(FAILED),
               {"type": "a", "message": "m", "code": 1}, {"type": "a", "message": None}]  # fmt: skip


def test_own_error_fields_are_run(generate):
    data = lines(*({"text": "the", "error": error} for error in USER_ERRORS))
    for option in ((), ("--retry-errors",)):
        ran = generate("--jsonl", *option, stdin=data)
        assert [record["error"] for record in ran.records] == USER_ERRORS
        assert all(record["generated_text"] for record in ran.records)
        assert (ran.stderr, ran.exit_status) == ("", 0)


def test_errors_of_earlier_runs_are_passed_on(generate, llmcli, encoder, tiny, base):
    record = {"text": "the", "question": "Who?", "context": "a", "error": FAILED}
    for command in (
        ("generate", "-m", tiny), ("chat", "-m", tiny), ("embed", "-m", encoder), ("score", "-m", tiny),
        ("qa", "-m", base), ("qa", "Who?", "-m", base), ("summarize", "-m", base),
        ("translate", "--to", "fr", "-m", base),
    ):  # fmt: skip
        ran = llmcli(*command, "--jsonl", stdin=lines(record))
        assert ran.records == [record]
        assert ran.stderr == "note: 1 of 1 records already had an `error` and were passed on unchanged\n"
        (row,) = rows(llmcli(*command, "--csv", stdin=table({**record, "error": json.dumps(FAILED)})).stdout)
        assert {name: row[name] for name in record} == {**record, "error": json.dumps(FAILED)}
        assert not any(row[name] for name in row if name not in record)


@pytest.mark.parametrize("option", [(), ("--retry-errors",)])
@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--field", "error"), ("generate", "--prompt", "Explain {error}"), ("chat", "--field", "error"),
        ("score", "--field", "error"), ("score", "--field", "id", "--condition", "error"),
        ("summarize", "--field", "error"), ("qa", "--field", "context=error", "Who?"),
    ],
)  # fmt: skip
def test_error_field_that_is_the_input_is_run(llmcli, chatty, command, option):
    texts = ["TypeError", json.dumps(FAILED)]
    ran = llmcli(*command, *option, "-m", chatty, "--csv", stdin=table(*({"id": "one", "error": e} for e in texts)))
    results = rows(ran.stdout)
    assert (ran.stderr, ran.exit_status) == ("", 0)
    assert [row["error"] for row in results] == texts
    assert all(row.get("model") for row in results)


def test_resume_does_not_count_own_errors_as_failed(generate, tmp_path):
    args = ("--csv", "--field", "error", "--output", tmp_path / "out", "--resume")
    data = table({"error": "E42"}, {"error": json.dumps(FAILED)})
    assert generate(*args, stdin=data).stderr == ""
    before = (tmp_path / "out").read_bytes()
    ran = generate(*args, "--retry-errors", stdin=data)
    assert (ran.exit_status, ran.stderr.count("already complete")) == (0, 1)
    assert (tmp_path / "out").read_bytes() == before


def test_error_objects_in_the_input_field_fail(generate):
    (record,) = generate("--jsonl", "--field", "error", stdin=lines({"error": FAILED})).records
    assert record["error"]["type"] == "wrong_type"


def test_deep_json_in_an_error_cell_is_text(generate):
    ran = generate("--csv", stdin=table({"text": "the", "error": '{"a":' * 100_000}))
    assert ran.exit_status == 0


@pytest.mark.slow
def test_worker_runs_own_error_fields(place, llmcli, tiny):
    args = ("generate", "-m", tiny, "--max-new-tokens", 2, "--keep-alive", "60s")
    cells = table(*({"text": "the", "error": error} for error in ("E42", json.dumps(FAILED), "")))
    assert [bool(row["model"]) for row in rows(llmcli(*args, "--csv", stdin=cells).stdout)] == [True, False, True]
    ran = llmcli(*args, "--jsonl", stdin=lines({"text": "the", "error": json.dumps(FAILED)}))
    assert ran.records[0]["generated_text"]
    ran = llmcli(*args, "--csv", "--field", "error", stdin=cells)
    assert [bool(row["model"]) for row in rows(ran.stdout)] == [True, True, True]
    ran = llmcli(*args, "--csv", "--field", "review", stdin=cells)
    assert (ran.stdout, ran.exit_status) == ("", 2)
