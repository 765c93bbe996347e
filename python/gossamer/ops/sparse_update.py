"""The transpose of gather_reduce fused with an optimizer's step on the touched rows alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from gossamer import _backend
from gossamer._checks import check_same_device, check_shape, check_tensor
from gossamer._numerics import accumulation_dtype
from gossamer._rounding import random_bits, round_stochastically
from gossamer.ops._bags import (
    apply_bounds,
    bag_begins,
    bags_of,
    check_bags,
    check_bounds,
    live_ids,
    num_bags_of,
    raises,
)
from gossamer.ops._registration import register
from gossamer.ops.gather_reduce import _gather_max, check_values
from gossamer.ops.gather_reduce_tables import (
    COLUMN,
    DIM,
    ELEMENT,
    POOLING,
    ROW,
    ROWS,
    TableLayout,
    check_tables,
    features,
)
from gossamer.ops.gather_reduce_tables import check_values as check_tables_values
from gossamer.optim import (
    ADAGRAD,
    FTRL_RULE,
    LAMB_RULE,
    PARTIAL_ROWWISE_ADAM,
    ROWWISE_ADAGRAD,
    SGD_RULE,
    Hyper,
    Optimizer,
)


def _contributions(index, dout, offsets, weights, argmax, padding_idx, mean, num_rows):
    """Ids of one table that contribute, in position order, and what each adds to its row's gradient."""
    wide = accumulation_dtype(dout.dtype)
    flat = index.reshape(-1).long()
    num_bags = num_bags_of(index, offsets)
    bag = bags_of(index, offsets)
    kept = (live_ids(flat, num_rows, None, padding_idx) & (bag < num_bags)).nonzero().squeeze(1)
    bag = bag[kept]
    values = dout[bag].to(wide)
    if weights is not None:
        values = values * weights.reshape(-1)[kept].to(wide).unsqueeze(1)
    if mean:
        values = values / torch.bincount(bag, minlength=num_bags)[bag].unsqueeze(1)
    if argmax is not None:
        position = (kept - bag_begins(index, offsets)[bag]).unsqueeze(1)
        values = torch.where(argmax[bag] == position, values, 0)
    return flat[kept], values


def _step_rows(table, state1, state2, ids, values, first_row, t, lr, algorithm, hyper, seed):
    """Sum ``values (n, D)`` by ``ids (n,)`` and take the step on those rows of ``table (N, D)`` and its states."""
    rows, inverse = torch.unique(ids, return_inverse=True)
    wide = accumulation_dtype(table.dtype)
    grad = torch.zeros(rows.shape[0], table.shape[1], dtype=wide, device=table.device)
    grad.index_add_(0, inverse, values.to(wide))
    states = [None if s is None else s[rows] for s in (state1, state2)]
    new, *states = step_reference(table[rows].to(wide), grad, *states, t, lr, algorithm, hyper)
    if hyper.stochastic_rounding and table.dtype in (torch.float16, torch.bfloat16):
        new = round_stochastically(new, random_bits(seed, t, rows + first_row, new.shape[1]), table.dtype)
    table[rows] = new.to(table.dtype)
    for state, value in zip((state1, state2), states, strict=True):
        if state is not None:
            state[rows] = value


