"""The command line as a whole: help, exit codes, what is imported when."""

import subprocess
import sys

import pytest

COMMANDS = [
    [], ["generate"], ["chat"], ["embed"], ["search"], ["env"], ["models"], ["models", "list"], ["models", "show"],
    ["models", "pull"],
    ["models", "rm"], ["models", "path"],
]  # fmt: skip
HEAVY = ("torch", "transformers", "huggingface_hub", "numpy", "accelerate", "tokenizers")


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [*([*command, "--help"] for command in COMMANDS), ["--version"], ["generate", "--nonsense"], ["models", "nonsense"],
     ["generate", "x", "-o"], ["generate", "--lines", "--csv"], ["generate", "-f", "/missing"]],
    ids=" ".join,
)  # fmt: skip
def test_help_and_usage_errors_import_nothing_heavy(args):
    code = (
        "import sys; from llmcli.cli import main; status = main(sys.argv[1:]);"
        f"print(status, *[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    status, *imported = done.stderr.splitlines()[-1].split()
    assert imported == []
    assert status == ("0" if {"--help", "--version"} & set(args) else "2")


@pytest.mark.parametrize("args", COMMANDS, ids=" ".join)
def test_help_says_what_it_does(llmcli, args):
    ran = llmcli(*args, "-h")
    assert ran.exit_status == 0
    assert ran.stdout.startswith("Usage: llmcli")
    assert ran.stderr == ""


def test_commands_without_groups_have_their_options_in_one(llmcli):
    help = llmcli("models", "pull", "--help").stdout
    assert [line for line in help.splitlines() if line.endswith(":") and not line.startswith(" ")] == ["Options:"]


def test_options_are_grouped_in_help(llmcli):
    help = llmcli("generate", "--help").stdout
    positions = [help.index(f"\n{title}:\n") for title in ("Options", "Input", "Generation", "Model", "Output")]
    assert positions == sorted(positions)


def test_version(llmcli):
    from llmcli import __version__

    assert llmcli("--version").stdout == f"llmcli {__version__}\n"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["generate", "--modle", "x"], "--model"),
        (["generate", "x", "--lines", "--jsonl"], "--lines and --jsonl exclude each other"),
        (["generate", "x", "-f", "missing.txt"], "missing.txt: no such file"),
        (["generate", "x", "-f", "."], ". is a folder"),
        (["generate"], "no input"),
        (["generate", "x", "-o", "out.jsonl"], "--output out.jsonl"),
        (["generate", "x", "-o", "novalue"], "-o takes KEY=VALUE"),
        (["generate", "x", "--batch-size", "0"], "--batch-size"),
        (["generate", "x", "--field", "nonsense=a"], "unknown role 'nonsense'"),
        (["generate", "x", "--prompt", "{"], "--prompt"),
        (["generate", "x", "--prompt", "no field"], "names no field"),
        (["generate", "x", "--stop", ""], "--stop"),
        (["generate", "x", "--prompt", "{text!r}"], "a field is written {name}"),
        (["generate", "--lines", "-n", "2", "x"], "generated_texts"),
        (["generate", "x", "--dtype", "int3"], "--dtype"),
        (["generate", "x", "--max-memory", "much"], "not a size"),
        (["generate", "x", "--device", "gpu"], "unknown device 'gpu'"),
        (["generate", "x", "--seed", "-1"], "--seed"),
        (["chat", "--json"], "no input"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors(llmcli, args, says):
    ran = llmcli(*args)
    assert ran.exit_status == 2
    assert says in ran.stderr
    assert ran.stdout == ""
    assert "Traceback" not in ran.stderr


def test_an_unforeseen_error_is_one_line_and_v_tells_all(llmcli, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("boom")

    monkeypatch.setattr("llmcli.commands.generate.run", broken)
    ran = llmcli("generate", "x")
    assert ran.exit_status == 1
    assert ran.stderr.splitlines()[0] == "llmcli: unexpected RuntimeError: boom"
    assert "report it" in ran.stderr
    assert "Traceback" in llmcli("generate", "x", "-v").stderr
