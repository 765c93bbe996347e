"""The block lists of an expert layer's hidden activation and the positions of its rows, computed on the device."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import torch

from gossamer import _backend
from gossamer.ops._records import define

# The operator's results in order: fields of a BlockTopology.
FIELDS = (
    "row_offsets",
    "column_indices",
    "row_indices",
    "column_offsets",
    "row_indices_t",
    "column_indices_t",
    "order_t",
    "row_schedule",
    "column_schedule",
    "live_rows",
    "padded_offsets",
)


class ExpertTopology(NamedTuple):
    """Arguments of the topology of an expert layer's hidden activation.

    Attributes:
        offsets: ``(E+1,)`` int32, of a :class:`gossamer.Dispatch`.
        rows: number of block rows, at least as many as the rows of all experts fill.
        wide: number of block columns per expert.
        bm: rows of a block.
    """

    offsets: torch.Tensor
    rows: torch.SymInt
    wide: torch.SymInt
    bm: int

    def new_lists(self) -> tuple[torch.Tensor, ...]:
        """Uninitialised results, in the order of :data:`FIELDS`."""
        experts, rows = self.offsets.shape[0] - 1, self.rows
        columns, blocks = experts * self.wide, rows * self.wide
        sizes = rows + 1, blocks, blocks, columns + 1, blocks, blocks, blocks, rows, columns, rows, experts + 1
        return tuple(map(self.offsets.new_empty, sizes))


class ExpertPlaces(NamedTuple):
    """Arguments of the placement of dispatched rows in a topology.

    Attributes:
        offsets: ``(E+1,)`` int32, of a :class:`gossamer.Dispatch`.
        padded_offsets: ``(E+1,)`` int32, of a topology made from it.
        slots: ``(R,)`` int32, of the dispatch.
        padded_rows: rows of the topology.
    """

    offsets: torch.Tensor
    padded_offsets: torch.Tensor
    slots: torch.Tensor
    padded_rows: torch.SymInt


@functools.cache
def _kernels(backend: str) -> ModuleType:
    if backend == "native":
        from gossamer.cpu_kernels import expert_topology
    else:
        from gossamer.triton_kernels import expert_topology
    return expert_topology


def offsets_of(counts: torch.Tensor) -> torch.Tensor:
    """``(n+1,)`` int32: where each of n lists of ``counts (n,)`` begins, and where the last one ends."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


def longest_first(offsets: torch.Tensor) -> torch.Tensor:
    """The numbers of the lists given by ``offsets``, longest first, equal ones in order; int32."""
    return torch.argsort(offsets.diff(), descending=True, stable=True).int()


def expert_topology_reference(args: ExpertTopology) -> tuple[torch.Tensor, ...]:
    """:func:`expert_topology` in plain torch."""
    offsets, rows, wide, bm = args
    experts, device = offsets.shape[0] - 1, offsets.device
    counts = offsets.diff().long()
    blocks = (counts + bm - 1) // bm
    starts = offsets_of(blocks).long()
    live = starts[-1]
    row = torch.arange(rows, device=device)
    expert = torch.searchsorted(starts[1:], row, right=True)
    columns = torch.where(row < live, expert, experts).unsqueeze(1) * wide + torch.arange(wide, device=device)
    columns = columns.clamp(max=experts * wide).reshape(-1)
    row_indices = torch.where(row < live, row, rows).unsqueeze(1).expand(rows, wide).reshape(-1)
    row_offsets = (torch.arange(rows + 1, device=device).minimum(live) * wide).int()
    owned = expert.clamp(max=experts - 1)
    live_rows = (counts[owned] - (row - starts[owned]) * bm).clamp(0, bm)
    # Column by column: `wide` columns per expert, each with one block per block row of the expert.
    column_starts = starts * wide
    entry = torch.arange(rows * wide, device=device)
    owner = torch.searchsorted(column_starts[1:], entry, right=True)
    inside, known = entry < column_starts[-1], owner.clamp(max=experts - 1)
    local, height = entry - column_starts[known], blocks[known].clamp(min=1)
    column, row_t = local // height, starts[known] + local % height
    offsets_t = (column_starts[:-1].unsqueeze(1) + blocks.unsqueeze(1) * torch.arange(wide, device=device)).view(-1)
    offsets_t = torch.cat([offsets_t, column_starts[-1:]]).int()
    found = [
        row_offsets,
        columns,
        row_indices,
        offsets_t,
        torch.where(inside, row_t, rows),
        torch.where(inside, known * wide + column, experts * wide),
        torch.where(inside, row_t * wide + column, entry),
        longest_first(row_offsets),
        longest_first(offsets_t),
        live_rows,
        starts * bm,
    ]
    return tuple(t.int() for t in found)


