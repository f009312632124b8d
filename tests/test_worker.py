"""The warm worker: the same results as without it, for many calls at once, and for as long as it is wanted."""

import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import check_line_by_line, is_running, start, wait_until
from transformers import LlamaForCausalLM
from workers import LONG, end, jobs, settle

from llmcli import engines, pipelines
from llmcli.engines.local import LocalEngine
from llmcli.engines.worker import client, protocol
from llmcli.engines.worker.server import Worker
from llmcli.errors import LlmcliError
from llmcli.io.units import parse_duration
from llmcli.job import Job, Record

pytestmark = pytest.mark.slow
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def desk():
    """A home for a worker that several tests use; a socket's path must be short."""
    folder = Path(tempfile.mkdtemp(prefix="llmcli"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def warm(desk, monkeypatch):
    """Calls go to a worker that stays from test to test."""
    settle(desk, monkeypatch)
    monkeypatch.setenv("LLMCLI_KEEP_ALIVE", "10m")
    wait_until(lambda: not jobs())  # of the test before


@pytest.fixture(scope="module", autouse=True)
def ended(desk):
    yield
    with pytest.MonkeyPatch.context() as patch:
        settle(desk, patch)
        end()


CALLS = {
    "text": ["generate", "the quick", "--max-new-tokens", 5],
    "several": ["generate", "the quick", "dog", "--max-new-tokens", 5, "--no-full-text"],
    "json": ["generate", "the quick", "--json", "--max-new-tokens", 5],
    "answers": ["generate", "the quick", "--json", "-n", 3, "--seed", 7, "--max-new-tokens", 5],
    "seed": ["generate", "the quick", "--seed", 7, "--max-new-tokens", 20],
    "stop": ["generate", "the quick brown", "--stop", "a", "--max-new-tokens", 20],
    "lines": ["generate", "--lines", "--max-new-tokens", 5],
    "nothing": ["generate", "--jsonl", "-f", os.devnull],
    "records": ["generate", "--jsonl", "--max-new-tokens", 5, "--batch-size", 3],
    "stopped": ["generate", "--jsonl", "--max-new-tokens", 5, "--on-error", "stop"],
    "csv": ["generate", "--csv", "--field", "id", "--max-new-tokens", 5, "--prompt", "the {id}"],
    "chat": ["chat", "the dog", "-s", "a fox", "--max-new-tokens", 5],
    "too long": ["generate", "dog " * 3000],
    "cut": ["generate", "dog " * 3000, "--truncate", "--max-new-tokens", 5],
    "no such option": ["generate", "dog", "-o", "topk=3"],
    "no such model": ["generate", "dog", "-m", "smolm2"],
    "no such folder": ["generate", "dog", "-m", "./nowhere"],
    "another head": ["generate", "dog", "-m", GOLDEN / "bert-qa"],
    "no such device": ["generate", "dog", "--device", "cuda:7"],
    "stats": ["embed", "dog", "-m", GOLDEN / "bert-qa", "-q"],
    "translate": ["translate", "--from", "en", "--to", "fr", "hello world", "-m", GOLDEN / "marian"],
    "no such language": ["translate", "--from", "en", "--to", "zh", "hello", "-m", GOLDEN / "marian"],
    "summarize": ["summarize", "the dog sleeps", "-m", GOLDEN / "bart", "--max-new-tokens", 8],
    "qa": ["qa", "Who?", "-c", "The dog sleeps in the sun.", "-m", GOLDEN / "bert-qa", "--json"],
}
LINES = b'{"id": 1, "text": "the quick"}\n{"id": 2}\nnot JSON\n{"id": 3, "text": "\\ud800"}\n{"id": 4, "text": ""}\n'


@pytest.mark.parametrize("call", CALLS)
def test_worker_call_equals_local_call(warm, process, chatty, call):
    """stdout, stderr and exit code."""
    args = CALLS[call] if "-m" in CALLS[call] else [*CALLS[call], "-m", chatty]
    if "--seed" not in args and args[0] in ("generate", "chat"):
        args = [*args, "--temperature", 0]
    stdin = b"id,text\n1,dog\n2,fox\n" if call == "csv" else LINES
    here = process(*args, "--dtype", "float32", "--keep-alive", 0, input=stdin)
    there = process(*args, "--dtype", "float32", input=stdin)
    assert (there.stdout, there.stderr, there.returncode) == (here.stdout, here.stderr, here.returncode)
    wait_until(lambda: jobs() == 0)


def test_worker_resolves_relative_model_path(warm, process, chatty):
    ran = process("generate", "dog", "-m", chatty.name, "--json", "--max-new-tokens", 2, cwd=chatty.parent)
    assert json.loads(ran.stdout)["model"] == chatty.name


def test_worker_reports_damaged_settings_as_locally(warm, process, encoder, tmp_path):
    folder = shutil.copytree(encoder, tmp_path / "odd")
    (folder / "modules.json").write_text("no JSON")
    here, there = (process("embed", "dog", "-m", folder, "--keep-alive", each) for each in (0, "5m"))
    assert here.stderr.startswith(f"error: failed to load {folder}: Expecting value".encode())
    assert (there.stdout, there.stderr, there.returncode) == (here.stdout, here.stderr, here.returncode)
    told = process("embed", "dog", "-m", folder, "-v").stderr
    assert b"in the worker:" in told
    assert b"loading.py" in told


def test_worker_client_imports_nothing_heavy(warm, chatty):
    code = """
import sys
from llmcli.cli import main
status = main(sys.argv[1:])
print(sorted({"torch", "transformers", "numpy", "huggingface_hub", "tokenizers"} & sys.modules.keys()), status)
"""
    args = ["generate", "dog", "-m", str(chatty), "--max-new-tokens", "2", "--temperature", "0"]
    for _ in range(2):  # the first may start the worker
        ran = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120)
    assert ran.stdout.splitlines()[-1] == "[] 0"


def test_worker_start_releases_captured_output(place, chatty):
    args = ["generate", "dog", "-m", str(chatty), "--max-new-tokens", "2", "--keep-alive", "10m"]
    ran = subprocess.run([sys.executable, "-m", "llmcli", *args], capture_output=True, text=True, timeout=60)
    assert ran.stdout.startswith("dog")
    assert is_running(client.status()["pid"])


def test_worker_slow_input_is_answered_line_by_line(warm, chatty):
    check_line_by_line(start("generate", "-m", chatty, "--lines", "--max-new-tokens", 3, "--temperature", 0))


def test_worker_streams_text(warm, chatty):
    job = Job("generate", str(chatty), {"max_new_tokens": 30, "do_sample": False}, {"full_text": True}, keep_alive=600)
    pieces: list[str] = []
    (result,) = engines.engine_for(job).run(job, [Record({"text": "the quick"})], pieces.append)
    assert len(pieces) > 5
    assert result.text.startswith("".join(pieces))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_worker_cancels_job_when_call_exits(warm, process, chatty, number, status):
    process("generate", "dog", "-m", chatty, "--max-new-tokens", 2)  # loads the model
    call = start("generate", "the quick", "-m", chatty, *LONG)
    wait_until(lambda: jobs() == 1)
    call.send_signal(number)
    assert call.wait(20) == status
    wait_until(lambda: jobs() == 0, seconds=5)
    assert call.stderr.read() == b""


def test_worker_cancels_job_when_reader_exits(warm, chatty):
    call = start("generate", "-m", chatty, "--lines", "--max-new-tokens", 3, "--batch-size", 1)
    call.stdin.write(b"the quick brown fox\n" * 500)
    call.stdin.flush()
    call.stdout.readline()
    call.stdout.close()
    assert call.wait(20) == 0
    wait_until(lambda: jobs() == 0, seconds=5)


def test_worker_eight_clients_get_their_own_results(warm, process, chatty, many_lines):
    path = many_lines(60)
    args = ["generate", "--jsonl", "-m", chatty, "--dtype", "float32", "--temperature", "0", "--max-new-tokens"]
    calls = [start(*args, 5 + number, "-f", path) for number in range(8)]
    outputs = [call.communicate(timeout=120)[0] for call in calls]
    for number in (0, 3, 7):
        assert outputs[number] == process(*args, 5 + number, "-f", path, "--keep-alive", 0).stdout
    assert len(set(outputs)) == 8


def test_worker_seed_repeats_beside_other_jobs(warm, process, chatty):
    args = ["generate", "the quick", "-m", chatty, "--max-new-tokens", 200]
    alone = process(*args, "--seed", 5).stdout
    others = [start(*args) for _ in range(3)]
    assert process(*args, "--seed", 5).stdout == alone
    assert len({other.communicate(timeout=60)[0] for other in others}) == 3  # nobody's numbers are another's


def test_worker_short_job_runs_beside_long_one(warm, process, chatty):
    long = start("generate", "the quick", "-m", chatty, *LONG)
    wait_until(lambda: jobs() == 1)
    assert process("generate", "dog", "-m", chatty, "--max-new-tokens", 3).returncode == 0
    assert long.poll() is None
    long.kill()
    long.wait()


def test_ps_shows_model_and_stop_ends_worker(place, llmcli, chatty):
    nothing = llmcli("ps")
    assert (nothing.stdout, nothing.exit_status) == ("", 0)
    assert "no worker is running" in nothing.stderr
    ran = llmcli("generate", "dog", "-m", chatty, "--max-new-tokens", 2, "--keep-alive", "5m", "--dtype", "float32")
    assert (ran.stderr, ran.exit_status) == ("", 0)
    (status,) = llmcli("ps", "--json").records
    (model,) = status["models"]
    assert (model["model"], model["dtype"], model["device"], model["jobs"]) == (str(chatty), "float32", "cpu", 0)
    assert model["bytes"] > 4 * 400 * 32  # its words alone, as float32
    assert 0 <= model["idle_seconds"] < 60
    assert 200 < model["expires_in_seconds"] <= 300
    row = llmcli("ps").stdout.split("\t")
    assert row[1:5] == ["cpu", "float32", f"{model['bytes'] / 1e6:.0f} MB", "0"]
    assert (llmcli("stop").exit_status, llmcli("stop").stderr) == (0, "note: no worker is running\n")
    assert not is_running(status["pid"])
    assert not list((place / "run" / "llmcli").glob("*.sock"))


def test_worker_exits_after_last_model_expires(place, process, chatty, base):
    process("generate", "dog", "-m", chatty, "--max-new-tokens", 2, "--keep-alive", "2s")
    process("generate", "dog", "-m", base, "--max-new-tokens", 2, "--keep-alive", "6s")
    number = client.status()["pid"]
    wait_until(lambda: [each["model"] for each in client.status()["models"]] == [str(base)])
    wait_until(lambda: not is_running(number))
    assert not list((place / "run" / "llmcli").glob("*.sock"))


def test_serve_runs_in_foreground(place, process, chatty):
    served = start("serve")
    wait_until(lambda: (place / "run" / "llmcli" / "worker.sock").exists())
    assert process("generate", "dog", "-m", chatty, "--max-new-tokens", 2).returncode == 0  # finds it by itself
    assert [each["expires_in_seconds"] for each in client.status()["models"]] == [None]
    second = process("serve")
    assert (second.returncode, second.stderr.splitlines()[0]) == (1, b"error: a worker is already running")
    served.send_signal(signal.SIGINT)
    assert served.wait(20) == 130
    assert served.stderr.read() == b""
    assert not (place / "run" / "llmcli" / "worker.sock").exists()


def test_keep_alive_zero_bypasses_worker(place, process, chatty):
    served = start("serve")
    wait_until(lambda: (place / "run" / "llmcli" / "worker.sock").exists())
    assert process("generate", "dog", "-m", chatty, "--max-new-tokens", 2, "--keep-alive", 0).returncode == 0
    assert client.status()["models"] == []
    served.kill()
    served.wait()


def test_call_without_keep_alive_starts_no_worker(place, llmcli, chatty):
    assert llmcli("generate", "dog", "-m", chatty, "--max-new-tokens", 2).exit_status == 0
    assert not (place / "run" / "llmcli").exists()


INVALID = ["soon", "10 minutes", "-1", "1e5", "1h30m", "nan", "inf", "1" * 400, "."]


@pytest.mark.parametrize("duration", [*INVALID, ""])
def test_keep_alive_rejects_invalid_duration(llmcli, chatty, monkeypatch, duration):
    monkeypatch.setenv("LLMCLI_KEEP_ALIVE", duration)
    ran = llmcli("generate", "dog", "-m", chatty, "--max-new-tokens", 2)
    assert ran.exit_status == (2 if duration else 0)


@pytest.mark.parametrize("duration", ["0.00001", "99999999999999999999d", "10", " 1.5h "])
def test_odd_durations_start_a_worker_that_reads_them(place, duration):
    seconds = parse_duration(duration)
    connection = client.connect_or_start("status", seconds)
    assert connection
    connection.close()
    client.stop()


def test_socket_path_that_is_too_long_is_named(llmcli, chatty, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("x" * 110)))
    ran = llmcli("serve")
    assert ran.exit_status == 1
    assert "but at most 107 are allowed" in ran.stderr
    assert ran.stderr.endswith("hint: set XDG_RUNTIME_DIR to a shorter path\n")
    ran = llmcli("generate", "dog", "-m", chatty, "--max-new-tokens", 2, "--keep-alive", "10m", "-v")
    assert (ran.exit_status, "are allowed; this process runs the model" in ran.stderr) == (0, True)


