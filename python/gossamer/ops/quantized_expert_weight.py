"""Frozen stacks of expert weights in 8 or 4 bits: formats, quantisers, and conversion from checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from gossamer._checks import (
    check_dtype,
    check_finite,
    check_float,
    check_positive,
    check_shape,
    check_strided,
    check_tensor,
)
from gossamer._panels import PANELS, ROWS, arranged, check_layout, fits_panels
from gossamer.ops._weights import (
    ACTIVATIONS,
    BLOCK,
    E2M1,
    E8M0_BIAS,
    E8M0_NAN,
    INT4_GROUPS,
    INT4_ZERO,
    MX_GROUP,
    WHOLE_FORMATS,
    Weight,
)

FP8 = torch.float8_e4m3fn

# Format -> (dtype of the data, values in one byte).
FORMATS: dict[str, tuple[torch.dtype, int]] = {
    "fp8": (FP8, 1),
    "fp8_block": (FP8, 1),
    "int8": (torch.int8, 1),
    "int4": (torch.uint8, 2),
    "mxfp4": (torch.uint8, 2),
}
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_format(weight_format: str) -> None:
    """``format`` must be a key of :data:`FORMATS`."""
    if not isinstance(weight_format, str) or weight_format not in FORMATS:
        raise ValueError(f"format must be one of {sorted(FORMATS)}, got {weight_format!r}")


def check_activations(activations: str, weight_format: str) -> None:
    """``activations`` must be ``"float"``, or ``"int8"`` with a format whose codes are integers."""
    if not isinstance(activations, str) or activations not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {ACTIVATIONS}, got {activations!r}")
    if activations == "int8" and weight_format not in WHOLE_FORMATS:
        raise ValueError(f"activations can be 'int8' for the formats {WHOLE_FORMATS}, got format {weight_format!r}")


def check_group_size(group_size: int, weight_format: str) -> None:
    """``group_size`` must be one of the format's, if it is ``int4`` or ``mxfp4``."""
    if weight_format in ("int4", "mxfp4"):
        sizes = INT4_GROUPS if weight_format == "int4" else (MX_GROUP,)
        check_positive(group_size=group_size)
        if group_size not in sizes:
            raise ValueError(f"group_size must be one of {sizes} for {weight_format}, got {group_size}")


