"""Random records through every command: no traceback, one result per record, the right exit code, output that parses.

LLMCLI_FUZZ_RECORDS=10000 sets the number of records of each command; LLMCLI_FUZZ_SEED another seed.
"""

import csv
import io
import json
import os
import random
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
GOLDEN = Path(__file__).parent / "golden"
RECORDS = int(os.environ.get("LLMCLI_FUZZ_RECORDS", "300"))
SEED = int(os.environ.get("LLMCLI_FUZZ_SEED", "15"))
GREEDY = ("--temperature", 0, "--max-new-tokens", 1)
BEAMS = ("--num-beams", 1, "--max-new-tokens", 2)
COMMANDS = {
    "generate": ("-m", "tiny", *GREEDY),
    "generate --prompt": ("-m", "tiny", *GREEDY, "--prompt", "{text}: {id}"),
    "chat": ("-m", "chatty", *GREEDY),
    "translate": ("-m", GOLDEN / "marian", "--to", "fr", *BEAMS),
    "translate to": ("-m", "base", "--from", "en", "--to", "fr", *GREEDY),
    "summarize": ("-m", GOLDEN / "bart", *BEAMS),
    "qa": ("-m", GOLDEN / "bert-qa"),
    "qa by prompt": ("-m", "base", *GREEDY),
    "embed": ("-m", "encoder"),
    "score": ("-m", "tiny"),
}
NAMES = (
    "id", "note", "model", "usage", "file", "error", "from", "to", "score", "answer", "answers", "line", "tokens",
    "generated_text", "messages", "embedding", "", " ", "é", "\u2028", "x" * 200,
)  # fmt: skip
RESULTS = {"error", "model", "usage", "from", "to", "score", "answer", "tokens", "generated_text", "embedding"}
PARTS = (
    "the quick brown fox", "Where is the clock? ", "The clock is in Paris. ", "Ünïcödé ", "你好，世界。", "مرحبا",
    "🦊", " ", "\t", "\u00a0", "\u3000", "\u200b", "\u202e", "\u2028", "\ufeff", "\r", "\x00", "\x1b[31m", "\x85",
    "\u0301", "`code` ", "# ", "- ", "| a | b |", "[x](http://y.z)", "<b>", "&amp;", "{text}", "{", "}}", "\\", "\\n",
    "'", '"', ",", ";", "<|user|>", "</s>", "<|im_end|>", "=1+1", "0", "-1e5", "null", "%s", "$(id)",
)  # fmt: skip
SCALARS = (None, True, 0, -1, 10**40, 0.1, 1e300, -0.0, "", "\ud800")
FAILED = {"type": "old", "message": "m"}


@pytest.fixture
def choose(request):
    return random.Random(f"{SEED} {request.node.name}")


@pytest.fixture
def run(llmcli, tiny, chatty, base, encoder):
    models = {"tiny": tiny, "chatty": chatty, "base": base, "encoder": encoder}

    def call(name, *args, stdin=None):
        options = [models.get(option, option) for option in COMMANDS[name]]
        ran = llmcli(name.split()[0], *options, *args, "--stats", stdin=stdin)
        for sign in ("Traceback", "this is a bug", "unexpected ", "internal_error"):
            assert sign not in ran.stderr + ran.stdout, [line for line in ran.stderr.split("\n") if sign in line][:3]
        return ran

    return call


def check_counts(ran, count, errors=None):
    """The statistics, the exit code and the errors in the output agree."""
    statistics = json.loads(ran.stderr.splitlines()[-1])
    failed = statistics["failed"]
    assert statistics["records"] == count
    assert ran.exit_status == (0 if not failed else 1 if count == 1 else 3)
    assert errors is None or errors == failed + statistics["carried_over"]


def is_error(value):
    return isinstance(value, dict) and value.keys() == {"type", "message"}


def random_text(choose):
    if choose.random() < 0.1:
        return "".join(chr(choose.choice((choose.randrange(256), choose.randrange(0xD800)))) for _ in range(9))
    return "".join(choose.choices(PARTS, k=choose.randint(0, 6)))


def random_bytes(choose):
    """Bytes without a line feed: random ones, or a text of which some are changed."""
    data = choose.randbytes(choose.randint(0, 30)) if choose.random() < 0.3 else random_text(choose).encode()
    return mutate(choose, data).replace(b"\n", b" ")


def mutate(choose, data, share=0.2):
    data = bytearray(data)
    while data and choose.random() < share:
        place = choose.randrange(len(data))
        data[place : place + choose.randint(0, 2)] = choose.randbytes(choose.randint(0, 2))
    return bytes(data)


def random_value(choose, depth=0):
    kind = choose.randrange(5 if depth > 2 else 7)
    if kind < 4:
        return random_text(choose)
    if kind == 4:
        return choose.choice([*SCALARS, FAILED])
    return random_object(choose, 2, depth) if kind == 5 else [random_value(choose, depth + 1) for _ in range(2)]


def random_object(choose, size, depth=0):
    return {choose.choice(NAMES): random_value(choose, depth + 1) for _ in range(choose.randrange(size + 1))}


