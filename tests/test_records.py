"""Arguments, files and stdin in every form, and what is wrong with some of them."""

import io
import json
import os
import re

import pytest

from llmcli.errors import UsageError
from llmcli.io.decoding import Dialect
from llmcli.io.formats import READERS, InputFormat
from llmcli.io.records import open_inputs, read_prompts, read_records
from llmcli.job import Failure

ICONV = ": use --encoding, or convert it to UTF-8 with iconv"
LONG_INTEGER = "Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits"
DATA = {
    InputFormat.WHOLE: (b"one\ntwo\n", [{"text": "one\ntwo"}]),
    InputFormat.LINES: (b"one\n\ntwo\r\nthree", [{"text": "one"}, {"text": ""}, {"text": "two"}, {"text": "three"}]),
    InputFormat.NULL: (b"one\n\0\0two", [{"text": "one\n"}, {"text": ""}, {"text": "two"}]),
    InputFormat.JSONL: (b'{"text": "one", "n": 1}\n{"text": "\xc3\xa9"}\n', [{"text": "one", "n": 1}, {"text": "é"}]),
    InputFormat.CSV: (
        b'text,n\n"one\ntwo",1\nthree,2\n',
        [{"text": "one\ntwo", "n": "1"}, {"text": "three", "n": "2"}],
    ),
    InputFormat.OPENAI_BATCH: (b'{"custom_id": "a"}\n{"n": 1}', [{"custom_id": "a"}, {"n": 1}]),
}


def records(data: bytes, form: InputFormat, tmp_path) -> list:
    path = tmp_path / "input"
    path.write_bytes(data)
    return list(read_records(open_inputs([], [str(path)]), form))


@pytest.mark.parametrize("form", READERS)
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


@pytest.mark.parametrize("form", READERS)
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
        (b'{"text": "a\xff"}', "invalid_utf8", f"cannot decode byte 0xff at offset 11{ICONV}"),
        (b'{"a":' * 100_000, "invalid_json", "not JSON: nested more than 500 levels deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid_json", f"not JSON: {LONG_INTEGER}"),
    ],
)
def test_a_bad_line_fails_alone(line, kind, message, tmp_path):
    good = b'{"text": "good"}\n'
    before, bad, after = records(good + line + b"\n" + good, InputFormat.JSONL, tmp_path)
    assert before.fields == after.fields == {"text": "good"}
    assert bad.fields == {"line": 2}
    assert bad.failure == Failure(kind, message)


def test_invalid_utf8_is_reported_with_its_offset(tmp_path):
    (whole,) = records(b"caf\xe9!", InputFormat.WHOLE, tmp_path)
    assert whole.failure == Failure("invalid_utf8", f"cannot decode byte 0xe9 at offset 3{ICONV}")
    good, bad = records(b"fine\nx\xff\n", InputFormat.LINES, tmp_path)
    assert good.failure is None
    assert bad.failure == Failure("invalid_utf8", f"cannot decode byte 0xff at offset 1{ICONV}")
    assert bad.fields == {"line": 2}


def test_csv_rows_that_do_not_fit_the_header(tmp_path):
    short, long, broken, good = records(b"text,n\na\nb,1,2\nc\xff,3\nd,4\n", InputFormat.CSV, tmp_path)
    assert short.failure.message == "expected 2 fields, got 1"
    assert long.failure.message == "expected 2 fields, got 3; extra fields: 2"
    assert broken.failure.type == "invalid_utf8"
    assert good.fields == {"text": "d", "n": "4"}


def test_open_quote_is_reported_with_its_line(tmp_path):
    good, rest = records(b'a,b\n1,2\n1,"2\n3,4\n5,6\n', InputFormat.CSV, tmp_path)
    assert good.failure is None
    assert rest.failure.message == "not CSV: unexpected end of data in the row that begins on line 3"


def test_messages_of_csv_have_no_advice_for_programmers(tmp_path):
    (row,) = records(b"a,b\n1,2\r3,4\r", InputFormat.CSV, tmp_path)
    assert row.failure.message == "not CSV: new-line character seen in unquoted field"


def test_several_files_keep_their_names_and_line_numbers(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"{name}1\n{name}2\n")
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    found = [(r.fields["text"], r.file, r.line) for r in read_records(open_inputs([], paths), InputFormat.LINES)]
    assert found == [("a1", paths[0], 1), ("a2", paths[0], 2), ("b1", paths[1], 1), ("b2", paths[1], 2)]