def step_reference(
    w: torch.Tensor,
    grad: torch.Tensor,
    state1: torch.Tensor | None,
    state2: torch.Tensor | None,
    t: torch.Tensor,
    lr: torch.Tensor | float,
    algorithm: int,
    hyper: Hyper,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """One step of an optimizer of :mod:`gossamer.optim` in plain torch, in the dtype of its arguments.

    Args:
        w: ``(n, D)`` rows.
        grad: ``(n, D)``, their summed gradients.
        state1: the first state tensor's rows, ``(n, D)`` or ``(n,)``, or None.
        state2: the second's.
        t: one int64 element, the number of this step, from 1.
        lr: η.
        algorithm: the optimizer's code.
        hyper: its numbers.

    Returns:
        The new rows and states.
    """
    if math.isfinite(hyper.clip_value):
        grad = grad.clamp(-hyper.clip_value, hyper.clip_value)
    if math.isfinite(hyper.clip_norm):
        norm = grad.norm(dim=1, keepdim=True)
        grad = grad * torch.where(norm > hyper.clip_norm, hyper.clip_norm / norm, 1)
    if hyper.decoupled and algorithm != LAMB_RULE:
        w = w * (1 - lr * hyper.weight_decay)
    elif algorithm != LAMB_RULE:
        grad = grad + hyper.weight_decay * w
    if algorithm == SGD_RULE:
        if state1 is not None:
            state1 = hyper.beta1 * state1 + grad
            grad = grad + hyper.beta1 * state1 if hyper.nesterov else state1
        return w - lr * grad, state1, None
    if algorithm == ADAGRAD:
        state1 = state1 + grad.square()
        return w - lr * grad / (state1.sqrt() + hyper.eps), state1, None
    if algorithm == ROWWISE_ADAGRAD:
        state1 = state1 + grad.square().mean(1)
        return w - lr * grad / (state1.sqrt() + hyper.eps).unsqueeze(1), state1, None
    if algorithm == FTRL_RULE:
        steps = torch.as_tensor(lr, device=w.device) != 0
        lr = torch.where(steps, lr, 1)
        n = state1 + grad.square()
        z = state2 + grad - (n.sqrt() - state1.sqrt()) / lr * w
        shrunk = -(z - z.sign() * hyper.l1) / ((hyper.beta1 + n.sqrt()) / lr + hyper.l2)
        new = torch.where(z.abs() <= hyper.l1, 0, shrunk), n, z
        return tuple(torch.where(steps, after, before) for after, before in zip(new, (w, state1, state2), strict=True))
    m = hyper.beta1 * state1 + (1 - hyper.beta1) * grad
    square = grad.square().mean(1) if algorithm == PARTIAL_ROWWISE_ADAM else grad.square()
    v = hyper.beta2 * state2 + (1 - hyper.beta2) * square
    correction1, correction2 = 1 - hyper.beta1 ** t.double(), 1 - hyper.beta2 ** t.double()
    denominator = v.sqrt() / correction2.sqrt().to(v.dtype) + hyper.eps
    if algorithm == PARTIAL_ROWWISE_ADAM:
        denominator = denominator.unsqueeze(1)
    q = m / correction1.to(m.dtype) / denominator
    if algorithm == LAMB_RULE:
        q = q + hyper.weight_decay * w
        norm_w, norm_q = w.norm(dim=1, keepdim=True), q.norm(dim=1, keepdim=True)
        q = q * torch.where((norm_w > 0) & (norm_q > 0), norm_w / norm_q, 1)
    return w - lr * q, m, v


def sparse_update_reference_(
    table,
    index,
    dout,
    offsets,
    weights,
    argmax,
    lr,
    step,
    state1,
    state2,
    spec,
    padding_idx,
    mean,
    algorithm,
    hyper,
    seed,
):
    """:func:`sparse_update_`, or with ``spec`` :func:`sparse_update_tables_`, in plain torch."""
    hyper = Hyper(*hyper)
    t = step + 1
    lr = hyper.lr if lr is None else lr.to(accumulation_dtype(table.dtype))
    rule = (t, lr, algorithm, hyper, seed)
    if spec is None:
        lists = _contributions(index, dout, offsets, weights, argmax, padding_idx, mean, table.shape[0])
        _step_rows(table, state1, state2, *lists, 0, *rule)
        step.add_(1)
        return
    found: dict[int, list] = {}
    for _, bags, row in features(table, offsets, spec):
        if not row[ROWS]:
            continue
        part = dout[:, row[COLUMN] : row[COLUMN] + row[DIM]]
        lists = _contributions(index, part, bags, weights, None, -1, bool(row[POOLING]), row[ROWS])
        # A table without rows begins where the next one does.
        found.setdefault(tuple(row[:COLUMN]), [row]).append(lists)
    for row, *lists in found.values():
        first, rows, dim = row[ROW], row[ROWS], row[DIM]
        parts = [
            None
            if s is None
            else s[first : first + rows]
            if is_row_state(algorithm, i)
            else s[row[ELEMENT] : row[ELEMENT] + rows * dim].view(rows, dim)
            for i, s in enumerate((state1, state2))
        ]
        ids, values = (torch.cat(part) for part in zip(*lists, strict=True))
        flat = table[row[ELEMENT] : row[ELEMENT] + rows * dim].view(rows, dim)
        _step_rows(flat, *parts, ids, values, first, *rule)
    step.add_(1)


def is_row_state(algorithm: int, position: int) -> bool:
    """Whether the first (0) or second (1) state tensor of an optimizer holds one value a row."""
    return (algorithm, position) in ((ROWWISE_ADAGRAD, 0), (PARTIAL_ROWWISE_ADAM, 1))


def _update(
    table, index, dout, offsets, weights, argmax, layout, lr, step, state1, state2, spec, padding_idx, mean, drop,
    algorithm, hyper, seed, backend,
):  # fmt: skip
    if backend == "reference":
        spec = spec or None
        if raises(index, backend):
            if spec is None:
                check_values(index, offsets, weights, table.shape[0], padding_idx, drop)
            else:
                check_tables_values(spec, index, offsets, weights, drop)
        sparse_update_reference_(
            table, index, dout, offsets, weights, argmax, lr, step, state1, state2, spec, padding_idx, mean, algorithm,
            hyper, seed,
        )  # fmt: skip
    else:
        _backend.kernels(backend, "sparse_update").sparse_update_(
            table, index, dout, offsets, weights, argmax, layout, lr, step, state1, state2, spec, padding_idx, mean,
            drop, algorithm, hyper, seed,
        )  # fmt: skip
    # Whoever saved the table for a gradient is told that it changed.
    torch.autograd.graph.increment_version([t for t in (table, step, state1, state2) if t is not None])


def _update_fake(
    table, index, dout, offsets, weights, argmax, layout, lr, step, state1, state2, spec, padding_idx, mean, drop,
    algorithm, hyper, seed, backend,
):  # fmt: skip
    return None


# `spec` is empty for one table (N, D), else that of a TableLayout, with `layout` its tensor and table a flat storage.
# `lr` overrides the first of `hyper`. `argmax` is that of gather_max, for a maximum.
_sparse_update_ = register(
    "sparse_update_(Tensor(a!) table, Tensor index, Tensor dout, Tensor? offsets, Tensor? weights, Tensor? argmax, "
    "Tensor? layout, Tensor? lr, Tensor(b!) step, Tensor(c!)? state1, Tensor(d!)? state2, int[] spec, int padding_idx, "
    "bool mean, bool drop, int algorithm, float[] hyper, int seed, str backend) -> ()",
    _update,
    _update_fake,
)


def check_state(
    optimizer: Optimizer, state: Mapping[str, torch.Tensor], table: torch.Tensor, layout: TableLayout | None = None
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Check that ``state`` is what ``optimizer`` needs; returns lr (None for a float), step and two states."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a gossamer.optim.Optimizer, got {type(optimizer).__name__}")
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
        if layout is not None and not tensor.is_contiguous():
            raise ValueError(f"state[{name!r}] must be contiguous")
        if tensor.dim() == 2 and tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise ValueError(f"state[{name!r}] must have unit column stride, got strides {tensor.stride()}")
        found.append(tensor)
    lr = optimizer.lr.reshape(1) if isinstance(optimizer.lr, torch.Tensor) else None
    check_same_device(table=table, lr=lr, **{f"state[{name!r}]": t for name, t in state.items()})
    return lr, step, *found, *(None,) * (2 - len(found))


def check_updatable(name: str, table: torch.Tensor) -> None:
    """A table that steps write into must be no part of a graph, and each of its elements must lie somewhere else."""
    if table.requires_grad:
        raise ValueError(f"{name} must not require a gradient: the step is taken in place of one")
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
) -> None:
    """Take one optimizer step, in place, on the rows of ``table`` that :func:`gather_reduce` read.

    A row's gradient is ``G = Σ weights·dout[b]`` over its occurrences (for a mean over the bag's ids that contribute;
    for a maximum in the columns where it was the first largest). Duplicates are summed first, in position order in
    pieces of fixed size whose sums are then added in order, so the result is the same on every run and for any number
    of threads. Each touched row then gets exactly one step. No ``(L, D)`` gradient is formed, and no untouched row is
    read or written. A row is touched where a bag lists it, even if its gradient is zero.

    Args:
        table: ``(N, D)`` float, not requiring a gradient; rows may lie apart, columns not.
        index: as for :func:`gather_reduce`, and so are ``offsets`` to ``bounds_count`` but for what follows.
        dout: ``(B, D)``, the gradient of the result, of any floating dtype (float64 for a float64 table alone).
        offsets: see above.
        weights: see above.
        optimizer: one of :mod:`gossamer.optim`.
        state: what ``optimizer.state(N, D, device)`` made; updated in place, its ``"step"`` by one.
        mode: see above; for a maximum the table must still hold what the forward pass read.
        padding_idx: see above.
        include_last_offset: see above.
        bounds: see above.
        bounds_count: see above.

    Raises:
        TypeError: an argument is no tensor, a dtype is not supported or does not fit the table.
        ValueError: ranks, sizes, devices, modes, offsets or the state do not fit; on the CPU, a weight that counts is
            NaN.
        IndexError: on the CPU, an id outside ``[0, N)`` with ``bounds="raise"``. On any error table and state are
            unchanged.
    """
    step_bags_(
        table,
        index,
        dout,
        offsets,
        weights,
        optimizer=optimizer,
        state=state,
        mode=mode,
        padding_idx=padding_idx,
        include_last_offset=include_last_offset,
        bounds=bounds,
        bounds_count=bounds_count,
    )


