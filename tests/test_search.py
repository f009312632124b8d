"""llmcli search: passages nearest in meaning, and vectors that are kept."""

import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmcli.io.folders import find_files

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
        lambda self, text, **rest: (
            seen.append(text if isinstance(text, str) else text["text"]),
            preprocess(self, text, **rest),
        )[1],
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
    why = "expected UTF-8, got UTF-16: use --encoding utf-16, or convert it with iconv"
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


class Full(sqlite3.Connection):
    """A database on a disk that cannot be written."""

    def execute(self, query, *args):
        if query.startswith("BEGIN"):
            raise sqlite3.OperationalError("attempt to write a readonly database")
        return super().execute(query, *args)


@pytest.fixture
def make_read_only(monkeypatch):
    def make():
        connect = sqlite3.connect
        kinds = {":memory:": sqlite3.Connection}
        replacement = lambda path, *args, **rest: connect(path, *args, **rest, factory=kinds.get(path, Full))  # noqa: E731
        monkeypatch.setattr(sqlite3, "connect", replacement)

    return make


@pytest.mark.parametrize("damage", ["garbage", "pages", "vectors", "empty"])
def test_search_builds_damaged_index_again(search, home, embedded, tmp_path, damage):
    (tmp_path / "a.txt").write_text(long_text(6))
    expected = search("dog", tmp_path / "a.txt").stdout
    (index,) = (home / "cache" / "search").glob("*/index.sqlite")
    data = index.read_bytes()
    if damage == "vectors":
        with sqlite3.connect(index) as database:
            database.execute("UPDATE parts SET vectors = randomblob(length(vectors))")
    else:
        index.write_bytes(
            {"garbage": b"no index" * 9999, "pages": data[:50_000] + b"\0" * 90_000, "empty": b""}[damage]
        )
    embedded.clear()
    ran = search("dog", tmp_path / "a.txt")
    assert (ran.stdout, ran.exit_status, len(embedded)) == (expected, 0, 7)
    assert ran.stderr.count("is damaged") == ran.stderr.count("\n") == (damage != "empty")
    ran = search("dog", tmp_path / "a.txt")
    assert (ran.stdout, ran.stderr, len(embedded)) == (expected, "", 7)


def test_search_without_cache_is_a_warning(search, monkeypatch):
    expected = search("dog", stdin=b"dog\nfox\n").stdout
    monkeypatch.setenv("LLMCLI_CACHE", "/dev/null/cache")
    ran = search("dog", stdin=b"dog\nfox\n")
    assert (ran.stdout, ran.exit_status) == (expected, 0)
    assert ran.stderr.startswith("warning: embeddings are not saved: /dev/null/cache/search/")
    assert ran.stderr.count("\n") == 1


def test_search_with_read_only_cache_uses_what_it_has(search, make_read_only, embedded, tmp_path):
    (tmp_path / "a.txt").write_text(long_text(3))
    expected = search("dog", tmp_path / "a.txt").stdout
    make_read_only()
    embedded.clear()
    ran = search("dog", tmp_path / "a.txt")
    assert (ran.stdout, ran.exit_status, ran.stderr, embedded) == (expected, 0, "", [])
    (tmp_path / "b.txt").write_text("sun")
    ran = search("sun", tmp_path / "a.txt", tmp_path / "b.txt", "-n", 1)
    assert (ran.stdout, ran.exit_status) == (f"{tmp_path / 'b.txt'}:1: sun (1.000)\n", 0)
    assert ran.stderr.count("attempt to write a readonly database") == ran.stderr.count("\n") == 1
    assert set(embedded) == {"sun"}


def test_search_deletes_old_indexes(search, home):
    caches = home / "cache"
    for name in ("search/0123", "search/4567"):
        (caches / name).mkdir(parents=True)
        (caches / name / "index.sqlite").write_bytes(b"")
    os.utime(caches / "search" / "0123", (0, 0))
    search("dog", stdin=b"dog\n")
    assert not (caches / "search" / "0123").exists()
    assert (caches / "search" / "4567").exists()


