"""Bags over many embedding tables at once: one flat storage, one jagged list of ids, one launch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from gossamer import _backend
from gossamer._checks import check_float, check_index, check_same_device, check_shape, check_tensor
from gossamer._numerics import accumulation_dtype
from gossamer.ops._bags import (
    apply_bounds,
    bags_of,
    check_bounds,
    check_offsets,
    check_weights,
    check_weights_values,
    raises,
)
from gossamer.ops._registration import register, register_autograd
from gossamer.ops.gather_reduce import (
    checked_out_dtype,
    gather_dot_reference,
    gather_reduce_reference,
    sum_sorted,
    summed_in,
    transpose_bags,
)
from gossamer.optim import Optimizer

POOLINGS = ("sum", "mean")
# Columns of TableLayout.on(): all int64, one row a feature.
ELEMENT, ROW, ROWS, DIM, COLUMN, POOLING = range(6)
# Each table begins at a multiple of so many elements of the flat storage, so that its rows can be read in wide loads.
ALIGNMENT = 64


class TableLayout:
    """Where each of T tables lies in a flat storage, and which of them each of F features reads.

    Args:
        specs: ``(rows, dim)`` of each table.
        feature_table_map: the table of each feature; by default feature t reads table t.
        pooling: ``"sum"`` or ``"mean"``, one for all tables or one a table.

    Attributes:
        specs: as given.
        feature_table_map: as given, filled in.
        pooling: one a table.
        num_features: F.
        num_rows: rows of all tables; table t's begin at ``row_offsets[t]`` in this linear numbering.
        row_offsets: ``(T+1,)`` ints.
        element_offsets: first element of each table in the flat storage.
        num_elements: E, elements of the flat storage.
        dims: D_f, the dim of each feature.
        total_dim: ΣD_f, columns of the result.
        max_dim: the largest D_f.
        spec: what kernels take, ``F·6`` ints: of each feature its table's first element, first linear row, rows, dim,
            the feature's first column, and 0 for sum or 1 for mean.

    Raises:
        ValueError: sizes are negative, or the map or the poolings do not fit the tables.
    """

    def __init__(
        self,
        specs: Sequence[tuple[int, int]],
        feature_table_map: Sequence[int] | None = None,
        pooling: str | Sequence[str] = "sum",
    ):
        self.specs = tuple((int(rows), int(dim)) for rows, dim in specs)
        if not self.specs or any(rows < 0 or dim < 1 for rows, dim in self.specs):
            raise ValueError(f"specs must be (rows, dim) pairs with rows >= 0 and dim >= 1, got {list(specs)}")
        tables = len(self.specs)
        self.feature_table_map = tuple(range(tables)) if feature_table_map is None else tuple(feature_table_map)
        if not self.feature_table_map or not all(0 <= t < tables for t in self.feature_table_map):
            raise ValueError(f"feature_table_map must name tables in [0, {tables}), got {feature_table_map}")
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
        self.spec: list[int] = []
        for table, column in zip(self.feature_table_map, columns, strict=True):
            rows, dim = self.specs[table]
            first = (self.element_offsets[table], self.row_offsets[table])
            self.spec += [*first, rows, dim, column, POOLINGS.index(self.pooling[table])]
        self._on: dict[torch.device, torch.Tensor] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        """``spec`` as an ``(F, 6)`` int64 tensor on a device, made once for each."""
        if device not in self._on:
            self._on[device] = torch.tensor(self.spec, dtype=torch.int64, device=device).view(-1, 6)
        return self._on[device]

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The tables in a flat tensor: ``(N_t, D_t)`` views of E elements, ``(N_t,)`` ones of a value a row.

        Args:
            flat: ``(E,)`` or ``(num_rows,)``, contiguous.

        Raises:
            ValueError: it has neither size.
        """
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
        """Fresh optimizer state: as :meth:`Optimizer.state`, but flat, ``(E,)`` and ``(num_rows,)``."""
        rows = optimizer.state(self.num_rows, 1, device, dtype)
        shapes = {"full": (self.num_elements,), "row": (self.num_rows,)}
        kinds = optimizer.state_kinds()
        return {"step": rows["step"]} | {
            name: torch.full(shapes[kind], optimizer.initial_value(), dtype=dtype, device=device)
            for name, kind in kinds.items()
        }


