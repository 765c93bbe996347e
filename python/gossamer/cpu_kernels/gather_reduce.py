"""Launchers of the native sums, means and maxima over lists of table rows, of one table and of many."""

from __future__ import annotations

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import empty_huge, matrix, unit_rows, vector


def bags(
    index: torch.Tensor,
    offsets: torch.Tensor | None,
    limit: torch.Tensor | None = None,
    padding_idx: int = -1,
    layout: torch.Tensor | None = None,
) -> tuple[torch.Tensor, _C.Bags]:
    """The lists as the extension takes them, behind the flat index, which must stay alive beside them."""
    flat = index.reshape(-1).contiguous()
    num_bags = index.shape[0] if offsets is None else offsets.shape[0] - 1
    bag_size = index.shape[1] if offsets is None else 0
    ids_below = -1 if limit is None else max(int(limit), 0)
    features = (0, 0) if layout is None else (layout.data_ptr(), layout.shape[0])
    lists = (vector(flat), vector(offsets), bag_size, flat.shape[0], num_bags, ids_below, padding_idx)
    return flat, _C.Bags(*lists, *features)


def wide_dtype(table: torch.Tensor) -> torch.dtype:
    """What sums over the table are kept in."""
    return torch.float64 if table.dtype == torch.float64 else torch.float32


def kernel_dtype(table: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype beside the table's that kernels write or read where ``dtype`` is wanted."""
    return dtype if dtype == table.dtype else wide_dtype(table)


def as_kernel_dtype(table: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
    """``dout`` in a dtype that kernels read beside the table's, with contiguous rows."""
    return unit_rows(dout.to(kernel_dtype(table, dout.dtype)))


def gather_reduce(
    table: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    limit: torch.Tensor | None,
    padding_idx: int,
    mean: bool = False,
    drop: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``out[b] = Σ weights · table[id]`` over the ids of bag ``b`` below ``limit`` other than ``padding_idx``.

    Args:
        table: ``(N, D)`` float.
        index: ``(B, J)``, or ``(L,)`` with ``offsets (B+1,)``; int32 or int64.
        offsets: int32 or int64, ascending within ``[0, L]``, or None.
        weights: like ``index``, float, or None for ones.
        limit: one element, or None for no limit; with it, rows from it on are never read, nor are weights checked.
        padding_idx: −1 for none.
        mean: divide each sum by the number of its ids that contribute.
        drop: skip ids outside the table.
        out_dtype: of the result; the table's for None.

    Returns:
        ``(B, D)``.

    Raises:
        IndexError: an id of a bag lies outside ``[0, N)`` and is not to be dropped.
        ValueError: ``offsets`` do not ascend within ``[0, L]``, or a weight that counts is NaN.
    """
    table = unit_rows(table)
    _flat, lists = bags(index, offsets, limit, padding_idx)
    weights = None if weights is None else weights.reshape(-1).contiguous()
    num_bags = index.shape[0] if offsets is None else offsets.shape[0] - 1
    out_dtype = out_dtype or table.dtype
    out = empty_huge((num_bags, table.shape[1]), kernel_dtype(table, out_dtype))
    checked = limit is None
    settings = (mean, drop, checked, torch.get_num_threads())
    _C.gather_reduce(matrix(table), *table.shape, lists, vector(weights), matrix(out), *settings)
    return out.to(out_dtype)


def gather_max(
    table: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor | None,
    padding_idx: int,
    drop: bool,
    need_argmax: bool,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columnwise maxima ``(B, D)`` over the ids of each bag, zero in empty ones; arguments as above.

    The second result is each maximum's position within its bag, int32, −1 in empty bags; ``(0, D)`` unless needed.
    """
    table = unit_rows(table)
    _flat, lists = bags(index, offsets, None, padding_idx)
    num_bags = index.shape[0] if offsets is None else offsets.shape[0] - 1
    out = empty_huge((num_bags, table.shape[1]), kernel_dtype(table, out_dtype))
    argmax = torch.empty(num_bags if need_argmax else 0, table.shape[1], dtype=torch.int32)
    pointer = argmax.data_ptr() if need_argmax else 0
    _C.gather_max(matrix(table), *table.shape, lists, matrix(out), pointer, drop, torch.get_num_threads())
    return out.to(out_dtype), argmax


def gather_dot(
    dout: torch.Tensor,
    table: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor | None,
    limit: torch.Tensor | None,
    padding_idx: int,
    dtype: torch.dtype,
    mean: bool = False,
    drop: bool = False,
) -> torch.Tensor:
    """``out[p] = ⟨dout[bag of p], table[index[p]]⟩`` in ``dtype``, shaped like ``index``; zero where the id is skipped.

    Arguments and errors as for :func:`gather_reduce`, with ``dout (B, D)`` float; for a mean over the bag's ids.
    """
    table = unit_rows(table)
    dout = as_kernel_dtype(table, dout)
    flat, lists = bags(index, offsets, limit, padding_idx)
    out = torch.zeros(flat.shape[0], dtype=dtype)
    _C.gather_dot(matrix(dout), matrix(table), *table.shape, lists, vector(out), mean, drop, torch.get_num_threads())
    return out.view(index.shape)
