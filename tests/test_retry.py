"""--retry-errors: records that come with an error, and those that failed in an earlier run, are tried again."""

import csv
import io
import json
import os

import pytest

from llmcli.io.run_log import ENTRY_BYTES

GREEDY = ("--temperature", 0, "--max-new-tokens", 4, "--dtype", "float32")
OLD = b'"error": {"type": "old", "message": "m"}'  # of an earlier run
TEXTS = ["the fox", "the dog", "a lazy\nfox", "the sun", "fox", 'a "quick" dog', "the brown fox", "once"]
FORMS = {
    "--jsonl": "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)),
    "--csv": "id,text\n" + "".join(f'{i},"{text.replace(chr(34), chr(34) * 2)}"\n' for i, text in enumerate(TEXTS)),
    "--lines": "".join(text.replace("\n", " ") + "\n" for text in TEXTS),
    "--null": "".join(text + "\0" for text in TEXTS),
}


class Flaky:
    """A tokenizer that fails for texts with any of the `words`, and counts what it is asked for."""

    def __init__(self, monkeypatch):
        from llmcli.pipelines.causal import CausalPipeline

        whole = CausalPipeline.preprocess
        self.words, self.asked = ["fox"], 0

        def preprocess(pipeline, prompt, **settings):
            self.asked += 1
            if any(word in prompt for word in self.words):
                raise RuntimeError(f"no {self.words[0]}")
            return whole(pipeline, prompt, **settings)

        monkeypatch.setattr(CausalPipeline, "preprocess", preprocess)


@pytest.fixture
def flaky(monkeypatch):
    return Flaky(monkeypatch)


@pytest.fixture(params=FORMS)
def command(request, tiny, tmp_path):
    path = tmp_path / "in"
    path.write_bytes(FORMS[request.param].encode())
    return ("generate", "-m", tiny, request.param, "-f", path, *GREEDY, "--resume", "--output")


jsonl = pytest.mark.parametrize("command", ["--jsonl"], indirect=True)


@pytest.fixture
def whole(llmcli, flaky, command, tmp_path):
    """What a run writes in which nothing fails."""
    flaky.words = []
    assert llmcli(*command, tmp_path / "whole").exit_status == 0
    flaky.words = ["fox"]
    return (tmp_path / "whole").read_bytes()


@pytest.fixture
def failed(llmcli, flaky, command, whole, tmp_path):
    """The file of a run in which four of eight failed; now they would not."""
    path = tmp_path / "out"
    ran = llmcli(*command, path)
    assert (ran.exit_status, ran.stderr.splitlines()[-1]) == (3, "error: 4 of 8 records failed")
    assert path.read_bytes() != whole
    flaky.words, flaky.asked = [], 0
    return path


def test_what_failed_is_run_again_and_takes_its_place(llmcli, flaky, command, whole, failed):
    ran = llmcli(*command, failed, "--retry-errors")
    assert (ran.exit_status, ran.stderr, flaky.asked) == (0, "", 4)
    assert failed.read_bytes() == whole
    for again in ((), ("--retry-errors",)):
        ran = llmcli(*command, failed, *again)
        assert (ran.exit_status, flaky.asked) == (0, 4)
        assert failed.read_bytes() == whole
    assert sorted(path.name for path in failed.parent.glob("out*")) == ["out", "out.state"]


@pytest.mark.parametrize("kept", [0, 0.2, 0.5, 0.8, 0.99])
def test_an_unfinished_run_goes_on_too(llmcli, command, whole, failed, kept):
    failed.write_bytes(failed.read_bytes()[: int(failed.stat().st_size * kept)])
    assert llmcli(*command, failed, "--retry-errors").exit_status == 0
    assert failed.read_bytes() == whole


