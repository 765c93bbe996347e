"""Gradients of composed vectors: of the rows that compose them, as lists that name each row, and of weights."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch

from gossamer._numerics import accumulation_dtype, rows_dtype
from gossamer.ops._bags import Bags, bags_of_columns, elements_of_blocks
from gossamer.ops._records import define
from gossamer.ops.composed_rows import Parts, combine_rows, counts_of, live_positions, part_rows, rows_or_blocks
from gossamer.ops.gather_reduce import table_gradient
from gossamer.ops.sparse_update import sum_blocks

if TYPE_CHECKING:
    from gossamer.ops.gather_compose import GatherCompose

# Tables of at most this many elements stay in the caches while the gradient is summed, so ids need no sorting by row.
SMALL_TABLE = 1 << 16


class ComposeGradient(NamedTuple):
    """Arguments of the gradients of composed vectors.

    Attributes:
        dout: ``(B, D)`` of the accumulator's dtype.
        table: ``(M, C)``; values are read for factors and weights.
        bags: the lists of ids.
        parts: what an id's vector is composed of.
        factors: whether the gradients of a product's factors are wanted.
        weights: whether the gradients of the bags' weights are wanted; the weights are left out of ``bags``.
    """

    dout: torch.Tensor
    table: torch.Tensor
    bags: Bags
    parts: Parts
    factors: bool
    weights: bool


class RowSums(NamedTuple):
    """Arguments of the gradients of all rows of a small table.

    Attributes:
        dout: ``(B, D)`` of the accumulator's dtype.
        table: ``(M, C)``.
        bags: the lists of ids.
        parts: what an id's vector is composed of, rows.
    """

    dout: torch.Tensor
    table: torch.Tensor
    bags: Bags
    parts: Parts


@functools.cache
def _kernels(backend: str) -> ModuleType:
    if backend == "native":
        from gossamer.cpu_kernels import gather_compose as gather_compose_gradient
    else:
        from gossamer.triton_kernels import gather_compose_gradient
    return gather_compose_gradient


def compose_gradient_reference(args: ComposeGradient) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The ``(L, P)`` rows, first elements or elements that :attr:`Parts.listed` counts, −1 at positions that contribute
    nothing, and the gradients of factors and of weights, in plain torch.
    """
    bags, parts, table = args.bags, args.parts, args.table
    live, wide = live_positions(bags, parts), args.dout.dtype
    ids = torch.where(live, bags.index.reshape(-1).long(), 0)
    listed = rows_or_blocks(ids, parts) if parts.whole_blocks else part_rows(ids, parts, table.shape[0])
    shown = listed.masked_fill(~live.unsqueeze(1), -1).to(rows_dtype(table.shape[0]))
    if not (args.factors or args.weights):
        return shown, None, None
    rows = part_rows(ids, parts, table.shape[0])
    bag = bags.numbers().clamp(max=max(bags.num_bags - 1, 0))
    dout = args.dout[bag] if bags.num_bags else args.dout.new_zeros(len(ids), parts.dim)
    if bags.mode == "mean":
        dout = dout / counts_of(bags, live, wide)[bag].unsqueeze(1)
    dout = dout.masked_fill(~live.unsqueeze(1), 0)
    found = table[rows].to(wide)
    if args.weights:
        return shown, None, (combine_rows(found, parts) * dout).sum(1)
    if bags.weights is not None:
        dout = dout * bags.weights.reshape(-1).to(wide).masked_fill(~live, 0).unsqueeze(1)
    others = [found[:, [k for k in range(rows.shape[1]) if k != part]].prod(1) for part in range(rows.shape[1])]
    return shown, dout.unsqueeze(1) * torch.stack(others, 1), None


def _gradient(args: ComposeGradient, backend: str) -> tuple:
    if backend == "reference":
        return compose_gradient_reference(args)
    if backend == "native":
        return _kernels(backend).compose_gradient(args)
    bags = args.bags
    counts = counts_of(bags, live_positions(bags, args.parts), args.dout.dtype) if bags.mode == "mean" else None
    return _kernels(backend).compose_gradient(args, counts)


def _gradient_fake(args: ComposeGradient) -> tuple:
    count, parts, dout = args.bags.index.numel(), args.parts, args.dout
    rows = dout.new_empty(count, parts.listed, dtype=rows_dtype(args.table.shape[0]))
    factors = dout.new_empty(count, parts.maps.count, parts.dim) if args.factors else None
    return rows, factors, dout.new_empty(count) if args.weights else None


_compose_gradient = define(
    "compose_gradient",
    ComposeGradient,
    kernel=_gradient,
    fake=_gradient_fake,
    returns="(Tensor rows, Tensor factors, Tensor weights)",
)


def rows_of_positions(bags: Bags, parts: Parts, table: torch.Tensor, backend: str) -> torch.Tensor:
    """The rows ``(L, H)`` of all positions, −1 where they contribute nothing."""
    none = table.new_empty(0, parts.dim, dtype=accumulation_dtype(table.dtype))
    return _compose_gradient(ComposeGradient(none, table.detach(), bags, parts, False, False), backend)[0]


