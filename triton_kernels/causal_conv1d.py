"""Depthwise causal convolution along sequences, its gradients, and its update by one position.

A program computes a tile of positions and channels. If sequences are packed, it finds each position's sequence by a
binary search of the offsets, which stays within the array of offsets whatever they hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.common import aot_signature, clamped, sigmoid

if TYPE_CHECKING:
    from gossamer.ops.causal_conv1d import CausalConv, CausalConvBackward, CausalConvStep

WARPS = 4
# Values per tile, and the size of its contiguous side: channels if channels are adjacent in memory, positions if
# positions are. The backward pass holds the inputs of several forward steps.
FORWARD, BACKWARD = (2048, 128), (512, 32)


class Operands(NamedTuple):
    """The arguments of every kernel of a call: pointers, then sizes and the strides of ``x (B, T, C)``."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    initial: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    positions: int
    channels: int
    sequences: int
    state_size: int
    stride_b: int
    stride_t: int
    stride_c: int


@triton.jit
def sequence_bounds(cu_seqlens, t, batch, positions, sequences, STEPS: tl.constexpr):
    """The sequence of each position, its first position and its end; STEPS 0 without ``cu_seqlens``."""
    low = tl.zeros_like(t)
    if STEPS == 0:
        return low + batch, low, low + positions
    else:
        high = low + sequences
        for _ in tl.static_range(STEPS):
            middle = (low + high) // 2
            before = tl.load(cu_seqlens + middle, middle < sequences, other=0) <= t
            low = tl.where(before & (middle < sequences), middle, low)
            high = tl.where(before, high, middle)
        start, end = tl.load(cu_seqlens + low), tl.load(cu_seqlens + low + 1)
        return low, clamped(start, positions).to(tl.int32), clamped(end, positions).to(tl.int32)


@triton.jit
def _whole_sequence(of, n, PACKED: tl.constexpr):
    """First position, end and batch of sequence ``n``."""
    if PACKED:
        start, end = tl.load(of.cu_seqlens + n), tl.load(of.cu_seqlens + n + 1)
        return clamped(start, of.positions).to(tl.int32), clamped(end, of.positions).to(tl.int32), 0
    else:
        return n * 0, n * 0 + of.positions, n


@triton.jit
def _input(of, batch, p, n, start, c, inside):
    """``x`` at positions ``p``, before a sequence's start from its initial state; zero where not ``inside``."""
    at = of.x + batch.to(tl.int64) * of.stride_b + p.to(tl.int64)[:, None] * of.stride_t + c[None, :] * of.stride_c
    x = tl.load(at, inside & (p >= start)[:, None], other=0.0).to(tl.float32)
    if of.initial is not None:
        rows = of.initial + ((n.to(tl.int64) * of.channels)[:, None] + c[None, :]) * of.state_size
        early = inside & ((p < start) & (p >= start - of.state_size))[:, None]
        x += tl.load(rows + (of.state_size + p - start)[:, None], early, other=0.0).to(tl.float32)
    return x


