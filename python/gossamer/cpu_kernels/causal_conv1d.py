"""Launchers of the native causal convolution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import DTYPES, empty_huge, matrix, unit_rows, vector

if TYPE_CHECKING:
    from gossamer.ops.causal_conv1d import CausalConv, CausalConvBackward, CausalConvStep


def _cube(tensor: torch.Tensor | None) -> tuple[int, int, int, int, int]:
    """``(pointer, three strides, dtype code)``; pointer 0 for None."""
    if tensor is None:
        return 0, 0, 0, 0, 0
    # With one channel the stride along channels does not matter.
    strides = (*tensor.stride()[:2], 1 if tensor.shape[2] == 1 else tensor.stride(2))
    return tensor.data_ptr(), *strides, DTYPES[tensor.dtype]


def _arguments(args: CausalConv) -> tuple[tuple, torch.Tensor | None]:
    """The arguments in the form that ``_C`` takes, and the offsets tensor that they point to."""
    offsets = None if args.cu_seqlens is None else args.cu_seqlens.to(torch.int64).contiguous()
    sequences = args.num_sequences, args.x.shape[1], 0 if offsets is None else offsets.data_ptr()
    sizes = args.x.shape[2], args.weight.shape[1], args.state_shape[2]
    operands = _cube(args.x), matrix(args.weight), vector(args.bias), _cube(args.initial_state)
    return (*operands, sequences, *sizes, args.silu), offsets


def _empty(x: torch.Tensor, along_channels: bool) -> torch.Tensor:
    b, t, c = x.shape
    if along_channels:
        return empty_huge((b, t, c), x.dtype)
    return empty_huge((b, c, t), x.dtype).transpose(1, 2)


def causal_conv1d(args: CausalConv) -> tuple[torch.Tensor, torch.Tensor]:
    """``y (B, T, C)``, laid out like ``x``, and the final state, which is empty unless requested."""
    y = _empty(args.x, args.along_channels)
    state = torch.empty(args.state_shape if args.output_final_state else (0,), dtype=args.x.dtype)
    conv, _offsets = _arguments(args)
    _C.causal_conv1d(conv, _cube(y), _cube(state if args.output_final_state else None), torch.get_num_threads())
    return y, state


def causal_conv1d_backward(args: CausalConvBackward, found: dict[str, torch.Tensor]) -> None:
    """Write the gradients into the tensors in ``found``; ``dy`` is laid out like ``x``."""
    conv, _offsets = _arguments(args.forward)
    _C.causal_conv1d_backward(
        conv,
        _cube(args.dy),
        _cube(args.dfinal_state),
        _cube(found.get("x")),
        matrix(found.get("weight")),
        vector(found.get("bias")),
        _cube(found.get("initial_state")),
        torch.get_num_threads(),
    )


def causal_conv1d_step(args: CausalConvStep) -> torch.Tensor:
    """``y (B, C)`` for the newest inputs; the state is shifted in place."""
    x = unit_rows(args.x)
    y = torch.empty(x.shape, dtype=x.dtype)
    sizes = *x.shape, args.weight.shape[1], args.state.shape[2]
    operands = matrix(x), matrix(args.weight), vector(args.bias), _cube(args.state)
    _C.causal_conv1d_step(*operands, *sizes, args.silu, matrix(y), torch.get_num_threads())
    return y
