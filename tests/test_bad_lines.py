"""A thousand JSON lines, of which fifty are bad in ten ways: each has its own line of output, and says its cause."""

import json

import pytest

GREEDY = ("--temperature", 0, "--max-new-tokens", 2, "--dtype", "float32")
BOM = b"\xef\xbb\xbf"
LONG = 10_000_000

RUNS = None  # strange, and yet a record
NO_JSON = ("invalid_json", "not JSON: ")
NO_OBJECT = ("invalid_json", "expected a JSON object, got ")
NO_TEXT = ("missing_field", "missing field 'text': available fields: none")
NOT_A_TEXT = ("wrong_type", "field 'text' must be a string")
NO_UTF8 = ("invalid_utf8", "cannot decode byte 0x")
BLANK = ("invalid_json", "blank line")
HALF = ("invalid_text", "field 'text': lone surrogate at character ")
TOO_LONG = ("context_length_exceeded", "text has over 128 tokens, which exceeds the context length of 64: ")

# Five lines of each kind, and what comes of them: an error of that type, whose message begins so.
BAD = {
    "cut short": [
        (b"{", NO_JSON),
        (b'{"text"', NO_JSON),
        (b'{"text": ', NO_JSON),
        (b'{"text": "the', ("invalid_json", "not JSON: Unterminated string starting at character 9: '\"'")),
        (b'{"text": "the", "id": 1', NO_JSON),
    ],
    "of a wrong type": [
        (b'{"text": 5}', NOT_A_TEXT),
        (b'{"text": null}', NOT_A_TEXT),
        (b'{"text": {"text": "the"}}', NOT_A_TEXT),
        (b'"the fox"', (NO_OBJECT[0], "expected a JSON object, got a string")),
        (b"5", (NO_OBJECT[0], "expected a JSON object, got a number")),
    ],
    "with NUL": [
        (b'{"text": "the\0fox"}', ("invalid_json", "not JSON: Invalid control character at character 13: '\\x00'")),
        (b'\0{"text": "the fox"}', ("invalid_json", "not JSON: Expecting value at character 0: '\\x00'")),
        (b'{"text": "the fox"}\0', ("invalid_json", "not JSON: Extra data at character 19: '\\x00'")),
        (b"\0" * 100, NO_JSON),
        (rb'{"text": "the\u0000fox"}', RUNS),
    ],
    "with half of a surrogate pair": [
        (rb'{"text": "\ud800"}', HALF),
        (rb'{"text": "the fox\udfff"}', (HALF[0], HALF[1] + "7")),
        (rb'{"text": "\udc00\ud83d"}', HALF),
        (rb'{"\ud800": "the fox"}', ("missing_field", r"missing field 'text': available fields: \ud800")),
        (rb'{"text": "the fox", "by": "\ud83d"}', RUNS),
    ],
    "not in UTF-8": [
        (b'{"text": "caf\xe9"}', (NO_UTF8[0], "cannot decode byte 0xe9 at offset 13")),
        (b'{"text": "\xc0\x80"}', NO_UTF8),
        (b'{"text": "\xed\xa0\x80"}', NO_UTF8),
        (b'{"text": "the fox\xf0\x9f\x98"}', NO_UTF8),
        ('{"text": "the fox"}'.encode("utf-16"), NO_UTF8),
    ],
    "of 10 MB": [
        (b'{"text": "' + b"x" * LONG + b'"}', TOO_LONG),
        (b'{"text": "' + b"the quick brown fox " * (LONG // 20) + b'"}', TOO_LONG),
        (b'{"' + b"x" * LONG + b'": "the fox"}', ("missing_field", "missing field 'text': available fields: xxx")),
        (b"x" * LONG, ("invalid_json", "not JSON: Expecting value at character 0: 'x'")),
        (b'{"text": "' + b"x" * LONG, NO_JSON),
    ],
    "of arrays": [
        (b"[[]]", (NO_OBJECT[0], "expected a JSON object, got an array")),
        (b'[{"text": "the fox"}]', NO_OBJECT),
        (b'{"text": [["the"], ["fox"]]}', NOT_A_TEXT),
        (b"[" * 100_000, NO_JSON),
        (b'{"text": "the fox", "x": ' + b"[" * 950 + b"]" * 950 + b"}", ("invalid_json", "nested more than 500 ")),
    ],
    "empty objects": [(line, NO_TEXT) for line in (b"{}", b"{ }", b"{}\r", b"\t{}", BOM + b"{}")],
    "blank": [(line, BLANK) for line in (b"", b" ", b"\r", b"\t  ", b"    \r")],
    "with a byte order mark": [
        (BOM + b'{"text": "the fox"}', RUNS),
        (BOM + b'{"text": "the fox"}\r', RUNS),
        (b'{"text": "' + BOM + b'the fox"}', RUNS),
        (BOM, BLANK),
        (BOM + BOM + b'{"text": "the fox"}', NO_JSON),
    ],
}
EXPECTED = {20 * i + 7: bad for i, bad in enumerate(line for kind in zip(*BAD.values(), strict=True) for line in kind)}
GOOD = [i for i in range(1000) if i not in EXPECTED]
FAILED = [i for i, (_, why) in EXPECTED.items() if why is not RUNS]


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """The path of the lines, numbered from 0: good ones are {"id", "text"}."""
    words = ("the", "quick", "brown", "fox", "sleeps")
    path = tmp_path_factory.mktemp("bad") / "lines.jsonl"
    with path.open("wb") as file:
        for i in range(1000):
            good = json.dumps({"id": i, "text": " ".join(words[: i % 5 + 1]) + " é" * (i % 3)}).encode()
            file.write((EXPECTED[i][0] if i in EXPECTED else good) + b"\n")
    return path


def test_fifty_bad_lines_of_a_thousand(llmcli, tiny, thousand):
    assert (len(EXPECTED), len(FAILED)) == (50, 45)
    ran = llmcli("generate", "-m", tiny, "--jsonl", "-f", thousand, *GREEDY, "--quiet")
    lines = ran.stdout.split("\n")
    assert lines.pop() == ""
    results = [json.loads(line) for line in lines]
    assert len(results) == 1000
    for i in GOOD:
        assert (results[i]["id"], "error" in results[i]) == (i, False)
        assert results[i]["generated_text"]
    for i, (line, why) in EXPECTED.items():
        if why is RUNS:
            assert results[i].items() >= json.loads(line.removeprefix(BOM)).items()
            assert results[i]["generated_text"]
            continue
        error = results[i].pop("error")
        assert error["type"] == why[0], (line[:40], error)
        assert error["message"].startswith(why[1])
        assert len(error["message"]) < 300
        assert "generated_text" not in results[i]
        if why[0] in ("invalid_json", "invalid_utf8"):
            assert results[i] == {"line": i + 1, "file": str(thousand)}
        else:
            assert results[i] == {**json.loads(line.removeprefix(BOM)), "file": str(thousand)}
    said = ran.stderr.splitlines()
    assert [line.split(": ")[1] for line in said[:-1]] == [f"{thousand}:{i + 1}" for i in FAILED]
    assert said[-1] == "error: 45 of 1000 records failed"
    assert ran.exit_status == 3


def test_the_good_ones_are_as_if_alone(llmcli, tiny, thousand, tmp_path):
    lines = thousand.read_bytes().split(b"\n")
    (tmp_path / "good.jsonl").write_bytes(b"".join(lines[i] + b"\n" for i in GOOD))
    together = llmcli("generate", "-m", tiny, "--jsonl", "-f", thousand, *GREEDY).records
    alone = llmcli("generate", "-m", tiny, "--jsonl", "-f", tmp_path / "good.jsonl", *GREEDY)
    assert alone.exit_status == 0
    assert alone.stderr == ""
    assert [{**together[i], "file": None} for i in GOOD] == [{**record, "file": None} for record in alone.records]


def test_the_first_bad_one_can_stop_it(llmcli, tiny, thousand):
    ran = llmcli("generate", "-m", tiny, "--jsonl", "-f", thousand, *GREEDY, "--on-error", "stop")
    first = FAILED[0]
    assert [record.get("id") for record in ran.records] == [*range(first), None]
    assert ran.records[-1]["error"]["type"] == EXPECTED[first][1][0]
    assert ran.stderr.startswith(f"error: {thousand}:{first + 1}: not JSON: ")
    assert ran.stderr.count("\n") == 1
    assert ran.exit_status == 1
