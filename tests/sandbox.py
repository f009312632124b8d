"""A folder with the files that the project's pages name, and the environment of somebody who reads them: with the real
models, or with tiny ones under the names of real ones."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import adapters
import heads

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
STORY = "The harbour clock was repaired in 1951 by an apprentice. He found a bird's nest behind the dial.\n"
CLOCK = "docs/examples/clock.txt"
TEXTS = {
    CLOCK: (ROOT / CLOCK).read_text(encoding="utf-8"),
    "openings.txt": "The sky is\nOnce upon a time\nWater boils at\n",
    "report.txt": STORY * 3,
    "manual.txt": "To undo a commit, use git revert.\n\nTo stop the pump, press the red button twice.\n",
    "faq.md": "# Questions\n\nHow do I start? Press the green button.\n",
    "book.txt": STORY * 20,
    "briefe.txt": "Das Wetter ist heute schön.\nWir gehen zum See.\n",
    "sentences.txt": "The clock was repaired.\nThe sky is blue.\n",
    "corpus.txt": "The sky is blue.\nblue the sky is is\nShe opened the door and went in.\n",
    "history.txt": "ls -l\nsudo systemctl restart NetworkManager\ngit log\n",
    "reviews.txt": "I loved it, all of it.\nNever again.\nThe best soup in town!\n",
    "reviews.csv": 'id,review\n1,"I loved it, all of it."\n2,Never again.\n',
    "topics.txt": "sport: games and their results\npolitics\nscience: studies and discoveries\n",
    "headlines.txt": "The home team won again.\nParliament meets on Monday.\n",
    "news.csv": "id,text\n1,The home team won again.\n2,Parliament meets on Monday.\n",
    "notes/monday.txt": STORY,
    "notes/a b.txt": "The pump was stopped.\nIt was started again.\n",
    "docs/adding-a-task.md": (ROOT / "docs" / "adding-a-task.md").read_text(encoding="utf-8"),
    "shard.0.jsonl": '{"text": "The sky is"}\n',
    "shard.1.jsonl": '{"text": "Once upon a time"}\n',
    "README.md": "# A title\n\nThe sky is blue.\n",
    ".venv/bin/activate": "",
    "constraints.txt": "",
}
RECORDS = {
    "in": [{"text": "The sky is"}, {"text": "Once upon a time"}],
    "reviews": [{"id": 1, "text": "I loved it."}, {"id": 2, "text": "Never again."}],
    "articles": [{"id": 1, "text": STORY}, {"id": 2, "text": STORY * 2}],
    "news": [{"article": STORY}],
    "questions": [{"question": "Who repaired the clock?", "context": STORY}],
    "letters": [{"id": 1, "text": "Ada Lovelace lived in London."}, {"id": 2, "text": "She never went to Rome."}],
    "pairs": [{"question": "What is the capital of France?", "answer": " Paris"}],
    "requests": [
        {"text": "Is it late?", "schema": {"type": "boolean"}},
        {"text": "Pick a number", "settings": {"choice": ["one", "two"], "seed": 7}, "schema": None},
    ],
    "batch": [
        {
            "custom_id": "1",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9},
        },
    ],
    "conversations": [{"messages": [{"role": "user", "content": "Hello"}]}, {"text": "Hello"}],
}
FUNCTIONS = """
history() { cat history.txt; }
man() { cat manual.txt; }
pip() { :; }  # the suite itself runs in what pip installed
make() { command make --dry-run -C "$LLMCLI_ROOT" "$@" > /dev/null; }
llmcli() { command llmcli "${@//localhost:8000/$LLMCLI_SERVER}"; }
"""
TINY = {
    "chat": ["smollm2", "smollm2-1.7b", "qwen3-4b", "qwen3-0.6b", "gemma3-270m", "gpt2"],
    "encoder": ["minilm"],
    "roberta-qa": ["roberta-squad2", "deepset/roberta-base-squad2", "distilbert-squad"],
    "bart": ["bart-large-cnn", "facebook/bart-large-cnn", "distilbart"],
    "tagger": ["bert-ner", "dslim/bert-base-NER"],
    "classifier": ["distilbert-sst2", "distilbert/distilbert-base-uncased-finetuned-sst-2-english"],
    "reranker": ["ms-marco-minilm"],
    "nli": ["bart-large-mnli", "facebook/bart-large-mnli"],
    "nllb": ["nllb-600m", "facebook/nllb-200-distilled-600M"],
    "marian": ["opus-mt-en-fr", "Helsinki-NLP/opus-mt-en-fr"],
    "t5": ["t5-small"],
}


def fill(folder: Path) -> Path:
    """The files."""
    for name, text in TEXTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    for name, records in RECORDS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "init.defaultBranch=main"]
    for args in (["init", "-q"], ["add", "report.txt"], ["commit", "-qm", "First"]):
        subprocess.run([*git, *args], cwd=folder, check=True)
    (folder / "report.txt").write_text(STORY, encoding="utf-8")
    return folder


@contextmanager
def real(scratch: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """With the models that the user's cache has, and the project's own pages beside the files."""
    import platformdirs

    folder = fill(scratch / "here")
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / CLOCK]:
        shutil.copy(page, folder / page.relative_to(ROOT))
    cache = os.environ.get("LLMCLI_CACHE") or str(platformdirs.user_cache_path("llmcli", appauthor=False))
    with _worker(scratch, {"LLMCLI_CACHE": cache, "LLMCLI_DTYPE": "float32"}) as environment:
        yield folder, environment


@contextmanager
def tiny(scratch: Path, chat: Path, encoder: Path, server: str) -> Iterator[tuple[Path, dict[str, str]]]:
    """With models that answer at once, and a server of the OpenAI protocol."""
    made = {
        "chat": chat,
        "encoder": encoder,
        "tagger": heads.save_head(scratch / "tagger", "bert", "TokenClassification", heads.ENTITIES),
        "classifier": heads.save_head(scratch / "classifier", "distilbert", "SequenceClassification", heads.SENTIMENTS),
        "reranker": heads.save_head(scratch / "reranker", "bert", "SequenceClassification", {0: "LABEL_0"}),
        "nli": heads.save_head(scratch / "nli", "bart", "SequenceClassification", heads.NLI),
    }
    tables = [
        f'["{name}"]\npath = "{made.get(kind, GOLDEN / kind)}"\n' for kind, names in TINY.items() for name in names
    ]
    (scratch / "config").mkdir()
    (scratch / "config" / "config.toml").write_text("")
    (scratch / "config" / "models.toml").write_text("\n".join(tables))
    own = {
        "LLMCLI_CACHE": str(scratch / "cache"),
        "LLMCLI_CONFIG": str(scratch / "config" / "config.toml"),
        "LLMCLI_SERVER": server,
    }
    _pulled(chat, scratch / "huggingface" / "hub" / "models--HuggingFaceTB--SmolLM2-360M-Instruct")
    adapters.make_lora(scratch / "here" / "my-lora", chat)
    with _worker(scratch, own) as environment:
        yield fill(scratch / "here"), environment


def _pulled(model: Path, home: Path) -> None:
    """The model as it lies in the hub's cache."""
    for name in ("refs", "blobs", "snapshots/abc"):
        (home / name).mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    for file in model.iterdir():
        shutil.copy(file, home / "blobs" / file.name)
        (home / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{file.name}")


@contextmanager
def _worker(scratch: Path, own: dict[str, str]) -> Iterator[dict[str, str]]:
    """The environment of the calls, which a worker serves that ends with them."""
    (scratch / "run").mkdir()
    (scratch / "functions.sh").write_text(FUNCTIONS)
    outside = {
        name: value for name, value in os.environ.items() if not name.startswith(("LLMCLI_", "HF_", "COLORTERM"))
    }
    environment = {
        **outside,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "BASH_ENV": str(scratch / "functions.sh"),
        "LLMCLI_ROOT": str(ROOT),
        "LLMCLI_SERVER": "localhost:9",
        "LLMCLI_KEEP_ALIVE": "10m",
        "HF_HOME": str(scratch / "huggingface"),
        "XDG_CONFIG_HOME": str(scratch / "xdg"),
        "XDG_RUNTIME_DIR": str(scratch / "run"),
        "TERM": "xterm",
        "NO_COLOR": "1",
        "COLUMNS": "80",
        **own,
    }
    try:
        yield environment
    finally:
        subprocess.run(["llmcli", "stop"], env=environment, capture_output=True)
