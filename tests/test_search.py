"""llmcli search: passages nearest in meaning, and vectors that are kept."""

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def search(llmcli, encoder):
    return lambda *args, **settings: llmcli("search", *args, "-m", encoder, "--dtype", "float32", **settings)


@pytest.fixture
def embedded(monkeypatch):
    """The texts that the model has seen."""
    from llmcli.pipelines.embedding import EmbeddingPipeline

    seen: list[str] = []
    preprocess = EmbeddingPipeline.preprocess
    monkeypatch.setattr(
        EmbeddingPipeline,
        "preprocess",
        lambda self, text, **rest: (seen.append(text), preprocess(self, text, **rest))[1],
    )
    return seen


def long_text(paragraphs: int) -> str:
    """Each paragraph takes a passage of its own."""
    return "\n\n".join(f"number {i}: " + "the quick brown fox " * 9 for i in range(paragraphs))


def test_the_passage_itself_is_nearest_and_comes_with_its_place(search, tmp_path):
    text = long_text(4)
    (tmp_path / "a.txt").write_text("dog\n")
    (tmp_path / "b.txt").write_text(text)
    wanted = text.split("\n\n")[2].strip()
    ran = search(wanted, tmp_path / "a.txt", tmp_path / "b.txt", "-n", 2)
    first, _ = ran.stdout.splitlines()
    assert first == f"{tmp_path / 'b.txt'}:5: {wanted} (1.000)"
    assert ran.exit_status == 0
    assert ran.stderr == ""


def test_scores_are_dot_products_of_what_embed_prints(search, llmcli, encoder):
    lines = ["the quick fox", "a lazy dog", "warm sun"]
    ran = search("dog", "--json", stdin="\n".join(lines).encode())
    vectors = llmcli("embed", "dog", *lines, "-m", encoder, "--dtype", "float32").records
    query, *others = (record["embedding"] for record in vectors)
    scores = {
        line: sum(a * b for a, b in zip(query, other, strict=True)) for line, other in zip(lines, others, strict=True)
    }
    assert [hit["text"] for hit in ran.records] == sorted(lines, key=scores.__getitem__, reverse=True)
    for hit in ran.records:
        assert hit["score"] == pytest.approx(scores[hit["text"]], abs=1e-6)
        assert hit["line"] == lines.index(hit["text"]) + 1


def test_a_second_search_embeds_the_query_alone_and_says_the_same(search, embedded, tmp_path):
    (tmp_path / "a.txt").write_text(long_text(6))
    first = search("brown fox", tmp_path / "a.txt")
    assert len(embedded) == 7
    assert search("brown fox", tmp_path / "a.txt").stdout == first.stdout
    assert len(embedded) == 7
    search("lazy dog", tmp_path / "a.txt")
    assert embedded[7:] == ["lazy dog"]


def test_changed_and_deleted_files_are_noticed(search, embedded, tmp_path):
    (tmp_path / "a.txt").write_text(long_text(3))
    (tmp_path / "b.txt").write_text("sun")
    search("fox", tmp_path / "a.txt", tmp_path / "b.txt")
    embedded.clear()
    (tmp_path / "a.txt").write_text(long_text(3) + "\n\n" + "once upon a time " * 9)
    assert "once upon" in search("once upon a time", tmp_path / "a.txt", "-n", 1).stdout
    assert len(embedded) <= 3  # the query, the new paragraph, and one that it may share a passage with
    (tmp_path / "b.txt").unlink()
    assert search("fox", tmp_path / "b.txt").exit_status == 2


def test_chinese_and_markdown(search, tmp_path):
    (tmp_path / "a.md").write_text("# 天气\n\n今天天气很好。\n\n# Dogs\n\nA lazy dog.\n")
    ran = search("今天天气很好。", tmp_path / "a.md", "--json")
    assert "今天天气很好。" in ran.stdout
    assert ran.records[0]["line"] == 1


def test_what_cannot_be_searched(search, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "good.txt").write_text("dog")
    ran = search("dog", tmp_path / "bad.txt", tmp_path / "good.txt")
    assert ran.stdout.startswith(f"{tmp_path / 'good.txt'}:1: dog")
    why = "expected UTF-8, got UTF-16: convert it with iconv -f UTF-16 -t UTF-8"
    assert ran.stderr == f"error: {tmp_path / 'bad.txt'}: {why}\nerror: 1 of 2 records failed\n"
    assert ran.exit_status == 3
    assert search("dog", tmp_path).exit_status == 2
    assert search("  ", tmp_path / "good.txt").exit_status == 2
    ran = search("dog", stdin=b"")
    assert (ran.stdout, ran.stderr, ran.exit_status) == ("", "warning: input is empty\n", 0)


