"""One operand type for the weights of products: dense or quantised, with or without a low-rank update."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from gossamer._checks import check_shape, check_shape_of
from gossamer._panels import ROWS, arranged

# Rows and columns that share a scale in "fp8_block", as in DeepSeek-V3.
BLOCK = 128
MX_GROUP = 32
INT4_GROUPS = (32, 64, 128)
INT4_ZERO = 8
# The 16 values of e2m1 by code: sign, two bits of exponent, one of mantissa.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E8M0_BIAS = 127
E8M0_NAN = 255
# How products read the rows of x: as they are, or rounded to 8 bits, which needs weights with integer codes.
ACTIVATIONS = ("float", "int8")
WHOLE_FORMATS = ("int8", "int4", "mxfp4")
# At most _INT8_GROUP columns of x share a scale. Columns that are all below _INT8_LEAST are rounded to zero.
_INT8_GROUP = 128
_INT8_LEAST = 2.0**-100

# Values per byte, for formats with more than one.
_PER_BYTE = {"int4": 2, "mxfp4": 2}


class Blocks(NamedTuple):
    """The tables that decode the blocks of an ``nf4`` weight; see :class:`gossamer.NF4Weight`.

    Attributes:
        code: ``(16,)`` float32.
        nested_absmax: ``(⌈blocks/nested_block_size⌉,)`` float32 if the scales are quantised too, like the next two.
        nested_code: ``(256,)`` float32.
        offset: one float32.
        block_size: elements that share a scale.
        nested_block_size: scales that share a nested scale.
        rows: N, which cannot be derived from the packed values.
        columns: C.
    """

    code: torch.Tensor | None = None
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    block_size: int = 0
    nested_block_size: int = 0
    rows: int = 0
    columns: int = 0


NO_BLOCKS = Blocks()


class Weight(NamedTuple):
    """A weight ``(N, C)``, or a stack ``(E, N, C)``, in any storage format: ``decode(data) + factor·b·a``.

    Attributes:
        data: the values, of any strides, if ``format`` is ``"dense"``; else the codes.
        format: ``"dense"``, a format of :class:`gossamer.QuantizedExpertWeight`, or of a matrix ``"nf4"``, ``"fp8"``
            or ``"int8_absmax"`` (:class:`gossamer.Int8Weight`).
        scale: scale of the codes; for ``"nf4"`` the absmax of its blocks.
        blocks: the tables that decode ``"nf4"``.
        a: ``(..., r, C)`` of the low-rank update, or None where there is none.
        b: ``(..., N, r)``.
        factor: factor of the update.
        bias: ``(N,)`` or ``(E, N)``, added to the weight's products; or None.
        activations: ``"float"``, or ``"int8"`` if products round their rows as :func:`round_rows` does.
        layout: the layout of a stack's codes; see :class:`gossamer.QuantizedExpertWeight`.
    """

    data: torch.Tensor
    format: str = "dense"
    scale: torch.Tensor | None = None
    blocks: Blocks = NO_BLOCKS
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    factor: float = 1.0
    bias: torch.Tensor | None = None
    activations: str = "float"
    layout: str = ROWS

    @property
    def quantized(self) -> bool:
        """Whether ``data`` holds codes."""
        return self.format != "dense"

    @property
    def values(self) -> torch.Tensor | None:
        """The values of a dense weight; None for a quantised one."""
        return self.data if self.format == "dense" else None

    @property
    def kind(self) -> str:
        """``"dense"``, ``"quantized"`` or ``"quantized, int8 rows"``, with ``" + low rank"`` where it has an update."""
        kind = "dense" if self.format == "dense" else "quantized"
        if self.activations != "float":
            kind = f"{kind}, {self.activations} rows"
        return kind if self.a is None else f"{kind} + low rank"

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, C)`` or ``(E, N, C)``."""
        if self.format == "dense":
            return self.data.shape
        if self.format == "nf4":
            return self.blocks.rows, self.blocks.columns
        *leading, stored = self.data.shape
        return *leading, stored * _PER_BYTE.get(self.format, 1)

    @property
    def group_size(self) -> int:
        """Columns that share a scale; C where a row has one scale."""
        return group_size(self.data, self.scale, self.format)

    def with_values(self, values: torch.Tensor | None, bias: torch.Tensor | None) -> Weight:
        """The weight with a bias and, if dense, with other values; for a quantised weight ``values`` is None."""
        if bias is None and (values is self.data or values is None):
            return self
        return self._replace(data=self.data if values is None else values, bias=bias)

    def with_factors_in(self, dtype: torch.dtype) -> Weight:
        """With the update's factors, if any, rounded to ``dtype``."""
        return self if self.a is None else self._replace(a=self.a.to(dtype), b=self.b.to(dtype))

    def in_rows(self) -> Weight:
        """With its codes row after row, in a copy if they are not."""
        return self if self.layout == ROWS else self._replace(data=arranged(self.data, ROWS), layout=ROWS)

    def for_backend(self, backend: str) -> Weight:
        """With its codes in a layout that a backend reads: all but the native one read rows."""
        return self if backend == "native" else self.in_rows()

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Its values without the update: a dense weight's unchanged, a quantised one's rounded once to ``dtype``."""
        return self.data if self.format == "dense" else DECODERS[self.format](self.in_rows()).to(dtype)


def round_rows(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """The rows ``x (..., C)`` rounded as in products with a weight of ``"int8"`` activations, in float32 or float64.

    For each group of g columns, where g is the number that share a scale of the weight, but at most 128::

        s = max |x| / 127,    q = round(x · 127 / max |x|),    x̂ = q · s

    in float32, halves to even, so that ``|x̂ − x| <= s / 2`` up to float32 rounding. A group with ``max |x|`` below
    2⁻¹⁰⁰ becomes zero, and one with a value that is not finite becomes NaN. The gradient of x is that of x̂.
    """
    wide, c = torch.promote_types(x.dtype, torch.float32), x.shape[-1]
    if x.numel() == 0:
        return x.to(wide)
    size = min(weight.group_size, _INT8_GROUP)
    groups = F.pad(x.detach().float(), (0, -c % size)).unflatten(-1, (-1, size))
    largest = groups.abs().amax(-1, keepdim=True)
    none = largest < _INT8_LEAST
    codes = (groups * torch.where(none, 0.0, 127.0 / largest)).round().clamp(-127, 127)
    scale = torch.where(largest.isfinite(), torch.where(none, 0.0, largest * (1.0 / 127.0)), torch.nan)
    rounded = (codes.to(wide) * scale.to(wide)).flatten(-2)[..., :c]
    return rounded + (x - x.detach()) if x.requires_grad else rounded


def as_weight(name: str, weight: object, expected: tuple[int | None, ...], symbols: str) -> Weight:
    """Turn a tensor or a quantised weight into an operand; a quantised one must not require a gradient.

    ``expected`` and ``symbols`` are those of :func:`gossamer._checks.check_shape`.
    """
    # Tensors first: looking up an attribute that a tensor lacks takes half a microsecond.
    if isinstance(weight, torch.Tensor) or not hasattr(weight, "operand"):
        check_shape(name, weight, expected, symbols)
        return Weight(weight)
    check_shape_of(name, weight.shape, expected, symbols)
    operand = weight.operand()
    if torch.is_grad_enabled():
        blocks = operand.blocks
        parts = [("data", operand.data), ("scale", operand.scale)]
        if blocks is not NO_BLOCKS:
            parts += [(part, getattr(blocks, part)) for part in ("code", "nested_absmax", "nested_code", "offset")]
        for part, tensor in parts:
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"{name} is quantised and frozen, but {name}.{part} requires a gradient")
    return operand


def group_size(data: torch.Tensor, scale: torch.Tensor, weight_format: str) -> int:
    """Columns of a stack that share a scale; C where a row has one scale."""
    if weight_format == "fp8_block":
        return BLOCK
    if weight_format == "mxfp4":
        return MX_GROUP
    if weight_format == "int4":
        return data.shape[2] * 2 // scale.shape[2] if scale.numel() else INT4_GROUPS[0]
    return data.shape[2]


def _by_row(weight: Weight) -> torch.Tensor:
    return weight.data.float() * weight.scale.float().unsqueeze(-1)


def _by_absmax(weight: Weight) -> torch.Tensor:
    return weight.data.float() * (weight.scale * (1.0 / 127.0)).unsqueeze(-1)


def _by_block(weight: Weight) -> torch.Tensor:
    _, n, c = weight.data.shape
    rows = weight.scale.float().repeat_interleave(BLOCK, dim=1)[:, :n]
    return weight.data.float() * rows.repeat_interleave(BLOCK, dim=2)[..., :c]


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """Codes ``(..., C)`` int32 from bytes ``(..., C/2)``, the even column in the low four bits."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).int()


