"""Sums and means over lists of ids of products of two small matrices, which each id chooses from two tables."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import torch

from gossamer import _backend
from gossamer._checks import check_float, check_positive, check_same_device, check_shape, check_tensor
from gossamer._numerics import accumulation_dtype
from gossamer.ops._bags import Bags, check_bags
from gossamer.ops._records import define
from gossamer.ops.composed_rows import Parts, check_parts, check_values, counts_of, live_positions, part_rows
from gossamer.ops.dispatch import sort_ids
from gossamer.ops.gather_compose import pooled
from gossamer.ops.gather_compose_gradient import rows_of_positions
from gossamer.ops.map_ids import IdMaps

# A right table of at most this many elements has its gradient summed beside that of the left one, in the caches.
_SMALL_RIGHT = 1 << 18


class GatherMatmul(NamedTuple):
    """Arguments of sums and means of products of matrices over bags.

    Attributes:
        left: ``(N1, M·K)`` float, matrices ``(M, K)``.
        right: ``(N2, K·N)`` float, matrices ``(K, N)``.
        bags: the lists of ids.
        parts: the row of ``left`` and the row of ``right`` of an id; its operation is ``"matmul"``, its ``dim`` M·N.
        inner: K.
        out_dtype: of the result ``(B, M·N)``.
    """

    left: torch.Tensor
    right: torch.Tensor
    bags: Bags
    parts: Parts
    inner: int
    out_dtype: torch.dtype

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, K and N."""
        return self.left.shape[1] // self.inner, self.inner, self.right.shape[1] // self.inner


@functools.cache
def _kernels(backend: str) -> ModuleType:
    if backend == "native":
        from gossamer.cpu_kernels import gather_compose as gather_matmul
    else:
        from gossamer.triton_kernels import gather_matmul
    return gather_matmul


def _products(args: GatherMatmul, rows: torch.Tensor) -> torch.Tensor:
    """The products ``(L, M·N)`` of the matrices in ``rows (L, 2)``."""
    m, k, n = args.sizes
    wide = accumulation_dtype(args.left.dtype)
    left = args.left[rows[:, 0]].to(wide).view(-1, m, k)
    return torch.bmm(left, args.right[rows[:, 1]].to(wide).view(-1, k, n)).flatten(1)


def gather_matmul_reference(args: GatherMatmul) -> torch.Tensor:
    """:func:`gather_matmul` in plain torch, differentiable."""
    bags = args.bags
    live = live_positions(bags, args.parts)
    kept = live.nonzero().squeeze(1)
    values = _products(args, part_rows(bags.index.reshape(-1)[kept], args.parts, args.left.shape[0]))
    return pooled(values, kept, live, bags, args.out_dtype)


def _forward(args: GatherMatmul, backend: str) -> torch.Tensor:
    if backend == "reference":
        check_values(args.bags, args.parts)
        return gather_matmul_reference(args)
    return _kernels(backend).gather_matmul(args)


def _forward_fake(args: GatherMatmul) -> torch.Tensor:
    return args.left.new_empty(args.bags.num_bags, args.parts.dim, dtype=args.out_dtype)


# out[b] = sum or mean over the ids of bag b of weight · the product of the two matrices of the id.
_gather_matmul = define("gather_matmul", GatherMatmul, kernel=_forward, fake=_forward_fake, returns="Tensor")


def pairs_of(rows: torch.Tensor, dim: int) -> Parts:
    """Parts of the ids ``0 .. L−1``, given their rows ``(L, 2)`` in two tables."""
    return Parts.of(dim, "matmul", IdMaps.of([2**31] * 2), coded=2, codes=rows.int(), bits=[32])


def _sum_by_row(by, rows, first, second, inner: int, factor, dtype, num_rows: int, backend: str) -> torch.Tensor:
    """Row r: the sum over positions with ``by[p] = r`` of ``factor[p] · first[rows[p,0]] · second[rows[p,1]]``."""
    positions, offsets = sort_ids(by.unsqueeze(1), num_rows, backend)
    weights = None if factor is None else factor.index_select(0, positions)
    dim = first.shape[1] // inner * (second.shape[1] // inner)
    parts = pairs_of(rows, dim)
    return _gather_matmul(GatherMatmul(first, second, Bags(positions, offsets, weights), parts, inner, dtype), backend)


