"""Text formats of the real world: delimiters, encodings and compressed files, in and out."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from llmcli.io import compression
from llmcli.io.decoding import open_text
from llmcli.io.formats import InputFormat
from llmcli.io.records import open_inputs, read_records

zstd = compression.find_codec(b"\x28\xb5\x2f\xfd")
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress}
DECOMPRESS = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress, ".zst": zstd.decompress}
BOM = "\ufeff"


@pytest.fixture
def generate(llmcli, tiny):
    def run(*args, stdin=None):
        return llmcli("generate", "-m", tiny, "--max-new-tokens", 1, "--temperature", 0, *args, stdin=stdin)

    run.main = llmcli
    return run


def rows(ran, delimiter=","):
    return list(csv.DictReader(io.StringIO(ran.stdout.removeprefix(BOM), newline=""), delimiter=delimiter))


LONG = "x" * 3_000_000
GOOD = {  # files, options, and the texts that are read
    "a byte order mark and CRLF": (b"\xef\xbb\xbftext,id\r\nfox,1\r\n", [], ["fox"]),
    "quotes, commas and line ends": (b'id,text\n1,"a ""fox"", or\r\ntwo"\n', [], ['a "fox", or\r\ntwo']),
    "semicolons": (b'id;text\n1;"a;b"\n2;3,5\n', ["--delimiter", ";"], ["a;b", "3,5"]),
    "tabs": (b"id\ttext\n1\ta\n", ["--delimiter", "\\t"], ["a"]),
    "a delimiter beyond ASCII": ("id¦text\n1¦a\n".encode(), ["--delimiter", "¦"], ["a"]),
    "a first line that sets the delimiter": (b"sep=;\r\nid;text\r\n1;a\r\n", [], ["a"]),
    "that line and the option": (b'\xef\xbb\xbf"sep=\t"\nid\ttext\n1\ta\n', ["--delimiter", "tab"], ["a"]),
    "a column without a name": (b",text\n0,a\n", [], ["a"]),
    "NUL": (b"text\na\0b\n", [], ["a\0b"]),
    "line ends of an old Mac": (b'id,text\r1,"a\rb"\r2,c', [], ["a\rb", "c"]),
    "blank lines": (b"\n\r\n\nid,text\n\n1,a\n\n\n2,b\n\n", [], ["a", "b"]),
    "other line separators": ("id,text\n1,a\x0b\x0c\x1c\x85\u2028b\n".encode(), [], ["a\x0b\x0c\x1c\x85\u2028b"]),
    "a header of two lines": (b'"i\nd",text\n1,a\n', [], ["a"]),
    "a thousand columns": (",".join([*map(str, range(999)), "text"]).encode() + b"\n" + b"," * 999 + b"a\n", [], ["a"]),
    "formulas": (b"text\n=1+1\n@SUM(A1)\n", [], ["=1+1", "@SUM(A1)"]),
    "semicolons where commas are right": (b"text;\nfox\n", ["--delimiter", ",", "--field", "text;"], None),
    "Unicode of Excel": ("id\ttext\r\n1\té\r\n".encode("utf-16"), ["--delimiter=tab", "--encoding=utf-16"], ["é"]),
    "Windows": ("id;text\r\n1;é€\r\n".encode("cp1252"), ["--delimiter", ";", "--encoding", "cp1252"], ["é€"]),
    "gzip": (gzip.compress(b"id,text\n1,a\n") + gzip.compress(b"2,b\n"), [], ["a", "b"]),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_odd_csv_is_read(generate, name):
    data, options, texts = GOOD[name]
    ran = generate("--csv", *options, stdin=data)
    assert (ran.stderr, ran.exit_status) == ("", 0)
    delimiter = {"a first": ";", "that li": "\t"}.get(name[:7], ",")
    if "--delimiter" in options:
        delimiter = {"\\t": "\t", "tab": "\t"}.get(options[1], options[1])
    elif options:
        delimiter = "\t"
    found = rows(ran, delimiter)
    assert all(row["generated_text"] and not row["error"] for row in found)
    assert texts is None or [row["text"] for row in found] == texts


FAILING = {  # files, and the types of the errors of their rows
    "ragged rows": (b"id,text\n1\n2,a,b\n3,c\n", ["invalid_csv", "invalid_csv", None]),
    "an open quote": (b'id,text\n1,a\n2,"b\n3,c\n', [None, "invalid_csv"]),
    "text after a quote": (b'id,text\n1,"a"b\n2,c\n', ["invalid_csv", None]),
    "a lone CR": (b"id,text\n1,a\rb\n2,c\n", ["invalid_csv", None]),
    "bytes of another encoding": (b"id,text\n1,\xe9\n2,c\n", ["invalid_utf8", None]),
    "a huge cell": (f"id,text\n1,{LONG}\n2,c\n".encode(), ["context_length_exceeded", None]),
}


@pytest.mark.parametrize("name", FAILING)
def test_bad_row_fails_alone(generate, name):
    data, types = FAILING[name]
    ran = generate("--csv", stdin=data)
    assert [json.loads(row["error"] or "{}").get("type") for row in rows(ran)] == types
    assert ran.exit_status == 3


REFUSED = {  # files, options, the error and its hint
    "semicolons": (b"id;text\n1;a\n", [], "expected commas between columns, got ';'", "use --delimiter ';'"),
    "semicolons, and a comma in quotes": (b'id;"a, b";text\n1;2;a\n', [], "expected commas", "use --delimiter ';'"),
    "tabs": (b"\nid\ttext\n1\ta\n", [], r"expected commas between columns, got '\t'", r"use --delimiter '\t'"),
    "two delimiters": (
        b"sep=;\nid;text\n",
        ["--delimiter", ","],
        "line 1 sets the delimiter ';', --delimiter sets ','",
        "",
    ),
    "duplicate columns": (b"text,text\na,b\n", [], "duplicate column 'text'", ""),
    "empty columns": (b"text,,\na,,\n", [], "duplicate column ''", ""),
    "a workbook": (b"PK\x03\x04\x14\0", [], "expected UTF-8, got a zip archive", "save the spreadsheet as CSV"),
    "Unicode": ("id,text\n".encode("utf-16"), [], "expected UTF-8, got UTF-16", "use --encoding utf-16"),
    "another encoding": (b"id,t\xe9xt\n1,a\n", [], "cannot decode byte 0xe9", "use --encoding"),
    "no such column": (b"id,texte\n1,a\n", [], "missing field 'text' in all records", ""),
    "a damaged file": (gzip.compress(b"id,text\n1,a\n")[:12], [], "cannot decompress: ", ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unreadable_csv_is_one_error_with_a_hint(generate, name):
    data, options, message, hint = REFUSED[name]
    ran = generate("--csv", *options, stdin=data)
    error, *hints = ran.stderr.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert hint in "".join(hints)
    assert (ran.exit_status, len(hints) < 2) == (2, True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--delimiter", ";"], "--delimiter requires --csv"),
        (["--csv", "--delimiter", "||"], "--delimiter: expected one character or tab, got '||'"),
        (["--csv", "--delimiter", ""], "--delimiter: expected one character or tab, got ''"),
        (["--csv", "--delimiter", '"'], "--delimiter: expected one character or tab, got '\"'"),
        (["--encoding", "cp1525"], "unknown encoding 'cp1525'"),
        (["--encoding", "base64"], "unknown encoding 'base64'"),
        (["--encoding", "a\0b"], "unknown encoding"),
        (["--encoding", "idna"], "unknown encoding 'idna'"),
    ],
)
def test_invalid_delimiter_or_encoding_is_refused(llmcli, args, message):
    ran = llmcli("generate", "-m", "missing", *args, stdin=b"")
    assert (ran.exit_status, message in ran.stderr) == (2, True), ran.stderr


@pytest.mark.parametrize(
    ("data", "options", "start"),
    [
        (b"id,text\n1,a\n", [], "id,"),
        (b"\xef\xbb\xbfid,text\n1,a\n", [], f"{BOM}id,"),
        (b"id,text\n1,a\n", ["--encoding", "utf-8-sig"], f"{BOM}id,"),
        ("id;text\n1;é\n".encode("cp1252"), ["--encoding", "cp1252", "--delimiter", ";"], f"{BOM}id;"),
        (b"sep=;\nid;text\n1;a\n", [], "id;"),
        (b"id,text\n", [], "id,text,generated_text,"),
        (b"", [], ""),
    ],
)
def test_csv_output_is_written_as_the_input_is(generate, data, options, start, tmp_path):
    path = tmp_path / "out.csv"
    args = ("--csv", *options, "--output", path, "--resume")
    ran = generate(*args, stdin=data)
    written = path.read_text(encoding="utf-8")
    assert (written.startswith(start), written.count(BOM), ran.exit_status) == (True, start.count(BOM), 0)
    assert bool(written) is bool(start)
    assert generate(*args, stdin=data).stderr == f"note: '{path}' is already complete\n" * bool(written)
    assert path.read_text(encoding="utf-8") == written


@pytest.mark.parametrize("flag", [None, "--lines", "--null", "--jsonl"])
def test_encoding_applies_to_every_text_format(generate, flag, tmp_path):
    text = "Größe €" if flag is None else '{"text": "Größe €"}\n{"text": "ć"}\n'
    (tmp_path / "in").write_bytes(text.replace("\n", "\0" if flag == "--null" else "\n").encode("utf-16-le"))
    ran = generate(*filter(None, [flag]), "--json", "--encoding", "utf-16le", "-f", tmp_path / "in")
    assert (ran.stderr, ran.exit_status) == ("", 0)
    texts = [text, ""] if flag is None else ["Größe €", "ć"] if flag == "--jsonl" else text.splitlines()
    assert [record["text"] for record in ran.records] == texts[: 1 if flag is None else 2]


def test_undecodable_line_fails_alone(generate):
    for encoding, data in (
        ("cp1252", b"caf\xe9\nb\x81d\xc3\nc\n"),
        ("shift_jis", "日\n".encode("shift_jis") + b"\x85\xff\n" + b"c\n"),
        ("ascii", b"a\n\xc3\nc\n"),
        ("utf-16-be", "a\n".encode("utf-16-be") + b"\xdc\0\0\n" + "c\n".encode("utf-16-be")),
    ):
        ran = generate("--lines", "--json", "--encoding", encoding, stdin=data)
        first, bad, last = ran.records
        assert (bad["line"], bad["error"]["type"], last["text"], ran.exit_status) == (2, "invalid_utf8", "c", 3)
        assert "error" not in first
    ran = generate("--lines", "--json", "--encoding", "cp1252", stdin=b"\x81\n")
    assert ran.records[0]["error"]["message"].startswith("cannot decode byte 0x81 at offset 0")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("id,text\n1,Der Käse schmeckt süß\n2,Une journée très agréable à l’été\n", "cp1252"),
        ("text\ncafé\n", "cp1252"),
        ("text\nZażółć gęślą jaźń, proszę państwa\n", "cp1250"),
        ("text\nПривет, как дела? Сегодня хорошая погода\n", "cp1251"),
        ("text\n今日は天気がいいですね。私は学生です。\n", "cp932"),
        ("text\n今天天气很好,我们去公园玩吧。\n", "gb18030"),
        ("id,text\n1,é\n", "utf-16"),
        ("id,text\n1,é\n", "utf-16-le"),
        ("id,text\n1,é\n", "utf-8"),
        ("text\n" + "the fox\n" * 100_000 + "Größe\n", "cp1252"),
    ],
)
def test_auto_finds_the_encoding_and_names_it(text, encoding, tmp_path, capsys):
    (tmp_path / "in").write_bytes(text.encode(encoding))
    with (tmp_path / "in").open("rb") as file:
        assert open_text(file, "auto", "in").read().decode().removeprefix(BOM) == text
    assert capsys.readouterr().err == f"note: in: --encoding auto chose {encoding}\n"


def test_auto_keeps_utf8_with_a_damaged_byte(generate, tmp_path):
    lines = [f"é{i}".encode() for i in range(50)]
    lines[20] += b"\xff"
    ran = generate("--lines", "--json", "--encoding", "auto", stdin=b"\n".join(lines))
    assert [i for i, record in enumerate(ran.records) if "error" in record] == [20]
    assert ran.stderr.startswith("note: stdin: --encoding auto chose utf-8\n")
    assert generate("--lines", "--encoding", "auto", stdin=b"the fox\n").stderr == ""


def test_auto_does_not_depend_on_the_chunks_of_a_pipe():
    data = b"".join(f"{i},{'Die Größe der Käufer' if i % 3 else 'a'}\n".encode("cp1252") for i in range(30_000))

    class Pipe(io.BytesIO):
        def read1(self, size=-1):
            return super().read1(random.randint(1, 5000))

        def readinto(self, buffer):
            return super().readinto(buffer[: random.randint(1, 5000)])

    assert open_text(Pipe(data), "auto", None).read() == data.decode("cp1252").encode()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_input_is_read_from_files_and_stdin(generate, suffix, tmp_path):
    data = COMPRESS[suffix](b'{"text": "the fox"}\n') + COMPRESS[suffix](b"") + COMPRESS[suffix](b'{"text": "dog"}\n')
    (tmp_path / "in").write_bytes(data)
    for args, stdin in ((("-f", tmp_path / "in"), None), ((), data)):
        ran = generate("--jsonl", *args, stdin=stdin)
        assert ([record["text"] for record in ran.records], ran.exit_status) == (["the fox", "dog"], 0)
    ran = generate("--lines", "--json", "--encoding", "auto", stdin=COMPRESS[suffix]("Größe\n".encode("cp1252")))
    assert ran.records[0]["text"] == "Größe"
    damaged = COMPRESS[suffix](b"the fox\ndog\n") + COMPRESS[suffix](b"fox\n" * 9)[:-9]
    first, second, *_, last = generate("--lines", "--json", stdin=damaged).records
    assert (first["text"], second["text"], last["error"]["message"][:17]) == ("the fox", "dog", "cannot decompress")
    (tmp_path / "in").write_bytes(data[:-3])
    ran = generate("--json", "-f", tmp_path / "in")
    assert ran.records[0]["error"]["message"].startswith("cannot decompress: ")


def test_progress_of_compressed_input_is_known_until_it_is_read(tmp_path):
    path = tmp_path / "in.gz"
    path.write_bytes(gzip.compress(random.Random(1).randbytes(400_000).hex().encode().replace(b"0", b"\n")))
    shares = [record.input_fraction for record in read_records(open_inputs([], [str(path)]), InputFormat.LINES)]
    known = [share for share in shares if share is not None]
    assert known == sorted(known)
    assert (len(known) > len(shares) / 2, max(known) < 1) == (True, True)


def test_zstandard_without_its_package_is_an_error(llmcli, monkeypatch, tmp_path):
    (tmp_path / "in").write_bytes(zstd.compress(b"the fox\n"))
    for name in ("compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    out = tmp_path / "out.zst"
    for args in (["--lines", "-f", tmp_path / "in"], ["--lines", "--output", out, "the fox"], ["--output", out, "fox"]):
        ran = llmcli("generate", "-m", "missing", *args)
        assert ran.stderr == (
            'error: Zstandard requires the package backports.zstd\nhint: pip install "llmcli[zstd]"\n'
        )
        assert ran.exit_status == 2
    assert not out.exists()


@pytest.fixture
def lines(many_lines, monkeypatch):
    monkeypatch.setattr(compression, "MEMBER_BYTES", 2000)
    return many_lines(100)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_output_cut_anywhere_is_completed(generate, suffix, lines, tmp_path):
    plain, path = tmp_path / "plain.jsonl", tmp_path / f"out.jsonl{suffix}"
    assert generate("--jsonl", "-f", lines, "--output", plain).exit_status == 3
    args = ("--jsonl", "-f", lines, "--resume", "--output", path)
    assert generate(*args).exit_status == 3
    whole, state = path.read_bytes(), tmp_path / f"out.jsonl{suffix}.state"
    log = state.read_bytes()
    assert DECOMPRESS[suffix](whole) == plain.read_bytes()
    entries = [(len(whole), 25 * count) for count in (1, 7, 20, 33)]
    for cut, cut_log in ((0, 0), (1, 0), (len(whole) // 2, 0), (len(whole) - 1, 25), *entries):
        path.write_bytes(whole[:cut])
        state.write_bytes(log[: len(log) - cut_log])
        ran = generate(*args)
        assert ran.stderr.endswith("error: 2 of 100 records failed\n")
        assert DECOMPRESS[suffix](path.read_bytes()) == plain.read_bytes()
    assert generate(*args).stderr.startswith(f"note: '{path}' is already complete\n")


@pytest.mark.parametrize("name", ["out.csv", "out.csv.zst"])
def test_cut_csv_is_continued_with_its_mark_and_delimiter(generate, name, tmp_path, monkeypatch):
    monkeypatch.setattr(compression, "MEMBER_BYTES", 500)
    data = "\ufeffsep=;\nid;text\n".encode() + b"".join(b"%d;the fox\n" % i for i in range(40))
    args, path = ("--csv", "--resume", "--output", tmp_path / name), tmp_path / name
    assert generate(*args, stdin=data).exit_status == 0
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert generate(*args, stdin=data).exit_status == 0
    text = (zstd.decompress if name.endswith("t") else bytes)(path.read_bytes())
    assert text == (zstd.decompress if name.endswith("t") else bytes)(whole)
    assert text.startswith(b"\xef\xbb\xbfid;text;generated_text;")
    assert text.count(b"\n") == 41


def test_compressed_output_in_every_format(generate, lines, tmp_path):
    table, empty = ["--csv", "text\nthe fox\na dog\n"], ["--lines", "-f", "/dev/null"]
    for args in (["--lines", "-f", lines], table, empty, ["the fox"]):
        plain, path = tmp_path / "plain", tmp_path / "out.gz"
        assert generate(*args, "--output", plain).exit_status == generate(*args, "--output", path).exit_status == 0
        assert gzip.decompress(path.read_bytes()) == plain.read_bytes()
        assert sorted(os.listdir(tmp_path))[-2:] == ["out.gz", "plain"]
        plain.unlink()
        path.unlink()


def test_compressed_shards_are_merged(generate, tmp_path):
    (tmp_path / "in.csv").write_bytes(b"\xef\xbb\xbfid;text\n" + b"".join(b'%d;"the\nfox"\n' % i for i in range(9)))
    args = ("--csv", "--delimiter", ";", "-f", tmp_path / "in.csv", "--resume", "--dtype", "float32")
    whole, paths = generate(*args[:-3], *args[-2:]), [tmp_path / f"{i}.csv.gz" for i in range(2)]
    for i, path in enumerate(paths):
        assert generate(*args, "--output", path, "--shard", f"{i}/2").exit_status == 0
    assert generate.main("merge", *paths).stdout == whole.stdout
    for path in paths:
        (tmp_path / f"{path.name}.state").unlink()
    assert generate.main("merge", *paths).stdout == whole.stdout


def test_retry_of_compressed_output_is_refused_with_a_way(generate, lines, tmp_path):
    path, new = tmp_path / "out.gz", tmp_path / "new.jsonl"
    args = ("--jsonl", "-f", lines, "--resume", "--output", path)
    generate(*args)
    ran = generate(*args, "--retry-errors")
    assert ran.exit_status == 2
    assert ran.stderr.splitlines()[1] == f"hint: run them into a new file: -f '{path}' --retry-errors --output NEW"
    ran = generate("--jsonl", "-f", path, "--retry-errors", "--output", new)
    assert ran.stderr.endswith("error: 2 of 100 records failed\n")


def test_resume_refuses_another_encoding_or_delimiter(generate, tmp_path):
    (tmp_path / "in.csv").write_text("text\nthe fox\n")
    args = ("--csv", "-f", tmp_path / "in.csv", "--resume", "--output", tmp_path / "out")
    assert generate(*args).exit_status == 0
    for option in (["--encoding", "cp1252"], ["--delimiter", ";"]):
        ran = generate(*args, *option)
        assert (ran.exit_status, "has changed since it was started" in ran.stderr) == (2, True)


PROGRAM = """
import sys
from llmcli.io import compression
compression.MEMBER_INTERVAL_S = 0.05
from llmcli.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_run_with_compressed_output_is_completed(tiny, many_lines, tmp_path):
    choose, path, plain = random.Random(1), tmp_path / "out.csv.gz", tmp_path / "plain.csv"
    records = [json.loads(line) for line in many_lines(400).read_text().splitlines()]
    with (tmp_path / "in.csv").open("w") as file:
        csv.writer(file).writerows([("id", "text"), *((record["id"], record.get("text", "")) for record in records)])
    program = [sys.executable, "-c", PROGRAM, "generate", "-m", tiny, "--csv", "-f", tmp_path / "in.csv", "--resume",
               "--temperature", 0, "--max-new-tokens", 8, "--dtype", "float32", "--batch-size", 4,
               "--output"]  # fmt: skip
    program = [str(word) for word in program]
    subprocess.run([*program, plain], check=True, capture_output=True)
    size = 0
    for _ in range(3):
        running = subprocess.Popen([*program, path], stderr=subprocess.DEVNULL)
        while running.poll() is None and (not path.exists() or path.stat().st_size <= size):
            time.sleep(0.001)
        time.sleep(choose.random() / 5)
        running.send_signal(signal.SIGKILL)
        running.wait()
        size = path.stat().st_size
    subprocess.run([*program, path], check=True, capture_output=True)
    assert gzip.decompress(path.read_bytes()) == plain.read_bytes()
