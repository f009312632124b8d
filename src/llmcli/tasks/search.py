"""search: rank passages by the cosine similarity of their vectors to the query's. Each passage is embedded once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from llmcli import console
from llmcli.job import Job, JsonObject
from llmcli.models import loading
from llmcli.tasks import LocalModel, ModelCall, Strategy, Task, TaskGenerator, TaskResult
from llmcli.tasks.outputs import EmbeddingOutput
from llmcli.text import chunking
from llmcli.text.vector_cache import VectorCache

PASSAGE_TOKENS = 128  # maximum length of a passage, about a paragraph
SAVE_INTERVAL = 64  # passages embedded before their vectors are saved
DEFAULT_LIMIT = 5


class Document(TypedDict):
    """A text to search, with the file that it comes from and the line where it begins."""

    text: str
    file: NotRequired[str | None]
    line: NotRequired[int | None]


@dataclass(frozen=True, slots=True)
class Query:
    """A query, and the documents to search."""

    text: str
    documents: Sequence[Document]


def prepare(job: Job, fields: JsonObject) -> Query:
    """Return the `query` of a record and the `texts` to search."""
    return Query(fields["query"], fields["texts"])


def run(job: Job, query: Query, model: LocalModel) -> TaskGenerator:
    """Find the passages that are most similar to a query. The model is loaded only if a vector is missing.

    Yields:
        Calls for the texts that have no vector yet.

    Returns:
        The passages as `matches` with their scores, best first. Equal scores keep the order of the documents.
    """
    import numpy as np

    passages = list(split_passages(query.documents, model.folder))
    if not passages:
        return TaskResult({"matches": []}, "")
    with VectorCache(model.fingerprint) as cache:
        texts = {query.text, *(passage["text"] for passage in passages)}
        vectors = cache.get_many(texts)
        missing = sorted(texts - vectors.keys(), key=lambda text: (len(text), text))
        with console.working(f"embedding {len(missing)} passages"):
            for start in range(0, len(missing), SAVE_INTERVAL):
                batch = missing[start : start + SAVE_INTERVAL]
                outputs: list[EmbeddingOutput] = yield ModelCall(batch)
                computed = [np.array(output["embedding"], "<f4").tobytes() for output in outputs]
                new_vectors = dict(zip(batch, computed, strict=True))
                cache.put_many(new_vectors)
                vectors |= new_vectors
    matrix = np.frombuffer(b"".join(vectors[passage["text"]] for passage in passages), "<f4")
    scores = matrix.reshape(len(passages), -1) @ np.frombuffer(vectors[query.text], "<f4")
    best = np.argsort(-scores, kind="stable")[: job.parameters.get("limit", DEFAULT_LIMIT)]
    return TaskResult({"matches": [{**passages[i], "score": float(scores[i])} for i in best]}, "")


def split_passages(documents: Sequence[Document], folder: Path) -> Iterator[JsonObject]:
    """Split documents into passages of at most PASSAGE_TOKENS tokens of the encoder in `folder`.

    Yields:
        Each passage: its `text`, `file` and `line`, and its characters, `start` to `end` of document number `of`.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special_tokens = tokenizer.num_special_tokens_to_add(is_pair=False)
    max_tokens = min(PASSAGE_TOKENS, loading.embedding_context_length(folder) - special_tokens)
    for number, document in enumerate(documents):
        text, file, line, counted = document["text"], document.get("file"), document.get("line") or 1, 0
        is_markdown = (file or "").endswith((".md", ".markdown"))
        for start, piece in chunking.split(text, tokenizer, max_tokens, markdown=is_markdown):
            line += text.count("\n", counted, start)
            counted = start
            yield {"text": piece, "file": file, "line": line, "of": number, "start": start, "end": start + len(piece)}


TASK = Task(prepare, ("matches",), {"matches": []}, {"embedding": Strategy(run)})