def test_what_fails_again_stays_failed(llmcli, flaky, command, whole, failed):
    flaky.words = ["brown"]
    ran = llmcli(*command, failed, "--retry-errors")
    assert (ran.exit_status, flaky.asked) == (3, 4)
    assert ran.stderr.endswith("RuntimeError: no brown\nerror: 1 of 8 records failed\n")
    assert failed.read_bytes() != whole
    assert llmcli(*command, failed).exit_status == 3
    flaky.words = []
    assert llmcli(*command, failed, "--retry-errors").exit_status == 0
    assert failed.read_bytes() == whole
    assert flaky.asked == 5


def test_the_first_that_fails_again_can_stop_it(llmcli, flaky, command, whole, failed):
    flaky.words = ["brown"]
    ran = llmcli(*command, failed, "--retry-errors", "--on-error", "stop")
    assert (ran.exit_status, ran.stderr.count("\n")) == (1, 1)
    flaky.words, flaky.asked = [], 0
    assert llmcli(*command, failed).exit_status == 3
    assert llmcli(*command, failed, "--retry-errors").exit_status == 0
    assert (failed.read_bytes(), flaky.asked) == (whole, 1)


def test_retry_keeps_results_of_a_cut_log(llmcli, command, whole, failed, monkeypatch):
    """A crash can cut the new log anywhere. The next run keeps its complete entries, and copies the other results."""

    def crash(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", crash)
        assert llmcli(*command, failed, "--retry-errors").exit_status == 130
    left = {path: path.read_bytes() for path in failed.parent.glob("out*")}
    log = failed.with_name("out.state.retry")
    assert sorted(path.name for path in left) == ["out", "out.state", "out.state.new", "out.state.retry"]
    begin = left[log].index(b"\n") + 1
    remaining = []
    for cut in [0, begin - 1, *range(begin, len(left[log]), 20), len(left[log])]:
        for path, data in left.items():
            path.write_bytes(data if path != log else data[:cut])
        ran = llmcli(*command, failed)
        remaining.append(int(ran.stderr.splitlines()[-1].split()[1]) if ran.exit_status == 3 else 0)
        retried = [text for text in TEXTS[: max(0, cut - begin) // ENTRY_BYTES] if "fox" in text]
        assert remaining[-1] == 4 - len(retried)
        assert llmcli(*command, failed, "--retry-errors").exit_status == 0
        assert failed.read_bytes() == whole
    assert (remaining[0], remaining[-1]) == (4, 0)


@pytest.mark.parametrize("step", ["chmod", "replace", "replaced"])
def test_a_crash_while_results_take_their_places(llmcli, command, whole, failed, monkeypatch, step):
    def crash(*args, **settings):
        raise KeyboardInterrupt

    replace = os.replace
    with monkeypatch.context() as patched:
        if step == "chmod":  # the copy is written, and not yet in the log
            patched.setattr("pathlib.Path.chmod", crash)
        elif step == "replace":
            patched.setattr("os.replace", crash)
        else:
            patched.setattr("os.replace", lambda old, new: (replace(old, new), crash()))
        assert llmcli(*command, failed, "--retry-errors").exit_status == 130
    assert (failed.read_bytes() == whole) == (step == "replaced")
    assert llmcli(*command, failed).exit_status == 0
    assert failed.read_bytes() == whole
    assert sorted(path.name for path in failed.parent.glob("out*")) == ["out", "out.state"]


@jsonl
def test_a_link_stays_a_link_and_permissions_what_they_are(llmcli, flaky, command, whole, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    target.touch(0o600)
    link.symlink_to(target)
    assert llmcli(*command, link).exit_status == 3
    flaky.words = []
    assert llmcli(*command, link, "--retry-errors").exit_status == 0
    assert (link.is_symlink(), target.read_bytes(), target.stat().st_mode & 0o777) == (True, whole, 0o600)


@jsonl
def test_a_pipe_that_brings_something_else_changes_nothing(llmcli, flaky, command, whole, tmp_path):
    args = [*command[:4], *GREEDY, "--resume", "--output", tmp_path / "piped"]
    data = FORMS["--jsonl"].encode()
    assert llmcli(*args, stdin=data).exit_status == 3
    before = (tmp_path / "piped").read_bytes()
    flaky.words = []
    ran = llmcli(*args, "--retry-errors", stdin=data.replace(b"the fox", b"the cat"))
    assert (ran.exit_status, "the input has changed" in ran.stderr) == (2, True)
    assert (tmp_path / "piped").read_bytes() == before


def test_what_comes_with_an_error_is_tried_again(llmcli, tiny):
    data = b'{"text": "the", %s}\n{%s}\n{"text": "fox", "error": ""}\n' % (OLD, OLD)
    args = ("generate", "-m", tiny, "--jsonl", *GREEDY)
    again, none, good = llmcli(*args, "--retry-errors", stdin=data).records
    assert ("error" in again, bool(again["generated_text"])) == (False, True)
    assert none["error"]["type"] == "missing_field"
    assert (good["error"], bool(good["generated_text"])) == ("", True)
    alone = llmcli(*args, "--retry-errors", stdin=b'{"text": "the"}\n')
    assert alone.records == [again]
    assert alone.stderr == ""


def test_a_csv_that_comes_with_errors(llmcli, tiny):
    args = ("generate", "-m", tiny, "--csv", *GREEDY)
    first = llmcli(*args, stdin=b"id,text\n1,the dog\n2,\xff\n")
    assert first.exit_status == 3
    ran = llmcli(*args, "--retry-errors", stdin=first.stdout.replace("2,,", "2,the sun,").encode())
    rows = list(csv.DictReader(io.StringIO(ran.stdout)))
    assert ran.exit_status == 0
    assert [(row["id"], bool(row["generated_text"]), row["error"]) for row in rows] == [
        ("1", True, ""),
        ("2", True, ""),
    ]


def test_what_was_passed_on_can_be_tried_later(llmcli, tiny, tmp_path):
    (tmp_path / "in").write_bytes(b'{"text": "the", %s}\n{"text": "dog"}\n' % OLD)
    args = ("generate", "-m", tiny, "--jsonl", "-f", tmp_path / "in", *GREEDY, "--resume", "--output", tmp_path / "out")
    assert llmcli(*args).exit_status == 0
    assert (tmp_path / "out").read_bytes().startswith(b'{"text": "the", %s}\n{"text": "dog"' % OLD)
    ran = llmcli(*args, "--retry-errors")
    assert (ran.exit_status, ran.stderr) == (0, "")
    records = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [(record["text"], "error" in record) for record in records] == [("the", False), ("dog", False)]
    assert llmcli(*args, "--retry-errors").stderr == f"note: '{tmp_path / 'out'}' is already complete\n"


def test_qa_asks_its_question_of_a_record_that_is_tried_again(llmcli, chatty):
    data = b'{"context": "The clock is old.", %s}\n' % OLD
    args = ("qa", "Is it old?", "-m", chatty, "--jsonl", "--max-new-tokens", 2)
    assert llmcli(*args, stdin=data).records == [json.loads(data)]
    (record,) = llmcli(*args, "--retry-errors", stdin=data).records
    assert record["question"] == "Is it old?"
    assert "error" not in record


def test_without_resume_a_file_that_exists_is_refused(llmcli, tiny, tmp_path):
    (tmp_path / "out").touch()
    ran = llmcli("generate", "the", "-m", tiny, "--retry-errors", "--output", tmp_path / "out")
    assert (ran.exit_status, "exists" in ran.stderr) == (2, True)


def test_retried_csv_keeps_column_of_errors(llmcli, tiny):
    error = json.dumps({"type": "old", "message": "m"}).replace('"', '""')
    stdin = f'text,error\nthe fox,"{error}"\na dog,\n'.encode()
    args = ("generate", "-m", tiny, *GREEDY, "--csv", "--retry-errors", "--select", "generated_text")
    ran = llmcli(*args, stdin=stdin)
    rows = list(csv.DictReader(io.StringIO(ran.stdout, newline="")))
    assert (ran.exit_status, [row["error"] for row in rows]) == (0, ["", ""])
