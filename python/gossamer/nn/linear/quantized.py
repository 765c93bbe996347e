"""A linear layer whose weight is held in 8 or 4 bits."""

from __future__ import annotations

import torch
from torch import nn

from gossamer._checks import check_computed, check_dtype, check_floating, check_same_device, check_shape, last_size
from gossamer._layout import with_leading_sizes
from gossamer.nn.moe.experts.quantized_stack import QuantizedExpertStack
from gossamer.ops.low_rank import base_linear
from gossamer.ops.quantized_expert_weight import MX_GROUP, QuantizedExpertWeight


class QuantizedLinear(nn.Module):
    """A linear layer with a frozen weight in few bits: ``y = x·decode(weight)ᵀ + bias``.

    On the CPU codes are decoded within the product, so one row takes about the time of reading the codes once.
    Activations and the bias get gradients.

    Args:
        weight: a stack of one matrix, ``(1, O, I)``.
        bias: ``(O,)`` float, or None.

    Attributes:
        weight: the :class:`gossamer.nn.QuantizedExpertStack`; the state holds ``weight.data`` and ``weight.scale``.
        bias: the parameter, or None.

    Raises:
        TypeError: ``weight`` is no :class:`gossamer.QuantizedExpertWeight`, or ``bias`` no floating tensor.
        ValueError: the stack holds more than one matrix, or the bias has another size or device.
    """

    def __init__(self, weight: QuantizedExpertWeight, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        if not isinstance(weight, QuantizedExpertWeight):
            raise TypeError(f"weight must be a gossamer.QuantizedExpertWeight, got {type(weight).__name__}")
        count, self.out_features, self.in_features = weight.shape
        if count != 1:
            raise ValueError(f"weight must have shape (1, O, I), got {weight.shape}")
        if bias is not None:
            check_floating("bias", bias)
            check_shape("bias", bias, (self.out_features,), "(O,)")
            check_same_device(weight=weight.data, bias=bias)
        self.weight = QuantizedExpertStack(weight)
        self.bias = None if bias is None else bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, format: str, *, group_size: int = MX_GROUP, activations: str = "float"
    ) -> QuantizedLinear:
        """Quantise the weight of ``linear``, by :meth:`gossamer.QuantizedExpertWeight.quantize`; its bias is shared."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        values, options = linear.weight.detach().unsqueeze(0), {"group_size": group_size, "activations": activations}
        return cls(QuantizedExpertWeight.quantize(values, format, **options), linear.bias)

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """A plain linear layer with the dequantised weight."""
        check_dtype("dtype", dtype)
        values = self.weight.weight().dequantize(dtype)[0]
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype)
        linear.weight = nn.Parameter(values)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype))
        return linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., O)`` for ``x (..., I)``."""
        if last_size("x", x, "(..., I)") != self.in_features:
            raise ValueError(f"x must have shape (..., I) with I = {self.in_features}, got {tuple(x.shape)}")
        check_computed("x", x)
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        y = base_linear(rows, self.weight.for_products(), self.bias)
        return with_leading_sizes(y, x)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
