"""Encoder-decoders: translation and summarization, against a plain loop of Transformers and CTranslate2.

CT2_PYTHON names an interpreter that has ctranslate2 and transformers. Without it, its rows are left out."""

import functools
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from inputs import MODELS, model, prompts, sentences, write_records
from measure import LLMCLI, PYTHON, Run, Variant, alternate, count_equal, execute, scaled, tabulate

SENTENCES, SENTENCE_TOKENS = {1: 128, 4: 32}, 48  # by number of beams
DOCUMENTS, SUMMARY_TOKENS, DOCUMENT_WORDS = {1: 32, 4: 12}, 60, (120, 240)
ROWS = 32
LOAD = """
import json, sys
from transformers import AutoTokenizer
folder, texts = sys.argv[1], [json.loads(line)["text"] for line in open(sys.argv[2])]
beams, new, rows = map(int, sys.argv[3:6])
tokenizer = AutoTokenizer.from_pretrained(folder)
"""
LOOP = f"""{LOAD}
from transformers import AutoModelForSeq2SeqLM
model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype="float32")
found = {{}}
order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
for start in range(0, len(order), rows):
    some = order[start : start + rows]
    inputs = tokenizer([texts[i] for i in some], return_tensors="pt", padding=True, return_token_type_ids=False)
    output = model.generate(**inputs, num_beams=beams, do_sample=False, max_new_tokens=new, min_new_tokens=new)
    found.update(zip(some, tokenizer.batch_decode(output, skip_special_tokens=True)))
for i in range(len(texts)):
    print(json.dumps({{"text": found[i]}}))
"""
CONVERT = """
import sys
from ctranslate2.converters import TransformersConverter
TransformersConverter(sys.argv[1]).convert(sys.argv[2], quantization=sys.argv[3], force=True)
"""
CT2 = f"""{LOAD}
import os
import ctranslate2
threads = {{"inter_threads": 1, "intra_threads": os.cpu_count()}}
model = ctranslate2.Translator(sys.argv[6], device="cpu", compute_type=sys.argv[7], **threads)
pieces = [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(texts)["input_ids"]]
lengths = {{"max_decoding_length": new, "min_decoding_length": new}}
for result in model.translate_batch(pieces, beam_size=beams, max_batch_size=rows, **lengths):
    ids = tokenizer.convert_tokens_to_ids(result.hypotheses[0])
    print(json.dumps({{"text": tokenizer.decode(ids, skip_special_tokens=True)}}))
"""


def measure(
    name: str, command: Sequence[str], field: str, texts: Sequence[str], beams: int, new: int
) -> dict[str, list[Run]]:
    """Runs by variant. The texts of the plain loop are what the others should write."""
    with tempfile.TemporaryDirectory() as scratch:
        path = write_records(Path(scratch, "in.jsonl"), texts)
        peer = [model(name), str(path), str(beams), str(new), str(ROWS)]
        options = ["--num-beams", str(beams), "--max-new-tokens", str(new), "--min-new-tokens", str(new)]
        own = [LLMCLI, *command, "-m", model(name), "--jsonl", "-f", str(path), "--temperature", "0", *options]

        def run(command: Sequence[str], field: str = "text") -> Run:
            ran = execute(command, len(texts))
            written = [json.loads(line)[field] for line in ran.output.splitlines()]
            return Run(ran.seconds, ran.amount, ran.memory, json.dumps(written))

        def ours(*args: str) -> Variant:
            return functools.partial(run, [*own, "--keep-alive", "0", *args], field)

        variants: dict[str, Variant] = {
            "llmcli --dtype float32": ours("--dtype", "float32"),
            "llmcli": ours(),
            "llmcli --quantize int8": ours("--quantize", "int8"),
            f"loop of `generate` by length, float32, batches of {ROWS}": functools.partial(run, [*PYTHON, LOOP, *peer]),
        }
        if python := os.environ.get("CT2_PYTHON"):
            for kind in ("float32", "int8"):
                if not (folder := MODELS / f"{name}-ct2-{kind}").exists():
                    execute([python, "-c", CONVERT, model(name), str(folder), kind])
                converted = [python, "-c", CT2, *peer, str(folder), kind]
                variants[f"CTranslate2, {kind}"] = functools.partial(run, converted)
        return alternate(variants)


def table(name: str, command: Sequence[str], field: str, texts: dict[int, list[str]], new: int) -> list[str]:
    """The rows of a table in Markdown, greedy and with beams."""
    rows = []
    for beams, some in texts.items():
        found = measure(name, command, field, some, beams, new)
        expected = next(json.loads(runs[-1].output) for name, runs in found.items() if name.startswith("loop"))
        about = f"{len(some)} records, {f'{beams} beams' if beams > 1 else 'greedy'}"
        rows += tabulate(
            {f"{about}: {name}": runs for name, runs in found.items()},
            digits=2,
            extra=lambda _, run, expected=expected: count_equal(json.loads(run.output), expected),
        )
    return rows


def translate() -> list[str]:
    texts = {beams: sentences(scaled(count)) for beams, count in SENTENCES.items()}
    return table("marian", ["translate", "--from", "en", "--to", "fr"], "translation_text", texts, SENTENCE_TOKENS)


def summarize() -> list[str]:
    low, high = DOCUMENT_WORDS
    texts = {beams: prompts(scaled(count), high, low) for beams, count in DOCUMENTS.items()}
    return table("bart", ["summarize"], "summary_text", texts, SUMMARY_TOKENS)
