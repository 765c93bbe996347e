"""One exchange of ids, rows, sums and gradients for any number of sharded tables that are looked up together."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist

from gossamer.ops.gather_max import gather_maxima
from gossamer.ops.gather_reduce import gather_reduce
from gossamer.ops.gather_reduce_step import STEP_TAKEN
from gossamer.ops.hash_table import HashTableFull
from gossamer.parallel import messages
from gossamer.parallel.dynamic_shard import DynamicShard
from gossamer.parallel.exchange import RowExchange, raise_together
from gossamer.parallel.messages import Reader
from gossamer.parallel.shards import TableShard, factor_dtype


class Request(NamedTuple):
    """One process's lookup in one table. All ids contribute; others were removed from the lists.

    Attributes:
        shard: the part of the table that this process holds.
        ids: ``(L,)`` int64, within the whole table.
        lengths: ``(F·B,)`` int64, ids of each bag; all bags of feature 0 first.
        features: F.
        weights: ``(L,)`` float, or None for ones.
        mode: ``"sum"``, ``"mean"`` or ``"max"``.
        pooled: whether bags are pooled; otherwise every id is its own bag.
        trained: ``(L,)`` bool, ids whose rows learn; None for all.
        out_dtype: of the result.
        learns: whether the backward pass changes the table or computes its gradient.
        inserts: whether ids without a row get one, in a dynamic table.
    """

    shard: TableShard | DynamicShard
    ids: torch.Tensor
    lengths: torch.Tensor
    features: int = 1
    weights: torch.Tensor | None = None
    mode: str = "sum"
    pooled: bool = True
    trained: torch.Tensor | None = None
    out_dtype: torch.dtype | None = None
    learns: bool = False
    inserts: bool = False

    @property
    def way(self) -> str:
        """The kind of data sent: ``"rows"``, ``"sums"`` of bags, or ``"nothing"`` except gradients, for replicas."""
        if self.shard.split.kind == "replicate":
            return "nothing"
        weighs = self.weights is not None and self.weights.requires_grad
        return "rows" if self.shard.dynamic or not self.pooled or self.shard.split.kind == "row" or weighs else "sums"

    def describe(self) -> str:
        """A description of everything that must be equal on all ranks."""
        weights = None if self.weights is None else (self.weights.dtype, self.weights.requires_grad)
        own = (self.shard.split, self.features, self.mode, self.pooled, self.out_dtype, self.inserts)
        return repr((own, weights, self.learns, self.way))

    @property
    def lists(self) -> bool:
        """Whether the lists of bags travel with the ids."""
        return self.way == "sums" or self.learns or self.inserts


@dataclass
class _Asked:
    """Saved data of a request: what was sent to each rank, and what the local backward pass needs.

    Attributes:
        request: the request.
        offsets: ``(F·B+1,)`` of its bags.
        sent: distinct rows requested from each rank, for ``"rows"``.
        place: ``(L,)`` the position of each id among the received rows.
        bags: ``(F·B,)`` bool per rank: the bags of which it holds trained ids.
        within: for each rank, the position of each id within its bag there, −1 for other ranks' ids; for maxima.
        rows: the received rows, ``(U, D)``.
        counts: ids of each bag that a mean counts.
        argmax: positions of the maxima.
    """

    request: Request
    offsets: torch.Tensor
    sent: list[int] = field(default_factory=list)
    place: torch.Tensor | None = None
    bags: list[torch.Tensor] = field(default_factory=list)
    within: list[torch.Tensor] = field(default_factory=list)
    rows: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    argmax: torch.Tensor | None = None


@dataclass
class _Served:
    """Saved data of the ids that all ranks requested from this process's shard.

    Attributes:
        ids: local ids or keys in the order of one process: by feature, then by rank, then as listed.
        lengths: of the bags, likewise, for each rank and feature.
        counts: number of bags per rank and feature whose gradients are received.
        weights: of the ids.
        unique: distinct ids of each rank, for ``"rows"``.
        argmax: positions of the maxima, except for ``"rows"``.
        rows: saved data of a dynamic table about its ids' rows.
    """

    ids: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    counts: list[list[int]] = field(default_factory=list)
    weights: torch.Tensor | None = None
    unique: list[torch.Tensor] = field(default_factory=list)
    argmax: torch.Tensor | None = None
    rows: object = None


def _by_feature(parts: Sequence[torch.Tensor], counts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Lists of all ranks in the order of a single process: ``counts[rank][feature]`` elements of ``parts[rank]`` at a
    time.
    """
    if len(counts[0]) == 1:
        return torch.cat(list(parts))
    pieces = [part.split(list(each)) for part, each in zip(parts, counts, strict=True)]
    return torch.cat([piece[feature] for feature in range(len(counts[0])) for piece in pieces])


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    return torch.cat([lengths.new_zeros(1, dtype=torch.int64), lengths.cumsum(0)])


