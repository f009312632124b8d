"""--shard and merge: what several runs write, put together, is what one run writes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import WORDS
from test_endpoint import Server

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "array-jobs.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"^```(bash|yaml)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
TEXTS = [
    "fine 0",
    "long 1",
    "",
    "fine\n3",
    "fine 4",
    'a "quoted", b',
    " ",
    "long\r\n7",
    "fine 8",
    "é\u2028 9",
    "fine 10",
]
WHOLE = {
    "jsonl": "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)) + "{not JSON\n\n{}\n",
    "csv": "id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(text.replace('"', '""') for text in TEXTS))
    + "11,too,many\n12,last\n",
    "lines": "".join(" ".join(text.split("\n")) + "\n" for text in TEXTS),
    "null": "".join(text + "\0" for text in TEXTS),
}  # fmt: skip


@pytest.fixture
def runs(llmcli, monkeypatch, tmp_path):
    """`runs("jsonl", "--shard", "0/4")` answers each record by a server; a text that begins with `long` fails."""
    monkeypatch.chdir(tmp_path)
    for format, text in WHOLE.items():
        (tmp_path / f"in.{format}").write_text(text, encoding="utf-8", newline="")
    server = Server()
    args = ("--endpoint", server.url, "-m", "tiny")
    yield lambda format, *more: llmcli("chat", f"--{format}", "-f", f"in.{format}", *args, *more)
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("format", "count"), [*((format, 4) for format in WHOLE), ("csv", 1), ("jsonl", 16)])
def test_merged_shards_equal_one_run(runs, llmcli, tmp_path, format, count):
    whole = runs(format, "--output", "whole")
    assert whole.exit_status == 3
    errors = set(whole.stderr.splitlines()[:-1])
    for i in range(count):
        ran = runs(format, "--shard", f"{i}/{count}", "--output", f"out.{i}")
        errors -= set(ran.stderr.splitlines())
    assert not errors
    shuffled = [f"out.{i}" for i in range(count)][::-1]
    logs = [f"{name}.state" for name in shuffled]
    assert llmcli("merge", *shuffled, *logs, "--output", "merged").exit_status == 0
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("format", WHOLE)
def test_merge_without_states_takes_shards_in_order(runs, llmcli, tmp_path, format):
    for i in range(3):
        (tmp_path / f"out.{i}").write_text(runs(format, "--shard", f"{i}/3").stdout, newline="")
    ran = llmcli("merge", f"--{format}", *[f"out.{i}" for i in range(3)])
    assert (ran.stdout, ran.stderr, ran.exit_status) == (runs(format).stdout, "", 0)
    ran = llmcli("merge", f"--{format}", "out.2", "out.1", "out.0")
    assert (ran.exit_status, "a result is missing: 'out.2' ends before 'out." in ran.stderr) == (2, True)
    (tmp_path / "more").write_bytes((tmp_path / "out.0").read_bytes() * 2)
    ran = llmcli("merge", f"--{format}", "out.0", "more", "--output", "never")
    assert (ran.exit_status, ran.stderr.splitlines()[0]) == (
        2, "error: a result is missing: 'out.0' ends before 'more'"
    )  # fmt: skip
    assert not (tmp_path / "never").exists()


def test_merge_refuses_what_does_not_fit(runs, llmcli, tmp_path):
    for i in range(3):
        runs("jsonl", "--shard", f"{i}/3", "--output", f"out.{i}.jsonl")
    runs("jsonl", "--shard", "1/3", "--output", "seed.jsonl", "--seed", 1)
    runs("jsonl", "--output", "all.jsonl", "--resume")
    runs("jsonl", "--shard", "1/3", "--output", "stopped.jsonl", "--on-error", "stop")
    (tmp_path / "in.jsonl").write_text(WHOLE["jsonl"] + "\n{}\n")
    runs("jsonl", "--shard", "1/3", "--output", "input.jsonl")
    for name, old, new in (("changed", b"fine 4", b"fine 40"), ("cut", b"}\n", b""), ("long", b"", b"{}\n")):
        text = (tmp_path / "out.1.jsonl").read_bytes()
        (tmp_path / f"{name}.jsonl").write_bytes(text.replace(old, new) if old else text + new)
        (tmp_path / f"{name}.jsonl.state").write_bytes((tmp_path / "out.1.jsonl.state").read_bytes())
    for end in ("jsonl", "jsonl.state"):
        (tmp_path / f"copy.{end}").write_bytes((tmp_path / f"out.2.{end}").read_bytes())
    (tmp_path / "odd.jsonl").write_text("{}\n")
    (tmp_path / "odd.jsonl.state").write_text("[]\n")
    (tmp_path / "x.csv").write_text("a\n1\n")
    (tmp_path / "y.csv").write_text("b\n1\n")
    (tmp_path / "text.jsonl").write_text("text\n")
    (tmp_path / "half").write_text("{}")
    (tmp_path / "table").write_bytes(b"PAR1")
    one, other = "out.0.jsonl", "out.2.jsonl"
    for files, message in (
        ([one, other], "expected shard 0 of 2, got 'out.0.jsonl', which is shard 0/3"),
        ([one, other, other], "'out.2.jsonl' is given twice"),
        ([one, other, "copy.jsonl"], "expected shard 1 of 3, got 'out.2.jsonl', which is shard 2/3"),
        ([one, "long.jsonl", other], "'long.jsonl' has changed since its run"),
        ([one, "seed.jsonl", other], "'out.0.jsonl' and 'seed.jsonl' are outputs of different commands or inputs"),
        ([one, "input.jsonl", other], "'out.0.jsonl' and 'input.jsonl' are outputs of different commands or inputs"),
        ([one, "all.jsonl", other], "'all.jsonl.state' is not the state of a run with --shard"),
        ([one, "odd.jsonl", other], "'odd.jsonl.state' is not the state of a run with --shard"),
        ([one, "stopped.jsonl", other], "'stopped.jsonl' is not complete"),
        ([one, "changed.jsonl", other], "'changed.jsonl' has changed since its run"),
        ([one, "cut.jsonl", other], "'cut.jsonl' ends in the middle of a result"),
        (["y.csv", one, other], "expected shard 1 of 3, got 'out.0.jsonl', which is shard 0/3"),
        (["x.csv", "y.csv"], "'x.csv' and 'y.csv' are of different headers"),
        (["x.csv", "text.jsonl"], "'x.csv' and 'text.jsonl' are of different formats"),
        (["text.jsonl"], "'text.jsonl' is not JSON Lines"),
        (["table"], "'table' is Parquet, which merge does not read"),
        (["half"], "'half' ends in the middle of a result"),
        (["missing"], "missing: no such file or directory"),
        (["."], ".: is a directory"),
    ):
        ran = llmcli("merge", *files, "--output", "merged")
        assert (ran.exit_status, ran.stderr.splitlines()[0]) == (2, f"error: {message}"), files
        assert not (tmp_path / "merged").exists()
    assert llmcli("merge", "--csv", "--null", "half").exit_status == 2


def test_merge_refuses_file_that_exists(llmcli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text("1\n")
    assert llmcli("merge", "a", "--output", "a").exit_status == 2
    assert (tmp_path / "a").read_text() == "1\n"


def test_merge_sanitizes_terminal(llmcli, tmp_path):
    (tmp_path / "a").write_text("\x1b]0;title\x07\n")
    assert "\x1b" not in llmcli("merge", tmp_path / "a", is_terminal=True).stdout
    assert "\x1b" in llmcli("merge", tmp_path / "a").stdout


def test_shard_resumes_only_itself(runs, tmp_path):
    args = ("jsonl", "--output", "out", "--resume", "--shard")
    first = runs(*args, "1/4")
    whole = (tmp_path / "out").read_bytes()
    (tmp_path / "out").write_bytes(whole[: len(whole) // 2])
    assert (runs(*args, "1/4").exit_status, (tmp_path / "out").read_bytes()) == (first.exit_status, whole)
    for other in ("0/4", "1/2", "1/5"):
        ran = runs(*args, other)
        assert (ran.exit_status, "the command has changed" in ran.stderr) == (2, True)


def test_shard_counts_are_its_own(runs):
    ran = runs("jsonl", "--shard", "1/4", "--stats")
    statistics = json.loads(ran.stderr.splitlines()[-1])
    assert (statistics["records"], statistics["failed"]) == (4, 2)
    assert "in.jsonl:2: " in ran.stderr
    assert "error: 2 of 4 records failed" in ran.stderr


def test_shard_takes_arguments_and_files(llmcli, base, tmp_path):
    (tmp_path / "in").write_text("the fox")
    args = ("generate", "-m", base, "--max-new-tokens", 1, "--json", "--shard")
    assert [record["text"] for record in llmcli(*args, "1/2", "a", "the", "dog", "quick").records] == ["the", "quick"]
    assert llmcli(*args, "0/2", "-f", tmp_path / "in", "-f", tmp_path / "in").records[0]["text"] == "the fox"
    assert llmcli(*args, "3/4", "a") == llmcli("merge", os.devnull)


def test_shards_with_seed_sample_independently(llmcli, base):
    args = ("generate", "--lines", "-m", base, "--max-new-tokens", 8, "--seed", 1, "--shard")
    texts = [llmcli(*args, shard, stdin=b"the fox\n" * 2).stdout for shard in ("0/2", "1/2", "1/2")]
    assert texts[0] != texts[1] == texts[2]


def test_merge_knows_records_that_filter_dropped(llmcli, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").write_text("".join(f"the {word} fox\n" for word in WORDS[:10]))
    args = ("score", "--lines", "-f", "in", "-m", base, "--dtype", "float32")
    numbers = [float(line.split()[0]) for line in llmcli(*args).stdout.splitlines()]
    args = (*args, "--max-perplexity", sorted(numbers)[4])
    for i in range(3):
        llmcli(*args, "--shard", f"{i}/3", "--output", f"out.{i}")
    ran = llmcli("merge", "out.2", "out.1", "out.0")
    assert (ran.stdout, ran.exit_status) == (llmcli(*args).stdout, 0)
    assert 0 < len(ran.stdout.splitlines()) < len(numbers)


@pytest.mark.parametrize("value", ["4/4", "5/4", "0/0", "-1/4", "1", "a/b", "1/", "", "1 of 4"])
def test_shard_rejects_invalid_value(llmcli, value):
    ran = llmcli("generate", f"--shard={value}", "the")
    assert (ran.exit_status, ran.stderr.splitlines()[0]) == (2, f"error: invalid --shard {value!r}")


def test_shard_refuses_torchrun_and_search(llmcli, monkeypatch):
    assert "search does not support" in llmcli("search", "the", "--shard", "0/2", stdin=b"a").stderr
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran = llmcli("generate", "the", "--shard", "0/2")
    assert ran.stderr.startswith("error: --shard cannot be used with torchrun\n")
    assert ran.exit_status == 2


@pytest.mark.slow
def test_parallel_processes_merged_equal_one_run(llmcli, tiny, many_lines, tmp_path):
    args = ["generate", "-m", str(tiny), "--jsonl", "-f", str(many_lines(301)), "--temperature", "0",
            "--max-new-tokens", "8", "--dtype", "float32"]  # fmt: skip
    command = [sys.executable, "-m", "llmcli", *args]
    paths = [tmp_path / f"out.{i}" for i in range(4)]
    running = [
        subprocess.Popen([*command, "--shard", f"{i}/4", "--output", path], stderr=subprocess.DEVNULL)
        for i, path in enumerate(paths)
    ]
    whole = llmcli(*args).stdout
    assert [process.wait() for process in running] == [3, 0, 3, 0]  # Every 50th record fails.
    assert llmcli("merge", *paths).stdout == whole


@pytest.fixture
def shell(tmp_path):
    """Runs a script where each tool prints its arguments and exits with 3, as if some records had failed."""
    for tool in ("llmcli", "sbatch", "hf", "parallel", "pip", "cp"):
        path = tmp_path / "bin" / tool
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\necho {tool} "$@"\n[ {tool} != llmcli ] || exit 3\n')
        path.chmod(0o755)

    def run(script, *shell, **variables):
        environment = os.environ | variables | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        return subprocess.run([*(shell or ("bash", "-c")), script], env=environment, capture_output=True, text=True)

    return run


def recipe(word):
    return next(code for _, code in RECIPES if word in code)


def test_recipe_of_slurm_names_shard_and_accepts_failures(shell):
    ran = shell(recipe("#SBATCH"), SLURM_ARRAY_TASK_ID="2")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "--shard 2/4 --output out.2.jsonl --resume" in ran.stdout
    assert "afterok:sbatch --parsable" in shell(recipe("afterok")).stdout


def test_recipe_of_kubernetes_names_shard(shell):
    spec = yaml.safe_load(recipe("apiVersion"))["spec"]
    container = spec["template"]["spec"]["containers"][0]
    ran = shell(*container["args"], *container["command"], JOB_COMPLETION_INDEX="3")
    assert f"--shard 3/{spec['completions']} --output /data/out.3.jsonl --resume" in ran.stdout
    assert ran.returncode == 0


def test_recipe_of_hub_jobs_copies_output_and_state(shell):
    submitted = shell(recipe("hf jobs")).stdout
    assert [f"--shard {i}/4" in submitted for i in range(5)] == [True] * 4 + [False]
    script = submitted.partition(" sh -c ")[2].partition("hf jobs run")[0]
    ran = shell(script, "sh", "-c")
    assert ran.stdout.splitlines()[1:] == [
        "llmcli generate --jsonl -f /data/in.jsonl --shard 0/4 --output out.0.jsonl",
        "cp out.0.jsonl out.0.jsonl.state /data/",
    ]


def test_shard_with_text_output_is_refused(llmcli, base, tmp_path):
    (tmp_path / "a.txt").write_text("the fox\nthe dog\n")
    ran = llmcli("generate", "-m", base, "-f", tmp_path / "a.txt", "--shard", "0/2", "--output", tmp_path / "out")
    assert (ran.exit_status, "requires a structured format" in ran.stderr) == (2, True)
    assert not (tmp_path / "out").exists()
