"""Ways to place embedding tables on a cluster: the time of a step's lookups, and the memory that each device needs.

A description of tables is a JSON file::

    {"tables": [{"name": "user", "rows": 10000000, "dim": 64, "bag": 1}, ...]}

``bag`` is the number of ids per sample. Every device looks up a batch of its own and gets the pooled rows of its
samples.

- ``replicate``: each device holds every row. Ids and gradients of pooled rows go to all devices, and each device
  updates its copy for all samples.
- ``table``: each table is whole on one device. The busiest table is placed first, and each on the device with the least
  work so far. Ids go to the table, pooled rows come back, and their gradients go to the table.
- ``row``: each device holds an equal part of the rows of a table. Ids go to their rows, distinct rows come back, and
  the gradients of pooled rows go to the devices that hold those rows.
- ``column``: each device holds some columns. Ids go to all devices, pooled columns come back, and their gradients
  return to the devices.
- ``mixed``: starts from the best of these; then, one table size after the other, tables move to another placement if
  that brings memory below its limit or reduces the time.

One exchange each way serves all tables. Ids are assumed to be uniform, the distribution with the most distinct ids. A
step's lookups, backward pass and fused optimizer run at the measured rate.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gossamer import optim
from gossamer.parallel.planning.exchanges import Cluster
from gossamer.parallel.planning.files import integer
from gossamer.parallel.planning.layouts import BYTES, Cost, grown
from gossamer.parallel.planning.rates import TABLES, Rate, Rates

REPLICATE, TABLE, ROW, COLUMN, MIXED = "replicate", "table", "row", "column", "mixed"
PLACEMENTS = (REPLICATE, TABLE, ROW, COLUMN)
OPTIMIZERS = {
    "sgd": optim.SGD,
    "adagrad": optim.Adagrad,
    "rowwise_adagrad": optim.RowwiseAdagrad,
    "adam": optim.Adam,
    "partial_rowwise_adam": optim.PartialRowwiseAdam,
    "ftrl": optim.FTRL,
}
# The name of each optimizer's variant in the benchmark of tables; optimizers not listed were not measured.
VARIANTS = {"sgd": "gossamer SGD", "rowwise_adagrad": "gossamer row-wise Adagrad"}
# Bytes of an id, and of the number of ids in a bag.
ID_BYTES = 4
# The things exchanged, each by one all-to-all for all tables.
EXCHANGED = ("ids", "rows", "gradients")
# The search for a mixed placement of T tables computes about this number divided by T costs, each over T tables.
MOST_PRICES = 4096
MOST_TABLES, MOST_ROWS, MOST_DIM, MOST_BAG = 2**14, 2**40, 2**16, 2**20


@dataclass(frozen=True)
class TableSize:
    """One table.

    Attributes:
        name: name of the table.
        rows: number of rows.
        dim: number of columns.
        bag: ids per sample.
    """

    name: str
    rows: int
    dim: int
    bag: int


def tables_of(where: str, values: dict) -> list[TableSize]:
    """The tables that a description holds.

    Raises:
        ValueError: a table is described wrongly; the message names ``where``, the table and the rule.
    """
    described = values.get("tables")
    if not isinstance(described, list) or not 1 <= len(described) <= MOST_TABLES:
        raise ValueError(f"{where}: tables must be a list of 1 to {MOST_TABLES} tables")
    found: dict[str, TableSize] = {}
    for number, table in enumerate(described):
        at = f"{where}: table {number}"
        if not isinstance(table, dict):
            raise ValueError(f"{at} must be an object, got {type(table).__name__}")
        if unknown := table.keys() - {"name", "rows", "dim", "bag"}:
            raise ValueError(f"{at} must hold name, rows, dim and bag, got {', '.join(sorted(unknown))[:60]} as well")
        name = table.get("name")
        if not isinstance(name, str) or not name or name in found:
            raise ValueError(f"{at}: name must be a text that no other table has, got {str(name)[:60]!r}")
        found[name] = TableSize(
            name,
            integer(at, "rows", table.get("rows"), 1, MOST_ROWS),
            integer(at, "dim", table.get("dim"), 1, MOST_DIM),
            integer(at, "bag", table.get("bag"), 1, MOST_BAG),
        )
    return list(found.values())


@dataclass(frozen=True)
class Lookups:
    """The work of a device in a step.

    Attributes:
        batch: samples per device.
        dtype: dtype of the rows.
        direction: ``"both"``, a training step, or ``"forward"``.
        optimizer: a key of :data:`OPTIMIZERS`.
    """

    batch: int
    dtype: str = "fp32"
    direction: str = "both"
    optimizer: str = "rowwise_adagrad"

    def __post_init__(self) -> None:
        """Check every choice."""
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        for name, value, allowed in (
            ("dtype", self.dtype, BYTES),
            ("direction", self.direction, ("both", "forward")),
            ("optimizer", self.optimizer, OPTIMIZERS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass and an optimizer."""
        return self.direction == "both"

    def rate(self, rates: Rates) -> Rate:
        """The rate at which the lookups run.

        Raises:
            ValueError: it is neither given nor measured.
        """
        variant = VARIANTS.get(self.optimizer, f"gossamer {self.optimizer}") if self.trains else "gossamer"
        return rates.get(TABLES, dtype=self.dtype, direction=self.direction, variant=variant)

    def stored_bytes(self, rows: float, dim: float) -> float:
        """Bytes of rows with the optimizer's states, which are float32."""
        nbytes = rows * dim * BYTES[self.dtype]
        if self.trains:
            kinds = OPTIMIZERS[self.optimizer](lr=0.1).state_kinds().values()
            nbytes += sum(4.0 * rows * (dim if kind == "full" else 1) for kind in kinds)
        return nbytes


