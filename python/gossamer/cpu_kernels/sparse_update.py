"""Launcher of the native optimizer steps on touched rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import DTYPES, matrix, vector
from gossamer.cpu_kernels.gather_reduce import as_kernel_dtype, bags
from gossamer.cpu_kernels.gather_reduce_tables import flat_matrix


def _array(state: torch.Tensor | None) -> tuple[int, int, int, int]:
    """A state tensor; in 1-D ones, flat or with a value a row, elements lie at the stride of rows."""
    if state is None or state.dim() == 2:
        return matrix(state)
    return state.data_ptr(), state.stride(0), 0, DTYPES[state.dtype]


def sparse_update_(
    table: torch.Tensor,
    index: torch.Tensor,
    dout: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    argmax: torch.Tensor | None,
    layout: torch.Tensor | None,
    lr: torch.Tensor | None,
    step: torch.Tensor,
    state1: torch.Tensor | None,
    state2: torch.Tensor | None,
    spec: Sequence[int],
    padding_idx: int,
    mean: bool,
    drop: bool,
    algorithm: int,
    hyper: Sequence[float],
    seed: int,
) -> None:
    """One step on the rows that the bags list; table, states and step in place.

    Args:
        table: ``(N, D)`` float with unit column stride, or with ``spec`` a flat storage.
        index: as for gather_reduce, and so are ``offsets``, ``weights``, ``padding_idx``, ``mean`` and ``drop``.
        dout: ``(B, D)`` float.
        offsets: see above.
        weights: see above.
        argmax: ``(B, D)`` int32 of gather_max, for a maximum, or None.
        layout: ``(F, 6)`` int64 with ``spec``.
        lr: one element, or None for the first of ``hyper``.
        step: ``(1,)`` int64, steps taken before this one.
        state1: ``(N, D)``, or ``(N,)`` for a value a row, or flat with ``spec``; or None.
        state2: likewise.
        spec: of a TableLayout; empty for one table.
        padding_idx: see above.
        mean: see above.
        drop: see above.
        algorithm: the optimizer's code.
        hyper: its numbers.
        seed: of the stochastic rounding.

    Raises:
        IndexError: an id of a bag lies outside its table and is not to be dropped.
        ValueError: ``offsets`` do not ascend within ``[0, L]``, or a weight that counts is NaN.
    """
    dout = as_kernel_dtype(table, dout)
    _flat, lists = bags(index, offsets, None, padding_idx, layout)
    weights = None if weights is None else weights.reshape(-1).contiguous()
    if lr is not None:
        hyper = [float(lr), *hyper[1:]]
    if spec:
        num_rows = max(row + rows for row, rows in zip(spec[1::6], spec[2::6], strict=True))
        sizes = (num_rows, max(spec[3::6]))
    else:
        sizes = tuple(table.shape)
    argmax = None if argmax is None else argmax.contiguous()
    _C.sparse_update(
        flat_matrix(table) if spec else matrix(table),
        _array(state1),
        _array(state2),
        *sizes,
        matrix(dout),
        lists,
        vector(weights),
        0 if argmax is None else argmax.data_ptr(),
        mean,
        drop,
        algorithm,
        list(hyper),
        seed,
        int(step) + 1,
        torch.get_num_threads(),
    )
    step.add_(1)
