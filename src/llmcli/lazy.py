"""Attributes computed when they are first asked for."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class lazy(Generic[T]):  # reads as what it does
    """functools.cached_property as it is from Python 3.12 on: before, one lock for all instances is held meanwhile, and
    one that waits for its turn would keep others from taking theirs."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        value: T = self._compute(instance)
        instance.__dict__[self._name] = value  # found before this is, from now on
        return value
