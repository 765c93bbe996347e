"""The operators behind :mod:`gossamer.ops.block_sparse`, whose backward passes are again these two."""

from __future__ import annotations

import torch

from gossamer import _backend
from gossamer._layout import side_by_side, stored_by_columns
from gossamer._numerics import accumulation_dtype
from gossamer.ops._registration import register, register_autograd
from gossamer.ops.block_topology import BlockTopology
from gossamer.ops.gather_reduce import sum_rows

NO_ACTIVATION = -1

# A stored topology as operators take it: the list row by row, which is the order of the values, then column by column.
_TOPOLOGY = (
    "row_offsets",
    "column_indices",
    "row_indices",
    "column_offsets",
    "row_indices_t",
    "order_t",
    "row_schedule",
    "column_schedule",
    "live_rows",
)
_SCHEMA = ", ".join(f"Tensor{'?' if name == 'live_rows' else ''} {name}" for name in _TOPOLOGY)


def topology_tensors(topology: BlockTopology) -> tuple[torch.Tensor, ...]:
    """The tensors of a topology whose ``order`` is None, as the operators take them."""
    return tuple(getattr(topology, name) for name in _TOPOLOGY)


def _sdd_kernel(a, b, bias, *rest):
    *topology, bm, bn, bias_rows, activation, backend, a_rows = rest
    launcher = _backend.kernels(backend, "block_sparse").sdd
    # Native kernels alone gather rows themselves.
    gather = {} if a_rows is None else {"a_rows": a_rows}
    return launcher(a, b, bias, topology, (bm, bn), bias_rows, activation, **gather)


def _sdd_fake(a, b, bias, *rest):
    column_indices, bm, bn = rest[1], *rest[len(_TOPOLOGY) : len(_TOPOLOGY) + 2]
    return a.new_empty(column_indices.shape[0], bm, bn)


# values[i] = act(a·b + bias) at the i-th block, bias along rows or columns; zero from the last block on. b may come
# in parts side by side, (G, K, cols/G), and a as rows that a_rows names, without gradients.
sdd_operator = register(
    f"block_sparse_sdd(Tensor a, Tensor b, Tensor? bias, {_SCHEMA}, int bm, int bn, bool bias_rows, int activation, "
    "str backend, Tensor? a_rows) -> Tensor",
    _sdd_kernel,
    _sdd_fake,
)


def _dsd_kernel(values, b, bias, *rest):
    *topology, transposed, by_columns, parts, activation, backend = rest
    launcher = _backend.kernels(backend, "block_sparse").dsd
    return launcher(values, b, bias, topology, transposed, by_columns, parts, activation)


