"""The cache of loaded models: one load for callers at once, what is unloaded, and the lock that jobs share."""

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from processes import wait_until

from llmcli.engines.model_cache import ModelCache, ModelLease
from llmcli.engines.worker.device_lock import DeviceLock, FairLock
from llmcli.engines.worker.server import JobCancelledError
from llmcli.errors import ModelTooLargeError, ModelUnavailableError


def get_at_once(cache, load, count=4):
    """What `count` jobs get that ask for one model while they hold the device. `load` is given the job's lock."""
    lock, barrier = FairLock(), threading.Barrier(count)

    def run(_):
        device_lock = DeviceLock(lock)
        lease = ModelLease(cache, device_lock.unlocked)
        barrier.wait()
        try:
            with device_lock:
                return lease.get("tiny", "key", lambda: load(device_lock))
        except BaseException as exc:
            return exc

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count), timeout=20))


def let_others_ask(cache, device_lock, count=4):
    """What happens while a model is loaded: the job gives the device away, and the other jobs ask for the model."""
    with device_lock.unlocked():
        wait_until(lambda: cache._models["key"].users == count)


def test_model_cache_simultaneous_callers_load_once():
    cache, loads = ModelCache(100), []

    def load(device_lock):
        loads.append(1)
        let_others_ask(cache, device_lock)
        return "pipeline"

    assert get_at_once(cache, load) == ["pipeline"] * 4
    assert len(loads) == 1


def test_model_cache_failed_load_raises_in_all_callers():
    cache, loads = ModelCache(100), []

    def fail(device_lock):
        loads.append(1)
        let_others_ask(cache, device_lock)
        raise ModelUnavailableError("damaged")

    assert [str(result) for result in get_at_once(cache, fail)] == ["damaged"] * 4
    assert (len(loads), len(cache)) == (1, 0)
    assert ModelLease(cache).get("tiny", "key", lambda: "pipeline") == "pipeline"


def test_model_cache_cancelled_load_passes_to_a_waiter():
    cache, loads = ModelCache(100), []

    def load(device_lock):
        loads.append(1)
        if len(loads) == 1:
            let_others_ask(cache, device_lock)
            raise JobCancelledError
        return "pipeline"

    results = get_at_once(cache, load)
    assert [result for result in results if result != "pipeline"] == [
        result for result in results if isinstance(result, JobCancelledError)
    ]
    assert (results.count("pipeline"), len(loads)) == (3, 2)


def test_model_cache_evicts_least_recently_used_on_low_memory():
    cache, loads, room = ModelCache(100), [], 2

    def load(name):
        def now():
            if len(cache) > room:  # the one that is being loaded counts
                raise ModelTooLargeError("the model needs more")
            loads.append(name)
            return name

        return now

    def use(name):
        lease = ModelLease(cache)
        lease.get(name, name, load(name))
        return lease

    for name in ("a", "b", "a", "c", "a"):
        use(name).release(None)
    assert loads == ["a", "b", "c"]  # b gave way to c
    held = [use("a"), use("c")]
    with pytest.raises(ModelUnavailableError):
        use("d")
    held[1].release(None)
    use("d")
    assert loads[-1] == "d"


def test_model_cache_frees_evicted_model_before_next_load():
    class Model:
        pass

    cache, freed = ModelCache(100), []
    lease = ModelLease(cache)
    weakref.finalize(lease.get("first", 1, Model), freed.append, 1)
    lease.release(None)

    def load():
        if not freed:
            raise ModelTooLargeError("the model needs more")
        return Model()

    assert isinstance(lease.get("second", 2, load), Model)


def test_model_cache_evicts_expired_models_only():
    cache = ModelCache(100)
    leases = [ModelLease(cache) for _ in range(3)]
    for name, lease in zip("abc", leases, strict=True):
        lease.get(name, name, lambda: "pipeline")
    leases[0].release(0)
    leases[1].release(None)
    cache.evict_expired()
    assert list(cache._models) == ["b", "c"]


def test_device_lock_is_reentrant_and_fifo():
    lock = FairLock()
    mine, other = DeviceLock(lock), DeviceLock(lock)
    order = []
    with mine:
        with mine:

            def theirs():
                with other:
                    order.append("other")

            thread = threading.Thread(target=theirs)
            thread.start()
            wait_until(lambda: lock.has_waiters)
            order.append("mine")
            mine.yield_to_others()
            order.append("mine again")
        thread.join()
    assert order == ["mine", "other", "mine again"]


def test_device_lock_keeps_random_states_of_all_gpus(monkeypatch):
    torch = pytest.importorskip("torch")
    restored = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: ["cuda:0", "cuda:1"])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.append)
    lock = DeviceLock(FairLock())
    with lock, lock.unlocked():
        pass
    assert restored == [["cuda:0", "cuda:1"]]
