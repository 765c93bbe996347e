"""Ids to rows by arithmetic: hashes, digits and remainders, for compressed tables and hash routers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

from gossamer import _backend
from gossamer._checks import check_flag, check_index, check_positive, check_seed, check_sequence
from gossamer.ops._records import define

#: The prime of universal hashes over 64-bit ids.
MERSENNE_61 = 2**61 - 1
_NARROW = 2**31


@dataclass(frozen=True)
class IdMaps:
    """H maps of ids to rows: ``h(x) = base + ((a·x + b) mod p) div q mod m``, all in exact integers.

    An id is a number of 64 bits: a negative one stands for itself plus 2⁶⁴. Without a prime the inner part is x itself.
    Multiples of consecutive ids can fall into few remainders. With ``mixed``, x is replaced by ``mix(x)``, a bijection
    of 64-bit numbers that removes such regularity (Mix13 of D. Stafford, the final step of SplitMix64). The fields are
    tuples of H numbers, converted from any sequences; :meth:`of` takes only the arguments that differ from the
    defaults.

    Attributes:
        moduli: m, at least 1.
        divisors: q, at least 1.
        bases: added last, at least 0: the first row of the part of a table from which a map chooses.
        multipliers: a, in ``[1, p)``; all 1 without a prime.
        addends: b, in ``[0, p)``; all 0 without a prime.
        prime: p, below 2³¹ or 2⁶¹−1; 0 for none.
        limit: ids outside ``[0, limit)`` are errors; 0 for no limit.
        mixed: whether ids are mixed first; not with a limit.

    Raises:
        TypeError: a number is not an int.
        ValueError: a number is out of its range, lists differ in length, or a divisor is given without a limit or a
            prime, which would need a division of unsigned 64-bit numbers.
    """

    moduli: list[int]
    divisors: list[int]
    bases: list[int]
    multipliers: list[int]
    addends: list[int]
    prime: int
    limit: int
    mixed: bool = False

    def __post_init__(self) -> None:
        prime, limit = self.prime, self.limit
        if any(not isinstance(number, int) or isinstance(number, bool) for number in (prime, limit)):
            raise TypeError(f"prime and limit must be ints, got {prime!r} and {limit!r}")
        check_flag("mixed", self.mixed)
        if prime not in (0, MERSENNE_61) and not 2 <= prime < _NARROW:
            raise ValueError(f"prime must be 0, below 2**31 or 2**61 - 1, got {prime}")
        if not 0 <= limit < 2**63:
            raise ValueError(f"limit must be in [0, 2**63), got {limit}")
        ranges = {"moduli": (1, 2**62), "divisors": (1, 2**62), "bases": (0, 2**62)}
        ranges |= {"multipliers": (1, prime or 2), "addends": (0, prime or 1)}
        for name, (low, high) in ranges.items():
            values = getattr(self, name)
            check_sequence(name, values)
            if len(values) != len(self.moduli):
                count = len(self.moduli)
                raise ValueError(f"{name} must have one number for each of the {count} moduli, got {len(values)}")
            for value in values:
                if not isinstance(value, int) or isinstance(value, bool):
                    raise TypeError(f"{name} must be ints, got {value!r}")
                if not low <= value < high:
                    raise ValueError(f"{name} must be in [{low}, {high}), got {value}")
            object.__setattr__(self, name, tuple(values))  # a copy, which the caller cannot change after the check
        check_positive(**{"the number of maps": len(self.moduli)})
        if self.mixed and limit:
            raise ValueError(f"limit must be 0 where ids are mixed, got {limit}")
        if not prime and not limit and max(self.divisors) > 1:
            raise ValueError(f"divisors must be 1 without a limit or a prime, got {list(self.divisors)}")

    @classmethod
    def of(
        cls,
        moduli: Sequence[int],
        *,
        divisors: Sequence[int] | None = None,
        bases: Sequence[int] | None = None,
        multipliers: Sequence[int] | None = None,
        addends: Sequence[int] | None = None,
        prime: int = 0,
        limit: int = 0,
        mixed: bool = False,
    ) -> IdMaps:
        """Maps with these arguments, as described for the class, and defaults for the others."""
        check_sequence("moduli", moduli)
        defaults = ((divisors, 1), (bases, 0), (multipliers, 1), (addends, 0))
        lists = ([default] * len(moduli) if given is None else given for given, default in defaults)
        return cls(moduli, *lists, prime, limit, mixed)

    @classmethod
    def universal(cls, moduli: Sequence[int], *, seed: int, bases: Sequence[int] | None = None) -> IdMaps:
        """Hashes ``(a·mix(x) + b) mod p mod m`` with p = 2⁶¹−1 and a and b drawn from a seed.

        Over random seeds, two ids collide in a map with a probability of about 1/m, except for the few pairs of 64-bit
        numbers whose mixed values differ by a multiple of p.

        Raises:
            ValueError: as :meth:`of`.
        """
        check_sequence("moduli", moduli)
        check_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        multipliers, addends = (
            torch.randint(low, MERSENNE_61, (len(moduli),), generator=generator, device="cpu").tolist()
            for low in (1, 0)
        )
        return cls.of(moduli, bases=bases, multipliers=multipliers, addends=addends, prime=MERSENNE_61, mixed=True)

    def numbers(self) -> list[tuple[int, int, int, int, int]]:
        """Modulus, divisor, base, multiplier and addend of each map."""
        return list(zip(self.moduli, self.divisors, self.bases, self.multipliers, self.addends, strict=True))

    @property
    def count(self) -> int:
        """H."""
        return len(self.moduli)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows: int32 if all rows fit."""
        largest = max(base + modulus for base, modulus in zip(self.bases, self.moduli, strict=True))
        return torch.int32 if largest <= _NARROW else torch.int64


