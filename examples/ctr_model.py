"""The click model of online_ctr.py: a DLRM over embedding tables, its training step, and its whole state as tensors."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from click_stream import DENSE, FEATURES, ClickStream, Events
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from gossamer.nn import DynamicEmbedding, EmbeddingBag, EmbeddingFolder, FrequencyAdmission, read_manifest
from gossamer.optim import RowwiseAdagrad
from gossamer.parallel import ShardedDynamicEmbedding, ShardedEmbeddingFolder, count_traffic, lookup, shard_tables

TABLES = ("dynamic", "unfiltered", "hashing")
SHARES = {"user": 0.35, "item": 0.25, "tags": 0.1, "history": 0.3}  # fraction of all rows
KEY_BYTES = 8 + 8 + 1 + 12 / 16  # bytes of a hash table's slot: key, score, digest, and a sixteenth of its bucket
ROW_BYTES = KEY_BYTES + 8 + 1  # also the time of the last use, and whether the row has changed
SLOTS = 13 / 12  # slots allocated per key of the capacity
MEASURES = ("auc", "ceiling", "logloss", "clicks", "rows", "inserted", "evicted", "expired", "rejected")


@dataclass(frozen=True)
class Settings:
    """All settings of a run except its length.

    Attributes:
        tables: ``"dynamic"``; ``"unfiltered"``, dynamic without admission and expiry; or ``"hashing"``, fixed tables of
            equal bytes, with ids modulo their size.
        batch: events per step.
        dim: D, the columns of all tables.
        capacity: rows of all dynamic tables together.
        threshold: how often an id must be seen before it gets a row.
        expire_after: steps without use after which a row is removed.
        size: scale of the stream's populations.
        pace: how fast its ids come and go.
        lr: learning rate of Adam, for the dense weights.
        embedding_lr: learning rate of row-wise Adagrad, for the tables.
        seed: seed of everything.
        device: device of the model and its tables.
    """

    tables: str
    batch: int
    dim: int
    capacity: int
    threshold: int
    expire_after: int
    size: float
    pace: float
    lr: float
    embedding_lr: float
    seed: int
    device: str

    def stream(self) -> ClickStream:
        """The events of this run."""
        return ClickStream(self.seed, self.batch, self.size, self.pace)


def auc(scores: torch.Tensor, clicks: torch.Tensor) -> float:
    """Area under the ROC curve: how often a clicked event scores above an unclicked one; ties count half."""
    levels, place, counts = scores.double().unique(return_inverse=True, return_counts=True)
    clicked = torch.zeros_like(levels).index_add_(0, place, clicks.double())
    others = counts - clicked
    pairs = clicked.sum() * others.sum()
    below = others.cumsum(0) - others
    return float((clicked * (below + others / 2)).sum() / pairs) if pairs > 0 else 0.5


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for wide, narrow in itertools.pairwise(sizes):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class HashedBag(EmbeddingBag):
    """The hashing trick: a fixed table, in which ids with the same remainder share a row."""

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Means over bags of ids, ``(B, D)``."""
        return super().forward(ids % self.num_embeddings, offsets)


def make_table(feature: str, number: int, settings: Settings) -> nn.Module:
    """The table of a feature; all kinds have about the same bytes."""
    capacity, forgets = max(int(settings.capacity * SHARES[feature]), 1), settings.tables != "unfiltered"
    optimizer = RowwiseAdagrad(lr=settings.embedding_lr, initial_accumulator=1e-2)
    dynamic = DynamicEmbedding(
        settings.dim,
        capacity,
        pooling="mean",
        optimizer=optimizer,
        admission=FrequencyAdmission(settings.threshold, capacity=capacity) if forgets else None,
        expire_after=settings.expire_after if forgets else None,
        initializer=0.05,
        device=settings.device,
        seed=settings.seed + number,
    )
    if settings.tables != "hashing":
        return dynamic
    rows = table_bytes(dynamic) // (4 * settings.dim + 4)
    weight = torch.rand(rows, settings.dim).mul_(0.1).sub_(0.05)
    return HashedBag(rows, settings.dim, mode="mean", include_last_offset=True, _weight=weight, optimizer=optimizer).to(
        settings.device
    )


