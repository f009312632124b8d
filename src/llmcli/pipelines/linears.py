"""Linear layers with weights as the CPU's own kernels read them: packed by oneDNN, or quantized."""

from typing import Self

import torch
from torch import Tensor, nn

from llmcli.compat import torch as kernels

DEQUANTIZED_ROWS = 32  # from which bfloat16 products are faster than those of int8, where the CPU has both
WIDENED_ROWS = 8  # for which it pays to make float32 weights of bfloat16 ones
GROUP = 32  # input features that share a scale in int4, as in GGUF's Q4 types
ALIGNMENT_BYTES = 64
Weights = tuple[Tensor, Tensor]  # quantized, and scales


class PackedLinear(nn.Module):  # type: ignore[misc]  # torch has no types for mypy
    """A layer as torch.compile would call it. nn.Linear reads bfloat16 weights of one row at half the memory's speed.

    In float32, it is up to twice as fast as nn.Linear for 4 to 64 rows, and a row's result is the same to the last bit
    whatever other rows there are.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", kernels.pack_weight(weight.detach()), persistent=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return kernels.packed_linear(x, self.weight, self.bias)


class WideningLinear(nn.Linear):  # type: ignore[misc]
    """A bfloat16 layer for a CPU that multiplies a single row of bfloat16 fast, but many rows only in float32."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[:-1].numel() < WIDENED_ROWS:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(x.float(), self.weight.float(), bias).to(x.dtype)


class QuantizedLinear(nn.Module):  # type: ignore[misc]
    """bfloat16 (..., K) times quantized weights of (N, K), which are empty at first.

    Each subclass has its own shapes and types of `weight` and `scales`: `empty` returns them without values, `quantize`
    those of float32 weights, by rounding to nearest, and `multiply` maps (M, K) to (M, N).
    """

    multiple: int  # that K must be divisible by

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features, self.bias = linear.out_features, linear.in_features, linear.bias
        weight, scales = self.empty(self.out_features, self.in_features)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)

    @classmethod
    def can_replace(cls, module: nn.Module) -> bool:
        is_linear = type(module) is nn.Linear
        return is_linear and module.out_features % 16 == 0 and module.in_features % cls.multiple == 0

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        layer = cls(linear)
        layer.weight.data, layer.scales.data = cls.quantize(linear.weight.detach().float())
        return layer

    def align(self) -> None:
        """Move weights from where a file put them: of more than three rows, int8's kernel reads 16 bytes at once."""
        for parameter in (self.weight, self.scales):
            if parameter.data_ptr() % ALIGNMENT_BYTES:
                parameter.data = parameter.data.clone()

    def forward(self, x: Tensor) -> Tensor:
        # The kernels require rows of the type of the scales, and do not check it.
        y = self.multiply(x.reshape(-1, self.in_features).to(self.scales.dtype).contiguous()).to(x.dtype)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


class Int8Linear(QuantizedLinear):
    """int8 (N, K), symmetric, with a scale for each output, (N,)."""

    multiple = 16

    @staticmethod
    def empty(out_features: int, in_features: int) -> Weights:
        return torch.empty(out_features, in_features, dtype=torch.int8), torch.empty(out_features, dtype=torch.bfloat16)

    @staticmethod
    def quantize(weight: Tensor) -> Weights:
        scales = _round_scales(weight.abs().amax(1) / 127)
        return (weight / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scales

    def multiply(self, rows: Tensor) -> Tensor:
        if len(rows) >= DEQUANTIZED_ROWS and kernels.has_fast_bfloat16():
            return nn.functional.linear(rows, self.weight.to(rows.dtype)) * self.scales
        return kernels.int8_matmul(rows, self.weight, self.scales)


class Int4Linear(QuantizedLinear):
    """int4 in uint8 (N, K / 2), in the kernel's order, with scale and middle of each group, in (K / GROUP, N, 2).

    A weight is (code - 8) * scale + middle: this can hold what GGUF's Q4_1 holds.
    """

    multiple = GROUP

    @staticmethod
    def empty(out_features: int, in_features: int) -> Weights:
        weight = torch.empty(out_features, in_features // 2, dtype=torch.uint8)
        return weight, torch.empty(in_features // GROUP, out_features, 2, dtype=torch.bfloat16)

    @staticmethod
    def quantize(weight: Tensor) -> Weights:
        groups = weight.unflatten(1, (-1, GROUP))
        low, high = groups.amin(-1), groups.amax(-1)
        scales = _round_scales((high - low) / 15)
        middle = (low + 8 * scales.float()).bfloat16()
        codes = (groups - middle.float()[..., None]) / scales.float()[..., None] + 8
        packed = kernels.pack_int4(codes.round().clamp(0, 15).to(torch.int32).flatten(1))
        return packed, torch.stack([scales.t(), middle.t()], -1).contiguous()

    def multiply(self, rows: Tensor) -> Tensor:
        return kernels.int4_matmul(rows, self.weight, GROUP, self.scales)


def _round_scales(scales: Tensor) -> Tensor:
    # Codes are computed from rounded scales, so that rounding costs next to nothing.
    return scales.clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