@triton.jit
def _tap(of, c, i, W: tl.constexpr):
    return tl.load(of.weight + c * W + i, c < of.channels, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _preactivation(of, batch, p, n, start, c, inside, W: tl.constexpr):
    """Sums before the activation at positions ``p``, where they are ``inside``."""
    total = tl.zeros(inside.shape, tl.float32)
    if of.bias is not None:
        total += tl.load(of.bias + c, c < of.channels, other=0.0).to(tl.float32)[None, :]
    for i in tl.static_range(W):
        total += _tap(of, c, i, W) * _input(of, batch, p + (i - (W - 1)), n, start, c, inside)
    return total


@triton.jit
def _offsets(of, batch, p, c, ALONG_CHANNELS: tl.constexpr):
    """Offsets of values at positions and channels, in batches that are contiguous along either."""
    first = batch.to(tl.int64) * of.positions * of.channels
    if ALONG_CHANNELS:
        return first + p.to(tl.int64)[:, None] * of.channels + c[None, :]
    else:
        return first + p[:, None] + c.to(tl.int64)[None, :] * of.positions


@triton.jit
def _causal_conv1d_kernel(
    of,
    y_ptr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    FAST: tl.constexpr,
    ALONG_CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch = tl.program_id(2)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (t < of.positions)[:, None] & (c < of.channels)[None, :]
    n, start, _ = sequence_bounds(of.cu_seqlens, t, batch, of.positions, of.sequences, STEPS)
    y = _preactivation(of, batch, t, n, start, c, inside, W)
    if SILU:
        y *= sigmoid(y, FAST)
    tl.store(y_ptr + _offsets(of, batch, t, c, ALONG_CHANNELS), y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _final_state_kernel(of, final_ptr, PACKED: tl.constexpr, BLOCK_C: tl.constexpr):
    n = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start, end, batch = _whole_sequence(of, n, PACKED)
    row = (n.to(tl.int64) * of.channels + c) * of.state_size
    live = c < of.channels
    for j in range(0, of.state_size):
        # A vector, since the interpreter only takes vectors as masks.
        p = tl.zeros_like(c) + (end - of.state_size + j)
        at = of.x + batch * of.stride_b.to(tl.int64) + p.to(tl.int64) * of.stride_t + c * of.stride_c
        value = tl.load(at, live & (p >= start), other=0.0)
        if of.initial is not None:
            early = live & (p < start) & (p >= start - of.state_size)
            value += tl.load(of.initial + row + of.state_size + p - start, early, other=0.0)
        tl.store(final_ptr + row + j, value, live)


@triton.jit
def _sum_gradient(
    of, dy_ptr, batch, p, n, start, c, inside, W: tl.constexpr, SILU: tl.constexpr, ALONG_CHANNELS: tl.constexpr
):
    """The gradient of the sums before the activation at positions ``p``, zero where not ``inside``."""
    d = tl.load(dy_ptr + _offsets(of, batch, p, c, ALONG_CHANNELS), inside, other=0.0).to(tl.float32)
    if SILU:
        z = _preactivation(of, batch, p, n, start, c, inside, W)
        d *= tl.sigmoid(z) * (1.0 + z * tl.sigmoid(-z))
    return d


@triton.jit
def _sum_positions(x, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum over the positions of a tile, in fours first: one long chain of additions would round more than torch."""
    if BLOCK_T > 4:
        return tl.sum(tl.sum(tl.reshape(x, (BLOCK_T // 4, 4, BLOCK_C)), 1), 0)
    else:
        return tl.sum(x, 0)


@triton.jit
def _causal_conv1d_backward_kernel(
    of,
    dy_ptr,
    dfinal_ptr,
    dx_ptr,
    partial_ptr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    ALONG_CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch = tl.program_id(2)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (t < of.positions)[:, None] & (c < of.channels)[None, :]
    n, start, end = sequence_bounds(of.cu_seqlens, t, batch, of.positions, of.sequences, STEPS)
    dx = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    # Each input flows into the sums of its position and the W - 1 after it.
    for j in tl.static_range(W):
        live = inside & (t + j < end)[:, None]
        d = _sum_gradient(of, dy_ptr, batch, t + j, n, start, c, live, W, SILU, ALONG_CHANNELS)
        dx += _tap(of, c, W - 1 - j, W) * d
        if j == 0 and partial_ptr is not None:
            tile = batch * tl.num_programs(0) + tl.program_id(0)
            sums = partial_ptr + tile.to(tl.int64) * (W + 1) * of.channels + c
            for i in tl.static_range(W):
                x = _input(of, batch, t + (i - (W - 1)), n, start, c, inside)
                tl.store(sums + i * of.channels, _sum_positions(d * x, BLOCK_T, BLOCK_C), c < of.channels)
            tl.store(sums + W * of.channels, _sum_positions(d, BLOCK_T, BLOCK_C), c < of.channels)
    if dx_ptr is not None:
        if dfinal_ptr is not None:
            at = (t - (end - of.state_size))[:, None]
            rows = dfinal_ptr + ((n.to(tl.int64) * of.channels)[:, None] + c[None, :]) * of.state_size
            dx += tl.load(rows + at, inside & (at >= 0) & (at < of.state_size), other=0.0).to(tl.float32)
        tl.store(dx_ptr + _offsets(of, batch, t, c, ALONG_CHANNELS), dx.to(dx_ptr.dtype.element_ty), inside)


@triton.jit
def _initial_state_gradient_kernel(
    of,
    dy_ptr,
    dfinal_ptr,
    dinitial_ptr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    ALONG_CHANNELS: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, last, batch = _whole_sequence(of, n, PACKED)
    k = tl.program_id(2) * BLOCK_S + tl.arange(0, BLOCK_S)
    p = first - of.state_size + k
    start, sequence = tl.zeros((BLOCK_S,), tl.int32) + first, tl.zeros((BLOCK_S,), tl.int32) + n
    live = (k < of.state_size)[:, None] & (c < of.channels)[None, :]
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for j in tl.static_range(1, W):
        here = live & ((p + j >= first) & (p + j < last))[:, None]
        d = _sum_gradient(of, dy_ptr, n * 0 + batch, p + j, sequence, start, c, here, W, SILU, ALONG_CHANNELS)
        total += _tap(of, c, W - 1 - j, W) * d
    row = (n.to(tl.int64) * of.channels + c)[None, :] * of.state_size
    if dfinal_ptr is not None:
        at = (k - (last - first))[:, None]
        kept = live & (at >= 0) & (at < of.state_size)
        total += tl.load(dfinal_ptr + row + at, kept, other=0.0).to(tl.float32)
    tl.store(dinitial_ptr + row + k[:, None], total.to(dinitial_ptr.dtype.element_ty), live)


@triton.jit
def _causal_conv1d_step_kernel(
    x_ptr,
    state_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    channels,
    stride_x,
    stride_b,
    stride_c,
    stride_s,
    S: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = c < channels
    newest = tl.load(x_ptr + batch * stride_x + c, live, other=0.0)
    row = state_ptr + batch * stride_b + c.to(tl.int64) * stride_c
    total = tl.load(weight_ptr + c * W + (W - 1), live, other=0.0).to(tl.float32) * newest.to(tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + c, live, other=0.0).to(tl.float32)
    for s in tl.static_range(S):
        value = tl.load(row + s * stride_s, live, other=0.0)
        if s >= S - (W - 1):
            tap = tl.load(weight_ptr + c * W + (s - (S - (W - 1))), live, other=0.0).to(tl.float32)
            total += tap * value.to(tl.float32)
        if s > 0:
            tl.store(row + (s - 1) * stride_s, value, live)
    tl.store(row + (S - 1) * stride_s, newest, live)
    if SILU:
        total *= sigmoid(total, FAST)
    tl.store(y_ptr + batch * channels + c, total.to(y_ptr.dtype.element_ty), live)


def search_steps(cu_seqlens: torch.Tensor | None) -> int:
    """Steps of the binary search among packed sequences; 0 if sequences are not packed."""
    return 0 if cu_seqlens is None else max(1, (cu_seqlens.shape[0] - 1).bit_length())


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor if tensor is None else tensor.contiguous()


def _operands(args: CausalConv) -> Operands:
    _, length, channels = args.x.shape
    pointers = args.x, args.weight.contiguous(), _contiguous(args.bias), _contiguous(args.initial_state)
    sizes = length, channels, args.num_sequences, args.state_shape[2]
    return Operands(*pointers, _contiguous(args.cu_seqlens), *sizes, *args.x.stride())


def _tile(args: CausalConv, most: tuple[int, int]) -> dict[str, int | bool]:
    """The tile's sizes and the other constants that kernels are compiled for."""
    _, length, channels = args.x.shape
    values, along = most
    # A pass over nothing needs a tile too, to compute its empty grid.
    inner = min(along, triton.next_power_of_2(max(1, channels if args.along_channels else length)))
    outer = min(values // inner, triton.next_power_of_2(max(1, length if args.along_channels else channels)))
    block_t, block_c = (outer, inner) if args.along_channels else (inner, outer)
    sizes = {"W": args.weight.shape[1], "SILU": args.silu, "ALONG_CHANNELS": args.along_channels}
    return sizes | {"STEPS": search_steps(args.cu_seqlens), "BLOCK_T": block_t, "BLOCK_C": block_c}


def _dense(x: torch.Tensor, along_channels: bool) -> torch.Tensor:
    """``x (B, T, C)`` without gaps, contiguous along channels or along positions."""
    return x.contiguous() if along_channels else x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_like(x: torch.Tensor, along_channels: bool) -> torch.Tensor:
    b, t, c = x.shape
    shape = (b, t, c) if along_channels else (b, c, t)
    empty = torch.empty(shape, dtype=x.dtype, device=x.device)
    return empty if along_channels else empty.transpose(1, 2)


def causal_conv1d(args: CausalConv) -> tuple[torch.Tensor, torch.Tensor]:
    """``y (B, T, C)``, laid out like ``x``, and the final state, which is empty unless requested."""
    x, operands = args.x, _operands(args)
    batch, length, channels = x.shape
    y = _empty_like(x, args.along_channels)
    state = x.new_empty(args.state_shape if args.output_final_state else (0,))
    if y.numel():
        tile = _tile(args, FORWARD)
        grid = triton.cdiv(length, tile["BLOCK_T"]), triton.cdiv(channels, tile["BLOCK_C"]), batch
        _causal_conv1d_kernel[grid](operands, y, FAST=x.element_size() == 2, num_warps=WARPS, **tile)
    if state.numel():
        block = min(256, triton.next_power_of_2(channels))
        _final_state_kernel[(args.num_sequences, triton.cdiv(channels, block))](
            operands, state, PACKED=args.cu_seqlens is not None, BLOCK_C=block, num_warps=WARPS
        )
    return y, state


def causal_conv1d_backward(backward: CausalConvBackward, found: dict[str, torch.Tensor]) -> None:
    """Write the gradients into the tensors in ``found``; ``dy`` is laid out like ``x``."""
    args, dfinal = backward.forward, _contiguous(backward.dfinal_state)
    x, operands, tile = args.x, _operands(args), _tile(args, BACKWARD)
    batch, length, channels = x.shape
    dy, taps = _dense(backward.dy, args.along_channels), tile["W"]
    tiles = triton.cdiv(length, tile["BLOCK_T"])
    wanted = "weight" in found or "bias" in found
    partial = torch.empty(batch * tiles, taps + 1, channels, dtype=torch.float32, device=x.device) if wanted else None
    if x.numel() and (wanted or "x" in found):
        grid = tiles, triton.cdiv(channels, tile["BLOCK_C"]), batch
        _causal_conv1d_backward_kernel[grid](operands, dy, dfinal, found.get("x"), partial, num_warps=WARPS, **tile)
    if wanted:
        sums = partial.sum(0)
        if "weight" in found:
            found["weight"].copy_(sums[:taps].T)
        if "bias" in found:
            found["bias"].copy_(sums[taps])
    if "initial_state" in found and found["initial_state"].numel():
        block, block_s = (
            min(128, triton.next_power_of_2(channels)),
            min(16, triton.next_power_of_2(operands.state_size)),
        )
        grid = args.num_sequences, triton.cdiv(channels, block), triton.cdiv(operands.state_size, block_s)
        form = {name: tile[name] for name in ("W", "SILU", "ALONG_CHANNELS")}
        form |= {"PACKED": args.cu_seqlens is not None, "BLOCK_S": block_s, "BLOCK_C": block}
        _initial_state_gradient_kernel[grid](operands, dy, dfinal, found["initial_state"], num_warps=WARPS, **form)


def causal_conv1d_step(args: CausalConvStep) -> torch.Tensor:
    """``y (B, C)`` for the newest inputs; the state is shifted in place."""
    x, state = args.x, args.state
    x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    batch, channels = x.shape
    block = min(256, triton.next_power_of_2(channels))
    _causal_conv1d_step_kernel[(batch, triton.cdiv(channels, block))](
        x,
        state,
        args.weight.contiguous(),
        _contiguous(args.bias),
        y,
        channels,
        x.stride(0),
        *state.stride(),
        S=state.shape[2],
        W=args.weight.shape[1],
        SILU=args.silu,
        FAST=x.element_size() == 2,
        BLOCK_C=block,
        num_warps=WARPS,
    )
    return y


def _aot_form(along: bool, packed: bool, dtype: torch.dtype) -> list[tuple]:
    """The cases of one layout."""
    value = aot_signature(dtype, "pointer", "", "")["pointer"]
    strides = ("i32:16", "i32:16", 1) if along else ("i32:16", 1, "i32:16")
    pointers = (value, value, value, value if packed else None, "*i64:16" if packed else None)
    operands = Operands(*pointers, "i32:16", "i32:16", "i32", "i32", *strides)
    form = {"W": 4, "SILU": True, "ALONG_CHANNELS": along}
    inner, outer = ("BLOCK_C", "BLOCK_T") if along else ("BLOCK_T", "BLOCK_C")
    form |= {"STEPS": 6 if packed else 0}
    forward, backward = ({inner: size, outer: values // size} for values, size in (FORWARD, BACKWARD))
    states, options = {"PACKED": packed, "BLOCK_C": 128}, {"num_warps": WARPS}
    dfinal = ({"dfinal_ptr": value}, {}) if packed else ({}, {"dfinal_ptr": None})
    back = {"of": operands, "dy_ptr": value} | dfinal[0]
    fast = {"FAST": dtype != torch.float32}
    return [
        (_causal_conv1d_kernel, {"of": operands, "y_ptr": value}, form | forward | fast, options),
        (_final_state_kernel, {"of": operands, "final_ptr": value}, states, options),
        (
            _causal_conv1d_backward_kernel,
            back | {"dx_ptr": value, "partial_ptr": "*fp32:16"},
            form | backward | dfinal[1],
            options,
        ),
        (
            _initial_state_gradient_kernel,
            back | {"dinitial_ptr": value},
            {k: v for k, v in form.items() if k != "STEPS"} | states | {"BLOCK_S": 4} | dfinal[1],
            options,
        ),
    ]


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    cases = _aot_form(True, False, torch.bfloat16) + _aot_form(True, True, torch.bfloat16)
    cases += _aot_form(False, True, torch.float32)
    step = aot_signature(torch.bfloat16, "x_ptr state_ptr weight_ptr y_ptr", "", "channels stride_x stride_b")
    step |= {"stride_c": "i32"}
    constexprs = {"bias_ptr": None, "stride_s": 1, "S": 4, "W": 4, "SILU": True, "FAST": True, "BLOCK_C": 256}
    return [*cases, (_causal_conv1d_step_kernel, step, constexprs, {"num_warps": WARPS})]