def test_worker_of_other_environment_is_replaced(place, process, chatty, monkeypatch):
    args = ["generate", "dog", "-m", chatty, "--max-new-tokens", 2, "-v"]
    process(*args, "--keep-alive", "5m")
    first = client.status()["pid"]
    long = start("generate", *map(str, range(10)), "-m", chatty, *LONG)
    wait_until(lambda: jobs() == 1)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ran = process(*args)
    assert b"the worker refuses: it has another version or environment; this process runs the model" in ran.stderr
    assert (ran.returncode, client.status()["pid"]) == (0, first)
    assert process(*args, "--keep-alive", "5m").returncode == 0
    assert client.status()["pid"] != first
    assert long.poll() is None  # what the first was doing, it goes on doing
    long.kill()
    long.wait()
    wait_until(lambda: not is_running(first))
    assert client.status()["models"]


@pytest.mark.parametrize("what", ["models.toml", "config.toml"])
def test_fingerprint_changes_with_configuration(place, what):
    before = protocol.environment_fingerprint()
    (place / "config" / "llmcli").mkdir(parents=True)
    (place / "config" / "llmcli" / what).write_text("")
    assert protocol.environment_fingerprint() != before


@pytest.fixture
def local_worker(place):
    """A worker in a thread of this process, for tests that watch it or change its limits."""
    with Worker(math.inf) as worker:

        def serve():
            while not worker.is_finished:
                worker.handle_request()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield worker
        finally:
            worker.stop()
            thread.join()


