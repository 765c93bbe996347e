"""Compares a run with an earlier one, and with a limit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from gossamer.bench.harness.record import Results

# A change of the median by at most this share counts as none, even if the ranges do not overlap.
NOISE = 0.02


@dataclass(frozen=True)
class Change:
    """One variant of one case in the earlier run and in this one.

    Attributes:
        case: which case.
        variant: name of the variant.
        then: ``(p20, median, p80)`` seconds of the earlier run.
        now: the same of this run.
    """

    case: str
    variant: str
    then: tuple[float, float, float]
    now: tuple[float, float, float]

    @property
    def ratio(self) -> float:
        """Median time now over then."""
        return self.now[1] / self.then[1]

    @property
    def verdict(self) -> str:
        """``"faster"`` or ``"slower"``; ``"same"`` if the ranges p20 to p80 overlap or medians are within 2%."""
        apart = self.now[0] > self.then[2] or self.then[0] > self.now[2]
        if not apart or abs(self.ratio - 1) <= NOISE:
            return "same"
        return "slower" if self.ratio > 1 else "faster"


def load(path: Path) -> dict:
    """Read what ``gossamer bench --json`` wrote.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"--compare {path}: {error.strerror or error}") from None
    except ValueError:
        raise ValueError(f"--compare {path} is not JSON") from None
    if not _is_run(found):
        raise ValueError(f"--compare {path} was not written by gossamer bench --json")
    return found


def _is_run(found: object) -> bool:
    """Return whether a stored run has every field that a comparison reads."""
    if not isinstance(found, dict) or found.get("schema") != 1 or not isinstance(found.get("environment"), dict):
        return False
    try:
        for case, variant in _rows(found).values():
            (case["device"], case["shape"], *(variant[q] + 0.0 for q in ("p20", "median", "p80")))
    except (KeyError, TypeError, AttributeError):
        return False
    return True


def _key(case: dict, variant: dict) -> tuple:
    sizes = tuple(sorted(case["sizes"].items()))
    return case["family"], sizes, case["dtype"], case["direction"], case["routing"], variant["name"]


def _rows(record: dict) -> dict[tuple, tuple[dict, dict]]:
    return {_key(c, v): (c, v) for c in record["cases"] for v in c["variants"] if v["seconds"]}


def changes(then: dict, now: dict) -> list[Change]:
    """Each variant that both runs timed at the same sizes, dtype, direction and routing."""
    earlier = _rows(then)
    return [
        Change(
            f"{case['family']} {case['shape']} {case['dtype']} {case['direction']}, {case['routing']}",
            variant["name"],
            tuple(earlier[key][1][q] for q in ("p20", "median", "p80")),
            tuple(variant[q] for q in ("p20", "median", "p80")),
        )
        for key, (case, variant) in _rows(now).items()
        if key in earlier
    ]


def differences(then: dict, now: dict) -> list[str]:
    """Return the differences between the two runs' device, threads and versions."""
    before, after = then["environment"], now["environment"]
    found = [
        f"{name}: {before.get(name)} then, {after.get(name)} now"
        for name in ("cpu", "cores", "threads", "isa", "system")
        if before.get(name) != after.get(name)
    ]
    cards = [[gpu["name"] for gpu in side.get("gpus", [])] for side in (before, after)]
    if cards[0] != cards[1]:
        found.append(f"GPUs: {cards[0]} then, {cards[1]} now")
    devices = [sorted({case["device"] for case in side["cases"]}) for side in (then, now)]
    if devices[0] != devices[1]:
        found.append(f"device: {', '.join(devices[0])} then, {', '.join(devices[1])} now")
    old, new = before.get("versions", {}), after.get("versions", {})
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            found.append(f"{name}: {old.get(name)} then, {new.get(name)} now")
    return found


def too_slow(results: Results, ratio: float) -> list[str]:
    """Return the cases in which our speed is below ``ratio`` times the dense baseline's, or has no ratio."""
    found = [f"not measured: {line}" for line in results.left_out]
    for result in results.cases:
        speed = result.speed_of_dense
        if speed is None:
            found.append(f"{result.case.title}: no ratio, since ours or the dense baseline has no time")
        elif speed < ratio:
            found.append(f"{result.case.title}: {speed:.3f}x the speed of dense")
    return found
