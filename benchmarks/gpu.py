"""What llmcli does on a card: `python benchmarks/gpu.py` prints one table, and writes all figures to gpu.json.

It needs no network and no weights: it makes random models of real shapes, and a tokenizer from the project's pages. It
ends within SECONDS, whatever happens: each part has a limit, and one that fails prints its error while the others go
on. `--size small` tries the script itself, also without a card. Speeds leave out imports and loading, except those of
whole processes. The peers are what people write with Transformers, in the same process model and precision.
"""

import argparse
import json
import math
import operator
import os
import platform
import queue
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import gpu_parts
from gpu_parts import CHILDREN, FREE, LLMCLI, SIZES, Size

SECONDS = 345  # for all parts together


def watch(child: str, arguments: list[str], deadline: float, figures: dict[str, list[float]]) -> dict[str, Any]:
    """Run the parts of a child, after one that kills it in another process, and return what became of each."""
    parts, outcome = [*CHILDREN[child]], dict[str, Any]()

    def end(part: str, begun: float, error: str | None) -> None:
        outcome[f"{child} {part}"] = {"seconds": round(time.monotonic() - begun, 1), "error": error}
        parts.remove(part)
        print(f"{child} {part}: {error or 'done'}, {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)

    while parts:
        lines, begun, current = queue.Queue[str | None](), time.monotonic(), parts[0]
        if begun >= deadline:
            end(current, begun, "skipped: no time is left")
            continue
        with tempfile.TemporaryFile("w+") as errors:
            command = [sys.executable, gpu_parts.__file__, *arguments, child, *parts]
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True,
                start_new_session=True,
            )  # fmt: skip
            threading.Thread(target=read_lines, args=(process, lines), daemon=True).start()
            while parts:
                limit = min(begun + CHILDREN[child][current][1], deadline)
                try:
                    line = lines.get(timeout=max(0, limit - time.monotonic()))
                except queue.Empty:
                    end(current, begun, "stopped: the time for it is over")
                    break
                if line is None:
                    errors.seek(0)
                    last = " ".join(errors.read().split())[-400:]
                    end(current, begun, f"the process ended with code {process.wait()}: {last}")
                    break
                event = json.loads(line)
                if "value" in event:
                    figures.setdefault(event["name"], []).append(event["value"])
                elif "end" in event:
                    end(current, begun, event["error"])
                    begun, current = time.monotonic(), (parts or [""])[0]
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return outcome


def read_lines(process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
    assert process.stdout
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


# What the figures say


COMPARE: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le, "==": operator.eq}


class Row(NamedTuple):
    """A figure and its peer; what is asked of their ratio, or of the figure if `is_alone`."""

    item: int
    what: str
    llmcli: float | None
    peer: float | None = None
    sign: str = ""
    bound: float | None = None
    is_alone: bool = False

    @property
    def ratio(self) -> float | None:
        return quotient(self.llmcli, self.peer)

    @property
    def is_met(self) -> bool | None:
        judged = self.llmcli if self.is_alone else self.ratio
        return COMPARE[self.sign](judged, self.bound) if judged is not None and self.bound is not None else None


