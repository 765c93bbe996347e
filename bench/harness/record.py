"""The results of a benchmark run, and their form as plain values for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from gossamer.bench.harness.case import DENSE, OURS, Case, Request
from gossamer.bench.harness.ceilings import Ceilings
from gossamer.bench.harness.timing import (
    NEAR_ROUNDS,
    PEAK_MEMORY_METHOD,
    Samples,
    mean_slowing,
    quantile,
    ratio,
    ratio_interval,
)


@dataclass(frozen=True)
class Row:
    """The result of one variant.

    Attributes:
        name: name of the variant.
        role: role of the variant.
        status: ``"ok"``; ``"wrong"``, the gate failed; or ``"failed"``, it raised.
        error: largest relative RMS error against float64; None if no gate judged it.
        message: the reason why it is wrong or failed, or a remark.
        seconds: every sample; empty unless ok.
        rounds: the round in which each sample was taken.
        near: for each sample, whether the threads' cores were near each other; a host that moves its guests changes
            that.
        peak_bytes: memory at the peak of a call; None if it was not measured.
        host_seconds: on CUDA, the time the host needs to issue a call; on the CPU, the time of a call with next to no
            work. None if it was not measured.
        timed_by: the method by which samples were taken; see :class:`gossamer.bench.harness.timing.Timed`.
        package: package of the variant.
        bytes: least bytes of one call of the variant; None if they are the case's.
    """

    name: str
    role: str
    status: str
    error: float | None
    message: str
    seconds: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    near: list[bool] = field(default_factory=list)
    peak_bytes: int | None = None
    host_seconds: float | None = None
    timed_by: str = ""
    package: str = "gossamer"
    bytes: float | None = None

    @property
    def faulty(self) -> bool:
        """Whether this fails the run: a result of gossamer or its baseline is wrong, or gossamer raised an error."""
        wrong = self.status == "wrong" and self.package == "gossamer"
        return wrong or (self.status == "failed" and self.role == OURS)

    @property
    def median(self) -> float:
        """Median seconds."""
        return quantile(self.seconds, 0.5)

    def times(self, other: Row) -> float:
        """Time over that of another variant, if both were timed: see :func:`gossamer.bench.harness.timing.ratio`.

        Uses only the rounds in which the cores were near each other for both, if there are ``NEAR_ROUNDS`` of them;
        else all.
        """
        return ratio(*self._partners(other))

    def times_interval(self, other: Row) -> tuple[float, float]:
        """The 90% confidence interval of :meth:`times`: see :func:`gossamer.bench.harness.timing.ratio_interval`."""
        return ratio_interval(*self._partners(other))

    def _partners(self, other: Row) -> tuple[Samples, Samples]:
        ours, theirs = self._samples(near=True), other._samples(near=True)
        if len(ours.keys() & theirs.keys()) >= NEAR_ROUNDS:
            return ours, theirs
        return self._samples(), other._samples()

    def _samples(self, near: bool = False) -> Samples:
        found = zip(self.rounds, self.seconds, self.near, strict=True)
        return {round_: seconds for round_, seconds, close in found if close or not near}


@dataclass(frozen=True)
class CaseResult:
    """The results of a case, with the case itself (without its tensors) and the request it was built from.

    Attributes:
        case: the case, without variants and gates.
        rows: one row per variant.
        floor: the least seconds that the ceilings allow.
        request: the request that the case was built from.
        core_distance: seconds of a cache line's round trip between the threads' cores, at their nearest so far in this
            run; 0 if it was not measured.
    """

    case: Case
    rows: list[Row]
    floor: float
    request: Request
    core_distance: float = 0.0

    def row(self, role: str) -> Row | None:
        """The first timed row of a role, or None."""
        return next((r for r in self.rows if r.role == role and r.seconds), None)

    @property
    def speed_of_dense(self) -> float | None:
        """Our speed over the dense baseline's, 1 over the ratio of times; None if either has no time."""
        ours, dense = self.row(OURS), self.row(DENSE)
        return 1 / ours.times(dense) if ours and dense else None


@dataclass(frozen=True)
class Results:
    """All cases of a run, the machine that they were measured on, and the cases left out, with the reasons.

    If a run was interrupted, they hold the cases that had finished.
    """

    environment: dict
    ceilings: Ceilings
    cases: list[CaseResult]
    sweep: Mapping[str, object] | None = None
    left_out: tuple[str, ...] = ()
    interrupted: bool = False

    @property
    def correct(self) -> bool:
        """Whether nothing of gossamer or its baselines was wrong, and none of ours failed."""
        return not any(row.faulty for result in self.cases for row in result.rows)

    @property
    def slowing(self) -> float | None:
        """:func:`gossamer.bench.harness.timing.mean_slowing` of all calls timed."""
        return mean_slowing(row.seconds for result in self.cases for row in result.rows)

    def as_json(self) -> dict:
        """Everything as plain values."""
        return {
            "schema": 1,
            "environment": self.environment,
            "ceilings": asdict(self.ceilings) | {"bandwidth": self.ceilings.bandwidth},
            "sweep": dict(self.sweep) if self.sweep else None,
            "cases": [_case_json(result) for result in self.cases],
            "left_out": list(self.left_out),
            "interrupted": self.interrupted,
            "slowing": self.slowing,
        }


def _case_json(result: CaseResult) -> dict:
    case = result.case
    return {
        "family": case.family,
        "title": case.title,
        "shape": case.shape,
        "sizes": dict(case.sizes),
        "dtype": case.dtype,
        "device": str(case.device),
        "direction": case.direction,
        "routing": case.routing,
        "skew": result.request.skew,
        "flops": case.flops,
        "bytes": case.bytes,
        "floor_seconds": result.floor,
        "core_distance": result.core_distance,
        "checked": case.checked,
        "peak_memory_method": PEAK_MEMORY_METHOD[case.device.type],
        "skipped": dict(case.skipped),
        "variants": [_row_json(row, result) for row in result.rows],
    }


def _row_json(row: Row, result: CaseResult) -> dict:
    found = asdict(row)
    if row.seconds:
        dense = result.row(DENSE)
        found |= {"median": row.median, "p20": quantile(row.seconds, 0.2), "p80": quantile(row.seconds, 0.8)}
        found |= {
            "flops_per_second": result.case.flops / row.median,
            "bytes_per_second": (row.bytes or result.case.bytes) / row.median,
        }
        found |= {"fraction_of_ceiling": result.floor / row.median}
        found |= {"ratio_to_dense": row.times(dense) if dense else None}
        found |= {"ratio_interval": row.times_interval(dense) if dense else None}
    return found
