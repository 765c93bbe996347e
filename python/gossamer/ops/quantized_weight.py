"""Frozen weights in few bits: NF4 as bitsandbytes stores it, int8 and fp8, with their quantisers."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from gossamer._checks import (
    check_dtype,
    check_finite,
    check_float,
    check_positive,
    check_same_device,
    check_shape,
    check_tensor,
)
from gossamer.ops._weights import Blocks, Weight

FP8 = torch.float8_e4m3fn
# The 16 values of NF4 (Dettmers et al., 2023): quantiles of a normal distribution, scaled to [−1, 1], with a zero.
NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
ZERO_INDEX = 7


@functools.cache
def _nf4_code() -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(NF4_CODE, device="cpu", dtype=torch.float32)


@functools.cache
def dynamic_code() -> torch.Tensor:
    """``(256,)`` float32: the signed dynamic 8-bit map that double quantisation stores the block scales in."""
    values = [0.0, 1.0]
    # Cached, so it must not depend on the first caller's inference mode or default device.
    with torch.inference_mode(False), torch.device("cpu"):
        for exponent in range(7):
            edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
            means = ((edges[:-1] + edges[1:]) / 2.0) * 10.0 ** (exponent - 6)
            values += [*means.tolist(), *(-means).tolist()]
        return torch.tensor(sorted(values), dtype=torch.float32)


def _nearest(values: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """The index of the nearest entry of the ascending ``code``; ties go to the lower entry."""
    midpoints = (code[1:] + code[:-1]) / 2
    return torch.bucketize(values, midpoints, right=False)


class _Decodable:
    """Methods that the formats share."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight ``(N, C)`` in plain torch: products in float32, rounded once to ``dtype``."""
        check_dtype("dtype", dtype)
        return self.operand().dequantize(dtype)


class _ByRow(_Decodable):
    """A weight with one code per element, in ``values``."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, C)``."""
        return tuple(self.values.shape)

    @property
    def data(self) -> torch.Tensor:
        """The values."""
        return self.values


