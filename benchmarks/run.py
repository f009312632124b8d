"""make bench: every figure, measured here and now, into RESULTS.md with the machine and the versions."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import startup

HEADER = "| what | llmcli | peer | ratio | at most | runs |\n|---|---|---|---|---|---|"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    packages = ", ".join(f"{name} {version(name)}" for name in ("llmcli", "transformers", "torch", "typer"))
    machine = f"{processor()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`: medians of whole processes, ours and the peer's in turn; the ratio is the median of",
        "the ratios pair by pair. Times vary with the machine, ratios little.",
        "",
        f"{machine}; {packages}.",
        "",
        "## Start-up",
        "",
        "The peer of `--help` is a bare Typer program's; of a cold `generate`, the shortest transformers script that",
        "does the same with the same weights (float32, greedy).",
        "",
        HEADER,
        *startup.main(),
    ]
    path = Path(__file__).with_name("RESULTS.md")
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