def ask(job, *texts):
    """The results of a job, through the engine that a call would use."""
    return list(engines.engine_for(job).run(job, [Record({"text": text}) for text in texts]))


def test_worker_simultaneous_cold_calls_load_model_once(local_worker, chatty, monkeypatch):
    loads, load = [], pipelines.load

    def counted(*args):
        loads.append(args)
        wait_until(lambda: local_worker.jobs == 4)
        return load(*args)

    monkeypatch.setattr(pipelines, "load", counted)
    job = Job("generate", str(chatty), {"max_new_tokens": 5, "do_sample": False})
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: ask(job, "the quick")[0], range(4), timeout=60))
    assert len(loads) == 1
    assert len({result.text for result in results}) == 1
    assert not any(result.failure for result in results)


def test_worker_result_over_limit_fails_its_record_only(local_worker, chatty, monkeypatch):
    monkeypatch.setattr(protocol, "MAX_MESSAGE_BYTES", 2450)
    job = Job("generate", str(chatty), {"max_new_tokens": 5, "do_sample": False}, {"full_text": True})
    results = ask(job, "dog", "quick " * 400, "fox")  # 2,400 bytes, and the answer is longer
    assert [result.failure and result.failure.type for result in results] == [None, "too_large", None]
    assert "--keep-alive 0" in results[1].failure.message


