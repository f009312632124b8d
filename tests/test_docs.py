"""docs/adding-a-task.md is followed to the letter, in a copy of the package; and what README.md shows is so."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "adding-a-task.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
BATCH = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`(src/\S+)`\n\n```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture
def copied(tmp_path, home, tiny):
    """Runs the llmcli of a copy in which the page's files are."""
    shutil.copytree(ROOT / "src", tmp_path / "src")
    for name, code in FILES.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    command = (tmp_path / "src/llmcli/commands/title.py").read_text(encoding="utf-8")
    for old, new in (('job("chat"', 'job("outline"'), ("title", "outline")):
        command = command.replace(old, new)
    (tmp_path / "src/llmcli/commands/outline.py").write_text(command, encoding="utf-8")

    def run(*args):
        env = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
        command = [sys.executable, "-m", "llmcli", *map(str, args)]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)

    return run


@pytest.mark.slow
def test_the_page_gives_two_commands(copied, chatty, tmp_path):
    help = copied("--help").stdout
    assert "title      Give each TEXT a title." in help
    title = json.loads(copied("title", "the quick brown fox", "-m", chatty, "--json").stdout)
    assert title["usage"]["completion_tokens"] > 0
    outline = json.loads(copied("outline", "the quick\n\nbrown fox", "-m", chatty, "--json").stdout)
    assert len(outline["outline"]) == 2
    (tmp_path / "body.jsonl").write_text(json.dumps({"body": "the fox"}))
    outline = json.loads(
        copied("outline", "-m", chatty, "--jsonl", "--field", "body", "-f", tmp_path / "body.jsonl").stdout
    )
    assert len(outline["outline"]) == 1


def test_an_entry_of_ones_own_is_a_model(llmcli, tmp_path, monkeypatch):
    from llmcli import registry

    config = tmp_path / "own" / "config.toml"
    config.parent.mkdir()
    config.write_text("")
    model = ROOT / "tests" / "golden" / "marian"
    (config.parent / "models.toml").write_text(f'[en-fr]\npath = "{model}"\n')
    monkeypatch.setenv("LLMCLI_CONFIG", str(config))
    registry.models.cache_clear()
    ran = llmcli("translate", "the fox", "--to", "fr", "-m", "en-fr", "--max-new-tokens", 4, "--json")
    assert (ran.exit_status, ran.records[0]["from"], ran.records[0]["model"]) == (0, "en", "en-fr")


def shown(page):
    """The command lines in a page's blocks of code: the words after `llmcli`, and the lines printed below."""
    for block in re.findall(r"^```(?:console|sh)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        line, printed = None, []
        for text in [*block.splitlines(), "$"]:
            if text.startswith(("$", "llmcli ")) or " | llmcli " in text:
                if line:
                    yield line, "".join(printed)
                line, printed = text if "llmcli" in text else None, []
            else:
                printed.append(f"{text}\n")


def words(line):
    """What one `llmcli` of a shell line gets as its arguments, less a redirection."""
    found = list(shlex.shlex(line[line.index("llmcli ") :], posix=True, punctuation_chars="<>|"))
    return found[1 : next((i for i, word in enumerate(found) if word in ("<", ">", "|")), None)]


def test_every_option_that_is_shown_is_in_the_help_of_its_command(llmcli):
    lines = [words(line) for page in (README, BATCH) for line, _ in shown(page)]
    assert {line[0] for line in lines} >= {"chat", "generate", "models", "qa", "search", "summarize", "translate"}
    for command, *rest in lines:
        help = llmcli(command, "--help")
        assert help.exit_status == 0, command
        for option in (word for word in rest if re.match("--?[a-z]", word)):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", help.stdout), (command, option)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "printed"),
    [each for each in shown(README) if each[0].startswith(("$ llmcli chat", "$ llmcli translate", "$ llmcli qa"))],
)
def test_what_the_readme_prints_is_what_is_printed(llmcli, real_cache, line, printed):
    ran = llmcli(*words(line), "--dtype", "float32")
    assert (ran.stdout, ran.exit_status) == (printed, 0)
