"""Launchers of the native sums and means over lists of rows of many tables in one storage."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import empty_huge, matrix, vector
from gossamer.cpu_kernels.gather_reduce import as_kernel_dtype, bags, kernel_dtype


def flat_matrix(flat: torch.Tensor) -> tuple[int, int, int, int]:
    """A contiguous 1-D tensor as kernels with features take it: they know the strides."""
    return matrix(flat.unsqueeze(0))


def gather_reduce_tables(
    storage: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None,
    layout: torch.Tensor,
    spec: Sequence[int],
    drop: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Bag ``f·B + b`` reads the table of feature f and writes its columns of row b of the result ``(B, ΣD_f)``.

    Args:
        storage: ``(E,)`` float, contiguous.
        index: ``(L,)`` int32 or int64.
        offsets: ``(F·B+1,)`` int32 or int64.
        weights: ``(L,)`` float or None.
        layout: ``(F, 6)`` int64 of a TableLayout.
        spec: the same as ints.
        drop: skip ids outside their tables.
        out_dtype: of the result.

    Raises:
        IndexError: an id of a bag lies outside its table and is not to be dropped.
        ValueError: ``offsets`` do not ascend within ``[0, L]``, or a weight that counts is NaN.
    """
    _flat, lists = bags(index, offsets, layout=layout)
    weights = None if weights is None else weights.contiguous()
    num_bags = (offsets.shape[0] - 1) // layout.shape[0]
    out = empty_huge((num_bags, sum(spec[3::6])), kernel_dtype(storage, out_dtype))
    settings = (False, drop, True, torch.get_num_threads())
    _C.gather_reduce(flat_matrix(storage), 0, max(spec[3::6]), lists, vector(weights), matrix(out), *settings)
    return out.to(out_dtype)


def gather_dot_tables(
    dout: torch.Tensor,
    storage: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor,
    layout: torch.Tensor,
    spec: Sequence[int],
    drop: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The gradient of weights, ``(L,)`` in ``dtype``; arguments and errors as above, with ``dout (B, ΣD_f)``."""
    dout = as_kernel_dtype(storage, dout)
    _flat, lists = bags(index, offsets, layout=layout)
    out = torch.zeros(index.shape[0], dtype=dtype)
    settings = (False, drop, torch.get_num_threads())
    _C.gather_dot(matrix(dout), flat_matrix(storage), 0, max(spec[3::6]), lists, vector(out), *settings)
    return out
