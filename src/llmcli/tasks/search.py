"""search: the passages nearest in meaning. Texts are cut, embedded once, and ranked by the query's dot product."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmcli import console
from llmcli.job import Job
from llmcli.models import sentence_encoder
from llmcli.tasks import ModelCall, Strategy, Task, TaskGenerator, TaskResult
from llmcli.text import chunking
from llmcli.text.vector_cache import VectorCache

PASSAGE = 128  # tokens at most: a paragraph, more or less
KEEP_EVERY = 64  # passages embedded before their vectors are kept
LIMIT = 5

Text = Mapping[str, Any]  # a text to search: `text`, and maybe its `file` and the `line` where it begins


def prepare(job: Job, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record is a `query` and the `texts` to search."""
    return fields


def run(job: Job, asked: Mapping[str, Any], model: Any) -> TaskGenerator:
    """`matches`: the passages with the greatest cosine similarity to the query, the best first; equals in input order.
    The model is loaded only where a vector is missing."""
    import numpy as np

    query, passages = asked["query"], list(passages_of(asked["texts"], model.folder))
    if not passages:
        return TaskResult({"matches": []}, "")
    with VectorCache(model.fingerprint) as cache:
        texts = {query, *(passage["text"] for passage in passages)}
        known = cache.find(texts)
        missing = sorted(texts - known.keys(), key=lambda text: (len(text), text))
        with console.working(f"embedding {len(missing)} passages"):
            for start in range(0, len(missing), KEEP_EVERY):
                some = missing[start : start + KEEP_EVERY]
                outputs = yield ModelCall(some)
                vectors = [np.array(output["embedding"], "<f4").tobytes() for output in outputs]
                fresh = dict(zip(some, vectors, strict=True))
                cache.add(fresh)
                known |= fresh
    matrix = np.frombuffer(b"".join(known[passage["text"]] for passage in passages), "<f4").reshape(len(passages), -1)
    scores = matrix @ np.frombuffer(known[query], "<f4")
    best = np.argsort(-scores, kind="stable")[: job.parameters.get("limit", LIMIT)]
    return TaskResult({"matches": [{**passages[i], "score": float(scores[i])} for i in best]}, "")


def passages_of(texts: Sequence[Text], folder: Path) -> Iterator[dict[str, Any]]:
    """The texts in passages of at most PASSAGE tokens: `text`, the `file` and `line` where it begins, and the
    characters from `start` to `end` of its text, which is number `of`. A text that is a line stays whole where it fits.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    most = min(PASSAGE, sentence_encoder.window(folder) - tokenizer.num_special_tokens_to_add(is_pair=False))
    for number, each in enumerate(texts):
        text, file, line, counted = each["text"], each.get("file"), each.get("line") or 1, 0
        is_markdown = (file or "").endswith((".md", ".markdown"))
        for start, piece in chunking.cut(text, tokenizer, most, markdown=is_markdown):
            line += text.count("\n", counted, start)
            counted = start
            place = {"file": file, "line": line, "of": number, "start": start, "end": start + len(piece)}
            yield {"text": piece, **place}


TASK = Task(prepare, ("matches",), {"matches": []}, {"embedding": Strategy(run)})
