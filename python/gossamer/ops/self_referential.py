"""Self-referential weight matrices: a layer changes its own weights at every token of a sequence."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import torch

from gossamer import _backend
from gossamer._checks import check_flags, check_float, check_same_device, check_shape
from gossamer.ops._records import define

# Undoing a step rounds again, so errors accumulate over at most one segment. Saving a matrix per step would need too
# much memory.
SEGMENT = 256


class SelfReferential(NamedTuple):
    """Arguments of the recurrence.

    Attributes:
        x: ``(B, T, H, d)``.
        weight: ``(H, d, 3d + 4)``.
        shift: ``(B, H, d, 3d + 4)`` in the accumulator's dtype, or None.
        output_final_shift: whether the last shift is wanted.
        save: whether to save for a backward pass.
        segment: number of tokens between two matrices that are saved for the backward pass.
    """

    x: torch.Tensor
    weight: torch.Tensor
    shift: torch.Tensor | None
    output_final_shift: bool
    save: bool
    segment: int


class SelfReferentialBackward(NamedTuple):
    """Arguments of the backward pass.

    Attributes:
        dy: ``(B, T, H, d)``.
        dfinal: the gradient of the last shift, or None.
        steps: the values that the forward pass saved for each token.
        kept: the matrices that the forward pass saved.
        forward: the arguments of the forward pass.
    """

    dy: torch.Tensor
    dfinal: torch.Tensor | None
    steps: torch.Tensor
    kept: torch.Tensor
    forward: SelfReferential


def self_referential_reference(args: SelfReferential) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`self_referential` token by token in plain torch, differentiable, in any floating dtype."""
    size = args.x.shape[-1]
    wide = torch.promote_types(args.x.dtype, torch.float32)
    start = args.weight.to(wide)
    w = start.expand(args.x.shape[0], *start.shape)
    if args.shift is not None:
        w = w + args.shift
    outputs = []
    for x in args.x.to(wide).unbind(1):
        z = torch.einsum("bhi,bhio->bho", x, w)
        y, q, k, rates = z.split([size, size, size, 4], dim=-1)
        q, k, rates = q.softmax(-1), k.softmax(-1), rates.sigmoid()
        change = torch.einsum("bhi,bhio->bho", q - k, w)
        by_column = rates.repeat_interleave(torch.tensor([size, size, size, 4], device=x.device), dim=-1)
        w = w + k.unsqueeze(-1) * (by_column * change).unsqueeze(-2)
        outputs.append(y)
    y = torch.stack(outputs, 1) if outputs else args.x.to(wide)
    return y.to(args.x.dtype), w - start


@functools.cache
def _kernels() -> ModuleType:
    from gossamer.cpu_kernels import self_referential

    return self_referential


def _forward(args: SelfReferential, backend: str) -> tuple[torch.Tensor, ...]:
    return _kernels().self_referential(args)


def _forward_fake(args: SelfReferential) -> tuple[torch.Tensor, ...]:
    batch, tokens, heads, size = args.x.shape
    wide = torch.promote_types(args.x.dtype, torch.float32)
    columns = 3 * size + 4
    final = (batch, heads, size, columns) if args.output_final_shift else (0,)
    steps = (batch, heads, tokens, 2 * size + 4 + columns) if args.save else (0,)
    segments = (tokens + args.segment - 1) // args.segment
    kept = (batch, heads, segments, size, columns) if args.save else (0,)
    return torch.empty_like(args.x, memory_format=torch.contiguous_format), *(
        args.x.new_empty(shape, dtype=wide) for shape in (final, steps, kept)
    )


_self_referential = define(
    "self_referential",
    SelfReferential,
    kernel=_forward,
    fake=_forward_fake,
    returns="(Tensor y, Tensor final_shift, Tensor steps, Tensor kept)",
)


