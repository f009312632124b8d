"""Memory of batches and of the machine, and devices that fail."""

import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from processes import wait_until

from llmcli import engines
from llmcli.engines.memory import MemoryEstimator, MemoryUsage
from llmcli.engines.worker import client
from llmcli.engines.worker.device_lock import DeviceLock, FairLock
from llmcli.errors import DeviceError, ModelTooLargeError, ModelUnavailableError
from llmcli.job import Job, Record
from llmcli.models import memory as main_memory
from llmcli.models.devices import device_error, is_out_of_memory


def test_memory_estimator_rejects_batches_that_do_not_fit():
    now = MemoryUsage(used=1000, peak=1000, free=10_000)
    memory = MemoryEstimator(lambda: now)
    memory.start_batch()
    assert memory.fits(10**9)  # nothing is known yet
    now = MemoryUsage(used=1500, peak=3000, free=9500)
    memory.observe(100)  # 20 bytes a token
    assert memory.fits(400)
    assert not memory.fits(401)
    now = MemoryUsage(used=1500, peak=9000, free=1000)
    memory.observe(500)  # 16 bytes a token: what the first batch took once for all weighs less
    memory.observe(10)  # has not taken 800 bytes a token: the process keeps what the larger batch took
    assert memory.fits(75)
    assert not memory.fits(76)


def test_memory_estimator_counts_the_peak_of_each_batch():
    usages = iter([
        MemoryUsage(used=100, peak=5000, free=10_000),  # loading took more than any batch
        MemoryUsage(used=100, peak=2100, free=10_000),  # 20 bytes a token
    ])  # fmt: skip
    memory = MemoryEstimator(lambda: next(usages))
    memory.start_batch()
    memory.observe(100)
    assert memory.fits(400)
    assert not memory.fits(401)


def test_memory_estimator_ignores_a_peak_that_cannot_be_reset():
    usages = iter([MemoryUsage(used=100, peak=5000, free=10_000), MemoryUsage(used=1100, peak=5000, free=9000)])
    memory = MemoryEstimator(lambda: next(usages))
    memory.start_batch()
    memory.observe(100)  # 10 bytes a token
    assert memory.fits(800)
    assert not memory.fits(801)


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_active_file 50\ntotal_inactive_file 7\nmapped_file 9\n")
V2 = ("memory.max", "memory.current", "active_file 50\ninactive_file 7\nfile_mapped 9\n")