@dataclass(frozen=True)
class NF4Weight(_Decodable):
    """A weight ``(N, C)`` in NF4, with the layout of bitsandbytes' ``Params4bit`` and ``QuantState``.

    With ``w`` flattened row by row, ``w[i] = code[q[i]]·scale[i // block_size]``. The scale of block ``k`` is
    ``absmax[k]``; with double quantisation ``nested_code[absmax[k]]·nested_absmax[k // nested_block_size] + offset``.

    Attributes:
        packed: ``(⌈N·C/2⌉,)`` uint8, or of bitsandbytes' shape ``(⌈N·C/2⌉, 1)``; even elements in the high four bits.
        absmax: ``(⌈N·C/block_size⌉,)``, float32, or uint8 with double quantisation.
        shape: ``(N, C)``.
        code: ``(16,)`` float32.
        block_size: elements that share a scale.
        nested_absmax: ``(⌈blocks/nested_block_size⌉,)`` float32; None without double quantisation, like the next two.
        nested_code: ``(256,)`` float32.
        offset: one float32, the mean of the scales.
        nested_block_size: scales that share a nested scale.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    shape: tuple[int, int]
    code: torch.Tensor
    block_size: int = 64
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    nested_block_size: int = 256

    format = "nf4"

    def __post_init__(self) -> None:
        sizes = {"block_size": self.block_size, "nested_block_size": self.nested_block_size}
        check_positive(**{f"NF4Weight.{name}": size for name, size in sizes.items()})
        shape = self.shape
        if not isinstance(shape, (tuple, list)) or len(shape) != 2 or not all(isinstance(s, int) for s in shape):
            raise ValueError(f"NF4Weight.shape must be (N, C), two ints, got {shape!r}")
        n, c = shape
        blocks = -(-n * c // self.block_size)
        for name, tensor, dtype, count in (
            ("packed", self.packed, torch.uint8, (n * c + 1) // 2),
            ("absmax", self.absmax, torch.float32 if self.nested_absmax is None else torch.uint8, blocks),
            ("code", self.code, torch.float32, 16),
            ("nested_absmax", self.nested_absmax, torch.float32, -(-blocks // self.nested_block_size)),
            ("nested_code", self.nested_code, torch.float32, 256),
            ("offset", self.offset, torch.float32, 1),
        ):
            if tensor is None and self.nested_absmax is None and name in ("nested_absmax", "nested_code", "offset"):
                continue
            check_tensor(f"NF4Weight.{name}", tensor)
            if tensor.dtype != dtype or tensor.numel() != count:
                raise ValueError(
                    f"NF4Weight.{name} must hold {count} values of {dtype} for shape {tuple(self.shape)} and block "
                    f"size {self.block_size}, got {tuple(tensor.shape)} of {tensor.dtype}"
                )
            if tensor.device != self.packed.device:
                raise ValueError(f"NF4Weight.{name} must be on {self.packed.device}, got {tensor.device}")

    @property
    def data(self) -> torch.Tensor:
        """The packed codes."""
        return self.packed

    @property
    def state(self) -> list[torch.Tensor]:
        """The tensors that decode ``data``, in the order of the attributes."""
        nested = (self.nested_absmax, self.nested_code, self.offset)
        return [self.code, self.absmax, *(t for t in nested if t is not None)]

    def operand(self) -> Weight:
        """The weight as the record that operators take."""
        n, c = self.shape
        blocks = -(-n * c // self.block_size)
        sizes = [16, blocks]
        if self.nested_absmax is not None:
            sizes += [-(-blocks // self.nested_block_size), 256, 1]
        if self.packed.numel() != (n * c + 1) // 2 or [t.numel() for t in self.state] != sizes:
            self.__post_init__()  # a tensor was resized
        nested = self.nested_absmax, self.nested_code, self.offset
        blocks = Blocks(self.code, *nested, self.block_size, self.nested_block_size, *self.shape)
        return Weight(self.packed, "nf4", self.absmax, blocks)

    @classmethod
    def quantize(cls, weight: torch.Tensor, *, block_size: int = 64, double: bool = True) -> NF4Weight:
        """Quantise ``weight (N, C)`` float, with the scales in 8 bits too when ``double``."""
        _check_weight(weight)
        check_positive(block_size=block_size)
        if block_size >= 2**31:
            raise ValueError(f"block_size must be less than 2^31, got {block_size}")
        if not isinstance(double, bool):
            raise TypeError(f"double must be a bool, got {type(double).__name__}")
        blocks, absmax = _blockwise(weight.detach().float().reshape(-1), block_size)
        code = _nf4_code().to(weight.device, copy=True)  # its own, which a write changes for this weight alone
        index = _nearest(_scaled(blocks, absmax), code).to(torch.uint8).reshape(-1)[: weight.numel()]
        if weight.numel() % 2:
            index = torch.cat([index, index.new_full((1,), ZERO_INDEX)])
        packed = index[0::2] << 4 | index[1::2]
        shape = tuple(weight.shape)
        if not double:
            return cls(packed, absmax, shape, code, block_size)
        offset = absmax.mean()
        nested, nested_absmax = _blockwise(absmax - offset, 256)
        nested_code = dynamic_code().to(weight.device, copy=True)
        scales = _nearest(_scaled(nested, nested_absmax), nested_code).to(torch.uint8).reshape(-1)[: absmax.numel()]
        return cls(packed, scales, shape, code, block_size, nested_absmax, nested_code, offset.reshape(1))


@dataclass(frozen=True)
class Int8Weight(_ByRow):
    """A weight ``(N, C)`` in int8 with a scale per row: ``w[n, c] = values[n, c]·absmax[n] / 127``.

    Attributes:
        values: ``(N, C)`` int8.
        absmax: ``(N,)`` float32.
    """

    values: torch.Tensor
    absmax: torch.Tensor

    format = "int8"

    def __post_init__(self) -> None:
        check_shape("Int8Weight.values", self.values, (None, None), "(N, C)")
        check_shape("Int8Weight.absmax", self.absmax, (self.values.shape[0],), "(N,)")
        if self.values.dtype != torch.int8 or self.absmax.dtype != torch.float32:
            raise TypeError(
                f"Int8Weight must hold int8 values and float32 absmax, got {self.values.dtype} and {self.absmax.dtype}"
            )
        check_same_device(**{"Int8Weight.values": self.values, "Int8Weight.absmax": self.absmax})

    @property
    def state(self) -> list[torch.Tensor]:
        """The absmax."""
        return [self.absmax]

    def operand(self) -> Weight:
        """The weight as the record that operators take."""
        if self.values.dim() != 2 or self.absmax.numel() != self.values.shape[0]:
            self.__post_init__()  # a tensor was resized
        return Weight(self.values, "int8_absmax", self.absmax)

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> Int8Weight:
        """Quantise ``weight (N, C)`` float; ties go to even."""
        _check_weight(weight)
        wide = weight.detach().float()
        absmax = wide.abs().amax(dim=1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
        factor = torch.where(absmax > 0, 127.0 / absmax, 0.0)
        return cls((wide * factor.unsqueeze(1)).round().to(torch.int8), absmax)


@dataclass(frozen=True)
class Float8Weight(_ByRow):
    """A weight ``(N, C)`` in fp8 (e4m3) with a scale per row or one for all: ``w[n, c] = values[n, c]·scale[n]``.

    Attributes:
        values: ``(N, C)`` float8_e4m3fn.
        scale: ``(N,)`` or ``(1,)`` float32.
    """

    values: torch.Tensor
    scale: torch.Tensor

    format = "fp8"

    def __post_init__(self) -> None:
        check_shape("Float8Weight.values", self.values, (None, None), "(N, C)")
        check_tensor("Float8Weight.scale", self.scale)
        if self.scale.dim() != 1 or self.scale.shape[0] not in (1, self.values.shape[0]):
            raise ValueError(
                f"Float8Weight.scale must have shape (N,) or (1,), with N={self.values.shape[0]}, "
                f"got {tuple(self.scale.shape)}"
            )
        if self.values.dtype != FP8 or self.scale.dtype != torch.float32:
            raise TypeError(
                f"Float8Weight must hold {FP8} values and a float32 scale, got {self.values.dtype} and "
                f"{self.scale.dtype}"
            )
        check_same_device(**{"Float8Weight.values": self.values, "Float8Weight.scale": self.scale})

    @property
    def state(self) -> list[torch.Tensor]:
        """The scale."""
        return [self.scale]

    def operand(self) -> Weight:
        """The weight as the record that operators take."""
        if self.values.dim() != 2 or self.scale.numel() not in (1, self.values.shape[0]):
            self.__post_init__()  # a tensor was resized
        return Weight(self.values, "fp8", self.scale)

    @classmethod
    def quantize(cls, weight: torch.Tensor, *, per_row: bool = True) -> Float8Weight:
        """Quantise ``weight (N, C)`` float, its largest magnitude (of a row, or of all) becoming fp8's largest."""
        _check_weight(weight)
        wide = weight.detach().float()
        absmax = wide.abs().amax(dim=1) if per_row else wide.abs().amax().reshape(1)
        largest = torch.finfo(FP8).max
        return cls((_scaled(wide, absmax) * largest).to(FP8), absmax / largest)


QuantizedWeight = NF4Weight | Int8Weight | Float8Weight


def _check_weight(weight: torch.Tensor) -> None:
    check_shape("weight", weight, (None, None), "(N, C)")
    check_float("weight", weight, "reference")
    if weight.layout != torch.strided:
        raise TypeError(f"weight must have the layout torch.strided, got {weight.layout}")
    if weight.numel() == 0:
        raise ValueError(f"weight must have at least one element, got {tuple(weight.shape)}")
    check_finite("weight", weight.detach())


def _scaled(values: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """Rows of ``values`` divided by their ``absmax``; zero where that is zero."""
    safe = torch.where(absmax > 0, absmax, torch.ones((), device=absmax.device))
    return values / safe.unsqueeze(-1)


def _blockwise(flat: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``flat`` as ``(blocks, block_size)``, zeros behind its end, and the largest magnitude of each block."""
    padding = -flat.numel() % block_size
    if padding:
        flat = torch.cat([flat, flat.new_zeros(padding)])
    blocks = flat.view(-1, block_size)
    return blocks, blocks.abs().amax(dim=1)
