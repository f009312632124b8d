"""Labels: how often `llmcli classify` is right on 200 sentences that people labeled, and how fast it labels 1,000
records, against what one writes without it. `python benchmarks/labels.py --quick` measures a part of both, and
`speed --long` longer records."""

import json
import random
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from inputs import lines, write_records
from measure import LLMCLI, PYTHON, execute, pull, report

SENTENCES = Path(__file__).parents[1] / "tests" / "data" / "sentences.jsonl"
LABELS = {
    "sentiment": ["positive", "negative", "neutral"],
    "topic": ["sports", "politics", "science", "business", "entertainment"],
}
MODELS = ["smollm2", "gemma3-270m"]
CHAT_MODELS = ["smollm2"]
BINS = [0.0, 0.5, 0.7, 0.9, 0.99, 1.0]  # of the score of the best label
CALIBRATION_BINS = [number / 10 for number in range(11)]  # of the calibration error
RECORDS, PART, RUNS = 1000, 200, 3  # PART of the records go one at a time
NEW_TOKENS = 4  # of a free answer that should be one word, where speed counts
ANSWER_TOKENS = 16  # where accuracy counts
QUESTION = "Which {field} does the text have: {choices}?\n\nText: {{text}}\n{title}:"  # for generate
MESSAGE = "Which {field} does the text have: {choices}? Answer with one word.\n\nText: {{text}}"  # for chat
LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DecisionConfig, pipeline
folder, labels = sys.argv[1], sys.argv[2].split(",")
texts = [json.loads(line)["text"] for line in open(sys.argv[3])]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
"""
DECISION = f"""{LOAD}
decide = pipeline("decision", model=model, tokenizer=tokenizer, decision_config=DecisionConfig())
question = {{"type": "choice", "instructions": "What is the topic?", "criteria": dict.fromkeys(labels)}}
for text in texts:
    answer = decide({{"state": text, "questions": {{"topic": question}}}})["topic"]
    print(json.dumps({{"label": answer["choice"], "scores": answer["probabilities"]}}))
