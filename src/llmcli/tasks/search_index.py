"""The index of search, in SQLite: the places of the passages of documents, and matrices of their vectors."""

import hashlib
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, suppress
from pathlib import Path
from typing import Any

from llmcli import config
from llmcli.models.store import cache

VERSION = 1  # of the schema
UNUSED_S = 30 * 24 * 60 * 60  # after which an index is deleted
TIMEOUT_S = 30  # for another process to finish writing
MAX_KEYS = 500  # of one query
PARTS_READ = 16  # at a time, so that a large index takes no more memory than a small one
SCHEMA = """
PRAGMA page_size = 65536;
CREATE TABLE IF NOT EXISTS parts (
    document BLOB, number INTEGER, state TEXT, places BLOB, vectors BLOB, PRIMARY KEY (document, number)
);
"""
Part = tuple[bytes, int, str | None, bytes, bytes]  # a row of the table


class SearchIndex(AbstractContextManager["SearchIndex"]):
    """The index of one model. The passages of a document are in one or more parts, of which the last has its state.

    An update that is interrupted leaves a document without a state. If the index is not `is_saved`, it is a copy in
    memory of what is in the directory.

    Methods raise OSError and sqlite3.OperationalError if the directory cannot be used, and another sqlite3.Error if the
    index is damaged.
    """

    def __init__(self, home: Path | None, *, is_saved: bool) -> None:
        if home and is_saved:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)  # The index has the names of files.
            _delete_unused(home)
        place = home / "index.sqlite" if home and is_saved else ":memory:"
        self._database = sqlite3.connect(place, TIMEOUT_S, isolation_level=None)
        if home and not is_saved:
            with suppress(sqlite3.Error), closing(sqlite3.connect(home / "index.sqlite")) as saved:
                saved.backup(self._database)
        self._database.executescript(SCHEMA)

    def find_states(self, documents: Iterable[bytes]) -> dict[bytes, tuple[str, bool]]:
        """Return the states of the documents that are in the index, and whether they have passages."""
        query = "SELECT document, state, length(places) FROM parts WHERE state IS NOT NULL AND document IN"
        return {
            document: (state, size > 0) for rows in self._select(query, documents) for document, state, size in rows
        }

    def read(self, documents: Iterable[bytes]) -> Iterator[list[tuple[bytes, bytes, bytes]]]:
        """Yield some parts of documents at a time: the document, and the places and vectors of passages."""
        return self._select("SELECT document, places, vectors FROM parts WHERE document IN", documents)

    def save(self, parts: Iterable[Part]) -> None:
        """Save parts of documents. The first and the last part replace what the index had of the document."""
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            for document, number, state, places, vectors in parts:
                if not number:
                    self._database.execute("UPDATE parts SET state = NULL WHERE document = ?", [document])
                if state:
                    self._database.execute("DELETE FROM parts WHERE document = ? AND number > ?", [document, number])
                row = document, number, state, places, vectors
                self._database.execute("INSERT OR REPLACE INTO parts VALUES (?, ?, ?, ?, ?)", row)

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def _select(self, query: str, keys: Iterable[bytes]) -> Iterator[list[Any]]:
        keys = list(keys)
        for start in range(0, len(keys), MAX_KEYS):
            part = keys[start : start + MAX_KEYS]
            cursor = self._database.execute(f"{query} ({','.join('?' * len(part))})", part)
            while rows := cursor.fetchmany(PARTS_READ):
                yield rows


def index_home(model: str) -> Path:
    """Return the directory of the index of a model, by the fingerprint of the model."""
    return config.cache_dir() / "search" / hashlib.sha256(f"{VERSION} {model}".encode()).hexdigest()[:16]


def _delete_unused(home: Path) -> None:
    """Delete the indexes that no search has used for long."""
    with suppress(OSError):
        home.touch()
        for other in home.parent.iterdir():
            if time.time() - other.stat().st_mtime > UNUSED_S:
                cache.remove(other)
