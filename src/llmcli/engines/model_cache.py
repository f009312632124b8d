"""Placeholder until the worker's branch is merged."""

from typing import Any


class ModelCache:
    def __init__(self) -> None:
        self._p: dict[Any, Any] = {}

    def get(self, name: str, key: Any, load: Any) -> Any:
        if key not in self._p:
            self._p[key] = load()
        return self._p[key]