"""
LOOP = f"""{LOAD}
ids = [tokenizer.encode(label, add_special_tokens=False)[0] for label in labels]
for text in texts:
    message = f"What is the topic of the text: {{', '.join(labels)}}? Answer with one word.\\n\\n{{text}}"
    inputs = tokenizer.apply_chat_template(
        [{{"role": "user", "content": message}}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        scores = model(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1, ids].float().softmax(-1).tolist()
    print(json.dumps({{"label": labels[scores.index(max(scores))], "scores": dict(zip(labels, scores))}}))
"""


def write_question(template: str, field: str) -> str:
    *first, last = LABELS[field]
    return template.format(field=field, title=field.capitalize(), choices=f"{', '.join(first)} or {last}")


def read_sentences(every: int = 1) -> list[dict[str, str]]:
    return [json.loads(line) for line in SENTENCES.read_text().splitlines()[::every]]


# Accuracy


def accuracy(every: int = 1) -> list[str]:
    """The rows of the table of accuracy, and the table of scores after them, in Markdown."""
    sentences = read_sentences(every)
    rows, scored = [], []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "in.jsonl")
        write_records(path, (sentence["text"] for sentence in sentences))
        common = ["--jsonl", "-f", str(path), "--dtype", "float32"]
        for field, labels in LABELS.items():
            truths = [sentence[field] for sentence in sentences]
            majority = Counter(truths).most_common(1)[0][1] / len(truths)
            rows.append(f"| {field} | | the most frequent label | {majority:.0%} | | |")
            for model in MODELS:
                for option in ([], ["--calibrate"]):
                    records = run("classify", *common, "--labels", ",".join(labels), "-m", model, *option)
                    found = [(record["label"], record["score"]) for record in records]
                    name = " ".join(["`classify", *option]) + "`"
                    rights = [label == truth for (label, _), truth in zip(found, truths, strict=True)]
                    scores = [score for _, score in found]
                    error = measure_calibration_error(scores, rights)
                    share = Counter(label for label, _ in found).most_common(1)[0]
                    rows.append(
                        f"| {field} | {model} | {name} | {statistics.mean(rights):.0%} |"
                        f" {statistics.mean(scores):.2f} | {error:.2f} |"
                    )
                    print(field, model, *option, f"{statistics.mean(rights):.3f}", share, file=sys.stderr, flush=True)
                    scored.append((field, model, name, describe_bins(scores, rights)))
                for command, template in (("generate", QUESTION), ("chat", MESSAGE)):
                    if command == "chat" and model not in CHAT_MODELS:
                        continue
                    answers = run(
                        command, *common, "--prompt", write_question(template, field), "-m", model,
                        "--temperature", "0", "--max-new-tokens", str(ANSWER_TOKENS),
                    )  # fmt: skip
                    labeled = [find_label(answer["generated_text"], labels) for answer in answers]
                    right = statistics.mean(mine == truth for mine, truth in zip(labeled, truths, strict=True))
                    print(field, model, command, f"{right:.3f}", Counter(labeled), file=sys.stderr, flush=True)
                    rows.append(
                        f"| {field} | {model} | `{command} --prompt`, the first label in the answer"
                        f" ({labeled.count(None) / len(labeled):.0%} have none) | {right:.0%} | | |"
                    )
    names = [f"{low:g} to {high:g}" for low, high in pairwise(BINS)]
    head = ["", f"| labels | model | method | {' | '.join(names)} |", f"|{'---|' * (len(names) + 3)}"]
    return rows + head + [f"| {field} | {model} | {name} | {bins} |" for field, model, name, bins in scored]


def run(command: str, *args: str) -> list[dict[str, object]]:
    """The records that llmcli writes."""
    return [json.loads(line) for line in execute([LLMCLI, command, *args]).output.splitlines()]


def find_label(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer mentions first."""
    places = {label: answer.lower().find(label) for label in labels}
    found = [label for label, place in places.items() if place >= 0]
    return min(found, key=places.__getitem__, default=None)


def split_by_score(
    scores: Sequence[float], rights: Sequence[bool], bins: Sequence[float]
) -> Iterator[list[tuple[float, bool]]]:
    """What lies in each bin; a score on a border belongs to the upper one, and 1 to the last."""
    for low, high in pairwise(bins):
        is_last = high == bins[-1]
        yield [(s, r) for s, r in zip(scores, rights, strict=True) if low <= s < high or (is_last and s >= high)]


def measure_calibration_error(scores: Sequence[float], rights: Sequence[bool]) -> float:
    """The expected calibration error: how far the mean score of a bin is from its accuracy, by the bin's size."""
    return sum(
        abs(sum(score for score, _ in part) - sum(right for _, right in part)) / len(scores)
        for part in split_by_score(scores, rights, CALIBRATION_BINS)
    )


def describe_bins(scores: Sequence[float], rights: Sequence[bool]) -> str:
    """The accuracy in each bin, and how many scores it has."""
    return " | ".join(
        f"{statistics.mean(right for _, right in part):.0%} of {len(part)}" if part else ""
        for part in split_by_score(scores, rights, BINS)
    )


# Speed


def make_texts(count: int, is_long: bool = False) -> list[str]:
    """Texts that are all different: of 3 to 15 words, or of one to three of the sentences."""
    if not is_long:
        return lines(count)
    sentences = [sentence["text"] for sentence in read_sentences()]
    chance, found = random.Random(7), dict[str, None]()
    while len(found) < count:
        found[" ".join(chance.sample(sentences, chance.randint(1, 3)))] = None
    return list(found)


def speed(count: int = RECORDS, part: int = PART, runs: int = RUNS, is_long: bool = False) -> list[str]:
    """The rows of the table of speed in Markdown."""
    model, texts = pull("smollm2"), make_texts(count, is_long)
    labels = ",".join(LABELS["topic"])
    with tempfile.TemporaryDirectory() as scratch:
        whole, few, single = (Path(scratch, name) for name in ("whole", "few", "single"))
        for path, some in ((whole, texts), (few, texts[:: count // part]), (single, texts[:1])):
            write_records(path, some)
        common = ["--jsonl", "-f", "FILE", "--dtype", "bfloat16", "--keep-alive", "0"]
        question = ["--prompt", write_question(QUESTION, "topic"), "--temperature", "0"]
        rows = {
            "`llmcli classify`": ([LLMCLI, "classify", *common, "--labels", labels], whole, count),
            f"`llmcli generate --prompt`, {NEW_TOKENS} tokens": (
                [LLMCLI, "generate", *common, *question, "--max-new-tokens", str(NEW_TOKENS)], whole, count
            ),
            "`decision` pipeline of Transformers": ([*PYTHON, DECISION, model, labels, "FILE"], few, part),
            "loop over the forward pass": ([*PYTHON, LOOP, model, labels, "FILE"], few, part),
        }  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(runs):
            for name, (command, path, size) in rows.items():
                start, took = (
                    execute([str(file) if part == "FILE" else part for part in command]).seconds
                    for file in (single, path)
                )
                times[name].append((took - start) / (size - 1))
                report(name, f"{start:.1f} s, {took:.1f} s, {1 / times[name][-1]:.1f}/s")
    ours = times["`llmcli classify`"]
    return [
        f"| {name} | {1 / statistics.median(each):.0f} |"
        f" {statistics.median(theirs / mine for mine, theirs in zip(ours, each, strict=True)):.1f} |"
        for name, each in times.items()
    ]


def main() -> None:
    is_quick = "--quick" in sys.argv
    wanted = [name for name in ("accuracy", "speed") if name in sys.argv] or ["accuracy", "speed"]
    if "accuracy" in wanted:
        print("\n".join(accuracy(every=5 if is_quick else 1)))
    if "speed" in wanted:
        print("\n".join(speed(*((200, 20, 1) if is_quick else ()), is_long="--long" in sys.argv)))


if __name__ == "__main__":
    main()
