"""Arguments, files and stdin in every form, and what is wrong with some of them."""

import json

import pytest

from llmcli.errors import UsageError
from llmcli.io.formats import InputFormat
from llmcli.io.records import open_inputs, read_prompts, read_records
from llmcli.job import Failure

DATA = {
    InputFormat.WHOLE: (b"one\ntwo\n", [{"text": "one\ntwo"}]),
    InputFormat.LINES: (b"one\n\ntwo\r\nthree", [{"text": "one"}, {"text": ""}, {"text": "two"}, {"text": "three"}]),
    InputFormat.NULL: (b"one\n\0\0two", [{"text": "one\n"}, {"text": ""}, {"text": "two"}]),
    InputFormat.JSONL: (b'{"text": "one", "n": 1}\n{"text": "\xc3\xa9"}\n', [{"text": "one", "n": 1}, {"text": "é"}]),
    InputFormat.CSV: (
        b'text,n\n"one\ntwo",1\nthree,2\n',
        [{"text": "one\ntwo", "n": "1"}, {"text": "three", "n": "2"}],
    ),
}


def records(data: bytes, form: InputFormat, tmp_path) -> list:
    path = tmp_path / "input"
    path.write_bytes(data)
    return list(read_records(open_inputs([], [str(path)]), form))


@pytest.mark.parametrize("form", InputFormat)
@pytest.mark.parametrize("source", ["argument", "file", "stdin", "dash"])
def test_every_form_from_every_source(form, source, tmp_path, monkeypatch):
    data, expected = DATA[form]
    path = tmp_path / "input.txt"
    path.write_bytes(data)
    texts, files = [], []
    if source == "argument":
        if b"\0" in data:
            pytest.skip("an argument holds no NUL")
        texts = [data.decode()]
    elif source == "file":
        files = [str(path)]
    else:
        monkeypatch.setattr("sys.stdin", path.open())
        files = ["-"] if source == "dash" else []
    found = list(read_records(open_inputs(texts, files), form))
    assert [record.fields for record in found] == expected
    assert not any(record.failure for record in found)
    assert {record.file for record in found} == {{"file": str(path), "dash": "-"}.get(source)}


@pytest.mark.parametrize(
    ("form", "shares"),
    [
        (InputFormat.WHOLE, [0.5, 1]),
        (InputFormat.LINES, [0.25, 0.5, 0.75, 1]),
        (InputFormat.NULL, [None] * 4),
        (InputFormat.JSONL, [0.25, 0.5, 0.75, 1]),
        (InputFormat.CSV, [0.5, 1]),
    ],
)
def test_of_files_a_record_knows_how_much_is_read_with_it(form, shares, tmp_path, monkeypatch):
    end = b"\0" if form is InputFormat.NULL else b"\n"
    path = tmp_path / "input"
    path.write_bytes(b"text" + end + b"1234" + end)
    assert [record.input_fraction for record in read_records(open_inputs([], [str(path), str(path)]), form)] == shares
    with path.open("rb", buffering=0) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        stdin.seek(5)
        assert [record.input_fraction for record in read_records(open_inputs([], []), form)][-1:] == shares[-1:] * (
            form is not InputFormat.CSV
        )
    assert {record.input_fraction for record in read_records(open_inputs(["text"], [str(path)]), form)} == {None}
    assert {record.input_fraction for record in read_records(open_inputs([], [str(path), "/dev/null"]), form)} == {None}


@pytest.mark.parametrize("form", InputFormat)
def test_nothing_in_nothing_out(form, tmp_path):
    assert records(b"", form, tmp_path) == ([] if form is not InputFormat.WHOLE else records(b"\n", form, tmp_path))


@pytest.mark.parametrize("form", [InputFormat.WHOLE, InputFormat.LINES, InputFormat.JSONL, InputFormat.CSV])
def test_a_byte_order_mark_is_no_text(form, tmp_path):
    data, expected = DATA[form]
    assert [record.fields for record in records(b"\xef\xbb\xbf" + data, form, tmp_path)] == expected


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        (b"", "invalid_json", "blank line"),
        (b'{"text": ', "invalid_json", "not JSON: Expecting value at character 9"),
        (b'["a"]', "invalid_json", "expected a JSON object, got an array"),
        (b'"a"', "invalid_json", "expected a JSON object, got a string"),
        (b"3", "invalid_json", "expected a JSON object, got a number"),
        (b"null", "invalid_json", "expected a JSON object, got null"),
        (b'{"x": NaN}', "invalid_json", "not JSON: NaN is not a valid number"),
        (b'{"x": 1e999}', "invalid_json", "not JSON: 1e999 is not a valid number"),
        (b'{"text": "a\xff"}', "invalid_utf8", "not UTF-8: byte 0xff at offset 11"),
        (b'{"a":' * 100_000, "invalid_json", None),
    ],
)
def test_a_bad_line_fails_alone(line, kind, message, tmp_path):
    good = b'{"text": "good"}\n'
    before, bad, after = records(good + line + b"\n" + good, InputFormat.JSONL, tmp_path)
    assert before.fields == after.fields == {"text": "good"}
    assert bad.fields == {"line": 2}
    assert bad.failure.type == kind
    assert message is None or bad.failure.message == message


def test_invalid_utf8_is_reported_with_its_offset(tmp_path):
    (whole,) = records(b"caf\xe9!", InputFormat.WHOLE, tmp_path)
    assert whole.failure == Failure("invalid_utf8", "not UTF-8: byte 0xe9 at offset 3")
    good, bad = records(b"fine\nx\xff\n", InputFormat.LINES, tmp_path)
    assert good.failure is None
    assert bad.failure == Failure("invalid_utf8", "not UTF-8: byte 0xff at offset 1")
    assert bad.fields == {"line": 2}


def test_csv_rows_that_do_not_fit_the_header(tmp_path):
    short, long, broken, good = records(b"text,n\na\nb,1,2\nc\xff,3\nd,4\n", InputFormat.CSV, tmp_path)
    assert short.failure.message == "expected 2 fields, got 1"
    assert long.failure.message == "expected 2 fields, got 3; extra fields: 2"
    assert broken.failure.type == "invalid_utf8"
    assert good.fields == {"text": "d", "n": "4"}


def test_several_files_keep_their_names_and_line_numbers(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"{name}1\n{name}2\n")
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    found = [(r.fields["text"], r.file, r.line) for r in read_records(open_inputs([], paths), InputFormat.LINES)]
    assert found == [("a1", paths[0], 1), ("a2", paths[0], 2), ("b1", paths[1], 1), ("b2", paths[1], 2)]


def test_text_and_files_make_one_prompt_files_first(tmp_path):
    (tmp_path / "diff").write_text("+ a line\n")
    (record,) = read_prompts(["Describe this change"], [str(tmp_path / "diff")], InputFormat.WHOLE)
    assert record.fields == {"text": "+ a line\n\nDescribe this change"}
    assert record.file == str(tmp_path / "diff")
    with pytest.raises(UsageError, match="cannot be combined with --lines"):
        read_prompts(["Describe"], [str(tmp_path / "diff")], InputFormat.LINES)


def test_missing_input_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        open_inputs([], [str(tmp_path / "missing")])
    with pytest.raises(UsageError, match="is a directory"):
        open_inputs([], [str(tmp_path)])


def test_a_long_line_is_a_line(tmp_path):
    text = "x" * 10_000_000
    (record,) = records(json.dumps({"text": text}).encode(), InputFormat.JSONL, tmp_path)
    assert record.fields == {"text": text}
