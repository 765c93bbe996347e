"""Tables of which each process holds a part: their calls, as lookups of one exchange."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from gossamer._checks import check_index, check_same_device, check_shape
from gossamer.nn import TableBatchedEmbeddingBags
from gossamer.nn.embeddings.embedding import bag_lists
from gossamer.nn.embeddings.table_batched import feature_lists
from gossamer.ops.gather_reduce import check_lookup
from gossamer.optim import Optimizer
from gossamer.parallel.dynamic_shard import DynamicShard
from gossamer.parallel.placement import (
    Split,
)
from gossamer.parallel.shards import TableShard, copy_beside
from gossamer.parallel.table_exchange import Request, look_up


class Prepared(NamedTuple):
    """A call of a sharded table, before the exchange.

    Attributes:
        requests: what is looked up.
        finish: computes the table's result from the results of the requests.
    """

    requests: list[Request]
    finish: Callable[[list[torch.Tensor]], torch.Tensor]


class Sharded:
    """The base of sharded tables; each call of one is a separate exchange.

    Attributes:
        group: the process group of the ranks.
        device: of the tables.
        scale: factor of the gradients that rows get.
    """

    scale: float = 1.0

    def prepare(self, *args: object, **keywords: object) -> Prepared:
        """Check the arguments of a call and return its lookups."""
        raise NotImplementedError

    @torch.compiler.disable
    def forward(self, *args: object, **keywords: object) -> torch.Tensor:
        """As in the original table; every rank must make the call, with its own ids."""
        return lookup({"": self}, {"": (args, keywords)})[""]


@torch.compiler.disable
def lookup(
    tables: Mapping[str, nn.Module], inputs: Mapping[str, tuple | torch.Tensor | tuple[tuple, dict]]
) -> dict[str, torch.Tensor]:
    """Look up several tables at once: sharded tables of one mesh with one exchange in each direction, others one by
    one.

    >>> bags = lookup(model.tables, {"user": (ids, offsets), "item": (other_ids, other_offsets)})

    Args:
        tables: by name, sharded or not, as an ``nn.ModuleDict`` has them.
        inputs: the arguments for each: a tensor, a tuple of arguments, or a pair of a tuple and a dict of keywords.

    Returns:
        The tables' results by name, in the order of ``inputs``. The loss should use all of them; an unused result gets
        a gradient of zeros.

    Raises:
        KeyError: a name is not among the tables.
        Exception: the errors of a table; for sharded tables on every rank if one rank's arguments are wrong.
    """
    calls, results = {}, dict.fromkeys(inputs)
    for name, given in inputs.items():
        if isinstance(given, torch.Tensor) or not isinstance(given, tuple):
            given = (given,)
        if len(given) != 2 or not (isinstance(given[0], tuple) and isinstance(given[1], dict)):
            given = (given, {})
        calls[name] = given
    groups: dict[tuple, list[str]] = {}
    for name, (args, keywords) in calls.items():
        table = tables[name]
        if isinstance(table, Sharded):
            groups.setdefault((id(table.group), table.scale), []).append(name)
        else:
            results[name] = table(*args, **keywords)
    for names in groups.values():
        prepared: dict[str, Prepared] = {}

        def build(names: Sequence[str] = names, prepared: dict[str, Prepared] = prepared) -> list[Request]:
            for name in names:
                args, keywords = calls[name]
                prepared[name] = tables[name].prepare(*args, **keywords)
            return [request for name in names for request in prepared[name].requests]

        first = tables[names[0]]
        found = iter(look_up(build, first.group, first.device, first.scale))
        for name in names:
            own = [next(found) for _ in prepared[name].requests]
            results[name] = prepared[name].finish(own)
    return results


def _check_ids(name: str, ids: torch.Tensor, num_rows: int | torch.Tensor) -> None:
    """Raise IndexError if an id is outside its table; the exchange reads sizes on the host in any case."""
    bad = ((ids < 0) | (ids >= num_rows)).nonzero()
    if bad.numel():
        position = int(bad[0])
        size = int(num_rows if isinstance(num_rows, int) else num_rows.expand(ids.shape)[position])
        raise IndexError(
            f"{name} must be in [0, N) with N={size}, got {int(ids[position])} at flat position {position}"
        )


class _Bags(NamedTuple):
    """Flat lists of ids that contribute."""

    ids: torch.Tensor
    lengths: torch.Tensor
    weights: torch.Tensor | None

    def keep(self, kept: torch.Tensor) -> _Bags:
        """Only the ids for which ``kept (L,)`` is true."""
        if bool(kept.all()):
            return self
        bag = torch.repeat_interleave(self.lengths)[kept]
        lengths = torch.bincount(bag, minlength=self.lengths.numel())
        return _Bags(self.ids[kept], lengths, None if self.weights is None else self.weights[kept])


def _flat(ids: torch.Tensor, offsets: torch.Tensor | None, weights: torch.Tensor | None, whole: bool) -> _Bags:
    """Lists as :func:`gossamer.gather_reduce` takes them, flat and without ids outside all bags."""
    if offsets is None:
        rows, each = ids.shape
        lengths = torch.full((rows,), each, dtype=torch.int64, device=ids.device)
        return _Bags(ids.reshape(-1).long(), lengths, None if weights is None else weights.reshape(-1))
    ends = offsets.long()
    if not whole:
        ends = torch.cat([ends, ends.new_full((1,), ids.shape[0])])
    inside = slice(int(ends[0]), int(ends[-1]))
    return _Bags(ids[inside].long(), ends.diff(), None if weights is None else weights[inside])


class ShardedEmbedding(Sharded, TableShard):
    """A :class:`gossamer.nn.Embedding` of which each process has a part; made by :func:`shard_tables`.

    Calls, results and names in the ``state_dict`` are those of the layer. ``weight`` is this process's part.
    """

    def prepare(self, input: torch.Tensor) -> Prepared:
        """A lookup of ids of any shape."""
        check_index("input", input)
        check_same_device(weight=self.weight, input=input)
        ids = input.reshape(-1).long()
        _check_ids("input", ids, self.num_embeddings)
        trained = None if self.padding_idx is None else ids != self.padding_idx
        request = Request(
            self,
            ids,
            torch.ones_like(ids),
            pooled=False,
            trained=trained,
            out_dtype=self.weight.dtype,
            learns=torch.is_grad_enabled() and self.trained,
        )
        return Prepared([request], lambda rows: rows[0].view(*input.shape, self.embedding_dim))

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors ``(..., D)`` of ``ids (...)``."""
        return self(ids)