class Lookup:
    """A lookup of several requests, and what its backward pass needs."""

    def __init__(
        self, requests: Sequence[Request], group: dist.ProcessGroup, device: torch.device, scale: float
    ) -> None:
        self.group, self.device, self.scale = group, device, scale
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.asked = [_Asked(request, _offsets(request.lengths)) for request in requests]
        self.served = [_Served() for _ in requests]
        self.taken = False

    # First message: ids.

    def ids(self) -> list[list[torch.Tensor]]:
        """The message to each rank: numbers of elements, then each request's parts."""
        sent: list[list[torch.Tensor]] = [[] for _ in range(self.world)]
        for asked in self.asked:
            way, request = asked.request.way, asked.request
            if way == "rows":
                self._ask_rows(asked, sent)
                continue
            ranks = request.shard.split.holders()
            if request.lists:
                ids, lengths, weights = request.ids, request.lengths, request.weights
                if request.trained is not None:
                    bag = torch.repeat_interleave(lengths)[request.trained]
                    ids, lengths = ids[request.trained], torch.bincount(bag, minlength=lengths.numel())
                    weights = None if weights is None else weights[request.trained]
                parts = [ids.to(request.shard.id_dtype), lengths.to(torch.int32)]
                parts += [] if weights is None else [weights]
                for rank in ranks:
                    sent[rank] += parts
        text = "".join(asked.request.describe() for asked in self.asked)
        for parts in sent:
            numbers = [zlib.crc32(text.encode()), *(part.numel() for part in parts)]
            parts.insert(0, torch.tensor(numbers, device=self.device))
        return sent

    def _ask_rows(self, asked: _Asked, sent: list[list[torch.Tensor]]) -> None:
        """Send each distinct id once to each rank that holds a part of its row; for training, also the lists of
        bags.
        """
        request, shard = asked.request, asked.request.shard
        unique, inverse = torch.unique(request.ids, return_inverse=True)
        owner = shard.owner_of(unique)
        if owner is None:
            ranks = shard.split.holders()
            asked.place = inverse
            asked.sent = [unique.numel() if rank in ranks else 0 for rank in range(self.world)]
            parts = [(rank, unique, inverse, None) for rank in ranks]
        else:
            order = owner.argsort(stable=True)
            back = torch.empty_like(order)
            back[order] = torch.arange(len(order), device=order.device)
            asked.place, owner = back[inverse], owner[order]
            asked.sent = torch.bincount(owner, minlength=self.world).tolist()
            of_ids, begin, parts = owner[asked.place], 0, []
            for rank, own in enumerate(unique[order].split(asked.sent)):
                if shard.split.piece(rank).numel:
                    parts.append((rank, own, asked.place - begin, of_ids == rank))
                begin += len(own)
        bag = torch.repeat_interleave(request.lengths) if request.lists else None
        asked.bags = [torch.zeros(request.lengths.shape, dtype=torch.bool, device=self.device)] * self.world
        asked.within = [None] * self.world
        for rank, own, entries, here in parts:
            sent[rank].append(shard.local_ids(own, rank))
            if bag is None:
                continue
            learning = request.trained if here is None else here if request.trained is None else here & request.trained
            chosen = slice(None) if learning is None else learning
            lengths = torch.bincount(bag[chosen], minlength=request.lengths.numel())
            asked.bags[rank] = lengths > 0
            if request.mode == "max":
                at = lengths.cumsum(0) - lengths
                position = torch.full(bag.shape, -1, dtype=torch.int64, device=self.device)
                position[chosen] = torch.arange(int(lengths.sum()), device=self.device) - at[bag[chosen]]
                asked.within[rank] = position
            sent[rank] += [entries[chosen].to(torch.int32), lengths.to(torch.int32)]
            if request.weights is not None:
                sent[rank].append(request.weights[chosen])

    def read_ids(self, readers: Sequence[Reader]) -> None:
        """Read the requests of all ranks to this one.

        Raises:
            ValueError: the ranks look up different things in this call.
        """
        text = "".join(asked.request.describe() for asked in self.asked)
        mine = zlib.crc32(text.encode())
        parts = 1
        for asked in self.asked:
            parts += self._parts(asked.request)
        heads = [reader.take(torch.int64, 1).item() for reader in readers]
        if any(head != mine for head in heads):
            different = [rank for rank, head in enumerate(heads) if head != mine]
            raise ValueError(
                f"tables must be looked up alike on all ranks, in the same order and with or without gradients; rank "
                f"{self.rank} differs from ranks {different}"
            )
        numbers = []
        for reader in readers:
            reader.at = 0
            numbers.append(iter(reader.take(torch.int64, parts).tolist()[1:]))
        for asked, served in zip(self.asked, self.served, strict=True):
            if self._parts(asked.request):
                self._read_request(asked.request, served, readers, numbers)

    def _parts(self, request: Request) -> int:
        """The number of tensors that a request adds to the message from each rank to this one."""
        if self.rank not in request.shard.split.holders():
            return 0
        return (request.way == "rows") + request.lists * (2 + (request.weights is not None))

    def _read_request(self, request: Request, served: _Served, readers, numbers) -> None:
        shard, features = request.shard, request.features
        lists, lengths, weights = [], [], []
        for reader, number in zip(readers, numbers, strict=True):
            if request.way == "rows":
                served.unique.append(reader.take(shard.id_dtype, next(number)))
            if request.lists:
                dtype = torch.int32 if request.way == "rows" else shard.id_dtype
                lists.append(reader.take(dtype, next(number)))
                lengths.append(reader.take(torch.int32, next(number)).view(features, -1))
                if request.weights is not None:
                    weights.append(reader.take(request.weights.dtype, next(number)))
        if not request.lists:
            return
        if request.way == "rows":
            lists = [unique[entries.long()] for unique, entries in zip(served.unique, lists, strict=True)]
        counts = [each.sum(1).tolist() for each in lengths]
        served.ids = _by_feature(lists, counts)
        if weights:
            served.weights = _by_feature(weights, counts)
        if request.way == "rows":
            # Gradients are received only for bags that have an id here.
            kept = [each > 0 for each in lengths]
            served.counts = [each.sum(1).tolist() for each in kept]
            lengths = [each[keep] for each, keep in zip(lengths, kept, strict=True)]
        else:
            served.counts = [[each.shape[1]] * features for each in lengths]
            lengths = [each.reshape(-1) for each in lengths]
        served.lengths = _by_feature(lengths, served.counts).long()

    # Second message: rows and sums.

    def answer(self) -> list[list[torch.Tensor]]:
        """The message to each rank: its rows and sums."""
        sent: list[list[torch.Tensor]] = [[] for _ in range(self.world)]
        for asked, served in zip(self.asked, self.served, strict=True):
            request, shard = asked.request, asked.request.shard
            if self.rank not in shard.split.holders():
                continue
            if request.way == "nothing":
                if request.learns and request.mode == "max":
                    # Other lookups may have changed the table by the time of the backward pass.
                    lists = (served.ids, _offsets(served.lengths), None)
                    _, served.argmax = shard.pool(*lists, request.mode, request.out_dtype)
                continue
            if request.way == "rows":
                sizes = [part.numel() for part in served.unique]
                for parts in shard.serve(torch.cat(served.unique), served, request.inserts):
                    for rank, part in enumerate(parts.split(sizes)):
                        sent[rank].append(part)
                continue
            pooled, served.argmax = shard.pool(
                served.ids, _offsets(served.lengths), served.weights, request.mode, request.out_dtype
            )
            # Bags lie by feature, then by rank.
            flat = [pooled[begin : begin + count] for begin, count in self._blocks(served.counts)]
            for rank in range(self.world):
                sent[rank].append(torch.cat([flat[f * self.world + rank] for f in range(request.features)]))
        return sent

    @staticmethod
    def _blocks(counts: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """First bag and number of bags of each feature and rank, in storage order."""
        blocks, begin = [], 0
        for feature in range(len(counts[0])):
            for each in counts:
                blocks.append((begin, each[feature]))
                begin += each[feature]
        return blocks

    def answered_words(self) -> list[int]:
        """Words of the answer to each rank."""
        found = [0] * self.world
        for asked, served in zip(self.asked, self.served, strict=True):
            request, shard = asked.request, asked.request.shard
            if request.way == "nothing" or self.rank not in shard.split.holders():
                continue
            columns = shard.split.piece(self.rank).columns
            for rank in range(self.world):
                if request.way == "sums":
                    found[rank] += messages.words(sum(served.counts[rank]) * columns, request.out_dtype)
                else:
                    found[rank] += self._row_words(shard, served.unique[rank].numel(), columns)
        return found

    @staticmethod
    def _row_words(shard: TableShard | DynamicShard, count: int, columns: int) -> int:
        words = messages.words(count * columns, shard.dtype)
        return words + (messages.words(count, torch.uint8) if shard.dynamic else 0)

    def answer_words(self) -> list[int]:
        """Words of the answer that each rank sends to this one."""
        found = [0] * self.world
        for asked in self.asked:
            request, shard = asked.request, asked.request.shard
            if request.way == "nothing":
                continue
            for rank in shard.split.holders():
                columns = shard.split.piece(rank).columns
                if request.way == "sums":
                    found[rank] += messages.words(request.lengths.numel() * columns, request.out_dtype)
                else:
                    found[rank] += self._row_words(shard, asked.sent[rank], columns)
        return found

    def results(self, readers: Sequence[Reader]) -> list[torch.Tensor]:
        """The results of all requests, pooled here if rows were received."""
        return [self._result(asked, readers) for asked in self.asked]

    def _result(self, asked: _Asked, readers: Sequence[Reader]) -> torch.Tensor:
        request, shard = asked.request, asked.request.shard
        split, place, found = shard.split, asked.place, None
        if request.way == "sums":
            bags = request.lengths.numel()
            parts = [readers[rank].take(request.out_dtype, bags, split.piece(rank).columns) for rank in split.holders()]
            return torch.cat(parts, 1)
        if request.way == "nothing":
            rows, place = shard.weight.detach(), request.ids
            if request.weights is not None and request.weights.requires_grad:
                # Other lookups may have changed the rows by the time of the backward pass.
                rows, place = shard.rows_of(request.ids), torch.arange(len(place), device=self.device)
        else:
            parts, present = [], []
            for rank in split.holders():
                parts.append(readers[rank].take(shard.dtype, asked.sent[rank], split.piece(rank).columns))
                if shard.dynamic:
                    present.append(readers[rank].take(torch.uint8, asked.sent[rank]))
            rows = torch.cat(parts, 1 if split.kind == "column" else 0)
            if shard.dynamic:
                found = torch.cat(present).bool()[place]
                place = asked.place = torch.where(found, place, -1)
        if request.mode == "mean":
            asked.counts = request.lengths
            if found is not None:
                up_to = _offsets(found.long())
                asked.counts = up_to[asked.offsets[1:]] - up_to[asked.offsets[:-1]]
        if request.mode == "max":
            pooled, asked.argmax = gather_maxima(rows, place, asked.offsets)
            return pooled
        asked.rows = rows if request.weights is not None and request.weights.requires_grad else None
        asked.place = place
        weights = None if request.weights is None else request.weights.detach()
        how = {"mode": request.mode, "bounds": "drop", "out_dtype": request.out_dtype}
        return gather_reduce(rows, place, asked.offsets, weights, **how)

    # Backward: gradients.

    def gradients(self, douts: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """The message to each rank: for each bag with ids on that rank, the gradient of the rank's columns."""
        sent: list[list[torch.Tensor]] = [[] for _ in range(self.world)]
        for asked, dout in zip(self.asked, douts, strict=True):
            request, split = asked.request, asked.request.shard.split
            if not request.learns:
                continue
            dout = dout if self.scale == 1 else dout * self.scale
            for rank in split.holders():
                piece = split.piece(rank)
                columns = slice(piece.column, piece.column + piece.columns)
                if request.way != "rows":
                    sent[rank].append(dout[:, columns])
                    continue
                bags = asked.bags[rank]
                sent[rank].append(dout[bags][:, columns])
                if request.mode == "mean":
                    sent[rank].append(asked.counts[bags].to(torch.int32))
                if request.mode == "max":
                    sent[rank].append(self._argmax_at(asked, rank)[:, columns].to(torch.int32))
        return sent

    @staticmethod
    def _argmax_at(asked: _Asked, rank: int) -> torch.Tensor:
        """Positions of maxima in the bags of ``rank``, −1 where another rank has the maximum."""
        bags, within = asked.bags[rank], asked.within[rank]
        begins, argmax = asked.offsets[:-1][bags].unsqueeze(1), asked.argmax[bags]
        return torch.where(argmax >= 0, within[(begins + argmax).clamp(min=0)], -1)

    def gradient_words(self) -> list[int]:
        """Words of the gradients that each rank sends to this one."""
        found = [0] * self.world
        for asked, served in zip(self.asked, self.served, strict=True):
            request, shard = asked.request, asked.request.shard
            if not request.learns or self.rank not in shard.split.holders():
                continue
            columns = shard.split.piece(self.rank).columns
            for rank, each in enumerate(served.counts):
                bags = sum(each)
                found[rank] += messages.words(bags * columns, request.out_dtype)
                if request.way == "rows":
                    found[rank] += messages.words(bags, torch.int32) if request.mode == "mean" else 0
                    found[rank] += messages.words(bags * columns, torch.int32) if request.mode == "max" else 0
        return found

    def learn(self, readers: Sequence[Reader]) -> list[torch.Tensor | None]:
        """Take the steps; returns the gradient of the weight of each shard without an optimizer."""
        found = []
        for asked, served in zip(self.asked, self.served, strict=True):
            request, shard = asked.request, asked.request.shard
            if not request.learns:
                found.append(None)
            elif self.rank not in shard.split.holders():
                found.append(shard.learn_nothing())
            else:
                found.append(self._learn(request, served, readers))
        return found

    def _learn(self, request: Request, served: _Served, readers: Sequence[Reader]) -> torch.Tensor | None:
        shard, mode, weights, argmax = request.shard, request.mode, served.weights, served.argmax
        columns = shard.split.piece(self.rank).columns
        rows = request.way == "rows"
        douts, counts, maxima = [], [], []
        for reader, each in zip(readers, served.counts, strict=True):
            bags = sum(each)
            douts.append(reader.take(request.out_dtype, bags, columns))
            if rows and mode == "mean":
                counts.append(reader.take(torch.int32, bags))
            if rows and mode == "max":
                maxima.append(reader.take(torch.int32, bags, columns))
        dout = _by_feature(douts, served.counts)
        if counts:
            # A mean counts a bag's ids on all ranks: the weights are the inverse of that number.
            dtype = factor_dtype(self.device)
            scale = 1 / _by_feature(counts, served.counts).clamp(min=1).to(dtype)
            scale = torch.repeat_interleave(scale, served.lengths)
            weights, mode = scale if weights is None else weights.to(dtype) * scale, "sum"
        if maxima:
            argmax = _by_feature(maxima, served.counts)
        return shard.learn(served.ids, _offsets(served.lengths), dout, weights, argmax, mode, served)

    def weight_gradient(self, asked: _Asked, dout: torch.Tensor) -> torch.Tensor:
        """The gradient of a request's per-sample weights."""
        leaf = asked.request.weights.detach().requires_grad_()
        with torch.enable_grad():
            how = {"mode": asked.request.mode, "bounds": "drop", "out_dtype": asked.request.out_dtype}
            again = gather_reduce(asked.rows, asked.place, asked.offsets, leaf, **how)
            return torch.autograd.grad(again, leaf, dout)[0]

    # The complete exchange.

    def run(self) -> list[torch.Tensor]:
        """Exchange ids, then rows and sums; returns the results of all requests.

        Raises:
            Exception: the error of a rank that cannot answer, such as :class:`gossamer.HashTableFull`, on every rank.
        """
        self.read_ids(messages.send(self.ids(), None, self.group, self.device, "table ids"))
        error = None
        try:
            answers = self.answer()
        except Exception as found:
            # The others wait for an answer, so the error is sent as the answer.
            error = found
            answers = [[torch.zeros(words, dtype=torch.int64, device=self.device)] for words in self.answered_words()]
        status = torch.tensor([error is not None], dtype=torch.int64, device=self.device)
        expected = [1 + words for words in self.answer_words()]
        answers = [[status, *parts] for parts in answers]
        readers = messages.send(answers, expected, self.group, self.device, "table rows")
        if any([reader.take(torch.int64, 1).item() for reader in readers]):
            raise_together(error, self.group, kinds=(HashTableFull,))
        return self.results(readers)

    def apply(self) -> list[torch.Tensor]:
        """:meth:`run`, recorded by autograd where something is differentiable."""
        requests = [asked.request for asked in self.asked]
        weights = [r.weights for r in requests if r.weights is not None and r.weights.requires_grad]
        learning = [request.shard for request in requests if request.learns]
        parameters = [shard.parameter for shard in learning if shard.parameter is not None]
        if not torch.is_grad_enabled() or not (weights or learning):
            with torch.no_grad():
                return self.run()
        handle = torch.zeros(0, device=self.device, requires_grad=bool(learning))
        return list(_Differentiable.apply(self, handle, *weights, *parameters))


class _Differentiable(torch.autograd.Function):
    """A lookup whose backward pass sends gradients to the ranks that hold the rows, which take their steps."""

    @staticmethod
    def forward(ctx, lookup, handle, *inputs):
        ctx.lookup, results = lookup, lookup.run()
        requests = [asked.request for asked in lookup.asked]
        frozen = [not (r.learns or (r.weights is not None and r.weights.requires_grad)) for r in requests]
        ctx.mark_non_differentiable(*itertools.compress(results, frozen))
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *douts):
        lookup: Lookup = ctx.lookup
        if lookup.taken:
            raise RuntimeError(STEP_TAKEN)
        lookup.taken = True
        inputs = []
        for asked, dout in zip(lookup.asked, douts, strict=True):
            if asked.request.weights is not None and asked.request.weights.requires_grad:
                inputs.append(lookup.weight_gradient(asked, dout))
        if any(asked.request.learns for asked in lookup.asked):
            sent, expected = lookup.gradients(douts), lookup.gradient_words()
            readers = messages.send(sent, expected, lookup.group, lookup.device, "table gradients")
            for asked, gradient in zip(lookup.asked, lookup.learn(readers), strict=True):
                if asked.request.learns and asked.request.shard.parameter is not None:
                    inputs.append(gradient)
        return None, torch.zeros(0, device=lookup.device), *inputs


def look_up(
    build: Callable[[], list[Request]], group: dist.ProcessGroup, device: torch.device, scale: float
) -> list[torch.Tensor]:
    """Look up the requests that ``build`` returns, by one exchange over all ranks of ``group``.

    Args:
        build: creates this rank's requests; if it raises on one rank, all ranks raise the same error.
        group: the ranks, all of which make the call.
        device: of all tables.
        scale: factor of the rows' gradients.

    Returns:
        For each request ``(F·B, D)``, differentiable.
    """
    try:
        requests = build()
    except Exception as error:
        none = torch.empty(0, dtype=torch.int64, device=device)
        RowExchange.of([0] * dist.get_world_size(group), group, none, label="table ids", error=error)
        raise
    return Lookup(requests, group, device, scale).apply()