def table_bytes(table: nn.Module) -> int:
    """Memory of a table with its optimizer's state, and with the keys and filter of a dynamic one."""
    if isinstance(table, EmbeddingBag):
        return sum(tensor.nbytes for tensor in (table.weight, *table.buffers()))
    # For a sharded table, the bytes on this process.
    table = getattr(table, "local", table)
    values, counts = table.table.values, 0 if table.admission is None else table.admission.capacity
    state = sum(tensor.nbytes for tensor in table.optimizer_state.values())
    return int(values.nbytes + state + values.shape[0] * ROW_BYTES + counts * SLOTS * (4 + KEY_BYTES))


class DLRM(nn.Module):
    """Dense features through an MLP, ids through tables, all pairs of the two through dot products, then an MLP.

    Naumov et al., 2019, arXiv 1906.00091.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        torch.manual_seed(settings.seed)
        width = len(FEATURES) + 1
        self.bottom = mlp(len(DENSE), 64, settings.dim)
        self.top = mlp(settings.dim + width * (width - 1) // 2, 64, 32, 1)
        self.to(settings.device)
        self.tables = nn.ModuleDict({name: make_table(name, i, settings) for i, name in enumerate(FEATURES)})
        first, second = torch.tril_indices(width, width, -1, device=settings.device)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("second", second, persistent=False)

    def forward(self, events: Events) -> torch.Tensor:
        """Logits of a click, ``(B,)``."""
        x = self.bottom(events.dense.to(self.first.device))
        ids = {name: tuple(part.to(x.device) for part in events.ids[name]) for name in FEATURES}
        # All lookups in one call, so that sharded tables share one exchange.
        vectors = torch.stack([x, *lookup(self.tables, ids).values()], 1)
        products = torch.bmm(vectors, vectors.mT)[:, self.first, self.second]
        return self.top(torch.cat([x, products], 1)).squeeze(1)


def open_folder(path: Path, layers: Mapping[str, nn.Module]) -> EmbeddingFolder | ShardedEmbeddingFolder:
    """The folder of a run; for sharded layers, and for a server that follows a sharded run, one with shards."""
    sharded = any(isinstance(layer, ShardedDynamicEmbedding) for layer in layers.values())
    kind = ShardedEmbeddingFolder if sharded or (path / "shards.json").exists() else EmbeddingFolder
    return kind(path, layers)


def newest(path: Path):
    """The newest checkpoint of a folder, with its ``info`` and ``sequence``; None before the first."""
    committed = ShardedEmbeddingFolder.committed_in(path)
    return committed[0] if committed else read_manifest(path)


class Trainer:
    """A model, its optimizers, and its measurements so far: everything that has to survive a restart.

    With a mesh, tables are spread over its processes, and each process trains on its share of every batch.
    """

    def __init__(self, settings: Settings, mesh: DeviceMesh | None = None, plan: str = "auto") -> None:
        self.settings, self.stream = settings, settings.stream()
        self.model = DLRM(settings)
        self.group = None if mesh is None else mesh.get_group()
        self.rank, self.ranks = (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())
        if mesh is not None:
            shard_tables(self.model, mesh, plan if plan == "auto" else {f"tables.{name}": plan for name in FEATURES})
        parts = ((name, getattr(self.model, name)) for name in ("bottom", "top"))
        self.dense = {k: p for name, part in parts for k, p in part.named_parameters(prefix=name)}
        self.optimizer = torch.optim.Adam(list(self.dense.values()), lr=settings.lr)
        self.step, self.seconds = 0, 0.0
        self.measured: list[list[float]] = []
        self.table_bytes = sum(table_bytes(table) for table in self.model.tables.values())
        # Seconds, bytes sent and collectives of this process since it started, by part of a step.
        self.parts: dict[str, list[float]] = {}
        self.started = 0

    @property
    def dynamic(self) -> dict[str, DynamicEmbedding | ShardedDynamicEmbedding]:
        """The dynamic tables by name; none with hashing."""
        kinds = (DynamicEmbedding, ShardedDynamicEmbedding)
        return {name: table for name, table in self.model.tables.items() if isinstance(table, kinds)}

    def _spend(self, part: str, begin: float, nbytes: float = 0, collectives: int = 0) -> None:
        """Add the time and traffic of a part of a step."""
        spent = self.parts.setdefault(part, [0.0, 0.0, 0.0])
        for index, amount in enumerate((time.perf_counter() - begin, nbytes, collectives)):
            spent[index] += amount

    def _average_gradients(self) -> None:
        """Turn the dense gradients into those of the joined batch."""
        begin = time.perf_counter()
        flat = torch.cat([parameter.grad.view(-1) for parameter in self.dense.values()])
        dist.all_reduce(flat, group=self.group)
        for parameter, part in zip(
            self.dense.values(), flat.div_(self.ranks).split([p.numel() for p in self.dense.values()]), strict=True
        ):
            parameter.grad.copy_(part.view_as(parameter))
        # A ring all-reduce sends each process's share of the others twice: (ranks − 1) / ranks of the bytes each time.
        self._spend("dense gradients", begin, 2 * flat.nbytes * (self.ranks - 1) / self.ranks, 1)

    def _gather(self, logits: torch.Tensor, numbers: list[float]) -> tuple[torch.Tensor, list[float]]:
        """The logits of the joined batch, and sums of numbers over the processes."""
        if self.group is None:
            return logits, numbers
        begin = time.perf_counter()
        mine = torch.cat([logits.double(), torch.tensor(numbers, dtype=torch.float64, device=logits.device)])
        every = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(every, mine, group=self.group)
        self._spend("measures", begin, mine.nbytes * (self.ranks - 1), 1)
        count = len(logits)
        return torch.cat([each[:count] for each in every]), sum(each[count:] for each in every).tolist()

    def train_step(self) -> None:
        """Predict the next events, measure the predictions, and only then learn from the events."""
        begin = time.perf_counter()
        events = self.stream.events(self.step)
        own = events.share(self.rank, self.ranks)
        self._spend("events", begin)
        for table in self.dynamic.values():
            table.advance_clock(self.step)
        computing = time.perf_counter()
        with count_traffic() as traffic:
            logits, clicks = self.model(own), own.clicks.to(self.settings.device)
            loss = F.binary_cross_entropy_with_logits(logits, clicks)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        waited = sum(flow.seconds for flow in traffic.flows.values())
        self._spend("forward and backward", computing + waited)
        for label, flow in traffic.flows.items():
            self._spend(label, time.perf_counter() - flow.seconds, flow.nbytes, flow.collectives)
        if self.group is not None:
            self._average_gradients()
        self.optimizer.step()
        if self.step % 10 == 9:
            for table in self.dynamic.values():
                table.expire()
        counters = [table.counters for table in self.dynamic.values()]
        counted = [sum(getattr(c, name) for c in counters) for name in MEASURES[5:]]
        rows = sum(len(table) for table in self.dynamic.values())
        held = sum(table_bytes(table) for table in self.model.tables.values())
        logits, numbers = self._gather(logits.detach(), [loss.item() / self.ranks, held, rows, *counted])
        loss, self.table_bytes, *counted = numbers
        areas = [auc(logits.cpu(), events.clicks), auc(events.truth, events.clicks)]
        self.measured.append([*areas, loss, events.clicks.mean().item(), *counted])
        self._spend("step", begin)
        self.step += 1

    def recent(self, steps: int) -> dict[str, float]:
        """The mean of each measure over the last steps; for counters, the last value."""
        last = torch.tensor(self.measured[-steps:], dtype=torch.float64)
        return dict(zip(MEASURES, [*last[:, :4].mean(0).tolist(), *last[-1, 4:].tolist()], strict=True))

    @torch.no_grad()
    def score(self, events: Events) -> torch.Tensor:
        """Logits as from a server, without changing any state."""
        self.model.eval()
        logits = self.model(events)
        self.model.train()
        return logits

    def serving_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that a server needs in addition to the dynamic tables."""
        return {f"model.{name}": parameter for name, parameter in self.dense.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All state other than the dynamic tables."""
        found = self.serving_tensors()
        for name, table in self.model.tables.items():
            if isinstance(table, EmbeddingBag):
                found |= {f"tables.{name}.{key}": tensor for key, tensor in table.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{key}": tensor for key, tensor in state.items()}
        found["measured"] = torch.tensor(self.measured, dtype=torch.float64).view(-1, len(MEASURES))
        return found

    @torch.no_grad()
    def take(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        """Load the :meth:`tensors` or :meth:`serving_tensors` of a step."""
        for name, parameter in self.dense.items():
            parameter.copy_(tensors[f"model.{name}"])
        for name, table in self.model.tables.items():
            prefix = f"tables.{name}."
            if isinstance(table, EmbeddingBag):
                table.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        states: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                states.setdefault(int(index), {})[key] = tensor.clone()
        if states:
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        if "measured" in tensors:
            self.measured = tensors["measured"].tolist()
        self.step = self.started = step