def _backward(args: SelfReferentialBackward, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    return _kernels().self_referential_backward(args)


def _backward_fake(args: SelfReferentialBackward) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, heads, size = args.forward.x.shape
    dstart = args.steps.new_empty(batch, heads, size, 3 * size + 4)
    return torch.empty_like(args.forward.x, memory_format=torch.contiguous_format), dstart


_self_referential_backward = define(
    "self_referential_backward",
    SelfReferentialBackward,
    kernel=_backward,
    fake=_backward_fake,
    returns="(Tensor dx, Tensor dstart)",
)


def _save(ctx, args: SelfReferential, output):
    _, _, steps, kept = output
    if not args.save:
        raise RuntimeError("gossamer::self_referential needs save=True where a gradient is wanted")
    ctx.mark_non_differentiable(steps, kept)
    ctx.set_materialize_grads(False)
    return args, steps, kept


def _differentiate(ctx, args: SelfReferential, tensors, dy, dfinal, _dsteps, _dkept):
    steps, kept = tensors
    if dy is None and dfinal is None:
        return {}
    dy = torch.zeros_like(args.x) if dy is None else dy
    dfinal = dfinal if args.output_final_shift else None
    dx, dstart = _self_referential_backward(SelfReferentialBackward(dy, dfinal, steps, kept, args), ctx.backend)
    found = {}
    if "x" in ctx.needs:
        found["x"] = dx
    if "weight" in ctx.needs:
        # The last shift is the last matrix less the weight.
        by_weight = dstart if dfinal is None else dstart - dfinal
        found["weight"] = by_weight.sum(0).to(args.weight.dtype)
    if "shift" in ctx.needs:
        found["shift"] = dstart
    return found


_self_referential.differentiate(_save, _differentiate)


def self_referential(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    shift: torch.Tensor | None = None,
    output_final_shift: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""Weight matrices that modify themselves (SRWM; Irie, Schlag, Csordás and Schmidhuber, 2022).

    Each head has a matrix ``W (d, 3d + 4)`` whose columns produce an output, a query, a key and four rates. A sequence
    starts with ``W = weight + shift``; each token uses the ``W`` left by the previous token and updates it::

        [y, q, k, β] = Wᵀx        q ← softmax(q), k ← softmax(k), β ← σ(β)
        W ← W + k (β̄ ⊙ Wᵀ(q − k))ᵀ

    where β̄ repeats each of the four rates over the columns of its block. So the matrix's own outputs decide what
    it learns, and how fast. The update is not linear in W, so tokens are computed one after another; heads and
    sequences run in parallel. The backward pass undoes steps, starting from matrices that were saved every 256 tokens.

    Args:
        x: ``(B, T, H, d)`` float.
        weight: ``(H, d, 3d + 4)``, the dtype of ``x`` or float32: the trained start of every sequence.
        shift: ``(B, H, d, 3d + 4)`` float32 (float64 for float64), the change made by an earlier part of the sequence;
            None for zero.
        output_final_shift: whether the change after the last token is returned.

    Returns:
        ``y (B, T, H, d)`` in the dtype of ``x``, and the final shift or None. Computed in float32 (float64 for
        float64). Differentiable in all three.

    Raises:
        TypeError: an argument is not a tensor, a dtype is not supported, or dtypes do not fit.
        ValueError: shapes or devices do not fit.
    """
    check_flags(output_final_shift=output_final_shift)
    check_shape("x", x, (None, None, None, None), "(B, T, H, d)")
    b, _, h, d = x.shape
    backend = _backend.resolve("self_referential", x)
    check_float("x", x, backend)
    wide = torch.promote_types(x.dtype, torch.float32)
    check_shape("weight", weight, (h, d, 3 * d + 4), "(H, d, 3d + 4)")
    if weight.dtype not in (x.dtype, wide):
        raise TypeError(f"weight must have the dtype of x, {x.dtype}, or {wide}, got {weight.dtype}")
    if shift is not None:
        check_shape("shift", shift, (b, h, d, 3 * d + 4), "(B, H, d, 3d + 4)")
        if shift.dtype != wide:
            raise TypeError(f"shift must be {wide} beside x of {x.dtype}, got {shift.dtype}")
    if d == 0:
        raise ValueError("x must have at least one channel, got d = 0")
    check_same_device(x=x, weight=weight, shift=shift)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, shift))
    args = SelfReferential(x, weight, shift, output_final_shift, save, SEGMENT)
    if backend == "reference":
        y, final = self_referential_reference(args)
    else:
        y, final, _, _ = _self_referential(args, backend)
    return y, final if output_final_shift else None