def random_record(choose):
    fields = {name: random_text(choose) for name in ("text", "question", "context", "id")}
    if choose.random() < 0.1:
        fields[choose.choice(list(fields))] = random_value(choose)
    if choose.random() < 0.1:
        roles = ("user", "assistant", "system", "", 5)
        fields["messages"] = [{"role": choose.choice(roles), "content": random_text(choose)} for _ in range(2)]
    record = fields | random_object(choose, 4)
    if choose.random() < 0.05:
        del record[choose.choice(list(record))]
    if choose.random() < 0.05:
        record["error"] = FAILED
    return record


@pytest.mark.parametrize("name", COMMANDS)
def test_random_json_gives_a_result_per_line(run, choose, name):
    good = json.dumps({"text": "the fox", "question": "Who?", "context": "the fox", "id": 1}).encode()
    lines = [good]
    for _ in range(RECORDS // 3):
        line = json.dumps(random_record(choose), ensure_ascii=choose.random() < 0.5).encode("utf-8", "surrogatepass")
        lines.append(mutate(choose, line) if choose.random() < 0.3 else line)
        lines[-1] = lines[-1].replace(b"\n", b" ")
    ran = run(name, "--jsonl", stdin=b"\n".join([*lines, good]))
    assert ran.stdout.count("\n") == len(lines) + 1
    records = ran.records
    assert len(records) == len(lines) + 1
    check_counts(ran, len(records), sum(is_error(record.get("error")) for record in records))
    for line, record in zip(lines, records, strict=False):
        try:
            own = json.loads(line.decode(), object_pairs_hook=without_duplicates)
        except ValueError:
            own = None
        if not isinstance(own, dict):
            assert is_error(record["error"])
        elif is_error(own.get("error")):
            assert record == own
        else:
            kept = own.keys() - RESULTS
            assert [own[key] for key in kept] == [record[key] for key in kept]


def without_duplicates(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError
    return dict(pairs)


@pytest.mark.parametrize("name", COMMANDS)
def test_random_csv_gives_a_result_per_row(run, choose, name):
    others = [name for name in NAMES if name not in ("id", "messages")]
    columns = ["text", "question", "context", "id", *choose.sample(others, 5)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    text.write("the fox,Who?,the fox" + "," * (len(columns) - 3) + "\n")
    data = text.getvalue().encode()
    for _ in range(RECORDS // 3):
        text.seek(text.truncate(0))  # both are 0
        row = [random_text(choose) if choose.random() < 0.9 else json.dumps(FAILED) for _ in columns]
        writer.writerow(row[choose.random() < 0.05 :])
        data += mutate(choose, text.getvalue().encode(), share=0.1)
    rows = csv.reader((line.decode("utf-8", "surrogateescape") for line in io.BytesIO(data)), strict=True)
    expected = -1  # the header
    while True:
        try:
            expected += next(rows) != []
        except StopIteration:
            break
        except csv.Error:
            expected += 1
    ran = run(name, "--csv", stdin=data)
    header, *results = csv.reader(io.StringIO(ran.stdout, newline=""), strict=True)
    assert header[: len(columns)] == columns
    assert {len(row) for row in results} == {len(header)}
    assert len(results) == expected
    assert not re.search(r"\\ud[89a-f]", ran.stdout)
    check_counts(ran, expected)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("form", ["--lines", "--null", "--json"])
def test_random_bytes_give_a_result_per_text(run, choose, name, form, tmp_path):
    if "--prompt" in name:
        pytest.skip("texts have no other field")
    texts = [b"the fox", *(random_bytes(choose) for _ in range(RECORDS // 9)), b"the fox"]
    args = ["Who?"] if name.startswith("qa") else []
    if form == "--json":
        if args:
            pytest.skip("the files are one context")
        for number, text in enumerate(texts):
            (tmp_path / f"{number}").write_bytes(text)
            args += ["-f", tmp_path / f"{number}"]
        ran, stdin = run(name, *args, form), None
        assert len(ran.records) == len(texts)
    else:
        end = b"\n" if form == "--lines" else b"\0"
        texts = [text.replace(b"\0", b"") for text in texts] if form == "--null" else texts
        stdin = b"".join(text + end for text in texts)
        ran = run(name, *args, form, stdin=stdin)
        assert ran.stdout.count("\n" if name == "embed" else end.decode()) == len(texts)
    check_counts(ran, len(texts))


def test_random_bytes_can_be_searched(llmcli, choose, encoder, tmp_path):
    lines = b"\n".join([b"the fox", *(random_bytes(choose) for _ in range(RECORDS // 3))])
    for number in range(5):
        (tmp_path / str(number)).write_bytes(choose.randbytes(99) if number % 2 else random_text(choose).encode())
    for args, stdin in (([], lines), ([tmp_path / str(number) for number in range(5)], None)):
        ran = llmcli("search", "fox", "-m", encoder, "--json", *args, stdin=stdin)
        assert "this is a bug" not in ran.stderr
        assert ran.exit_status in (0, 3)
        assert all(record["text"].strip() for record in ran.records)
