"""Depthwise causal convolution along sequences, as used by linear-attention models, and its one-token update."""

from __future__ import annotations

import functools
import itertools
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F

from gossamer import _backend
from gossamer._autocast import autocast
from gossamer._checks import (
    check_flags,
    check_float,
    check_no_gradient,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    check_written,
)
from gossamer.ops._records import define, define_gradients
from gossamer.ops._sequences import check_bounds, check_cu_seqlens, num_sequences

LEAST_TAPS, MOST_TAPS = 2, 8
ACTIVATIONS = (None, "silu", "swish")


class CausalConv(NamedTuple):
    """Arguments of the convolution.

    Attributes:
        x: ``(B, T, C)``.
        weight: ``(C, W)``.
        bias: ``(C,)`` in the dtype of ``weight``, or None.
        initial_state: ``(N, C, S)`` in the dtype of ``x``, S ≥ W − 1, or None.
        cu_seqlens: ``(N + 1,)``, B = 1 then; or None.
        silu: whether SiLU follows.
        output_final_state: whether the final state is wanted.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    initial_state: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    silu: bool
    output_final_state: bool

    @property
    def num_sequences(self) -> int:
        """N with ``cu_seqlens``, otherwise B."""
        return num_sequences(self.x.shape[0], self.cu_seqlens)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """The shape of the initial and the final state."""
        size = self.weight.shape[1] - 1 if self.initial_state is None else self.initial_state.shape[2]
        return self.num_sequences, self.x.shape[2], size

    @property
    def along_channels(self) -> bool:
        """Whether channels are contiguous; otherwise positions are."""
        return lies_along_channels(self.x)


# The fields of CausalConv that have gradients.
DIFFERENTIABLE = ("x", "weight", "bias", "initial_state")


class CausalConvBackward(NamedTuple):
    """Arguments of the backward pass: the gradients of the results, and the names of the fields that need one."""

    dy: torch.Tensor
    dfinal_state: torch.Tensor | None
    needs: list[str]
    forward: CausalConv


class CausalConvStep(NamedTuple):
    """Arguments of one position: ``x (B, C)``, ``state (B, C, S)``, which is updated, and the filter."""

    x: torch.Tensor
    state: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    silu: bool


def lies_along_channels(x: torch.Tensor) -> bool:
    """Whether the kernels read ``x (B, T, C)`` as rows of channels: unless only its positions are contiguous."""
    return x.stride(2) == 1 or x.shape[2] == 1 or x.stride(1) != 1


def empty_laid_out(x: torch.Tensor, along_channels: bool) -> torch.Tensor:
    """An uninitialised tensor like ``x (B, T, C)``, contiguous along channels or along positions."""
    b, t, c = x.shape
    return x.new_empty(b, t, c) if along_channels else x.new_empty(b, c, t).transpose(1, 2)


def laid_out(x: torch.Tensor, along_channels: bool) -> torch.Tensor:
    """``x (B, T, C)`` itself where its channels, or positions, have stride 1; else a copy."""
    if along_channels:
        return x if x.stride(2) == 1 else x.contiguous()
    return x if x.stride(1) == 1 else x.transpose(1, 2).contiguous().transpose(1, 2)


def _one_sequence(x, weight, bias, state, silu):
    """``(B, T, C)`` outputs of inputs after the states ``(B, C, S)``, and all inputs ``(B, S + T, C)``."""
    taps, length = weight.shape[1], x.shape[1]
    inputs = torch.cat([state.transpose(1, 2), x], 1)
    used = inputs[:, inputs.shape[1] - length - taps + 1 :]
    y = sum(weight[:, i] * used[:, i : i + length] for i in range(taps))
    if bias is not None:
        y = y + bias
    return F.silu(y) if silu else y, inputs


def causal_conv1d_reference(args: CausalConv) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`causal_conv1d` in plain torch, differentiable; an empty tensor for a final state that is not wanted."""
    wide = torch.promote_types(args.x.dtype, torch.float32)
    size = args.state_shape[2]
    state = args.initial_state
    if state is None:
        state = args.x.new_zeros(args.state_shape)
    x, weight, bias, start = (t if t is None else t.to(wide) for t in (args.x, args.weight, args.bias, state))
    if args.cu_seqlens is None:
        y, inputs = _one_sequence(x, weight, bias, start, args.silu)
        states = inputs[:, inputs.shape[1] - size :].transpose(1, 2)
    else:
        parts, ends = [x[:, :0]], [start[:0]]
        for n, (begin, end) in enumerate(itertools.pairwise(args.cu_seqlens.tolist())):
            part, inputs = _one_sequence(x[:, begin:end], weight, bias, start[n : n + 1], args.silu)
            parts.append(part)
            ends.append(inputs[:, inputs.shape[1] - size :].transpose(1, 2))
        y, states = torch.cat(parts, 1), torch.cat(ends)
    y = y.to(args.x.dtype)
    return y, states.to(args.x.dtype) if args.output_final_state else y.new_empty(0)