def _gradient_parts(args: ComposeGradient, backend: str) -> tuple:
    """:func:`compose_gradient_reference` by a kernel, or itself where a graph of the backward pass is recorded."""
    if torch.is_grad_enabled() and (args.factors or args.weights):
        return compose_gradient_reference(args)
    return _compose_gradient(args, backend)


def _sum_rows(args: RowSums, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient ``(M, C)`` of each row, and the rows' numbers ``(M,)``, −1 where no position contributes."""
    if backend == "native":
        return _kernels(backend).row_sums(args)
    bags, values = _listed_gradients(args.table, args.bags, args.parts, args.dout, backend)
    count = args.table.shape[0]
    sums = table_gradient(bags, values, args.table.shape, args.dout.dtype, backend)
    found = bags.index.reshape(-1).long()
    touched = torch.zeros(count + 1, dtype=torch.bool, device=found.device)
    touched = touched.index_fill(0, torch.where(found < 0, count, found), True)[:-1]
    return sums, torch.where(touched, torch.arange(count, device=found.device), -1).int()


def _sum_rows_fake(args: RowSums) -> tuple[torch.Tensor, torch.Tensor]:
    table = args.table
    return table.new_empty(table.shape, dtype=args.dout.dtype), table.new_empty(table.shape[0], dtype=torch.int32)


_row_sums = define(
    "compose_row_sums", RowSums, kernel=_sum_rows, fake=_sum_rows_fake, returns="(Tensor sums, Tensor rows)"
)


def _sums_rows(args: GatherCompose, backend: str) -> bool:
    """Whether the table is small, and the lists long enough, for its gradient to be summed as a whole."""
    small = args.table.numel() <= SMALL_TABLE and args.table.shape[0] <= args.bags.index.numel() * args.parts.maps.count
    return backend == "native" and small and not args.parts.block and not torch.is_grad_enabled()


def row_gradients(args: GatherCompose, dout: torch.Tensor, backend: str) -> tuple[Bags, torch.Tensor]:
    """The table's gradient in the form of a sum over bags of its rows: the lists, and one gradient per bag.

    For whole blocks the lists hold their first elements; for a small table, each row at most once.
    """
    if _sums_rows(args, backend):
        wide = accumulation_dtype(args.table.dtype)
        sums, rows = _row_sums(RowSums(dout.to(wide), args.table, args.bags, args.parts), backend)
        return Bags(rows.unsqueeze(1), drop=True), sums
    return _listed_gradients(args.table, args.bags, args.parts, dout, backend)


def _listed_gradients(
    table: torch.Tensor, bags: Bags, parts: Parts, dout: torch.Tensor, backend: str
) -> tuple[Bags, torch.Tensor]:
    """:func:`row_gradients` with one id listed for each row, element or block that a position reads."""
    wide, mul = accumulation_dtype(table.dtype), parts.operation == "mul"
    dout = dout.to(wide)
    rows, factors, _ = _gradient_parts(ComposeGradient(dout, table, bags, parts, mul, False), backend)
    drop = bags.drop or bags.offsets is not None or bags.padding_idx >= 0 or backend != "native"
    if mul:
        return Bags(rows.reshape(-1, 1), drop=drop), factors.flatten(0, 1)
    if bags.mode == "mean":
        dout = dout / counts_of(bags, rows[:, 0] >= 0, wide).unsqueeze(1)
    times, weights = parts.listed, bags.weights
    if parts.operation != "add":
        return bags_of_columns(bags, rows, dout, drop)
    if bags.offsets is None:
        count, length = bags.index.shape
        weights = None if weights is None else weights.repeat_interleave(times, 1)
        return Bags(rows.view(count, length * times), weights=weights, drop=drop), dout
    weights = None if weights is None else weights.repeat_interleave(times)
    return Bags(rows.flatten(), bags.offsets.long() * times, weights, drop=drop), dout


def composed_table_gradient(args: GatherCompose, dout: torch.Tensor, backend: str) -> torch.Tensor:
    """The gradient of the table, given that of the result."""
    table = args.table
    bags, values = row_gradients(args, dout, backend)
    if _sums_rows(args, backend):
        return values.to(table.dtype)
    if args.parts.whole_blocks:
        return _block_gradient(bags, values, table, backend)
    return table_gradient(bags, values, table.shape, table.dtype, backend)


def _block_gradient(bags: Bags, dout: torch.Tensor, table: torch.Tensor, backend: str) -> torch.Tensor:
    """The gradient of an array ``(M, 1)`` from lists of first elements of blocks of D and ``dout (B, D)``."""
    if torch.is_grad_enabled():
        return table_gradient(*elements_of_blocks(bags, dout), table.shape, table.dtype, backend)
    return sum_blocks(bags, dout, table, backend)


def weight_gradients(args: GatherCompose, dout: torch.Tensor, backend: str) -> torch.Tensor:
    """The gradient of the bags' weights, shaped like them."""
    weights, bags = args.bags.weights, args.bags._replace(weights=None)
    dout = dout.to(accumulation_dtype(args.table.dtype))
    found = _gradient_parts(ComposeGradient(dout, args.table, bags, args.parts, False, True), backend)[2]
    return found.to(weights.dtype).view(weights.shape)