def test_text_and_files_make_one_prompt_files_first(tmp_path):
    (tmp_path / "diff").write_text("+ a line\n")
    (record,) = read_prompts(["Describe this change"], [str(tmp_path / "diff")], InputFormat.WHOLE, Dialect())
    assert record.fields == {"text": "+ a line\n\nDescribe this change"}
    assert record.file == str(tmp_path / "diff")
    with pytest.raises(UsageError, match="cannot be combined with --lines"):
        read_prompts(["Describe"], [str(tmp_path / "diff")], InputFormat.LINES, Dialect())


def test_missing_input_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        open_inputs([], [str(tmp_path / "missing")])
    with pytest.raises(UsageError, match="is a directory"):
        open_inputs([], [str(tmp_path)])


def test_a_long_line_is_a_line(tmp_path):
    text = "x" * 10_000_000
    (record,) = records(json.dumps({"text": text}).encode(), InputFormat.JSONL, tmp_path)
    assert record.fields == {"text": text}


@pytest.mark.parametrize(
    ("data", "fields"),
    [
        (b'{"text": "one", "text": "two"}', {"line": 1}),
        (b'{"id": 1, "meta": {"a": 1, "b": {"c": 1, "c": 1}}}', {"line": 1}),
        (b'{"id": 1, "list": [{"": 1, "": null}]}', {"line": 1}),
        (rb'{"caf\u00e9": 1, "caf' + "é".encode() + b'": 2}', {"line": 1}),
    ],
)
def test_duplicate_keys_fail_their_record(data, fields, tmp_path):
    bad, good = records(data + b'\n{"text": "a"}\n', InputFormat.JSONL, tmp_path)
    assert (bad.fields, bad.failure.type) == (fields, "invalid_json")
    assert bad.failure.message.startswith("duplicate key ")
    assert good.failure is None


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"id,text,text", "duplicate column 'text'"),
        (b"a,,b,", "duplicate column ''"),
        (b'"x ""y""",n,"x ""y"""', "duplicate column 'x \"y\"'"),
        (b"id;text", "expected commas between columns, got ';'"),
        (b"id\ttext", r"expected commas between columns, got '\\t'"),
        (b"id|text|note", r"expected commas between columns, got '\|'"),
        (b'"id";"text"', "expected commas between columns, got ';'"),
        (b'\xef\xbb\xbf"id"\t"text"', r"expected commas between columns, got '\\t'"),
        (b"id,pr\xe9nom", "cannot decode byte 0xe9 at offset 5, line 1"),
        (b'"id\n",pr\xe9nom', "cannot decode byte 0xe9 at offset 5, line 2"),
        (b'id,"text', "invalid header: not CSV"),
        (b"id,text\r1,a\r", "invalid header: not CSV: new-line character seen in unquoted field$"),
    ],
)
def test_csv_header_that_cannot_be_read_is_refused(header, message, tmp_path):
    with pytest.raises(UsageError, match=f"{tmp_path / 'input'}: .*{message}"):
        records(header + b"\n1,2\n", InputFormat.CSV, tmp_path)


def test_quoted_name_with_a_semicolon_is_one_column(tmp_path):
    (record,) = records(b'"Name; title"\nx\n', InputFormat.CSV, tmp_path)
    assert record.fields == {"Name; title": "x"}


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n \n\r\n\xef\xbb\xbf\n", "\n\u3000\n".encode()])
def test_blank_lines_at_the_end_of_json_are_no_records(end, tmp_path):
    first, blank, last = records(b'{"a": 1}\n\n{"a": 2}' + end, InputFormat.JSONL, tmp_path)
    assert (first.fields, last.fields, last.line) == ({"a": 1}, {"a": 2}, 3)
    assert (blank.fields, blank.line, blank.failure) == ({"line": 2}, 2, Failure("invalid_json", "blank line"))
    assert records(end, InputFormat.JSONL, tmp_path) == []


FOREIGN = [
    ("x,text\n1,é\n".encode("utf-16"), "UTF-16", "--encoding utf-16,"),
    (b"\xfe\xff" + "x,text\n".encode("utf-16-be"), "UTF-16", "--encoding utf-16,"),
    ("x,text\n".encode("utf-16-le"), "UTF-16", "--encoding utf-16-le,"),
    ("x,text\n".encode("utf-16-be"), "UTF-16", "--encoding utf-16-be,"),
    ("x,text\n".encode("utf-32"), "UTF-32", "--encoding utf-32,"),
    ("x,text\n".encode("utf-32-le"), "UTF-32", "--encoding utf-32-le,"),
    ("x,text\n".encode("utf-32-be"), "UTF-32", "--encoding utf-32-be,"),
    (b"PK\x03\x04\x14\0", "a zip archive", "unzip -p"),
    (b"\xd0\xcf\x11\xe0\xa1", "an Office document", "as CSV"),
    (b"PAR1\x15\x04\x15", "Parquet or Arrow", "--parquet"),
    (b"ARROW1\0\0\xff", "Parquet or Arrow", "--parquet"),
]


