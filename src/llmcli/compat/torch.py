"""Kernels of PyTorch that have no public name, and what they run on."""

from collections.abc import Callable
from functools import cache

import torch

aten = torch.ops.aten
PACKED_ROWS = 32  # for which float32 weights are packed
# Rows (M, K), int8 weights (N, K), scales (N,) -> (M, N).
int8_matmul = aten._weight_int8pack_mm
# Rows (M, K), packed int4 weights of (N, K), group size, scale and middle of each group (K / group, N, 2) -> (M, N).
int4_matmul = aten._weight_int4pack_mm_for_cpu


def cpu_capability() -> str:
    """Return the instruction set that the kernels use. The order of packed int4 weights depends on it."""
    return str(torch.backends.cpu.get_cpu_capability())


@cache
def has_fast_bfloat16() -> bool:
    """Return whether the CPU multiplies bfloat16 in hardware, and oneDNN may use it (ONEDNN_MAX_CPU_ISA)."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 in packable_dtypes() and any(
        capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")
    )


def has_failed_accelerator() -> bool:
    """Return whether an accelerator that this process uses is broken: then all that it is asked for fails."""
    module = torch.get_device_module()
    is_used = torch.accelerator.is_available() and getattr(module, "is_initialized", bool)()
    try:
        for index in range(module.device_count() if is_used else 0):
            if module.memory_reserved(index):  # Otherwise, this would initialize a device that is not used.
                module.synchronize(index)
    except RuntimeError:
        return True
    return False


def read_memory(device: torch.device) -> tuple[int, int, int]:
    """Return the bytes of an accelerator that tensors take, their peak or 0 if it is not known, and what is left."""
    # PyTorch holds more than tensors take. transformers' get_max_memory initializes every GPU of the machine.
    if device.type == "mps":
        used = torch.mps.current_allocated_memory()
        return used, 0, torch.mps.recommended_max_memory() - used
    module = torch.get_device_module(device)
    try:
        free, _ = module.mem_get_info(device)
    except (AttributeError, NotImplementedError, RuntimeError):  # some drivers of Intel's do not tell
        free = module.get_device_properties(device).total_memory - module.memory_reserved(device)
    stats = module.memory_stats(device)  # once: each function for a single one reads them all
    used, held = (stats.get(f"{name}_bytes.all.current", 0) for name in ("allocated", "reserved"))
    return used, stats.get("allocated_bytes.all.peak", 0), free + held - used


def packable_dtypes() -> set[torch.dtype]:
    """Return the types of weights for which oneDNN has kernels on this CPU that are faster than nn.Linear."""
    if not torch.backends.mkldnn.is_available():
        return set()
    dtypes = {torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set()
    # float32 was measured on x86 only.
    return dtypes | {torch.float32} if cpu_capability() in ("AVX2", "AVX512") else dtypes


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """Return weights (N, K) in oneDNN's own order, for `packed_linear`."""
    # The order depends on the number of rows that is expected; bfloat16's is the same for any.
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1 if weight.dtype == torch.bfloat16 else PACKED_ROWS)


def packed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply (..., K) by packed weights of (N, K)."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Return int32 codes (N, K), each 0 to 15, as uint8 (N, K / 2) in the order of this CPU's kernel."""
    return aten._convert_weight_to_int4pack_for_cpu(codes, 1)  # The CPU's kernel ignores the second argument.


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one for all graphs: cuBLAS keeps a workspace for each stream


def capture_graph(step: Callable[[], torch.Tensor], device: torch.device) -> tuple[Callable[[], None], torch.Tensor]:
    """Return a function that repeats a computation of the GPU, and the tensor that has its result afterwards.

    Raises RuntimeError if it cannot be captured. See docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
    """
    graph, mode = torch.cuda.CUDAGraph(), torch.cuda.get_sync_debug_mode()
    with torch.cuda.device(device):
        stream, current = _capture_stream(device), torch.cuda.current_stream()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                step()  # Kernels are chosen, and their workspaces made, in the first call.
                torch.cuda.set_sync_debug_mode("error")
                step()  # Where it waits for the GPU, a capture would fail, and PyTorch then frees no memory.
                torch.cuda.set_sync_debug_mode(mode)
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    result = step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            current.wait_stream(stream)
    return graph.replay, result
