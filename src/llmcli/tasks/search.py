"""search: rank passages by the cosine similarity of their vectors to the query's. Each passage is embedded once."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from llmcli import console
from llmcli.job import Job, JsonObject
from llmcli.models import loading
from llmcli.tasks import LocalModel, ModelCall, Strategy, Task, TaskGenerator, TaskResult
from llmcli.text.splitting import split
from llmcli.text.vector_cache import VectorCache

PASSAGE_TOKENS = 128  # maximum length of a passage, about a paragraph
SAVE_INTERVAL = 64  # passages embedded before their vectors are saved
DEFAULT_LIMIT = 5


def run(job: Job, fields: JsonObject, model: LocalModel) -> TaskGenerator:
    """Find the passages of `texts` that are most similar to `query`. Equal scores keep the order of the texts.

    The model is loaded only if a vector is missing.
    """
    import numpy as np

    query, passages = fields["query"], list(_split_passages(fields["texts"], model.folder))
    if not passages:
        return TaskResult({"matches": []}, "")
    with VectorCache(model.fingerprint) as cache:
        texts = {query, *(passage["text"] for passage in passages)}
        vectors = cache.get_many(texts)
        missing = sorted(texts - vectors.keys(), key=lambda text: (len(text), text))
        with console.working(f"embedding {len(missing)} passages"):
            for start in range(0, len(missing), SAVE_INTERVAL):
                batch = missing[start : start + SAVE_INTERVAL]
                outputs = yield ModelCall(batch)
                computed = [np.array(output["embedding"], "<f4").tobytes() for output in outputs]
                new_vectors = dict(zip(batch, computed, strict=True))
                cache.put_many(new_vectors)
                vectors |= new_vectors
    matrix = np.frombuffer(b"".join(vectors[passage["text"]] for passage in passages), "<f4")
    scores = matrix.reshape(len(passages), -1) @ np.frombuffer(vectors[query], "<f4")
    best = np.argsort(-scores, kind="stable")[: job.parameters.get("limit", DEFAULT_LIMIT)]
    return TaskResult({"matches": [{**passages[i], "score": float(scores[i])} for i in best]}, "")


def _split_passages(documents: Sequence[JsonObject], folder: Path) -> Iterator[JsonObject]:
    """Yield passages with their text, file and line, and their characters, `start` to `end` of document number `of`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special_tokens = tokenizer.num_special_tokens_to_add(is_pair=False)
    max_tokens = min(PASSAGE_TOKENS, loading.embedding_context_length(folder) - special_tokens)
    for number, document in enumerate(documents):
        text, file, line, counted = document["text"], document.get("file"), document.get("line") or 1, 0
        is_markdown = (file or "").endswith((".md", ".markdown"))
        for start, piece in split(text, tokenizer, max_tokens, markdown=is_markdown):
            line += text.count("\n", counted, start)
            counted = start
            if not piece.strip():
                continue
            yield {"text": piece, "file": file, "line": line, "of": number, "start": start, "end": start + len(piece)}


# The command writes each match as a result of its own, which has a score.
TASK = Task(lambda job, fields: fields, ("score",), {"matches": []}, {"embedding": Strategy(run)})