def step_bags_(
    table,
    index,
    dout,
    offsets=None,
    weights=None,
    argmax=None,
    *,
    optimizer,
    state,
    mode="sum",
    padding_idx=None,
    include_last_offset=True,
    bounds="raise",
    bounds_count=None,
) -> None:
    """:func:`sparse_update_`, for a maximum with the positions that the forward pass found, or None."""
    check_tensor("table", table)
    backend = _backend.resolve("sparse_update", table)
    index, offsets, weights, padding = check_bags(
        table,
        index,
        offsets,
        weights,
        backend,
        mode=mode,
        padding_idx=padding_idx,
        include_last_offset=include_last_offset,
    )
    check_bounds(bounds, bounds_count, index.device)
    check_updatable("table", table)
    _check_dout(dout, (num_bags_of(index, offsets), table.shape[1]), table)
    lr, step, state1, state2 = check_state(optimizer, state, table)
    index, offsets = apply_bounds(index, offsets, table.shape[0], bounds, bounds_count, backend)
    drop = bounds != "raise"
    if mode == "max" and argmax is None:
        argmax = _gather_max(table, index, offsets, padding, drop, True, table.dtype, backend)[1]
    _sparse_update_(
        table,
        index,
        dout.detach(),
        offsets,
        None if weights is None else weights.detach(),
        argmax,
        None,
        lr,
        step,
        state1,
        state2,
        [],
        padding,
        mode == "mean",
        drop,
        optimizer.algorithm,
        list(optimizer.hyper()),
        optimizer.seed,
        backend,
    )


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

    A table that several features read gets one step a row, with what all of them add to it.

    Args:
        storage: ``(E,)`` float, contiguous, not requiring a gradient.
        layout: the tables and features.
        index: ``(L,)``, as for :func:`gather_reduce_tables`, and so are ``offsets``, ``weights`` and the bounds.
        dout: ``(B, ΣD_f)``, the gradient of its result.
        offsets: see above.
        weights: see above.
        optimizer: one of :mod:`gossamer.optim`, for all tables.
        state: what ``layout.state(optimizer, device)`` made; updated in place.
        bounds: see above.
        bounds_count: see above.

    Raises:
        TypeError: as :func:`sparse_update_`.
        ValueError: likewise.
        IndexError: likewise.
    """
    check_tensor("storage", storage)
    backend = _backend.resolve("sparse_update", storage)
    index, offsets = check_tables(storage, layout, index, offsets, weights, backend, bounds, bounds_count)
    check_updatable("storage", storage)
    _check_dout(dout, ((offsets.shape[0] - 1) // layout.num_features, layout.total_dim), storage)
    lr, step, state1, state2 = check_state(optimizer, state, storage, layout)
    _sparse_update_(
        storage,
        index,
        dout.detach(),
        offsets,
        None if weights is None else weights.detach(),
        None,
        layout.on(storage.device),
        lr,
        step,
        state1,
        state2,
        layout.spec,
        -1,
        False,
        bounds != "raise",
        optimizer.algorithm,
        list(optimizer.hyper()),
        optimizer.seed,
        backend,
    )
