"""Launchers of the native weighted sums over lists of table rows."""

from __future__ import annotations

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import matrix, unit_rows, vector


def _bags(index, offsets, limit, padding_idx):
    """The lists as the extension takes them, and the flat index, which must stay alive beside them."""
    flat = index.reshape(-1).contiguous()
    num_bags = index.shape[0] if offsets is None else offsets.shape[0] - 1
    bag_size = index.shape[1] if offsets is None else 0
    ids_below = -1 if limit is None else max(int(limit), 0)
    return flat, _C.Bags(vector(flat), vector(offsets), bag_size, flat.shape[0], num_bags, ids_below, padding_idx)


def gather_reduce(
    table: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    limit: torch.Tensor | None,
    padding_idx: int,
) -> torch.Tensor:
    """``out[b] = Σ weights · table[id]`` over the ids of bag ``b`` below ``limit`` other than ``padding_idx``.

    Args:
        table: ``(N, D)`` float.
        index: ``(B, J)``, or ``(L,)`` with ``offsets (B+1,)``; int32 or int64.
        offsets: int32 or int64, ascending within ``[0, L]``, or None.
        weights: like ``index``, any float dtype, or None.
        limit: one int, or None; table rows from it on are never read.
        padding_idx: −1 for none.

    Returns:
        ``(B, D)`` in the table's dtype.

    Raises:
        IndexError: an id of a bag lies outside ``[0, N)``.
        ValueError: ``offsets`` do not ascend within ``[0, L]``.
    """
    table = unit_rows(table)
    _flat, bags = _bags(index, offsets, limit, padding_idx)
    weights = None if weights is None else weights.reshape(-1).contiguous()
    num_bags = index.shape[0] if offsets is None else offsets.shape[0] - 1
    out = torch.empty(num_bags, table.shape[1], dtype=table.dtype)
    _C.gather_reduce(matrix(table), *table.shape, bags, vector(weights), out.data_ptr(), torch.get_num_threads())
    return out


def gather_dot(
    dout: torch.Tensor,
    table: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor | None,
    limit: torch.Tensor | None,
    padding_idx: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``out[p] = ⟨dout[bag of p], table[index[p]]⟩`` in ``dtype``, shaped like ``index``; zero where the id is skipped.

    Arguments and errors as for :func:`gather_reduce`, with ``dout (B, D)`` in the table's dtype.
    """
    dout, table = unit_rows(dout), unit_rows(table)
    flat, bags = _bags(index, offsets, limit, padding_idx)
    out = torch.zeros(flat.shape[0], dtype=dtype)
    _C.gather_dot(matrix(dout), matrix(table), *table.shape, bags, vector(out), torch.get_num_threads())
    return out.view(index.shape)
