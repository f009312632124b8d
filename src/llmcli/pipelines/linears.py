"""Linear layers, with weights as the processor's own kernels read them: bfloat16 packed by oneDNN, or quantized."""

from typing import Any, Self

import torch
from torch import nn

GROUP = 32  # input features that share a scale in int4, as in GGUF's Q4 types
aten = torch.ops.aten


class PackedLinear(nn.Module):  # type: ignore[misc]  # torch, to mypy, has no types
    """A bfloat16 layer as torch.compile would call it. nn.Linear has oneDNN look at the weights in the order in which
    they lie, at a half of what memory gives where there is but one row to multiply."""

    def __init__(self, weight: Any, bias: Any) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        self.register_buffer("weight", packed, persistent=False)
        self.bias = bias

    def forward(self, x: Any) -> Any:
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), self.weight, self.bias, "none", [], "")


class QuantizedLinear(nn.Module):  # type: ignore[misc]
    """bfloat16 (..., K) times quantized weights of (N, K). `weight` and `scales` are what `quantize` makes of float
    weights; the shapes and kinds of both are the class's own."""

    multiple: int  # what K divides by

    def __init__(self, out_features: int, in_features: int, bias: Any) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        weight, scales = self.empty(out_features, in_features)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = bias

    @classmethod
    def takes(cls, linear: nn.Module) -> bool:
        """Whether the kernel multiplies weights of that shape."""
        if type(linear) is not nn.Linear:
            return False
        return bool(linear.out_features % 16 == 0 and linear.in_features % cls.multiple == 0)

    @classmethod
    def blank(cls, linear: nn.Linear) -> Self:
        """In the place of that layer, for weights to come."""
        return cls(linear.out_features, linear.in_features, linear.bias)

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        """That layer, quantized."""
        layer = cls.blank(linear)
        layer.weight.data, layer.scales.data = cls.quantize(linear.weight.detach().float())
        return layer

    def align(self) -> None:
        """Move weights that lie where a file put them to where the kernels may read them: of more than three rows, that
        of int8 reads 16 bytes at once."""
        for parameter in (self.weight, self.scales):
            if parameter.data_ptr() % 64:
                parameter.data = parameter.data.clone()

    @staticmethod
    def empty(out_features: int, in_features: int) -> tuple[Any, Any]:
        """Weights and scales without values."""
        raise NotImplementedError

    @staticmethod
    def quantize(weight: Any) -> tuple[Any, Any]:
        """Weights and scales of float32 weights (N, K), by rounding to nearest."""
        raise NotImplementedError

    def multiply(self, rows: Any) -> Any:
        """(M, K) -> (M, N)."""
        raise NotImplementedError

    def forward(self, x: Any) -> Any:
        # The kernels trust that rows are of the kind that the scales are.
        y = self.multiply(x.reshape(-1, self.in_features).to(self.scales.dtype).contiguous()).to(x.dtype)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


class Int8Linear(QuantizedLinear):
    """int8 (N, K), symmetric, with a scale for each output, (N,)."""

    multiple = 16

    @staticmethod
    def empty(out_features: int, in_features: int) -> tuple[Any, Any]:
        return torch.empty(out_features, in_features, dtype=torch.int8), torch.empty(out_features, dtype=torch.bfloat16)

    @staticmethod
    def quantize(weight: Any) -> tuple[Any, Any]:
        scales = _scales(weight.abs().amax(1) / 127)
        return (weight / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scales

    def multiply(self, rows: Any) -> Any:
        return aten._weight_int8pack_mm(rows, self.weight, self.scales)


class Int4Linear(QuantizedLinear):
    """int4 in uint8 (N, K / 2), in an order that is the processor's; a scale and the value of 8 for each GROUP of
    inputs, (K / GROUP, N, 2). A weight is (code - 8) * scale + that value: what GGUF's Q4_1 can say, this can too."""

    multiple = GROUP

    @staticmethod
    def empty(out_features: int, in_features: int) -> tuple[Any, Any]:
        weight = torch.empty(out_features, in_features // 2, dtype=torch.uint8)
        return weight, torch.empty(in_features // GROUP, out_features, 2, dtype=torch.bfloat16)

    @staticmethod
    def quantize(weight: Any) -> tuple[Any, Any]:
        groups = weight.unflatten(1, (-1, GROUP))
        least, most = groups.amin(-1), groups.amax(-1)
        scales = _scales((most - least) / 15)
        middle = (least + 8 * scales.float()).bfloat16()
        codes = (groups - middle.float()[..., None]) / scales.float()[..., None] + 8
        codes = codes.round().clamp(0, 15).to(torch.int32).flatten(1)
        packed = aten._convert_weight_to_int4pack_for_cpu(codes, 1)  # of innerKTiles, here, it makes nothing
        return packed, torch.stack([scales.t(), middle.t()], -1).contiguous()

    def multiply(self, rows: Any) -> Any:
        return aten._weight_int4pack_mm_for_cpu(rows, self.weight, GROUP, self.scales)


def _scales(exact: Any) -> Any:
    """As the kernels take them. Codes are found for the rounded ones, so that rounding costs next to nothing."""
    return exact.clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
