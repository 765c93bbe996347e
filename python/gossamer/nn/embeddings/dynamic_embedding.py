"""Embeddings of ids that appear and disappear: rows are created for admitted ids, trained, expired and evicted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.compiler import is_exporting

from gossamer._backend import transformed
from gossamer._checks import FLOAT_DTYPES, check_index, check_number, check_seed
from gossamer.nn.embeddings.admission import FrequencyAdmission, ProbabilisticAdmission
from gossamer.nn.embeddings.dynamic_lookup import Lookup
from gossamer.nn.embeddings.dynamic_state import Counters, DynamicState
from gossamer.nn.embeddings.table import bytes_of, check_budget, check_lists
from gossamer.nn.replicas import check_alone
from gossamer.ops.gather_reduce import check_lookup, gather_reduce
from gossamer.ops.hash_table import HashTable, Inserted
from gossamer.optim import Optimizer

POOLING = ("sum", "mean", "max", None)


class DynamicEmbedding(DynamicState):
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
            nbytes: the most bytes, as :meth:`inference_nbytes` counts them.
            **options: options of the class.

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
            raise ValueError("weights is another name of per_sample_weights, only one of them may be given")
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
                "layers that follow it, and pass its output to them"
            )
        if torch.jit.is_tracing() or transformed():
            what = "torch.jit.trace" if torch.jit.is_tracing() else "torch.func"
            raise RuntimeError(
                f"{what} cannot record DynamicEmbedding, whose table changes outside the program: apply it to the "
                "layers that follow, and pass them its output"
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
        # While the clock is 0, all times of last use are 0 already.
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
        """Drop the rows of ``ids (n,)``; returns ``(n,)`` bool, which of them had one."""
        with self.table.lock:
            found = self.table.erase(ids)
            if found.any():
                self._removed.append(ids[found].unique())
                self._moves += 1
            return found