def expert_places_reference(args: ExpertPlaces) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`expert_places` in plain torch."""
    offsets, padded_offsets, slots, padded_rows = args
    if slots.device.type == "cpu" and (lacking := offsets.diff() > padded_offsets.diff()).any():
        expert = int(lacking.nonzero()[0])
        rows, room = (int(t[expert + 1] - t[expert]) for t in (offsets, padded_offsets))
        raise ValueError(
            "the topology must be the one that BlockTopology.from_dispatch made from dispatch: expert "
            f"{expert} has {rows} rows and room for {room}"
        )
    num_slots, last = slots.shape[0], offsets.shape[0] - 2
    row = torch.arange(padded_rows, device=slots.device)
    expert = torch.searchsorted(padded_offsets[1:], row, right=True).clamp(max=last)
    sorted_row = row - padded_offsets[expert] + offsets[expert]
    taken = (row < padded_offsets[-1]) & (offsets[expert] <= sorted_row) & (sorted_row < offsets[expert + 1])
    # An extra slot represents padding, so that every index is valid.
    padded_slots = torch.cat([slots, slots.new_full((1,), num_slots)])
    slots_of_rows = padded_slots[torch.where(taken, sorted_row, num_slots)]
    rows_of_slots = slots.new_full((num_slots + 1,), padded_rows)
    rows_of_slots[slots_of_rows.long()] = row.int()
    return slots_of_rows, rows_of_slots[:num_slots]


def _check_int32(**tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {tensor.dtype}")


def _topology_kernel(args: ExpertTopology, backend: str) -> tuple[torch.Tensor, ...]:
    args = args._replace(offsets=args.offsets.contiguous())
    return expert_topology_reference(args) if backend == "reference" else _kernels(backend).expert_topology(args)


_topology = define(
    "expert_topology",
    ExpertTopology,
    kernel=_topology_kernel,
    fake=ExpertTopology.new_lists,
    returns=f"({', '.join(f'Tensor {name}' for name in FIELDS)})",
)


def _places_kernel(args: ExpertPlaces, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    args = ExpertPlaces(*(tensor.contiguous() for tensor in args[:3]), args.padded_rows)
    return expert_places_reference(args) if backend == "reference" else _kernels(backend).expert_places(args)


def _places_fake(args: ExpertPlaces) -> tuple[torch.Tensor, torch.Tensor]:
    return args.slots.new_empty(args.padded_rows), torch.empty_like(args.slots)


_places = define(
    "expert_places",
    ExpertPlaces,
    kernel=_places_kernel,
    fake=_places_fake,
    returns="(Tensor slots_of_rows, Tensor rows_of_slots)",
)


def expert_topology(offsets: torch.Tensor, rows: int, wide: int, bm: int) -> dict[str, torch.Tensor]:
    """The tensors of the topology of an expert layer's hidden activation, by the name of their field.

    Arguments as those of :class:`ExpertTopology`.

    Raises:
        TypeError: ``offsets`` is not int32.
        ValueError: on the CPU, ``offsets`` decrease or need more than ``rows`` block rows.
    """
    _check_int32(offsets=offsets)
    backend = _backend.resolve("expert_topology", offsets)
    return dict(zip(FIELDS, _topology(ExpertTopology(offsets, rows, wide, bm), backend), strict=True))


def expert_places(
    offsets: torch.Tensor, padded_offsets: torch.Tensor, slots: torch.Tensor, padded_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slot in each padded row, and the padded row of each slot.

    Arguments as those of :class:`ExpertPlaces`.

    Returns:
        ``(padded_rows,)`` int32, R for padding; and ``(R,)`` int32, ``padded_rows`` for a dropped slot.

    Raises:
        TypeError: a tensor is not int32.
        ValueError: on the CPU, an expert has more rows than ``padded_offsets`` gives it. On CUDA, where checking would
            stall the stream, the excess rows get no position.
    """
    _check_int32(offsets=offsets, padded_offsets=padded_offsets, slots=slots)
    backend = _backend.resolve("expert_topology", slots)
    return _places(ExpertPlaces(offsets, padded_offsets, slots, padded_rows), backend)
