"""Sums and means over lists of ids whose vectors are composed of several rows, decoded as they are read."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import torch

from gossamer import _backend
from gossamer._checks import check_float, check_same_device, check_shape, check_tensor
from gossamer._numerics import accumulation_dtype
from gossamer.ops._bags import Bags, check_bags
from gossamer.ops._records import define
from gossamer.ops.composed_rows import (
    OPERATIONS,
    Parts,
    check_parts,
    check_values,
    combine_rows,
    counts_of,
    live_positions,
    part_rows,
)
from gossamer.ops.gather_compose_gradient import composed_table_gradient, weight_gradients
from gossamer.ops.gather_reduce import checked_out_dtype


class GatherCompose(NamedTuple):
    """Arguments of sums and means of composed vectors over bags.

    Attributes:
        table: ``(M, C)`` float.
        bags: the lists of ids.
        parts: what an id's vector is composed of.
        out_dtype: of the result ``(B, D)``.
    """

    table: torch.Tensor
    bags: Bags
    parts: Parts
    out_dtype: torch.dtype


@functools.cache
def _kernels(backend: str) -> ModuleType:
    if backend == "native":
        from gossamer.cpu_kernels import gather_compose
    else:
        from gossamer.triton_kernels import gather_compose
    return gather_compose


def pooled(
    values: torch.Tensor, kept: torch.Tensor, live: torch.Tensor, bags: Bags, dtype: torch.dtype
) -> torch.Tensor:
    """Weighted sums or means over bags of the vectors ``(K, D)`` of the positions ``kept``, where ``live`` is true."""
    if bags.weights is not None:
        values = values * bags.weights.reshape(-1)[kept].to(values.dtype).unsqueeze(1)
    out = torch.zeros(bags.num_bags, values.shape[1], dtype=values.dtype, device=values.device)
    out = out.index_add(0, bags.numbers()[kept], values)
    if bags.mode == "mean":
        out = out / counts_of(bags, live, values.dtype).unsqueeze(1)
    return out.to(dtype)


def gather_compose_reference(args: GatherCompose) -> torch.Tensor:
    """:func:`gather_compose` in plain torch, differentiable."""
    table, bags, parts = args.table, args.bags, args.parts
    live = live_positions(bags, parts)
    kept = live.nonzero().squeeze(1)
    rows = part_rows(bags.index.reshape(-1)[kept], parts, table.shape[0])
    values = combine_rows(table[rows].to(accumulation_dtype(table.dtype)), parts)
    return pooled(values, kept, live, bags, args.out_dtype)


def forward(args: GatherCompose, backend: str) -> torch.Tensor:
    """Sums and means outside autograd."""
    if backend == "reference":
        check_values(args.bags, args.parts)
        return gather_compose_reference(args)
    return _kernels(backend).gather_compose(args)


def forward_fake(args: GatherCompose) -> torch.Tensor:
    """An empty tensor of the shape that :func:`forward` returns."""
    return args.table.new_empty(args.bags.num_bags, args.parts.dim, dtype=args.out_dtype)


# out[b] = sum or mean over the ids of bag b of weight · the composition of their rows.
_gather_compose = define("gather_compose", GatherCompose, kernel=forward, fake=forward_fake, returns="Tensor")


def _save(ctx, args: GatherCompose, output: torch.Tensor):
    return (args,)


def _differentiate(ctx, args: GatherCompose, tensors, dout: torch.Tensor):
    gradients = {}
    if "table" in ctx.needs:
        gradients["table"] = composed_table_gradient(args, dout, ctx.backend)
    if "bags.weights" in ctx.needs:
        gradients["bags.weights"] = weight_gradients(args, dout, ctx.backend)
    return gradients


_gather_compose.differentiate(_save, _differentiate)


def checked_compose(table, ids, parts: Parts, offsets, weights, mode, include_last_offset, backend: str) -> Bags:
    """Check the arguments of :func:`gather_compose`, except the values of ids and offsets; their bags."""
    if mode == "max":
        raise ValueError("mode must be 'sum' or 'mean' for composed rows, got 'max'")
    bags = check_bags(table, ids, offsets, weights, backend, mode, None, include_last_offset, "raise", name="ids")
    check_parts(parts, bags.index, table.shape[0])
    check_same_device(table=table, codes=parts.codes, rare=parts.rare)
    if parts.operation not in OPERATIONS:
        raise ValueError(f"operation must be one of {OPERATIONS}, got {parts.operation!r}")
    maps, columns = parts.maps, parts.block or table.shape[1]
    whole = columns * maps.count if parts.operation == "concat" else columns
    if not (whole - columns < parts.dim <= whole if parts.block else parts.dim == whole):
        raise ValueError(f"parts must have the dim {whole} of {maps.count} rows of {columns}, got {parts.dim}")
    if parts.block:
        check_shape("table", table, (None, 1), "(M, 1) for blocks")
        if parts.operation != "concat":
            raise ValueError(f"operation must be 'concat' for blocks, got {parts.operation!r}")
    last = max(base + modulus for base, modulus in zip(maps.bases, maps.moduli, strict=True))
    beyond = 0 if parts.wrap else max(parts.block - 1, 0)
    if not parts.wrap and last + beyond > table.shape[0]:
        raise ValueError(f"table must have at least {last + beyond} rows, which the maps reach, got {table.shape[0]}")
    return bags


def gather_compose(
    table: torch.Tensor,
    ids: torch.Tensor,
    parts: Parts,
    offsets: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    *,
    mode: str = "sum",
    include_last_offset: bool = True,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Reduce composed vectors over lists of ids: ``y[b] = Σ_j weights[b,j] · ω_h table[row_h(ids[b,j])]``.

    ω is the sum, product or concatenation of the H rows of an id, which are chosen by maps of ids or by stored codes.
    Rows are decoded, combined and added in one pass: neither rows nor vectors are stored.

    Args:
        table: ``(M, C)`` float.
        ids: ``(B, J)`` int32 or int64; ``(L,)`` with ``offsets``; or ``(L,)`` without, each id a bag of its own.
        parts: which rows, and ω; its ``dim`` is D.
        offsets: as for :func:`gossamer.gather_reduce`.
        weights: like ``ids``, float, or None for ones.
        mode: ``"sum"`` or ``"mean"``.
        include_last_offset: as for :func:`gossamer.gather_reduce`.
        out_dtype: of the result; the table's by default.

    Returns:
        ``(B, D)``, accumulated in float32 (float64 for float64); empty bags are zero. Differentiable in ``table`` (rows
        that ids share get the sum of their gradients, in a fixed order) and ``weights``.

    Raises:
        TypeError: an argument is not a tensor, or a dtype is not supported.
        ValueError: ranks, sizes, devices, modes or offsets do not fit; the maps give rows that the table does not have;
            on the CPU, a weight is NaN.
        IndexError: on the CPU, an id outside the maps or codes, or a code outside its part. On CUDA such ids contribute
            nothing.
    """
    check_tensor("table", table)
    backend = _backend.resolve("gather_compose", table)
    check_float("table", table, backend)
    bags = checked_compose(table, ids, parts, offsets, weights, mode, include_last_offset, backend)
    args = GatherCompose(table, bags, parts, checked_out_dtype(out_dtype, table, backend))
    if backend == "reference":
        check_values(bags, parts)
        return gather_compose_reference(args)
    return _gather_compose(args, backend)
