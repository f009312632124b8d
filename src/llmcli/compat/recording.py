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


class RecordingError(Exception):
    """A computation does more than to call the same operators of PyTorch each time."""


class Recording(TorchFunctionMode):  # type: ignore[misc]  # torch has no types for mypy
    """The calls that a computation makes with some objects, at a length of its input, as source, and its result.

    A call that runs no operator, and returns no tensor, is left out. What it returns, as a size, is a constant then.
    """

    def __init__(self, compute: Callable[..., Tensor], arguments: Sequence[object], length: int) -> None:
        super().__init__()
        self._names = dict[int, tuple[str, Callable[[], object]]]()  # by ID, with a reference that is weak
        self._constants, self._keys = list[object](), dict[int, str]()
        self._lines, self._count = list[str](), 0
        self._arguments, self._length, self._operators = [f"a{i}" for i in range(len(arguments))], length, _Operators()
        for name, value in zip(self._arguments, arguments, strict=True):
            if value is not None:
                self._names[id(value)] = name, weakref.ref(value)
        with self._operators, self:
            self.result = compute(*arguments)
        self._lines.append(f"return {self._refer(self.result)}")

    def bind(self, later: "Recording") -> Callable[..., Tensor]:
        """Return a function of arguments and a length that makes the calls of both recordings alone.

        A number that has grown as much as the length will grow with it. Raises RecordingError if other things differ.
        """
        names, values = [f"c{i}" for i in range(len(self._constants))], list[object]()
        if self._lines != later._lines:
            raise RecordingError("its calls are others in each step")
        body = "\n  ".join(_delete_early(self._lines))
        for name, one, two in zip(names, self._constants, later._constants, strict=True):
            if type(one) is type(two) is int and one != two == one + later._length - self._length:
                body, one = re.sub(rf"\b{name}\b", f"({name} + length)", body), one - self._length
            elif one is not two and (type(one) is not type(two) or isinstance(one, Tensor) or (one == two) is not True):
                raise RecordingError("it computes with other values in each step")
            values.append(one)
        parameters = ", ".join([*self._arguments, "length"])
        source = f"def bind({', '.join(names)}):\n def run({parameters}):\n  {body}\n return run"
        run: Callable[..., Tensor] = _compile(source)(*values)
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
        name, reference = self._names.get(id(value), (None, object))
        return name if reference() is value else None

    def _refer(self, value: Any) -> str:
        """Return an expression of a value in a call."""
        if isinstance(value, tuple | list):
            parts = "".join(f"{self._refer(one)}, " for one in value)
            return f"[{parts}]" if isinstance(value, list) else f"({parts})"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{name!r}: {self._refer(one)}' for name, one in value.items())}}}"
        if isinstance(value, slice):
            return f"slice({self._refer(value.start)}, {self._refer(value.stop)}, {self._refer(value.step)})"
        if not (name := self._find(value) or self._keys.get(id(value))):
            name = f"c{len(self._constants)}"
            self._constants.append(value)
            if not isinstance(value, int):  # Two numbers may be equal at one length alone.
                self._keys[id(value)] = name
        return name


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


def _delete_early(lines: Sequence[str]) -> list[str]:
    """Return lines that also delete each variable after its last use."""
    found, used = list[str](), set[str]()
    for line in reversed(lines):
        ended = {*re.findall(r"\bv\d+\b", line)} - used
        found.append(f"{line}; del {', '.join(sorted(ended))}" if ended and used else line)
        used |= ended
    return found[::-1]


@lru_cache(maxsize=16)
def _compile(source: str) -> Callable[..., Any]:
    names: dict[str, Any] = {}
    exec(source, names)
    bind: Callable[..., Any] = names["bind"]
    return bind
