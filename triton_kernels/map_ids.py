"""Ids to rows by integer arithmetic: remainders, digits and universal hashes.

A program maps BLOCK ids by one of the H maps. All numbers are unsigned with 64 bits.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from gossamer.ops.map_ids import IdMaps, MapIds

BLOCK, WARPS = 512, 4
# The arithmetic applied to an id: none, modulo a prime below 2³¹, or modulo 2⁶¹−1.
NO_PRIME, NARROW, MERSENNE = (tl.constexpr(kind) for kind in range(3))


@triton.jit
def _mix(x):
    """Mix13, a bijection of 64-bit numbers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _fold(x):
    """Reduce a number below 2⁶³ to one that is equal modulo 2⁶¹−1 and at most 3 above that modulus."""
    return (x & 0x1FFFFFFFFFFFFFFF) + (x >> 61)


@triton.jit
def map_row(ids, numbers_ptr, prime, KIND: tl.constexpr, MIXED: tl.constexpr):
    """The rows of int64 ids by the map whose five numbers are at the pointer."""
    modulus = tl.load(numbers_ptr).to(tl.uint64)
    divisor = tl.load(numbers_ptr + 1).to(tl.uint64)
    base = tl.load(numbers_ptr + 2)
    x = ids.to(tl.uint64)
    if MIXED:
        x = _mix(x)
    if KIND != NO_PRIME:
        multiplier = tl.load(numbers_ptr + 3).to(tl.uint64)
        addend = tl.load(numbers_ptr + 4).to(tl.uint64)
        if KIND == NARROW:
            p = tl.full((1,), prime, tl.int64).to(tl.uint64)
            x = ((x % p) * multiplier + addend) % p
        else:
            x = _fold(_fold(x))
            # The upper half of a product counts multiples of 2⁶⁴, which is 8 modulo 2⁶¹−1.
            low, high = x * multiplier, tl.umulhi(x, multiplier)
            x = _fold((low & 0x1FFFFFFFFFFFFFFF) + (low >> 61) + high * 8)
            x = _fold(_fold(x + addend))
            x = tl.where(x >= 0x1FFFFFFFFFFFFFFF, x - 0x1FFFFFFFFFFFFFFF, x)
    return (x // divisor % modulus).to(tl.int64) + base


@triton.jit
def _map_ids_kernel(
    ids_ptr,
    maps_ptr,
    out_ptr,
    count,
    num_maps,
    prime,
    limit,
    KIND: tl.constexpr,
    MIXED: tl.constexpr,
    LIMITED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    ids = tl.load(ids_ptr + at, inside, other=0).to(tl.int64)
    j = tl.program_id(1)
    row = map_row(ids, maps_ptr + j * 5, prime, KIND, MIXED)
    if LIMITED:
        row = tl.where((ids >= 0) & (ids < limit), row, -1)
    tl.store(out_ptr + at * num_maps + j, row.to(out_ptr.dtype.element_ty), inside)


@functools.lru_cache(maxsize=256)
def map_numbers(maps: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """The maps as ``(H, 5)`` int64 on the device; cached, because every copy to a GPU waits for it."""
    return torch.tensor(maps, device="cpu").to(device)


def map_kind(maps: IdMaps) -> int:
    """The number of the arithmetic that the maps need."""
    if not maps.prime:
        return NO_PRIME.value
    return (NARROW if maps.prime < 2**31 else MERSENNE).value


def map_ids(args: MapIds) -> torch.Tensor:
    """The rows ``(*ids.shape, H)``; −1 for ids outside the limit."""
    ids, maps = args.ids.contiguous(), args.maps
    out = torch.empty((*ids.shape, maps.count), dtype=maps.dtype, device=ids.device)
    if out.numel() == 0:
        return out
    _map_ids_kernel[(triton.cdiv(ids.numel(), BLOCK), maps.count)](
        ids,
        map_numbers(tuple(maps.numbers()), ids.device),
        out,
        ids.numel(),
        maps.count,
        maps.prime,
        maps.limit,
        KIND=map_kind(maps),
        MIXED=maps.mixed,
        LIMITED=maps.limit > 0,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return out


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    signature = {"ids_ptr": "*i64:16", "maps_ptr": "*i64:16", "out_ptr": "*i32:16"}
    signature |= {"count": "i32", "num_maps": "i32", "prime": "i64", "limit": "i64"}
    variants = ((0, False, True), (1, False, False), (2, True, False))
    return [
        (
            _map_ids_kernel,
            signature,
            {"KIND": kind, "MIXED": mixed, "LIMITED": limited, "BLOCK": BLOCK},
            {"num_warps": WARPS},
        )
        for kind, mixed, limited in variants
    ]
