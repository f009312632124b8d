"""Memory of batches and of the machine, and devices that fail."""

import functools
import subprocess
import sys
import weakref
from types import SimpleNamespace

import psutil
import pytest
import torch
from processes import wait_until
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from llmcli import engines
from llmcli.compat.torch import read_memory
from llmcli.engines.memory import MemoryEstimator, MemoryUsage, make_estimate, probe_memory
from llmcli.engines.model_cache import ModelCache, ModelLease
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
    assert memory.fits(8000)  # Nothing is known yet.
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


def test_memory_estimate_counts_until_a_batch_has_run():
    now = MemoryUsage(used=1000, peak=0, free=10_000)
    memory = MemoryEstimator(lambda: now, lambda rows, tokens: 100 * rows + 10 * tokens)
    assert memory.fits(600, rows=20)
    assert not memory.fits(601, rows=20)
    memory.start_batch()
    now = MemoryUsage(used=1000, peak=3000, free=10_000)
    memory.observe(50, rows=5)  # twice the estimate
    assert memory.fits(200, rows=20)
    assert not memory.fits(201, rows=20)
    now = MemoryUsage(used=1000, peak=0, free=10_000)
    memory.observe(100, rows=10)  # The peak is not known. This does not mean that batches take nothing.
    assert not memory.fits(10**6, rows=10)


def test_memory_estimator_counts_each_batch_apart_if_exact():
    usages = [
        MemoryUsage(100, 100, 10_000, is_exact=True),
        MemoryUsage(100, 1100, 10_000, is_exact=True),  # 10 bytes a token
        MemoryUsage(5100, 9000, 5000, is_exact=True),  # another model has been loaded
        MemoryUsage(5100, 6100, 5000, is_exact=True),
    ]
    memory = MemoryEstimator(lambda: usages.pop(0))
    for _ in range(2):
        memory.start_batch()
        memory.observe(100)
    assert memory.fits(400)
    assert not memory.fits(401)


CACHED = ["llama", "gpt2", "bloom", "falcon", "gpt_bigcode", "gemma3_text", "qwen3_next", "deepseek_v3", "gpt_neox"]


@pytest.mark.parametrize("kind", [*CACHED[:2], *(pytest.param(kind, marks=pytest.mark.slow) for kind in CACHED[2:])])
def test_estimate_of_keys_and_values_is_what_a_cache_holds(kind):
    from architectures import make_model, small_config
    from transformers import AutoModelForCausalLM

    from llmcli.compat.cache import cached_layers, filled_cache

    model = make_model(AutoModelForCausalLM, small_config(kind, is_causal=True))
    with torch.inference_mode():
        cache = filled_cache(model(torch.randint(5, 500, (2, 100)), use_cache=True))
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    held = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    estimated = sum(2 * min(100, maximum) * width for width, maximum in cached_layers(model, model.config)) * 4
    assert held == pytest.approx(estimated, rel=0.05)


