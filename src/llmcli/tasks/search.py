"""search: rank passages by the cosine similarity of their vectors to the query's. Each passage is embedded once."""

import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from llmcli import config, console
from llmcli.job import Job, JsonObject, LoadOptions
from llmcli.models import encoders, loading
from llmcli.tasks import LocalModel, ModelCall, Strategy, Task, TaskGenerator, TaskResult
from llmcli.text.splitting import split

PASSAGE_TOKENS = 128  # maximum length of a passage, about a paragraph
SAVE_INTERVAL = 256  # passages embedded before their vectors are saved
DEFAULT_LIMIT = 5
SCHEMA = """
CREATE TABLE IF NOT EXISTS vectors (model TEXT, digest BLOB, vector BLOB, PRIMARY KEY (model, digest)) WITHOUT ROWID
"""


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
    count_tokens, special_tokens = _load_counter(folder)
    max_tokens = min(PASSAGE_TOKENS, encoders.Encoder(folder).context_length - special_tokens)
    for number, document in enumerate(documents):
        text, file, line, counted = document["text"], document.get("file"), document.get("line") or 1, 0
        is_markdown = (file or "").endswith((".md", ".markdown"))
        for start, piece in split(text, count_tokens, max_tokens, markdown=is_markdown):
            line += text.count("\n", counted, start)
            counted = start
            if not piece.strip():
                continue
            yield {"text": piece, "file": file, "line": line, "of": number, "start": start, "end": start + len(piece)}


def _load_counter(folder: Path) -> tuple[Callable[[str], int], int]:
    """Return what counts the tokens of a text, and how many special ones are added to each."""
    from tokenizers import Tokenizer

    if (file := folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(file))  # without transformers, which takes a second to import
    else:
        loaded = loading.tokenizer(folder, LoadOptions())
        if not loaded.is_fast:
            return lambda text: len(loaded.tokenize(text)), loaded.num_special_tokens_to_add()
        tokenizer = loaded.backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # The names of special tokens are text, as in the pipeline.

    def count_tokens(text: str) -> int:
        # This method alone leaves out the offsets, and is as fast as the splitter's own copy of the tokenizer.
        return len(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0])

    return count_tokens, tokenizer.num_special_tokens_to_add(is_pair=False)


class VectorCache(AbstractContextManager["VectorCache"]):
    """The vectors of one model, as bytes of little-endian float32. If the file fails, they are kept in memory."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.path = config.cache_dir() / "vectors.sqlite"
        with self._fall_back():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=30)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute(SCHEMA)

    def get_many(self, texts: Iterable[str]) -> dict[str, bytes]:
        """Return the vectors of the texts that have one."""
        query = "SELECT vector FROM vectors WHERE model = ? AND digest = ?"
        with self._fall_back(), self._database:
            self._database.execute("BEGIN")  # One lock for all queries is faster.
            rows = {text: self._database.execute(query, (self.model, _digest(text))).fetchone() for text in texts}
            return {text: row[0] for text, row in rows.items() if row}
        return {}

    def put_many(self, vectors: Mapping[str, bytes]) -> None:
        """Save the vectors of texts."""
        rows = [(self.model, _digest(text), vector) for text, vector in vectors.items()]
        with self._fall_back(), self._database:
            self._database.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows)

    def __exit__(self, *_: object) -> None:
        self._database.close()

    @contextmanager
    def _fall_back(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as exc:
            console.warning(f"embeddings are not saved: {self.path}: {exc}")
            self._database = sqlite3.connect(":memory:")
            self._database.execute(SCHEMA)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


# The command writes each match as a result of its own, which has a score.
STRATEGY = Strategy(run, parameters=lambda job, model: {"normalize": True})
TASK = Task(lambda job, fields: fields, ("score",), {"matches": []}, {"embedding": STRATEGY})