@pytest.mark.parametrize(("data", "kind", "advice"), FOREIGN)
@pytest.mark.parametrize("form", [form for form in InputFormat if form is not InputFormat.PARQUET])
def test_foreign_file_is_named_with_what_reads_it(form, data, kind, advice, tmp_path):
    if form is InputFormat.WHOLE:
        (record,) = records(data, form, tmp_path)
        assert record.failure.message.startswith(f"expected UTF-8, got {kind}: ")
        assert advice in record.failure.message
    elif form is not InputFormat.NULL or b"\0" not in data[:8]:
        with pytest.raises(UsageError, match=f"input: expected UTF-8, got {kind}") as caught:
            records(data, form, tmp_path)
        assert advice in caught.value.hint


def test_nul_bytes_are_text(tmp_path):
    assert [r.fields for r in records(b"a\0b\0c", InputFormat.NULL, tmp_path)] == [{"text": x} for x in "abc"]
    assert records(b"ab\0c\n", InputFormat.LINES, tmp_path)[0].fields == {"text": "ab\0c"}
    assert records(b"t\na\0b\n", InputFormat.CSV, tmp_path)[0].fields == {"t": "a\0b"}


def test_undecodable_fields_are_left_out_and_others_stay(tmp_path):
    data = b'{"id": 1, "text": "caf\xe9", "b\xff": 1, "by": {"x": ["\xff"]}, "n": [1]}\n'
    (record,) = records(data, InputFormat.JSONL, tmp_path)
    assert record.fields == {"line": 1, "id": 1, "n": [1]}
    assert record.failure == Failure("invalid_utf8", f"cannot decode byte 0xe9 at offset 22{ICONV}")
    bad, extra, good = records(b"id,size\n21,\xdcber\n22,x,\xff\n23,M\n", InputFormat.CSV, tmp_path)
    assert bad.fields == {"id": "21", "size": None}
    assert bad.failure == Failure("invalid_utf8", f"column 'size': cannot decode byte 0xdc at offset 0{ICONV}")
    assert extra.failure.message == r"expected 2 fields, got 3; extra fields: \xff"
    assert good.fields == {"id": "23", "size": "M"}


def test_undecodable_file_is_reported_with_its_line(tmp_path):
    (record,) = records("é\nb\n".encode() + b"c\xe9\n", InputFormat.WHOLE, tmp_path)
    assert record.failure.message == f"cannot decode byte 0xe9 at offset 6, line 3{ICONV}"


def test_long_nul_terminated_text_is_searched_once():
    searched = 0

    class Chunk(bytes):
        def split(self, *args):
            nonlocal searched
            searched += len(self)
            return super().split(*args)

    class Chunks(io.BytesIO):
        def read1(self, size):
            return Chunk(super().read1(1 << 10))

    text = b"x" * (1 << 20)
    first, second = READERS[InputFormat.NULL](Chunks(text + b"\0ab\0"), None)
    assert (len(first.fields["text"]), second.fields) == (len(text), {"text": "ab"})
    assert searched == len(text) + 4


@pytest.mark.parametrize("option", ["--lines", "--jsonl", "--csv", "--json"])
def test_no_output_has_surrogates(llmcli, tiny, option, tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9")
    path.write_bytes(b'{"text": "\xe9"}\n{"id": "\xe9", "text": "a"}\nid,\xe9\nb\xff\n')
    if option == "--csv":
        path.write_bytes(b"text,id\n\xe9,1\na,\xe9\nb,2,\xe9\n")
    ran = llmcli("generate", "-m", tiny, "--max-new-tokens", 1, option, "-f", path)
    assert ran.exit_status == (1 if option == "--json" else 3)
    assert not re.search(r"\\ud[89a-f]", ran.stdout + ran.stderr, re.IGNORECASE), ran
    if "json" in option:
        assert {record["file"] for record in ran.records} == {str(tmp_path / r"caf\xe9")}


def test_surrogate_escapes_come_out_as_they_came_in(llmcli, tiny):
    data = rb'{"text": "a", "by": "\ud83d", "\udc00": ["\\\udfff"]}' + b"\n"
    ran = llmcli("generate", "-m", tiny, "--max-new-tokens", 1, "--jsonl", stdin=data)
    assert ran.exit_status == 0
    assert ran.records[0].items() >= json.loads(data).items()
    ran = llmcli("generate", "-m", tiny, "--jsonl", stdin=rb'{"\ud800": "a"}')
    assert ran.records[0]["error"]["message"] == r"missing field 'text': available fields: \ud800"
