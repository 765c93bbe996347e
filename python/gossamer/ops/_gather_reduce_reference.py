"""Sums, means, maxima and products of table rows over lists of ids in plain torch, differentiable."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer._numerics import accumulation_dtype
from gossamer._row_codes import decode
from gossamer.ops._bags import Bags, check_values, raises

if TYPE_CHECKING:
    from gossamer.ops.gather_max import GatherMax
    from gossamer.ops.gather_reduce import GatherDot, GatherReduce


def check_lists(args: GatherReduce | GatherMax | GatherDot) -> None:
    """Check the values in the lists before the reference reads them."""
    if raises(args.bags.index, "reference"):
        check_values(args.bags, args.table.shape[0])


def gather_reduce_reference(
    table: torch.Tensor, bags: Bags, out_dtype: torch.dtype | None = None, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """:func:`gather_reduce` in plain torch, differentiable, accumulated in float32 (float64 for float64).

    Ids outside the table contribute nothing.
    """
    out_dtype = out_dtype or table.dtype
    if bags.features.dim:
        tables = zip(bags.features.tables(table), bags.of_features(), strict=True)
        return torch.cat([gather_reduce_reference(part, own, out_dtype) for (_, part), own in tables], 1)
    numbers = bags.numbers()
    kept = bags.live(table.shape[0], numbers).nonzero().squeeze(1)
    bag = numbers[kept]
    accumulate = accumulation_dtype(table.dtype)
    rows = bags.index.reshape(-1)[kept].long()
    values = decode(table.index_select(0, rows), scale, rows, accumulate)
    if bags.mode == "max":
        return _max_by_bag(values, bag, bags.num_bags).to(out_dtype)
    if bags.weights is not None:
        values = values * bags.weights.reshape(-1)[kept].to(accumulate).unsqueeze(1)
    out = torch.zeros(bags.num_bags, table.shape[1], dtype=accumulate, device=table.device)
    out = out.index_add(0, bag, values)
    if bags.mode == "mean":
        out = out / count_by_bag(bag, bags.num_bags, accumulate).unsqueeze(1)
    return out.to(out_dtype)


def count_by_bag(bag: torch.Tensor, num_bags: int, dtype: torch.dtype) -> torch.Tensor:
    """The number of live ids of each bag, at least 1, so that empty bags divide zero by one."""
    counts = torch.zeros(num_bags, dtype=dtype, device=bag.device)
    return counts.index_add(0, bag, counts.new_ones(bag.shape)).clamp(min=1)


def _max_by_bag(values: torch.Tensor, bag: torch.Tensor, num_bags: int) -> torch.Tensor:
    """Columnwise maxima of each bag's values, taken at the first position of the maximum; zeros for empty bags."""
    position = argmax_by_bag(values.detach(), bag, num_bags)
    # Bags without ids read an extra row of zeros, so that the result depends on the table for autograd even then.
    values = torch.cat([values, values.new_zeros(1, values.shape[1])])
    return values.gather(0, torch.where(position >= 0, position, values.shape[0] - 1))


def argmax_by_bag(values: torch.Tensor, bag: torch.Tensor, num_bags: int) -> torch.Tensor:
    """For each bag and column the first row in ``values`` with the largest value, where NaN is the largest; or −1."""
    at = bag.unsqueeze(1).expand_as(values)
    nan = values.isnan()
    largest = values.new_full((num_bags, values.shape[1]), -torch.inf).scatter_reduce(0, at, values, "amax")
    best = torch.where(largest.gather(0, at).isnan(), nan, values == largest.gather(0, at))
    rows = torch.arange(values.shape[0], device=values.device).unsqueeze(1)
    none = values.shape[0]
    first = torch.full((num_bags, values.shape[1]), none, device=values.device)
    first = first.scatter_reduce(0, at, torch.where(best, rows, none), "amin")
    return torch.where(first < none, first, -1)


def gather_dot_reference(args: GatherDot) -> torch.Tensor:
    """``⟨dout[bag of p], table[index[p]]⟩``, over the bag's live ids for a mean, in plain torch, differentiable."""
    table, bags = args.table, args.bags
    if bags.features.dim:
        # Positions outside a feature's bags get zeros for that feature.
        return sum(
            gather_dot_reference(args._replace(dout=args.dout[:, f.column : f.column + f.dim], table=part, bags=own))
            for (f, part), own in zip(bags.features.tables(table), bags.of_features(), strict=True)
        )
    wide = accumulation_dtype(table.dtype)
    flat = bags.index.reshape(-1).long()
    kept = bags.live(table.shape[0]).nonzero().squeeze(1)
    bag = bags.numbers()[kept]
    rows = decode(table[flat[kept]], args.scale, flat[kept], wide)
    dot = (args.dout[bag].to(wide) * rows).sum(1)
    if bags.mode == "mean":
        dot = dot / count_by_bag(bag, bags.num_bags, wide)[bag]
    out = torch.zeros(flat.shape, dtype=args.dtype, device=table.device)
    return out.index_copy(0, kept, dot.to(args.dtype)).view(bags.index.shape)
