"""Sweeps: cases that differ in one size, or in the distribution of ids."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gossamer.bench.harness.case import Family, Request

SKEW = "skew"
# Multiples of the shape's size, used when the command gives no values.
FACTORS = (0.25, 0.5, 1, 2, 4)


@dataclass(frozen=True)
class Sweep:
    """The size, or the distribution of ids, that a sweep varies.

    Attributes:
        dimension: name of the dimension, such as ``"tokens"``.
        symbol: its symbol; ``"skew"`` for the distribution of ids.
        values: its values, in order.
    """

    dimension: str
    symbol: str
    values: tuple[int, ...] | tuple[str, ...]


def parse(chosen: Family, text: str, base: Request) -> Sweep:
    """Read ``DIM`` or ``DIM=v1,v2,...``.

    Args:
        chosen: the family, which names its dimensions; each symbol of its shapes can be named as well.
        text: the argument on the command line.
        base: the case whose other sizes are kept. If no values are given, they are its size times :data:`FACTORS`, as
            far as the rule allows.

    Raises:
        ValueError: the dimension is unknown, or a value is malformed, unknown or does not fit the other sizes.
    """
    dimension, given, listed = text.partition("=")
    known = {**chosen.dimensions, **{symbol: symbol for symbol in chosen.symbols}}
    if dimension == SKEW and len(chosen.skews) > 1:
        values = tuple(listed.split(",")) if given else chosen.skews
        for value in values:
            if value not in chosen.skews:
                raise ValueError(f"--sweep skew must be among {', '.join(chosen.skews)}, got {value!r}")
        if base.skew != chosen.skews[0]:
            raise ValueError(f"--sweep skew and --skew {base.skew} exclude each other")
        return Sweep(SKEW, SKEW, values)
    if dimension not in known:
        names = ", ".join([*(chosen.dimensions or chosen.symbols), *([SKEW] if len(chosen.skews) > 1 else [])])
        raise ValueError(f"--sweep must name one of {names}, got {dimension!r}")
    symbol = known[dimension]
    if not given:
        sizes = sorted({max(1, int(base.sizes[symbol] * factor)) for factor in FACTORS})
        return Sweep(dimension, symbol, tuple(s for s in sizes if not chosen.rule({**base.sizes, symbol: s})))
    words = [word.strip() for word in listed.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"--sweep {dimension} takes positive integers between commas, got {listed!r}")
    for word in words:
        if wrong := chosen.rule({**base.sizes, symbol: int(word)}):
            raise ValueError(f"--sweep {text}: {wrong}")
    return Sweep(dimension, symbol, tuple(dict.fromkeys(map(int, words))))


def expand(sweep: Sweep, requests: list[Request]) -> list[Request]:
    """Each request at each value of the sweep."""
    if sweep.symbol == SKEW:
        return [replace(request, skew=value) for value in sweep.values for request in requests]
    return [
        replace(request, shape=f"{request.shape} {sweep.symbol}={value}", sizes={**request.sizes, sweep.symbol: value})
        for value in sweep.values
        for request in requests
    ]


def position(sweep: dict, case: dict) -> int | str:
    """Return the position of a stored case in its sweep."""
    return case["skew"] if sweep["symbol"] == SKEW else case["sizes"][sweep["symbol"]]