def _e8m0(scale: torch.Tensor) -> torch.Tensor:
    """Powers of two in float32 from biased exponents; 0 is 2⁻¹²⁷, a subnormal number, and 255 is NaN."""
    power = (scale.int() << 23).view(torch.float32)
    return torch.where(scale == 0, 2.0**-E8M0_BIAS, torch.where(scale == E8M0_NAN, torch.nan, power))


def _by_group(weight: Weight) -> torch.Tensor:
    codes = _unpack(weight.data)
    if weight.format == "int4":
        values, factor = (codes - INT4_ZERO).float(), weight.scale.float()
    else:
        values, factor = torch.tensor(E2M1, device=codes.device)[codes], _e8m0(weight.scale)
    return values * factor.repeat_interleave(weight.group_size, dim=2) if values.numel() else values


def _nf4(weight: Weight) -> torch.Tensor:
    blocks, absmax = weight.blocks, weight.scale
    if blocks.nested_absmax is not None:
        coarse = blocks.nested_absmax.reshape(-1).repeat_interleave(blocks.nested_block_size)[: absmax.numel()]
        absmax = blocks.nested_code.reshape(-1)[absmax.reshape(-1).int()] * coarse + blocks.offset.reshape(1)
    packed = weight.data.reshape(-1)
    index = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[: blocks.rows * blocks.columns]
    scale = absmax.reshape(-1).repeat_interleave(blocks.block_size)[: index.numel()]
    return (blocks.code.reshape(-1)[index.int()] * scale).view(blocks.rows, blocks.columns)


# Format -> the values in float32, in plain torch.
DECODERS: dict[str, Callable[[Weight], torch.Tensor]] = {
    "fp8": _by_row,
    "int8": _by_row,
    "int8_absmax": _by_absmax,
    "fp8_block": _by_block,
    "int4": _by_group,
    "mxfp4": _by_group,
    "nf4": _nf4,
}
