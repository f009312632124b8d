"""The calls of PyTorch that a computation makes, recorded as Python source without the code between them."""

import re
import weakref
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicLayer

aten = torch.ops.aten
# Operators whose result has a shape that depends on numbers, beside those that PyTorch has a tag for.
SHAPED_BY_DATA = {
    aten.argwhere.default, aten.nonzero_numpy.default, aten.one_hot.default, aten.repeat_interleave.self_Tensor,
    aten.tensor_split.tensor_indices_or_sections, aten.where.default,
}  # fmt: skip


class RecordingError(Exception):
    """A computation does more than to call the same operators of PyTorch each time."""


class Recording(TorchFunctionMode):  # type: ignore[misc]  # torch has no types for mypy
    """The calls that a computation makes with tensors and a cache's layers, at a length, as source, and its result.

    A call that runs no operator, and returns no tensor, is left out. What it returns, as a size, is a constant then.
    """

    def __init__(self, compute: Callable[..., Tensor], arguments: Sequence[object], length: int) -> None:
        super().__init__()
        self._length, self._operators, self._lines = length, _Operators(), list[str]()
        self._names, self._numbers = dict[int, tuple[str, Callable[[], object]]](), count()
        self._constants, self._places = list[Any](), dict[int, str]()
        parameters = [self._add_name("a", value) for value in arguments]
        with self._operators, self:
            self.result = compute(*arguments)
        body = "\n  ".join([*self._lines, f"return {self._refer(self.result)}"])
        constants = ", ".join(f"c{i}" for i in range(len(self._constants)))
        self._source = f"def bind({constants}):\n def run({', '.join(parameters)}, length):\n  {body}\n return run"

    def bind(self, later: "Recording") -> Callable[..., Tensor]:
        """Return a function of arguments and a length that makes the calls of both recordings, and no others.

        A number that grows as much as the length is added to it. Raises RecordingError if anything else differs.
        """
        if self._source != later._source:
            raise RecordingError("it makes other calls in each step")
        start, values, names = self._source.index(":"), list[object](), dict[str, Any]()
        body = self._source[start:]
        for i, (one, two) in enumerate(zip(self._constants, later._constants, strict=True)):
            is_same = True
            if type(one) is type(two) is int and one != two == one + later._length - self._length:
                body, one = re.sub(rf"\bc{i}\b", f"(c{i} + length)", body), one - self._length
            elif isinstance(one, Tensor):  # Those that inference makes, as in a cache, do not stay.
                is_same = one is two and not one.is_inference()
            else:
                is_same = one is two or one == two
            if not is_same:
                raise RecordingError("it computes with other values in each step")
            values.append(one)
        exec(self._source[:start] + body, names)
        run: Callable[..., Tensor] = names["bind"](*values)
        return run

    def __torch_function__(self, function: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(function, torch._ops.OpOverload):
            raise RecordingError(f"{function} is called by other code than Python, as TorchScript")
        named = [f"{name}={self._refer(value)}" for name, value in (kwargs or {}).items()]
        call = f"{self._refer(function)}({', '.join([*map(self._refer, args), *named])})"
        ran = self._operators.count
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            call = f"{self._find_name(result) or self._add_name('v', result)} = {call}"
        elif isinstance(result, tuple | list) and any(isinstance(one, Tensor) for one in result):
            call = f"[{', '.join(self._find_name(one) or self._add_name('v', one) for one in result)}] = {call}"
        elif ran == self._operators.count:
            return result
        elif result is not None:
            raise RecordingError(f"it reads numbers with {function.__name__}")
        self._lines.append(call)
        return result

    def _add_name(self, kind: str, value: object) -> str:
        """Return a new name for an object. It is deleted when the object is, so that memory is free as early."""
        name, lines = f"{kind}{next(self._numbers)}", self._lines
        if isinstance(value, Tensor | DynamicLayer):
            self._names[id(value)] = name, weakref.ref(value, lambda _: lines.append(f"del {name}"))
        return name

    def _find_name(self, value: object) -> str | None:
        name, reference = self._names.get(id(value), (None, object))
        return name if reference() is value else None

    def _refer(self, value: Any) -> str:
        """Return an expression of a value in a call."""
        if isinstance(value, tuple | list):
            parts = "".join(f"{self._refer(one)}, " for one in value)
            return f"[{parts}]" if isinstance(value, list) else f"({parts})"
        if isinstance(value, slice):
            return f"slice({self._refer(value.start)}, {self._refer(value.stop)}, {self._refer(value.step)})"
        if not (name := self._find_name(value) or self._places.get(id(value))):
            name = f"c{len(self._constants)}"
            self._constants.append(value)
            if not isinstance(value, int):  # Two numbers may be equal at one length alone.
                self._places[id(value)] = name
        return name


class _Operators(TorchDispatchMode):  # type: ignore[misc]
    """Counts the operators that run."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        is_shaped_by_data = function in SHAPED_BY_DATA or torch.Tag.dynamic_output_shape in function.tags
        if function is aten.index.Tensor:
            is_shaped_by_data = any(index is not None and index.dtype == torch.bool for index in args[1])
        if is_shaped_by_data:
            raise RecordingError(f"the shape of what {function} returns depends on numbers")
        return function(*args, **(kwargs or {}))
