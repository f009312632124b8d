"""One run by several processes, under torchrun: what comes out is what one process writes."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from llmcli.engines import distributed
from llmcli.job import Job, LoadOptions
from llmcli.models import loading

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "llmcli"]


@pytest.fixture(scope="module")
def lines(many_lines):
    return many_lines(501)


@pytest.fixture(scope="module")
def command(tiny):
    return ["generate", "-m", str(tiny), "--jsonl", "--temperature", "0", "--max-new-tokens", "8",
            "--dtype", "float32", "--batch-size", "4"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(command, lines):
    """What one process writes."""
    ran = subprocess.run([sys.executable, "-m", "llmcli", *command, "-f", lines], capture_output=True)
    assert ran.returncode == 3
    return ran.stdout


def said(ran):
    """stderr without what torchrun says itself."""
    return [line for line in ran.stderr.decode().splitlines() if line.startswith(("error: ", "hint: ", "note: "))]


@pytest.mark.slow
def torchrun(tmp_path, code, *args):
    """Run a program in the place of llmcli in each rank."""
    program = tmp_path / "program.py"
    program.write_text(code)
    return subprocess.run([*TORCHRUN[:-2], program, *args], capture_output=True, timeout=120)


def test_distributed_results_are_in_input_order(command, lines, whole):
    ran = subprocess.run([*TORCHRUN, *command, "-f", lines], capture_output=True, timeout=120)
    assert ran.stdout == whole
    assert ran.returncode == 1  # torchrun's own, whichever of ours it sees
    assert said(ran)[-1] == "error: 11 of 501 records failed"
    assert len(said(ran)) == 12


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_distributed_handles_few_records(command, lines, whole, count):
    data = b"".join(lines.read_bytes().splitlines(keepends=True)[1 : count + 1])
    ran = subprocess.run([*TORCHRUN, *command], input=data, capture_output=True, timeout=120)
    expected = [json.loads(line) for line in whole.splitlines()[1 : count + 1]]
    for record in expected:
        del record["file"]
    assert [json.loads(line) for line in ran.stdout.splitlines()] == expected
    assert (ran.returncode, said(ran)) == (0, [])


@pytest.mark.slow
def test_distributed_ends_when_reader_exits(command, lines, whole):
    running = subprocess.Popen([*TORCHRUN, *command, "-f", lines], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout.readline() == whole.splitlines(keepends=True)[0]
    running.stdout.close()
    assert running.wait(60) == 0


@pytest.mark.slow
def test_distributed_on_error_stop_ends_all_ranks(command, lines, whole):
    data = b"".join(lines.read_bytes().splitlines(keepends=True)[1:])
    ran = subprocess.run([*TORCHRUN, *command, "--on-error", "stop"], input=data, capture_output=True, timeout=120)
    assert (ran.returncode, len(ran.stdout.splitlines())) == (1, 50)
    assert said(ran) == ["error: line 50: missing field 'text': available fields: id"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_distributed_resumes_after_killed_rank(command, lines, whole, tmp_path, rank):
    code = (
        "import os, signal, sys\n"
        "from llmcli import cli\n"
        "from llmcli.engines.local import LocalEngine\n"
        "run = LocalEngine.run\n"
        "def run_and_die(*args, **settings):\n"
        "    for count, result in enumerate(run(*args, **settings)):\n"
        "        if count == 150: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield result\n"
        f"if os.environ['RANK'] == '{rank}': LocalEngine.run = run_and_die\n"
        "sys.exit(cli.main())\n"
    )
    path = tmp_path / "out.jsonl"
    args = [*command, "-f", lines, "--output", path, "--resume"]
    assert torchrun(tmp_path, code, *args).returncode == 1
    begun = path.read_bytes()
    assert whole.startswith(begun[: begun.rfind(b"\n") + 1])
    assert len(begun) < len(whole)
    run_again = TORCHRUN if rank == "0" else [sys.executable, "-m", "llmcli"]
    ran = subprocess.run([*run_again, *args], capture_output=True, timeout=120)
    assert said(ran)[-1] == "error: 11 of 501 records failed"
    assert path.read_bytes() == whole


@pytest.mark.slow
def test_distributed_complete_output_ends_all_ranks(command, lines, tmp_path):
    (tmp_path / "in").write_bytes(b"".join(lines.read_bytes().splitlines(keepends=True)[1:4]))
    args = [*TORCHRUN, *command, "-f", tmp_path / "in", "--output", tmp_path / "out", "--resume"]
    for expected in ([], [f"note: '{tmp_path / 'out'}' is already complete"]):
        ran = subprocess.run(args, capture_output=True, timeout=60)
        assert (ran.returncode, said(ran)) == (0, expected)


@pytest.mark.slow
def test_distributed_remote_error_is_reported_once(command, lines, tmp_path):
    code = (
        "import os, sys\n"
        "from llmcli import cli\n"
        "from llmcli.errors import ModelUnavailableError\n"
        "from llmcli.models import loading\n"
        "def load(*_): raise ModelUnavailableError('the disk is gone', hint='find it')\n"
        "if os.environ['RANK'] == '1': loading.load = load\n"
        "sys.exit(cli.main())\n"
    )
    ran = torchrun(tmp_path, code, *command, "-f", lines)
    assert ran.returncode == 1
    assert [line for line in said(ran) if "lacks" not in line and "missing field" not in line] == [
        "error: process 1: the disk is gone",
        "hint: find it",
    ]


@pytest.mark.slow
def test_distributed_seed_gives_ranks_different_samples(command, tmp_path):
    args = [*TORCHRUN, *command, "--seed", "5", "--temperature", "1", "--max-new-tokens", "20"]
    data = b'{"text": "the quick brown fox"}\n' * 4
    first, second = (subprocess.run(args, input=data, capture_output=True, timeout=120).stdout for _ in range(2))
    texts = [json.loads(line)["generated_text"] for line in first.splitlines()]
    assert len(set(texts)) == 4
    assert second == first


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_distributed_without_peers_reports_an_error(command, tmp_path, rank):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from llmcli import cli\n"
        "from llmcli.engines import distributed\n"
        "distributed.JOIN_TIMEOUT_S = 2\n"
        "sys.exit(cli.main())\n"
    )
    peers = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ran = subprocess.run(
        [sys.executable, program, *command], input=b'{"text": "dog"}\n', capture_output=True, timeout=60,
        env=os.environ | peers,
    )  # fmt: skip
    prefix = "process 1: " if rank == "1" else ""
    assert (ran.returncode, ran.stdout) == (1, b"")
    assert said(ran)[0].startswith(f"error: {prefix}cannot join the other processes: ")
    assert said(ran)[1].endswith("to run one process, unset RANK and WORLD_SIZE")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["generate", "sample", "score"])
def test_tensor_parallel_gives_the_output_of_one_process(command, lines, tmp_path, task):
    some = tmp_path / "some.jsonl"
    some.write_bytes(b"".join(lines.read_bytes().splitlines(keepends=True)[:60]))
    _, *options = command
    args = {
        "generate": command,
        "sample": [*command, "--temperature", "1", "--seed", "5"],
        "score": ["score", *options[: options.index("--temperature")], "--dtype", "float32"],
    }[task]
    alone = subprocess.run([sys.executable, "-m", "llmcli", *args, "-f", some], capture_output=True, timeout=120)
    ran = subprocess.run([*TORCHRUN, *args, "-f", some, "--tensor-parallel"], capture_output=True, timeout=120)
    expected, records = ([json.loads(line) for line in one.stdout.splitlines()] for one in (alone, ran))
    assert len(expected) == 60
    for record in expected:
        record |= {name: pytest.approx(value, rel=1e-4) for name, value in record.items() if isinstance(value, float)}
    assert records == expected
    assert said(ran) == said(alone)


@pytest.mark.slow
def test_tensor_parallel_streams_one_record(command):
    args = ["generate", "the quick", *command[1:3], *command[4:]]
    alone = subprocess.run([sys.executable, "-m", "llmcli", *args], capture_output=True, timeout=120)
    ran = subprocess.run([*TORCHRUN, *args, "--tensor-parallel"], capture_output=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (0, alone.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_tensor_parallel_killed_rank_ends_all(command, lines, whole, tmp_path, rank):
    code = (
        "import os, signal, sys\n"
        "from llmcli import cli\n"
        "from llmcli.pipelines.causal import CausalPipeline\n"
        "forward, count = CausalPipeline._forward, 0\n"
        "def forward_and_die(*args, **settings):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count == 40: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return forward(*args, **settings)\n"
        f"if os.environ['RANK'] == '{rank}': CausalPipeline._forward = forward_and_die\n"
        "sys.exit(cli.main())\n"
    )
    path = tmp_path / "out.jsonl"
    args = [*command, "-f", lines, "--output", path, "--resume"]
    ran = torchrun(tmp_path, code, *args, "--tensor-parallel")
    begun = path.read_bytes()
    assert (ran.returncode, begun.count(b"\n") > 50, len(begun) < len(whole)) == (1, True, True)
    subprocess.run([sys.executable, "-m", "llmcli", *args], capture_output=True, timeout=120)
    assert path.read_bytes() == whole


@pytest.mark.slow
def test_tensor_parallel_max_time_is_refused_once(command):
    args = [*TORCHRUN, *command, "--tensor-parallel", "-o", "max_time=5"]
    ran = subprocess.run(args, input=b'{"text": "the"}', capture_output=True, timeout=120)
    assert ran.returncode == 1
    assert [line[:60] for line in said(ran)] == ["error: --tensor-parallel cannot be used with max_time: the p"]


@pytest.mark.slow
def test_tensor_parallel_odd_heads_are_refused_once(tiny, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 400}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=3)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    args = ["generate", "the", "-m", tmp_path, "--tensor-parallel"]
    ran = subprocess.run([*TORCHRUN, *args], capture_output=True, timeout=120)
    assert (ran.returncode, said(ran)[0]) == (1, "error: this llama model cannot be split among 2 processes")
    assert len(said(ran)) == 2


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ("1", (), "--tensor-parallel requires several processes\nhint: start it with torchrun"),
        ("2", ("--quantize", "int4"), "--tensor-parallel cannot be used with --quantize"),
        (
            "2",
            ("--offload-folder", "x"),
            "--tensor-parallel cannot be used with --quantize, --offload-folder or --endpoint",
        ),
        ("2", ("--endpoint", "http://127.0.0.1:1"), "cannot be used with --quantize, --offload-folder or --endpoint"),
    ],
)
def test_tensor_parallel_unsuitable_options_are_refused(llmcli, tiny, monkeypatch, size, options, message):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", size)
    ran = llmcli("generate", "the", "-m", tiny, "--tensor-parallel", *options)
    assert (ran.exit_status, message in ran.stderr) == (2, True)


def test_distributed_conversation_is_refused(llmcli, tiny, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran = llmcli("chat", "-m", tiny)
    assert (ran.exit_status, ran.stderr) == (2, "error: a conversation cannot run in several processes\n")


@pytest.mark.parametrize(
    ("device", "local_rank", "expected"),
    [("auto", "3", "cuda:3"), ("cuda", "1", "cuda:1"), ("cuda:2", "1", "cuda:2"), ("auto", "5", "cuda:1")],
)
def test_distributed_rank_uses_its_own_gpu(monkeypatch, device, local_rank, expected):
    """Four GPUs, and the memory of no other is touched."""
    chosen = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(loading, "choose_device", lambda name: "cuda" if name == "auto" else name)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    job = distributed._job_of_rank(Job("generate", "x", load_options=LoadOptions(device=device)))
    assert (job.load_options.device, chosen) == (expected, [int(expected[-1])])
