"""The calls of PyTorch that a computation makes, recorded as Python source without the code between them."""

import re
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Operators whose result has a shape that depends on numbers, beside those that PyTorch has a tag for.
SHAPED_BY_DATA = {
    aten.argwhere.default, aten.nonzero_numpy.default, aten.one_hot.default, aten.repeat_interleave.self_Tensor,
    aten.tensor_split.tensor_indices_or_sections, aten.where.default,
}  # fmt: skip
Compute = Callable[..., Tensor]


class RecordingError(Exception):
    """A computation does more than to call the same operators of PyTorch each time."""


class Recording(TorchFunctionMode):  # type: ignore[misc]  # torch has no types for mypy
    """The calls that a computation of some objects makes, as source, and its result.

    A call that runs no operator, and returns no tensor, is left out. What it returns, as a size, is a constant then.
    """

    def __init__(self, compute: Compute, *arguments: object) -> None:
        super().__init__()
        self._names = dict[int, tuple[str, Callable[[], object]]]()  # by ID, with a reference that is weak
        self._constants, self._lines, self._count = dict[object, tuple[str, object]](), list[str](), 0
        for i, value in enumerate(arguments):
            if value is not None:
                self._names[id(value)] = f"a{i}", weakref.ref(value)
        self._operators = _Operators()
        with self._operators, self:
            self.result = compute(*arguments)
        end = f"return {self._refer(self.result)}"
        body = "\n  ".join([*_delete_early([*self._lines, end]), end])
        bound = ", ".join(name for name, _ in self._constants.values())
        parameters = ", ".join(f"a{i}" for i in range(len(arguments)))
        self._source = f"def bind({bound}):\n def run({parameters}):\n  {body}\n return run"

    def has_same_calls(self, other: "Recording") -> bool:
        """Return whether another recording has the same calls, with the same weights and settings."""
        pairs = zip(self._constants.values(), other._constants.values(), strict=True)
        return self._source == other._source and all(_is_same(one, two) for (_, one), (_, two) in pairs)

    def compile(self) -> Compute:
        """Return a function that makes the same calls with other arguments."""
        run: Compute = _compile(self._source)(*(value for _, value in self._constants.values()))
        return run

    def __torch_function__(self, function: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        named = [f"{name}={self._refer(value)}" for name, value in (kwargs or {}).items()]
        call = f"{self._refer(function)}({', '.join([*map(self._refer, args), *named])})"
        self._operators.count = 0
        result = function(*args, **(kwargs or {}))
        count, self._operators.count = self._operators.count, None
        if isinstance(result, Tensor):
            call = f"{self._name(result)} = {call}"
        elif isinstance(result, tuple | list) and any(isinstance(one, Tensor) for one in result):
            call = f"[{', '.join(map(self._name, result))}] = {call}"
        elif not count:
            return result
        elif result is not None:
            raise RecordingError(f"it reads numbers with {function.__name__}")
        self._lines.append(call)
        return result

    def _name(self, result: object) -> str:
        """Return a new name for a result, or its name from before: a call in place returns an argument."""
        name = self._find(result)
        if not name:
            self._count += 1
            name = f"v{self._count}"
            if isinstance(result, Tensor):
                self._names[id(result)] = name, weakref.ref(result)
        return name

    def _find(self, value: object) -> str | None:
        name, reference = self._names.get(id(value), (None, lambda: None))
        return name if reference() is value else None

    def _refer(self, value: Any) -> str:
        """Return an expression of a value in a call."""
        if isinstance(value, list):
            return f"[{', '.join(map(self._refer, value))}]"
        if isinstance(value, tuple):
            return f"({''.join(f'{self._refer(one)}, ' for one in value)})"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{key!r}: {self._refer(one)}' for key, one in value.items())}}}"
        if isinstance(value, slice):
            return f"slice({self._refer(value.start)}, {self._refer(value.stop)}, {self._refer(value.step)})"
        key = (type(value), repr(value)) if isinstance(value, int | float | str | None) else id(value)
        return self._find(value) or self._constants.setdefault(key, (f"c{len(self._constants)}", value))[0]


class _Operators(TorchDispatchMode):  # type: ignore[misc]
    """Counts the operators that a call runs. None: it is no call of Python's, as in TorchScript."""

    count: int | None = None

    def __torch_dispatch__(self, function: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        if self.count is None:
            raise RecordingError(f"{function} is called by other code than Python")
        self.count += 1
        is_shaped_by_data = function in SHAPED_BY_DATA or torch.Tag.dynamic_output_shape in function.tags
        if function is aten.index.Tensor:
            is_shaped_by_data = any(index is not None and index.dtype == torch.bool for index in args[1])
        if is_shaped_by_data:
            raise RecordingError(f"the shape of what {function} returns depends on numbers")
        return function(*args, **(kwargs or {}))


def _is_same(one: object, two: object) -> bool:
    is_equal = type(one) is type(two) and not isinstance(one, Tensor) and (one == two) is True
    return one is two or is_equal


def _delete_early(lines: Sequence[str]) -> list[str]:
    """Return lines that also delete each variable after its last use."""
    used = [set(re.findall(r"\bv\d+\b", line)) for line in lines]
    last = {name: i for i, names in enumerate(used) for name in names}
    ended = [[name for name in names if last[name] == i] for i, names in enumerate(used[:-1])]
    return [f"{line}; del {', '.join(names)}" if names else line for line, names in zip(lines, ended, strict=False)]


@lru_cache(maxsize=16)
def _compile(source: str) -> Callable[..., Compute]:
    names: dict[str, Any] = {}
    exec(source, names)
    bind: Callable[..., Compute] = names["bind"]
    return bind
