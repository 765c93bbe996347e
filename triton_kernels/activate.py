"""The activation of expert layers on rows, and its gradient.

A program computes BLOCK values: a part of a row, or several rows. Columns are counted in 64 bits, since a single row
may hold all values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.common import activation as activation_of
from gossamer.triton_kernels.common import aot_signature, gate_code, unit_columns, up_factor

if TYPE_CHECKING:
    from gossamer.ops.activate import Activate, ActivateBackward

# Eight values per thread, 16 bytes of a 16-bit type.
BLOCK, WARPS = 1024, 4


@triton.jit
def _place(inner, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's rows, and the first of its columns."""
    across = tl.cdiv(inner, COLUMNS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    return row, (tl.program_id(0) % across).to(tl.int64) * COLUMNS


@triton.jit
def _gate_up(
    preact_ptr,
    row,
    column0,
    num_rows,
    inner,
    stride,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gate and up ``[ROWS, COLUMNS]`` in float32; the gate twice if there is no up."""
    rows = preact_ptr + row.to(tl.int64)[:, None] * stride
    inside = (row < num_rows)[:, None]
    if GATED and INTERLEAVED:
        wide = (2 * column0 + tl.arange(0, 2 * COLUMNS))[None, :]
        pairs = tl.load(rows + wide, inside & (wide - inner < inner), other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(pairs, (ROWS, COLUMNS, 2)))
    else:
        column = (column0 + tl.arange(0, COLUMNS))[None, :]
        inside &= column < inner
        gate = tl.load(rows + column, inside, other=0.0).to(tl.float32)
        up = gate
        if GATED:
            up = tl.load(rows + inner + column, inside, other=0.0).to(tl.float32)
    return gate, up


@triton.jit(do_not_specialize=["num_rows", "alpha", "limit"])
def _activate_kernel(
    preact_ptr,
    out_ptr,
    num_rows,
    inner,
    stride,
    alpha,
    limit,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column0 = _place(inner, ROWS, COLUMNS)
    gate, up = _gate_up(preact_ptr, row, column0, num_rows, inner, stride, GATED, INTERLEAVED, ROWS, COLUMNS)
    out, _ = activation_of(gate, alpha, limit, ACT, FAST)
    if GATED:
        factor, _ = up_factor(up, limit, ACT)
        out *= factor
    column = (column0 + tl.arange(0, COLUMNS))[None, :]
    to = out_ptr + row.to(tl.int64)[:, None] * inner + column
    tl.store(to, out.to(out_ptr.dtype.element_ty), (row < num_rows)[:, None] & (column < inner))


@triton.jit(do_not_specialize=["num_rows", "alpha", "limit"])
def _activate_backward_kernel(
    dact_ptr,
    preact_ptr,
    out_ptr,
    num_rows,
    inner,
    stride,
    stride_dact,
    alpha,
    limit,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column0 = _place(inner, ROWS, COLUMNS)
    column = (column0 + tl.arange(0, COLUMNS))[None, :]
    inside = (row < num_rows)[:, None] & (column < inner)
    gate, up = _gate_up(preact_ptr, row, column0, num_rows, inner, stride, GATED, INTERLEAVED, ROWS, COLUMNS)
    dact = tl.load(dact_ptr + row.to(tl.int64)[:, None] * stride_dact + column, inside, other=0.0).to(tl.float32)
    value, slope = activation_of(gate, alpha, limit, ACT, FAST)
    if GATED:
        factor, live = up_factor(up, limit, ACT)
        dgate = dact * factor * slope
        dup = dact * value * live
        to = out_ptr + row.to(tl.int64)[:, None] * 2 * inner
        if INTERLEAVED:
            wide = (2 * column0 + tl.arange(0, 2 * COLUMNS))[None, :]
            pairs = tl.reshape(tl.join(dgate, dup), (ROWS, 2 * COLUMNS))
            inside = (row < num_rows)[:, None] & (wide - inner < inner)
            tl.store(to + wide, pairs.to(out_ptr.dtype.element_ty), inside)
        else:
            tl.store(to + column, dgate.to(out_ptr.dtype.element_ty), inside)
            tl.store(to + inner + column, dup.to(out_ptr.dtype.element_ty), inside)
    else:
        to = out_ptr + row.to(tl.int64)[:, None] * inner + column
        tl.store(to, (dact * slope).to(out_ptr.dtype.element_ty), inside)


def _tile(inner: int) -> tuple[int, int]:
    """Rows and columns of a program's values."""
    columns = min(BLOCK, triton.next_power_of_2(inner))
    return BLOCK // columns, columns


def _launch(kernel, args: Activate, operands: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
    num_rows, inner = out.shape[0], args.preact.shape[1] // args.activation.halves
    if out.numel() == 0:
        return out
    rows, columns = _tile(inner)
    kernel[(triton.cdiv(num_rows, rows) * triton.cdiv(inner, columns),)](
        *operands,
        out,
        num_rows,
        inner,
        # The pre-activation is the last operand of either kernel, and its stride the first.
        *(operand.stride(0) for operand in reversed(operands)),
        args.activation.alpha,
        args.activation.limit,
        ACT=gate_code(args.activation),
        GATED=args.activation.gated,
        INTERLEAVED=args.interleaved,
        FAST=out.element_size() == 2,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=WARPS,
    )
    return out


def activate(args: Activate) -> torch.Tensor:
    """``act(preact)``, ``(R, I)`` contiguous."""
    preact = unit_columns(args.preact)
    inner = preact.shape[1] // args.activation.halves
    out = torch.empty(preact.shape[0], inner, dtype=preact.dtype, device=preact.device)
    return _launch(_activate_kernel, args, (preact,), out)


def activate_backward(args: ActivateBackward) -> torch.Tensor:
    """The gradient of ``preact``; contiguous."""
    preact, dact = unit_columns(args.forward.preact), unit_columns(args.dact)
    out = torch.empty(preact.shape, dtype=preact.dtype, device=preact.device)
    return _launch(_activate_backward_kernel, args.forward, (dact, preact), out)


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    cases = []
    for code, gated, interleaved in ((0, True, False), (5, True, True), (1, False, False)):
        constexprs = {"ACT": code, "GATED": gated, "INTERLEAVED": interleaved, "FAST": True}
        constexprs |= dict(zip(("ROWS", "COLUMNS"), _tile(768), strict=True))
        sizes = "inner stride"
        signature = aot_signature(torch.bfloat16, "preact_ptr out_ptr", "", sizes, "alpha limit") | {"num_rows": "i32"}
        cases.append((_activate_kernel, signature, constexprs, {"num_warps": WARPS}))
        signature = signature | aot_signature(torch.bfloat16, "dact_ptr", "", "stride_dact")
        cases.append((_activate_backward_kernel, signature, constexprs, {"num_warps": WARPS}))
    return cases
