"""The rows that compose the vector of an id: how they are found and combined, and the checks of both."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gossamer._checks import check_flag, check_positive, check_sequence, check_shape, check_sizes, check_tensor
from gossamer.ops._bags import Bags, check_offsets, check_weights_values, raises
from gossamer.ops._gather_reduce_reference import count_by_bag
from gossamer.ops.map_ids import IdMaps, MapIds, map_ids_reference, raise_outside

OPERATIONS = ("add", "mul", "concat")
# Codes with more bits than this are stored as int32.
PACKED_BITS = 16


def unpack_codes(packed: torch.Tensor, parts: int, bits: int) -> torch.Tensor:
    """Codes ``(N, P)`` int32 of at most 16 bits, from bytes ``(N, ceil(P·bits/8))`` that hold them lowest bit first."""
    if bits == 8:
        return packed.int()
    # A code of up to 16 bits lies in three bytes.
    width = packed.shape[1]
    wide = torch.nn.functional.pad(packed, (0, 2)).int()
    first = torch.arange(parts, device=packed.device) * bits
    byte, shift = first // 8, (first % 8).int()
    window = wide[:, byte] | wide[:, (byte + 1).clamp(max=width)] << 8 | wide[:, (byte + 2).clamp(max=width)] << 16
    return (window >> shift) & (2**bits - 1)


class Parts(NamedTuple):
    """The rows of a table ``(M, C)`` that compose an id's vector, and the operation.

    Attributes:
        dim: D of the vector.
        operation: how H rows are combined: ``"add"`` or ``"mul"`` of rows of D columns, or ``"concat"``.
        maps: one per part, giving the row of an id. For a coded part, ``bases`` is its first row and ``moduli`` its
            number of rows.
        coded: number of leading parts whose row is a code stored for each id, added to the part's first row.
        codes: ``(F, ...)``, codes of the first F ids: bytes that hold ``coded`` codes each, packed lowest bit first, or
            int32 ``(F, coded)``; None where no part is coded.
        rare: the same for the ids that follow, or None.
        bits: bits per code in ``codes`` and in ``rare``; 32 for int32.
        block: 0, or Z if parts are blocks of Z consecutive elements of an array ``(M, 1)``, at the positions that the
            maps give; blocks are concatenated and cut off at D.
        wrap: whether blocks continue at the start of the array. Maps then give positions below their prime p, and
            element i of a block is at ``(position + i) mod p mod M``.
    """

    dim: int
    operation: str
    maps: IdMaps
    coded: int
    codes: torch.Tensor | None
    rare: torch.Tensor | None
    bits: list[int]
    block: int
    wrap: bool

    @classmethod
    def of(cls, dim: int, operation: str, maps: IdMaps, **more: object) -> Parts:
        """Parts with defaults for the arguments that are not given."""
        rest = {"coded": 0, "codes": None, "rare": None, "bits": [], "block": 0, "wrap": False}
        return cls(dim, operation, maps, **rest | more)

    @property
    def num_ids(self) -> int:
        """Ids below this number are valid; 0 if all are."""
        if self.codes is None:
            return self.maps.limit
        return self.codes.shape[0] + (0 if self.rare is None else self.rare.shape[0])

    @property
    def places(self) -> int:
        """Number of rows that an id reads: H, or D elements of an array."""
        return self.dim if self.block else self.maps.count

    @property
    def whole_blocks(self) -> bool:
        """Whether all parts are blocks of one size that never wrap around the end of the array."""
        return self.block > 0 and not self.wrap and (self.maps.count == 1 or self.dim % self.block == 0)

    @property
    def listed(self) -> int:
        """Entries per id in the gradient's lists: H rows or first elements of whole blocks, else D single elements."""
        return self.maps.count if self.whole_blocks else self.places


def live_positions(bags: Bags, parts: Parts) -> torch.Tensor:
    """Which flat positions lie in a bag and contribute to it."""
    flat, limit = bags.index.reshape(-1), parts.num_ids
    live = (flat >= 0) & (flat < limit) if limit else torch.ones_like(flat, dtype=torch.bool)
    if bags.padding_idx >= 0:
        live &= flat != bags.padding_idx
    return live & (bags.numbers() < bags.num_lists) if bags.offsets is not None else live


def _codes_at(parts: Parts, ids: torch.Tensor) -> torch.Tensor:
    """The codes ``(L, coded)`` of known ids."""
    found = []
    first, frequent = 0, parts.codes.shape[0]
    for stored, bits in zip((parts.codes, parts.rare), parts.bits, strict=False):
        if stored is None or not stored.shape[0]:
            continue
        inside = (ids - first).clamp(0, stored.shape[0] - 1)
        rows = stored.index_select(0, inside)
        found.append(unpack_codes(rows, parts.coded, bits) if bits <= PACKED_BITS else rows[:, : parts.coded])
        first = frequent
    if len(found) == 2:
        return torch.where((ids < frequent).unsqueeze(1), found[0], found[1])
    # A table without stored codes has no valid id, so ``ids`` is empty here.
    return found[0] if found else ids.new_empty(len(ids), parts.coded)


