"""Where the time of one stream goes: `python benchmarks/profile_decode.py [none|int8|int4]` prints the operations of
100 tokens by the time that each takes itself, in percent, and what is left for Python between them."""

import sys
import time
from pathlib import Path

import decode
from measure import smollm2
from torch.profiler import ProfilerActivity, profile

from llmcli import pipelines
from llmcli.job import LoadOptions

MOST = 12  # operations shown


def main() -> None:
    scheme = sys.argv[1] if len(sys.argv) > 1 else "none"
    pipeline = pipelines.load("causal", Path(smollm2()), LoadOptions(dtype="bfloat16", quantize=scheme))
    decode.TOKENS = 100
    run = decode.ours(pipeline)
    run()
    start = time.perf_counter()
    run()
    wall = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    found = sorted(seen.key_averages(), key=lambda each: -each.self_cpu_time_total)
    inside = sum(each.self_cpu_time_total for each in found) / 1e6
    print(f"{decode.TOKENS / wall:.1f} tokens/s without the profiler")
    print(f"| operation | calls a token | of the time in operations ({inside:.2f} s) |\n|---|---|---|")
    for each in found[:MOST]:
        share = each.self_cpu_time_total / 1e6 / inside
        print(f"| {each.key} | {each.count / decode.TOKENS:.1f} | {share:.1%} |")


if __name__ == "__main__":
    main()
