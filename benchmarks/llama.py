"""llama.cpp as a peer: llama-server with slots for batches, and llama-bench for one stream.

LLAMA_BIN names the directory of its programs, and LLAMA_GGUF that of the models, as smollm2-Q8_0.gguf and
llama-1b-Q8_0.gguf, also in bf16 and Q4_0. Without them, the rows of llama.cpp are left out. The sdist of
llama-cpp-python has all sources:

    pip download --no-deps --no-binary :all: llama-cpp-python && tar xf llama_cpp_python-*.tar.gz
    cd llama_cpp_python-*/vendor/llama.cpp
    cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF
    cmake --build build --target llama-server llama-bench llama-quantize -j
    python convert_hf_to_gguf.py "$(llmcli models path smollm2)" --outtype bf16 --outfile smollm2-bf16.gguf
    build/bin/llama-quantize --pure smollm2-bf16.gguf smollm2-Q8_0.gguf Q8_0

`python benchmarks/inputs.py` makes the other model, llama-1b. For a run that is limited to AVX2, build the programs
with -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON.
"""

import functools
import http.client
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measure import Run, Variant, execute, wait

KINDS = ("bf16", "Q8_0", "Q4_0")
SLOTS, SLOT_TOKENS, CLIENTS, START_S = 32, 512, 64, 120


def programs() -> Path:
    """The directory of the programs, whose libraries come first."""
    folder = os.environ["LLAMA_BIN"]
    os.environ["LD_LIBRARY_PATH"] = folder
    return Path(folder)


def models(name: str) -> dict[str, str]:
    """The model's files by kind of weights."""
    if not {"LLAMA_BIN", "LLAMA_GGUF"} <= os.environ.keys():
        return {}
    files = {kind: Path(os.environ["LLAMA_GGUF"], f"{name}-{kind}.gguf") for kind in KINDS}
    return {kind: str(file) for kind, file in files.items() if file.exists()}


def streams(name: str, prompt: int, new: int) -> dict[str, Variant]:
    """One stream of llama-bench: the new tokens after a prompt of so many, without loading."""

    def run(file: str) -> Run:
        options = ["-p", "0", "-n", "0", "-pg", f"{prompt},{new}", "-r", "1", "-o", "json"]
        ran = execute([str(programs() / "llama-bench"), "-m", file, "-t", str(os.cpu_count()), *options])
        (found,) = json.loads(ran.output)
        return Run(found["avg_ns"] / 1e9, new, ran.memory, "")

    return {f"llama.cpp, {kind}": functools.partial(run, file) for kind, file in models(name).items()}


def servers(name: str, prompts: Sequence[str], new: int) -> dict[str, Variant]:
    """llama-server, from its start to the last answer, with concurrent clients."""

    def run(file: str) -> Run:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        threads = str(os.cpu_count())
        start = time.perf_counter()
        errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        process = subprocess.Popen(
            [str(programs() / "llama-server"), "-m", file, "--host", "127.0.0.1", "--port", str(port), "-t", threads,
             "-tb", threads, "-np", str(SLOTS), "--cont-batching", "-c", str(SLOTS * SLOT_TOKENS), "--cache-ram", "0",
             "--no-warmup", "--no-webui", "--threads-http", str(CLIENTS)],
            stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
        )  # fmt: skip
        try:
            while request(port, "GET", "/health") is None:
                if process.poll() is not None or time.perf_counter() - start > START_S:
                    errors.seek(0)
                    raise RuntimeError(f"llama-server does not start: {errors.read()[-2000:].decode()}")
                time.sleep(0.02)
            bodies = ({"prompt": prompt, "n_predict": new, "temperature": 0, "ignore_eos": True} for prompt in prompts)
            with ThreadPoolExecutor(CLIENTS) as pool:
                answers = list(pool.map(lambda body: request(port, "POST", "/completion", body), bodies))
            seconds = time.perf_counter() - start
        finally:
            process.terminate()
            memory = wait(process) if process.returncode is None else 0
        tokens = sum(answer["tokens_predicted"] if answer else 0 for answer in answers)
        if tokens != len(prompts) * new:
            raise RuntimeError(f"llama-server wrote {tokens} tokens, not {len(prompts) * new}")
        return Run(seconds, tokens, memory, "")

    return {f"llama-server, {SLOTS} slots, {kind}": functools.partial(run, file) for kind, file in models(name).items()}


def request(port: int, method: str, path: str, body: Any = None) -> Any:
    """The answer of the server, or None if it has none."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    try:
        connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
    except ConnectionError:
        return None
    finally:
        connection.close()
    return json.loads(content) if response.status == 200 else None