def rows_or_blocks(flat: torch.Tensor, parts: Parts) -> torch.Tensor:
    """The rows ``(L, H)`` of known ids ``(L,)`` in plain torch, or the places of their blocks."""
    maps = parts.maps
    rows = map_ids_reference(MapIds(flat, maps)).long() if parts.coded < maps.count else None
    if not parts.coded:
        return rows
    first = torch.tensor(maps.bases[: parts.coded], device=flat.device)
    coded = _codes_at(parts, flat).long() + first
    return coded if rows is None else torch.cat([coded, rows[:, parts.coded :]], 1)


def part_rows(ids: torch.Tensor, parts: Parts, num_rows: int) -> torch.Tensor:
    """The rows ``(*ids.shape, H)`` of known ids in plain torch, or the elements ``(*ids.shape, D)`` of their blocks."""
    rows, maps = rows_or_blocks(ids.reshape(-1).long(), parts), parts.maps
    if parts.block:
        within = torch.arange(parts.dim, device=ids.device) % parts.block
        rows = rows.repeat_interleave(parts.block, 1)[:, : parts.dim] + within
        rows = rows % maps.prime % num_rows if parts.wrap else rows
    return rows.view(*ids.shape, parts.places)


def composed_rows(ids: torch.Tensor, parts: Parts, num_rows: int) -> torch.Tensor:
    """:func:`part_rows` of any ids.

    Raises:
        IndexError: on the CPU, an id that is not valid for the parts.
    """
    if parts.num_ids and ids.is_cpu and not torch.compiler.is_compiling():
        raise_outside(ids, parts.num_ids)
    return part_rows(ids, parts, num_rows)


def combine_rows(rows: torch.Tensor, parts: Parts) -> torch.Tensor:
    """Combine the H rows of each id, ``(L, H, C)``, into its vector, ``(L, D)``."""
    if parts.operation == "add":
        return rows.sum(1)
    return rows.prod(1) if parts.operation == "mul" else rows.flatten(1)


def counts_of(bags: Bags, live: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The number of contributing ids in each bag, at least 1."""
    numbers = torch.where(live, bags.numbers(), bags.num_bags)
    return count_by_bag(numbers, bags.num_bags + 1, dtype)[:-1]


def check_values(bags: Bags, parts: Parts) -> None:
    """Check ids, offsets and weights, as the native kernels do themselves; for the reference on the CPU."""
    if torch.compiler.is_compiling() or not raises(bags.index, "reference"):
        return
    if bags.offsets is not None and bags.num_lists:
        check_offsets(bags.index, bags.offsets)
    inside = bags.numbers() < bags.num_lists
    if parts.num_ids:
        raise_outside(torch.where(inside, bags.index.reshape(-1), 0), parts.num_ids)
    if bags.weights is not None:
        check_weights_values(bags.weights, inside)


def check_parts(parts: object, ids: torch.Tensor, num_rows: int) -> None:
    """Check that kernels stay inside the codes and, for rows given by maps, inside the table.

    Raises:
        TypeError: ``parts`` is not a :class:`Parts`, or codes have another dtype.
        ValueError: codes are missing, have too few bytes for their bits, or are empty; blocks that wrap have maps that
            exceed their prime.
    """
    if not isinstance(parts, Parts) or not isinstance(parts.maps, IdMaps):
        raise TypeError(f"parts must be gossamer.Parts with maps, got {type(parts).__name__}")
    # Compared inline before any call, because every lookup runs this check.
    if not type(parts.coded) is type(parts.dim) is type(parts.block) is int or type(parts.wrap) is not bool:
        check_sizes(**{f"parts.{name}": getattr(parts, name) for name in ("coded", "dim", "block")})
        check_flag("parts.wrap", parts.wrap)
    if type(parts.bits) is not list:
        check_sequence("parts.bits", parts.bits)
    if not 0 <= parts.coded <= parts.maps.count:
        raise ValueError(f"parts.coded must be in [0, {parts.maps.count}], the number of maps, got {parts.coded}")
    if parts.coded and (parts.codes is None or parts.block):
        raise ValueError("parts.codes must be given for coded parts, and parts.block must be 0")
    for name, stored, bits in zip(("codes", "rare"), (parts.codes, parts.rare), [*parts.bits, 0, 0], strict=False):
        if stored is None:
            continue
        check_positive(**{"parts.bits": bits})
        check_tensor(f"parts.{name}", stored)
        check_shape(f"parts.{name}", stored, (None, None), "two dimensions")
        wanted = torch.int32 if bits == 32 else torch.uint8
        if not (1 <= bits <= PACKED_BITS or bits == 32) or stored.dtype != wanted:
            raise TypeError(
                f"parts.{name} must be uint8 with 1 to {PACKED_BITS} bits a code or int32 with 32, got {stored.dtype} "
                f"with {bits}"
            )
        if stored.shape[1] * stored.element_size() * 8 < parts.coded * bits:
            raise ValueError(f"parts.{name} must hold {parts.coded} codes of {bits} bits, got {tuple(stored.shape)}")
    if parts.coded and ids.numel() and not parts.num_ids:
        raise ValueError("parts.codes must have codes of at least one id")
    if parts.wrap:
        places = max(base + modulus for base, modulus in zip(parts.maps.bases, parts.maps.moduli, strict=True))
        if not parts.block or places > parts.maps.prime or not num_rows:
            raise ValueError(
                f"parts that wrap must be blocks placed below their prime, {parts.maps.prime}, got {places}"
            )