@functools.cache
def _kernels(backend: str) -> ModuleType:
    if backend == "native":
        from gossamer.cpu_kernels import causal_conv1d
    else:
        from gossamer.triton_kernels import causal_conv1d
    return causal_conv1d


def _forward(args: CausalConv, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    check_bounds(args.cu_seqlens, args.x.shape[1])
    args = args._replace(x=laid_out(args.x, args.along_channels))
    return _kernels(backend).causal_conv1d(args)


def _forward_fake(args: CausalConv) -> tuple[torch.Tensor, torch.Tensor]:
    state = args.x.new_empty(args.state_shape if args.output_final_state else (0,))
    return empty_laid_out(args.x, args.along_channels), state


_causal_conv1d = define(
    "causal_conv1d", CausalConv, kernel=_forward, fake=_forward_fake, returns="(Tensor y, Tensor final_state)"
)


def _empty_gradients(args: CausalConvBackward) -> dict[str, torch.Tensor]:
    tensors = {name: getattr(args.forward, name) for name in args.needs}
    found = {name: tensor.new_empty(tensor.shape) for name, tensor in tensors.items() if name != "x"}
    return found | ({"x": empty_laid_out(tensors["x"], args.forward.along_channels)} if "x" in tensors else {})


def _backward(args: CausalConvBackward, backend: str) -> dict[str, torch.Tensor]:
    found, along = _empty_gradients(args), args.forward.along_channels
    forward = args.forward._replace(x=laid_out(args.forward.x, along))
    _kernels(backend).causal_conv1d_backward(args._replace(dy=laid_out(args.dy, along), forward=forward), found)
    return found


_causal_conv1d_backward = define_gradients(
    "causal_conv1d_backward", CausalConvBackward, DIFFERENTIABLE, kernel=_backward, fake=_empty_gradients
)


def _save(ctx, args: CausalConv, output):
    ctx.set_materialize_grads(False)
    if not args.output_final_state:
        ctx.mark_non_differentiable(output[1])
    return (args,)


def _differentiate(ctx, args: CausalConv, tensors, dy, dfinal_state):
    needs = [name for name in DIFFERENTIABLE if name in ctx.needs]
    if not needs or (dy is None and dfinal_state is None):
        return {}
    if dy is None:
        dy = torch.zeros_like(args.x)
    if not args.output_final_state:
        dfinal_state = None
    if torch.is_grad_enabled():
        # Plain torch serves second derivatives.
        y, state = causal_conv1d_reference(args)
        outputs, above = ((y,), (dy,)) if dfinal_state is None else ((y, state), (dy, dfinal_state))
        leaves = [getattr(args, name) for name in needs]
        found = torch.autograd.grad(outputs, leaves, above, create_graph=True, materialize_grads=True)
        return dict(zip(needs, found, strict=True))
    return _causal_conv1d_backward(CausalConvBackward(dy, dfinal_state, needs, args), ctx.backend)


_causal_conv1d.differentiate(_save, _differentiate)


def _step(args: CausalConvStep, backend: str) -> torch.Tensor:
    return _kernels(backend).causal_conv1d_step(args)


def _step_fake(args: CausalConvStep) -> torch.Tensor:
    return args.x.new_empty(args.x.shape)


_causal_conv1d_step = define(
    "causal_conv1d_step", CausalConvStep, kernel=_step, fake=_step_fake, returns="Tensor", mutates=("state",)
)


def _check_filter(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> bool:
    """Check taps, bias and activation for ``x (..., C)``; returns whether SiLU follows."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    channels = x.shape[-1]
    check_shape("weight", weight, (channels, None), "(C, W)")
    if not LEAST_TAPS <= weight.shape[1] <= MOST_TAPS:
        raise ValueError(f"weight must have W from {LEAST_TAPS} to {MOST_TAPS} taps, got W={weight.shape[1]}")
    wide = torch.promote_types(x.dtype, torch.float32)
    if weight.dtype not in (x.dtype, wide):
        raise TypeError(f"weight must have the dtype of x, {x.dtype}, or {wide}, got {weight.dtype}")
    if bias is not None:
        check_shape("bias", bias, (channels,), "(C,)")
        check_same_dtype(weight=weight, bias=bias)
    return activation is not None


def _check_state(name: str, state: torch.Tensor, x: torch.Tensor, sequences: int, taps: int, symbols: str) -> None:
    check_shape(name, state, (sequences, x.shape[-1], None), symbols)
    if state.shape[2] < taps - 1:
        raise ValueError(f"{name} must hold S of at least W - 1 = {taps - 1} inputs, got S={state.shape[2]}")
    check_same_dtype(**{"x": x, name: state})


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""Convolve each channel with its own filter of a few taps, over the current and earlier positions.

    ``y[t, c] = act(bias[c] + Σ_i weight[c, i] · x[t − (W − 1) + i, c])``, where inputs before the first are those of
    ``initial_state``, or zeros. It takes one pass over ``x``, with sums in float32 (float64 for float64) and one
    rounding; only the arguments are saved for the backward pass.

    The kernels read ``x`` along channels or along positions, whichever has stride 1, and write ``y`` in the same
    layout: an input ``(B, C, T)``, as ``torch.nn.functional.conv1d`` takes it, is given as ``x.transpose(1, 2)``
    without a copy, and the result's ``transpose(1, 2)`` is contiguous. Other strides are copied.

    Args:
        x: ``(B, T, C)`` float.
        weight: ``(C, W)`` with W from 2 to 8, the dtype of ``x`` or float32; the last tap multiplies the newest input.
            For a depthwise ``torch.nn.Conv1d`` it is ``conv.weight.squeeze(1)``.
        bias: ``(C,)``, the dtype of ``weight``; or None.
        activation: ``"silu"`` (or ``"swish"``, its other name), or None.
        initial_state: ``(B, C, S)`` in the dtype of ``x``, the S ≥ W − 1 inputs before the first, oldest first;
            ``(N, C, S)`` with ``cu_seqlens``; None for zeros.
        output_final_state: whether the last S inputs of each sequence are returned.
        cu_seqlens: ``(N + 1,)`` int32 or int64 for a pack of N sequences, which start at ``cu_seqlens[n]`` of the T
            positions of a batch of one; ascending from 0 to T. Sequences may be empty.

    Returns:
        ``y (B, T, C)`` in the dtype of ``x``, and the final state in the shape of ``initial_state`` (S = W − 1 without
        one) or None. Differentiable in all float tensors, also twice. Under ``torch.autocast`` ``x`` and
        ``initial_state`` are cast to its dtype.

    Raises:
        TypeError: an argument is not a tensor, a dtype is not supported, or dtypes do not fit.
        ValueError: shapes or devices do not fit, W is outside 2 to 8, S is less than W − 1, or the activation is
            unknown; on the CPU also for ``cu_seqlens`` that does not ascend from 0 to T.
    """
    check_tensor("x", x)
    if x.dim() != 3:
        raise ValueError(f"x must have shape (B, T, C), got {tuple(x.shape)}")
    check_flags(output_final_state=output_final_state)
    x, initial_state = autocast(x, initial_state)
    backend = _backend.resolve("causal_conv1d", x)
    check_float("x", x, backend)
    silu = _check_filter(x, weight, bias, activation)
    check_cu_seqlens(cu_seqlens, x.shape[0])
    if initial_state is not None:
        symbols = "(B, C, S)" if cu_seqlens is None else "(N, C, S)"
        count = num_sequences(x.shape[0], cu_seqlens)
        _check_state("initial_state", initial_state, x, count, weight.shape[1], symbols)
    check_same_device(x=x, weight=weight, bias=bias, initial_state=initial_state, cu_seqlens=cu_seqlens)
    args = CausalConv(x, weight, bias, initial_state, cu_seqlens, silu, output_final_state)
    if backend == "reference":
        check_bounds(cu_seqlens, x.shape[1])
        y, state = causal_conv1d_reference(args)
    else:
        y, state = _causal_conv1d(args, backend)
    return y, state if output_final_state else None


def causal_conv1d_step(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
) -> torch.Tensor:
    """One position of :func:`causal_conv1d`, for decoding; the state is updated in place.

    Args:
        x: ``(B, C)`` float, the newest input of each sequence.
        state: ``(B, C, S)`` in the dtype of ``x``, the S ≥ W − 1 inputs before it, oldest first. The oldest input is
            dropped, and ``x`` becomes the newest.
        weight: ``(C, W)`` with W from 2 to 8, the dtype of ``x`` or float32.
        bias: ``(C,)``, the dtype of ``weight``; or None.
        activation: ``"silu"`` or ``"swish"``, or None.

    Returns:
        ``y (B, C)`` in the dtype of ``x``. Not differentiable.

    Raises:
        TypeError: an argument is not a tensor, a dtype is not supported, or dtypes do not fit.
        ValueError: shapes or devices do not fit, W is outside 2 to 8, S is less than W − 1, the activation is unknown,
            or gradients are enabled and an argument requires one.
    """
    check_tensor("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must have shape (B, C), got {tuple(x.shape)}")
    backend = _backend.resolve("causal_conv1d", x)
    check_float("x", x, backend)
    silu = _check_filter(x, weight, bias, activation)
    _check_state("state", state, x, x.shape[0], weight.shape[1], "(B, C, S)")
    check_written("state", state)
    check_same_device(x=x, state=state, weight=weight, bias=bias)
    check_no_gradient("causal_conv1d_step", "causal_conv1d", x=x, state=state, weight=weight, bias=bias)
    if backend != "reference":
        return _causal_conv1d_step(CausalConvStep(x, state, weight, bias, silu), backend)
    args = CausalConv(x.unsqueeze(1), weight, bias, state, None, silu, True)
    y, last = causal_conv1d_reference(args)
    state.copy_(last)
    return y.squeeze(1)