def test_search_reads_only_files_that_changed(search, monkeypatch, tmp_path):
    from llmcli.tasks import search as task

    read = []
    (folder := tmp_path / "notes").mkdir()
    monkeypatch.setattr(task, "is_binary", lambda path: read.append(Path(path).name))
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"dog {name}")
    search("dog", "-r", folder, "-n", 1)
    assert read[:3] == ["a.txt", "b.txt", "c.txt"]
    read.clear()
    times = (folder / "b.txt").stat()
    (folder / "b.txt").write_text("fox b")
    os.utime(folder / "b.txt", ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy or an archive does
    ran = search("fox b", "-r", folder, "-n", 1)
    assert (read, ran.stdout) == (["b.txt", "b.txt"], f"{folder / 'b.txt'}:1: fox b (1.000)\n")


def test_search_skips_passages_that_change_meanwhile(search, monkeypatch, tmp_path):
    from llmcli.tasks.search_index import SearchIndex

    (tmp_path / "a.txt").write_text(long_text(3))
    read = SearchIndex.read
    change = lambda self, *args: ((tmp_path / "a.txt").write_text("sun"), read(self, *args))[1]  # noqa: E731
    monkeypatch.setattr(SearchIndex, "read", change)
    ran = search("dog", tmp_path / "a.txt", "-n", 1)
    assert (ran.stdout, ran.exit_status) == ("", 0)
    assert ran.stderr == f"warning: skipped a passage of {tmp_path / 'a.txt'}, which has changed during the search\n"


def make_tree(folder: Path) -> None:
    files = ("a.md", "b.txt", "docs/c.md", "docs/old/d.md", ".hidden.md", ".git/e.md", "docs/build/f.md")
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"dog in {name}")
    (folder / "image.md").write_bytes(b"dog \0 fox")
    (folder / "latin.md").write_bytes(b"caf\xe9")
    (folder / "link.md").symlink_to("a.md")
    (folder / "linked").symlink_to("docs")
    (folder / "loop").symlink_to(".")
    os.mkfifo(folder / "pipe")


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        ([], ["a.md", "b.txt", "docs/c.md", "docs/build/f.md", "docs/old/d.md"]),
        (["*.md"], ["a.md", "docs/c.md", "docs/build/f.md", "docs/old/d.md"]),
        (["!*.md"], ["b.txt"]),
        (["docs/*.md"], ["docs/c.md"]),
        (["docs/**/*.md"], ["docs/c.md", "docs/build/f.md", "docs/old/d.md"]),
        (["*.md", "!old"], ["a.md", "docs/c.md", "docs/build/f.md"]),
        (["*.md", "!old/", "!docs/build/**"], ["a.md", "docs/c.md"]),
        (["!docs", "docs/c.md"], []),
        (["*.md", "!c.md", "c.*"], ["a.md", "docs/c.md", "docs/build/f.md", "docs/old/d.md"]),
        (["*.txt", "!*.txt/"], ["b.txt"]),
    ],
)
def test_search_finds_files_in_directories(search, tmp_path, monkeypatch, globs, expected):
    folder = tmp_path / "notes"
    make_tree(folder)
    monkeypatch.chdir(folder)
    options = [part for glob in globs for part in ("--glob", glob)]
    ran = search("dog", "-r", "--json", "-n", 9, *options)
    if expected:
        assert sorted(record["file"] for record in ran.records) == sorted(expected)
        assert ran.exit_status == 0
        reason = "cannot decode byte 0xe9 at offset 3"
        assert ran.stderr in ("", f"warning: skipped latin.md: {reason}: convert it to UTF-8 with iconv\n")
    else:
        assert (ran.exit_status, "error: no file to search\nhint: check --glob" in ran.stderr) == (2, True)
    if not globs:
        named = search("dog", "-r", folder / "docs", "b.txt", "./image.md", "--json", "-n", 9)
        places = [str(folder / name) for name in expected[2:]] + ["b.txt", "./image.md"]
        assert sorted(record["file"] for record in named.records) == sorted(places)


def test_glob_requires_recursion(search, tmp_path):
    ran = search("dog", tmp_path, "--glob", "*.md")
    assert (ran.exit_status, "--glob requires -r" in ran.stderr) == (2, True)


