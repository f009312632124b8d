"""docs/adding-a-task.md is followed to the letter, in a copy of the package; and what all pages show is so."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pages
import pytest
import reference
import sandbox
from test_endpoint import Server

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "adding-a-task.md").read_text(encoding="utf-8")
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
    from llmcli.models import registry

    config = tmp_path / "own" / "config.toml"
    config.parent.mkdir()
    config.write_text("")
    model = ROOT / "tests" / "golden" / "marian"
    (config.parent / "models.toml").write_text(f'[en-fr]\npath = "{model}"\n')
    monkeypatch.setenv("LLMCLI_CONFIG", str(config))
    registry.models.cache_clear()
    ran = llmcli("translate", "the fox", "--to", "fr", "-m", "en-fr", "--max-new-tokens", 4, "--json")
    assert (ran.exit_status, ran.records[0]["from"], ran.records[0]["model"]) == (0, "en", "en-fr")


# The command lines of all pages


def distinct_blocks():
    """The blocks of all pages. A block that several pages show, as the Chinese ones do, is run once."""
    blocks = {}
    for path in pages.pages():
        for block in pages.blocks(path):
            lines = tuple((_without_comment(command.line), *command.shown) for command in block.commands)
            blocks.setdefault((block.console, block.varies, lines), block)
    return list(blocks.values())


def _without_comment(line):
    return re.sub(r"\s+#\s.*", "", line)


SHOWN = distinct_blocks()
TOOLS = {"jq", "parallel"}  # that a reader may not have


def skip_without_tools(block):
    lines = " ".join(command.line for command in block.commands)
    missing = [tool for tool in TOOLS if re.search(rf"\b{tool} ", lines) and not shutil.which(tool)]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")


@pytest.fixture(scope="module")
def with_real_models(smollm2):
    with tempfile.TemporaryDirectory(prefix="llmcli") as scratch, sandbox.real(Path(scratch)) as (folder, environment):
        for name in ("gemma3-270m", "minilm"):
            subprocess.run(["llmcli", "models", "pull", name], env=environment, check=True)
        yield folder, environment


@pytest.fixture(scope="module")
def calm(chatty, tmp_path_factory):
    """The tiny chat model, less sure of its nonsense: a perplexity of some hundreds."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(chatty, tmp_path_factory.mktemp("models") / "calm")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] *= 0.1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def with_tiny_models(calm, encoder):
    server = Server()
    with (
        tempfile.TemporaryDirectory(prefix="llmcli") as scratch,
        sandbox.tiny(Path(scratch), calm, encoder, f"127.0.0.1:{server.server_port}") as (folder, environment),
    ):
        yield folder, environment
    server.shutdown()


@pytest.fixture
def copy(tmp_path):
    """Of a folder, for one block to do what it likes in."""
    return lambda folder: shutil.copytree(folder, tmp_path / "here")


@pytest.mark.parametrize(
    ("shown", "printed", "is_so"),
    [
        (["327325.0 for -12.6987"], ["327337.0 for -12.6988"], True),  # as far as float32 goes
        (["0.0430"], ["0.0433"], False),
        (["1.5 and 2.5"], ["1.5 and 2.8"], False),
        (["1938"], ["1939"], False),
        (["Paris 0.5"], ["London 0.5"], False),
        (["# 0.5"], ["0.5 #"], False),
        (["#"], ["0.5"], False),
        (["a", "...", "d"], ["a", "b", "c", "d"], True),
        (["a"], ["a", "b"], False),
    ],
)
def test_when_a_page_tells_the_truth(shown, printed, is_so):
    assert pages.agrees(shown, printed) is is_so


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in SHOWN if block.console], ids=str)
def test_what_a_page_prints_is_what_is_printed(block, with_real_models, copy):
    skip_without_tools(block)
    folder, environment = with_real_models
    ran = pages.follow(block.commands, copy(folder), environment)
    asks = [command.line == "echo $?" for command in block.commands[1:]] + [False]
    for command, each, is_asked in zip(block.commands, ran, asks, strict=True):
        assert each.status == 0 or is_asked, (command.line, each)
        if not block.varies:
            assert pages.agrees(command.shown, each.lines), (command.line, command.shown, each.lines)


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in SHOWN if not block.console], ids=str)
def test_what_a_page_has_one_run_runs(block, with_tiny_models, copy):
    skip_without_tools(block)
    folder, environment = with_tiny_models
    (ran,) = pages.follow(block.commands, copy(folder), environment)
    assert ran.status == 0, ran


def examples():
    """The examples in the help of every command."""
    for command in reference.commands():
        for line in reference.help(command).partition("\nOptions:\n")[0].splitlines():
            found = re.fullmatch(r" *((?:\S+ .*\| )?llmcli .*?)(?:  +.*)?", line)
            if found and "Usage:" not in line:
                yield pytest.param(found[1], id=found[1])


@pytest.mark.slow
@pytest.mark.parametrize("line", [*examples()])
def test_what_a_help_has_one_run_runs(line, with_tiny_models, copy):
    folder, environment = with_tiny_models
    (ran,) = pages.follow([pages.Command(f"(set -o pipefail; {line})")], copy(folder), environment)
    assert ran.status == 0, ran


def test_every_command_has_an_example():
    groups = {(), ("models",), ("inspect",)}
    for command in {*reference.commands()} - groups:
        assert f"\n  llmcli {' '.join(command)}" in reference.help(command), command


def test_the_reference_is_what_the_commands_say():
    assert (ROOT / "docs" / "reference.md").read_text(encoding="utf-8") == reference.page(), "`make docs` writes it"


def test_chinese_page_has_the_blocks_of_the_english_page():
    """It may have more blocks, and other comments."""
    for chinese in sorted([*ROOT.glob("*.zh.md"), *ROOT.glob("docs/*.zh.md")]):
        ours, theirs = (
            [
                (block.varies, [(_without_comment(command.line), command.shown) for command in block.commands])
                for block in pages.blocks(path)
            ]
            for path in (chinese, chinese.with_name(chinese.name.replace(".zh.", ".")))
        )
        remaining = iter(ours)
        missing = [block for block in theirs if block not in remaining]
        assert not missing, (chinese.name, missing)


def test_links_lead_to_pages_and_headings():
    for path in pages.pages():
        for link, _, heading in re.findall(r"\]\(([^)#]*)(#([^)]*))?\)", path.read_text(encoding="utf-8")):
            target = path.parent / link if link else path
            assert link.startswith("https://") or target.exists(), (path.name, link)
            if heading and not link.startswith("https://"):
                assert heading in _anchors(target), (path.name, link, heading)


def _anchors(path):
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {
        re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("next", ["next", "The capital of France is"]),
        ("attention", ["attention", "The cat sat on the mat because it was tired"]),
    ],
)
def test_pictures_are_what_the_tool_draws(llmcli, real_cache, smollm2, tmp_path, name, args):
    assert llmcli("inspect", *args, "--dtype", "float32", "--svg", tmp_path / "drawn.svg").exit_status == 0
    drawn, shown = (
        path.read_text(encoding="utf-8") for path in (tmp_path / "drawn.svg", ROOT / f"docs/pictures/{name}.svg")
    )
    assert re.sub("#[0-9a-f]{6}", "", drawn) == re.sub("#[0-9a-f]{6}", "", shown)  # colours may differ by a shade
