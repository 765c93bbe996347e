"""The highest sums of two scores, one from each of two lists: retrieval by product keys."""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import NamedTuple

import torch

from gossamer import _backend
from gossamer._checks import check_computed, check_positive, check_same_device, check_same_dtype, last_size
from gossamer.ops._records import define
from gossamer.ops.gather_dot import gather_dot

# Maximum number of scores per list in a program of the Triton kernel, and of pairs per row in the native kernel.
MOST_SCORES, MOST_CHOSEN = 4096, 64


class ProductKeyTopk(NamedTuple):
    """Arguments of the search.

    Attributes:
        scores1: ``(R, N₁)`` float32 or float64.
        scores2: ``(R, N₂)``.
        top_k: K.
    """

    scores1: torch.Tensor
    scores2: torch.Tensor
    top_k: int


class ProductKeySearch(NamedTuple):
    """Arguments of the search by queries.

    Attributes:
        queries: ``(R, 2d)``; row r is of group ``r % G``.
        keys: ``(G, 2, √N, d)``, the sub-keys of each group and half.
        top_k: K.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    top_k: int


class ProductKeyTopkBackward(NamedTuple):
    """Arguments of the backward pass.

    Attributes:
        dvalues: ``(R, K)``.
        values: ``(R, K)``, −∞ where a pair is masked, which passes no gradient.
        ids: ``(R, K)`` int64.
        sizes: N₁ and N₂.
    """

    dvalues: torch.Tensor
    values: torch.Tensor
    ids: torch.Tensor
    sizes: list[int]


@functools.cache
def _kernels(backend: str) -> ModuleType:
    if backend == "native":
        from gossamer.cpu_kernels import product_key_topk
    else:
        from gossamer.triton_kernels import product_key_topk
    return product_key_topk


def _side(scores: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The K highest scores of each row and their positions, lower positions first among equal scores; NaN counts as −∞
    and +∞ as the largest number.
    """
    clean = torch.nan_to_num(scores, nan=-math.inf, posinf=torch.finfo(scores.dtype).max, neginf=-math.inf)
    values, places = clean.sort(dim=1, descending=True, stable=True)
    return values[:, :top_k], places[:, :top_k]


def product_key_topk_reference(args: ProductKeyTopk) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`product_key_topk` in plain torch: both lists sorted, then the K·K sums of their heads."""
    (best1, places1), (best2, places2) = (_side(scores, args.top_k) for scores in (args.scores1, args.scores2))
    sums = (best1.unsqueeze(2) + best2.unsqueeze(1)).flatten(1)
    most = torch.finfo(sums.dtype).max
    masked = (best1 == -math.inf).unsqueeze(2) | (best2 == -math.inf).unsqueeze(1)
    sums = sums.clamp(-most, most).masked_fill(masked.flatten(1), -math.inf)
    # Rows of the square are positions in the first list's order, so a stable sort takes the lower rank of equal sums
    # first.
    values, at = sums.sort(dim=1, descending=True, stable=True)
    values, at = values[:, : args.top_k], at[:, : args.top_k]
    first, second = places1.gather(1, at // args.top_k), places2.gather(1, at % args.top_k)
    return values.contiguous(), first * args.scores2.shape[1] + second


def _check_values(args: ProductKeyTopk) -> None:
    """Raise on the CPU if scores hold NaN or +∞. This reads values, so it is called inside the operator."""
    for name, scores in (("scores1", args.scores1), ("scores2", args.scores2)):
        if scores.device.type == "cpu" and scores.numel() and not float(scores.max()) < math.inf:
            raise_not_a_score(name, scores)


def raise_not_a_score(name: str, scores: torch.Tensor) -> None:
    """Raise an error that gives the position of a NaN or +∞ in ``scores (R, N)``."""
    row, place = (int(i) for i in (scores.isnan() | scores.isposinf()).nonzero()[0])
    raise ValueError(
        f"{name} must hold neither NaN nor +inf (-inf masks a key), got {float(scores[row, place])} at row {row}, "
        f"key {place}"
    )


def _forward(args: ProductKeyTopk, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    if backend == "native":
        found = _kernels(backend).product_key_topk(args)
        if found is not None:
            return found
    _check_values(args)
    if backend == "reference":
        return product_key_topk_reference(args)
    return _kernels(backend).product_key_topk(args)


def _forward_fake(args: ProductKeyTopk) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (args.scores1.shape[0], args.top_k)
    return args.scores1.new_empty(shape), args.scores1.new_empty(shape, dtype=torch.int64)


_product_key_topk = define(
    "product_key_topk",
    ProductKeyTopk,
    kernel=_forward,
    fake=_forward_fake,
    returns="(Tensor values, Tensor ids)",
)


def product_key_topk_backward_reference(args: ProductKeyTopkBackward) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of both lists in plain torch."""
    dvalues = torch.where(args.values == -math.inf, 0.0, args.dvalues)
    gradients = []
    for size, places in zip(args.sizes, _places(args), strict=True):
        gradient = dvalues.new_zeros(dvalues.shape[0], size)
        # Summed pair by pair: a row may list a position several times, and sums need a fixed order on every device.
        for k in range(dvalues.shape[1]):
            gradient = gradient.scatter_add(1, places[:, k : k + 1], dvalues[:, k : k + 1])
        gradients.append(gradient)
    return gradients[0], gradients[1]


