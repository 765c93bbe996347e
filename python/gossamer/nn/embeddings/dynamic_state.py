"""What a dynamic embedding saves, merges and exports: checkpoints, snapshots of several processes, and deltas."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from gossamer.nn.embeddings import files
from gossamer.nn.embeddings.table import Table
from gossamer.ops import hash_table_state as table_state
from gossamer.ops.hash_table import HashTable, HashTableFull
from gossamer.optim import Optimizer

_CHECKPOINT, _DELTA, _FORMAT = "checkpoint", "delta", 1


@dataclass
class Counters:
    """Counts of events since the layer was created.

    Attributes:
        inserted: rows created.
        evicted: rows that a full table reassigned to another id.
        expired: rows removed because of their age.
        rejected: ids, with repeats, that had no row in training and were not admitted.
        refused: ids, with repeats, that were admitted but found the table full with ids of the same batch.
    """

    inserted: int = 0
    evicted: int = 0
    expired: int = 0
    rejected: int = 0
    refused: int = 0


class DynamicState(Table):
    """The part of :class:`DynamicEmbedding` that reads and writes its table with everything stored beside the rows.

    Files and snapshots are pairs of tensors by name and a header of numbers and options. Each is checked whole against
    the layer before anything changes.

    Attributes:
        table: the rows by id.
        optimizer_state: the optimizer's states by name, parallel to the rows of the table; ``"step"`` is one number.
        counters: counts of events.
        clock: the newest time seen, from which rows age.
        steps: training batches so far.
        sequence: number of the last delta written or applied.
    """

    table: HashTable
    optimizer: Optimizer | None
    optimizer_state: dict[str, torch.Tensor]
    counters: Counters
    clock: int
    steps: int
    sequence: int

    def _header(self) -> dict[str, object]:
        kinds = {} if self.optimizer is None else self.optimizer.state_kinds()
        return {
            "format": _FORMAT,
            "dim": self.dim,
            "dtype": str(self.table.value_dtype),
            "key_dtype": str(self.table.key_dtype),
            "optimizer": None if self.optimizer is None else type(self.optimizer).__name__,
            "optimizer_state": kinds,
            "seed": self.seed,
        }

    def _checkpoint_header(self) -> dict[str, object]:
        admission = None if self.admission is None else repr(self.admission)
        own = {"capacity": self.table.capacity, "evict": self.table.evict, "admission": admission}
        return self._header() | own

    def _removed_keys(self) -> torch.Tensor:
        none = torch.empty(0, dtype=self.table.key_dtype, device=self.device)
        keys = torch.cat([none, *self._removed]).unique()
        return keys[~self.table.contains(keys)]

    def _snapshot(self) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
        with self.table.lock:
            tensors = {f"table.{k}": v for k, v in table_state.snapshot(self.table).items()}
            rows = tensors["table.rows"]
            for name, state in self.optimizer_state.items():
                tensors[f"optimizer.{name}"] = state.clone() if name == "step" else state[rows]
            tensors |= {"last_used": self._last_used[rows], "changed": self._changed[rows]}
            tensors["removed"] = self._removed_keys()
            if self._filter is not None:
                tensors |= {f"filter.{k}": v for k, v in self._filter.state().items()}
            numbers = {"clock": self.clock, "steps": self.steps, "sequence": self.sequence}
            return tensors, self._checkpoint_header() | numbers | {"counters": asdict(self.counters)}

    def _check_snapshot(self, tensors: Mapping[str, torch.Tensor], header: Mapping[str, object], what: str) -> None:
        files.check_header(header, self._checkpoint_header(), what)
        rows = files.part(tensors, "table.")
        table_state.check(self.table, rows, what)
        count = rows["rows"].numel()
        removed = tensors["removed"].numel() if "removed" in tensors else 0
        wanted = {
            "last_used": (torch.int64, (count,)),
            "changed": (torch.bool, (count,)),
            "removed": (self.table.key_dtype, (removed,)),
        } | self._state_shapes(count)
        table_state.check_tensors(tensors, wanted, what)
        numbers = [header.get(name) for name in ("clock", "steps", "sequence")]
        counters = header.get("counters")
        if any(type(n) is not int or n < 0 for n in numbers) or set(counters or ()) != set(asdict(self.counters)):
            raise ValueError(f"{what}: clock, steps, sequence or counters are missing or wrong")
        if self._filter is not None:
            self._filter.check(files.part(tensors, "filter."), what)

    def _restore(self, tensors: Mapping[str, torch.Tensor], header: Mapping[str, object]) -> None:
        with self.table.lock:
            table_state.restore(self.table, files.part(tensors, "table."))
            rows = tensors["table.rows"].to(self.device)
            for name, state in self.optimizer_state.items():
                state[... if name == "step" else rows] = tensors[f"optimizer.{name}"].to(self.device)
            self._last_used.zero_()[rows] = tensors["last_used"].to(self.device)
            self._changed.zero_()[rows] = tensors["changed"].to(self.device)
            self._removed = [tensors["removed"].to(self.device)]
            self.clock, self.steps, self.sequence = (header[name] for name in ("clock", "steps", "sequence"))
            self.counters = Counters(**header["counters"])
            self._moves += 1
            if self._filter is not None:
                self._filter.load(files.part(tensors, "filter."))

    def merge(
        self,
        parts: Sequence[tuple[Mapping[str, torch.Tensor], Mapping[str, object]]],
        keep: Callable[[torch.Tensor], torch.Tensor],
        what: str = "the snapshots",
    ) -> None:
        """Replace all rows by the rows of other layers' snapshots that ``keep`` selects; this moves ids between
        processes.

        Rows, optimizer states, ages, eviction scores, exact admission counts and the contents of the next delta are
        taken over; a sketch's counts start over. Counters are added. If not all rows fit, those with the highest scores
        are kept.

        Args:
            parts: pairs as :meth:`get_extra_state` gives them, of layers with the same dim, dtype, optimizer and seed,
                no id in two of them.
            keep: takes ids ``(n,)`` and returns ``(n,)`` bool.
            what: name of the snapshots in error messages.

        Raises:
            ValueError: a part belongs to another kind of layer; this layer is unchanged.
        """
        for tensors, header in parts:
            files.check_header(header, self._header(), what)
            count = tensors["table.keys"].numel()
            shapes = {"last_used": (torch.int64, (count,)), "changed": (torch.bool, (count,))}
            table_state.check_tensors(tensors, shapes | self._state_shapes(count), what)
        with self.table.lock:
            self.table.clear()
            self._last_used.zero_()
            self._changed.zero_()
            self._removed = []
            counters = dict.fromkeys(asdict(self.counters), 0)
            for tensors, header in parts:
                self._take_rows(tensors, keep(tensors["table.keys"]))
                self._removed.append(tensors["removed"][keep(tensors["removed"])].to(self.device))
                counters = {name: count + header["counters"][name] for name, count in counters.items()}
            for name in ("clock", "steps", "sequence"):
                setattr(self, name, max((header[name] for _, header in parts), default=0))
            if "step" in self.optimizer_state:
                steps = [int(tensors["optimizer.step"]) for tensors, _ in parts]
                self.optimizer_state["step"].fill_(max(steps, default=0))
            self.counters = Counters(**counters)
            self._moves += 1
            if self._filter is not None:
                self._filter.merge([files.part(tensors, "filter.") for tensors, _ in parts], keep)

    def _take_rows(self, tensors: Mapping[str, torch.Tensor], mine: torch.Tensor) -> None:
        """Insert the rows ``mine (n,)`` of a snapshot, with everything stored with them."""

        def taken(name: str) -> torch.Tensor:
            return tensors[name][mine].to(self.device)

        keys = taken("table.keys")
        self.table.import_(keys, taken("table.values"), taken("table.scores"))
        # Keys that did not fit have no row.
        rows = self.table.rows(keys)
        at, rows = rows >= 0, rows[rows >= 0]
        self._last_used[rows], self._changed[rows] = taken("last_used")[at], taken("changed")[at]
        for name, state in self.optimizer_state.items():
            if name != "step":
                state[rows] = taken(f"optimizer.{name}")[at]

    def _state_shapes(self, count: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {
            f"optimizer.{name}": (state.dtype, (1,) if name == "step" else (count, *state.shape[1:]))
            for name, state in self.optimizer_state.items()
        }

    def get_extra_state(self) -> dict[str, object]:
        """The complete state of the layer, for ``state_dict``."""
        tensors, header = self._snapshot()
        return {"tensors": tensors, "header": header}

    def set_extra_state(self, state: dict[str, object]) -> None:
        """Load the result of :meth:`get_extra_state`, if it fits."""
        self._check_snapshot(state["tensors"], state["header"], "the state_dict")
        self._restore(state["tensors"], state["header"])

    def save(self, path: str | os.PathLike) -> None:
        """Write a checkpoint: rows, optimizer state, ages, filters, contents of the next delta, counters.

        The file is replaced atomically; if writing fails, the old file stays.
        """
        tensors, header = self._snapshot()
        files.write(path, tensors, header | {"kind": _CHECKPOINT})

    def load(self, path: str | os.PathLike) -> None:
        """Load a checkpoint. Training continues as if it had never stopped, bit for bit.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is truncated, corrupt, not a checkpoint, or belongs to a layer with another dim, dtype,
                capacity, optimizer, eviction, admission or seed; the message says which, and the layer is unchanged.
        """
        tensors, header = files.read(path, _CHECKPOINT)
        self._check_snapshot(tensors, header, f"checkpoint {path}")
        self._restore(tensors, header)

    def export_delta(self, path: str | os.PathLike, *, full: bool = False, with_state: bool = False) -> int:
        """Write the rows that changed and the ids that were removed since the last export; return the number of rows.

        Deltas are numbered: :attr:`sequence` is the number of the last one. If writing fails, an old file stays, and
        the next export includes these rows.

        Args:
            path: the file.
            full: write all rows; such a delta can be applied at any time, and replaces all rows of the receiver.
            with_state: write optimizer state and ages too, so that another trainer can continue from it.
        """
        with self.table.lock:
            tensors, header = self._delta(full, with_state)
            files.write(path, tensors, header)
            self._shipped(header["sequence"])
            return tensors["keys"].numel()

    def _delta(self, full: bool, with_state: bool) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
        with self.table.lock:
            rows = self.table.live_rows()
            rows = rows if full else rows[self._changed[rows]]
            keys, order = self.table._storage.keys[rows].to(self.table.key_dtype).sort()
            rows = rows[order]
            tensors = {"keys": keys, "values": self.table.values[rows], "removed": self._removed_keys()}
            if with_state:
                for name, state in self.optimizer_state.items():
                    tensors[f"optimizer.{name}"] = state.clone() if name == "step" else state[rows]
                tensors["last_used"] = self._last_used[rows]
            numbers = {"sequence": self.sequence + 1, "full": full, "with_state": with_state, "clock": self.clock}
            return tensors, self._header() | numbers | {"kind": _DELTA}

    def _shipped(self, sequence: int) -> None:
        self._changed.zero_()
        self._removed = []
        self.sequence = sequence

    def apply_delta(self, path: str | os.PathLike) -> int:
        """Apply a delta that another layer exported; return the number of rows that it set.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is truncated, corrupt, not a delta, has another dim, dtype or optimizer, or does not follow
                :attr:`sequence`; the layer is unchanged.
            HashTableFull: with ``evict=None``, its rows do not fit; the layer is unchanged.
        """
        tensors, header = files.read(path, _DELTA)
        with self.table.lock:
            self._check_delta(tensors, header, f"delta {path}")
            return self._take_delta(tensors, header)

    def _check_delta(self, tensors: Mapping[str, torch.Tensor], header: Mapping[str, object], what: str) -> None:
        sequence, own = header.get("sequence"), self._header()
        if not self._brings_state(header):
            own = {k: v for k, v in own.items() if k not in ("optimizer", "optimizer_state", "seed")}
        files.check_header(header, own, what)
        for name, kind in (("sequence", int), ("clock", int), ("full", bool)):
            if type(header.get(name)) is not kind:
                raise ValueError(f"{what} has no {name}")
        if not header["full"] and sequence != self.sequence + 1:
            raise ValueError(f"{what} is number {sequence}, but number {self.sequence + 1} comes next")
        sizes = {name: tensors[name].numel() if name in tensors else 0 for name in ("keys", "removed")}
        key_dtype, count = self.table.key_dtype, sizes["keys"]
        wanted = {name: (key_dtype, (size,)) for name, size in sizes.items()}
        wanted["values"] = (self.table.value_dtype, (count, self.dim))
        if self._brings_state(header):
            wanted |= self._state_shapes(count) | {"last_used": (torch.int64, (count,))}
        table_state.check_tensors(tensors, wanted, what)
        keys, removed = tensors["keys"].to(self.device), tensors["removed"].to(self.device)
        if keys.unique().numel() != count or torch.isin(keys, removed).any():
            raise ValueError(f"{what}: keys must be distinct, and none of them removed")
        self._check_room(keys, self._leaving(keys, removed, header["full"]), what)

    def _brings_state(self, header: Mapping[str, object]) -> bool:
        return header.get("with_state") is True and self.optimizer is not None

    def _leaving(self, keys: torch.Tensor, removed: torch.Tensor, full: bool) -> torch.Tensor:
        if not full:
            return removed
        live = self.table._storage.keys[self.table.live_rows()].to(self.table.key_dtype)
        return live[~torch.isin(live, keys)]

    def _take_delta(self, tensors: Mapping[str, torch.Tensor], header: Mapping[str, object]) -> int:
        with self.table.lock:
            found = {name: tensor.to(self.device) for name, tensor in tensors.items()}
            keys, with_state = found["keys"], self._brings_state(header)
            self.erase(self._leaving(keys, found["removed"], header["full"]))
            done = self.table.insert_rows(keys)
            at, rows = done.rows >= 0, done.rows[done.rows >= 0]
            self._moves += 1
            self._start_rows(done.rows[done.inserted], keys[done.inserted])
            self.table.values[rows] = found["values"][at]
            self.clock = max(self.clock, header["clock"])
            self._last_used[rows] = found["last_used"][at] if with_state else self.clock
            if with_state:
                for name, state in self.optimizer_state.items():
                    state[... if name == "step" else rows] = found[f"optimizer.{name}"][... if name == "step" else at]
            # Rows that came from a delta are not exported by this layer.
            self._shipped(header["sequence"])
            return rows.numel()

    def _check_room(self, keys: torch.Tensor, removed: torch.Tensor, what: str) -> None:
        if self.table.evict is not None:
            return
        new = int((~self.table.contains(keys)).sum())
        room = self.table.capacity - len(self.table) + int(self.table.contains(removed.unique()).sum())
        if new > room:
            raise HashTableFull(f"{what} holds {new} new rows for {room} free ones of {self.table.capacity}")