def check_quantizable(name: str, weight: torch.Tensor, weight_format: str, group_size: int) -> None:
    """``weight (E, N, C)`` must have finite values and whole groups of a valid size along C."""
    check_shape(name, weight, (None, None, None), "(E, N, C)")
    check_float(name, weight, "reference")
    check_strided(name, weight)
    if weight.numel() == 0:
        raise ValueError(f"{name} must have at least one element, got {tuple(weight.shape)}")
    check_group_size(group_size, weight_format)
    c = weight.shape[2]
    if weight_format in ("int4", "mxfp4") and c % group_size:
        raise ValueError(f"C must be a multiple of group_size for {weight_format}, got C={c}, group_size={group_size}")
    check_finite(name, weight.detach())


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class QuantizedExpertWeight:
    """A frozen stack of expert weights ``w (E, N, C)`` in few bits, with scales along C.

    =============  ==========================  ============================  ====================================
    format         data                        scale                         ``w[e, n, c]``
    =============  ==========================  ============================  ====================================
    ``fp8``        ``(E, N, C)`` e4m3          ``(E, N)``                    ``data·scale[n]``
    ``fp8_block``  ``(E, N, C)`` e4m3          ``(E, ⌈N/128⌉, ⌈C/128⌉)``     ``data·scale[n // 128, c // 128]``
    ``int8``       ``(E, N, C)`` int8          ``(E, N)``                    ``data·scale[n]``
    ``int4``       ``(E, N, C/2)`` uint8       ``(E, N, C/g)``               ``(code − 8)·scale[n, c // g]``
    ``mxfp4``      ``(E, N, C/2)`` uint8       ``(E, N, C/32)`` uint8        ``e2m1(code)·2^(scale[n, c // 32] − 127)``
    =============  ==========================  ============================  ====================================

    e4m3 is ``torch.float8_e4m3fn``; groups of ``int4`` have g = 32, 64 or 128 columns. Of the two values in a byte, the
    one with even ``c`` has the low four bits. Scales are float32, bfloat16 or float16, those of ``mxfp4`` e8m0: ``0``
    is ``2⁻¹²⁷`` and ``255`` NaN, which makes its whole group NaN. e4m3's ``0x7F`` and ``0xFF`` are NaN; it has no
    infinity. ``mxfp4`` is the OCP microscaling format (2023), ``fp8_block`` DeepSeek-V3's (2024).

    Products use the values of :meth:`dequantize`, in the dtype of their other operand or more exactly.
    With ``activations="int8"`` they also round that operand, so that they multiply integers: each row, in groups of
    the weight's columns (of 128 for ``int8``), becomes ``q·s`` with ``s = max |x| / 127`` and ``q = round(x / s)``.
    A value changes by at most ``s / 2``, and so ``y[n]`` by at most ``Σ |w[n, c]|·s[c] / 2``; sums of integers are
    exact. A group with a value that is not finite makes its row NaN. Gradients ignore the rounding.

    Attributes:
        data: the codes, contiguous.
        scale: the scales, contiguous, on the device of ``data``.
        format: a key of the table.
        activations: how products take their other operand: ``"float"``, or ``"int8"`` (for ``int8``, ``int4`` and
            ``mxfp4``).
        layout: the order of the bytes of ``data``: ``"rows"``, that of the table; or ``"panels"``, which the CPU's
            products of few rows read fastest; see :meth:`to_layout`.

    Raises:
        TypeError: ``data`` or ``scale`` is not a tensor of a dtype of its format.
        ValueError: the format is unknown or does not support ``activations``; shapes do not fit it; a tensor is not
            contiguous; devices differ; the layout is unknown or does not exist for these sizes.
    """

    data: torch.Tensor
    scale: torch.Tensor
    format: str
    activations: str = "float"
    layout: str = ROWS

    # What calls with this weight prepared: addresses of its tensors, so it is no field, and copies leave it out.
    _prepared: ClassVar[object] = None

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_prepared"}

    def __post_init__(self) -> None:
        check_format(self.format)
        check_activations(self.activations, self.format)
        dtype, per_byte = FORMATS[self.format]
        check_shape("data", self.data, (None, None, None), "(E, N, C)" if per_byte == 1 else "(E, N, C/2)")
        check_tensor("scale", self.scale)
        if self.data.dtype != dtype:
            raise TypeError(f"data must be {dtype} for {self.format}, got {self.data.dtype}")
        allowed = (torch.uint8,) if self.format == "mxfp4" else _SCALE_DTYPES
        if self.scale.dtype not in allowed:
            raise TypeError(f"scale must be {', '.join(map(str, allowed))} for {self.format}, got {self.scale.dtype}")
        e, n, c = self.shape
        if self.format in ("fp8", "int8"):
            check_shape("scale", self.scale, (e, n), "(E, N)")
        elif self.format == "fp8_block":
            check_shape("scale", self.scale, (e, _cdiv(n, BLOCK), _cdiv(c, BLOCK)), "(E, ⌈N/128⌉, ⌈C/128⌉)")
        else:
            check_shape("scale", self.scale, (e, n, None), "(E, N, C/g)")
            self._check_groups(c)
        for name, tensor in (("data", self.data), ("scale", self.scale)):
            check_strided(name, tensor)
            if not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {tuple(tensor.stride())}")
        if self.scale.device != self.data.device:
            raise ValueError(f"scale must be on the device of data, {self.data.device}, got {self.scale.device}")
        if self.layout != ROWS:
            check_layout(self.layout)
            self._check_panels()

    def _check_panels(self) -> None:
        if not fits_panels(self.data.shape):
            raise ValueError(
                "layout can be 'panels' for N a multiple of 32 and rows of a multiple of 4 bytes, got data of shape "
                f"{tuple(self.data.shape)}"
            )

    def _check_groups(self, c: int) -> None:
        groups = self.scale.shape[2]
        sizes = INT4_GROUPS if self.format == "int4" else (MX_GROUP,)
        if groups == 0 and c == 0:
            return
        if groups == 0 or c % groups or c // groups not in sizes:
            raise ValueError(
                f"scale must have C / g columns with g of {', '.join(map(str, sizes))} for {self.format}, got "
                f"{groups} columns for C={c}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(E, N, C)``."""
        e, n, stored = self.data.shape
        return e, n, stored * FORMATS[self.format][1]

    @property
    def group_size(self) -> int:
        """Number of columns that share a scale; C if a row has one scale."""
        return self.operand().group_size

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.data.nbytes + self.scale.nbytes

    def operand(self) -> Weight:
        """The stack as the record that operators take."""
        if self.activations == "float" and self.layout == ROWS:
            return Weight(self.data, self.format, self.scale)
        return Weight(self.data, self.format, self.scale, activations=self.activations, layout=self.layout)

    def to_layout(self, layout: str) -> QuantizedExpertWeight:
        """The same weight with its codes in ``layout``, copied if they are in the other; products have the same bits.

        ``"panels"`` interleaves the four-byte words of 16 rows: byte b of row r is byte
        ``64·(b // 4) + 4·(r mod 16) + b mod 4`` of the bytes of rows ``16·(r // 16)`` to ``16·(r // 16) + 15``.
        The CPU's products of few rows, whose vector lanes are the weight's rows, then read memory in order and do not
        transpose the codes. Other backends copy the codes back into rows in every call.

        Args:
            layout: ``"rows"``, or ``"panels"`` for N a multiple of 32 and rows of a multiple of 4 bytes.

        Raises:
            ValueError: the layout is unknown or does not exist for these sizes.
        """
        check_layout(layout)
        if layout == self.layout:
            return self
        if layout == PANELS:
            self._check_panels()
        return replace(self, data=arranged(self.data, layout), layout=layout)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The stack ``(E, N, C)`` in plain torch: products in float32, rounded once to ``dtype``."""
        check_dtype("dtype", dtype)
        return self.operand().dequantize(dtype)

    @classmethod
    def quantize(
        cls, weight: torch.Tensor, format: str, *, group_size: int = MX_GROUP, activations: str = "float"
    ) -> QuantizedExpertWeight:
        """Quantise ``weight (E, N, C)``, mapping each group's largest magnitude to the format's largest value.

        ``fp8`` and ``fp8_block`` divide by ``absmax / 448``, ``int8`` by ``absmax / 127``, ``int4`` by ``absmax / 7``
        rounded to bfloat16; ``mxfp4`` uses the smallest power of two with ``absmax`` at most 6 times it. Values are
        rounded to the nearest code, ties to even. Experts are processed one at a time.

        Args:
            weight: float; of any strides.
            format: of the table.
            group_size: columns that share a scale: 32, 64 or 128 for ``int4``, 32 for ``mxfp4``; C must be a multiple.
            activations: of the result.

        Raises:
            TypeError: ``weight`` is not a float tensor.
            ValueError: the format is unknown or does not support ``activations``; ``weight`` has another rank, is empty
                or has values that are not finite; or groups do not fit C.
        """
        check_format(format)
        check_activations(activations, format)
        check_quantizable("weight", weight, format, group_size)
        return cls.quantize_checked(weight, format, group_size=group_size, activations=activations)

    @classmethod
    def quantize_checked(
        cls, weight: torch.Tensor, format: str, *, group_size: int = MX_GROUP, activations: str = "float"
    ) -> QuantizedExpertWeight:
        """:meth:`quantize` of what :func:`check_quantizable` accepts, without reading all values once more."""
        experts, quantizer = weight.detach(), _QUANTIZERS[format]
        first = quantizer(experts[0].float(), group_size)
        data, scale = (part.new_empty(weight.shape[0], *part.shape) for part in first)
        data[0], scale[0] = first
        # On meta the shapes are all that there is.
        for i in range(1, 1 if weight.is_meta else weight.shape[0]):
            data[i], scale[i] = quantizer(experts[i].float(), group_size)
        return cls(data, scale, format, activations)

    @classmethod
    def from_mxfp4(cls, blocks: torch.Tensor, scales: torch.Tensor) -> QuantizedExpertWeight:
        """From gpt-oss's tensors: ``NAME_blocks (E, N, C/32, 16)`` and ``NAME_scales (E, N, C/32)`` uint8 (or e8m0)."""
        check_shape("blocks", blocks, (None, None, None, MX_GROUP // 2), "(E, N, C/32, 16)")
        check_tensor("scales", scales)
        if scales.dtype == torch.float8_e8m0fnu:
            scales = scales.view(torch.uint8)
        return cls(blocks.flatten(2).contiguous(), scales.contiguous(), "mxfp4")

    @classmethod
    def from_fp8(cls, weight: torch.Tensor, scale: torch.Tensor) -> QuantizedExpertWeight:
        """From float8_e4m3fn ``weight (E, N, C)`` and its ``weight_scale_inv`` or ``weight_scale``.

        Args:
            weight: the stacked values.
            scale: per block ``(E, ⌈N/128⌉, ⌈C/128⌉)``; per row ``(E, N)`` or ``(E, N, 1)``; per matrix ``(E,)``,
                ``(E, 1)`` or ``(E, 1, 1)``. If two interpretations fit, blocks take precedence over rows.
        """
        check_shape("weight", weight, (None, None, None), "(E, N, C)")
        check_tensor("scale", scale)
        e, n, c = weight.shape
        if scale.dtype == torch.float8_e8m0fnu:
            scale = scale.float()
        if tuple(scale.shape) == (e, _cdiv(n, BLOCK), _cdiv(c, BLOCK)):
            return cls(weight.contiguous(), scale.contiguous(), "fp8_block")
        if tuple(scale.shape) in ((e, n), (e, n, 1), (e,), (e, 1), (e, 1, 1)):
            rows = scale.reshape(e, -1).expand(e, n)
            return cls(weight.contiguous(), rows.contiguous(), "fp8")
        raise ValueError(
            f"scale must have shape (E, ⌈N/128⌉, ⌈C/128⌉) = ({e}, {_cdiv(n, BLOCK)}, {_cdiv(c, BLOCK)}), "
            f"(E, N) = ({e}, {n}), (E, N, 1), (E,), (E, 1) or (E, 1, 1), got {tuple(scale.shape)}"
        )

    @classmethod
    def from_int4(cls, packed: torch.Tensor, scale: torch.Tensor) -> QuantizedExpertWeight:
        """From compressed-tensors' symmetric 4 bits: ``weight_packed (E, N, C/8)`` int32, ``weight_scale (E, N, C/g)``.

        Value ``c`` lies in bits ``4·(c mod 8)`` and following of word ``c // 8``, with 8 added, so that the words'
        bytes are this class's.
        """
        check_shape("packed", packed, (None, None, None), "(E, N, C/8)")
        check_tensor("scale", scale)
        if packed.dtype != torch.int32:
            raise TypeError(f"packed must be torch.int32, got {packed.dtype}")
        return cls(packed.contiguous().view(torch.uint8), scale.contiguous(), "int4")


def concatenate(parts: Sequence[QuantizedExpertWeight]) -> QuantizedExpertWeight:
    """Concatenate stacks of one format along N, such as gate and up.

    Raises:
        ValueError: formats or activations differ, or a part other than the last ends inside a block of ``fp8_block``.
    """
    first = parts[0]
    for name in ("format", "activations"):
        if any(getattr(part, name) != getattr(first, name) for part in parts):
            raise ValueError(f"parts must have the same {name}, got {[getattr(part, name) for part in parts]}")
    if first.format == "fp8_block" and any(part.shape[1] % BLOCK for part in parts[:-1]):
        raise ValueError(
            f"N must be a multiple of {BLOCK} to concatenate fp8_block, got {[part.shape[1] for part in parts]}"
        )
    parts = [part.to_layout(ROWS) for part in parts]
    data = torch.cat([part.data.view(torch.uint8) for part in parts], dim=1).view(first.data.dtype)
    scale = torch.cat([part.scale for part in parts], dim=1)
    return QuantizedExpertWeight(data, scale, first.format, first.activations)


def _divided(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return values / torch.where(scale > 0, scale, torch.ones((), device=scale.device))


def _quantize_fp8(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    largest = torch.finfo(FP8).max
    scale = weight.abs().amax(dim=1) / largest
    return _divided(weight, scale.unsqueeze(1)).clamp(-largest, largest).to(FP8), scale


def _quantize_fp8_block(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    largest, (n, c) = torch.finfo(FP8).max, weight.shape
    padded = torch.nn.functional.pad(weight, (0, -c % BLOCK, 0, -n % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)) / largest
    values = _divided(blocks, scale[:, None, :, None]).clamp(-largest, largest)
    return values.view(padded.shape)[:n, :c].to(FP8), scale


def _quantize_int8(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.abs().amax(dim=1) / 127
    return _divided(weight, scale.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8), scale


def _packed(codes: torch.Tensor) -> torch.Tensor:
    codes = codes.to(torch.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _quantize_int4(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    groups = weight.unflatten(1, (-1, group_size))
    scale = (groups.abs().amax(dim=2) / 7).bfloat16()
    codes = _divided(groups, scale.float().unsqueeze(2)).round().clamp(-INT4_ZERO, INT4_ZERO - 1) + INT4_ZERO
    return _packed(codes.flatten(1)), scale


def _quantize_mxfp4(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    groups = weight.unflatten(1, (-1, group_size))
    largest = groups.abs().amax(dim=2)
    mantissa, exponent = torch.frexp(largest)
    # absmax = 2·mantissa·2^(exponent − 1); 6 is 1.5·2², so a mantissa of up to 0.75 fits the exponent below the next.
    power = (exponent - 3 + (mantissa > 0.75).int()).clamp(-E8M0_BIAS, E8M0_BIAS)
    scaled = torch.ldexp(groups, -power.unsqueeze(2))
    magnitude = scaled.abs()
    code = torch.zeros_like(magnitude, dtype=torch.int32)
    for i in range(7):
        middle = (E2M1[i] + E2M1[i + 1]) / 2
        # Ties go to the code with an even last bit.
        code += ((magnitude > middle) if i % 2 == 0 else (magnitude >= middle)).int()
    code += 8 * torch.signbit(scaled).int()
    scale = torch.where(largest.isfinite(), power + E8M0_BIAS, E8M0_NAN)
    return _packed(code.flatten(1)), scale.to(torch.uint8)


_QUANTIZERS = {
    "fp8": _quantize_fp8,
    "fp8_block": _quantize_fp8_block,
    "int8": _quantize_int8,
    "int4": _quantize_int4,
    "mxfp4": _quantize_mxfp4,
}
