"""Launchers of the native recurrence of self-referential weight matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import DTYPES

if TYPE_CHECKING:
    from gossamer.ops.self_referential import SelfReferential, SelfReferentialBackward


def _wide(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype).contiguous()


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _sizes(args: SelfReferential, dtype: torch.dtype) -> dict[str, int]:
    batch, tokens, heads, size = args.x.shape
    return {
        "dtype": DTYPES[dtype],
        "batch": batch,
        "tokens": tokens,
        "heads": heads,
        "size": size,
        "segment": args.segment,
    }


def self_referential(args: SelfReferential) -> tuple[torch.Tensor, ...]:
    """``y``, the final shift, and for the backward pass each token's step and, every few hundred tokens, a matrix."""
    dtype = torch.promote_types(args.x.dtype, torch.float32)
    x, weight = _wide(args.x, dtype), _wide(args.weight, dtype)
    shift = None if args.shift is None else _wide(args.shift, dtype)
    batch, tokens, heads, size = x.shape
    matrices = (size, 3 * size + 4)
    y = torch.empty(x.shape, dtype=dtype)
    final = torch.empty((batch, heads, *matrices) if args.output_final_shift else (0,), dtype=dtype)
    segments = -(-tokens // args.segment)
    steps = torch.empty((batch, heads, tokens, 5 * size + 8) if args.save else (0,), dtype=dtype)
    kept = torch.empty((batch, heads, segments, *matrices) if args.save else (0,), dtype=dtype)
    _C.self_referential(
        _C.SelfReferential(
            **_sizes(args, dtype),
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            shift=_address(shift),
            y=y.data_ptr(),
            final_shift=final.data_ptr() if args.output_final_shift else 0,
            steps=steps.data_ptr() if args.save else 0,
            kept=kept.data_ptr() if args.save else 0,
        ),
        torch.get_num_threads(),
    )
    return y.to(args.x.dtype), final, steps, kept


def self_referential_backward(args: SelfReferentialBackward) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of ``x`` and of each sequence's first matrix ``(B, H, d, 3d + 4)``."""
    forward = args.forward
    dtype = torch.promote_types(forward.x.dtype, torch.float32)
    x, dy, steps, kept = _wide(forward.x, dtype), _wide(args.dy, dtype), args.steps.contiguous(), args.kept.contiguous()
    dfinal = None if args.dfinal is None else _wide(args.dfinal, dtype)
    batch, _, heads, size = x.shape
    dx = torch.empty(x.shape, dtype=dtype)
    dstart = torch.empty((batch, heads, size, 3 * size + 4), dtype=dtype)
    _C.self_referential_backward(
        # The weight and the shift are in the kept matrices.
        _C.SelfReferential(
            **_sizes(forward, dtype), x=x.data_ptr(), weight=0, steps=steps.data_ptr(), kept=kept.data_ptr()
        ),
        dy.data_ptr(),
        _address(dfinal),
        dx.data_ptr(),
        dstart.data_ptr(),
        torch.get_num_threads(),
    )
    return dx.to(forward.x.dtype), dstart