class ShardedEmbeddingBag(Sharded, TableShard):
    """A :class:`gossamer.nn.EmbeddingBag` of which each process has a part; made by :func:`shard_tables`.

    Calls, results and names in the ``state_dict`` are those of the layer. ``weight`` is this process's part.
    """

    def prepare(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> Prepared:
        """A lookup of bags."""
        check_index("input", input)
        ids, offsets, weights, whole = bag_lists(self, input, offsets, per_sample_weights)
        check_same_device(weight=self.weight, input=ids, offsets=offsets, per_sample_weights=weights)
        if offsets is not None:
            ends = offsets if whole else torch.cat([offsets, offsets.new_full((1,), ids.shape[0])])
            check_lookup(self.weight.detach(), ids, ends, weights, self.mode, "input")
        bags = _flat(ids, offsets, weights, whole)
        _check_ids("input", bags.ids, self.num_embeddings)
        if self.padding_idx is not None:
            bags = bags.keep(bags.ids != self.padding_idx)
        request = Request(
            self,
            bags.ids,
            bags.lengths,
            weights=bags.weights,
            mode=self.mode,
            out_dtype=self.weight.dtype,
            learns=torch.is_grad_enabled() and self.trained,
        )
        return Prepared([request], lambda rows: rows[0])

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors ``(..., D)`` of ``ids (...)``, of which one at ``padding_idx`` learns nothing."""

        def prepare(ids: torch.Tensor) -> Prepared:
            return ShardedEmbedding.prepare(self, ids)

        return _alone(self, prepare, ids)


@torch.compiler.disable
def _alone(table: Sharded, prepare: Callable[..., Prepared], *args: object) -> torch.Tensor:
    """A call of a single table other than :meth:`Sharded.forward`."""
    found: list[Prepared] = []

    def build() -> list[Request]:
        found.append(prepare(*args))
        return found[0].requests

    results = look_up(build, table.group, table.device, table.scale)
    return found[0].finish(results)


class ShardedTableBatchedEmbeddingBags(Sharded, nn.Module):
    """A :class:`gossamer.nn.TableBatchedEmbeddingBags` of which each process has parts; made by :func:`shard_tables`.

    Calls and results are those of the layer; all of its tables share one exchange in each direction. In the
    ``state_dict`` table t is ``tables.t.weight`` with ``tables.t.optimizer_*``; the flat tensors of the original layer
    can be loaded too.

    Attributes:
        tables: this process's part of each table.
        layout: the :class:`gossamer.TableLayout` of the whole tables.
        optimizer: of all tables; may be set to one with the same state, to change a number.
    """

    def __init__(self, layer: TableBatchedEmbeddingBags, splits: Sequence[Split], mesh: DeviceMesh) -> None:
        super().__init__()
        self.layout, self.feature_names, self.mesh = layer.layout, layer.feature_names, mesh
        self.output_dtype, self.bounds = layer.output_dtype, layer.bounds
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        states = layer.split_optimizer_states()
        shards = []
        for weight, state, split in zip(layer.split_embedding_weights(), states, splits, strict=True):
            step = {} if layer.optimizer is None else {"step": layer.optimizer_step}
            options = {"by_position": True, "bound": max(split.rows, 1) ** -0.5}
            how = {"requires_grad": layer.weights.requires_grad, "options": options}
            shards.append(TableShard(weight, state | step, layer.optimizer, split, mesh, **how))
        self.tables = nn.ModuleList(shards)
        counter = None if layer.bounds_count is None else layer.bounds_count.clone()
        self.register_buffer("bounds_count", counter, persistent=False)

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group of the ranks."""
        return self.mesh.get_group()

    @property
    def device(self) -> torch.device:
        """The device of the tables."""
        return self.tables[0].weight.device

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer of all tables."""
        return self.tables[0].optimizer

    @optimizer.setter
    def optimizer(self, value: Optimizer | None) -> None:
        for table in self.tables:
            table.optimizer = value

    def __setattr__(self, name: str, value: object) -> None:
        """As for any module, but sets properties, which ``nn.Module`` would hide."""
        if name == "optimizer":
            type(self).optimizer.fset(self, value)
        else:
            super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict) -> ShardedTableBatchedEmbeddingBags:
        return copy_beside(self, memo)

    def reset_parameters(self) -> None:
        """Redraw every table, uniform in ``±1/√rows``, and reset the optimizer; on every rank."""
        if self.bounds_count is not None:
            self.bounds_count.zero_()
        for table in self.tables:
            table.reset_parameters()

    def nbytes(self) -> int:
        """Bytes on this rank."""
        return sum(table.nbytes() for table in self.tables)

    def inference_nbytes(self) -> int:
        """Bytes on this rank without the optimizer's state."""
        return sum(table.inference_nbytes() for table in self.tables)

    def prepare(
        self,
        indices: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> Prepared:
        """A lookup of the bags of every feature."""
        indices, offsets, per_sample_weights = feature_lists(self, indices, offsets, per_sample_weights)
        features = self.layout.num_features
        check_index("indices", indices)
        check_index("offsets", offsets)
        check_shape("offsets", offsets, (None,), "(F·B+1,)")
        if offsets.shape[0] < 1 or (offsets.shape[0] - 1) % features:
            raise ValueError(f"offsets must have shape (F·B+1,) with F={features} features, got {tuple(offsets.shape)}")
        wrong = 0
        if self.bounds != "raise":
            repaired = offsets.clamp(0, indices.shape[0]).cummax(0).values
            wrong, offsets = (repaired != offsets).sum(), repaired
        check_lookup(self.tables[0].weight.detach(), indices, offsets, per_sample_weights, "sum", "indices")
        bags = _flat(indices, offsets, per_sample_weights, True)
        each = (offsets.shape[0] - 1) // features
        ends = offsets[::each].tolist() if each else [0] * (features + 1)
        counts = [end - begin for begin, end in itertools.pairwise(ends)]
        bags = self._bounded(bags, counts, wrong)
        lengths = bags.lengths.view(features, each)
        counts = lengths.sum(1).tolist()
        ids = bags.ids.split(counts)
        weights = None if bags.weights is None else bags.weights.split(counts)
        requests, places = [], {}
        for table, shard in enumerate(self.tables):
            mine = [f for f, of in enumerate(self.layout.feature_table_map) if of == table]
            if not mine:
                continue
            places |= {feature: (len(requests), place) for place, feature in enumerate(mine)}
            requests.append(
                Request(
                    shard,
                    torch.cat([ids[f] for f in mine]),
                    torch.cat([lengths[f] for f in mine]),
                    features=len(mine),
                    weights=None if weights is None else torch.cat([weights[f] for f in mine]),
                    mode=self.layout.pooling[table],
                    out_dtype=self.output_dtype or shard.dtype,
                    learns=torch.is_grad_enabled() and shard.trained,
                )
            )

        def finish(results: list[torch.Tensor]) -> torch.Tensor:
            columns = [results[r][place * each : (place + 1) * each] for r, place in map(places.get, range(features))]
            return torch.cat(columns, 1)

        return Prepared(requests, finish)

    def _bounded(self, bags: _Bags, counts: Sequence[int], wrong: torch.Tensor | int) -> _Bags:
        """The lists after applying the bounds mode."""
        rows = torch.tensor([self.layout.specs[t][0] for t in self.layout.feature_table_map], device=bags.ids.device)
        rows = rows.repeat_interleave(torch.tensor(counts, device=rows.device))
        if self.bounds == "raise":
            _check_ids("indices", bags.ids, rows)
            return bags
        outside = (bags.ids < 0) | (bags.ids >= rows)
        self.bounds_count.add_(outside.sum() + wrong)
        # A table without rows has no row to clamp to.
        if self.bounds == "clamp":
            bags = bags._replace(ids=bags.ids.clamp(min=0).minimum((rows - 1).clamp(min=0)))
            outside = rows == 0
        return bags.keep(~outside)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        self._split_flat(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _split_flat(self, state_dict: dict, prefix: str) -> None:
        """Replace the flat tensors of the unsharded layer by those of each table."""
        if prefix + "weights" not in state_dict:
            return
        flat = {"weight": state_dict.pop(prefix + "weights")}
        state_dict.pop(prefix + "table_specs", None)
        for key in [key for key in state_dict if key.startswith(prefix + "optimizer_")]:
            flat[key.removeprefix(prefix)] = state_dict.pop(key)
        for name, tensor in flat.items():
            shared = name in ("optimizer_step", "optimizer_algorithm")
            parts = [tensor] * len(self.tables) if shared else self.layout.views(tensor)
            for table, part in enumerate(parts):
                state_dict[f"{prefix}tables.{table}.{name}"] = part

    def lookup(self, ids: torch.Tensor, feature: int = 0) -> torch.Tensor:
        """The vectors ``(..., D_f)`` of one feature's ``ids (...)``."""

        def prepare() -> Prepared:
            check_index("ids", ids)
            features, table_of = self.layout.num_features, self.layout.feature_table_map
            if not 0 <= feature < features:
                raise ValueError(f"feature must be in [0, F) with F={features}, got {feature}")
            shard = self.tables[table_of[feature]]
            flat = ids.reshape(-1).long()
            _check_ids("ids", flat, shard.num_embeddings)
            learns = torch.is_grad_enabled() and shard.trained
            dtype = self.output_dtype or shard.dtype
            request = Request(shard, flat, torch.ones_like(flat), pooled=False, out_dtype=dtype, learns=learns)
            return Prepared([request], lambda rows: rows[0].view(*ids.shape, shard.embedding_dim))

        return _alone(self, prepare)


class ShardedDynamicEmbedding(Sharded, DynamicShard):
    """A :class:`gossamer.nn.DynamicEmbedding` whose ids lie on several processes; made by :func:`shard_tables`.

    With ``"row"`` an id belongs to the rank given by its hash; with ``"table"`` all ids belong to one rank. Each rank
    has its share of the capacity and of the admission counts, and expires, evicts and exports its own ids. ``local`` is
    the layer of this rank, for counters, deltas and files.
    """

    @property
    def device(self) -> torch.device:
        """The device of the table."""
        return self.local.device

    @property
    def counters(self):
        """Counts of events for this rank's ids."""
        return self.local.counters

    @property
    def pooling(self) -> str | None:
        """``"sum"``, ``"mean"``, ``"max"``, or None for a row per id."""
        return self.local.pooling

    def prepare(
        self,
        ids: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
        *,
        weights: torch.Tensor | None = None,
    ) -> Prepared:
        """A lookup of bags, or of ids without pooling."""
        if weights is not None and per_sample_weights is not None:
            raise ValueError("weights is another name of per_sample_weights, only one of them may be given")
        weights = per_sample_weights if weights is None else weights
        if self.pooling is None and (offsets is not None or weights is not None):
            raise ValueError("offsets and weights must be None without pooling")
        check_index("ids", ids)
        shape = ids.shape
        if self.pooling is None:
            ids = ids.reshape(-1, 1)
        if ids.dtype != self.id_dtype:
            raise TypeError(f"ids must have the table's key_dtype, {self.id_dtype}, got {ids.dtype}")
        check_lookup(self.local.table.values, ids, offsets, weights, self.pooling or "sum", "ids")
        if offsets is None and ids.dim() == 1:
            ids, weights = ids.unsqueeze(1), None if weights is None else weights.unsqueeze(1)
        bags = _flat(ids, offsets, weights, True)
        inserts = self.training and not self.local.frozen and torch.is_grad_enabled()
        request = Request(
            self,
            bags.ids.to(self.id_dtype),
            bags.lengths,
            weights=bags.weights,
            mode=self.pooling or "sum",
            pooled=self.pooling is not None,
            out_dtype=self.dtype,
            learns=inserts and self.trained,
            inserts=inserts,
        )
        if self.pooling is None:
            return Prepared([request], lambda rows: rows[0].view(*shape, self.embedding_dim))
        return Prepared([request], lambda rows: rows[0])

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors ``(..., D)`` of ``ids (...)``, zero for ids without a row."""

        def prepare() -> Prepared:
            check_index("ids", ids)
            made = self.prepare(ids.reshape(-1, 1)) if self.pooling else self.prepare(ids.reshape(-1))
            requests = [request._replace(pooled=False) for request in made.requests]
            return Prepared(requests, lambda rows: rows[0].view(*ids.shape, self.embedding_dim))

        return _alone(self, prepare)