class ProductGradient(NamedTuple):
    """Arguments of the gradients of both tables of :class:`GatherMatmul`, in one pass over the positions.

    Attributes:
        left: ``(N1, M·K)``, matrices ``(M, K)``, of the dtype that is accumulated in, as are all others.
        turned: ``(N2, N·K)``, the transposes ``(N, K)`` of the right table's matrices.
        dout: ``(B, M·N)``.
        factor: ``(L,)`` factors of positions, or None for ones.
        positions: ``(L,)`` int32, positions sorted by their row of ``left``; those without one come last.
        offsets: ``(N1 + 1,)`` int32, where the positions of each row begin.
        rows: ``(L, 2)`` int32, the bag and the row of ``turned`` of each position.
        inner: K.
    """

    left: torch.Tensor
    turned: torch.Tensor
    dout: torch.Tensor
    factor: torch.Tensor | None
    positions: torch.Tensor
    offsets: torch.Tensor
    rows: torch.Tensor
    inner: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, K and N."""
        return self.left.shape[1] // self.inner, self.inner, self.turned.shape[1] // self.inner


def product_gradient_reference(args: ProductGradient) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients ``(N1, M·K)`` and ``(N2, N·K)`` of ``left`` and ``turned`` in plain torch."""
    m, k, n = args.sizes
    own = torch.repeat_interleave(torch.arange(len(args.left), device=args.left.device), args.offsets.diff())
    kept = args.positions[: own.numel()].long()
    bag, other = args.rows[kept].long().unbind(1)
    dout = args.dout[bag].view(-1, m, n)
    if args.factor is not None:
        dout = dout * args.factor[kept].view(-1, 1, 1)
    left = torch.bmm(dout, args.turned[other].view(-1, n, k)).flatten(1)
    turned = torch.bmm(dout.transpose(1, 2), args.left[own].view(-1, m, k)).flatten(1)
    return torch.zeros_like(args.left).index_add(0, own, left), torch.zeros_like(args.turned).index_add(
        0, other, turned
    )


