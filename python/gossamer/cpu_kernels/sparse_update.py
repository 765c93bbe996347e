"""Launcher of the native optimizer steps on touched rows."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import matrix
from gossamer.cpu_kernels.gather_reduce import as_kernel_dtype, native_bags, native_scales, native_table

if TYPE_CHECKING:
    from gossamer._step_rules import StepRule
    from gossamer.ops.sparse_update import SparseUpdate


@functools.lru_cache(maxsize=64)
def _native_rule(rule: StepRule) -> _C.StepRule:
    return _C.StepRule(**rule._asdict())


def _state(state: torch.Tensor | None, per_row: bool) -> tuple[int, int, bool]:
    """``(pointer, row stride, whether it has a value per row)``; pointer 0 for None."""
    return (0, 0, False) if state is None else (state.data_ptr(), state.stride(0), per_row)


def sparse_update_(args: SparseUpdate) -> None:
    """Take one step on the rows that the bags list; table, states and step change in place.

    Raises:
        IndexError: an id of a bag is outside its table and is not to be dropped.
        ValueError: ``offsets`` do not ascend within ``[0, L]``, or a weight that counts is NaN.
    """
    update, features = args.update, args.bags.features
    dout = as_kernel_dtype(args.table, args.dout)
    argmax = None if args.argmax is None else args.argmax.contiguous()
    lists, _alive = native_bags(args.bags)
    place, num_rows, dim = native_table(args.table, args.bags)
    if args.blocks:
        dim = dout.shape[1]
        num_rows = max(num_rows - dim + 1, 0)
    if features.dim:
        num_rows = max(map(sum, zip(features.row, features.rows, strict=True)))
    rule = update.rule if update.lr is None else update.rule._replace(lr=float(update.lr))
    per_row = rule.row_states
    _C.sparse_update(
        table=place,
        state1=_state(update.state1, per_row[0]),
        state2=_state(update.state2, per_row[1]),
        scales=native_scales(update.scale),
        scale_rate=args.scale_rate,
        num_rows=num_rows,
        dim=dim,
        dout=matrix(dout),
        bags=lists,
        argmax=0 if argmax is None else argmax.data_ptr(),
        rule=_native_rule(rule),
        step=int(update.step) + 1,
        blocks=args.blocks,
        num_threads=torch.get_num_threads(),
    )
    update.step.add_(1)
