"""Commands and tasks of other packages: found by their entry points, imported when they are called, never fatal."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmcli.tasks import load_task, plugins

PAGE = (Path(__file__).parent.parent / "docs" / "adding-a-task.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`(llmcli-keywords/\S+)`\n\n```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install("pkg", {"commands": {"hi": "mod:hi"}}, "mod", code)` puts a package on the path."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def write(package, groups, module, code):
        info = folder / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [
            line
            for group, points in groups.items()
            for line in (f"[llmcli.{group}]", *(f"{name} = {target}" for name, target in points.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        (folder / f"{module}.py").write_text(code)
        plugins.find_plugins.cache_clear()
        monkeypatch.delitem(sys.modules, module, raising=False)

    yield write
    plugins.find_plugins.cache_clear()


HELLO = "def hello(name: str = 'you') -> None:\n    '''Greet somebody.'''\n    print('hello', name)\n"


def test_plugin_command_is_listed_but_not_imported(llmcli, install):
    install("greeter", {"commands": {"hello": "greeter_module:hello"}}, "greeter_module", HELLO)
    assert re.search(r"^  hello +Run a plugin\.$", llmcli("--help").stdout, re.MULTILINE)
    assert "greeter_module" not in sys.modules
    assert llmcli("generate", "--help").exit_status == 0
    assert (llmcli("hello", "--name", "Ann").stdout, "greeter_module" in sys.modules) == ("hello Ann\n", True)
    help = llmcli("hello", "--help").stdout
    assert help.startswith("Usage: llmcli hello [OPTIONS]")
    assert "Greet somebody." in help
    assert "completion" not in help
    ran = llmcli("hello", "--nam", "Ann")
    assert (ran.exit_status, ran.stdout) == (2, "")


def test_plugin_command_may_be_a_group(llmcli, install):
    code = f"import typer\napp = typer.Typer()\n{HELLO}app.command()(hello)\napp.command('bye')(lambda: print('bye'))\n"
    install("greeter", {"commands": {"greet": "greeter_group:app"}}, "greeter_group", code)
    assert llmcli("greet", "bye").stdout == "bye\n"
    assert "llmcli greet" in llmcli("greet", "--help").stdout


BROKEN = {
    "absent:hello": "No module named 'absent'",
    "broken:missing": "has no attribute 'missing'",
    "broken:TEXT": "expected Callable, got 'x'",
}


@pytest.mark.parametrize("target", BROKEN)
def test_broken_plugin_fails_alone(llmcli, install, target):
    install("faulty", {"commands": {"hello": target}}, "broken", "TEXT = 'x'\n")
    assert llmcli("--help").stderr == ""
    assert "hello" in llmcli("--help").stdout
    assert llmcli("models", "list").exit_status == 0
    ran = llmcli("hello")
    assert (ran.exit_status, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: 'hello' of the package faulty cannot be loaded: ")
    assert BROKEN[target] in ran.stderr
    assert ran.stderr.count("\n") == 2


def test_plugin_file_that_is_invalid_draws_one_warning(llmcli, install, tmp_path):
    install("greeter", {"commands": {"hello": "greeter_module:hello"}}, "greeter_module", HELLO)
    install("faulty", {}, "nothing", "")
    (tmp_path / "site" / "faulty-1.0.dist-info" / "entry_points.txt").write_text("[llmcli.commands]\nnothing\n")
    plugins.find_plugins.cache_clear()
    ran = llmcli("--help")
    assert ran.stderr.startswith("warning: plugins of faulty cannot be read: ")
    assert (ran.stderr.count("\n"), "hello" in ran.stdout) == (1, True)
    assert llmcli("generate", "--help").stderr == ""


def test_plugin_with_a_name_that_is_taken_is_ignored(llmcli, install):
    install(
        "rival", {"commands": {"generate": "rival:run", "hello": "rival:run"}}, "rival", "def run(): print('rival')"
    )
    install("greeter", {"commands": {"hello": "greeter_module:hello"}}, "greeter_module", HELLO)
    ran = llmcli("--help")
    assert sorted(ran.stderr.splitlines())[0].startswith("warning: 'generate' of rival is ignored")
    assert ran.stderr.count("warning: 'hello' of ") == 1
    assert ran.stdout.count(" hello ") == 1
    assert "Generate text from a prompt." in llmcli("generate", "--help").stdout


def test_plugin_task_has_to_be_a_task(install):
    from llmcli.errors import UsageError

    install("faulty", {"tasks": {"shout": "faulty_task:TASK"}}, "faulty_task", "TASK = 3\n")
    for name in ("shout", "nothing"):
        with pytest.raises(UsageError, match=name):
            load_task(name)


@pytest.fixture
def page(install, tmp_path):
    """The package of the page, without its installation."""
    text = FILES["llmcli-keywords/pyproject.toml"]
    points = dict(re.findall(r'^keywords = "(llmcli_keywords\.(command|task):\w+)"$', text, re.MULTILINE))
    targets = {f"{group}s": {"keywords": target} for target, group in points.items()}
    install("llmcli-keywords", targets, "unused", "")
    for name in ("task", "command"):
        file = tmp_path / "site" / "llmcli_keywords" / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(FILES[f"llmcli-keywords/llmcli_keywords/{name}.py"])


def test_plugin_of_the_page_reads_records(llmcli, page, speaker, tmp_path):
    model = speaker(["- fox\n", "- dog\n", "sun"])
    ran = llmcli("keywords", "It is warm.", " ", "-m", model)
    assert (ran.exit_status, ran.stdout) == (0, "fox, dog, sun\n\n"), ran.stderr
    lines = '{"body": "x", "id": 1}\n{"id": 2}\n'
    command = ["keywords", "--jsonl", "--field", "body", "-m", model, "--limit", 2]
    ran = llmcli(*command, "--output", tmp_path / "out", "--resume", stdin=lines.encode())
    records = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert (ran.exit_status, records[0]["keywords"], records[0]["id"]) == (3, ["fox", "dog"], 1)
    assert records[1]["error"]["type"] == "missing_field"
    ran = llmcli("keywords", "--help")
    assert "Maximum number of keywords" in ran.stdout
    assert "--endpoint" in ran.stdout


@pytest.mark.slow
def test_page_of_plugins_is_installed_by_pip(chatty, tmp_path):
    for name, code in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(tmp_path / "site")]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", *options, str(tmp_path / "llmcli-keywords")]
    subprocess.run(pip, check=True, capture_output=True)
    paths = [str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "llmcli", "keywords", "the quick brown fox", "-m", str(chatty), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    )
    assert json.loads(done.stdout)["usage"]["completion_tokens"] > 0
