"""What an exception says about the device: it is out of memory, or nothing can run on it any more."""

import re
import sys

from llmcli.errors import DeviceError, first_line

OUT_OF_MEMORY = re.compile(
    r"out.?of.?(device.|host.)?memory|error_out_of_resources|alloc_failed|memory_error|not enough memory"
    r"|insufficient memory|can(no|')t allocate|allocation failed|invalid buffer size"
    r"|cublas_status_not_initialized|cudnn_status_not_supported|nvml_success",  # what else fails for lack of memory
    re.IGNORECASE,
)
FAILED = re.compile(r"\b(CUDA|HIP)( driver)? error|DEVICE_LOST")
HARMLESS = re.compile(r"invalid (configuration )?argument|captur|STATUS_(NOT_SUPPORTED|INVALID_VALUE)")  # of FAILED


def is_out_of_memory(exc: BaseException | None) -> bool:
    """Return whether any device was out of memory, be it that this led to another error."""
    while isinstance(exc, MemoryError | RuntimeError | OSError):
        if isinstance(exc, MemoryError) or OUT_OF_MEMORY.search(str(exc)):
            return True
        exc = exc.__cause__ or exc.__context__
    return False


def device_error(exc: Exception) -> DeviceError | None:
    """Return the error that ends the job if the device has failed, by this exception or by what it does now."""
    text = str(exc)
    has_failed = bool(FAILED.search(text)) or type(exc).__name__ == "AcceleratorError"
    has_failed &= not (HARMLESS.search(text) or is_out_of_memory(exc))
    if not has_failed and "torch" in sys.modules:
        from llmcli.compat.torch import has_failed_accelerator

        has_failed = has_failed_accelerator()
    hint = "run the command again, or use --device cpu"
    return DeviceError(f"device failed: {first_line(exc)}", hint) if has_failed else None
