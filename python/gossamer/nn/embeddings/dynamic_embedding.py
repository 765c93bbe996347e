"""Embeddings of ids that appear and disappear: rows are created when an id is admitted, trained, expired, evicted and
exported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch.compiler import is_exporting

from gossamer._checks import FLOAT_DTYPES, check_index, check_number, check_seed
from gossamer.nn.embeddings import files
from gossamer.nn.embeddings.admission import FrequencyAdmission, ProbabilisticAdmission
from gossamer.nn.embeddings.dynamic_lookup import Lookup
from gossamer.nn.embeddings.table import Table, bytes_of, check_budget, check_lists
from gossamer.nn.replicas import check_alone
from gossamer.ops import hash_table_state as table_state
from gossamer.ops.gather_reduce import check_lookup, gather_reduce
from gossamer.ops.hash_table import HashTable, HashTableFull, Inserted
from gossamer.optim import Optimizer

POOLING = ("sum", "mean", "max", None)
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


class DynamicEmbedding(Table):
    """An embedding table without a vocabulary: any integer is an id, and no two ids share a row.

    In training (``layer.train()`` and gradients enabled) an id without a row gets one when ``admission`` accepts it.
    The row's initial values depend only on the id and ``seed``, not on the time or order of ids. The backward pass
    takes the optimizer's step on the touched rows. In evaluation the table does not change. Ids without a row
    contribute zeros, and do not count in a mean.

    The table lives outside the parameters: ``state_dict`` carries it as extra state. :meth:`save` and :meth:`load`
    write and read checkpoints from which training continues bit for bit; :meth:`export_delta` and :meth:`apply_delta`
    transfer the changes since the last export. Several threads may call the layer; a lock admits one at a time.
    ``to()`` does not move the table from ``device``, and ``torch.compile`` does not trace the layer.

    Admission, expiry and deltas follow Monolith (Liu et al., 2022, arXiv 2209.07663).

    Args:
        dim: D.
        capacity: maximum number of rows, see :class:`gossamer.HashTable`.
        pooling: ``"sum"``, ``"mean"`` or ``"max"`` over bags of ids, or None for one row per id.
        optimizer: one of :mod:`gossamer.optim`; its state is stored with the rows. None: rows keep their initial
            values.
        admission: a :class:`FrequencyAdmission` or :class:`ProbabilisticAdmission`; None admits every id.
        expire_after: :meth:`expire` drops rows not used in training for this long, in the unit of
            :meth:`advance_clock`; None for never.
        evict: what a full table does, see :class:`gossamer.HashTable`; not ``"score"``.
        initializer: a bound a for uniform values in (−a, a), by default D^(−1/2); or a function of ``keys (n,)`` and D
            that returns ``(n, D)`` float32 and depends only on its arguments.
        dtype: float32, float16 or bfloat16.
        key_dtype: int64 or int32.
        device: device of the table.
        seed: seed of initial values and of probabilistic admission, in ``[0, 2⁶³)``.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """

    include_last_offset = True

    def __init__(
        self,
        dim: int,
        capacity: int,
        *,
        pooling: str | None = "sum",
        optimizer: Optimizer | None = None,
        admission: FrequencyAdmission | ProbabilisticAdmission | None = None,
        expire_after: float | None = None,
        evict: str | None = "lru",
        initializer: float | Callable[[torch.Tensor, int], torch.Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        key_dtype: torch.dtype = torch.int64,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if pooling not in POOLING:
            raise ValueError(f"pooling must be one of {POOLING}, got {pooling!r}")
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a gossamer.optim.Optimizer or None, got {type(optimizer).__name__}")
        if admission is not None and not isinstance(admission, (FrequencyAdmission, ProbabilisticAdmission)):
            raise TypeError(
                f"admission must be FrequencyAdmission, ProbabilisticAdmission or None, got {type(admission).__name__}"
            )
        if expire_after is not None:
            check_number("expire_after", expire_after)
        if not callable(initializer) and initializer is not None:
            check_number("initializer", initializer)
        check_seed(seed)
        if expire_after is not None and not expire_after > 0:
            raise ValueError(f"expire_after must be above 0 or None, got {expire_after}")
        if evict == "score":
            raise ValueError("evict='score' needs scores that this layer does not have; use 'lru' or 'lfu'")
        if not callable(initializer) and initializer is not None and not initializer >= 0:
            raise ValueError(f"initializer must be at least 0 or a function, got {initializer}")
        self.table = HashTable(dim, capacity, key_dtype=key_dtype, value_dtype=dtype, device=device, evict=evict)
        self.dim, self.pooling, self.optimizer, self.seed = dim, pooling, optimizer, seed
        self.expire_after, self.admission = expire_after, admission
        self.initializer = dim**-0.5 if initializer is None else initializer
        slots, self.device = self.table.values.shape[0], self.table.device
        self.optimizer_state = {} if optimizer is None else optimizer.state(slots, dim, self.device)
        self._filter = None if admission is None else admission.build(self.device, key_dtype, seed)
        self._last_used = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self._changed = torch.zeros(slots, dtype=torch.bool, device=self.device)
        self._handle = torch.zeros(0, device=self.device, requires_grad=True)
        self.counters = Counters()
        self.clock = self.steps = self.sequence = 0
        self._moves = self._resizes = 0
        self._removed: list[torch.Tensor] = []

    @property
    def num_embeddings(self) -> int:
        """The maximum number of ids that have a row at one time."""
        return self.table.capacity

    @property
    def embedding_dim(self) -> int:
        """D."""
        return self.dim

    def _held(self) -> list[torch.Tensor]:
        """Every tensor of the serving form."""
        stored = [t for t in vars(self.table._storage).values() if isinstance(t, torch.Tensor)]
        return [*stored, self._last_used, self._changed, *self._removed]

    def nbytes(self) -> int:
        """Bytes that the layer holds now: keys, rows, ages, optimizer state, and admission counts."""
        counted = {} if self._filter is None else self._filter.state()
        return bytes_of([*self._held(), *self.optimizer_state.values(), *counted.values()])

    def inference_nbytes(self) -> int:
        """Bytes that the layer holds after :meth:`freeze`: keys, rows and ages."""
        return bytes_of(self._held())

    def freeze(self) -> DynamicEmbedding:
        """Convert to the serving form: drop the optimizer's state and admission; only :meth:`apply_delta` adds rows
        from now on.
        """
        self.optimizer = self.admission = self._filter = None
        self.optimizer_state = {}
        return super().freeze()

    @classmethod
    def from_budget(cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object) -> DynamicEmbedding:
        """The layer with room for as many ids as fit in ``nbytes`` bytes, at most N.

        Args:
            num_embeddings: N.
            embedding_dim: D.
            nbytes: of :meth:`inference_nbytes`.
            **options: of the class.

        Raises:
            TypeError: ``nbytes`` is not an int.
            ValueError: not even one row fits; the message gives the number of bytes that it needs.
        """
        check_budget(nbytes)

        def needed(capacity: int) -> int:
            return cls(embedding_dim, capacity, **options | {"device": "meta"}).inference_nbytes()

        if needed(1) > nbytes:
            raise ValueError(f"nbytes must be at least {needed(1)} for rows of {embedding_dim}, got {nbytes}")
        low, high = 1, num_embeddings
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if needed(middle) <= nbytes else (low, middle - 1)
        return cls(embedding_dim, low, **options)

    def __len__(self) -> int:
        return len(self.table)

    def extra_repr(self) -> str:
        """The line that describes the layer."""
        optimizer = None if self.optimizer is None else type(self.optimizer).__name__
        return f"{self.dim}, {self.table.capacity}, pooling={self.pooling!r}, optimizer={optimizer}, len={len(self)}"

    def forward(
        self,
        ids: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
        *,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Look up ids, and in training create rows for admitted ids.

        Args:
            ids: ``(B, J)``; ``(L,)`` with ``offsets``; or ``(L,)`` without, each id a bag of its own; in ``key_dtype``.
                Of any shape without pooling.
            offsets: ``(B+1,)`` or None, as in :func:`gossamer.gather_reduce`.
            per_sample_weights: like ``ids``, float, or None.
            weights: another name of ``per_sample_weights``.

        Returns:
            ``(B, D)``; ``(*ids.shape, D)`` without pooling.

        Raises:
            HashTableFull: with ``evict=None``, the new ids do not fit; table and filter are unchanged.
            TypeError, ValueError: an argument is not as above, or, on the CPU, offsets do not ascend within ``[0, L]``
                or a weight is NaN; no id got a row. Or the layer trains under ``DistributedDataParallel``, whose copies
                would each have different ids.
            RuntimeError: in the backward pass, if it runs twice over one graph.
        """
        if weights is not None and per_sample_weights is not None:
            raise ValueError("weights must be None beside per_sample_weights, which it is another name of")
        weights = per_sample_weights if weights is None else weights
        if self.pooling is None:
            if offsets is not None or weights is not None:
                raise ValueError("offsets and weights must be None without pooling")
            return self.lookup(ids)
        return self._bags(ids, offsets, weights)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors ``(..., D)`` of ``ids (...)``, zero for ids without a row; in training as in :meth:`forward`."""
        check_index("ids", ids)
        return self._bags(ids.reshape(-1, 1), None, None).view(*ids.shape, self.dim)

    def _bags(self, ids: torch.Tensor, offsets: torch.Tensor | None, weights: torch.Tensor | None) -> torch.Tensor:
        if is_exporting():
            raise RuntimeError(
                "torch.export cannot record DynamicEmbedding, whose table changes outside the program: export the "
                "layers behind it, and give them what it looks up"
            )
        check_lists(ids, offsets, weights)
        if ids.dtype != self.table.key_dtype:
            raise TypeError(f"ids must have the table's key_dtype, {self.table.key_dtype}, got {ids.dtype}")
        if offsets is None and ids.dim() == 1:
            ids, weights = ids.unsqueeze(1), None if weights is None else weights.unsqueeze(1)
        check_lookup(self.table.values, ids, offsets, weights, self.pooling or "sum", "ids")
        if not self.training or self.frozen or not torch.is_grad_enabled():
            return self.table._reduce(ids, offsets, weights, self.pooling or "sum")
        check_alone(self)
        with self.table.lock:
            with torch.no_grad():
                rows = self.train_rows(ids.reshape(-1)).view(ids.shape)
            handle = self._handle if self.optimizer is not None else self._handle.detach()
            return Lookup.apply(handle, weights, self, ids, rows, offsets)

    def _apply(self, fn, recurse=True):
        """Casts apply to the table, which stays on its device; the optimizer's state stays in float32."""
        moved = fn(torch.empty(0, dtype=self.table.value_dtype, device=self.device))
        if moved.is_meta and self.device.type != "meta":
            raise ValueError(
                "a DynamicEmbedding cannot be moved to the meta device, where its ids would be lost: make one there by "
                'device="meta"'
            )
        if moved.dtype != self.table.value_dtype:
            self.table.cast_(moved.dtype)
        return super()._apply(fn, recurse)

    def _reduce(self, rows, offsets, weights) -> torch.Tensor:
        mode = self.pooling or "sum"
        return gather_reduce(self.table.values, rows, offsets, weights, mode=mode, bounds="drop")

    def train_rows(self, keys: torch.Tensor) -> torch.Tensor:
        """The rows ``(n,)`` of ``keys (n,)``, with new ones for those that are admitted and −1 for the others."""
        if self._filter is None:
            done = self._insert(keys)
            rows = done.rows
        else:
            keys, done, rows = self._admit(keys)
        inserted, evicted, refused = done.counts
        if evicted:
            self._removed.append(done.victim_keys[done.evicted].to(self.table.key_dtype))
            self._moves += 1
            self.counters.evicted += evicted
        if inserted:
            fresh = keys[done.inserted]
            try:
                self._start_rows(done.rows[done.inserted], fresh)
            except BaseException:
                # If the initializer fails, rows without values are removed again.
                self.table.erase(fresh)
                raise
        self.counters.inserted += inserted
        self.counters.refused += refused
        self.steps += 1
        return rows

    def _insert(self, keys: torch.Tensor) -> Inserted:
        # While the clock stands at 0, so do all ages.
        return self.table.insert_rows(keys, marks=self._last_used if self.clock else None, mark=self.clock)

    def _admit(self, keys: torch.Tensor) -> tuple[torch.Tensor, Inserted, torch.Tensor]:
        """The admitted keys, the result of inserting them, and the rows of all keys, −1 for keys without a row."""
        absent = self.table.rows(keys) < 0
        if not absent.any():
            done = self._insert(keys)
            return keys, done, done.rows
        fresh, inverse, counts = torch.unique(keys[absent], return_inverse=True, return_counts=True)
        admitted = self._filter.judge(fresh, counts, self.steps)
        served = torch.ones_like(absent)
        served[absent] = admitted[inverse]
        keys = keys[served]
        done = self._insert(keys)
        # Recorded after the insertion, so that a full table leaves the filter unchanged too.
        self._filter.note(fresh, counts, admitted)
        rows = torch.full(served.shape, -1, device=self.device)
        rows[served] = done.rows
        self.counters.rejected += int((~served).sum())
        return keys, done, rows

    def _start_rows(self, rows: torch.Tensor, keys: torch.Tensor) -> None:
        if callable(self.initializer):
            values, shape = self.initializer(keys, self.dim), (keys.shape[0], self.dim)
            if tuple(values.shape) != shape:
                raise ValueError(f"initializer must return {shape} values, got {tuple(values.shape)}")
            self.table.values[rows] = values.to(self.table.value_dtype)
        else:
            self.table.start_uniform(rows, keys, self.seed, self.initializer)
        for name, state in self.optimizer_state.items():
            if name != "step":
                state[rows] = self.optimizer.initial_value()
        self._changed[rows] = True

    def reserve(self, capacity: int) -> None:
        """Make room for at least ``capacity`` ids; everything stored with the rows moves along."""
        with self.table.lock:
            before, rows = self.table._storage, self.table.live_rows()
            keys = before.keys[rows].to(self.table.key_dtype)
            self.table.reserve(capacity)
            if self.table._storage is before:
                return
            # The number of slots may be the same as before, but rows have moved anyway.
            slots, moved = self.table.values.shape[0], self.table.rows(keys)

            def spread(old: torch.Tensor, start: float) -> torch.Tensor:
                new = old.new_full((slots, *old.shape[1:]), start)
                new[moved] = old[rows]
                return new

            self._last_used, self._changed = spread(self._last_used, 0), spread(self._changed, False)
            for name, state in self.optimizer_state.items():
                if name != "step":
                    self.optimizer_state[name] = spread(state, self.optimizer.initial_value())
            self._moves += 1
            self._resizes += 1

    def advance_clock(self, now: int) -> None:
        """Set the clock that ages rows to ``now``, the newest time in the data; it never goes back."""
        self.clock = max(self.clock, int(now))

    def expire(self) -> int:
        """Drop rows that training has not used for ``expire_after`` or longer; returns how many."""
        if self.expire_after is None:
            return 0
        with self.table.lock:
            rows = self.table.live_rows()
            old = rows[self._last_used[rows] <= self.clock - self.expire_after]
            self.erase(self.table._storage.keys[old].to(self.table.key_dtype))
            self.counters.expired += old.numel()
            return old.numel()

    def erase(self, ids: torch.Tensor) -> torch.Tensor:
        """Drop the rows of ``ids (n,)``; ``(n,)`` bool says which had one."""
        with self.table.lock:
            found = self.table.erase(ids)
            if found.any():
                self._removed.append(ids[found].unique())
                self._moves += 1
            return found

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