@dataclass(frozen=True)
class Placement:
    """The placement of each table.

    Attributes:
        name: a member of :data:`PLACEMENTS`, or ``"mixed"``.
        devices: number of devices in total.
        where: the placement of each table.
        tables: their names, in the same order.
    """

    name: str
    devices: int
    where: tuple[str, ...]
    tables: tuple[str, ...]

    def __str__(self) -> str:
        if self.name != MIXED:
            return self.name
        counts = [f"{self.where.count(kind)} {kind}" for kind in PLACEMENTS if kind in self.where]
        return f"mixed: {', '.join(counts)}"


def distinct(rows: int, lookups: float) -> float:
    """The mean number of distinct rows that ``lookups`` uniform ids meet among ``rows``: ``R (1 - (1 - 1/R)^L)``."""
    return rows if rows == 1 else rows * -math.expm1(lookups * math.log1p(-1.0 / rows))


@dataclass(frozen=True)
class _Share:
    """The work and memory that one placement of one table needs on a device.

    Attributes:
        work: bytes of rows looked up.
        memory: bytes of rows and states.
        buffers: bytes of received data and of results.
        ids: bytes of ids to each other device.
        rows: bytes of rows or pooled rows to each other device.
        gradients: bytes of gradients to each other device.
    """

    work: float
    memory: float
    buffers: float
    ids: float = 0.0
    rows: float = 0.0
    gradients: float = 0.0