class MapIds(NamedTuple):
    """Arguments of ids to rows.

    Attributes:
        ids: int32 or int64, of any shape.
        maps: H of them.
    """

    ids: torch.Tensor
    maps: IdMaps


def _unsigned_mod(x: torch.Tensor, modulus: int) -> torch.Tensor:
    """Int64 numbers, read as unsigned, modulo a number below 2⁶²."""
    rest = x.remainder(modulus)
    return torch.where(x < 0, (rest + 2**64 % modulus) % modulus, rest)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Mix13 of int64 numbers, read as unsigned; products wrap."""

    def down(x: torch.Tensor, bits: int) -> torch.Tensor:
        return x ^ ((x >> bits) & (2 ** (64 - bits) - 1))

    x = down(x, 30) * (0xBF58476D1CE4E5B9 - 2**64)
    x = down(x, 27) * (0x94D049BB133111EB - 2**64)
    return down(x, 31)


def _fold(x: torch.Tensor) -> torch.Tensor:
    """Reduce a number below 2⁶³ to one that is equal modulo 2⁶¹−1 and exceeds it by at most 3."""
    return (x & MERSENNE_61) + (x >> 61)


def _mersenne_affine(x: torch.Tensor, multiplier: int, addend: int) -> torch.Tensor:
    """``(a·x + b) mod (2⁶¹−1)`` for ``x`` below 2⁶¹−1, by products of 31-bit halves.

    Modulo 2⁶¹−1, 2⁶² equals 2. The middle product, which has the factor 2³¹, is split at bit 30; its upper part has the
    factor 2⁶¹, which equals 1.
    """
    low_bits = _NARROW - 1
    x1, x0 = x >> 31, x & low_bits
    a1, a0 = multiplier >> 31, multiplier & low_bits
    middle = x1 * a0 + x0 * a1
    total = _fold(x0 * a0) + 2 * (x1 * a1) % MERSENNE_61 + (middle >> 30)
    total = _fold(total) + ((middle & (2**30 - 1)) << 31)
    total = _fold(_fold(total) + addend)
    return torch.where(total >= MERSENNE_61, total - MERSENNE_61, total)


def map_ids_reference(args: MapIds) -> torch.Tensor:
    """:func:`map_ids` in plain torch."""
    maps, ids = args.maps, args.ids.long()
    x = _mix(ids) if maps.mixed else ids
    x = _unsigned_mod(x, maps.prime) if maps.prime else x
    rows = []
    for m, q, base, a, b in maps.numbers():
        if maps.prime == MERSENNE_61:
            value = _mersenne_affine(x, a, b)
        else:
            value = (x * a + b) % maps.prime if maps.prime else x
        rows.append((_unsigned_mod(value, m) if q == 1 else value.div(q, rounding_mode="floor") % m) + base)
    found = torch.stack(rows, -1)
    if maps.limit:
        found = found.masked_fill(((ids < 0) | (ids >= maps.limit)).unsqueeze(-1), -1)
    return found.to(maps.dtype)


@functools.cache
def _kernels(backend: str) -> ModuleType:
    if backend == "native":
        from gossamer.cpu_kernels import map_ids
    else:
        from gossamer.triton_kernels import map_ids
    return map_ids


def _forward(args: MapIds, backend: str) -> torch.Tensor:
    if backend == "reference":
        return map_ids_reference(args)
    return _kernels(backend).map_ids(args)


def _fake(args: MapIds) -> torch.Tensor:
    return args.ids.new_empty((*args.ids.shape, args.maps.count), dtype=args.maps.dtype)


_map_ids = define("map_ids", MapIds, kernel=_forward, fake=_fake, returns="Tensor")


def map_ids(ids: torch.Tensor, maps: IdMaps) -> torch.Tensor:
    """The rows that H maps give each id: ``h_j(x) = base_j + ((a_j·x + b_j) mod p) div q_j mod m_j``.

    Remainders and quotients are the digits of an id in mixed radix; with a prime they are universal hashes. If
    ``maps.mixed`` is set, ids are mixed first.

    Args:
        ids: int32 or int64, of any shape.
        maps: :class:`IdMaps`.

    Returns:
        ``(*ids.shape, H)``, int32 if all rows fit, else int64.

    Raises:
        TypeError: ``ids`` is not int32 or int64, or ``maps`` no IdMaps.
        IndexError: on the CPU, an id outside ``[0, limit)``; on CUDA its rows are −1, which is not a row of any table.
    """
    check_index("ids", ids)
    if not isinstance(maps, IdMaps):
        raise TypeError(f"maps must be gossamer.IdMaps, got {type(maps).__name__}")
    backend = _backend.resolve("map_ids", ids)
    found = _map_ids(MapIds(ids, maps), backend)
    if maps.limit and backend == "reference" and ids.device.type == "cpu" and not torch.compiler.is_compiling():
        raise_outside(ids, maps.limit)
    return found


def raise_outside(ids: torch.Tensor, limit: int) -> None:
    """Every id must be in ``[0, limit)``.

    Raises:
        IndexError: an id is outside; the message gives the id and its position.
    """
    ids = ids.long()  # a limit beyond int32 would wrap
    outside = ((ids < 0) | (ids >= limit)).reshape(-1)
    if outside.any():
        place = int(outside.nonzero()[0])
        raise IndexError(f"ids must be in [0, N) with N={limit}, got {int(ids.reshape(-1)[place])} at position {place}")


def radix_maps(moduli: Sequence[int], *, limit: int) -> IdMaps:
    """Digits of ids in mixed radix, the lowest first: ``x div ∏_{i<j} m_i mod m_j``, in parts of one table."""
    divisors = [1, *itertools.accumulate(moduli, int.__mul__)][:-1]
    return IdMaps.of(moduli, divisors=divisors, bases=[0, *itertools.accumulate(moduli)][:-1], limit=limit)
