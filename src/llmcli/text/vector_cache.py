"""A cache of vectors in an SQLite file, by the content of the text."""

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from llmcli import config, console

SCHEMA = """
CREATE TABLE IF NOT EXISTS vectors (model TEXT, digest BLOB, vector BLOB, PRIMARY KEY (model, digest)) WITHOUT ROWID
"""


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