def features(storage, offsets, spec):
    """For each feature ``(table view, its offsets, row of spec)``; offsets are absolute, within the whole list."""
    num_features = len(spec) // 6
    num_bags = (offsets.shape[0] - 1) // num_features
    for f in range(num_features):
        row = spec[6 * f : 6 * f + 6]
        table = storage[row[ELEMENT] : row[ELEMENT] + row[ROWS] * row[DIM]].view(row[ROWS], row[DIM])
        yield table, offsets[f * num_bags : (f + 1) * num_bags + 1], row


def gather_reduce_tables_reference(
    storage: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None,
    spec: Sequence[int],
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """:func:`gather_reduce_tables` in plain torch, differentiable; arguments as its operator takes them."""
    outs = [
        gather_reduce_reference(table, index, bags, weights, mode=POOLINGS[row[POOLING]], out_dtype=out_dtype)
        for table, bags, row in features(storage, offsets, spec)
    ]
    return torch.cat(outs, 1)


def gather_dot_tables_reference(dout, storage, index, offsets, spec, dtype):
    """The gradient of weights; see :func:`gather_dot_reference`."""
    out = torch.zeros(index.shape, dtype=dtype, device=index.device)
    for table, bags, row in features(storage, offsets, spec):
        part = dout[:, row[COLUMN] : row[COLUMN] + row[DIM]]
        # Positions outside this feature's bags get zeros.
        out = out + gather_dot_reference(part, table, index, bags, None, -1, bool(row[POOLING]), dtype)
    return out


def _forward(storage, index, offsets, weights, layout, spec, drop, out_dtype, backend):
    if backend == "reference":
        if raises(index, backend):
            check_values(spec, index, offsets, weights, drop)
        return gather_reduce_tables_reference(storage, index, offsets, weights, spec, out_dtype)
    launcher = _backend.kernels(backend, "gather_reduce_tables").gather_reduce_tables
    return launcher(storage, index, offsets, weights, layout, spec, drop, out_dtype)


def _forward_fake(storage, index, offsets, weights, layout, spec, drop, out_dtype, backend):
    num_bags = (offsets.shape[0] - 1) // (len(spec) // 6)
    return storage.new_empty(num_bags, sum(spec[DIM::6]), dtype=out_dtype)


# Bag f·B + b reads the table of feature f and writes its columns of row b.
_gather_reduce_tables = register(
    "gather_reduce_tables(Tensor storage, Tensor index, Tensor offsets, Tensor? weights, Tensor layout, int[] spec, "
    "bool drop, ScalarType out_dtype, str backend) -> Tensor",
    _forward,
    _forward_fake,
)


def _dot(dout, storage, index, offsets, layout, spec, drop, dtype, backend):
    if backend == "reference":
        return gather_dot_tables_reference(dout, storage, index, offsets, spec, dtype)
    launcher = _backend.kernels(backend, "gather_reduce_tables").gather_dot_tables
    return launcher(dout, storage, index, offsets, layout, spec, drop, dtype)


def _dot_fake(dout, storage, index, offsets, layout, spec, drop, dtype, backend):
    return dout.new_empty(index.shape, dtype=dtype)


_gather_dot_tables = register(
    "gather_dot_tables(Tensor dout, Tensor storage, Tensor index, Tensor offsets, Tensor layout, int[] spec, "
    "bool drop, ScalarType dtype, str backend) -> Tensor",
    _dot,
    _dot_fake,
)


def _setup_context(ctx, inputs, output):
    storage, index, offsets, weights, layout, ctx.spec, ctx.drop, _, ctx.backend = inputs
    needs_weights = weights is not None and ctx.needs_input_grad[3]
    ctx.shape, ctx.dtype = storage.shape, storage.dtype
    ctx.weights_dtype = None if weights is None else weights.dtype
    ctx.save_for_backward(storage if needs_weights else None, index, offsets, weights, layout)


def _backward(ctx, dout):
    storage, index, offsets, weights, layout = ctx.saved_tensors
    dstorage = dweights = None
    if ctx.needs_input_grad[0]:
        dstorage = _storage_gradient(ctx, dout, index, offsets, weights)
    if weights is not None and ctx.needs_input_grad[3]:
        dweights = _gather_dot_tables(
            dout, storage, index, offsets, layout, ctx.spec, ctx.drop, ctx.weights_dtype, ctx.backend
        )
    return dstorage, None, None, dweights, None, None, None, None, None


def _storage_gradient(ctx, dout, index, offsets, weights):
    """Dense: for each feature the transposed lists of its bags, summed into its table's part."""
    wide = accumulation_dtype(ctx.dtype)
    dout = summed_in(wide, dout)
    total = torch.zeros(ctx.shape, dtype=wide, device=dout.device)
    for table, bags, row in features(total, offsets, ctx.spec):
        ids, bag, factor = transpose_bags(index, bags, weights, None, -1, bool(row[POOLING]), row[ROWS], wide)
        part = dout[:, row[COLUMN] : row[COLUMN] + row[DIM]]
        table += sum_sorted(part, ids, bag, factor, row[ROWS], wide, ctx.backend)
    return total.to(ctx.dtype)


register_autograd("gather_reduce_tables", _backward, _setup_context)


def check_tables(
    storage: torch.Tensor,
    layout: TableLayout,
    index: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None,
    backend: str,
    bounds: str,
    bounds_count: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check the arguments of the primitives over many tables; returns index and offsets as the mode repairs them."""
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
    if bounds == "clamp" or bounds_count is not None:
        rows = _rows_of_ids(layout.on(index.device)[:, ROWS], index, offsets)
        index, offsets = apply_bounds(index, offsets, rows, bounds, bounds_count, backend)
    elif bounds == "drop":
        index, offsets = apply_bounds(index, offsets, 0, bounds, None, backend)
    return index, offsets


def _rows_of_ids(rows, index, offsets):
    """For each id the rows of its feature's table, given ``rows (F,)``; outside every bag a great number."""
    num_features = rows.shape[0]
    num_bags = (offsets.shape[0] - 1) // num_features
    feature = bags_of(index, offsets.clamp(0, index.shape[0]).cummax(0).values) // max(num_bags, 1)
    outside = torch.full((1,), torch.iinfo(index.dtype).max, dtype=torch.int64, device=index.device)
    return torch.cat([rows, outside])[feature.clamp(max=num_features)]


def check_values(spec, index, offsets, weights, drop):
    """What the native kernels check of the values in the lists."""
    check_offsets(index, offsets)
    rows = _rows_of_ids(torch.tensor(spec[ROWS::6]), index, offsets)
    inside = bags_of(index, offsets) < offsets.shape[0] - 1
    live = inside & (index >= 0) & (index < rows)
    if not drop and not torch.equal(live, inside):
        position = int((inside & ~live).nonzero()[0])
        raise IndexError(
            f"index must be in [0, N) with N={int(rows[position])}, got {int(index[position])} at flat position "
            f"{position}"
        )
    if weights is not None:
        check_weights_values(weights, live)


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
        storage: ``(E,)`` float, contiguous: every table where the layout says.
        layout: the tables and features.
        index: ``(L,)`` int32 or int64, ids within their tables, feature-major: all bags of feature 0, then of 1.
        offsets: ``(F·B+1,)`` int32 or int64, ascending.
        weights: ``(L,)`` float, or None for ones.
        bounds: as for :func:`gather_reduce`.
        bounds_count: likewise.
        out_dtype: of the result; the storage's by default.

    Returns:
        ``(B, ΣD_f)``, accumulated in float32 (float64 for float64); empty bags are zero. Differentiable in ``storage``
        (a dense gradient) and ``weights``.

    Raises:
        TypeError: an argument is no tensor, or a dtype is not supported.
        ValueError: sizes, devices, modes or offsets do not fit; on the CPU, a weight that counts is NaN.
        IndexError: on the CPU, an id outside its table with ``bounds="raise"``.
    """
    check_tensor("storage", storage)
    backend = _backend.resolve("gather_reduce_tables", storage)
    index, offsets = check_tables(storage, layout, index, offsets, weights, backend, bounds, bounds_count)
    out_dtype = checked_out_dtype(out_dtype, storage, backend)
    if backend == "reference":
        if raises(index, backend):
            check_values(layout.spec, index, offsets, weights, bounds != "raise")
        return gather_reduce_tables_reference(storage, index, offsets, weights, layout.spec, out_dtype)
    return _gather_reduce_tables(
        storage, index, offsets, weights, layout.on(storage.device), layout.spec, bounds != "raise", out_dtype, backend
    )