class LargestSum(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, beside those that were before."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.storages = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        known = {item.untyped_storage().data_ptr() for item in tree_leaves((args, kwargs)) if torch.is_tensor(item)}
        for tensor in filter(torch.is_tensor, tree_leaves(made)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known and storage not in self.storages:
                self.storages.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.most = max(self.most, self.now)
        return made

    def free(self, size):
        self.now -= size


@pytest.mark.parametrize(("rows", "length"), [(2, 16), (8, 100), (16, 40)])
@pytest.mark.parametrize("kind", ["llama", "gpt2", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_estimate_of_a_batch_is_near_what_it_takes(kind, rows, length):
    from architectures import make_model, small_config
    from transformers import AutoModelForCausalLM

    config = small_config(kind, is_causal=True, vocab_size=5000)
    model = make_model(AutoModelForCausalLM, config)
    estimate = make_estimate(model)(rows, rows * (length + 8))
    with LargestSum() as taken, torch.inference_mode():
        model.generate(torch.randint(5, 500, (rows, length)), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert taken.most / 2 <= estimate <= 2 * taken.most


def test_encoders_are_estimated_without_keys_and_logits():
    from architectures import make_model, small_config
    from transformers import AutoModel

    estimate = make_estimate(make_model(AutoModel, small_config("bert")))
    assert estimate(4, 400) == 400 * 14 * 32 * 4


def device_module(stats=None, free=1000, **more):
    """torch.cuda, or torch.xpu, as far as memory goes."""
    more = {"reset_peak_memory_stats": lambda device: stats.update({"allocated_bytes.all.peak": 0})} | more
    more = {"mem_get_info": lambda device: (free, 9000), "memory_stats": lambda device: stats} | more
    return SimpleNamespace(**more)


def test_probe_adds_up_the_devices_of_a_model(monkeypatch):
    stats = {
        torch.device("cuda:0"): [100, 500, 700],
        torch.device("cuda:1"): [200, 300, 200],
    }
    names = ("allocated_bytes.all.current", "allocated_bytes.all.peak", "reserved_bytes.all.current")
    reset = []
    module = device_module(
        mem_get_info=lambda device: (1000 + 1000 * device.index, 9000),
        memory_stats=lambda device: dict(zip(names, stats[device], strict=True)),
        reset_peak_memory_stats=reset.append,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    places = {"model.embed": "cuda:0", "model.layers.0": "cuda:1", "model.layers.1": "cpu", "lm_head": "disk"}
    spread = SimpleNamespace(hf_device_map=places, device=torch.device("cuda:0"))
    assert probe_memory(spread) == (300, 800, 2 * 1600, True)  # The first one has 1000 and 600 that torch holds.
    assert set(reset) == {*stats}
    rank = SimpleNamespace(device=torch.device("cuda:1"))
    assert probe_memory(rank) == (200, 300, 2000, True)


def test_memory_of_an_xpu_that_does_not_tell_is_the_rest(monkeypatch):
    def refuse(device):
        raise RuntimeError("The device does not support querying the available free memory")

    module = device_module(
        {"allocated_bytes.all.current": 100, "reserved_bytes.all.current": 300},
        mem_get_info=refuse,
        get_device_properties=lambda device: SimpleNamespace(total_memory=9000),
        memory_reserved=lambda device: 300,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert read_memory(torch.device("xpu:0")) == (100, 0, 8900)


def test_memory_of_mps_is_what_metal_recommends(monkeypatch):
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 300)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 1000)
    assert probe_memory(SimpleNamespace(device=torch.device("mps"))) == (300, 0, 700, True)


def test_freed_memory_returns_to_the_accelerator(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    module = SimpleNamespace(empty_cache=lambda: emptied.append(1), is_initialized=lambda: True)
    monkeypatch.setattr(torch, "get_device_module", lambda: module)
    models = ModelCache(0)
    lease = ModelLease(models)
    lease.get("tiny", "key", lambda: "pipeline")
    emptied.clear()
    lease.release(None)
    models.evict_expired()
    assert (len(models), emptied) == (0, [1])


def test_scoring_reads_as_much_as_free_memory_allows(tiny, monkeypatch):
    from llmcli import pipelines
    from llmcli.job import LoadOptions
    from llmcli.pipelines import scoring

    pipeline = pipelines.load("scoring", tiny, LoadOptions(device="cpu", dtype="float32"))
    row = next(pipeline.preprocess({"text": "the quick brown fox " * 20, "condition": ""}))
    whole = pipeline.forward(row)["logprobs"]
    reads, forward = [], pipeline.model.forward
    monkeypatch.setattr(
        pipeline.model, "forward", lambda **inputs: (reads.append(inputs["input_ids"].shape[1]), forward(**inputs))[1]
    )
    vocabulary = pipeline.model.config.vocab_size
    monkeypatch.setattr(scoring, "available_memory", lambda: 16 * 10 * vocabulary)
    assert abs(pipeline.forward(row)["logprobs"] - whole).max() < 1e-4
    assert max(reads) == 10


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
    calls = []

    @functools.wraps(LlamaForCausalLM.forward)
    def broken(*args, **settings):
        calls.append(args)
        raise RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be reported elsewhere")

    monkeypatch.setattr(LlamaForCausalLM, "forward", broken)
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
        import functools, pathlib, sys
        from transformers import LlamaForCausalLM
        from llmcli.cli import main
        if not pathlib.Path(sys.argv[2]).exists():
            pathlib.Path(sys.argv[2]).touch()
            @functools.wraps(LlamaForCausalLM.forward)
            def fail(*args, **settings):
                raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
            LlamaForCausalLM.forward = fail
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