def _places(args: ProductKeyTopkBackward) -> tuple[torch.Tensor, torch.Tensor]:
    return args.ids // args.sizes[1], args.ids % args.sizes[1]


def _backward(args: ProductKeyTopkBackward, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    if backend == "reference":
        return product_key_topk_backward_reference(args)
    return _kernels(backend).product_key_topk_backward(args)


def _backward_fake(args: ProductKeyTopkBackward) -> tuple[torch.Tensor, torch.Tensor]:
    rows = args.dvalues.shape[0]
    return args.dvalues.new_empty(rows, args.sizes[0]), args.dvalues.new_empty(rows, args.sizes[1])


_product_key_topk_backward = define(
    "product_key_topk_backward",
    ProductKeyTopkBackward,
    kernel=_backward,
    fake=_backward_fake,
    returns="(Tensor dscores1, Tensor dscores2)",
)


def _save(ctx, args: ProductKeyTopk, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.sizes = [args.scores1.shape[1], args.scores2.shape[1]]
    return args._replace(scores1=None, scores2=None), *output


def _differentiate(ctx, args: ProductKeyTopk, tensors, dvalues: torch.Tensor | None, _):
    if dvalues is None:
        return {}
    backward = ProductKeyTopkBackward(dvalues.contiguous(), *tensors, ctx.sizes)
    dscores1, dscores2 = _product_key_topk_backward(backward, ctx.backend)
    return {"scores1": dscores1, "scores2": dscores2}


_product_key_topk.differentiate(_save, _differentiate)


def _save_backward(ctx, args: ProductKeyTopkBackward, output):
    return (args._replace(dvalues=None),)


def _differentiate_backward(ctx, args: ProductKeyTopkBackward, tensors, ddscores1, ddscores2):
    first, second = _places(args)
    ddvalues = ddscores1.gather(1, first) + ddscores2.gather(1, second)
    return {"dvalues": torch.where(args.values == -math.inf, 0.0, ddvalues)}


_product_key_topk_backward.differentiate(_save_backward, _differentiate_backward)


def _scores(args: ProductKeySearch) -> list[torch.Tensor]:
    """``(R, √N)`` of each half."""
    groups, _, side, half = args.keys.shape
    if groups == 1:
        return [q @ args.keys[0, i].T for i, q in enumerate(args.queries.split(half, 1))]
    by_group = args.queries.view(-1, groups, 2 * half).transpose(0, 1)
    return [
        (q @ args.keys[:, i].transpose(1, 2)).transpose(0, 1).reshape(-1, side)
        for i, q in enumerate(by_group.split(half, 2))
    ]


def _search_forward(args: ProductKeySearch, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    found = _kernels(backend).product_key_search(args)
    # Find the position of an invalid score for the error message.
    return product_key_topk(*_scores(args), args.top_k) if found is None else found


def _search_fake(args: ProductKeySearch) -> tuple[torch.Tensor, torch.Tensor]:
    scores = args.queries.new_empty(args.queries.shape[0], args.top_k)
    return scores, scores.new_empty(scores.shape, dtype=torch.int64)


_product_key_search = define(
    "product_key_search",
    ProductKeySearch,
    kernel=_search_forward,
    fake=_search_fake,
    returns="(Tensor scores, Tensor ids)",
)

_FITS = {
    "native": lambda sizes, top_k: top_k <= MOST_CHOSEN,
    "triton": lambda sizes, top_k: top_k <= MOST_CHOSEN and max(sizes) <= MOST_SCORES,
}


def product_key_topk(scores1: torch.Tensor, scores2: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The K highest sums ``scores1[a] + scores2[b]`` over all pairs, and their ids ``a·N₂ + b``.

    The search is exact: if a pair has rank i in one list and rank j in the other, at least ``(i+1)(j+1)`` pairs,
    including itself, have a sum at least as high. So only pairs of the K highest scores of each list with ``(i+1)(j+1)
    ≤ K`` can be among the K highest sums. Sources: Lample et al., "Large Memory Layers with Product Keys", 2019; He,
    "Mixture of a Million Experts", 2024.

    Pairs come in descending order of their sums. Equal scores of a list rank by index, lower first. Among pairs with
    equal (rounded) sums, the one with the higher-ranked first score comes first, then the one with the higher-ranked
    second score.

    A score of −∞ masks its pairs: they come last, with the value −∞ and distinct ids, and pass no gradient. NaN and +∞
    are errors on the CPU. On CUDA, where values are not read back, NaN is treated as −∞ and +∞ as the largest finite
    number. Sums beyond the largest finite number are that number.

    Args:
        scores1: ``(..., N₁)`` floating, converted to float32 (float64 stays).
        scores2: ``(..., N₂)``, of the leading sizes and dtype of ``scores1``.
        top_k: K, at most N₁ and N₂.

    Returns:
        ``values (..., K)`` and ``ids (..., K)`` int64. The values are differentiable in both scores.

    Raises:
        TypeError: an argument is not a floating tensor, dtypes differ, or K is not an int.
        ValueError: shapes or devices differ, or K is below 1 or above N₁ or N₂; on the CPU, a score is NaN or +∞.
    """
    for name, scores in (("scores1", scores1), ("scores2", scores2)):
        last_size(name, scores, "(..., N)")
        check_computed(name, scores)
    check_same_dtype(scores1=scores1, scores2=scores2)
    check_same_device(scores1=scores1, scores2=scores2)
    if scores1.shape[:-1] != scores2.shape[:-1]:
        raise ValueError(
            f"scores2 must have the leading sizes of scores1, {tuple(scores1.shape[:-1])}, got "
            f"{tuple(scores2.shape[:-1])}"
        )
    check_positive(top_k=top_k)
    sizes = scores1.shape[-1], scores2.shape[-1]
    if top_k > min(sizes):
        raise ValueError(f"top_k must be at most the number of keys of each list, {sizes}, got {top_k}")
    leading = scores1.shape[:-1]
    wide = torch.promote_types(scores1.dtype, torch.float32)
    rows1, rows2 = (s.reshape(math.prod(leading), s.shape[-1]).to(wide) for s in (scores1, scores2))
    backend = _backend.resolve("product_key_topk", scores1)
    if backend not in _FITS or wide != torch.float32 or not _FITS[backend](sizes, top_k):
        # Plain gathers compute the values again, because every transform can differentiate them.
        detached = ProductKeyTopk(rows1.detach(), rows2.detach(), top_k)
        values, ids = _product_key_topk(detached, "reference")
        if torch.is_grad_enabled() and (rows1.requires_grad or rows2.requires_grad):
            most = torch.finfo(wide).max
            sums = rows1.gather(1, ids // sizes[1]) + rows2.gather(1, ids % sizes[1])
            values = torch.where(values == -math.inf, values, sums.clamp(-most, most))
    else:
        values, ids = _product_key_topk(ProductKeyTopk(rows1, rows2, top_k), backend)
    return values.view(*leading, top_k), ids.view(*leading, top_k)


def product_key_search(queries: torch.Tensor, keys: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`product_key_topk` of the scores ``⟨q¹, keys[g,0,a]⟩`` and ``⟨q², keys[g,1,b]⟩``.

    Args:
        queries: ``(R, 2d)`` float32 or float64; row r is of group ``g = r % G``, and G divides R.
        keys: ``(G, 2, √N, d)``.
        top_k: K, at most √N.

    Returns:
        ``scores (R, K)``, differentiable in both, and ``ids (R, K)`` int64. The scores have the same bits whether a
        gradient is wanted or not.

    Raises:
        ValueError: on the CPU, a score is NaN or +∞.
    """
    args = ProductKeySearch(queries.detach(), keys.detach(), top_k)
    backend = _backend.resolve("product_key_topk", queries)
    wanted = torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad)
    if backend == "native" and queries.dtype == torch.float32 and top_k <= MOST_CHOSEN:
        # Scores stay in the cache until they are ranked; plain products would write all scores and read them back.
        scores, ids = _product_key_search(args, backend)
        if not wanted:
            return scores, ids
    else:
        with torch.no_grad():
            ids = product_key_topk(*_scores(args), top_k)[1]
    # The scores of the chosen pairs are computed again, so that the gradient has K values per query instead of two rows
    # of √N.
    groups, _, side, half = keys.shape
    places = [ids // side, ids % side]
    if groups > 1:
        first = torch.arange(queries.shape[0], device=ids.device).unsqueeze(1) % groups * side
        places = [first + place for place in places]
    halves = queries.split(half, 1)
    first, second = (gather_dot(keys[:, i].reshape(groups * side, half), places[i], halves[i]) for i in (0, 1))
    return first + second, ids
