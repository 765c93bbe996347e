"""Many embedding tables of a recommender model behind one lookup."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gossamer._checks import check_device, check_dtype, check_index, check_sequence, check_shape
from gossamer._numerics import accumulation_dtype
from gossamer.nn.embeddings.fused_step import FusedTable
from gossamer.nn.embeddings.table import check_budget
from gossamer.ops.gather_reduce_step import gather_reduce_tables_step
from gossamer.ops.gather_reduce_tables import TableLayout, gather_reduce_tables
from gossamer.optim import Optimizer


class TableBatchedEmbeddingBags(FusedTable):
    """T embedding tables of mixed dims in one storage, looked up by F features in one launch.

    Each of B examples has one bag of ids for each feature; ``y[b] = [pool_f(table_{m(f)}[ids of (f, b)])]_f``, side by
    side. With ``optimizer`` the backward pass takes its step on the rows that were looked up, one step even if
    several features read the row; :class:`Embedding` describes the parameter in this case.

    Args:
        specs: ``(rows, dim)`` of each table.
        feature_table_map: the table of each feature; by default feature t reads table t.
        pooling: ``"sum"`` or ``"mean"``, one for all tables or one per table.
        optimizer: one of :mod:`gossamer.optim` for all tables, or None for a dense gradient.
        weights_dtype: of the tables: float32, float16 or bfloat16 (float64 on the CPU).
        output_dtype: of the result; that of the tables by default.
        feature_names: names of the features, which the keys of a KeyedJaggedTensor must then be.
        bounds: treatment of ids outside their table; see :func:`gossamer.gather_reduce`.
        device: of the tables.

    Attributes:
        weights: the parameter, ``(E,)``: the tables at the positions of ``layout``. Rows start uniform in ``±1/√rows``.
        layout: the :class:`gossamer.TableLayout`.
        num_embeddings: rows of all tables.
        embedding_dim: D where all tables have the same, else None.
        bounds_count: with ``bounds`` other than ``"raise"``, a buffer that counts ids and offsets out of bounds.

    Raises:
        TypeError: ``optimizer`` is not one of :mod:`gossamer.optim`.
        ValueError: sizes, map, poolings, names or bounds do not fit.
    """

    tables = ("weights",)

    def __init__(
        self,
        specs: Sequence[tuple[int, int]],
        feature_table_map: Sequence[int] | None = None,
        *,
        pooling: str | Sequence[str] = "sum",
        optimizer: Optimizer | None = None,
        weights_dtype: torch.dtype = torch.float32,
        output_dtype: torch.dtype | None = None,
        feature_names: Sequence[str] | None = None,
        bounds: str = "raise",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if bounds not in ("raise", "clamp", "drop"):
            raise ValueError(f"bounds must be 'raise', 'clamp' or 'drop', got {bounds!r}")
        check_dtype("weights_dtype", weights_dtype)
        check_dtype("output_dtype", output_dtype)
        check_device("device", device)
        self.layout = TableLayout(specs, feature_table_map, pooling)
        if feature_names is not None:
            check_sequence("feature_names", feature_names)
        names = None if feature_names is None else list(feature_names)
        if names is not None and len(names) != self.layout.num_features:
            raise ValueError(f"feature_names must name {self.layout.num_features} features, got {names}")
        self.num_embeddings = sum(rows for rows, _ in self.layout.specs)
        dims = {dim for _, dim in self.layout.specs}
        self.embedding_dim = dims.pop() if len(dims) == 1 else None
        self.feature_names = names
        self.output_dtype = output_dtype
        self.bounds = bounds
        self.weights = torch.nn.Parameter(torch.empty(self.layout.num_elements, dtype=weights_dtype, device=device))
        self.register_buffer("table_specs", torch.tensor(self.layout.specs, device=self.weights.device))
        counter = None
        if bounds != "raise":
            counter = torch.zeros(1, dtype=torch.int64, device=self.weights.device)
        self.register_buffer("bounds_count", counter, persistent=False)
        self.reset_parameters()
        self.attach(optimizer)

    def _fresh_state(self, table: str) -> dict[str, torch.Tensor]:
        return self.layout.state(self.optimizer, self.weights.device, accumulation_dtype(self.weights.dtype))

    def reset_parameters(self) -> None:
        """Redraw every table, uniform in ``±1/√rows``, and reset the optimizer; between tables is zero."""
        with torch.no_grad():
            self.table_specs.copy_(torch.tensor(self.layout.specs))
            if self.bounds_count is not None:
                self.bounds_count.zero_()
            self.weights.zero_()
            for table in self.split_embedding_weights():
                bound = max(table.shape[0], 1) ** -0.5
                table.uniform_(-bound, bound)
            self._reset_state()

    def split_embedding_weights(self) -> list[torch.Tensor]:
        """The tables, ``(rows, dim)`` each: views of the storage, outside autograd."""
        return self.layout.views(self.weights.detach())

    def split_optimizer_states(self) -> list[dict[str, torch.Tensor]]:
        """For each table its part of each state tensor by name: views, ``(rows, dim)`` or ``(rows,)``.

        The step count, which all tables share, is the buffer ``optimizer_step``.
        """
        tables: list[dict[str, torch.Tensor]] = [{} for _ in self.layout.specs]
        for name in self.optimizer.state_kinds() if self.optimizer else ():
            for table, part in zip(tables, self.layout.views(getattr(self, f"optimizer_{name}")), strict=True):
                table[name] = part
        return tables

    def lookup(self, ids: torch.Tensor, feature: int = 0) -> torch.Tensor:
        """The vectors ``(..., D_f)`` of one feature's ``ids (...)``, with its table's step if it is trained.

        Raises:
            TypeError: ``ids`` is not int32 or int64.
            ValueError: ``feature`` is outside ``[0, F)``.
            IndexError: on the CPU, an id outside its table with ``bounds="raise"``.
        """
        check_index("ids", ids)
        features, tables = self.layout.num_features, self.layout.feature_table_map
        if not 0 <= feature < features:
            raise ValueError(f"feature must be in [0, F) with F={features}, got {feature}")
        bags = ids.numel()
        # One id in each bag of the feature, and none in bags of other features.
        positions = torch.arange(features * bags + 1, device=ids.device) - feature * bags
        rows = self(ids.reshape(-1), positions.clamp(0, bags))
        dims = [self.layout.specs[table][1] for table in tables]
        begin = sum(dims[:feature])
        return rows[:, begin : begin + dims[feature]].reshape(*ids.shape, dims[feature])

    @classmethod
    def from_budget(
        cls,
        num_embeddings: int | Sequence[int],
        embedding_dim: int | Sequence[int],
        nbytes: int,
        **options: object,
    ) -> TableBatchedEmbeddingBags:
        """Tables of the rows and dims given, if they fit; see :meth:`Table.from_budget`.

        Args:
            num_embeddings: rows of each table, or of the only one.
            embedding_dim: dim of each table, or of all.
            nbytes: of :meth:`inference_nbytes`.
            **options: of the class.
        """
        check_budget(nbytes)
        rows = [num_embeddings] if isinstance(num_embeddings, int) else list(num_embeddings)
        dims = [embedding_dim] * len(rows) if isinstance(embedding_dim, int) else list(embedding_dim)
        specs = list(zip(rows, dims, strict=True))
        needed = cls(specs, **options | {"device": "meta"}).inference_nbytes()
        if needed > nbytes:
            raise ValueError(f"nbytes must be at least {needed} for tables {specs}, got {nbytes}")
        return cls(specs, **options)

    def forward(
        self,
        indices: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pool the bags of every feature.

        Args:
            indices: ``(L,)`` int32 or int64, ids within their tables, feature-major: all bags of feature 0, then of
                feature 1; or a TorchRec KeyedJaggedTensor, which brings the other arguments along.
            offsets: ``(F·B+1,)`` int32 or int64, ascending.
            per_sample_weights: ``(L,)`` float, or None for ones.

        Returns:
            ``(B, ΣD_f)``.

        Raises:
            TypeError: a dtype is not supported, or ``offsets`` is missing.
            ValueError: sizes do not fit, or the keys of a KeyedJaggedTensor are not the features.
            IndexError: on the CPU, an id outside its table with ``bounds="raise"``.
        """
        lists = feature_lists(self, indices, offsets, per_sample_weights)
        how = {"bounds": self.bounds, "bounds_count": self.bounds_count, "out_dtype": self.output_dtype}
        if self.optimizer is None:
            return gather_reduce_tables(self.weights, self.layout, *lists, **how)
        return gather_reduce_tables_step(self.weights, self.layout, *lists, **how, **self._step())

    def _foreign(self, state_dict, prefix) -> list[str]:
        found = super()._foreign(state_dict, prefix)
        given = state_dict.get(prefix + "table_specs")
        if given is not None and not given.is_meta and not found:
            specs = tuple(map(tuple, given.tolist()))
            if specs != self.layout.specs:
                found.append(f"{prefix}table_specs must be {list(self.layout.specs)}, got {list(specs)}")
        return found

    def extra_repr(self) -> str:
        """Tables, features and optimizer."""
        parts = [f"specs={list(self.layout.specs)}", f"feature_table_map={list(self.layout.feature_table_map)}"]
        parts += [f"pooling={list(self.layout.pooling)}", f"weights_dtype={self.weights.dtype}"]
        return ", ".join(parts + ([f"optimizer={self.optimizer}"] if self.optimizer else []))


