"""Vectors kept by content, in an SQLite file: a text is embedded once, whichever file it stands in."""

import hashlib
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from llmcli import config
from llmcli.errors import LlmcliError

SCHEMA = """
CREATE TABLE IF NOT EXISTS vectors (model TEXT, digest BLOB, vector BLOB, PRIMARY KEY (model, digest)) WITHOUT ROWID
"""
AT_ONCE = 500  # digests in one question to SQLite


class VectorCache(AbstractContextManager["VectorCache"]):
    """Vectors of one model as little-endian float32 bytes. What `add` has returned from survives a kill.

    Raises LlmcliError where the file cannot be used (a full disk, no permission, no database).
    """

    def __init__(self, model: str, path: Path | None = None) -> None:
        self.model = model
        self.path = path or config.cache_dir() / "vectors.sqlite"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=30)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute(SCHEMA)
        except (sqlite3.Error, OSError) as exc:
            raise self._unusable(exc) from exc

    def find(self, texts: Iterable[str]) -> dict[str, bytes]:
        """Those of the texts that have a vector, with it."""
        by_digest = {_digest(text): text for text in texts}
        digests, found = list(by_digest), {}
        for start in range(0, len(digests), AT_ONCE):
            some = digests[start : start + AT_ONCE]
            marks = ",".join("?" * len(some))
            question = f"SELECT digest, vector FROM vectors WHERE model = ? AND digest IN ({marks})"
            try:
                rows = self._database.execute(question, [self.model, *some]).fetchall()
            except sqlite3.Error as exc:
                raise self._unusable(exc) from exc
            found.update({by_digest[digest]: vector for digest, vector in rows})
        return found

    def add(self, vectors: Mapping[str, bytes]) -> None:
        """Keep the vectors of these texts."""
        rows = [(self.model, _digest(text), vector) for text, vector in vectors.items()]
        try:
            with self._database:
                self._database.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows)
        except sqlite3.Error as exc:
            raise self._unusable(exc) from exc

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def _unusable(self, exc: Exception) -> LlmcliError:
        return LlmcliError(f"{self.path}: {exc}", hint="the vectors are kept there; it may be deleted at any time")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