def test_directories_and_dangling_links_are_skipped(search, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "good.txt").write_text("dog")
    ran = search("dog", *sorted(tmp_path / name for name in ("good.txt", "link", "sub")))
    assert ran.exit_status == 0
    assert ran.stdout.startswith(f"{tmp_path / 'good.txt'}:1: dog")
    assert ran.stderr.splitlines() == [
        f"warning: skipped '{tmp_path / 'link'}': cannot be read",
        f"warning: skipped '{tmp_path / 'sub'}': directory",
    ]
    ran = search("dog", tmp_path / "sub")
    assert (ran.exit_status, "error: no file to search" in ran.stderr) == (2, True)
    ran = search("dog", tmp_path / "missing", tmp_path / "good.txt")
    assert (ran.exit_status, ran.stderr) == (2, f"error: {tmp_path / 'missing'}: no such file or directory\n")


def test_more_files_than_may_be_open_are_searched(search, tmp_path):
    files = [tmp_path / f"{number}.txt" for number in range(300)]
    for number, file in enumerate(files):
        file.write_text(f"dog {number % 3}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        ran = search("dog 2", *files, "-n", 100)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (ran.exit_status, ran.stderr) == (0, "")
    assert all("dog 2 (1.000)" in line for line in ran.stdout.splitlines())


def test_cache_that_cannot_be_used_is_a_warning(search, home, monkeypatch, embedded):
    cache = home / "cache" / "vectors.sqlite"
    cache.parent.mkdir()
    expected = search("dog", stdin=b"dog\nfox\n").stdout
    cache.write_bytes(b"no database at all" * 100)
    ran = search("dog", stdin=b"dog\nfox\n")
    assert (ran.stdout, ran.exit_status) == (expected, 0)
    assert ran.stderr == f"warning: embeddings are not saved: {cache}: file is not a database\n"
    monkeypatch.setenv("LLMCLI_CACHE", "/dev/null/cache")
    ran = search("dog", stdin=b"dog\nfox\n")
    assert (ran.stdout, ran.exit_status) == (expected, 0)
    assert ran.stderr.startswith("warning: embeddings are not saved: /dev/null/cache/vectors.sqlite: ")


@pytest.mark.parametrize("when", ["BEGIN", "INSERT"])
def test_cache_that_fails_later_is_one_warning(search, monkeypatch, when):
    class Full(sqlite3.Connection):
        def execute(self, query, *args):
            if query.startswith(when):
                raise sqlite3.OperationalError("attempt to write a readonly database")
            return super().execute(query, *args)

        def executemany(self, query, *args):
            raise sqlite3.OperationalError("attempt to write a readonly database")

    connect = sqlite3.connect
    kinds = {":memory:": sqlite3.Connection}
    monkeypatch.setattr(sqlite3, "connect", lambda path, **rest: connect(path, **rest, factory=kinds.get(path, Full)))
    ran = search("dog", stdin="".join(f"dog {number}\n" for number in range(200)).encode())
    assert (len(ran.stdout.splitlines()), ran.exit_status) == (5, 0)
    assert ran.stderr.count("attempt to write a readonly database") == 1


@pytest.mark.slow
def test_a_kill_loses_no_vector_that_was_kept(encoder, home, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"{'the quick brown fox ' * 5}{i}" for i in range(20_000)))
    command = [sys.executable, "-m", "llmcli", "search", "dog", "-m", str(encoder)]
    with (tmp_path / "a.txt").open() as lines:
        running = subprocess.Popen(command, stdin=lines, stdout=subprocess.DEVNULL, env=os.environ)
    cache = home / "cache" / "vectors.sqlite"
    deadline = time.monotonic() + 60
    while not (count := kept(cache)):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert kept(cache) >= count > 0
    assert running.returncode == -signal.SIGKILL


def kept(cache: Path) -> int:
    if not cache.exists():
        return 0
    try:
        with sqlite3.connect(cache) as database:
            return int(database.execute("SELECT count(*) FROM vectors").fetchone()[0])
    except sqlite3.OperationalError:  # not yet made, or busy
        return 0


