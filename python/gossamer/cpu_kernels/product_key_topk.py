"""Launchers of the native retrieval by product keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import empty_huge, unit_rows

if TYPE_CHECKING:
    from gossamer.ops.product_key_topk import ProductKeySearch, ProductKeyTopk, ProductKeyTopkBackward


def product_key_topk(args: ProductKeyTopk) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``values (R, K)`` float32 and ``ids (R, K)`` int64 from float32 scores; None if a score is NaN or +∞."""
    scores1, scores2 = unit_rows(args.scores1), unit_rows(args.scores2)
    rows = scores1.shape[0]
    values = torch.empty(rows, args.top_k, dtype=torch.float32)
    ids = torch.empty(rows, args.top_k, dtype=torch.int64)
    sound = _C.product_key_topk(
        scores1=scores1.data_ptr(),
        row_stride1=scores1.stride(0),
        scores2=scores2.data_ptr(),
        row_stride2=scores2.stride(0),
        rows=rows,
        size1=scores1.shape[1],
        size2=scores2.shape[1],
        top_k=args.top_k,
        values=values.data_ptr(),
        ids=ids.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    return (values, ids) if sound else None


def product_key_topk_backward(args: ProductKeyTopkBackward) -> tuple[torch.Tensor, torch.Tensor]:
    """``dscores1 (R, N₁)`` and ``dscores2 (R, N₂)``, the pairs of a row summed in their order."""
    rows, top_k = args.ids.shape
    dvalues, values, ids = args.dvalues.contiguous(), args.values.contiguous(), args.ids.contiguous()
    dscores1, dscores2 = (empty_huge((rows, size), torch.float32) for size in args.sizes)
    _C.product_key_topk_backward(
        dvalues=dvalues.data_ptr(),
        values=values.data_ptr(),
        ids=ids.data_ptr(),
        rows=rows,
        size1=args.sizes[0],
        size2=args.sizes[1],
        top_k=top_k,
        dscores1=dscores1.data_ptr(),
        dscores2=dscores2.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    return dscores1, dscores2


def product_key_search(args: ProductKeySearch) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``scores (R, K)`` and ``ids (R, K)`` int64 from float32 queries and keys; None if a score is NaN or +∞."""
    queries, keys = unit_rows(args.queries), args.keys.contiguous()
    groups, _, side, half = keys.shape
    rows = queries.shape[0]
    scores = torch.empty(rows, args.top_k, dtype=torch.float32)
    ids = torch.empty(rows, args.top_k, dtype=torch.int64)
    sound = _C.product_key_search(
        queries=queries.data_ptr(),
        row_stride=queries.stride(0),
        rows=rows,
        keys=keys.data_ptr(),
        groups=groups,
        side=side,
        half=half,
        top_k=args.top_k,
        ids=ids.data_ptr(),
        scores=scores.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    return (scores, ids) if sound else None
