"""Rows exchanged by all-to-all over a process group, differentiably, with their bytes counted."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from gossamer._checks import check_sizes, check_strided, check_tensor
from gossamer.parallel.traffic import count_sent

# Errors that raise_together raises with their own type on every rank; other errors become a RuntimeError.
_KINDS = {kind.__name__: kind for kind in (IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)}


def check_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """``group``, or the default group for None.

    Raises:
        RuntimeError: torch.distributed has no default group.
        TypeError: ``group`` is something else.
        ValueError: this process is not in the group.
    """
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("group must be a ProcessGroup before torch.distributed.init_process_group, got None")
        return dist.group.WORLD
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must hold this process, got a group of others")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    return group


def raise_together(
    error: Exception | None,
    *groups: dist.ProcessGroup,
    description: str = "",
    kinds: Sequence[type[Exception]] = (),
) -> list[str]:
    """Raise the error of the lowest rank that has one on every rank; every rank must make the call.

    The message is the error's own if all ranks have the same; otherwise it names the rank.

    Args:
        error: the error on this rank, or None.
        *groups: the groups of ranks: one, or one per dimension of a mesh.
        description: description of this rank's state.
        kinds: error types to keep, in addition to the usual built-in ones; other errors are raised as one of their base
            types.

    Returns:
        The ranks' descriptions, lowest rank first.

    Raises:
        Exception: of the type of ``error``, if any rank has one.
    """
    known = _KINDS | {kind.__name__: kind for kind in kinds}
    names = [kind.__name__ for kind in type(error).__mro__ if kind.__name__ in known]
    mine = None if error is None else (names[0] if names else "RuntimeError", str(error))
    found = {dist.get_rank(): (mine, description)}
    for group in groups:
        heard: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(heard, found, group=group)
        found = {rank: what for others in heard for rank, what in others.items()}
    ordered = [(rank, *found[rank]) for rank in sorted(found)]
    errors = [other for _, other, _ in ordered]
    for rank, other, _ in ordered:
        if other is not None:
            kind, message = other
            same = errors.count(other) == len(errors)
            raise known[kind](message if same else f"rank {rank}: {message}") from error
    return [text for *_, text in ordered]


@dataclass(frozen=True)
class _Layout:
    """The layout of an exchange's tensors in records of bytes, one record per row.

    Attributes:
        dtypes: dtype of each tensor.
        tails: sizes of a row of each tensor.
        starts: first byte of each tensor.
        used: number of used bytes of a record.
        nbytes: bytes of a record, a multiple of the widest element's.
    """

    dtypes: tuple[torch.dtype, ...]
    tails: tuple[torch.Size, ...]
    starts: tuple[int, ...]
    used: int
    nbytes: int

    @staticmethod
    def of(tensors: Sequence[torch.Tensor]) -> _Layout:
        # Wide elements come first, so that every field is aligned without padding.
        starts, end = [0] * len(tensors), 0
        for index in sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size()):
            starts[index] = end
            end += tensors[index].shape[1:].numel() * tensors[index].element_size()
        widest = max(tensor.element_size() for tensor in tensors)
        return _Layout(
            tuple(tensor.dtype for tensor in tensors),
            tuple(tensor.shape[1:] for tensor in tensors),
            tuple(starts),
            end,
            -(-end // widest) * widest,
        )

    def pack(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Records ``(N, nbytes)`` uint8 of tensors ``(N, ...)``."""
        rows = tensors[0].shape[0]
        if rows == 0:
            # A tensor without elements counts as contiguous with any strides, such as those of an expanded gradient.
            return tensors[0].new_empty((0, self.nbytes), dtype=torch.uint8)
        flat = [tensor.detach().reshape(rows, self.tails[i].numel()) for i, tensor in enumerate(tensors)]
        if len(flat) == 1:
            return flat[0].contiguous().view(torch.uint8)
        records = flat[0].new_empty((rows, self.nbytes), dtype=torch.uint8)
        records[:, self.used :].zero_()
        for part, place in zip(flat, self._fields(records), strict=True):
            place.copy_(part)
        return records

    def unpack(self, records: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of records, as views of them."""
        places = zip(self._fields(records), self.tails, strict=True)
        return [place.unflatten(1, tail) if tail else place.squeeze(1) for place, tail in places]

    def _fields(self, records: torch.Tensor) -> list[torch.Tensor]:
        """The matrix ``(N, elements of a row)`` of each tensor, a view of its bytes in the records."""
        fields = []
        for dtype, tail, start in zip(self.dtypes, self.tails, self.starts, strict=True):
            width = tail.numel() * dtype.itemsize
            # Records without bytes have no stride that a wider element could use.
            none = records.new_empty((records.shape[0], 0), dtype=dtype)
            fields.append(records[:, start : start + width].view(dtype) if width else none)
        return fields

    def ghosts(self, like: torch.Tensor, rows: int, which: Sequence[int]) -> list[torch.Tensor]:
        """Placeholder tensors of the right sizes, with one element of storage each, for rows in transit."""
        return [like.new_zeros((), dtype=self.dtypes[i]).expand(rows, *self.tails[i]) for i in which]


class _Transfer:
    """Rows in transit: a started collective and its result."""

    def __init__(self, exchange: RowExchange, tensors: Sequence[torch.Tensor], label: str) -> None:
        self.exchange, self.label = exchange, label
        self.layout = _Layout.of(tensors)
        self.gradients: _Transfer | None = None
        self._received: list[torch.Tensor] | None = None
        sent = self.layout.pack(tensors)
        received = sent.new_empty((exchange.num_received, self.layout.nbytes))
        self._work = None
        self._buffers = (sent, received)
        if self.layout.nbytes:
            self._work = dist.all_to_all_single(
                received,
                sent,
                list(exchange.received_sizes),
                list(exchange.sent_sizes),
                group=exchange.group,
                async_op=True,
            )
            away = exchange.num_sent - exchange.sent_sizes[exchange.rank]
            count_sent(label, collectives=1, rows=away, nbytes=away * self.layout.nbytes)

    def wait(self) -> list[torch.Tensor]:
        """The received tensors."""
        if self._received is None:
            begin = time.perf_counter()
            if self._work is not None:
                self._work.wait()
            self._received = self.layout.unpack(self._buffers[1])
            self._work = self._buffers = None
            count_sent(self.label, seconds=time.perf_counter() - begin)
        return self._received

    def release(self) -> None:
        """Drop the tensors, which autograd would otherwise keep with the graph."""
        self._received = None


class _Launch(torch.autograd.Function):
    """The first half of an exchange in autograd's graph: its backward pass receives the gradients."""

    @staticmethod
    def forward(ctx, transfer, which, *tensors):
        ctx.transfer = transfer
        ghosts = transfer.layout.ghosts(tensors[0], transfer.exchange.num_received, which)
        return tuple(ghosts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *ghosts):
        transfer = ctx.transfer.gradients
        gradients = transfer.wait()
        transfer.release()
        return None, None, *gradients


class _Finish(torch.autograd.Function):
    """The second half of an exchange in autograd's graph: its backward pass sends the gradients."""

    @staticmethod
    def forward(ctx, transfer, which, *ghosts):
        ctx.transfer = transfer
        received = transfer.wait()
        return tuple(received[i] for i in which)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        there = ctx.transfer
        back = _Transfer(there.exchange.reversed, gradients, there.label + " gradient")
        there.gradients = back
        ghosts = back.layout.ghosts(gradients[0], there.exchange.num_received, range(len(gradients)))
        return None, None, *ghosts


class Pending:
    """Rows in transit, returned by :meth:`RowExchange.start`; computations before :meth:`wait` overlap with the
    transfer.

    In a backward pass the gradients travel while autograd computes the gradients of those computations.
    """

    def __init__(self, transfer: _Transfer, which: list[int], ghosts: tuple[torch.Tensor, ...]) -> None:
        self._transfer, self._which, self._ghosts = transfer, which, ghosts

    def wait(self) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The rows received, ordered by the rank they come from and as sent within it; call it once."""
        received = list(self._transfer.wait())
        if self._which:
            differentiable = _Finish.apply(self._transfer, self._which, *self._ghosts)
            for index, tensor in zip(self._which, differentiable, strict=True):
                received[index] = tensor
        self._transfer.release()
        return received[0] if len(received) == 1 else tuple(received)


def _differentiable(tensor: torch.Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


@dataclass(frozen=True)
class RowExchange:
    """The numbers of rows that ranks send to each other: an all-to-all that sends tensors, and sends them back.

    Created by :meth:`of`, which tells the other ranks the numbers of rows, or by :meth:`static`, if all ranks know
    them. Then ``exchange.send(x)`` sends rows to their ranks, and ``exchange.reversed.send(y)`` sends rows back.
    Several tensors travel as one message; floating tensors are differentiable. The order of rows is fixed, so results
    are deterministic.

    >>> exchange = RowExchange.of(sizes, group, ids)      # sizes[r] rows for rank r, in this order
    >>> rows = table(exchange.send(ids))
    >>> mine = exchange.reversed.send(rows)               # mine[i] is the row for ids[i]

    Every rank of the group must make the same calls in the same order, backward passes included. If a rank ends, the
    others' calls raise torch's error: immediately with gloo, else within the group's timeout.

    Attributes:
        sent_sizes: rows for each rank.
        received_sizes: rows from each rank.
        group: the process group.
        rank: of this process in the group.
        received_notes: the note that each rank gave to :meth:`of` for this one.
    """

    sent_sizes: tuple[int, ...]
    received_sizes: tuple[int, ...]
    group: dist.ProcessGroup
    rank: int
    received_notes: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        sent_sizes: Sequence[int] | torch.Tensor,
        group: dist.ProcessGroup | None,
        *rows: torch.Tensor,
        label: str = "rows",
        error: Exception | None = None,
        note: torch.Tensor | None = None,
    ) -> RowExchange:
        """Tell each rank how many rows it will get, with one collective of three integers per rank.

        The same collective compares the tensors that ranks will send first, and reports bad input on any rank: then
        every rank raises, so that none waits for a rank that left.

        Args:
            sent_sizes: rows for each rank, ints or a ``(P,)`` integer tensor.
            group: over P ranks; None for all.
            *rows: the tensors to be sent first. Their dtypes, sizes of a row and need of gradients must be those of the
                other ranks', and each must have as many rows as ``sent_sizes`` adds up to.
            label: of what is counted by :func:`count_traffic`.
            error: an error found on this rank; raised on every rank.
            note: ``(P,)`` int64, an additional integer for each rank, which it gets in ``received_notes``. Either all
                ranks give a note or none does.

        Raises:
            TypeError: something is not an integer or a tensor.
            ValueError: ``sent_sizes`` has not P sizes of at least 0, or the rows do not fit it or other ranks' rows.
            Exception: of the type of ``error``, if a rank gives one. All errors are raised on every rank.
        """
        group = check_group(group)
        world = dist.get_world_size(group)
        device = rows[0].device if rows and isinstance(rows[0], torch.Tensor) else torch.device("cpu")
        if isinstance(sent_sizes, torch.Tensor):
            device = sent_sizes.device
        sizes: torch.Tensor | None = None
        if error is None:
            try:
                sizes = _checked_sizes(sent_sizes, world, device, rows)
            except (TypeError, ValueError) as found:
                error = found
        description = "" if error is not None else _describe(rows)
        # 0 signals an error; descriptions have other numbers.
        token = 0 if error is not None else zlib.crc32(description.encode()) + 1
        told = torch.full((world, 3), token, dtype=torch.int64, device=device)
        told[:, 1] = 0 if sizes is None else sizes
        told[:, 2] = 0 if note is None else note
        heard = torch.empty_like(told)
        begin = time.perf_counter()
        dist.all_to_all_single(heard, told, group=group)
        both = torch.stack([told, heard]).tolist()
        waited = time.perf_counter() - begin
        count_sent(label + " sizes", collectives=1, rows=world - 1, nbytes=(world - 1) * 24, seconds=waited)
        if any(other != token for other, *_ in both[1]) or token == 0:
            descriptions = raise_together(error, group, description=description)
            listed = ", ".join(f"rank {rank}: {text}" for rank, text in enumerate(descriptions))
            raise ValueError(f"rows must have one dtype, row size and need of gradients on all ranks, got {listed}")
        sent, received = (tuple(size for _, size, _ in side) for side in both)
        notes = tuple(noted for *_, noted in both[1])
        return cls(sent, received, group, dist.get_rank(group), notes)

    @classmethod
    def static(cls, rows_per_rank: int, group: dist.ProcessGroup | None, *, to_self: bool = True) -> RowExchange:
        """The same number of rows from every rank to every rank: no sizes are exchanged, and nothing is read on the
        host.

        Args:
            rows_per_rank: the same on every rank.
            group: over P ranks; None for all.
            to_self: whether a rank also sends this many rows to itself.

        Raises:
            TypeError: ``rows_per_rank`` is not an int.
            ValueError: it is negative.
        """
        group = check_group(group)
        check_sizes(rows_per_rank=rows_per_rank)
        rank, sizes = dist.get_rank(group), [rows_per_rank] * dist.get_world_size(group)
        if not to_self:
            sizes[rank] = 0
        return cls(tuple(sizes), tuple(sizes), group, rank)

    @property
    def num_sent(self) -> int:
        """Rows that this rank sends, to itself too."""
        return sum(self.sent_sizes)

    @property
    def num_received(self) -> int:
        """Rows that this rank gets, from itself too."""
        return sum(self.received_sizes)

    @property
    def reversed(self) -> RowExchange:
        """The exchange that brings rows back."""
        return RowExchange(self.received_sizes, self.sent_sizes, self.group, self.rank)

    def start(self, *tensors: torch.Tensor, label: str = "rows") -> Pending:
        """Start sending the rows of ``tensors (num_sent, ...)``, as one message for all of them.

        Args:
            *tensors: of any dtypes and sizes of a row, the same on every rank. Rows for rank 0 come first.
            label: of what is counted by :func:`count_traffic`.

        Raises:
            RuntimeError: the collective fails, as when a rank has ended.
            TypeError: something is not a strided tensor.
            ValueError: no tensor is given, numbers of rows do not fit, or devices differ.
        """
        if not tensors:
            raise ValueError("tensors must be at least one, got none")
        for tensor in tensors:
            check_tensor("tensors", tensor)
            check_strided("tensors", tensor)
            if tensor.dim() < 1 or tensor.shape[0] != self.num_sent:
                raise ValueError(f"tensors must have {self.num_sent} rows, got shape {tuple(tensor.shape)}")
            if tensor.device != tensors[0].device:
                raise ValueError(f"tensors must be on one device, got {tensors[0].device} and {tensor.device}")
        transfer = _Transfer(self, tensors, label)
        which = [index for index, tensor in enumerate(tensors) if _differentiable(tensor)]
        ghosts = _Launch.apply(transfer, which, *(tensors[index] for index in which)) if which else ()
        return Pending(transfer, which, ghosts)

    def send(self, *tensors: torch.Tensor, label: str = "rows") -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Send the rows of ``tensors`` and return those received; see :meth:`start`.

        Returns:
            Tensors ``(num_received, ...)``, rows of rank 0 first; a single tensor for a single argument.
        """
        return self.start(*tensors, label=label).wait()


def _checked_sizes(
    sizes: Sequence[int] | torch.Tensor, world: int, device: torch.device, rows: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The sizes ``(P,)`` int64 on ``device``, checked except for values that are on a device."""
    for tensor in rows:
        check_tensor("rows", tensor)
        check_strided("rows", tensor)
        if tensor.dim() < 1 or tensor.device != device:
            raise ValueError(f"rows must have rows on {device}, got shape {tuple(tensor.shape)} on {tensor.device}")
    if isinstance(sizes, torch.Tensor):
        if sizes.is_floating_point() or sizes.is_complex() or sizes.dtype == torch.bool:
            raise TypeError(f"sent_sizes must hold integers, got {sizes.dtype}")
        if tuple(sizes.shape) != (world,):
            raise ValueError(f"sent_sizes must have P = {world} sizes, got shape {tuple(sizes.shape)}")
        values = sizes.tolist() if device.type == "cpu" else None
    else:
        values = list(sizes)
        check_sizes(**{f"sent_sizes[{rank}]": size for rank, size in enumerate(values)})
        if len(values) != world:
            raise ValueError(f"sent_sizes must have P = {world} sizes, got {len(values)}")
        sizes = torch.tensor(values, dtype=torch.int64, device=device)
    if values is not None:
        if min(values) < 0:
            raise ValueError(f"sent_sizes must be at least 0, got {values}")
        for tensor in rows:
            if tensor.shape[0] != sum(values):
                raise ValueError(
                    f"rows must be as many as sent_sizes add up to, {sum(values)}, got shape {tuple(tensor.shape)}"
                )
    return sizes.long()


def _describe(rows: Sequence[torch.Tensor]) -> str:
    parts = []
    for tensor in rows:
        kind = str(tensor.dtype).removeprefix("torch.")
        parts.append(f"{kind}{list(tensor.shape[1:])}" + (" with gradient" if _differentiable(tensor) else ""))
    return " and ".join(parts) or "nothing"
