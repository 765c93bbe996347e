"""The gradient of mixtures of codewords, which is attention of narrow queries to a few keys."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gossamer._backend import transformed
from gossamer._numerics import accumulation_dtype
from gossamer.ops.embedding import graft

# Scores that are held at a time; they and their gradient stay in the second-level cache.
_SCORES = 1 << 17
# Queries of more columns than this are faster in torch's attention.
_NARROW = 8


def _chunks(q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Slices of the queries ``(P, C, L)`` that do not depend on the number of threads, each with an array ``(P, S, K)``
    and the weights of the keys ``(P, C, K)``; the next slice overwrites both.
    """
    (parts, _, count), codes = q.shape, k.shape[2]
    size = min(count, max(1, _SCORES // (parts * codes)))
    arrays = [q.new_empty(parts, size, codes) for _ in range(2)]
    for begin in range(0, count, size):
        part = slice(begin, min(begin + size, count))
        if part.stop - begin < size:
            arrays = [q.new_empty(parts, part.stop - begin, codes) for _ in range(2)]
        scores, weights = arrays
        torch.bmm(q[:, :, part].mT, k, out=scores)
        yield part, scores, torch.softmax(scores, -1, out=weights)


class _Mixture(torch.autograd.Function):
    """Given vectors, with the gradient of ``softmax(q·Kᵀ)·V``, which is not computed itself.

    Queries, keys and values have few columns. They are stored transposed, as a few long rows: a product with a matrix
    of few columns takes six times as long as one with a matrix of few rows.
    """

    @staticmethod
    def forward(ctx, words, pieces, keys, codewords):
        ctx.save_for_backward(pieces, keys, codewords)
        return words.view_as(words)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: torch.Tensor):
        sides = pieces, keys, codewords = ctx.saved_tensors
        wide = accumulation_dtype(pieces.dtype)
        q, dout = (side.to(wide).permute(1, 2, 0).contiguous() for side in (pieces, dout))
        k, v = (side.to(wide).transpose(1, 2).contiguous() for side in (keys, codewords))
        _, *needs = ctx.needs_input_grad
        dq, dk, dv = (torch.zeros_like(side) if need else None for side, need in zip((q, k, v), needs, strict=True))
        for part, scores, weights in _chunks(q, k):
            asked, given = q[:, :, part], dout[:, :, part]
            if dv is not None:
                dv.baddbmm_(given, weights)
            # The gradient of the scores, w·(dw − Σ w·dw).
            torch.bmm(given.mT, v, out=scores).mul_(weights)
            scores.sub_(weights.mul_(scores.sum(-1, keepdim=True)))
            if dq is not None:
                dq[:, :, part] = torch.bmm(k, scores.mT)
            if dk is not None:
                dk.baddbmm_(asked, scores)
        dq = None if dq is None else dq.permute(2, 0, 1)
        found = dq, *(None if side is None else side.mT for side in (dk, dv))
        return None, *(None if g is None else g.to(side.dtype) for g, side in zip(found, sides, strict=True))


def with_mixture_gradient(
    words: torch.Tensor, pieces: torch.Tensor, keys: torch.Tensor, codewords: torch.Tensor
) -> torch.Tensor:
    """``words``, whose gradient is that of the mixtures ``Σ_k softmax_k(⟨q, K_k⟩)·V_k`` of the pieces q.

    Args:
        words: ``(L, P, C)``, L at least 1, not requiring a gradient.
        pieces: ``(L, P, C)``.
        keys: ``(P, K, C)``.
        codewords: ``(P, K, C)``.
    """
    if torch.compiler.is_compiling() or transformed() or not pieces.is_cpu or pieces.shape[2] > _NARROW:
        sides = (side.unsqueeze(0) for side in (pieces.transpose(0, 1), keys, codewords))
        found = torch.nn.functional.scaled_dot_product_attention(*sides, scale=1.0)
        return graft(words, found.squeeze(0).transpose(0, 1))
    return _Mixture.apply(words, pieces, keys, codewords)
