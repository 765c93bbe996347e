"""Bags over many embedding tables at once: one flat storage, one jagged list of ids, one launch."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Sequence

import torch

from gossamer import _backend
from gossamer._checks import check_float, check_index, check_same_device, check_shape, check_strided, check_tensor
from gossamer.ops._bags import Bags, Feature, Features, apply_bounds, check_bounds, check_weights
from gossamer.ops.gather_reduce import checked_out_dtype, reduce_bags
from gossamer.optim import Optimizer

POOLINGS = ("sum", "mean")
# Each table begins at a multiple of this many elements of the flat storage, which allows wide loads.
ALIGNMENT = 64


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _are_ints(values: Sequence) -> bool:
    return all(isinstance(value, numbers.Integral) for value in values)


class TableLayout:
    """The position of each of T tables in a flat storage, and the table that each of F features reads.

    Args:
        specs: ``(rows, dim)`` of each table.
        feature_table_map: the table of each feature; by default feature t reads table t.
        pooling: ``"sum"`` or ``"mean"``, one for all tables or one per table.

    Attributes:
        specs: as given.
        feature_table_map: as given, filled in.
        pooling: one per table.
        num_features: F.
        num_rows: rows of all tables; table t's begin at ``row_offsets[t]`` in this linear numbering.
        row_offsets: ``(T+1,)`` ints.
        element_offsets: first element of each table in the flat storage.
        num_elements: E, elements of the flat storage.
        dims: D_f, the dim of each feature.
        total_dim: ΣD_f, columns of the result.
        max_dim: the largest D_f.

    Raises:
        TypeError: an argument has another type.
        ValueError: sizes are negative, or the map or the poolings do not fit the tables.
    """

    def __init__(
        self,
        specs: Sequence[tuple[int, int]],
        feature_table_map: Sequence[int] | None = None,
        pooling: str | Sequence[str] = "sum",
    ):
        if not _is_sequence(specs) or not all(_is_sequence(s) and len(s) == 2 and _are_ints(s) for s in specs):
            raise TypeError(f"specs must be a sequence of (rows, dim) pairs, got {specs!r}")
        self.specs = tuple((int(rows), int(dim)) for rows, dim in specs)
        if not self.specs or any(rows < 0 or dim < 1 for rows, dim in self.specs):
            raise ValueError(f"specs must be (rows, dim) pairs with rows >= 0 and dim >= 1, got {list(specs)}")
        tables = len(self.specs)
        if feature_table_map is not None and not (_is_sequence(feature_table_map) and _are_ints(feature_table_map)):
            raise TypeError(f"feature_table_map must be a sequence of ints or None, got {feature_table_map!r}")
        self.feature_table_map = tuple(range(tables)) if feature_table_map is None else tuple(feature_table_map)
        if not self.feature_table_map or not all(0 <= t < tables for t in self.feature_table_map):
            raise ValueError(f"feature_table_map must name tables in [0, {tables}), got {feature_table_map}")
        if not isinstance(pooling, str) and not _is_sequence(pooling):
            raise TypeError(f"pooling must be a str, or one for each table, got {pooling!r}")
        self.pooling = (pooling,) * tables if isinstance(pooling, str) else tuple(pooling)
        if len(self.pooling) != tables or any(p not in POOLINGS for p in self.pooling):
            raise ValueError(f"pooling must be one of {POOLINGS}, or one for each of {tables} tables, got {pooling!r}")
        self.num_features = len(self.feature_table_map)
        self.row_offsets = tuple(itertools.accumulate((rows for rows, _ in self.specs), initial=0))
        self.num_rows = self.row_offsets[-1]
        sizes = [-(-rows * dim // ALIGNMENT) * ALIGNMENT for rows, dim in self.specs]
        *self.element_offsets, self.num_elements = itertools.accumulate(sizes, initial=0)
        self.dims = tuple(self.specs[t][1] for t in self.feature_table_map)
        *columns, self.total_dim = itertools.accumulate(self.dims, initial=0)
        self.max_dim = max(self.dims)
        self._features = []
        for table, column in zip(self.feature_table_map, columns, strict=True):
            first = (self.element_offsets[table], self.row_offsets[table])
            self._features.append(Feature(*first, *self.specs[table], column, int(self.pooling[table] == "mean")))
        self._on: dict[torch.device, Features] = {}

    def on(self, device: torch.device) -> Features:
        """The features with their layout tensor on a device, made once per device."""
        if device not in self._on:
            layout = torch.tensor(self._features, dtype=torch.int64, device=device)
            self._on[device] = Features(layout, *map(list, zip(*self._features, strict=True)))
        return self._on[device]

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The tables in a flat tensor: views ``(N_t, D_t)`` of E elements, or ``(N_t,)`` of one value per row.

        Args:
            flat: ``(E,)`` or ``(num_rows,)``, contiguous.

        Raises:
            ValueError: its size is neither E nor ``num_rows``.
        """
        check_tensor("flat", flat)
        check_strided("flat", flat)
        if flat.shape == (self.num_elements,):
            return [
                flat[start : start + rows * dim].view(rows, dim)
                for start, (rows, dim) in zip(self.element_offsets, self.specs, strict=True)
            ]
        check_shape("flat", flat, (self.num_rows,), f"(E,) = ({self.num_elements},) or (num_rows,)")
        return [flat[a:b] for a, b in itertools.pairwise(self.row_offsets)]

    def state(
        self, optimizer: Optimizer, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> dict[str, torch.Tensor]:
        """Initial optimizer state: as :meth:`Optimizer.state`, but flat, ``(E,)`` and ``(num_rows,)``."""
        rows = optimizer.state(self.num_rows, 1, device, dtype)
        shapes = {"full": (self.num_elements,), "row": (self.num_rows,)}
        kinds = optimizer.state_kinds()
        return {"step": rows["step"]} | {
            name: torch.full(shapes[kind], optimizer.initial_value(), dtype=dtype, device=device)
            for name, kind in kinds.items()
        }


def check_tables(
    storage: torch.Tensor,
    layout: TableLayout,
    index: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None,
    backend: str,
    bounds: str,
    bounds_count: torch.Tensor | None,
) -> Bags:
    """Check the arguments of the primitives over many tables; return the lists as corrected by the bounds mode."""
    check_float("storage", storage, backend)
    if not isinstance(layout, TableLayout):
        raise TypeError(f"layout must be a TableLayout, got {type(layout).__name__}")
    check_shape("storage", storage, (layout.num_elements,), "(E,) of the layout")
    if not storage.is_contiguous():
        raise ValueError(f"storage must be contiguous, got stride {storage.stride(0)}")
    check_index("index", index)
    check_shape("index", index, (None,), "(L,)")
    check_index("offsets", offsets)
    check_shape("offsets", offsets, (None,), "(F·B+1,)")
    if offsets.shape[0] < 1 or (offsets.shape[0] - 1) % layout.num_features:
        raise ValueError(
            f"offsets must have shape (F·B+1,) with F={layout.num_features} features, got {tuple(offsets.shape)}"
        )
    check_weights(index, weights, backend)
    check_same_device(storage=storage, index=index, offsets=offsets, weights=weights)
    check_bounds(bounds, bounds_count, index.device)
    bags = Bags(index, offsets, weights, drop=bounds != "raise", features=layout.on(storage.device))
    return apply_bounds(bags, 0, bounds, bounds_count, backend)


def gather_reduce_tables(
    storage: torch.Tensor,
    layout: TableLayout,
    index: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    bounds: str = "raise",
    bounds_count: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """:func:`gather_reduce` over many tables of mixed dims in one launch.

    Bag ``f·B + b`` holds ids of the table of feature f and gives columns ``Σ_{g<f} D_g`` to ``Σ_{g≤f} D_g`` of row b.

    Args:
        storage: ``(E,)`` float, contiguous: all tables at the positions of the layout.
        layout: the tables and features.
        index: ``(L,)`` int32 or int64, ids within their tables, feature-major: all bags of feature 0, then of 1.
        offsets: ``(F·B+1,)`` int32 or int64, ascending.
        weights: ``(L,)`` float, or None for ones.
        bounds: as for :func:`gather_reduce`.
        bounds_count: as for :func:`gather_reduce`.
        out_dtype: of the result; the storage's by default.

    Returns:
        ``(B, ΣD_f)``, accumulated in float32 (float64 for float64); empty bags are zero. Differentiable in ``storage``
        (a dense gradient) and ``weights``.

    Raises:
        TypeError: an argument is not a tensor, or a dtype is not supported.
        ValueError: sizes, devices, modes or offsets do not fit; on the CPU, a weight that counts is NaN.
        IndexError: on the CPU, an id outside its table with ``bounds="raise"``.
    """
    check_tensor("storage", storage)
    backend = _backend.resolve("gather_reduce_tables", storage)
    bags = check_tables(storage, layout, index, offsets, weights, backend, bounds, bounds_count)
    return reduce_bags(storage, bags, checked_out_dtype(out_dtype, storage, backend), backend)