def test_worker_documents_over_limit_fail_their_record(local_worker, llmcli, chatty, tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "MAX_MESSAGE_BYTES", 3000)
    (tmp_path / "long.txt").write_text("dog " * 1000)
    ran = llmcli("qa", "Who?", "-f", tmp_path / "long.txt", "-m", chatty, "--json")
    (record,) = ran.records
    assert (record["question"], record["error"]["type"], ran.exit_status) == ("Who?", "too_large", 1)
    assert "--keep-alive 0" in record["error"]["message"]


def test_broken_device_ends_job_and_worker(local_worker, chatty, monkeypatch):
    job = Job("generate", str(chatty), {"max_new_tokens": 5, "do_sample": False})
    with monkeypatch.context() as patched:
        patched.setattr(LlamaForCausalLM, "forward", raises(RuntimeError("CUDA error: an illegal memory access\nmore")))
        with pytest.raises(LlmcliError, match=r"device failed: CUDA error: an illegal memory access$"):
            ask(job, "the quick", "dog")
    wait_until(lambda: local_worker.is_finished)
    assert not protocol.has_socket()
    assert not ask(job, "the quick")[0].failure  # in this process, as no other worker runs


def test_model_that_fails_is_loaded_again(local_worker, chatty, monkeypatch):
    job = Job("generate", str(chatty), {"max_new_tokens": 5, "do_sample": False})
    with monkeypatch.context() as patched:
        patched.setattr(LlamaForCausalLM, "forward", raises(RuntimeError("tensor is on the meta device")))
        (result,) = ask(job, "the quick")
    assert result.failure.type == "internal_error"
    wait_until(lambda: not len(local_worker.models))
    assert not ask(job, "the quick")[0].failure
    assert len(local_worker.models) == 1


def raises(exc):
    @functools.wraps(LlamaForCausalLM.forward)
    def raise_it(*args, **settings):
        raise exc

    return raise_it


def test_worker_starts_for_a_very_short_keep_alive(place, process, chatty):
    ran = process("generate", "dog", "-m", chatty, "--max-new-tokens", 2, "--keep-alive", "0.00001", "-v")
    assert ran.returncode == 0
    assert b"this process runs the model" not in ran.stderr


def test_engine_without_worker_is_local(place):
    assert isinstance(engines.engine_for(Job("generate", "smollm2")), LocalEngine)