def limit_memory(folder, names, limit, usage):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip((*names[:2], "memory.stat"), (limit, usage, names[2]), strict=True):
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("names", "line", "folder"),
    [
        (V2, "0::/", ""),
        (V2, "0::/app/worker", "app/worker"),
        (V2, "0::/app/worker", "app"),  # the limit is the parent's
        (V2, "0::/../../elsewhere", ""),
        (V1, "4:cpu,memory:/docker/abc", "memory/docker/abc"),
        (V1, "4:memory:/docker/abc", "memory"),  # the path is that on the host
    ],
)
def test_memory_limit_of_a_container_counts(tmp_path, monkeypatch, names, line, folder):
    groups = tmp_path / "cgroup"
    limit_memory(groups / folder, names, "1000", "300")
    (tmp_path / "own").write_text(f"9:name=systemd:/\n{line}\n")
    monkeypatch.setattr(main_memory, "CGROUPS", groups)
    monkeypatch.setattr(main_memory, "PROCESS_CGROUPS", tmp_path / "own")
    assert main_memory.available_memory() == 1000 - 300 + 57
    limit_memory(groups / folder, names, "max" if names is V2 else str(2**63 - 4096), "300")
    assert main_memory.available_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_model_beyond_the_memory_of_a_container_is_refused(llmcli, tiny, tmp_path, monkeypatch):
    limit_memory(tmp_path / "cgroup", V2, "2000", "300")
    (tmp_path / "own").write_text("0::/\n")
    monkeypatch.setattr(main_memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(main_memory, "PROCESS_CGROUPS", tmp_path / "own")
    ran = llmcli("generate", "the", "-m", tiny)
    assert (ran.exit_status, "only 1.8 kB is available" in ran.stderr) == (4, True)


@pytest.mark.parametrize("count", [1, 20])
def test_broken_device_ends_the_run(tiny, monkeypatch, count):
    from transformers import Pipeline

    calls = []

    def broken(*args, **settings):
        calls.append(args)
        raise RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be reported elsewhere")

    monkeypatch.setattr(Pipeline, "forward", broken)
    job = Job("generate", str(tiny), keep_alive=0)
    with pytest.raises(DeviceError, match=r"device failed: CUDA error: device-side assert triggered$"):
        list(engines.engine_for(job).run(job, [Record({"text": f"fox {number}"}) for number in range(count)]))
    assert len(calls) <= 2


class AcceleratorError(RuntimeError):
    """As torch names it since 2.8."""


@pytest.mark.parametrize(
    "exc",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"),
        AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("HIP error: out of memory"),
        RuntimeError("XPU out of memory. Tried to allocate 1.00 GiB"),
        RuntimeError("Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
        RuntimeError("level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GiB, max allowed: 9.07 GiB)."),
        RuntimeError("Invalid buffer size: 27.94 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        OSError(12, "Cannot allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_is_known_on_every_device(exc):
    assert is_out_of_memory(exc)
    assert device_error(exc) is None


def test_out_of_memory_counts_as_the_cause_of_an_error():
    capture = AcceleratorError("CUDA error: operation failed due to a previous error during capture")
    assert (is_out_of_memory(capture), device_error(capture)) == (False, None)
    capture.__context__ = torch.OutOfMemoryError("CUDA out of memory.")
    assert is_out_of_memory(capture)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: device-side assert triggered",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: unspecified launch failure",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
        "CUDA driver error: device not ready",
        "HIP error: an illegal memory access was encountered",
        "Native API failed. Native API returns: 20 (UR_RESULT_ERROR_DEVICE_LOST)",
    ],
)
def test_failed_device_is_known_by_its_error(text):
    assert device_error(RuntimeError(text)).message == f"device failed: {text}"
    assert not is_out_of_memory(RuntimeError(text))


def test_failed_device_is_known_by_what_it_does_next(monkeypatch):
    synchronized = []

    def synchronize(index):
        synchronized.append(index)
        if broken:
            raise AcceleratorError("CUDA error: device-side assert triggered")

    module = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 3,
        memory_reserved=lambda index: index == 1,
        synchronize=synchronize,
    )
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch, "get_device_module", lambda: module)
    for broken in (False, True):
        for exc in (IndexError("index out of range"), RuntimeError("CUDA error: invalid configuration argument")):
            assert (device_error(exc) is not None) is broken
    assert synchronized == [1] * 4  # A device that is not used stays untouched.


@pytest.mark.parametrize(
    ("exc", "error"),
    [
        (RuntimeError("CUDA error: device-side assert triggered"), DeviceError),
        (torch.OutOfMemoryError("CUDA out of memory."), ModelTooLargeError),
        (RuntimeError("size mismatch for weight"), ModelUnavailableError),
    ],
)
def test_loading_tells_lack_of_memory_from_failed_devices(tiny, monkeypatch, exc, error):
    import transformers

    def fail(*args, **settings):
        raise exc

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    job = Job("generate", str(tiny), keep_alive=0)
    with pytest.raises(error) as caught:
        list(engines.engine_for(job).run(job, [Record({"text": "fox"})]))
    assert type(caught.value) is error


def test_device_lock_survives_a_failed_device(monkeypatch):
    def fail(*args):
        raise AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for name in ("get_rng_state_all", "set_rng_state_all"):
        monkeypatch.setattr(torch.cuda, name, fail)
    lock = FairLock()
    for _ in range(2):
        with DeviceLock(lock) as mine, mine.unlocked():
            assert not lock._queue
    assert not lock._queue


@pytest.mark.slow
def test_worker_with_a_failed_device_restarts(place, process, chatty):
    serving = """if True:
        import os, pathlib, sys
        from transformers import Pipeline
        from llmcli.cli import main
        if not pathlib.Path(sys.argv[2]).exists():
            pathlib.Path(sys.argv[2]).touch()
            def fail(*args, **settings):
                raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
            Pipeline.forward = fail
        sys.argv[2:] = []
        main()
    """
    command = [sys.executable, "-c", serving, "serve", place / "failed"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as worker:
        try:
            wait_until(lambda: client.status() is not None)
            args = ("generate", "dog", "-m", chatty, "--max-new-tokens", 2, "--temperature", 0, "--device", "cpu", "-v")
            first = process(*args)
            assert (first.returncode, first.stdout) == (1, b"")
            assert b"error: device failed: CUDA error: uncorrectable ECC error encountered" in first.stderr
            wait_until(lambda: (client.status() or {}).get("pid") == worker.pid)
            second = process(*args)
            assert second.returncode == 0
            assert b"this process runs the model" not in second.stderr
            assert [model["model"] for model in client.status()["models"]] == [str(chatty)]
        finally:
            worker.kill()
        assert b"warning: device failed; restarting" in worker.stderr.read()