def _product_gradient(args: ProductGradient, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    return _kernels(backend).product_gradient(args) if backend == "native" else product_gradient_reference(args)


def _product_gradient_fake(args: ProductGradient) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(args.left), torch.empty_like(args.turned)


_both_gradients = define(
    "product_gradient",
    ProductGradient,
    kernel=_product_gradient,
    fake=_product_gradient_fake,
    returns="(Tensor left, Tensor turned)",
)


def _transposed(matrices: torch.Tensor, rows: int) -> torch.Tensor:
    """Each row of a table as a matrix with ``rows`` rows, transposed."""
    return matrices.view(matrices.shape[0], rows, matrices.shape[1] // rows).transpose(1, 2).flatten(1)


def _save(ctx, args: GatherMatmul, output: torch.Tensor):
    return (args,)


def _differentiate(ctx, args: GatherMatmul, tensors, dout: torch.Tensor):
    gradients, bags, (m, k, n) = {}, args.bags, args.sizes
    wide = accumulation_dtype(args.left.dtype)
    dout, backend = dout.to(wide), ctx.backend
    if bags.index.numel() == 0:
        shapes = {"left": args.left, "right": args.right, "bags.weights": bags.weights}
        return {name: torch.zeros_like(shapes[name]) for name in ctx.needs}
    rows = rows_of_positions(bags, args.parts, args.left, backend)
    live, numbers = rows[:, 0] >= 0, bags.numbers()
    factor = None if bags.weights is None else bags.weights.reshape(-1).to(wide)
    share = None
    if bags.mode == "mean":
        share = 1 / counts_of(bags, live, wide)[numbers.clamp(max=bags.num_bags - 1)]
        factor = share if factor is None else factor * share
    left, right = by = rows.unbind(1)
    small = args.right.numel() <= _SMALL_RIGHT and rows.dtype == torch.int32
    together = small and backend == "native" and {"left", "right"} <= set(ctx.needs) and not torch.is_grad_enabled()
    if bags.offsets is not None or bags.padding_idx >= 0 or backend != "native":
        # Positions that contribute nothing are assigned to a row past the end.
        by = [torch.where(own < 0, table.shape[0], own) for own, table in zip(by, (args.left, args.right), strict=True)]
    if together:
        positions, offsets = sort_ids(by[0].unsqueeze(1), args.left.shape[0], backend)
        paired, turned = torch.stack([numbers.to(rows.dtype), right], 1), _transposed(args.right.to(wide), k)
        lists = (positions, offsets, paired)
        values = (args.left.to(wide), turned, dout, factor)
        for_left, for_right = _both_gradients(ProductGradient(*values, *lists, k), backend)
        gradients["left"] = for_left.to(args.left.dtype)
        gradients["right"] = _transposed(for_right, n).to(args.right.dtype)
    elif "left" in ctx.needs:
        paired = torch.stack([numbers.to(rows.dtype), right], 1)
        turned, shape = _transposed(args.right.to(wide), k), args.left.shape
        found = _sum_by_row(by[0], paired, dout, turned, n, factor, wide, shape[0], backend)
        gradients["left"] = found.to(args.left.dtype)
    if "right" in ctx.needs and not together:
        bag, values, shape = numbers.to(rows.dtype), args.left.to(wide), args.right.shape
        # leftᵀ·dout, or the transpose of doutᵀ·left: the smaller tensor is transposed.
        if values.numel() <= dout.numel():
            operands = torch.stack([left, bag], 1), _transposed(values, m), dout
        else:
            operands = torch.stack([bag, left], 1), _transposed(dout, m), values
        found = _sum_by_row(by[1], *operands, m, factor, wide, shape[0], backend)
        if values.numel() > dout.numel():
            found = _transposed(found, n)
        gradients["right"] = found.to(args.right.dtype)
    if "bags.weights" in ctx.needs:
        bag = numbers.clamp(max=bags.num_bags - 1)
        found = (_products(args, rows.clamp(min=0)) * dout[bag]).sum(1)
        found = (found if share is None else found * share).masked_fill(~live, 0)
        gradients["bags.weights"] = found.to(bags.weights.dtype).view(bags.weights.shape)
    return gradients


_gather_matmul.differentiate(_save, _differentiate)


def gather_matmul(
    left: torch.Tensor,
    right: torch.Tensor,
    ids: torch.Tensor,
    parts: Parts,
    inner: int,
    offsets: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    *,
    mode: str = "sum",
    include_last_offset: bool = True,
) -> torch.Tensor:
    """Reduce products of matrices over lists of ids: ``y[b] = Σ_j weights[b,j] · left[l(i)] · right[r(i)]``, i the id.

    Rows of the tables are matrices ``(M, K)`` and ``(K, N)``, stored row by row; ``parts`` gives the two matrices that
    an id multiplies. Products are added in registers and never stored. The gradients of both tables are sums of the
    same kind, over the positions of each row.

    Args:
        left: ``(N1, M·K)`` float.
        right: ``(N2, K·N)``, of the same dtype.
        ids: ``(B, J)`` int32 or int64; ``(L,)`` with ``offsets``; or ``(L,)`` without, each id a bag of its own.
        parts: the row of ``left`` and that of ``right``: operation ``"matmul"``, ``dim`` M·N.
        inner: K.
        offsets: as for :func:`gossamer.gather_reduce`.
        weights: like ``ids``, float, or None for ones.
        mode: ``"sum"`` or ``"mean"``.
        include_last_offset: as for :func:`gossamer.gather_reduce`.

    Returns:
        ``(B, M·N)`` in the tables' dtype, accumulated in float32 (float64 for float64); empty bags are zero.
        Differentiable in ``left``, ``right`` (a row's gradient is summed in the order of positions) and ``weights``.

    Raises:
        TypeError: an argument is not a tensor, or a dtype is not supported.
        ValueError: ranks, sizes, dtypes, devices, modes or offsets do not fit; the maps reach rows that a table lacks;
            on the CPU, a weight is NaN.
        IndexError: on the CPU, an id that the parts do not know. On CUDA such ids contribute nothing.
    """
    check_tensor("left", left)
    check_tensor("right", right)
    backend = _backend.resolve("gather_matmul", left)
    check_float("left", left, backend)
    check_shape("left", left, (None, None), "(N1, M·K)")
    check_shape("right", right, (None, None), "(N2, K·N)")
    check_positive(inner=inner)
    if mode == "max":
        raise ValueError("mode must be 'sum' or 'mean' for products, got 'max'")
    bags = check_bags(left, ids, offsets, weights, backend, mode, None, include_last_offset, "raise", name="ids")
    check_parts(parts, bags.index, left.shape[0])
    check_same_device(left=left, right=right, codes=parts.codes, rare=parts.rare)
    if right.dtype != left.dtype:
        raise TypeError(f"right must have the dtype of left, {left.dtype}, got {right.dtype}")
    if left.shape[1] % inner or right.shape[1] % inner:
        raise ValueError(f"inner must divide the columns {left.shape[1]} and {right.shape[1]}, got {inner}")
    dim, count = left.shape[1] // inner * (right.shape[1] // inner), parts.maps.count
    if parts.operation != "matmul" or count != 2 or parts.coded == 1 or parts.dim != dim or parts.block:
        raise ValueError(f"parts must have operation='matmul', two maps and dim {dim}, got {parts}")
    tables = {"left": left, "right": right}
    for (name, table), base, modulus in zip(tables.items(), parts.maps.bases, parts.maps.moduli, strict=True):
        # Codes are checked against the tables when they are read, and replaced by the last row that a part has.
        least = base + (min(len(parts.codes), 1) if parts.coded else modulus)
        if least > table.shape[0]:
            raise ValueError(f"{name} must have at least {least} rows, which its map reaches, got {table.shape[0]}")
    args = GatherMatmul(left, right, bags, parts, inner, left.dtype)
    if backend == "reference":
        check_values(bags, parts)
        return gather_matmul_reference(args)
    return _gather_matmul(args, backend)