def _share(table: TableSize, kind: str, devices: int, work: Lookups) -> _Share:
    """The share of a device; for a table placed whole, the share of the device that holds it."""
    element = BYTES[work.dtype]
    lookups = work.batch * table.bag
    row = table.dim * element
    pooled, lists = work.batch * row, (lookups + work.batch) * ID_BYTES
    whole = work.stored_bytes(table.rows, table.dim)
    if devices == 1:
        return _Share(lookups * row, whole, pooled)
    if kind == REPLICATE:
        if not work.trains:
            return _Share(lookups * row, whole, pooled)
        return _Share(devices * lookups * row, whole, devices * pooled, ids=lists, gradients=pooled)
    if kind == TABLE:
        return _Share(devices * lookups * row, whole, devices * pooled, lists, pooled, pooled)
    if kind == ROW:
        own = distinct(table.rows, lookups)
        met = 1.0 - (1.0 - 1.0 / devices) ** table.bag
        memory = work.stored_bytes(-(-table.rows // devices), table.dim)
        # The device that holds the rows reads them, and the device that has the samples pools them.
        work_bytes, buffers = (lookups + own) * row, own * row + pooled
        # Distinct ids for the rows, and also the lists of bags if gradients will follow.
        ids = own / devices + (lookups / devices + work.batch if work.trains else 0.0)
        return _Share(work_bytes, memory, buffers, ids * ID_BYTES, own / devices * row, met * pooled)
    columns = -(-table.dim // devices)
    narrow = work.batch * columns * element
    memory, buffers = work.stored_bytes(table.rows, columns), pooled + devices * narrow
    return _Share(devices * table.bag * narrow, memory, buffers, lists, narrow, narrow)


def place_whole(loads: Sequence[float], devices: int) -> list[int]:
    """A device for each table: the heaviest is placed first, and each goes to the device with the least load so far."""
    heap = [(0.0, device) for device in range(devices)]
    places = [0] * len(loads)
    for index in sorted(range(len(loads)), key=lambda index: (-loads[index], index)):
        load, device = heapq.heappop(heap)
        places[index] = device
        heapq.heappush(heap, (load + loads[index], device))
    return places


def price(tables: Sequence[TableSize], cluster: Cluster, work: Lookups, rate: Rate, placement: Placement) -> Cost:
    """The cost of a placement: the time of the slowest device, and the memory of the fullest."""
    devices, group = cluster.devices, cluster.group(cluster.devices)
    totals = dict.fromkeys(("work", "memory", "buffers", *EXCHANGED), 0.0)
    for kind in PLACEMENTS:
        chosen = [table for table, where in zip(tables, placement.where, strict=True) if where == kind]
        shares = [_share(table, kind, devices, work) for table in chosen]
        if kind == TABLE and devices > 1:
            held: dict[int, list[_Share]] = {}
            for share, device in zip(shares, place_whole([share.work for share in shares], devices), strict=True):
                held.setdefault(device, []).append(share)
            by_device = list(held.values())
        else:
            by_device = [shares]
        for name in totals:
            totals[name] += max((sum(getattr(share, name) for share in own) for own in by_device), default=0.0)
    seconds, sent = {"lookups": totals["work"] / rate.value}, {}
    for part in EXCHANGED:
        if totals[part] and (part != "gradients" or work.trains):
            seconds[part] = cluster.all_to_all(group, totals[part])
            sent[part] = totals[part] * (devices - 1)
    memory = {"tables": totals["memory"], "buffers": totals["buffers"]}
    return Cost(placement, seconds, memory, sent)


def placements(tables: Sequence[TableSize], cluster: Cluster, work: Lookups, rate: Rate) -> list[Placement]:
    """The placements to compare: all tables alike, in each way that the cluster allows, and mixed."""
    names, devices = tuple(table.name for table in tables), cluster.devices

    def placement(name: str, where: Sequence[str]) -> Placement:
        return Placement(name, devices, tuple(where), names)

    found = [placement(REPLICATE, [REPLICATE] * len(tables))]
    if devices == 1:
        return found
    uniform = [kind for kind in PLACEMENTS if kind != COLUMN or all(table.dim >= devices for table in tables)]
    found += [placement(kind, [kind] * len(tables)) for kind in uniform if kind != REPLICATE]
    if len(tables) > 1:
        start = min(found, key=lambda one: _order(price(tables, cluster, work, rate, one), cluster))
        mixed = _mixed(tables, cluster, work, rate, start)
        if len(set(mixed.where)) > 1:
            found.append(mixed)
    return found


def _order(cost: Cost, cluster: Cluster) -> tuple[bool, float, float]:
    """The sort key: first what fits, then by time, and among equals by bytes sent."""
    return not cost.fits(cluster), cost.step, sum(cost.sent.values())


def _mixed(tables: Sequence[TableSize], cluster: Cluster, work: Lookups, rate: Rate, start: Placement) -> Placement:
    """A mixed placement. Tables of one size are moved together; those with the most rows to look up go first."""

    def badness(placement: Placement) -> tuple[float, float]:
        cost = price(tables, cluster, work, rate, placement)
        over = 0.0 if cluster.memory is None else max(0.0, cost.total_memory - cluster.memory)
        return over, cost.step

    alike: dict[tuple[int, int, int], list[int]] = {}
    for index, table in enumerate(tables):
        alike.setdefault((table.rows, table.dim, table.bag), []).append(index)
    groups = sorted(alike.values(), key=lambda group: -sum(tables[i].dim * tables[i].bag for i in group))
    best = replace(start, name=MIXED)
    least = badness(best)
    for group in groups[: max(8, MOST_PRICES // len(tables))]:
        for kind in PLACEMENTS:
            if kind == COLUMN and tables[group[0]].dim < cluster.devices:
                continue
            where = list(best.where)
            for index in group:
                where[index] = kind
            moved = replace(best, where=tuple(where))
            if (found := badness(moved)) < least:
                best, least = moved, found
    return best


def plan(tables: Sequence[TableSize], cluster: Cluster, work: Lookups, rate: Rate) -> list[Cost]:
    """All placements, sorted: first those that fit, then by time."""
    costs = [price(tables, cluster, work, rate, found) for found in placements(tables, cluster, work, rate)]
    return sorted(costs, key=lambda cost: _order(cost, cluster))


def growth(tables: Sequence[TableSize], cluster: Cluster, work: Lookups, rate: Rate, most: int = 4096) -> list[dict]:
    """Each placement at 1, 2, 4, ... ``most`` devices, with the same batch on every device."""
    return grown(cluster, lambda resized: plan(tables, resized, work, rate), lambda c: c.layout.name, most)
