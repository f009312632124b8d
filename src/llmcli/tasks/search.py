"""search: rank passages by the cosine similarity of their vectors to the query's. Each passage is embedded once."""

import hashlib
import os
import sqlite3
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from llmcli import console
from llmcli.errors import LlmcliError, RecordError, reason
from llmcli.io.decoding import open_text
from llmcli.io.folders import is_binary
from llmcli.io.formats import READERS, InputFormat
from llmcli.io.records import open_inputs
from llmcli.job import Job, JsonObject, LoadOptions
from llmcli.models import encoders, loading
from llmcli.models.store import cache
from llmcli.tasks import LocalModel, ModelCall, Strategy, Task, TaskGenerator, TaskResult
from llmcli.tasks.search_index import SearchIndex, index_home
from llmcli.text.splitting import split

PASSAGE_TOKENS = 128  # maximum length of a passage, about a paragraph
SAVE_INTERVAL = 256  # passages embedded before their vectors are saved
DEFAULT_LIMIT = 5
CANDIDATES = 10  # passages that a cross-encoder reads for each one that is wanted
MAX_SCORE = 1.01  # of vectors that have length 1
# Where a passage begins and ends in its document, its line, and the digest of its text.
PLACE = [("start", "<i8"), ("end", "<i8"), ("line", "<i8"), ("digest", "<u8")]
PLACE_BYTES = 32

Steps = Generator[ModelCall, list[Any], Any]


class Document(NamedTuple):
    """A text or a file to search."""

    file: str | None = None  # as it is printed
    text: str | None = None  # None: in the file at `path`
    path: str = ""
    has_lines: bool = False  # Each line is a passage.
    is_found: bool = False  # in a directory: skipped if it is not text

    @property
    def key(self) -> bytes:
        """The name of the document in the index, which keeps the last lines of stdin alone."""
        if self.text is None or self.has_lines:
            return os.fsencode(self.path)
        return self.state().encode()

    def state(self) -> str:
        """Return what changes with the text."""
        if self.text is not None:
            return str(_digest(self.text))
        status = os.stat(self.path)
        return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"

    def read(self) -> str | None:
        """Return the text, or None if it is binary. Raises LlmcliError and OSError."""
        if self.text is not None or (self.is_found and is_binary(self.path)):
            return self.text
        (source,) = open_inputs([], [self.path])
        with source.open() as stream:
            (record,) = READERS[InputFormat.WHOLE](open_text(stream, "utf-8", self.path), None)
        if failure := record.failure:
            raise RecordError(failure.type, failure.message.replace("use --encoding, or ", ""))
        return str(record.fields["text"])


def run(job: Job, fields: JsonObject, model: LocalModel) -> TaskGenerator:
    """Find the passages that are most similar to `query`. Equal scores keep the order of the documents.

    Each of the `documents` has the fields of a Document. The model is loaded only if a vector is missing.
    """
    home: Path | None = index_home(model.fingerprint)
    is_saved = True
    while True:
        try:
            with SearchIndex(home, is_saved=is_saved) as index:
                return (yield from Search(job, fields, model, index).run())
        except (sqlite3.Error, OSError) as exc:
            if is_saved and isinstance(exc, sqlite3.OperationalError | OSError):
                console.warning(f"embeddings are not saved: {home}: {exc}")
                is_saved = False
            elif home:
                console.notice(f"building the index of {job.model} again, which is damaged: {exc}")
                with suppress(OSError):
                    cache.remove(home)
                home = home if is_saved and not home.exists() else None
            else:
                raise


