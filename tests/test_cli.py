"""The command line as a whole: help, exit codes, what is imported when."""

import os
import signal
import subprocess
import sys

import pytest

COMMANDS = [
    [], ["generate"], ["chat"], ["embed"], ["search"], ["env"], ["models"], ["models", "list"], ["models", "show"],
    ["models", "pull"], ["score"], ["inspect"], ["inspect", "next"], ["inspect", "tokens"],
    ["models", "rm"], ["models", "path"], ["merge"],
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
    assert "\nChat template:\n  --think" in llmcli("chat", "--help").stdout


@pytest.mark.slow
def test_help_in_narrow_terminal_has_whole_words(process):
    help = process("classify", "--help", env={**os.environ, "COLUMNS": "40"}).stdout.decode()
    assert "\n                probabilities for an\n" in help


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version(llmcli, option):
    from llmcli import __version__

    assert llmcli(option).stdout == f"llmcli {__version__}\n"


@pytest.mark.parametrize("command", [[], ["chat"], ["models"], ["models", "list"]], ids=" ".join)
def test_help_command_is_the_help_option(llmcli, command):
    ran = llmcli("help", *command)
    assert ran == llmcli(*command, "--help")
    assert ran.exit_status == 0


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (["generate", "X"], "TEXT"),
        (["generate", "fine", "X"], "TEXT"),
        (["score", "X"], "TEXT"),
        (["chat", "X"], "TEXT"),
        (["chat", "Hi", "-s", "X"], "--system"),
        (["generate", "Hi", "--prompt", "{text} X"], "--prompt"),
        (["generate", "Hi", "--stop", "a", "--stop", "X"], "--stop"),
        (["generate", "Hi", "-m", "X"], "--model"),
        (["generate", "Hi", "-o", "X=1"], "--option"),
        (["generate", "Hi", "--field", "X"], "--field"),
        (["generate", "Hi", "--preset", "X"], "--preset"),
        (["translate", "Hi", "--to", "X"], "--to"),
        (["qa", "X", "-c", "Hi"], "QUESTION"),
        (["qa", "Hi", "-c", "X"], "--context"),
        (["search", "X"], "QUERY"),
        (["inspect", "tokens", "X"], "TEXT"),
        (["models", "show", "X"], "NAME"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bytes_that_are_not_utf8_are_a_usage_error(llmcli, args, name):
    ran = llmcli(*[arg.replace("X", "é caf\udce9") for arg in args], stdin=b"")
    offset = 6 + len("{text} " * ("--prompt" in args))
    assert ran.exit_status == 2
    assert ran.stderr.splitlines()[0] == f"error: {name}: not UTF-8: byte 0xe9 at offset {offset}"
    assert ran.stdout == ""


def test_file_name_that_is_not_utf8_is_read(llmcli, tiny, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path / "caf") + b"\xe9")
    with open(path, "w") as file:
        file.write("the quick")
    args = ("-m", tiny, "--max-new-tokens", 2, "--output", f"{path}.out")
    assert llmcli("generate", "-f", path, *args).exit_status == 0
    assert os.path.exists(f"{path}.out")


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.slow
def test_c_locale_reads_arguments_as_utf8(process, tiny, tmp_path):
    (tmp_path / "café.txt").write_text("naïve", encoding="utf-8")
    args = ("chat", "où", "-s", "déjà", "--stop", "ü", "-f", tmp_path / "café.txt", "-m", tiny, "--temperature", 0,
            "--max-new-tokens", 2, "--json")  # fmt: skip
    ran = [process(*args, env=os.environ | env, cwd=tmp_path) for env in ({"LC_ALL": "C.UTF-8"}, C_LOCALE)]
    assert ran[0].returncode == ran[1].returncode == 0, ran[1].stderr
    assert ran[0].stdout == ran[1].stdout
    assert "où" in ran[1].stdout.decode()
    args = ("generate", "où", "-m", tiny, "--max-new-tokens", 2, "--output", "été.txt")
    assert process(*args, env=os.environ | C_LOCALE, cwd=tmp_path).returncode == 0
    assert (tmp_path / "été.txt").read_text(encoding="utf-8").startswith("où")


def test_deleted_working_directory_is_named(llmcli, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for args in (["-f", "notes.txt"], ["the", "--output", "x"], ["the", "-m", "./model"]):
        ran = llmcli("generate", *args)
        assert (ran.exit_status, ran.stderr) == (1, "error: the working directory: No such file or directory\n")


@pytest.mark.parametrize(
    "command", [["generate"], ["chat"], ["summarize"], ["score"], ["qa", "who?"], ["generate", "-f", "empty"]]
)
def test_empty_input_warns_and_succeeds(llmcli, chatty, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_bytes(b"\n")
    ran = llmcli(*command, "-m", chatty, stdin=b"")
    assert (ran.stderr, ran.exit_status) == ("warning: input is empty\n", 0)
    assert ran.stdout in ("\n", "-\t\n")


@pytest.mark.parametrize("flag", ["--lines", "--jsonl", "--csv", "--null"])
def test_empty_input_of_records_has_no_records(llmcli, tiny, flag):
    ran = llmcli("generate", flag, "-m", tiny, stdin=b"")
    assert (ran.stdout, ran.stderr, ran.exit_status) == ("", "", 0)


def test_empty_file_beside_a_text_is_noticed(llmcli, chatty, tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    ran = llmcli("chat", "the quick", "-f", tmp_path / "empty", "-m", chatty, "--max-new-tokens", 2)
    assert (ran.stderr, ran.exit_status) == ("warning: input is empty\n", 0)
    assert llmcli("generate", "", "-m", chatty).stderr == ""


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["generate", "--modle", "x"], "--model"),
        (["generate", "x", "--lines", "--jsonl"], "--lines cannot be used with --jsonl"),
        (["generate", "x", "-f", "missing.txt"], "missing.txt: no such file"),
        (["generate", "x", "-f", "."], "'.' is a directory"),
        (["generate"], "no input"),
        (["generate", "x", "-o", "out.jsonl"], "--output out.jsonl"),
        (["generate", "x", "-o", "novalue"], "-o requires KEY=VALUE, got 'novalue'"),
        (["generate", "x", "--batch-size", "0"], "--batch-size"),
        (["generate", "x", "--field", "nonsense=a"], "unknown role 'nonsense'"),
        (["generate", "x", "--prompt", "{"], "--prompt"),
        (["generate", "x", "--prompt", "no field"], "--prompt has no placeholder"),
        (["generate", "x", "--stop", ""], "--stop"),
        (["generate", "x", "--prompt", "{text!r}"], "invalid placeholder, expected {name}"),
        (["generate", "--lines", "-n", "2", "x"], "generated_texts"),
        (["generate", "x", "--dtype", "int3"], "--dtype"),
        (["generate", "x", "--max-memory", "much"], "invalid size 'much'"),
        (["generate", "x", "--device", "gpu"], "unknown device 'gpu'"),
        (["generate", "x", "--seed", "-1"], "--seed"),
        (["chat", "--json"], "no input"),
        (["--offline", "chat", "hi"], "hint: put options after the command: llmcli COMMAND --offline"),
        (["-m", "smollm2", "chat", "hi"], "hint: put options after the command: llmcli COMMAND -m"),
        (["models", "--offline", "list"], "hint: put options after the command: llmcli models COMMAND --offline"),
        (["help", "nonsense"], "No such command 'nonsense'"),
        (["chat", "how", "are", "you"], "hint: quote a text of several words; name a file with -f"),
        (
            ["inspect", "next", "once", "upon", "a", "time"],
            "hint: quote a text of several words; name a file with -f",
        ),
        (["score", "-1 degrees"], "hint: put text that starts with '-' after '--': llmcli score -- TEXT"),
        (
            ["inspect", "next", "--the end"],
            "hint: put text that starts with '-' after '--': llmcli inspect next -- TEXT",
        ),
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
    assert ran.stderr.splitlines()[0] == "error: unexpected RuntimeError: boom"
    assert "report it" in ran.stderr
    assert "Traceback" in llmcli("generate", "x", "-v").stderr


def test_what_may_have_been_meant(llmcli, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("the quick")
    ran = llmcli("score", "notes.txt", "-m", tiny)
    assert ran.stderr == "note: 'notes.txt' is treated as text; to read the file, use -f notes.txt\n"
    ran = llmcli("score", "once", "upon", "time", "-m", tiny, is_terminal=True)
    assert "note: got 3 one-word texts; quote the words to pass a single text\n" in ran.stderr
    assert len(ran.stdout.splitlines()) == 3
    assert llmcli("score", "once", "upon", "time", "-m", tiny).stderr == ""
    assert "quote" not in llmcli("score", "好天气", "狗", "太阳", "x" * 5000, "-m", tiny, is_terminal=True).stderr
    assert "quote" not in llmcli("models", "show", "smollm2", "x").stderr
    assert "after" not in llmcli("score", "--modle=a b", "x").stderr


COMPLETIONS = [
    ("llmcli generate -m smo", {"smollm2", "smollm2-360m", "smollm2-1.7b"}),
    ("llmcli models pull min", {"minilm"}),
    ("llmcli inspect tokens x -m gem", {"gemma3-270m"}),
    ("llmcli translate --to z", {"zh"}),
    ("llmcli generate --preset po", {"poem"}),
    ("llmcli generate --device cu", {"cuda"}),
    ("llmcli score --max-p", {"--max-perplexity"}),
    ("llmcli inspect ", {"tokens", "next", "attention"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("typed", "offered"), COMPLETIONS)
def test_a_shell_completes_and_imports_nothing_heavy(typed, offered):
    code = (
        "import sys; from llmcli.cli import main; main();"
        f"print(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    asked = {"_LLMCLI_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split(" ")) - 1)}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True)
    assert set(done.stdout.split()) >= offered
    assert all(word.lower().startswith(typed.split(" ")[-1].lower()) for word in done.stdout.split())
    assert done.stderr == "\n"


def test_a_broken_file_of_ones_own_offers_nothing(tmp_path, monkeypatch):
    from llmcli.models import registry
    from llmcli.options import completion

    (tmp_path / "models.toml").write_text("[x\n")
    monkeypatch.setenv("LLMCLI_CONFIG", str(tmp_path / "config.toml"))
    registry.models.cache_clear()
    assert completion.models("") == []


@pytest.mark.parametrize(("rank", "size"), [("x", "2"), ("0", ""), ("", "2"), ("0", "0"), ("-1", "2")])
def test_rank_that_is_no_number_starts_no_distributed_run(llmcli, rank, size, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    assert llmcli("generate", "--jsonl", stdin=b"").exit_status == 0


def test_system_exit_with_text_is_a_failure(llmcli, monkeypatch):
    monkeypatch.setattr("llmcli.commands.generate.run", lambda *args: sys.exit("no more"))
    ran = llmcli("generate", "x")
    assert (ran.exit_status, ran.stderr) == (1, "error: no more\n")


def test_main_restores_the_sigterm_handler(llmcli):
    def handler(signum, frame):
        raise AssertionError

    before = signal.signal(signal.SIGTERM, handler)
    try:
        assert llmcli("--version").exit_status == 0
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
