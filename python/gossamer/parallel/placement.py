"""The distribution of tables over the ranks of a mesh dimension, and a planner that places them by bytes and
lookups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from gossamer._checks import check_number, check_positive
from gossamer.nn import DynamicEmbedding, Embedding, EmbeddingBag, TableBatchedEmbeddingBags
from gossamer.nn.embeddings.table import bytes_of

KINDS = ("row", "table", "column", "replicate")
SLACK = 1.05
LOOKUP_SLACK = 1.25
SHARDABLE = (Embedding, EmbeddingBag, TableBatchedEmbeddingBags, DynamicEmbedding)


@dataclass(frozen=True)
class Piece:
    """The part of a table that one rank holds.

    Attributes:
        row: its first row.
        rows: its rows.
        column: its first column.
        columns: its columns.
    """

    row: int
    rows: int
    column: int
    columns: int

    @property
    def numel(self) -> int:
        """Its elements."""
        return self.rows * self.columns

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The piece of a whole table ``(N, D)``, or of a tensor ``(N,)`` of a value per row."""
        rows = whole[self.row : self.row + self.rows]
        return rows if whole.dim() == 1 else rows[:, self.column : self.column + self.columns]


def chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """First element and length of a part, divided as in ``torch.chunk`` and ``Shard``; the last parts may be short or
    empty.
    """
    each = -(-size // parts)
    begin = min(index * each, size)
    return begin, min(each, size - begin)


@dataclass(frozen=True)
class Split:
    """The distribution of one table over the ranks.

    Attributes:
        kind: ``"row"``: each rank has a block of rows; ``"column"``: a block of columns; ``"table"``: rank ``owner``
            has all of it; ``"replicate"``: every rank has all of it.
        rows: N of the whole table.
        columns: D of the whole table.
        world: ranks.
        owner: the rank that has the table, for ``"table"``.
    """

    kind: str
    rows: int
    columns: int
    world: int
    owner: int = 0

    def piece(self, rank: int) -> Piece:
        """The piece that a rank holds."""
        if self.kind == "row":
            return Piece(*chunk(self.rows, self.world, rank), 0, self.columns)
        if self.kind == "column":
            return Piece(0, self.rows, *chunk(self.columns, self.world, rank))
        rows = self.rows if self.kind == "replicate" or rank == self.owner else 0
        return Piece(0, rows, 0, self.columns)

    def holders(self) -> list[int]:
        """The ranks that hold a part of the table."""
        return [rank for rank in range(self.world) if self.piece(rank).numel]

    def check(self, name: str) -> None:
        """Raise ValueError if there are more ranks than rows or columns."""
        if self.kind == "row" and self.rows < self.world:
            raise ValueError(
                f"plan[{name!r}] must not be 'row' for a table of {self.rows} rows over {self.world} "
                "ranks, which are more"
            )
        if self.kind == "column" and not self.piece(self.world - 1).columns:
            raise ValueError(
                f"plan[{name!r}] must not be 'column' for a table of {self.columns} columns over {self.world} ranks, "
                "the last of which would get none"
            )


@dataclass(frozen=True)
class TableInfo:
    """The planner's data about a table.

    Attributes:
        rows: N; for a dynamic table its capacity.
        columns: D.
        nbytes: bytes including the optimizer's state.
        lookups: ids of one step of one process, with repeats; 0 if not measured.
        unique: distinct ids.
        bags: bags of one step of one process.
        kinds: the kinds of sharding that the table supports.
    """

    rows: int
    columns: int
    nbytes: int
    lookups: float = 0.0
    unique: float = 0.0
    bags: float = 0.0
    kinds: tuple[str, ...] = KINDS


@dataclass(frozen=True)
class TablePlan:
    """The placement of every table of a model, which :func:`gossamer.parallel.shard_tables` takes as its plan.

    Attributes:
        world: ranks.
        kinds: ``"row"``, ``"table"``, ``"column"`` or ``"replicate"`` by the table's name.
        owners: the rank of each table of kind ``"table"``.
        tables: data about each table.
    """

    world: int
    kinds: dict[str, str]
    owners: dict[str, int]
    tables: dict[str, TableInfo] = field(repr=False)

    def split(self, name: str) -> Split:
        """How a table is distributed over the ranks."""
        info = self.tables[name]
        return Split(self.kinds[name], info.rows, info.columns, self.world, self.owners.get(name, 0))

    def _parts(self, name: str) -> list[float]:
        """The fraction of a table that each rank holds."""
        split = self.split(name)
        return [split.piece(rank).numel / max(split.rows * split.columns, 1) for rank in range(self.world)]

    def rank_nbytes(self) -> list[int]:
        """Bytes of tables and optimizer states on each rank."""
        found = [0.0] * self.world
        for name, info in self.tables.items():
            for rank, part in enumerate(self._parts(name)):
                found[rank] += part * info.nbytes
        return [round(nbytes) for nbytes in found]

    def rank_lookups(self) -> list[float]:
        """Ids that each rank looks up for one step of all processes."""
        found = [0.0] * self.world
        for name, info in self.tables.items():
            for rank, part in enumerate(self._parts(name)):
                # A replica looks up the ids of its own process; a rank with columns looks up every id.
                if self.kinds[name] == "replicate":
                    found[rank] += info.lookups
                elif self.kinds[name] == "column":
                    found[rank] += info.lookups * self.world if part else 0.0
                else:
                    found[rank] += info.lookups * self.world * part
        return found

    def sent_nbytes(self, name: str, element: int = 4) -> float:
        """Bytes that one process sends to others in a step for a table: ids, rows or sums, and their gradients.

        An estimate from the measured lookups, for tables and gradients of ``element`` bytes per value.
        """
        info, kind, away = self.tables[name], self.kinds[name], (self.world - 1) / self.world
        each = info.lookups / info.bags if info.bags else 0.0
        row = info.columns * element
        if kind == "row":
            # A bag's gradient goes to each of the ranks that have one of its ids.
            ranks = self.world * (1 - (1 - 1 / self.world) ** each)
            return away * (info.unique * (4 + row) + info.lookups * 4 + info.bags * (4 * self.world + ranks * row))
        if kind == "table":
            return away * (info.lookups * 4 + info.bags * (4 + 2 * row))
        others = self.world - 1
        if kind == "column":
            return others * (info.lookups * 4 + info.bags * 4) + away * info.bags * 2 * row
        return others * (info.lookups * 4 + info.bags * (4 + row))

    def __str__(self) -> str:
        total = sum(info.nbytes for info in self.tables.values())
        share, held, lookups = total / self.world, self.rank_nbytes(), self.rank_lookups()
        lines = ["table                              rows   dim       bytes  lookups  sharding     sent/step"]
        for name, info in self.tables.items():
            kind = self.kinds[name] + (f" on {self.owners[name]}" if self.kinds[name] == "table" else "")
            lines.append(
                f"{name:<30} {info.rows:>9} {info.columns:>5} {info.nbytes:>11} {info.lookups:>8.0f}  {kind:<12}"
                f"{self.sent_nbytes(name):>10.0f}"
            )
        lines += [
            f"rank {rank}: {nbytes} bytes, {nbytes / share - 1 if share else 0:+.1%} of its share; {ids:.0f} lookups"
            for rank, (nbytes, ids) in enumerate(zip(held, lookups, strict=True))
        ]
        return "\n".join(lines)


def named_tables(model: nn.Module) -> dict[str, nn.Module]:
    """The tables of a model that can be sharded, by their names in it; the model itself has the name ``""``.

    Raises:
        ValueError: a subclass of one of these overrides the lookup, which shards could not reproduce.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = {name: module for name, module in model.named_modules() if isinstance(module, SHARDABLE)}
    for name, module in found.items():
        base = next(kind for kind in SHARDABLE if isinstance(module, kind))
        if any(getattr(type(module), method) is not getattr(base, method) for method in ("forward", "lookup")):
            raise ValueError(
                f"model must hold tables that look up as {base.__name__} does, but {type(module).__name__} at {name!r} "
                "has a forward or lookup of its own"
            )
    return found


def table_infos(model: nn.Module, lookups: Mapping[str, Lookups] | None = None) -> dict[str, TableInfo]:
    """The planner's data about a model's tables; tables of a batched module are ``"module.0"``, ``"module.1"``, ...

    Raises:
        ValueError: ``lookups`` names tables that the model does not have.
    """
    found: dict[str, TableInfo] = {}
    for name, module in named_tables(model).items():
        if isinstance(module, TableBatchedEmbeddingBags):
            element = module.weights.element_size()
            for table, (rows, columns) in enumerate(module.layout.specs):
                nbytes = rows * columns * element
                if module.optimizer is not None:
                    kinds = module.optimizer.state_kinds().values()
                    width = max(element, 4)
                    nbytes += sum(width * rows * (columns if kind == "full" else 1) for kind in kinds)
                found[join(name, str(table))] = TableInfo(rows, columns, nbytes)
        elif isinstance(module, DynamicEmbedding):
            kinds = ("row", "table")
            found[name] = TableInfo(module.num_embeddings, module.embedding_dim, module.nbytes(), kinds=kinds)
        else:
            nbytes = bytes_of([*module.parameters(), *module.buffers()])
            found[name] = TableInfo(module.num_embeddings, module.embedding_dim, nbytes)
    check_lookups(lookups)
    for name, measured in (lookups or {}).items():
        if name not in found:
            raise ValueError(f"lookups must be of the model's tables {sorted(found)}, got {name!r}")
        calls = max(measured.calls, 1)
        info = found[name]
        found[name] = TableInfo(
            info.rows,
            info.columns,
            info.nbytes,
            measured.lookups / calls,
            measured.unique / calls,
            measured.bags / calls,
            info.kinds,
        )
    return found


def join(prefix: str, name: str) -> str:
    """The name of a module's child."""
    return f"{prefix}.{name}" if prefix else name


@dataclass
class Lookups:
    """The counts of :func:`measure_lookups` for a table.

    Attributes:
        calls: number of calls of its module.
        lookups: ids, with repeats.
        unique: distinct ids, summed over calls.
        bags: bags, or ids if each is looked up alone.
    """

    calls: int = 0
    lookups: int = 0
    unique: int = 0
    bags: int = 0

    def add(self, ids: torch.Tensor, bags: int) -> None:
        """Count ids of a call."""
        self.lookups += ids.numel()
        self.unique += ids.unique().numel()
        self.bags += bags


def check_lookups(lookups: object) -> None:
    """``lookups`` must be a mapping of tables' names to :class:`Lookups`, or None."""
    if lookups is not None and not isinstance(lookups, Mapping):
        raise TypeError(f"lookups must be a mapping of tables to Lookups, got {type(lookups).__name__}")
    for name, measured in (lookups or {}).items():
        if not isinstance(measured, Lookups):
            raise TypeError(f"lookups[{name!r}] must be gossamer.parallel.Lookups, got {type(measured).__name__}")
        for part, count in vars(measured).items():
            check_number(f"lookups[{name!r}].{part}", count, least=0, finite=True)


@contextlib.contextmanager
def measure_lookups(model: nn.Module) -> Iterator[dict[str, Lookups]]:
    """Count the lookups in each table by forward passes in the ``with`` block, for :func:`plan_tables`.

    >>> with measure_lookups(model) as lookups:
    ...     for batch in few_batches:
    ...         model(batch)
    >>> plan = plan_tables(model, mesh.size(), lookups=lookups)
    """
    found: dict[str, Lookups] = {name: Lookups() for name in table_infos(model)}
    handles = []

    def watch(name: str, module: nn.Module):
        def count(_, args, keywords):
            given = [*args, *keywords.values()]
            ids, offsets = given[0], given[1] if len(given) > 1 else None
            if isinstance(module, TableBatchedEmbeddingBags):
                if not isinstance(ids, torch.Tensor):
                    ids, offsets = ids.values(), ids.offsets()
                each = (offsets.numel() - 1) // module.layout.num_features
                for table in set(module.layout.feature_table_map):
                    found[join(name, str(table))].calls += 1
                for feature, table in enumerate(module.layout.feature_table_map):
                    begin, end = int(offsets[feature * each]), int(offsets[(feature + 1) * each])
                    found[join(name, str(table))].add(ids[begin:end], each)
                return
            pooled = getattr(module, "pooling", "sum") is not None and not isinstance(module, Embedding)
            bags = ids.shape[0] if offsets is None else offsets.numel() - getattr(module, "include_last_offset", False)
            bags = bags if pooled else ids.numel()
            found[name].calls += 1
            found[name].add(ids, bags)

        return count

    for name, module in named_tables(model).items():
        handles.append(module.register_forward_pre_hook(watch(name, module), with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _owners(tables: Mapping[str, TableInfo], kinds: Mapping[str, str], world: int) -> dict[str, int]:
    """Ranks for tables that are placed whole: the largest first, each on the rank with the fewest bytes and lookups so
    far.
    """
    total = max(sum(info.nbytes for info in tables.values()), 1) / world
    looked = max(sum(info.lookups for info in tables.values()), 1e-9)
    nbytes, lookups, owners = [0.0] * world, [0.0] * world, {}
    whole = [name for name, kind in kinds.items() if kind == "table"]
    others = {name: kind for name, kind in kinds.items() if kind != "table"}
    spread = TablePlan(world, others, {}, {name: tables[name] for name in others})
    for rank, (held, ids) in enumerate(zip(spread.rank_nbytes(), spread.rank_lookups(), strict=True)):
        nbytes[rank], lookups[rank] = held / total, ids / looked
    for name in sorted(whole, key=lambda name: (-tables[name].nbytes, name)):
        info = tables[name]

        def load(rank: int, info: TableInfo = info) -> tuple[float, float]:
            held = nbytes[rank] + info.nbytes / total
            ids = lookups[rank] + world * info.lookups / looked
            # A rank within its share of bytes, slack included, is ranked by bytes or lookups, whichever is higher.
            return max(held / SLACK, 1.0), max(held, ids)

        rank = min(range(world), key=lambda rank: (*load(rank), rank))
        owners[name] = rank
        nbytes[rank] += info.nbytes / total
        lookups[rank] += world * info.lookups / looked
    return owners


def assign_owners(tables: Mapping[str, TableInfo], kinds: Mapping[str, str], world: int) -> TablePlan:
    """The plan with these kinds of sharding, placing whole tables where bytes and lookups are lowest."""
    return TablePlan(world, dict(kinds), _owners(tables, kinds, world), dict(tables))


def plan_tables(model: nn.Module, world: int, *, lookups: Mapping[str, Lookups] | None = None) -> TablePlan:
    """Place the tables of a model on ``world`` ranks, so that none holds more than its share of bytes plus 5%.

    Tables are placed whole at first, which sends least (one sum per bag in each direction, and no rows): the largest
    first, each on the rank with the fewest bytes and lookups. While a rank holds more than 1.05 times the mean, the
    largest whole table is split by rows instead. While a rank looks up more than 1.25 times the mean, the table with
    the most lookups on the busiest rank is split. The result depends only on the arguments, so every rank gets the same
    plan.

    Args:
        model: a model with :class:`gossamer.nn.Embedding`, ``EmbeddingBag``, ``TableBatchedEmbeddingBags`` (whose
            tables are placed one by one) or ``DynamicEmbedding``. It may be on the meta device.
        world: ranks.
        lookups: the counts of :func:`measure_lookups`; without them only bytes decide.

    Returns:
        The plan; ``print`` it to see bytes, lookups and traffic by table and rank.

    Raises:
        TypeError: ``world`` is not an int.
        ValueError: the model has no such table, or ``lookups`` names others.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_positive(world=world)
    tables = table_infos(model, lookups)
    if not tables:
        raise ValueError("model must have a table that can be sharded, got none")
    kinds = {name: "table" for name in tables}
    while True:
        plan = assign_owners(tables, kinds, world)
        splittable = [name for name in tables if kinds[name] == "table" and tables[name].rows >= world]
        held, looked = plan.rank_nbytes(), plan.rank_lookups()
        if not splittable or world == 1:
            return plan
        if max(held) > SLACK * sum(held) / world:
            split = max(splittable, key=lambda name: (tables[name].nbytes, name))
        elif max(looked) > LOOKUP_SLACK * sum(looked) / world:
            busiest = looked.index(max(looked))
            there = [name for name in splittable if plan.owners[name] == busiest]
            if not there:
                return plan
            split = max(there, key=lambda name: (tables[name].lookups, name))
        else:
            return plan
        kinds[split] = "row"
