"""Ways to compose vectors from rows of a table, for tests of lookups of such vectors and of their steps."""

import torch

import gossamer
from gossamer.nn.embeddings.codes import pack_codes
from gossamer.ops.composed_rows import Parts
from gossamer.ops.gather_compose import GatherCompose, checked_compose, gather_compose_reference
from gossamer.ops.map_ids import IdMaps, radix_maps

N = 30
PRIME = 2**31 - 1


def digits(dim, operation, moduli):
    return Parts.of(dim, operation, radix_maps(moduli, limit=N)), (sum(moduli), dim if operation != "concat" else None)


def coded(dim, operation, bits, count, columns, device, rare_bits=0, hashed=False):
    """Codes of N ids; if rare ids have bits of their own, the last ten are rare."""
    generator = torch.Generator().manual_seed(bits)
    frequent = N - 10 if rare_bits else N
    packed = []
    for ids, width in ((frequent, bits), (N - frequent, rare_bits)):
        codes = torch.randint(2 ** min(max(width, 1), 10) - 1, (ids, count), generator=generator).to(device)
        packed.append(codes.int() if width == 32 else pack_codes(codes, width) if width else None)
    size = 2 ** min(bits, 10) - 1
    moduli, bases = [size] * count, [size * part for part in range(count)]
    maps = IdMaps.of(moduli, bases=bases)
    if hashed:
        maps = IdMaps.of([*moduli, 7], bases=[*bases, 0], multipliers=[1] * count + [9], prime=PRIME, mixed=True)
    rows = size * count
    more = {"coded": count, "codes": packed[0], "rare": packed[1], "bits": [bits, rare_bits]}
    return Parts.of(dim, operation, maps, **more), (rows, columns)


def blocks(dim, size, wrap):
    """Blocks of an array of 23 elements that overlap other blocks and, if they wrap, the ends of the array."""
    count = -(-dim // size)
    modulus = PRIME if wrap else 23 - size + 1
    # The second block of ids 0 .. 4 crosses the prime.
    addends = [5, PRIME - 2, 17, 100, 11, 9][:count]
    maps = IdMaps.of([modulus] * count, multipliers=[1 if wrap else 77] * count, addends=addends, prime=PRIME)
    return Parts.of(dim, "concat", maps, block=size, wrap=wrap), (23, 1)


# Whole vectors, parts of vectors and single columns; two, three and many parts; each way to find rows.
CASES = {
    "one row": lambda device: digits(16, "add", [30]),
    "added digits": lambda device: digits(16, "add", [7, 5]),
    "multiplied in registers": lambda device: digits(32, "mul", [7, 5]),
    "multiplied digits": lambda device: digits(37, "mul", [7, 5]),
    "three multiplied": lambda device: digits(8, "mul", [4, 3, 3]),
    "joined digits": lambda device: (digits(10, "concat", [7, 5])[0], (12, 5)),
    "joined halves": lambda device: (digits(16, "concat", [7, 5])[0], (12, 8)),
    "many columns": lambda device: digits(150, "mul", [7, 5]),
    "two hashes of any id": lambda device: (Parts.of(16, "add", IdMaps.universal([11, 11], seed=3)), (11, 16)),
    "bytes": lambda device: coded(16, "concat", 8, 4, 4, device),
    "five bits, three for rare ids": lambda device: coded(14, "concat", 5, 7, 2, device, rare_bits=3),
    "thirteen bits": lambda device: coded(24, "add", 13, 3, 24, device),
    "whole numbers and a hash": lambda device: coded(9, "add", 32, 1, 9, device, hashed=True),
    "blocks": lambda device: blocks(10, 4, False),
    "whole blocks": lambda device: blocks(8, 4, False),
    "one block": lambda device: blocks(16, 16, False),
    "blocks that wrap": lambda device: blocks(11, 2, True),
    "blocks of one": lambda device: blocks(6, 1, True),
}


def functions(ids, parts, offsets=None, *, backend, mode="sum"):
    """The function under test and its reference, closed over the lists, of table and weights."""

    def function(table, weights=None):
        with gossamer.backend(backend):
            return gossamer.gather_compose(table, ids, parts, offsets, weights, mode=mode)

    def reference(table, weights=None):
        bags = checked_compose(table, ids, parts, offsets, weights, mode, True, "reference")
        return gather_compose_reference(GatherCompose(table, bags, parts, table.dtype))

    return function, reference