class Search:
    """One search: it updates the index, and asks it."""

    def __init__(self, job: Job, fields: JsonObject, model: LocalModel, index: SearchIndex) -> None:
        self._job, self._query, self._model, self._index = job, fields["query"], model, index
        self._documents: dict[bytes, tuple[int, Document]] = {}  # with their numbers
        for number, document in enumerate(Document(**document) for document in fields["documents"]):
            self._documents.setdefault(document.key, (number, document))
        self._failures = list(fields.get("failures", ()))
        self._number = 0  # of the document that is read

    def run(self) -> TaskGenerator:
        """Return the best passages, and the errors of the files that cannot be searched."""
        limit, reranker = self._job.parameters.get("limit", DEFAULT_LIMIT), self._job.parameters.get("rerank")
        keys = yield from self._update()
        matches: list[dict[str, Any]] = []
        if keys:
            query = yield from self._embed_query()
            matches = list(self._find_best(keys, query, limit * CANDIDATES if reranker else limit))
        elif not self._failures:
            console.warning("input is empty")
        if reranker and matches:
            job = Job("rerank", reranker, parameters={"query": self._query}, load_options=self._job.load_options)
            outputs = yield ModelCall([{"text": match["text"]} for match in matches], job=job)
            for match, output in zip(matches, outputs, strict=True):
                match["score"] = output["score"]
            matches.sort(key=itemgetter("score"), reverse=True)
        return TaskResult({"matches": matches[:limit], "failures": self._failures}, "")

    def _update(self) -> Steps:
        """Read, split and embed the documents that have changed. Return the keys of those with passages."""
        states = self._index.find_states(self._documents)
        keys, split_document = [], None
        waiting: list[tuple[bytes, int, str | None, list[Any]]] = []  # parts of documents, with passages
        texts: dict[int, str] = {}  # of these passages, by digest, or
        vectors: dict[int, bytes] = {}  # if they had one before
        for key, (number, document) in self._documents.items():
            self._number = number
            try:
                state, (saved, has_passages) = document.state(), states.get(key, ("", False))
                text = document.read() if state != saved else None
            except (LlmcliError, OSError) as exc:
                message = f"{document.file}: {reason(exc) if isinstance(exc, OSError) else exc.message}"
                if document.is_found:
                    console.warning(f"skipped {message}")
                else:
                    self._failures.append(message)
                continue
            if text is None:
                keys += [key] * (state == saved and has_passages)
                continue
            split_document = split_document or _make_splitter(self._model.folder)
            pieces = split_document(document, text)
            passages = [(start, start + len(piece), line, _digest(piece), piece) for start, line, piece in pieces]
            keys += [key] * bool(passages)
            old = self._read_vectors(key)
            for start in range(0, len(passages) or 1, SAVE_INTERVAL):
                part = passages[start : start + SAVE_INTERVAL]
                is_last = start + SAVE_INTERVAL >= len(passages)
                waiting.append((key, start // SAVE_INTERVAL, state if is_last else None, part))
                vectors |= {digest: old[digest] for *_, digest, _ in part if digest in old}
                texts |= {digest: piece for *_, digest, piece in part if digest not in old}
                if len(texts) + len(vectors) >= SAVE_INTERVAL:
                    yield from self._embed(waiting, texts, vectors)
                    waiting, texts, vectors = [], {}, {}
        if waiting:
            yield from self._embed(waiting, texts, vectors)
        return keys

    def _embed(self, waiting: Sequence[Any], texts: Mapping[int, object], vectors: dict[int, bytes]) -> Steps:
        """Embed texts, and save the parts of documents that wait for them."""
        import numpy as np

        if texts:
            with console.working(f"embedding passages of file {self._number + 1} of {len(self._documents)}"):
                outputs = yield ModelCall(list(texts.values()))
            computed = [np.array(output["embedding"], "<f4").tobytes() for output in outputs]
            vectors |= zip(texts, computed, strict=True)
        parts = []
        for key, number, state, passages in waiting:
            places = np.array([tuple(place) for *place, _ in passages], PLACE).tobytes()
            parts.append((key, number, state, places, b"".join(vectors[digest] for *_, digest, _ in passages)))
        self._index.save(parts)

    def _read_vectors(self, key: bytes) -> dict[int, bytes]:
        """Return the vectors that the index has of a document, by the digests of the passages."""
        import numpy as np

        found: dict[int, bytes] = {}
        for _, places, vectors in chain.from_iterable(self._index.read([key])):
            digests = np.frombuffer(places, PLACE)["digest"].tolist()
            size = len(vectors) // max(1, len(digests))
            found |= {digest: vectors[i * size : (i + 1) * size] for i, digest in enumerate(digests)}
        return found

    def _embed_query(self) -> Steps:
        """Return the vector of the query, which the index keeps, too."""
        import numpy as np

        digest = _digest(self._query)
        key = f"query {digest}".encode()
        if key not in self._index.find_states([key]):
            part = key, 0, "query", [(0, 0, 0, digest, self._query)]
            yield from self._embed([part], {digest: {"text": self._query, "role": "query"}}, {})
        return np.frombuffer(self._read_vectors(key)[digest], "<f4")

    def _find_best(self, keys: Sequence[bytes], query: Any, count: int) -> Iterator[dict[str, Any]]:
        """Yield the most similar passages, except those whose documents have changed in the meantime."""
        import numpy as np

        parts: list[tuple[int, bytes]] = []
        scores = [np.empty(0, "<f4")]
        for rows in self._index.read(keys):
            parts += [(self._documents[key][0], places) for key, places, _ in rows]
            vectors = np.frombuffer(b"".join(vectors for _, _, vectors in rows), "<f4")
            scores.append(vectors.reshape(-1, len(query)) @ query)
        places = np.frombuffer(b"".join(places for _, places in parts), PLACE)
        numbers = np.repeat([number for number, _ in parts], [len(places) // PLACE_BYTES for _, places in parts])
        found = np.concatenate(scores)
        if len(found) != len(places) or not (np.abs(found) < MAX_SCORE).all():
            raise sqlite3.DatabaseError("invalid vectors")
        if not (count := min(count, len(found))):
            return
        best = np.flatnonzero(found >= np.partition(found, -count)[-count])
        best = best[np.lexsort((places["start"][best], numbers[best], -found[best]))][:count]
        documents, read = dict(self._documents.values()), lru_cache(maxsize=64)(Document.read)
        for (start, end, line, digest), number, score in zip(
            places[best].tolist(), numbers[best].tolist(), found[best].tolist(), strict=True
        ):
            document, text = documents[number], ""
            with suppress(LlmcliError, OSError):
                text = (read(document) or "")[start:end]
            if _digest(text) == digest:
                position = {"file": document.file, "line": line, "of": number, "start": start, "end": end}
                yield {"text": text, **position, "score": score}
            else:
                console.warning(f"skipped a passage of {document.file}, which has changed during the search")


@lru_cache(maxsize=4)  # qa searches for each record.
def _make_splitter(folder: Path) -> Callable[[Document, str], Iterator[tuple[int, int, str]]]:
    """Return a function that yields the position, the line and the text of passages that a model reads whole."""
    encoder, tokenizer = encoders.Encoder(folder), loading.tokenizer(folder, LoadOptions())
    special_tokens, fast = tokenizer.num_special_tokens_to_add(), getattr(tokenizer, "backend_tokenizer", None)
    if fast:
        fast.no_truncation()
        fast.no_padding()
        fast.encode_special_tokens = True  # The names of special tokens are text, as in the pipeline.

    def count_tokens(text: str) -> int:
        # This method alone leaves out the offsets, and is as fast as the splitter's own copy of the tokenizer.
        return len(fast.encode_batch_fast([text], add_special_tokens=False)[0] if fast else tokenizer.tokenize(text))

    prompt_tokens = special_tokens + count_tokens(encoder.add_prompt("", "document"))
    max_tokens = min(PASSAGE_TOKENS, encoder.context_length - prompt_tokens)

    def split_document(document: Document, text: str) -> Iterator[tuple[int, int, str]]:
        start, line = 0, 1
        is_markdown = (document.file or "").endswith((".md", ".markdown"))
        for part in text.split("\n") if document.has_lines else [text]:
            counted = 0
            for offset, piece in split(part, count_tokens, max_tokens, markdown=is_markdown):
                line += part.count("\n", counted, offset)
                counted = offset
                if piece.strip():
                    yield start + offset, line, piece
            start, line = start + len(part) + 1, line + 1

    return split_document


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


# The command writes each match as a result of its own, which has a score.
EMPTY: JsonObject = {"matches": [], "failures": []}
STRATEGY = Strategy(run, parameters=lambda job, model: {"role": "document", "normalize": True})
TASK = Task(lambda job, fields: fields, ("score",), EMPTY, {"embedding": STRATEGY})
