"""One rank's share of the ids of a table without a vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from gossamer._rounding import mix64
from gossamer.nn import DynamicEmbedding, FrequencyAdmission, Table
from gossamer.nn.embeddings.dynamic_lookup import learn, rows_now
from gossamer.parallel.placement import Split
from gossamer.parallel.shards import copy_beside

# Ids are assigned to this many groups by hash, and groups to ranks in order. Checkpoints store groups, so that any
# number of processes can find its ids. It has many divisors, so that many numbers of ranks get equally many groups.
HASH_GROUPS = 480
_SALT = 0x2545F4914F6CDD1D


def hash_groups(ids: torch.Tensor) -> torch.Tensor:
    """The group of each id, in ``[0, HASH_GROUPS)``."""
    return mix64(ids.long() ^ _SALT).remainder(HASH_GROUPS)


def rank_of(ids: torch.Tensor, world: int) -> torch.Tensor:
    """The rank of each id under row-wise sharding over ``world`` ranks."""
    return hash_groups(ids) * world // HASH_GROUPS


class _Rows(NamedTuple):
    """Rows of a dynamic table that a lookup created or found, and the counts of removals and growths at that time."""

    rows: torch.Tensor
    moves: int
    resizes: int


class DynamicShard(Table):
    """A rank's share of the ids of a :class:`gossamer.nn.DynamicEmbedding`.

    Attributes:
        local: the layer that holds them.
        split: distribution of ids over ranks: by hash for ``"row"``, or all on one rank for ``"table"``.
        rank: of this process.
        mesh: one-dimensional, over the ranks.
    """

    dynamic = True
    # A step in the backward pass computes no parameter gradient.
    parameter = None

    def __init__(self, layer: DynamicEmbedding, split: Split, mesh: DeviceMesh) -> None:
        super().__init__()
        self.split, self.mesh, self.rank = split, mesh, mesh.get_local_rank()
        share = split.piece(self.rank).rows
        admission = layer.admission
        if isinstance(admission, FrequencyAdmission):
            counted = -(-admission.capacity * share // max(split.rows, 1))
            admission = FrequencyAdmission(admission.threshold, capacity=max(counted, 1), sketch=admission.sketch)
        local = DynamicEmbedding(
            layer.dim,
            max(share, 1),
            pooling=layer.pooling,
            optimizer=layer.optimizer,
            admission=admission,
            expire_after=layer.expire_after,
            evict=layer.table.evict,
            initializer=layer.initializer,
            dtype=layer.table.value_dtype,
            key_dtype=layer.table.key_dtype,
            device=mesh.device_type if layer.device.type == "meta" else layer.device,
            seed=layer.seed,
        )
        # Not a submodule, because its rows go into checkpoints by groups of ids.
        self.__dict__["local"] = local
        # A layer on the meta device has no ids yet.
        if layer.device.type != "meta":
            state = layer.get_extra_state()
            local.merge([(state["tensors"], state["header"])], self.mine)
        if self.rank:
            # Earlier events are counted on one rank only.
            local.counters = type(local.counters)()
        self.train(layer.training)

    @property
    def num_embeddings(self) -> int:
        """The maximum number of ids that have a row at one time, on all ranks."""
        return self.split.rows

    @property
    def embedding_dim(self) -> int:
        """D."""
        return self.split.columns

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group of the ranks."""
        return self.mesh.get_group()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        return self.local.table.value_dtype

    @property
    def id_dtype(self) -> torch.dtype:
        """The dtype of ids."""
        return self.local.table.key_dtype

    @property
    def trained(self) -> bool:
        """Whether rows learn in the backward pass."""
        return self.local.optimizer is not None

    @property
    def optimizer(self):
        """The optimizer of :attr:`local`; may be set to one with the same state, to change a hyperparameter."""
        return self.local.optimizer

    def __setattr__(self, name: str, value: object) -> None:
        """As for any module, but ``optimizer`` is set on the local layer."""
        if name == "optimizer":
            self.local.optimizer = value
        else:
            super().__setattr__(name, value)

    def owner_of(self, ids: torch.Tensor) -> torch.Tensor | None:
        """The rank of each id."""
        return None if self.split.kind == "table" else rank_of(ids, self.split.world)

    def mine(self, ids: torch.Tensor) -> torch.Tensor:
        """Which ids are this rank's."""
        if self.split.kind == "table":
            return torch.full(ids.shape, self.rank == self.split.owner, device=ids.device)
        return rank_of(ids, self.split.world) == self.rank

    def local_ids(self, ids: torch.Tensor, rank: int) -> torch.Tensor:
        """Ids in the numbering of ``rank``."""
        return ids

    def serve(self, ids: torch.Tensor, served, inserts: bool) -> list[torch.Tensor]:
        """Rows of ids, with zeros for ids without a row, and which ids have one; first creates rows for admitted
        ids.
        """
        local = self.local
        with local.table.lock, torch.no_grad():
            if inserts:
                served.rows = _Rows(local.train_rows(served.ids), local._moves, local._resizes)
            values, found = local.table.find(ids)
        return [values, found.to(torch.uint8)]

    def learn(self, ids, offsets, dout, weights, argmax, mode, served) -> None:
        """Take the optimizer's step on the rows that the ids still have."""
        local, (rows, moves, resizes) = self.local, served.rows
        with local.table.lock:
            if local._moves != moves:
                rows = rows_now(local, ids, rows, resizes)
            learn(local, rows, dout, offsets, weights, argmax, mode)

    def learn_nothing(self) -> None:
        """Do nothing: a rank that holds no ids has no step to count."""

    def __len__(self) -> int:
        return len(self.local)

    def extra_repr(self) -> str:
        """The local part, and the distribution of ids."""
        return f"by {self.split.kind}: {self.local.extra_repr()}"

    def __deepcopy__(self, memo: dict) -> DynamicShard:
        return copy_beside(self, memo)

    def advance_clock(self, now: int) -> None:
        """As :meth:`gossamer.nn.DynamicEmbedding.advance_clock`; call it on every rank with the same time."""
        self.local.advance_clock(now)

    def expire(self) -> int:
        """As :meth:`gossamer.nn.DynamicEmbedding.expire`, of this rank's ids."""
        return self.local.expire()

    def erase(self, ids: torch.Tensor) -> torch.Tensor:
        """Remove this rank's rows of ``ids (n,)``; return ``(n,)`` bool, which of them had a row here."""
        return self.local.erase(ids)

    def train(self, mode: bool = True) -> DynamicShard:
        """As for any module; the local layer follows."""
        super().train(mode)
        self.local.train(mode)
        return self

    def nbytes(self) -> int:
        """Bytes on this rank."""
        return self.local.nbytes()

    def inference_nbytes(self) -> int:
        """Bytes on this rank once :meth:`freeze` was called."""
        return self.local.inference_nbytes()

    def freeze(self) -> DynamicShard:
        """As :meth:`gossamer.nn.DynamicEmbedding.freeze`, on this rank."""
        self.local.freeze()
        return super().freeze()

    def _apply(self, fn, recurse=True):
        self.local._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _groups(self) -> Iterator[int]:
        """The groups of ids that are this rank's."""
        if self.split.kind == "table":
            return iter(range(HASH_GROUPS) if self.rank == self.split.owner else ())
        world = self.split.world
        return (group for group in range(HASH_GROUPS) if group * world // HASH_GROUPS == self.rank)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        tensors, header = self.local._snapshot()
        parts = _by_group({name: tensor.cpu() for name, tensor in tensors.items()})
        for index, group in enumerate(self._groups()):
            # Loading adds up the counters of ranks, so they are stored in one group of each rank.
            counters = header["counters"] if index == 0 else dict.fromkeys(header["counters"], 0)
            destination[f"{prefix}ids.{group:03d}"] = _to_bytes(parts[group], header | {"counters": counters})

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        if (whole := state_dict.get(prefix + "_extra_state")) is not None:
            parts = [(whole["tensors"], whole["header"])]
        else:
            keys = [f"{prefix}ids.{group:03d}" for group in self._groups()]
            absent = [key for key in keys if key not in state_dict]
            if absent:
                missing_keys.extend(absent if strict else ())
                return
            parts = [_from_bytes(state_dict[key]) for key in keys]
        try:
            self.local.merge(parts, self.mine, f"{prefix}ids of the state_dict")
        except ValueError as error:
            error_msgs.append(str(error))
            return
        if prefix + "_extra_state" in state_dict and self.rank:
            self.local.counters = type(self.local.counters)()


# Names of a snapshot's tensors that are stored by row; the others have their own ids or belong to the layer.
_LAYER = ("optimizer.step", "table.reach", "table.clock", "table.rows", "filter.reach", "filter.clock", "filter.rows")


def _by_group(tensors: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """A snapshot cut into groups of ids."""
    cuts = {}
    for ids in ("table.keys", "removed", "filter.keys"):
        if ids in tensors:
            group = hash_groups(tensors[ids])
            order = group.argsort(stable=True)
            cuts[ids] = order, torch.bincount(group, minlength=HASH_GROUPS).tolist()
    found: list[dict[str, torch.Tensor]] = [{} for _ in range(HASH_GROUPS)]
    for name, tensor in tensors.items():
        if name in _LAYER or name == "filter.lines":
            if name == "optimizer.step":
                for part in found:
                    part[name] = tensor
            continue
        ids = "filter.keys" if name.startswith("filter.") else "removed" if name == "removed" else "table.keys"
        order, counts = cuts[ids]
        for part, rows in zip(found, tensor[order].split(counts), strict=True):
            part[name] = rows
    return found


def _to_bytes(tensors: Mapping[str, torch.Tensor], header: Mapping[str, object]) -> bytes:
    """A group of ids as bytes, because checkpoints accept bytes of any length, but only tensors of a fixed shape."""
    described, parts = {}, []
    for name, tensor in tensors.items():
        described[name] = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        parts.append(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    head = json.dumps({"header": header, "tensors": described}).encode()
    return b"".join([len(head).to_bytes(8, "little"), head, *parts])


def _from_bytes(data: bytes) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """The inverse of :func:`_to_bytes`.

    Raises:
        ValueError: :func:`_to_bytes` did not make the bytes.
    """
    try:
        begin = 8 + int.from_bytes(data[:8], "little")
        head, tensors = json.loads(data[8:begin]), {}
        for name, (dtype, shape) in head["tensors"].items():
            dtype = getattr(torch, dtype)
            numel = torch.Size(shape).numel()
            end = begin + numel * dtype.itemsize
            flat = torch.frombuffer(bytearray(data[begin:end]), dtype=dtype) if numel else torch.empty(0, dtype=dtype)
            tensors[name], begin = flat.view(shape), end
        return tensors, head["header"]
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"a group of ids of a sharded DynamicEmbedding is corrupt: {error}") from error