@pytest.fixture(scope="module")
def reranker(encoder, tmp_path_factory):
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("models") / "tiny-reranker"
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    torch.manual_seed(1)
    config = BertConfig.from_pretrained(encoder, num_labels=1, initializer_range=0.5, max_position_embeddings=512)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_search_ranks_again_with_cross_encoder(search, llmcli, reranker, tmp_path, monkeypatch):
    lines = [f"{word} {other}" for word in ("the dog", "a fox", "warm sun") for other in ("sleeps", "in", "upon")]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    ranked = llmcli("rerank", "dog", "-m", reranker, "--dtype", "float32", "--json", stdin="\n".join(lines).encode())
    expected = [(record["text"], pytest.approx(record["score"], abs=1e-6)) for record in ranked.records][:2]
    for option in (["--rerank", reranker], [f"--rerank={reranker}"]):
        ran = search(*option, "dog", "--json", "-n", 2, stdin="\n".join(lines).encode())
        assert [(record["text"], record["score"]) for record in ran.records] == expected
    monkeypatch.chdir(reranker.parent)  # a model directory may be relative
    ran = search("dog", "-n", 2, "--rerank", reranker.name, stdin="\n".join(lines).encode())
    assert ran.stdout.startswith(f"{lines.index(expected[0][0]) + 1}: {expected[0][0]} (")


def test_rerank_without_default_model_is_an_error(search, tmp_path):
    (tmp_path / "a.txt").write_text("the dog")
    ran = search("--rerank", "the fox", tmp_path / "a.txt")
    assert (ran.exit_status, "--rerank requires a model\nhint: pass one: --rerank=" in ran.stderr) == (2, True)


def test_search_uses_prompts_of_the_model(llmcli, encoder, tmp_path):
    folder = tmp_path / "prompted"
    shutil.copytree(encoder, folder)
    prompts = {"prompts": {"query": "warm sun ", "document": "once upon "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    options = ["-m", folder, "--dtype", "float32"]
    (query,) = llmcli("embed", "dog", "--as", "query", *options).records
    (document,) = llmcli("embed", "a fox", "--as", "document", *options).records
    expected = sum(a * b for a, b in zip(query["embedding"], document["embedding"], strict=True))
    (record,) = llmcli("search", "dog", *options, "--json", stdin=b"a fox").records
    assert record["score"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_killed_search_loses_no_vector_that_was_kept(encoder, home, tmp_path):
    lines = "".join(f"{'the quick brown fox ' * 5}{number}\n" for number in range(3000))
    (tmp_path / "a.txt").write_text(lines)
    command = [
        sys.executable,
        "-m",
        "llmcli",
        "search",
        "dog",
        "-m",
        str(encoder),
        "-r",
        str(tmp_path),
        "--glob",
        "a.*",
    ]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (count := count_vectors(home)):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert count_vectors(home) >= count > 0
    assert running.returncode == -signal.SIGKILL
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    outputs = {other.communicate(timeout=100) for other in others}  # at the same time
    fresh = subprocess.run(command, capture_output=True, env=os.environ | {"LLMCLI_CACHE": str(tmp_path / "fresh")})
    assert outputs == {(fresh.stdout, b"")}
    assert fresh.stdout.count(b"\n") == 5


def count_vectors(home: Path) -> int:
    for index in (home / "cache").glob("search/*/index.sqlite"):
        try:
            with sqlite3.connect(index) as database:
                return int(database.execute("SELECT coalesce(sum(length(places)), 0) / 32 FROM parts").fetchone()[0])
        except sqlite3.OperationalError:  # not yet made, or busy
            pass
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


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        (["**/x.md"], ["docs/x.md", "x.md"]),
        (["docs/**/x.md"], ["docs/x.md"]),
        (["[!f]*.md"], ["docs/x.md", "x.md"]),
        (["!**/docs/"], ["fox.md", "x.md"]),
        (["!ocs"], ["docs/fox.md", "docs/x.md", "fox.md", "x.md"]),
    ],
)
def test_glob_matches_whole_names(globs, expected, tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    for name in ("docs/x.md", "docs/fox.md", "x.md", "fox.md"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert sorted(find_files("", globs)) == expected


def test_search_query_after_rerank_may_be_long(search):
    assert search("--rerank", "long words " * 40).exit_status == 2