def _dsd_fake(values, b, bias, *rest):
    row_offsets, column_offsets = rest[0], rest[3]
    transposed, by_columns, parts = rest[len(_TOPOLOGY) : len(_TOPOLOGY) + 3]
    blocks = (column_offsets if transposed else row_offsets).shape[0] - 1
    rows, n = blocks * values.shape[2 if transposed else 1], b.shape[-1]
    lead, height = ((parts,), rows // parts) if parts else ((), rows)
    return b.new_empty(*lead, n, height).mT if by_columns else b.new_empty(*lead, height, n)


# y = act(s·b + bias), s or its transpose. By columns, y is stored column after column and bias runs along its rows. b
# may come in parts one below the other, (G, ·, N), and where `parts` is not 0 so does y.
dsd_operator = register(
    f"block_sparse_dsd(Tensor values, Tensor b, Tensor? bias, {_SCHEMA}, bool transposed, bool by_columns, "
    "int parts, int activation, str backend) -> Tensor",
    _dsd_kernel,
    _dsd_fake,
)


def _no_gradient_through(activation: int) -> None:
    if activation != NO_ACTIVATION:
        raise RuntimeError("a product that applied its activation inside the kernel has no gradient")


def _parts(operand: torch.Tensor) -> int:
    return operand.shape[0] if operand.dim() == 3 else 0


def _sdd_setup_context(ctx, inputs, output):
    a, b, _, *topology = inputs[: 3 + len(_TOPOLOGY)]
    _, _, ctx.bias_rows, activation, ctx.backend, a_rows = inputs[3 + len(_TOPOLOGY) :]
    needs_a, needs_b, needs_bias = ctx.needs_input_grad[:3]
    if needs_a or needs_b or needs_bias:
        _no_gradient_through(activation)
        if a_rows is not None:
            raise RuntimeError("a product that gathered its rows inside the kernel has no gradient")
    ctx.a_by_columns, ctx.b_by_columns, ctx.num_inputs = stored_by_columns(a), stored_by_columns(b), len(inputs)
    ctx.b_parts = _parts(b)
    ctx.save_for_backward(a if needs_b else None, b if needs_a else None, *topology)


def _sum_blocks(values: torch.Tensor, topology: list[torch.Tensor], along_rows: bool, backend: str) -> torch.Tensor:
    """Sums over the columns of a block-sparse matrix, or over its rows: those of each block, then of each list."""
    row_offsets, column_indices, _, column_offsets, _, order_t = topology[:6]
    sums = values.sum(2 if along_rows else 1, dtype=accumulation_dtype(values.dtype))
    if along_rows:
        offsets, order = row_offsets, torch.arange(column_indices.shape[0], dtype=torch.int32, device=values.device)
    else:
        offsets, order = column_offsets, order_t
    return sum_rows(sums, order, offsets, values.dtype, backend).view(-1)


def _sdd_backward(ctx, dvalues):
    a, b, *topology = ctx.saved_tensors
    needs_a, needs_b, needs_bias = ctx.needs_input_grad[:3]
    da = db = dbias = None

    def times(dense, transposed, by_columns, parts=0):
        return dsd_operator(dvalues, dense, None, *topology, transposed, by_columns, parts, NO_ACTIVATION, ctx.backend)

    if needs_a:
        da = times(b.mT, False, ctx.a_by_columns)
    if needs_b:
        db = times(a, True, not ctx.b_by_columns, ctx.b_parts).mT
    if needs_bias:
        dbias = _sum_blocks(dvalues, topology, ctx.bias_rows, ctx.backend)
    return da, db, dbias, *(None,) * (ctx.num_inputs - 3)


register_autograd("block_sparse_sdd", _sdd_backward, _sdd_setup_context)


def _dsd_setup_context(ctx, inputs, output):
    values, b, _, *topology = inputs[: 3 + len(_TOPOLOGY)]
    ctx.transposed, ctx.by_columns, _, activation, ctx.backend = inputs[3 + len(_TOPOLOGY) :]
    needs_values, needs_b, needs_bias = ctx.needs_input_grad[:3]
    if needs_values or needs_b or needs_bias:
        _no_gradient_through(activation)
    ctx.block, ctx.b_by_columns, ctx.num_inputs = values.shape[1:], stored_by_columns(b), len(inputs)
    ctx.b_parts = _parts(b)
    ctx.save_for_backward(values if needs_b else None, b if needs_values else None, *topology)


def _dsd_backward(ctx, dy):
    values, b, *topology = ctx.saved_tensors
    needs_values, needs_b, needs_bias = ctx.needs_input_grad[:3]
    dvalues = db = dbias = None
    if dy.dim() == 3:
        dy = side_by_side(dy, 0)
    if needs_values:
        # The gradient of sᵀ is the transpose of that of s, so it too comes in the order of the stored blocks.
        if ctx.transposed:
            operands = (side_by_side(b, 0) if ctx.b_parts else b, dy.t())
        else:
            operands = (dy, b.mT)
        dvalues = sdd_operator(*operands, None, *topology, *ctx.block, False, NO_ACTIVATION, ctx.backend, None)
    if needs_b:
        form = (not ctx.transposed, ctx.b_by_columns, ctx.b_parts)
        db = dsd_operator(values, dy, None, *topology, *form, NO_ACTIVATION, ctx.backend)
    if needs_bias:
        dbias = dy.sum(1 if ctx.by_columns else 0)
    return dvalues, db, dbias, *(None,) * (ctx.num_inputs - 3)


register_autograd("block_sparse_dsd", _dsd_backward, _dsd_setup_context)