def feature_lists(layer: torch.nn.Module, indices, offsets, per_sample_weights) -> tuple:
    """Ids, offsets and weights of a call of a layer with :class:`TableBatchedEmbeddingBags`' arguments."""
    if not isinstance(indices, torch.Tensor):
        if offsets is not None or per_sample_weights is not None:
            raise ValueError("offsets and per_sample_weights must not be given beside a KeyedJaggedTensor")
        return _keyed_lists(layer, indices)
    check_index("indices", indices)
    check_shape("indices", indices, (None,), "(L,)")
    if offsets is None:
        raise TypeError("offsets must be a torch.Tensor, got NoneType")
    if per_sample_weights is not None:
        check_shape("per_sample_weights", per_sample_weights, tuple(indices.shape), "that of indices")
    return indices, offsets, per_sample_weights


def _keyed_lists(layer: torch.nn.Module, features) -> tuple:
    """Ids, offsets and weights of a KeyedJaggedTensor, known by its methods."""
    for method in ("keys", "values", "offsets", "weights_or_none", "stride"):
        if not callable(getattr(features, method, None)):
            raise TypeError(
                f"indices must be a torch.Tensor or a KeyedJaggedTensor, got {type(features).__name__} "
                f"without {method}()"
            )
    keys = list(features.keys())
    if layer.feature_names is not None and keys != layer.feature_names:
        raise ValueError(f"indices must have the keys {layer.feature_names} in this order, got {keys}")
    expected = layer.layout.num_features
    if len(keys) != expected:
        raise ValueError(f"indices must have {expected} keys, one a feature, got {keys}")
    offsets = features.offsets()
    if offsets.shape[0] != expected * features.stride() + 1:
        raise ValueError(
            f"indices must have one batch size for all keys, got stride {features.stride()} and "
            f"{offsets.shape[0]} offsets for {expected} keys"
        )
    return features.values(), offsets, features.weights_or_none()
