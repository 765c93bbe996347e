"""Ids to rows, against Python's integers."""

import random

import pytest
import torch

import gossamer
from gossamer.ops.map_ids import MERSENNE_61, IdMaps, MapIds, _map_ids, map_ids, radix_maps


def mix(x):
    """Mix13, by integers of any size."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def exact(ids, maps):
    """The formula in integers of any size."""
    rows = []
    for x in ids:
        x %= 2**64
        outside = maps.limit and x >= maps.limit
        x = mix(x) if maps.mixed else x
        row = []
        for m, q, base, a, b in zip(
            maps.moduli, maps.divisors, maps.bases, maps.multipliers, maps.addends, strict=True
        ):
            value = (a * x + b) % maps.prime if maps.prime else x
            row.append(-1 if outside else base + value // q % m)
        rows.append(row)
    return rows


def some_ids():
    source = random.Random(0)
    edges = [
        0,
        1,
        2**31 - 1,
        2**31,
        2**52,
        MERSENNE_61 - 1,
        MERSENNE_61,
        MERSENNE_61 + 1,
        2**62,
        2**63 - 1,
        -1,
        -(2**63),
    ]
    return (
        edges + [source.randrange(-(2**63), 2**63) for _ in range(100)] + [source.randrange(10**6) for _ in range(50)]
    )


CASES = {
    "remainders": IdMaps.of([1, 7, 1000, 2**31 - 1, 2**61]),
    "remainders of narrow rows": IdMaps.of([17], bases=[5]),
    "universal": IdMaps.universal([1, 7, 1_000_003, 2**40], seed=3, bases=[0, 1, 8, 2**20]),
    "a narrow prime": IdMaps.of([10**6] * 2, multipliers=[1234, 2**30], addends=[777, 5], prime=2_038_074_743),
    "quotients of hashes": IdMaps.of([64, 64], divisors=[1, 64], multipliers=[3, 5], prime=MERSENNE_61),
    "mixed remainders": IdMaps.of([17, 2**61], mixed=True),
}


@pytest.mark.parametrize("maps", CASES.values(), ids=CASES)
def test_exact(any_backend, maps, device):
    ids = some_ids()
    with gossamer.backend(any_backend):
        found = map_ids(torch.tensor(ids, device=device), maps)
        narrow = map_ids(
            torch.tensor([i for i in ids if -(2**31) <= i < 2**31], dtype=torch.int32, device=device), maps
        )
    assert found.tolist() == exact(ids, maps)
    assert narrow.tolist() == exact([i for i in ids if -(2**31) <= i < 2**31], maps)
    assert found.dtype == maps.dtype


def test_digits(any_backend, device):
    maps = radix_maps([3, 2, 5], limit=30)
    ids = torch.arange(30, device=device).view(5, 6).T
    with gossamer.backend(any_backend):
        found = map_ids(ids, maps)
    assert found.shape == (6, 5, 3) and found.dtype == torch.int32
    assert found.view(30, 3).tolist() == exact(ids.reshape(-1).tolist(), maps)


@pytest.mark.parametrize("bad", [-1, 30, 2**62, -(2**63)])
def test_ids_outside(any_backend, bad, device):
    ids = torch.tensor([3, bad, 4], device=device)
    with gossamer.backend(any_backend):
        if device == "cpu" and any_backend != "triton":
            with pytest.raises(IndexError, match=rf"ids must be in \[0, N\) with N=30, got {bad} at position 1"):
                map_ids(ids, radix_maps([5, 6], limit=30))
        else:
            assert map_ids(ids, radix_maps([5, 6], limit=30))[1].tolist() == [-1, -1]


def test_published_value():
    """A hash of a deep hash embedding, by hand: (1234·5 + 777) mod 1,000,003 mod 10⁶."""
    assert (
        map_ids(torch.tensor([5]), IdMaps.of([10**6], multipliers=[1234], addends=[777], prime=1_000_003)).item()
        == 6947
    )


def test_operator(device):
    torch.library.opcheck(
        _map_ids._dispatched,
        (torch.arange(5, device=device), [7], [1], [0], [1], [0], 0, 9, False, "reference"),
    )
    empty = map_ids(torch.empty(0, 3, dtype=torch.int32, device=device), CASES["universal"])
    assert empty.shape == (0, 3, 4)
    assert MapIds(empty, CASES["universal"]).maps.count == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"moduli": []}, "the number of maps must be at least 1, got 0"),
        ({"moduli": [0]}, r"moduli must be in \[1, \d+\), got 0"),
        ({"moduli": [3], "prime": 2**31}, r"prime must be 0, below 2\*\*31 or 2\*\*61 - 1, got 2147483648"),
        ({"moduli": [3], "multipliers": [2]}, r"multipliers must be in \[1, 2\), got 2"),
        ({"moduli": [3], "addends": [7], "prime": 7}, r"addends must be in \[0, 7\), got 7"),
        ({"moduli": [3], "bases": [1, 2]}, "bases must have one number for each of the 1 moduli, got 2"),
        ({"moduli": [3], "divisors": [2]}, r"divisors must be 1 without a limit or a prime, got \[2\]"),
        ({"moduli": [3], "limit": 9, "mixed": True}, "limit must be 0 where ids are mixed, got 9"),
        ({"moduli": [3], "limit": -1}, r"limit must be in \[0, 2\*\*63\), got -1"),
    ],
)
def test_bad_maps(arguments, message):
    with pytest.raises(ValueError, match=message):
        IdMaps.of(arguments.pop("moduli"), **arguments)


def test_bad_types():
    with pytest.raises(TypeError, match=r"moduli must be ints, got 2\.0"):
        IdMaps.of([2.0])
    with pytest.raises(TypeError, match=r"ids must be int32 or int64, got torch\.float32"):
        map_ids(torch.zeros(3), CASES["universal"])


def test_a_limit_beyond_the_dtype_of_ids(any_backend, device):
    """Ids of 32 bits are all below it."""
    maps = IdMaps.of([7], limit=2**31)
    with gossamer.backend(any_backend):
        assert map_ids(torch.tensor([86, 2**31 - 1], dtype=torch.int32, device=device), maps).tolist() == [[2], [1]]
