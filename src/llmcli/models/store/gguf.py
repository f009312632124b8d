"""GGUF files: the header is checked before a reader trusts it, and a child process with limits converts the file."""

import errno
import json
import math
import mmap
import os
import resource
import signal
import struct
import sys
import threading
import traceback
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

from llmcli import console
from llmcli.errors import ModelUnavailableError, first_line
from llmcli.models import loading

DAMAGED = "the file is damaged, or its architecture is not supported"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct formats
STRING, ARRAY = 8, 9
MAX_ENTRIES = 100_000  # of the metadata, or tensors; models have some thousands
MAX_ELEMENTS = 4_000_000  # of all arrays; the largest vocabularies have 1.3 million with their merges
MEMORY_BYTES, MEMORY_FACTOR = 4 * 10**9, 4  # limit: a constant, and times the size in float32
CPU_SECONDS, BYTES_PER_CPU_SECOND = 300, 10**6  # limit: a constant, and by the size in float32


class Header:
    """Reads a header. Raises ValueError, LookupError or struct.error if it does not fit the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position, self.order, self.elements = data, 0, "<", 0

    def read(self, format: str) -> tuple[int, ...]:
        values = struct.unpack_from(self.order + format, self.data, self.position)
        self.position += struct.calcsize(self.order + format)
        return values

    def skip(self, size: int) -> bytes:
        """Return the first bytes of what is skipped."""
        start, self.position = self.position, self.position + size
        require(self.position <= len(self.data), "a value is longer than the file")
        return self.data[start : min(self.position, start + 100)]

    def read_value(self) -> int:
        """Read a value of the metadata, and return it if it is a whole number; 0 if not."""
        (kind,) = self.read("I")
        if kind == STRING:
            self.skip(*self.read("Q"))
        elif kind == ARRAY:
            kind, count = self.read("IQ")
            self.elements += count
            require(self.elements <= MAX_ELEMENTS, f"its arrays have more than {MAX_ELEMENTS} elements")
            if kind != STRING:
                self.skip(count * struct.calcsize(SCALARS[kind]))  # Nobody writes nested arrays.
                count = 0
            for _ in range(count):
                self.skip(*self.read("Q"))
        else:
            (value,) = self.read(SCALARS[kind])
            return value if isinstance(value, int) else 0
        return 0


def require(is_valid: bool, message: str) -> None:
    if not is_valid:
        raise ValueError(message)


def measure(file: Path) -> int:
    """Return the bytes that the tensors take in float32. Raises what Header raises."""
    from gguf.constants import GGML_QUANT_SIZES

    block_sizes = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header, alignment = Header(data), 32
        require(header.skip(4) == b"GGUF", "it is not a GGUF file")
        header.order = ">" if data[4:6] == b"\0\0" else "<"
        version, tensor_count, value_count = header.read("IQQ")
        require(version in (2, 3), f"version {version} is not supported")
        require(max(tensor_count, value_count) <= MAX_ENTRIES, f"it has more than {MAX_ENTRIES} tensors or values")
        for _ in range(value_count):
            key, value = header.skip(*header.read("Q")), header.read_value()
            alignment = value if key == b"general.alignment" else alignment
            is_count = key.endswith(b".block_count")
            require(not is_count or 0 < value <= tensor_count, f"{value} layers, but {tensor_count} tensors")
        require(alignment > 0 and not alignment & (alignment - 1), f"invalid alignment {alignment}")
        elements = size = end = 0
        for _ in range(tensor_count):
            name, (dimensions,) = header.skip(*header.read("Q")), header.read("I")
            require(dimensions <= 4, f"tensor {name!r} has {dimensions} dimensions")
            shape, (kind, offset) = header.read("Q" * dimensions), header.read("IQ")
            (block, block_bytes), count = block_sizes[kind], math.prod(shape)
            is_valid = offset % alignment == 0 and (shape or (1,))[0] % block == 0
            require(is_valid, f"tensor {name!r} has an invalid shape or offset")
            elements += count
            size += count // block * block_bytes
            end = max(end, offset + count // block * block_bytes)
        start = -(-header.position // alignment) * alignment
        require(start + max(size, end) <= len(data), "its tensors are longer than the file")
        return 4 * elements


def convert(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file to `folder`, dequantized to float32, with its tokenizer."""
    console.notice(f"converting {file.name} to safetensors, once")
    try:
        float_bytes = measure(file)
    except (ValueError, LookupError, struct.error) as exc:
        reason = exc if type(exc) is ValueError else "its header is invalid"
        raise ModelUnavailableError(f"cannot read {file.name}: {reason}", DAMAGED) from exc
    alone = folder.with_name("alone")  # Other files of the directory are not read.
    alone.mkdir(parents=True)
    link = alone / f"{file.stem}.gguf"  # transformers takes .GGUF for pickled weights.
    link.symlink_to(file)
    memory = MEMORY_BYTES + MEMORY_FACTOR * float_bytes + file.stat().st_size
    run_child(link, folder, memory, CPU_SECONDS + float_bytes // BYTES_PER_CPU_SECOND)


def run_child(file: Path, folder: Path, memory: int, seconds: int) -> None:
    """Convert in a process that may take `memory` bytes more than its libraries, and seconds of CPU time."""
    arguments = [str(file), str(folder), str(memory), str(seconds), *["-v"] * console.verbose]
    stderr = None if console.is_watched() or console.verbose else DEVNULL
    command = [sys.executable, "-P", "-m", __name__, *arguments]
    with Popen(command, stdin=PIPE, stdout=PIPE, stderr=stderr, text=True, errors="replace") as process:
        try:
            report = process.stdout.read() if process.stdout else ""
            status = process.wait()
        except BaseException:
            process.kill()
            raise
    if report:
        message, hint, code, trace = json.loads(report)
        if not hint and (code or "No space left on device" in message):
            raise OSError(code or errno.ENOSPC, message)  # `cache.writing` knows them.
        raise ModelUnavailableError(message, hint or DAMAGED) from RuntimeError(trace)
    if status:
        end = f"more than {seconds} seconds of CPU time" if -status == signal.SIGXCPU else f"exit status {status}"
        hint = f"{DAMAGED}, or the model does not fit in memory"
        raise ModelUnavailableError(f"cannot read {file.name}: the conversion failed: {end}", hint)


def _run(file: Path, folder: Path, memory: int, seconds: int) -> None:
    """Convert within limits, and print a failure as JSON: message, hint, errno, traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent ends this process, or closes the pipe when it is gone.
    threading.Thread(target=lambda: os._exit(len(os.read(0, 1)) + 1), daemon=True).start()
    try:
        loading.quiet_libraries()
        import torch  # noqa: F401  # Its size does not count.

        statm = Path("/proc/self/statm")
        used = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0
        limits = {resource.RLIMIT_AS: used + memory, resource.RLIMIT_CPU: seconds, resource.RLIMIT_CORE: 0}
        for kind, value in limits.items():
            bounds = value, *resource.getrlimit(kind)
            resource.setrlimit(kind, (min(bound for bound in bounds if bound != resource.RLIM_INFINITY), bounds[2]))
        _convert(file, folder)
    except Exception as exc:
        if isinstance(exc, MemoryError) or getattr(exc, "errno", None) == errno.ENOMEM:
            exc = ModelUnavailableError(f"{file.name} does not fit in memory", hint="use a smaller model")
        details = [getattr(exc, name, None) for name in ("hint", "errno")]
        print(json.dumps([getattr(exc, "message", str(exc) or repr(exc)), *details, traceback.format_exc()]))


def _convert(file: Path, folder: Path) -> None:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Versions of transformers that can keep GGUF weights quantized have to be told not to.
    can_keep = hasattr(transformers, "GgufConfig")
    plain = {"quantization_config": transformers.GgufConfig(dequantize=True)} if can_keep else {}
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model, report = AutoModelForCausalLM.from_pretrained(**where, **plain, output_loading_info=True)
    except MemoryError:
        raise
    except Exception as exc:
        raise ModelUnavailableError(f"cannot read {file.name}: {first_line(exc)}", hint=DAMAGED) from exc
    if missing := sorted(report["missing_keys"]):
        raise ModelUnavailableError(f"{file.name} is incomplete: missing {missing[0]}", hint="the file is damaged")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    console.set_verbose("-v" in sys.argv)
    with console.sanitized(), console.without_live_line():
        _run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
