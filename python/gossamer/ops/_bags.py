"""Lists of ids for the primitives over tables: their record, checks, and bounds modes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from gossamer._checks import (
    FLOAT_DTYPES,
    check_float,
    check_index,
    check_padding_idx,
    check_same_device,
    check_shape,
    check_tensor,
)
from gossamer._row_codes import CODE_DTYPES, check_scale

MODES = ("sum", "mean", "max")
BOUNDS = ("raise", "clamp", "drop")


class Feature(NamedTuple):
    """The part of a flat storage of many tables that one feature reads, and its columns in the result.

    Attributes:
        element: its table's first element.
        row: its table's first row, numbered over all tables.
        rows: rows of its table.
        dim: columns of its table.
        column: its first column of the result.
        mean: 1 if its bags are averaged, 0 if they are summed.
    """

    element: int
    row: int
    rows: int
    dim: int
    column: int
    mean: int


class Features(NamedTuple):
    """The F features of bags over many tables, as one list per attribute of :class:`Feature`; empty for a single table.

    Attributes:
        layout: the same as one tensor ``(F, 6)`` int64 on the device, for kernels.
        element: each feature's :attr:`Feature.element`.
        row: each feature's first row.
        rows: rows of each feature's table.
        dim: columns of each feature's table.
        column: each feature's first column of the result.
        mean: whether each feature's bags are averaged.
    """

    layout: torch.Tensor | None
    element: list[int]
    row: list[int]
    rows: list[int]
    dim: list[int]
    column: list[int]
    mean: list[int]

    def each(self) -> Iterator[Feature]:
        """The features, one by one."""
        return map(Feature, self.element, self.row, self.rows, self.dim, self.column, self.mean)

    def tables(self, storage: torch.Tensor) -> Iterator[tuple[Feature, torch.Tensor]]:
        """Each feature, and its table ``(rows, dim)`` as a view of a flat storage."""
        for feature in self.each():
            size = feature.rows * feature.dim
            yield feature, storage[feature.element : feature.element + size].view(feature.rows, feature.dim)


# The column of the layout that holds each feature's rows.
_ROWS = Feature._fields.index("rows")
ONE_TABLE = Features(None, [], [], [], [], [], [])


class Bags(NamedTuple):
    """Lists of ids, and how the table rows they name are reduced.

    Attributes:
        index: ``(B, J)``, or ``(L,)`` with ``offsets``; int32 or int64.
        offsets: ``(B+1,)`` int32 or int64: bag b holds the positions from ``offsets[b]`` to ``offsets[b+1]``. With
            features ``(F·B+1,)``: bag ``f·B + b`` holds ids of feature f, and reduces to its columns of row b.
        weights: like ``index``, float, or None for ones.
        limit: one element, or None: ids of this value and above contribute nothing, and their rows are never read.
        mode: ``"sum"``, ``"mean"`` or ``"max"``; with features, ``"sum"``, since each feature has its own mode.
        padding_idx: an id that contributes nothing; −1 for none.
        drop: whether ids outside the table contribute nothing; otherwise they raise an error if values can be read.
        features: the features of many tables; :data:`ONE_TABLE` for a single table.
    """

    index: torch.Tensor
    offsets: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    limit: torch.Tensor | None = None
    mode: str = "sum"
    padding_idx: int = -1
    drop: bool = False
    features: Features = ONE_TABLE

    @property
    def num_lists(self) -> int:
        """F·B, or B without features."""
        return self.index.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    @property
    def num_bags(self) -> int:
        """B, rows of the result."""
        return self.num_lists // max(len(self.features.dim), 1)

    @property
    def averages(self) -> bool:
        """Whether any bag is averaged."""
        return self.mode == "mean" or any(self.features.mean)

    def result_shape(self, table: torch.Tensor) -> tuple[int, int]:
        """``(B, D)`` of the result of reducing rows of ``table``; ``(B, ΣD_f)`` with features."""
        if self.features.dim:
            return self.num_bags, sum(self.features.dim)
        return self.index.shape[0] if self.offsets is None else self.offsets.shape[0] - 1, table.shape[1]

    def numbers(self) -> torch.Tensor:
        """The bag of each flat position of ``index``; the number of bags for positions outside all of them."""
        if self.offsets is None:
            count, length = self.index.shape
            return torch.arange(count, device=self.index.device).unsqueeze(1).expand(count, length).reshape(-1)
        positions = torch.arange(self.index.numel(), device=self.index.device)
        bag = torch.searchsorted(self.offsets.contiguous(), positions, right=True) - 1
        # Positions before the first bag get -1 here, positions after the last bag get B.
        return bag % self.offsets.numel()

    def begins(self) -> torch.Tensor:
        """The first position of each bag, int64."""
        if self.offsets is not None:
            return self.offsets[:-1].long()
        return torch.arange(self.index.shape[0], device=self.index.device) * self.index.shape[1]

    def live(self, num_rows: int | torch.Tensor, numbers: torch.Tensor | None = None) -> torch.Tensor:
        """Which flat positions lie in a bag and contribute to it, reading a table of ``num_rows``.

        ``numbers`` are the bags' :meth:`numbers`, if known.
        """
        flat = self.index.reshape(-1)
        live = (flat >= 0) & (flat < num_rows)
        if self.padding_idx >= 0:
            live &= flat != self.padding_idx
        if self.offsets is not None:
            live &= (self.numbers() if numbers is None else numbers) < self.num_lists
        return live if self.limit is None else live & (flat < self.limit)

    def of_features(self) -> Iterator[Bags]:
        """The bags of each feature as bags over its table only; their offsets refer to the whole list."""
        num_bags = self.num_bags
        for f, mean in enumerate(self.features.mean):
            offsets = self.offsets[f * num_bags : (f + 1) * num_bags + 1]
            yield Bags(self.index, offsets, self.weights, mode="mean" if mean else "sum", drop=self.drop)


def bags_of_columns(bags: Bags, rows: torch.Tensor, dout: torch.Tensor, drop: bool) -> tuple[Bags, torch.Tensor]:
    """Bags for each of H columns of ``rows (L, H)``, and the columns of ``dout (B, H·C)`` that belong to them.

    Rows of positions that lie in no bag must be −1.
    """
    times, weights = rows.shape[1], bags.weights
    columns = dout.shape[1] // times
    if bags.offsets is None:
        count, length = bags.index.shape
        rows = rows.view(count, length, times).transpose(1, 2).reshape(count * times, length)
        weights = None if weights is None else weights.repeat_interleave(times, 0)
        return Bags(rows, weights=weights, drop=drop), dout.reshape(count * times, columns)
    length, offsets = bags.index.shape[0], bags.offsets.long()
    # The bags of one column follow those of the previous one. Positions outside all bags have row −1, so it does not
    # matter which bag they end up in.
    starts = offsets[:-1] + torch.arange(times, device=offsets.device).unsqueeze(1) * length
    starts = torch.cat([starts.flatten(), starts.new_full((1,), times * length)])
    weights = None if weights is None else weights.repeat(times)
    dout = dout.view(bags.num_bags, times, columns).transpose(0, 1).flatten(0, 1)
    return Bags(rows.T.flatten(), starts, weights, drop=True), dout


def elements_of_blocks(bags: Bags, dout: torch.Tensor) -> tuple[Bags, torch.Tensor]:
    """Bags of single elements from bags of blocks of D elements, whose ids are the first elements; and ``dout (B, D)``
    divided among the new bags.
    """
    first = bags.index.reshape(-1, 1)
    elements = first + torch.arange(dout.shape[1], device=dout.device, dtype=first.dtype)
    return bags_of_columns(bags, torch.where(first < 0, first, elements), dout, bags.drop)


def check_offsets(index: torch.Tensor, offsets: torch.Tensor) -> None:
    """Check that offsets ascend within ``[0, L]``. Reads values, so CPU only."""
    total = index.shape[0]
    before = torch.cat([offsets.new_zeros(1), offsets[:-1]])
    bad = ((offsets < before) | (offsets > total)).nonzero()
    if bad.numel():
        position = int(bad[0])
        raise ValueError(
            f"offsets must ascend within [0, L] with L={total}, got {int(offsets[position])} at position {position}"
        )


def check_weights_values(weights: torch.Tensor, live: torch.Tensor) -> None:
    """Check that no weight of a contributing id is NaN. Reads values, so CPU only."""
    bad = (weights.reshape(-1).isnan() & live).nonzero()
    if bad.numel():
        raise ValueError(f"weights must not be NaN, got nan at flat position {int(bad[0])}")


def check_values(bags: Bags, num_rows: int) -> None:
    """Check values as the native kernels do; for the reference on the CPU."""
    if bags.offsets is not None and bags.num_lists:
        check_offsets(bags.index, bags.offsets)
    rows = torch.tensor(num_rows)
    if bags.features.rows:
        rows = _rows_of_ids(torch.tensor(bags.features.rows), bags)
    flat = bags.index.reshape(-1)
    inside = bags.numbers() < bags.num_lists
    bad = (((flat < 0) | (flat >= rows)) & inside).nonzero()
    if bad.numel() and not bags.drop:
        position = int(bad[0])
        raise IndexError(
            f"index must be in [0, N) with N={int(rows.expand(flat.shape)[position])}, got {int(flat[position])} at "
            f"flat position {position}"
        )
    if bags.weights is not None:
        check_weights_values(bags.weights, bags._replace(limit=None).live(rows))


def _rows_of_ids(rows: torch.Tensor, bags: Bags) -> torch.Tensor:
    """For each id the number of rows of its feature's table, given ``rows (F,)``; the largest integer outside all
    bags.
    """
    repaired = bags._replace(offsets=_ascending(bags))
    feature = repaired.numbers() // max(bags.num_bags, 1)
    outside = torch.full((1,), torch.iinfo(bags.index.dtype).max, dtype=torch.int64, device=bags.index.device)
    return torch.cat([rows, outside])[feature.clamp(max=rows.shape[0])]


def _ascending(bags: Bags) -> torch.Tensor:
    """The offsets clamped to ``[0, L]`` and made to ascend."""
    return bags.offsets.clamp(0, bags.index.shape[0]).cummax(0).values


def check_bags(
    table: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    backend: str,
    mode: str,
    padding_idx: int | None = None,
    include_last_offset: bool = True,
    bounds: str = "drop",
    bounds_count: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    name: str = "index",
) -> Bags:
    """Check the arguments that the primitives over one table share, except the values of ids and offsets.

    ``name`` is what the caller's argument ``index`` is called.
    """
    if scale is not None or table.dtype not in FLOAT_DTYPES:
        check_rows(table, scale, backend)
    check_shape("table", table, (None, None), "(N, D)")
    check_index(name, index)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if offsets is None:
        if index.dim() not in (1, 2):
            raise ValueError(f"{name} must have shape (B, J) or (L,) when offsets is None, got {tuple(index.shape)}")
    else:
        check_shape(name, index, (None,), "(L,) when offsets is given")
        offsets = _whole_offsets(index, offsets, include_last_offset)
    check_weights(index, weights, backend, name)
    if weights is not None and mode == "max":
        raise ValueError("weights cannot be given with mode='max'")
    if scale is not None and mode == "max":
        raise ValueError("scale cannot be given with mode='max'")
    check_same_device(**{"table": table, name: index, "offsets": offsets, "weights": weights})
    n = table.shape[0]
    check_padding_idx(padding_idx, n)
    check_bounds(bounds, bounds_count, index.device)
    if offsets is None and index.dim() == 1:
        index = index.unsqueeze(1)
        weights = None if weights is None else weights.unsqueeze(1)
    padding = -1 if padding_idx is None else padding_idx % n
    return Bags(index, offsets, weights, None, mode, padding, bounds != "raise")


def check_rows(table: torch.Tensor, scale: torch.Tensor | None, backend: str) -> None:
    """Check that a table is floating, or of codes with their scale."""
    if scale is not None:
        check_scale(table, scale)
    elif table.dtype in CODE_DTYPES:
        raise TypeError(f"scale must be given for a table of {table.dtype}, got None")
    else:
        check_float("table", table, backend)


def _whole_offsets(index, offsets, include_last_offset):
    check_index("offsets", offsets)
    check_shape("offsets", offsets, (None,), "(B+1,)" if include_last_offset else "(B,)")
    if not include_last_offset:
        offsets = torch.cat([offsets, offsets.new_full((1,), index.shape[0])])
    if offsets.shape[0] < 1:
        raise ValueError("offsets must have shape (B+1,) with at least one element, got (0,)")
    return offsets


def check_weights(index: torch.Tensor, weights: torch.Tensor | None, backend: str, name: str = "index") -> None:
    """Check that per-sample weights are floating and have the shape of the ids, which the caller calls ``name``."""
    if weights is not None:
        check_tensor("weights", weights)
        check_float("weights", weights, backend)
        check_shape("weights", weights, tuple(index.shape), f"that of {name}")


def check_bounds(bounds: str, bounds_count: torch.Tensor | None, device: torch.device) -> None:
    """Check that the mode is known and the counter is an int64 tensor of one element on ``device``."""
    if bounds not in BOUNDS:
        raise ValueError(f"bounds must be one of {BOUNDS}, got {bounds!r}")
    if bounds_count is not None:
        check_tensor("bounds_count", bounds_count)
        if bounds_count.dtype != torch.int64 or bounds_count.numel() != 1:
            raise TypeError(
                f"bounds_count must be int64 with one element, got {bounds_count.dtype} {tuple(bounds_count.shape)}"
            )
        if bounds_count.device != device:
            raise ValueError(f"bounds_count must be on the device of index, {device}, got {bounds_count.device}")


def raises(index: torch.Tensor, backend: str) -> bool:
    """Whether ``bounds="raise"`` raises here: only if reading values does not stall a stream."""
    return index.device.type == "cpu" and backend in ("reference", "native")


def apply_bounds(bags: Bags, num_rows: int, bounds: str, bounds_count: torch.Tensor | None, backend: str) -> Bags:
    """Correct lists according to the bounds mode and count the corrections; no value is read on the host.

    Args:
        bags: the lists.
        num_rows: N; with features, each has its own.
        bounds: ``"clamp"`` brings ids into ``[0, N−1]``; ``"drop"`` and ``"raise"`` leave ids to the kernels. All modes
            except ``"raise"`` clamp offsets into ``[0, L]`` and make them ascend.
        bounds_count: incremented by the ids outside ``[0, N)`` and the offsets that changed.
        backend: the kernels that will run.
    """
    index, offsets = bags.index, bags.offsets
    if bounds == "raise" and (bounds_count is None or raises(index, backend)):
        return bags
    last = num_rows - 1
    if bags.features.layout is not None and (bounds == "clamp" or bounds_count is not None):
        num_rows = _rows_of_ids(bags.features.layout[:, _ROWS], bags)
        last = (num_rows - 1).to(index.dtype)
    if bounds_count is not None:
        wrong = ((index < 0) | (index >= num_rows)).sum()
    if offsets is not None and bounds != "raise":
        offsets = _ascending(bags)
        if bounds_count is not None:
            wrong = wrong + (offsets != bags.offsets).sum()
    if bounds_count is not None:
        bounds_count.add_(wrong.view(bounds_count.shape))
    if bounds == "clamp":
        # Ids of a table without rows become −1, which no kernel reads.
        index = index.clamp(min=0)
        index = index.clamp(max=last) if isinstance(last, int) else index.minimum(last)
    return Bags(index, offsets, *bags[2:])