def quotient(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def compare(figures: dict[str, list[float]], size: Size) -> list[Row]:
    """Return the table: what this project aims for on a GPU, by number."""

    def median(name: str) -> float | None:
        return statistics.median(figures[name]) if name in figures else None

    def total(prefix: str) -> float | None:
        values = [value for name, runs in figures.items() if name.startswith(prefix) for value in runs]
        return sum(values) if values else None

    fixed = [speed for rows in size.batches if (speed := median(f"llmcli, {rows}"))]
    auto, stream, further = (median(f"llmcli, {name}") for name in ("auto", "stream", "stream, each further token"))
    kernel_s, lines_per_s = median("a token, kernel seconds"), median("llmcli, score")
    whole_peer = [median("pipeline, loading seconds"), median("pipeline, seconds")]
    one_line, all_lines = (median(f"llmcli, score, whole process, {name}") for name in ("line", "lines"))
    halvings = 2 * math.ceil(math.log2(size.long_records))
    return [
        Row(1, "tokens/s, `--batch-size auto`; peer: the best fixed size", auto, max(fixed, default=None), ">=", 0.9),
        Row(1, "tokens/s, auto; peer: `pipeline` at its best batch size", auto, median("pipeline"), ">=", 2),
        Row(1, "tokens/s, auto; peer: llmcli without graphs", auto, median("llmcli, no graphs, auto")),
        Row(1, f"seconds of a whole process, {size.records:,} records; peer: `pipeline`",
            median("llmcli, whole process"), sum(filter(None, whole_peer)) if all(whole_peer) else None, "<=", 1),
        Row(2, "tokens/s, answers end at random; peer: `pipeline`", median("llmcli, ends"),
            median("pipeline, ends"), ">=", 3),
        Row(3, "tokens/s, one stream; peer: `generate`", stream, median("generate, stream"), ">=", 3),
        Row(3, "tokens/s, one stream; peer: `generate` with a static cache", stream, median("static, stream")),
        Row(3, "tokens/s, one stream; peer: llmcli without graphs", stream, median("llmcli, no graphs, stream")),
        Row(3, "tokens/s, one stream, without its first tokens; peer: what the memory's bandwidth allows", further,
            quotient(median("bandwidth"), median("read bytes"))),
        Row(3, "ms for a token of one stream; peer: those in kernels", quotient(1e3, further),
            1e3 * kernel_s if kernel_s is not None else None),
        Row(3, "kernels for a token of one stream; peer: launches of kernels", median("a token, kernels"),
            median("a token, launches")),
        Row(3, "launches of graphs for a token of one stream", median("a token, graphs")),
        Row(4, "texts in float32 that differ between batch sizes", total("texts that differ by"), None, "==", 0, True),
        Row(4, "texts in float32 that differ without graphs", total("texts that differ without"), None, "==", 0, True),
        Row(4, "texts in float32 that differ from `generate`", total("texts that differ from"), None, "==", 0, True),
        Row(4, "golden answers in float32 that differ", total("golden"), None, "==", 0, True),
        Row(5, "lines/s, `score`; peer: a loop over the model", lines_per_s, median("score, loop"), ">=", 5),
        Row(5, "lines/s, `score`; peer: a loop, 64 lines a batch", lines_per_s, median("score, loop of 64")),
        Row(5, f"seconds of a whole process, {size.lines:,} lines; peer: one line", all_lines, one_line, "<=", 2),
        Row(7, f"records lost, {FREE:.0%} of the card free", total("memory, records lost"), None, "==", 0, True),
        Row(7, f"notices, {FREE:.0%} of the card free", total("memory, notices"), None, "<=", halvings, True),
    ]  # fmt: skip


def to_markdown(table: list[Row]) -> str:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2f}"

    lines = ["| aim | figure | llmcli | peer | ratio | asked | met |", "|---|---|---|---|---|---|---|"]
    for row in table:
        asked = f"{row.sign} {row.bound}" if row.sign else ""
        met = {None: "", True: "yes", False: "no"}[row.is_met]
        cells = (row.item, row.what, *map(number, (row.llmcli, row.peer, row.ratio)), asked, met)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1b", help="shape of the model (default: 1b)")
    parser.add_argument("--device", help="cuda, cuda:1, or cpu (default: cuda if there is a card)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all parts (default: {SECONDS})")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="where the figures go (default: gpu.json)")
    given = parser.parse_args()
    size = SIZES[given.size]
    begun = time.monotonic()
    environment = subprocess.run([*LLMCLI, "env", "--json"], stdout=subprocess.PIPE, text=True, check=True).stdout
    about = json.loads(environment)
    print(json.dumps(about, indent=1), file=sys.stderr, flush=True)
    device = given.device or ("cuda" if any(name.startswith("cuda") for name in about["devices"]) else "cpu")
    figures, outcome = dict[str, list[float]](), dict[str, Any]()
    with tempfile.TemporaryDirectory(prefix="gpu") as folder:
        arguments = [folder, given.size, device]
        for child in CHILDREN:
            outcome |= watch(child, arguments, begun + given.seconds, figures)
            table = compare(figures, size)
            everything = {
                "environment": about, "device": device, "size": given.size, "seconds": round(time.monotonic() - begun),
                "table": [row._asdict() | {"ratio": row.ratio, "is_met": row.is_met} for row in table],
                "parts": outcome, "figures": figures
            }  # fmt: skip
            given.out.write_text(json.dumps(everything, indent=1) + "\n")  # what is there, if the next part is the last
    print(f"{size.hidden} x {size.layers} Llama on {device}: {card(device)}; {time.monotonic() - begun:.0f} s\n")
    print(to_markdown(table))
    for name, part in outcome.items():
        if part["error"]:
            print(f"\n{name}: {part['error']}")


def card(device: str) -> str:
    """The card's name and memory, from the driver."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    if not device.startswith("cuda") or not shutil.which(command[0]):
        return platform.processor() or platform.machine()
    names = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return names[int(device.partition(":")[2] or 0)] if names else "unknown"


if __name__ == "__main__":
    main()
