"""Constrained answers of smollm2: 500 records with five schemas in one run, each answer checked by jsonschema, at batch
1 and auto in float32; and what a constraint costs, and forced tokens gain, in tokens per second of one process.

`RECORDS` in the environment makes the first part shorter."""

import functools
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jsonschema
import torch
from measure import LLMCLI, pull, report, rounds

from llmcli import pipelines
from llmcli.job import LoadOptions
from llmcli.models import generation
from llmcli.pipelines.running import BatchSettings, GeneratingRow
from llmcli.pipelines.slots import SlotBatch
from llmcli.text.constraints import to_grammar

RECORDS, TOKENS, BATCH = int(os.environ.get("RECORDS", "500")), 160, 16


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


NAME = {"type": "string", "maxLength": 16}
FLAG = {"type": "boolean"}
NODE = closed({"name": NAME, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}})
SCHEMAS = [
    closed({"name": NAME, "home": closed({"city": NAME, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}})}),
    closed(
        {"kind": {"enum": ["person", "Größe", "日本語 🦊"]}, "tags": {"type": "array", "items": NAME, "maxItems": 3}}
    ),
    closed({"age": {"type": "integer", "minimum": 0, "maximum": 120}, "score": {"type": "number", "maximum": 1}}),
    closed({"title": {"type": "string", "maxLength": 30}, "is_true": FLAG, "note": {"type": ["integer", "null"]}}),
    {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
]
HEAVY = closed({  # nearly all of an answer is names of fields
    "customer_name": NAME, "is_registered_customer": FLAG, "favorite_color": {"enum": ["red", "green", "blue"]},
    "years_of_membership": {"type": "integer", "minimum": 0, "maximum": 50}, "has_newsletter_subscription": FLAG,
    "preferred_contact": {"enum": ["email", "telephone", "letter"]},
})  # fmt: skip
PEOPLE = ["Ann Miller, 34, a nurse from Boston", "Bob, who is 50 and lives in Rome", "my cousin Zoe from Paris", "Tom"]


def check_records(folder: Path) -> list[str]:
    """Rows of a table: how many answers are valid, and how many differ between batches."""
    lines = [
        {"id": i, "text": f"Describe {PEOPLE[i % 4]} ({i}) as JSON.", "schema": SCHEMAS[i % len(SCHEMAS)]}
        for i in range(RECORDS)
    ]
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = ["chat", "--jsonl", "-f", str(source), "--schema-field", "schema", "--prompt", "{text}",
            "--temperature", "0", "--dtype", "float32", "--max-new-tokens", str(TOKENS)]  # fmt: skip
    results: dict[str, list[dict[str, Any]]] = {}
    for size in ("auto", "1"):
        done = subprocess.run([LLMCLI, *args, "--batch-size", size], capture_output=True, text=True)
        results[size] = [json.loads(line) for line in done.stdout.splitlines()]
    valid = failed = 0
    for record in results["auto"]:
        if "error" in record:
            failed += 1
            continue
        jsonschema.validate(json.loads(record["generated_text"]), record["schema"])
        valid += 1
    fields = "generated_text", "error"
    pairs = zip(results["auto"], results["1"], strict=True)
    different = sum([one.get(name) for name in fields] != [other.get(name) for name in fields] for one, other in pairs)
    return [f"| {RECORDS} records, 5 schemas | {valid} valid | {failed} errors | {different} differ at batch 1 |"]


def generate(pipeline: Any, rows: Sequence[Any], config: Any, constraint: str | None = None) -> list[Any]:
    """Do what the engine does with preprocessed rows of one batch, and return their outputs."""
    new = config.max_new_tokens
    length = new + max(len(row["input_ids"]) for row in rows)
    batch = pipeline.start(BatchSettings(config, max_rows=len(rows), max_length=length))
    batch.add([GeneratingRow(row, new, constraint) for row in rows])
    outputs: dict[int, Any] = {}
    while len(outputs) < len(rows):
        outputs |= batch.step()
    return [pipeline.postprocess(outputs[i], config) for i in range(len(rows))]


def measure_speed() -> list[str]:
    """Rows of a table: tokens per second with and without a constraint, and with and without forced tokens."""
    pipeline: Any = pipelines.load("causal", Path(pull("smollm2")), LoadOptions())
    own = pipeline.model.generation_config
    prompts = [[{"role": "user", "content": f"Describe {PEOPLE[i % 4]} ({i}) as JSON."}] for i in range(BATCH)]
    rows = [pipeline.preprocess(prompt) for prompt in prompts]

    def run(count: int, options: dict[str, Any], constraint: dict[str, Any] | None, force: bool = True) -> float:
        config = generation.merge(own, options, {"max_new_tokens": TOKENS, "do_sample": False})
        config.eos_token_id = pipeline.find_end_tokens(config)
        with mock.patch.object(SlotBatch, "_choose_columns", SlotBatch._choose_columns if force else lambda _: 1):
            start = time.perf_counter()
            outputs = generate(pipeline, rows[:count], config, to_grammar(constraint) if constraint else None)
            elapsed = time.perf_counter() - start
        return sum(int(output["usage"]["completion_tokens"]) for output in outputs) / elapsed

    def ratio(name: str, one: Callable[[], float], other: Callable[[], float]) -> str:
        pairs = [(one(), other()) for _ in range(rounds() + 1)][1:]
        mine, theirs = (statistics.median(values) for values in zip(*pairs, strict=True))
        factor = statistics.median(first / second for first, second in pairs)
        return f"| {name} | {mine:.1f} tokens/s | {theirs:.1f} tokens/s | {factor:.2f} |"

    fixed = {"max_new_tokens": 64, "min_new_tokens": 64}
    free, heavy = {"regex": "(?s:.)*"}, {"schema": HEAVY}
    plain = functools.partial(run, BATCH, fixed, None)
    return [
        ratio(f"constraint against none, batch {BATCH}", functools.partial(run, BATCH, fixed, free), plain),
        ratio(f"schema against none, batch {BATCH}", functools.partial(run, BATCH, {}, heavy), plain),
        *(
            ratio(
                f"forced tokens, batch {count}",
                *(functools.partial(run, count, {}, heavy, way) for way in (True, False)),
            )
            for count in (1, BATCH)
        ),
    ]


def main() -> list[str]:
    """The rows of tables in Markdown."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    rows = measure_speed()
    report(*rows)
    with tempfile.TemporaryDirectory() as scratch:
        return [*rows, *check_records(Path(scratch))]


if __name__ == "__main__":
    print("\n".join(main()))
