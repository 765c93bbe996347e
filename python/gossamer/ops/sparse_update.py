"""The transpose of gather_reduce, fused with an optimizer step on the touched rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import NamedTuple

import torch

from gossamer import _backend
from gossamer._checks import check_number, check_same_device, check_shape, check_strided, check_tensor
from gossamer._numerics import accumulation_dtype
from gossamer._rounding import random_bits, round_stochastically
from gossamer._row_codes import decode, encode, moved_scale, scale_rate, scale_slope, scales_of
from gossamer._step_rules import StepRule
from gossamer.ops._bags import Bags, apply_bounds, check_bags, check_rows, check_values, elements_of_blocks, raises
from gossamer.ops._records import define
from gossamer.ops._step_reference import WHOLE_ROWS, RowSums, step_reference
from gossamer.ops.gather_max import GatherMax, gather_max
from gossamer.ops.gather_reduce_tables import TableLayout, check_tables
from gossamer.optim import SGD, Optimizer


class Update(NamedTuple):
    """An optimizer's rule, and the tensors besides the table that its step changes or reads.

    Attributes:
        rule: the rule with its numbers.
        lr: a one-element tensor that replaces the rule's ``lr``, or None.
        step: ``(1,)`` int64, the steps taken before this one.
        state1: the rule's first state, ``(N, D)``, or ``(N,)`` for a value per row; with features flat, ``(E,)`` or
            ``(N,)``; or None.
        state2: the rule's second state, or None.
        scale: ``(N,)`` or ``(1,)`` float32 factors of rows of codes; or None.
        scale_lr: the learning rate of the scales; 0 if they are not trained.
    """

    rule: StepRule
    lr: torch.Tensor | None
    step: torch.Tensor
    state1: torch.Tensor | None
    state2: torch.Tensor | None
    scale: torch.Tensor | None = None
    scale_lr: float = 0.0


class SparseUpdate(NamedTuple):
    """Arguments of a step on the rows that bags list.

    Attributes:
        table: ``(N, D)`` float, or int8 or int16 with a scale; with features the flat storage of their tables.
        bags: the lists whose reduction is differentiated.
        dout: ``(B, D)`` float, the gradient of the result; with features ``(B, ΣD_f)``.
        argmax: for a maximum, its positions from gather_max; else None.
        update: the step.
        blocks: whether ids name the first of D consecutive elements of an array ``(M, 1)``, each a row of the rule.
    """

    table: torch.Tensor
    bags: Bags
    dout: torch.Tensor
    argmax: torch.Tensor | None
    update: Update
    blocks: bool = False

    @property
    def scale_rate(self) -> float:
        """The change of a code row's scale for a slope of one."""
        update, (rows, dim) = self.update, self.dout.shape
        return scale_rate(update.scale_lr, rows, dim, self.table.dtype) if update.scale_lr else 0.0


@functools.cache
def _kernels(backend: str) -> ModuleType:
    if backend == "native":
        from gossamer.cpu_kernels import sparse_update
    else:
        from gossamer.triton_kernels import sparse_update
    return sparse_update