NAMES = (
    "adding-a-task", "batch-inference", "configuration", "cookbook", "embed", "errors", "generate", "installation",
    "migrating", "models", "privacy", "question-answering", "search", "score", "summarize", "translate", "warm-starts",
)  # fmt: skip
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES)]


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("How do I add a new task?", "a file in `src/llmcli/tasks/` that defines `TASK`"),
        ("Where do I write an alias for my own model?", "Each table is an alias."),
        ("Which exit code means that some records failed?", "some of several records failed"),
        ("Does it work without a network?", "--offline"),
        ("How do I translate a file into another language?", "llmcli translate"),
        ("Why are pickled weights refused?", "Pickle weights can run code"),
        ("How do I get the same random text again?", "--seed"),
        ("How do I run the test suite?", "make test"),
        ("What happens to a line that fails?", "A record can fail"),
        ("How do I turn sentences into vectors?", "llmcli embed"),
    ],
)
def test_this_projects_own_pages(llmcli, real_cache, question, answer):
    ran = llmcli("search", question, *PAGES, "-n", 3)
    assert answer in ran.stdout


# Questions and pages were written before anything was searched; the phrase tells the right passage.
ASKED = [
    ("docs/privacy.md", "can I use it without an internet connection", "--offline"),
    ("docs/errors.md", "how does my script find out that some of the lines failed", "some of several records failed"),
    ("docs/models.md", "is it safe to open weights that somebody pickled", "--allow-pickle"),
    ("docs/models.md", "which model translates when I name none", "opus-mt-FROM-TO"),
    (
        "docs/migrating.md",
        "I used the question-answering pipeline of transformers 4, what is the command now",
        "`llmcli qa`",
    ),
    ("docs/summarize.md", "what happens to a report that is too long to be summarized at once", "into parts"),
    ("CONTRIBUTING.md", "which module is allowed to write to stdout", "is the only module that"),
    ("CONTRIBUTING.md", "how do I run the tests quickly while I change code", "make test-fast"),
    ("docs/adding-a-task.md", "make a new command out of a prompt", "src/llmcli/commands/"),
    ("docs/adding-a-task.md", "teach translate one more language", "translations.toml"),
]


@pytest.mark.real
@pytest.mark.slow
def test_eight_of_ten_questions_find_their_passage_among_the_first_three(llmcli, real_cache):
    missed = []
    for page, question, phrase in ASKED:
        found = llmcli("search", question, *PAGES, "-n", 3, "--json").records
        if not any(Path(hit["file"]) == ROOT / page and phrase in hit["text"] for hit in found):
            missed.append(question)
    assert len(missed) <= 2, missed


@pytest.mark.parametrize("option", ["--resume", "--retry-errors"])
def test_options_of_record_after_record_are_refused(search, tmp_path, option):
    ran = search("a dog", "--output", tmp_path / "out", option, stdin=b"the fox")
    assert (ran.exit_status, "search does not support --resume" in ran.stderr) == (2, True)


def test_search_statistics_count_every_file(search, tmp_path):
    for name, data in (("a", b"the fox"), ("b", b"\xff"), ("c", b"a dog")):
        (tmp_path / name).write_bytes(data)
    ran = search("dog", *(tmp_path / name for name in "abc"), "--stats", "--output", tmp_path / "out", "--json")
    statistics = json.loads(ran.stderr.splitlines()[-1])
    assert [statistics[name] for name in ("records", "failed", "written")] == [3, 1, 2]
    assert len((tmp_path / "out").read_text().splitlines()) == 2
    assert search("dog", tmp_path / "b").exit_status == 1


def test_search_rejects_a_query_that_is_not_utf8(search):
    ran = search("\udcff", stdin=b"the fox")
    assert (ran.exit_status, "not UTF-8" in ran.stderr) == (2, True)


def test_special_token_names_in_passages_count_as_text(search, tmp_path):
    (tmp_path / "notes.txt").write_text("<s> </s> " * 100 + "the fox\n")
    ran = search("fox", tmp_path / "notes.txt", "--json")
    assert (ran.exit_status, ran.stderr) == (0, "")
    assert all(record["text"] for record in ran.records)


def test_search_with_vocabulary_file_alone_works(llmcli, tmp_path):
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path / "bert"
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parent / "golden" / "bert-qa")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(tokenizer), **size)).save_pretrained(folder)
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in words))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (tmp_path / "notes.txt").write_text("The fox sleeps.\n\nA dog is here.\n")
    ran = llmcli("search", "fox", tmp_path / "notes.txt", "-m", folder)
    assert (ran.exit_status, ran.stderr) == (0, "")
    assert "The fox sleeps." in ran.stdout
    assert llmcli("embed", "fox", "-m", folder).exit_status == 0
