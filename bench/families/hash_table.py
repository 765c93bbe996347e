"""The hash table's calls on keys that it holds, and at load 1 on new ones, beside a static table's row lookup.

The fewest bytes that a call can move for each key: the key, its bucket's digests, the key in the bucket, and the row,
read and written. The case's title states these bytes; GB/s divided by them are billions of keys per second.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch

import gossamer
from gossamer.bench.families.embedding import SKEWS, draw_ranks
from gossamer.bench.harness.case import DENSE, DTYPES, OURS, REFERENCE, Case, Family, Outputs, Request, Variant, Verdict

# Capacity, columns, keys per call, percent of the capacity that is filled.
SHAPES = {
    "half": (134_217_728, 8, 1_048_576, 50),
    "three-quarters": (134_217_728, 8, 1_048_576, 75),
    "full": (134_217_728, 8, 1_048_576, 100),
    "cpu-half": (4_194_304, 16, 262_144, 50),
    "cpu-three-quarters": (4_194_304, 16, 262_144, 75),
    "cpu-full": (4_194_304, 16, 262_144, 100),
    "cpu-large": (16_777_216, 16, 262_144, 75),
}
SYMBOLS = ("N", "D", "B", "L")
DEFAULTS = {
    "cpu": ("cpu-half", "cpu-three-quarters", "cpu-full", "cpu-large"),
    "cuda": ("half", "three-quarters", "full"),
}
QUICK = {"cpu": "cpu-three-quarters", "cuda": "three-quarters"}
BUCKET_BYTES = 16
KEY_BYTES = 8
# Keys are made by a bijection of their numbers, so that no two batches share a key.
_SPREAD = 0x1E37_79B9_7F4A_7C15


def keys_of(numbers: torch.Tensor) -> torch.Tensor:
    """The key of each number; keys are distinct, and spread over all of int64."""
    return numbers * _SPREAD


def values_of(keys: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """``(n, D)`` values that depend only on the key and are exact in every dtype."""
    columns = torch.arange(dim, device=keys.device)
    return (((keys.unsqueeze(1) >> 7) + 37 * columns) & 127).to(dtype)


@dataclass(frozen=True)
class KeyedGate:
    """Checks that every row of ``y (n, D)`` is the one of its key in ``keys (n,)``."""

    dtype: torch.dtype

    def __call__(self, outputs: Outputs) -> Verdict:
        """Compare all rows, exactly."""
        y = outputs["y"]
        wrong = int((y != values_of(outputs["keys"], y.shape[1], self.dtype)).any(1).sum())
        failures = (f"{wrong} of {y.shape[0]} rows are not those of their keys",) if wrong else ()
        return Verdict(float(bool(wrong)), failures)


def fill(table: gossamer.HashTable, live: int, chunk: int = 1 << 20) -> torch.Tensor:
    """Insert ``live`` keys, and more until the table is as full as possible; return the keys that it holds."""
    begin = 0
    while begin < live or (live == table.capacity and len(table) < live and begin < 3 * live):
        end = begin + chunk if begin >= live else min(begin + chunk, live)
        numbers = torch.arange(begin + 1, end + 1, device=table.device)
        keys = keys_of(numbers)
        table.insert_or_assign(keys, values_of(keys, table.dim, table.value_dtype))
        begin = end
    return table.export()[0]


def build(request: Request) -> Case:
    """Build calls of :class:`gossamer.HashTable` beside ``index_select`` of a static table and a sorted key array."""
    capacity, dim, count, percent = (request.sizes[s] for s in SYMBOLS)
    device, dtype = request.device, DTYPES[request.dtype]
    generator = torch.Generator(device).manual_seed(request.seed)
    table = gossamer.HashTable(dim, capacity, value_dtype=dtype, device=device, evict="lru")
    live = fill(table, max(capacity * percent // 100, 1))
    live = live[torch.randperm(live.numel(), generator=generator, device=device)]
    ranks = draw_ranks(live.numel(), SKEWS[request.skew], (count,), generator, device)
    keys = live[ranks]
    values = values_of(keys, dim, dtype)
    static = values_of(live, dim, dtype)
    ordered, order = live.sort()
    sorted_values = static[order]

    def by_search() -> torch.Tensor:
        at = torch.searchsorted(ordered, keys).clamp_(max=ordered.numel() - 1)
        return torch.where((ordered[at] == keys).unsqueeze(1), sorted_values[at], 0)

    def ours(name: str, call: Callable[[], object], layout: Callable[[Outputs], Outputs] | None = None) -> Variant:
        return Variant(name, OURS, call, layout=layout or (lambda found: {"keys": keys, "y": found["y0"]}))

    def stored(found: Outputs) -> Outputs:
        return {"keys": keys, "y": table.find(keys)[0]}

    def static_row(found: Outputs) -> Outputs:
        return {"keys": keys, "y": found["y"]}

    variants = [
        ours("find", lambda: table.find(keys)),
        ours("find_or_insert, present", lambda: table.find_or_insert(keys)),
        ours("insert_or_assign, present", lambda: table.insert_or_assign(keys, values), stored),
    ]
    if percent == 100:
        # These calls use a copy, since the keys that they evict would be missing from the first table.
        variants += _with_new_keys(copy.deepcopy(table), count)
    variants += [
        Variant("index_select of a static table", DENSE, lambda: static.index_select(0, ranks), layout=static_row),
        Variant("searchsorted in sorted keys", REFERENCE, by_search, layout=static_row),
    ]
    one = KEY_BYTES + BUCKET_BYTES + KEY_BYTES + 2 * dim * dtype.itemsize
    return Case(
        "hash_table",
        request.shape,
        request.sizes,
        request.dtype,
        device,
        request.direction,
        tuple(variants),
        {},
        0.0,
        float(count * one),
        {"truth": lambda: KeyedGate(dtype)},
        "every row, exactly",
        f"load {table.load_factor:.2f}, keys of exponent {SKEWS[request.skew]:g}, {one} bytes a key",
    )


def _with_new_keys(table: gossamer.HashTable, count: int) -> list[Variant]:
    """Calls whose keys are always new, so that a full table evicts as many."""
    state = {"next": 4 * max(table.capacity, count, 1 << 20)}
    steps = torch.arange(count, device=table.device)

    def fresh() -> torch.Tensor:
        state["next"] += count
        return keys_of(steps + state["next"])

    def evicting() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        keys = fresh()
        return table.insert_and_evict(keys, values_of(keys, table.dim, table.value_dtype))

    def inserting() -> torch.Tensor:
        keys = fresh()
        return table.find_or_insert(keys, values_of(keys, table.dim, table.value_dtype))[0]

    def latest(found: Outputs) -> Outputs:
        return {"keys": keys_of(steps + state["next"]), "y": found["y"]}

    def left(found: Outputs) -> Outputs:
        return {"keys": found["y0"], "y": found["y1"]}

    note = "new keys and their values are made in the call"
    return [
        Variant("find_or_insert, new", OURS, inserting, layout=latest, note=note),
        Variant("insert_and_evict, new", OURS, evicting, layout=left, note=note),
    ]


FAMILY = Family(
    "hash_table",
    SHAPES,
    SYMBOLS,
    DEFAULTS,
    QUICK,
    build,
    directions=("forward",),
    skews=tuple(SKEWS),
    dimensions={"capacity": "N", "columns": "D", "keys": "B", "load": "L"},
    work=("N", "B"),
    rule=lambda sizes: "L is the load in percent, at most 100" if sizes["L"] > 100 else None,
)


def bench_hash_table(measured):
    """Entry point of pytest-benchmark."""
    measured()