def _contributions(
    bags: Bags, dout: torch.Tensor, argmax: torch.Tensor | None, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The contributing ids of one table, in position order, and each one's part of its row's gradient."""
    wide = accumulation_dtype(dout.dtype)
    kept = bags.live(num_rows).nonzero().squeeze(1)
    bag = bags.numbers()[kept]
    values = dout[bag].to(wide)
    if bags.weights is not None:
        values = values * bags.weights.reshape(-1)[kept].to(wide).unsqueeze(1)
    if bags.mode == "mean":
        values = values / torch.bincount(bag, minlength=bags.num_bags)[bag].unsqueeze(1)
    if argmax is not None:
        position = (kept - bags.begins()[bag]).unsqueeze(1)
        values = torch.where(argmax[bag] == position, values, 0)
    return bags.index.reshape(-1)[kept].long(), values


def _step_rows(table, states, ids, values, first_row, update: Update, rate: float = 0.0) -> None:
    """Sum ``values (n, D)`` by ``ids (n,)`` and take the step on those rows of ``table (N, D)`` and its states."""
    wide = accumulation_dtype(table.dtype)
    rows, inverse = torch.unique(ids, return_inverse=True)
    grad = torch.zeros(rows.shape[0], table.shape[1], dtype=wide, device=table.device)
    grad.index_add_(0, inverse, values.to(wide))
    _step_distinct_rows(table, states, rows, grad, first_row, update, rate=rate)


def _step_distinct_rows(
    table,
    states,
    rows,
    grad,
    first_row,
    update: Update,
    first_column: int = 0,
    sums: RowSums = WHOLE_ROWS,
    rate: float = 0.0,
) -> None:
    """Take the step on distinct ``rows (n,)`` whose gradients are ``grad (n, D)``."""
    rule, t, wide = update.rule, update.step + 1, accumulation_dtype(table.dtype)
    lr = rule.lr if update.lr is None else update.lr.to(wide)
    before = [state[rows] for state in states if state is not None]
    bits = None
    if rule.rounds(table.dtype):
        bits = random_bits(rule.seed, t, rows + first_row, first_column + grad.shape[1])[:, first_column:]
    new = decode(table[rows], update.scale, rows, wide)
    new, *after = step_reference(rule, new, grad, before, t, lr, sums)
    if update.scale is not None:
        scale = scales_of(update.scale, rows)
        if rate:
            update.scale[rows] = moved_scale(scale.squeeze(1), scale_slope(new, grad, scale, table.dtype), rate)
            scale = scales_of(update.scale, rows)
        new = encode(new, scale, table.dtype, bits)
    elif bits is not None:
        new = round_stochastically(new, bits, table.dtype)
    table[rows] = new.to(table.dtype)
    for state, value in zip(states, after, strict=False):
        state[rows] = value


def sparse_update_reference_(args: SparseUpdate) -> None:
    """:func:`sparse_update_` or :func:`sparse_update_tables_` in plain torch."""
    table, bags, update = args.table, args.bags, args.update
    states = (update.state1, update.state2)
    if not bags.features.dim:
        lists = _contributions(bags, args.dout, args.argmax, table.shape[0])
        _step_rows(table, states, *lists, 0, update, args.scale_rate)
        update.step.add_(1)
        return
    found: dict[tuple, list] = {}
    for (feature, part), own in zip(bags.features.tables(table), bags.of_features(), strict=True):
        if feature.rows:
            columns = args.dout[:, feature.column : feature.column + feature.dim]
            # Tables without rows share their first element with the next table, so they are skipped.
            of_table = found.setdefault((feature.element, feature.row), [feature, part])
            of_table.append(_contributions(own, columns, None, feature.rows))
    for feature, part, *lists in found.values():
        parts = [
            None
            if state is None
            else state[feature.row : feature.row + feature.rows]
            if per_row
            else state[feature.element : feature.element + part.numel()].view(part.shape)
            for state, per_row in zip(states, update.rule.row_states, strict=True)
        ]
        ids, values = (torch.cat(part) for part in zip(*lists, strict=True))
        _step_rows(part, parts, ids, values, feature.row, update)
    update.step.add_(1)


def _update(args: SparseUpdate, backend: str) -> None:
    if args.blocks and not (backend == "native" and args.table.stride(0) == 1):
        bags, dout = elements_of_blocks(args.bags, args.dout)
        args = args._replace(bags=bags, dout=dout, blocks=False)
    if backend == "reference":
        if raises(args.bags.index, backend):
            check_values(args.bags, args.table.shape[0])
        sparse_update_reference_(args)
    else:
        _kernels(backend).sparse_update_(args)


def _update_fake(args: SparseUpdate) -> None:
    return None


update_rows_ = define(
    "sparse_update_",
    SparseUpdate,
    kernel=_update,
    fake=_update_fake,
    returns="()",
    mutates=("table", "update.step", "update.state1", "update.state2", "update.scale"),
)


def sum_blocks(bags: Bags, dout: torch.Tensor, table: torch.Tensor, backend: str) -> torch.Tensor:
    """The gradient of an array ``(M, 1)``, given ``dout (B, D)`` and bags that list the first elements of D-blocks."""
    total = torch.zeros(table.shape, dtype=accumulation_dtype(table.dtype), device=table.device)
    step = torch.zeros(1, dtype=torch.int64, device=table.device)
    # One step of plain gradient descent from zero with a learning rate of −1 leaves the gradient itself.
    update = Update(SGD(lr=1.0).step_rule()._replace(lr=-1.0), None, step, None, None)
    update_rows_(SparseUpdate(total, bags, dout, None, update, True), backend)
    return total.to(table.dtype)


def check_state(
    optimizer: Optimizer,
    state: Mapping[str, torch.Tensor],
    table: torch.Tensor,
    layout: TableLayout | None = None,
    scale: torch.Tensor | None = None,
    scale_lr: float = 0.0,
) -> Update:
    """Check that ``state`` holds what ``optimizer`` needs for a step on ``table``; and check ``scale_lr``."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a gossamer.optim.Optimizer, got {type(optimizer).__name__}")
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping of names to tensors, got {type(state).__name__}")
    kinds = optimizer.state_kinds()
    if set(state) != {"step", *kinds}:
        name = type(optimizer).__name__
        raise ValueError(f"state of {name} must hold {['step', *kinds]}, got {list(state)}")
    wide = accumulation_dtype(table.dtype)
    step = state["step"]
    check_tensor("state['step']", step)
    if step.dtype != torch.int64 or step.shape != (1,):
        raise TypeError(f"state['step'] must be int64 of shape (1,), got {step.dtype} {tuple(step.shape)}")
    found = []
    for name, kind in kinds.items():
        tensor = state[name]
        if layout is None:
            expected = tuple(table.shape) if kind == "full" else (table.shape[0],)
        else:
            expected = (layout.num_elements,) if kind == "full" else (layout.num_rows,)
        check_shape(f"state[{name!r}]", tensor, expected, "that of the table" if kind == "full" else "one value a row")
        if tensor.dtype != wide:
            raise TypeError(f"state[{name!r}] must be {wide} for a table of {table.dtype}, got {tensor.dtype}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"state[{name!r}] must have the layout torch.strided, got {tensor.layout}")
        if tensor.shape[0] > 1 and tensor.stride(0) < (tensor.shape[1] if tensor.dim() == 2 else 1):
            raise ValueError(f"state[{name!r}] must have rows that do not overlap, got strides {tensor.stride()}")
        if layout is not None and not tensor.is_contiguous():
            raise ValueError(f"state[{name!r}] must be contiguous")
        if tensor.dim() == 2 and tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise ValueError(f"state[{name!r}] must have unit column stride, got strides {tensor.stride()}")
        found.append(tensor)
    lr = optimizer.lr.detach().reshape(1) if isinstance(optimizer.lr, torch.Tensor) else None
    check_same_device(table=table, lr=lr, **{f"state[{name!r}]": t for name, t in state.items()})
    found += [None, None]
    _check_scale_lr(scale_lr, scale, table)
    return Update(optimizer.step_rule(), lr, step, found[0], found[1], scale, float(scale_lr))


def _check_scale_lr(scale_lr: float, scale: torch.Tensor | None, table: torch.Tensor) -> None:
    check_number("scale_lr", scale_lr)
    if not 0 <= scale_lr < math.inf:
        raise ValueError(f"scale_lr must be in [0, inf), got {scale_lr}")
    if not scale_lr:
        return
    if scale is None or scale.shape[0] != table.shape[0] or (scale.shape[0] > 1 and scale.stride(0) < 1):
        found = "no scale" if scale is None else f"shape {tuple(scale.shape)} with stride {scale.stride()}"
        raise ValueError(f"scale must hold a value a row where scale_lr is not 0, got {found}")


def check_updatable(name: str, table: torch.Tensor) -> None:
    """Check that a table to be stepped requires no gradient and that its elements do not overlap."""
    if table.requires_grad:
        raise ValueError(f"{name} must not require a gradient: the step is taken in place of one")
    check_strided(name, table)
    if table.dim() == 2 and (
        (table.stride(1) != 1 and table.shape[1] > 1) or (table.stride(0) < table.shape[1] and table.shape[0] > 1)
    ):
        raise ValueError(f"{name} must have unit column stride and rows that do not overlap, got {table.stride()}")


def _check_dout(dout, shape, table):
    check_tensor("dout", dout)
    check_shape("dout", dout, shape, "that of the result")
    if not dout.is_floating_point() or (dout.dtype == torch.float64) != (table.dtype == torch.float64):
        raise TypeError(f"dout must be floating, and float64 for a float64 table alone, got {dout.dtype}")
    check_same_device(table=table, dout=dout)


def sparse_update_(
    table: torch.Tensor,
    index: torch.Tensor,
    dout: torch.Tensor,
    offsets: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    *,
    optimizer: Optimizer,
    state: Mapping[str, torch.Tensor],
    mode: str = "sum",
    padding_idx: int | None = None,
    include_last_offset: bool = True,
    bounds: str = "raise",
    bounds_count: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    scale_lr: float = 0.0,
) -> None:
    """Take one optimizer step, in place, on the rows of ``table`` that :func:`gather_reduce` read.

    A row's gradient is ``G = Σ weights·dout[b]`` over its occurrences (for a mean over the bag's ids that contribute;
    for a maximum in the columns where it was the first largest). Duplicates are summed first, in position order in
    pieces of fixed size whose sums are then added in order, so the result is the same on every run and for any number
    of threads. Each touched row then gets exactly one step. No ``(L, D)`` gradient is formed, and no untouched row is
    read or written. A row is touched where a bag lists it, even if its gradient is zero.

    With ``scale``, a row of codes q is read as ``w = Δ·q`` with the row's scale Δ, stepped to w' in float32, and
    written as the codes of ``clip(w'/Δ)``, rounded to nearest or, with ``stochastic_rounding``, such that the expected
    value is exact (:mod:`gossamer._row_codes`). With ``scale_lr`` η_Δ the row's scale moves first, as in ALPT: ``Δ ←
    max(Δ − η_Δ/√(B·D·(2^(bits−1)−1))·Σ_j G_j·δ_j, 2⁻²⁰)``, where ``δ_j = round(w'_j/Δ) − w'_j/Δ``, or the end of the
    range beyond which ``w'_j/Δ`` lies.

    Args:
        table: ``(N, D)`` float, or int8 or int16 with ``scale``; not requiring a gradient; rows may have any stride,
            columns must be contiguous.
        index: as for :func:`gather_reduce`.
        dout: ``(B, D)``, the gradient of the result, of any floating dtype (float64 for a float64 table alone).
        offsets: as for :func:`gather_reduce`.
        weights: as for :func:`gather_reduce`.
        optimizer: one of :mod:`gossamer.optim`.
        state: what ``optimizer.state(N, D, device)`` made; updated in place, its ``"step"`` by one.
        mode: as for :func:`gather_reduce`; for a maximum the table must still hold the values of the forward pass.
        padding_idx: as for :func:`gather_reduce`.
        include_last_offset: as for :func:`gather_reduce`.
        bounds: as for :func:`gather_reduce`.
        bounds_count: as for :func:`gather_reduce`.
        scale: as for :func:`gather_reduce`; updated in place if it is trained.
        scale_lr: η_Δ; above 0 it needs a scale per row.

    Raises:
        TypeError: an argument is not a tensor, a dtype is not supported or does not fit the table.
        ValueError: ranks, sizes, devices, modes, offsets or the state do not fit; on the CPU, a weight that counts is
            NaN.
        IndexError: on the CPU, an id outside ``[0, N)`` with ``bounds="raise"``. On any error table and state are
            unchanged.
    """
    how = (mode, padding_idx, include_last_offset, bounds, bounds_count)
    step_bags_(table, index, dout, offsets, weights, None, optimizer, state, *how, scale, scale_lr)


def step_rows_(
    table: torch.Tensor,
    rows: torch.Tensor,
    gradient: torch.Tensor,
    *,
    optimizer: Optimizer,
    state: Mapping[str, torch.Tensor],
    columns: int | None = None,
    first_column: int = 0,
    sum_over: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Take one optimizer step, in place, on distinct rows whose summed gradients are known; in plain torch.

    ``table`` may be some columns of a wider one. Values that a rule computes over whole rows (mean squares of row-wise
    states, norms for clipping and trust ratios) are then completed by ``sum_over``.

    Args:
        table: ``(N, D)`` float, not requiring a gradient.
        rows: ``(n,)`` int64, distinct and within ``[0, N)``.
        gradient: ``(n, D)``, of the dtype that the table is accumulated in.
        optimizer: one of :mod:`gossamer.optim`.
        state: what ``optimizer.state(N, D, device)`` made; updated in place, its ``"step"`` by one.
        columns: number of columns of the wide table; D by default.
        first_column: position of ``table``'s first column in the wide table, which stochastic rounding depends on.
        sum_over: takes sums ``(n,)`` over the local columns, and returns the sums over all columns.

    Raises:
        TypeError: an argument is not a tensor, or a dtype does not fit the table.
        ValueError: sizes, devices or the state do not fit.
    """
    check_tensor("table", table)
    check_rows(table, None, _backend.resolve("sparse_update", table))
    check_updatable("table", table)
    check_shape("gradient", gradient, (rows.shape[0], table.shape[1]), "(n, D)")
    wide = accumulation_dtype(table.dtype)
    if gradient.dtype != wide:
        raise TypeError(f"gradient must be {wide} for a table of {table.dtype}, got {gradient.dtype}")
    check_same_device(table=table, rows=rows, gradient=gradient)
    update = check_state(optimizer, state, table)
    sums = RowSums(table.shape[1] if columns is None else columns, sum_over)
    _step_distinct_rows(table, (update.state1, update.state2), rows, gradient, 0, update, first_column, sums)
    update.step.add_(1)


def step_bags_(
    table,
    index,
    dout,
    offsets,
    weights,
    argmax,
    optimizer,
    state,
    mode,
    padding_idx=None,
    include_last_offset=True,
    bounds="raise",
    bounds_count=None,
    scale=None,
    scale_lr=0.0,
) -> None:
    """:func:`sparse_update_`, for a maximum with the positions that the forward pass found, or None."""
    check_tensor("table", table)
    backend = _backend.resolve("sparse_update", table)
    lists, how = (index, offsets, weights), (mode, padding_idx, include_last_offset, bounds, bounds_count)
    bags = check_bags(table, *lists, backend, *how, scale)
    check_updatable("table", table)
    _check_dout(dout, (bags.num_bags, table.shape[1]), table)
    update = check_state(optimizer, state, table, scale=scale, scale_lr=scale_lr)
    bags = apply_bounds(bags, table.shape[0], bounds, bounds_count, backend)
    if mode == "max" and argmax is None:
        argmax = gather_max(GatherMax(table, bags, table.dtype, True), backend)[1]
    _step(table, bags, dout, argmax, update, backend)


def _step(table, bags: Bags, dout, argmax, update: Update, backend: str) -> None:
    if bags.weights is not None:
        bags = bags._replace(weights=bags.weights.detach())
    update_rows_(SparseUpdate(table, bags, dout.detach(), argmax, update), backend)


def sparse_update_tables_(
    storage: torch.Tensor,
    layout: TableLayout,
    index: torch.Tensor,
    dout: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    optimizer: Optimizer,
    state: Mapping[str, torch.Tensor],
    bounds: str = "raise",
    bounds_count: torch.Tensor | None = None,
) -> None:
    """:func:`sparse_update_` for the tables of :func:`gather_reduce_tables`, in one launch.

    A row that several features read gets one step with the sum of their gradients.

    Args:
        storage: ``(E,)`` float, contiguous, not requiring a gradient.
        layout: the tables and features.
        index: ``(L,)``, as for :func:`gather_reduce_tables`.
        dout: ``(B, ΣD_f)``, the gradient of its result.
        offsets: as for :func:`gather_reduce_tables`.
        weights: as for :func:`gather_reduce_tables`.
        optimizer: one of :mod:`gossamer.optim`, for all tables.
        state: what ``layout.state(optimizer, device)`` made; updated in place.
        bounds: as for :func:`gather_reduce_tables`.
        bounds_count: as for :func:`gather_reduce_tables`.

    Raises:
        TypeError: as :func:`sparse_update_` does.
        ValueError: as it does.
        IndexError: as it does.
    """
    check_tensor("storage", storage)
    backend = _backend.resolve("sparse_update", storage)
    bags = check_tables(storage, layout, index, offsets, weights, backend, bounds, bounds_count)
    check_updatable("storage", storage)
    _check_dout(dout, (bags.num_bags, layout.total_dim), storage)
    _step(storage, bags, dout, None, check_state(optimizer, state, storage, layout), backend)
