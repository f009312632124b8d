"""Encoders: embeddings against sentence-transformers, extractive question answering against the pipeline of
Transformers 4.57, and search.

ST_PYTHON names an interpreter that has sentence-transformers, and T4_PYTHON one that has Transformers 4.57. Without
them, their rows are left out."""

import functools
import json
import os
import random
import tempfile
from pathlib import Path

from inputs import lines, model, prompts, words
from measure import (
    LLMCLI,
    Run,
    Variant,
    alternate,
    choose,
    count_equal,
    describe,
    execute,
    report,
    rounds,
    scaled,
    tabulate,
)

EMBEDDED, SEARCHED = 1000, 5000  # lines
PAIRS, CONTEXT_WORDS, QUESTION_WORDS = 48, (30, 600), (5, 12)
ROWS, TRIAL = (1, 4, 8, 16, 32), 3  # batches of the peer, and the part of the pairs that chooses one of them
QUERIES = ("who may distribute copies of the work", "what happens to patents")
SENTENCE_TRANSFORMERS = """
import json, sys
from sentence_transformers import SentenceTransformer
lines = open(sys.argv[2]).read().splitlines()
for vector in SentenceTransformer(sys.argv[1], device="cpu").encode(lines, normalize_embeddings=True).tolist():
    print(json.dumps({"embedding": vector}))
"""
QUESTIONS = """
import json, sys
from transformers import pipeline
pairs = [json.loads(line) for line in open(sys.argv[2])]
run = pipeline("question-answering", model=sys.argv[1], tokenizer=sys.argv[1], device="cpu")
for answer in run(pairs, batch_size=int(sys.argv[3])):
    print(json.dumps(answer))
"""


def embed() -> list[str]:
    """The rows of a table in Markdown."""
    texts, folder = lines(scaled(EMBEDDED)), model("minilm")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "in.txt")
        path.write_text("".join(f"{line}\n" for line in texts))
        own = [LLMCLI, "embed", "-m", folder, "--lines", "-f", str(path), "--keep-alive", "0"]
        variants: dict[str, Variant] = {
            "llmcli": functools.partial(execute, own, len(texts)),
            "llmcli --dtype float32": functools.partial(execute, [*own, "--dtype", "float32"], len(texts)),
        }
        if python := os.environ.get("ST_PYTHON"):
            peer = [python, "-c", SENTENCE_TRANSFORMERS, folder, str(path)]
            variants["sentence-transformers"] = functools.partial(execute, peer, len(texts))
        found = alternate(variants)
    vectors = {
        name: [json.loads(line)["embedding"] for line in runs[-1].output.splitlines()] for name, runs in found.items()
    }
    expected = [*vectors.values()][-1]

    def difference(name: str, _: Run) -> str:
        pairs = zip(vectors[name], expected, strict=True)
        return f"{max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True)):.0e}"

    return tabulate(found, extra=difference)


def qa() -> list[str]:
    """The rows of a table in Markdown."""
    folder, count, chance = model("bert-qa"), scaled(PAIRS), random.Random(7)
    contexts = prompts(count, CONTEXT_WORDS[1], CONTEXT_WORDS[0])
    questions = [" ".join(chance.choices(words(), k=chance.randint(*QUESTION_WORDS))) + "?" for _ in contexts]
    with tempfile.TemporaryDirectory() as scratch:
        whole, part = Path(scratch, "whole.jsonl"), Path(scratch, "part.jsonl")
        pairs = [
            json.dumps({"question": one, "context": other}) for one, other in zip(questions, contexts, strict=True)
        ]
        for path, some in ((whole, pairs), (part, pairs[::TRIAL])):
            path.write_text("".join(f"{pair}\n" for pair in some))
        own = [LLMCLI, "qa", "-m", folder, "--jsonl", "-f", str(whole), "--keep-alive", "0"]
        variants: dict[str, Variant] = {
            "llmcli": functools.partial(execute, own, count),
            "llmcli --dtype float32": functools.partial(execute, [*own, "--dtype", "float32"], count),
        }
        if python := os.environ.get("T4_PYTHON"):
            peer = [python, "-c", QUESTIONS, folder]
            tried = {str(rows): functools.partial(execute, [*peer, str(part), str(rows)]) for rows in ROWS}
            rows = choose(tried)
            name = f"pipeline of Transformers 4.57, batches of {rows}"
            variants[name] = functools.partial(execute, [*peer, str(whole), rows], count)
        found = alternate(variants)
    answers = {
        name: [json.loads(line)["answer"] for line in runs[-1].output.splitlines()] for name, runs in found.items()
    }
    expected = [*answers.values()][-1]
    return tabulate(found, digits=1, extra=lambda name, _: count_equal(answers[name], expected))


def search() -> list[str]:
    """The rows of a table in Markdown. Each round has lines of its own, whose vectors are not cached yet."""
    folder, found = model("minilm"), dict[str, list[Run]]()
    for number in range(rounds()):
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "in.txt")
            path.write_text("".join(f"{line}\n" for line in lines(scaled(SEARCHED), seed=number)))
            for name, query in (("first query", 0), ("the same query again", 0), ("a new query", 1)):
                call = ["env", f"LLMCLI_CACHE={scratch}/cache", LLMCLI, "search", QUERIES[query], "-m", folder]
                reads = ["sh", "-c", 'exec "$@" < "$0"', str(path)]
                found.setdefault(name, []).append(execute([*reads, *call, "--keep-alive", "0"]))
                report(name, f"{found[name][-1].seconds:.2f} s")
    return [f"| {name} | {describe(runs)} |" for name, runs in found.items()]
