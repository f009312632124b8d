"""Memory of batches and of the machine, and devices that fail."""

import psutil
import pytest

from llmcli import engines
from llmcli.engines.memory import MemoryEstimator, MemoryUsage
from llmcli.engines.requests import DeviceError
from llmcli.job import Job, Record
from llmcli.models import memory as main_memory


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
