"""Runs benchmark cases: the gate first, then peak memory and host latency, then time, every variant in turns."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace

import torch

from gossamer._environment import environment
from gossamer.bench import peers as peers_
from gossamer.bench.case import DENSE, DIRECTIONS, OURS, Case, Family, Request, Variant, Verdict
from gossamer.bench.ceilings import Ceilings, measure
from gossamer.bench.cores import Cores
from gossamer.bench.timing import (
    HOST_SAMPLES,
    NEAR_ROUNDS,
    PEAK_MEMORY_METHOD,
    SETTLE_LIMIT,
    Samples,
    Timed,
    Turns,
    clock,
    keep_freed_memory,
    peak_memory,
    quantile,
    ratio,
    ratio_interval,
    resident_bytes,
    settle,
)

FAMILIES = (
    "moe",
    "expert_mlp",
    "grouped_matmul",
    "quantized_experts",
    "gather_reduce",
    "sparse_update",
    "embedding",
    "hash_table",
    "dynamic_embedding",
    "low_rank",
    "block_sparse",
    "expert_topology",
    "dispatch",
    "topk_routing",
    "activate",
    "multi_low_rank",
    "expert_mlp_lora",
)
BUDGET = {"quick": 9.0, "full": 30.0}
# Seconds for a call of torch's in a case whose dtype nobody named.
PATIENCE = {"quick": 1.5, "full": 10.0}
# Seconds that the cores have to come together before the ceilings are measured.
GATHERING_SECONDS = 2.0
# Cases on the CPU take turns as well, so many and while their memory allows it: the time of each is spread over so many
# visits. A host that moves its guests about, or has other work, changes for seconds at a time what some calls cost and
# others do not, and a case that was timed at one go would be measured in one such state.
TOGETHER, TOGETHER_BYTES, VISITS = 4, 2 << 30, 9


@dataclass(frozen=True)
class Row:
    """What was found about one variant.

    Attributes:
        name: of the variant.
        role: of the variant.
        status: ``"ok"``; ``"wrong"``, the gate failed; or ``"failed"``, it raised.
        error: largest relative RMS error against float64; None where it was not judged.
        message: why it is wrong or failed, or a remark.
        seconds: every sample; empty unless ok.
        rounds: the round in which each was taken.
        near: whether the cores were near each other then, which a host that moves its guests' cores may change.
        peak_bytes: memory at the peak of a call; None where it was not measured.
        host_seconds: on CUDA, what the host needs to issue a call; on the CPU, what a call costs with next to no work.
            None where it was not measured.
        timed_by: how the samples were taken; see :class:`gossamer.bench.timing.Timed`.
        package: of the variant.
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

    @property
    def faulty(self) -> bool:
        """Whether the run is to fail by it: wrong and no one else's, or ours and broken."""
        wrong = self.status == "wrong" and self.package == "gossamer"
        return wrong or (self.status == "failed" and self.role == OURS)

    @property
    def median(self) -> float:
        """Median seconds."""
        return quantile(self.seconds, 0.5)

    def times(self, other: Row) -> float:
        """Time over that of another variant, both of them timed: see :func:`gossamer.bench.timing.ratio`.

        Of the rounds in which cores were near each other for both, if there are ``NEAR_ROUNDS``, else of all.
        """
        return ratio(*self._partners(other))

    def times_interval(self, other: Row) -> tuple[float, float]:
        """What :meth:`times` would be with 90% confidence: see :func:`gossamer.bench.timing.ratio_interval`."""
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
    """A case without its tensors, what it was built from, and what was found.

    Attributes:
        case: without variants and gates.
        rows: one a variant.
        floor: the least seconds that the ceilings allow.
        request: what the case was built from.
        core_distance: seconds that a cache line took between the threads' cores and back when they were nearest so far
            in this run; 0 where that was not measured.
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
        """Our speed over the dense baseline's, 1 over the ratio of times; None where either has no time."""
        ours, dense = self.row(OURS), self.row(DENSE)
        return 1 / ours.times(dense) if ours and dense else None


@dataclass(frozen=True)
class Results:
    """All cases of a run, with what they were measured on, and in words which cases it left out."""

    environment: dict
    ceilings: Ceilings
    cases: list[CaseResult]
    sweep: Mapping[str, object] | None = None
    left_out: tuple[str, ...] = ()

    @property
    def correct(self) -> bool:
        """Whether nothing of gossamer or its baselines was wrong, and none of ours failed."""
        return not any(row.faulty for result in self.cases for row in result.rows)

    def as_json(self) -> dict:
        """Everything as plain values."""
        return {
            "schema": 1,
            "environment": self.environment,
            "ceilings": asdict(self.ceilings) | {"bandwidth": self.ceilings.bandwidth},
            "sweep": dict(self.sweep) if self.sweep else None,
            "cases": [_case_json(result) for result in self.cases],
            "left_out": list(self.left_out),
        }


def family(name: str) -> Family:
    """The family of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in FAMILIES:
        raise ValueError(f"the benchmark must be one of {', '.join(FAMILIES)}, got {name!r}")
    return importlib.import_module(f"gossamer.bench.{name}").FAMILY


def resolve_device(name: str) -> torch.device:
    """``"auto"``, ``"cpu"`` or ``"cuda"`` as a device; auto is CUDA where there is one.

    Raises:
        ValueError: another name, or CUDA where there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def requests(
    chosen: Family,
    device: torch.device,
    *,
    shape: str | None = None,
    dtype: str | None = None,
    direction: str = "both",
    skew: str = "uniform",
    peers: str = "all",
    quick: bool = False,
) -> list[Request]:
    """The cases that a command asks for: each shape in each dtype, forward, and forward with backward unless forbidden.

    Raises:
        ValueError: an unknown shape, dtype, direction, skew or peer, or a peer asked for by name that cannot run.
    """
    _check("--direction", direction, DIRECTIONS)
    _check("--skew", skew, chosen.skews)
    names = peers_.choose(chosen.peers, peers)
    if shape is not None:
        shapes = (shape,)
    else:
        shapes = (chosen.quick[device.type],) if quick else chosen.defaults[device.type]
    if dtype is not None and chosen.dtypes != ("int",):
        _check("--dtype", dtype, chosen.dtypes)
        dtypes = (dtype,)
    else:
        dtypes = tuple(d for d in ("fp32", "bf16", "int") if d in chosen.dtypes)
    directions = ("forward",) if direction == "forward" else chosen.directions
    wanted = [
        Request(name, chosen.sizes(name), d, device, way, skew, names)
        for name in shapes
        for d in dtypes
        for way in directions
    ]
    peers_.require(chosen.peers, wanted)
    return wanted


def _check(option: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")


def run(
    chosen: Family,
    wanted: list[Request],
    *,
    budget: float = BUDGET["full"],
    patience: float = math.inf,
    stage: Callable[[str], None] = lambda message: None,
    progress: Callable[[str], None] = lambda message: None,
    finished: Callable[[CaseResult, Ceilings], None] = lambda result, ceilings: None,
    sweep: Mapping[str, object] | None = None,
) -> Results:
    """Run cases of one family.

    Args:
        chosen: the family.
        wanted: the cases, all on one device; see :func:`requests`.
        budget: seconds of timing for a case, shared by its variants.
        patience: a case is left out if its FLOPs take torch longer than this many seconds.
        stage: told in words which case begins.
        progress: told in words what is going on.
        finished: given each case's result as it comes.
        sweep: what the cases sweep over, to be kept with the results; see :mod:`gossamer.bench.sweep`.
    """
    device = wanted[0].device
    keep_freed_memory(device)
    stage("measuring the ceilings: a matrix product and a copy")
    cores = Cores.of(device)
    cores.look()
    cores.gather(GATHERING_SECONDS)
    ceilings = measure(device, [request.dtype for request in wanted])
    results: list[CaseResult] = []
    left_out: list[str] = []
    waiting: list[_Checked] = []

    def time_those_waiting() -> None:
        for result in _time(waiting, ceilings, cores, stage, progress):
            results.append(result)
            finished(result, ceilings)
        waiting.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    before = resident_bytes()
    for done, request in enumerate(wanted):
        stage(f"[{done + 1}/{len(wanted)}] {chosen.name} {request.shape} {request.dtype} {request.direction}")
        case = chosen.build(request)
        if (seconds := ceilings.torch_seconds(case)) > patience:
            left_out.append(f"{case.title}, for a call of torch's takes about {seconds:.0f} s here")
        else:
            waiting.append(_Checked(case, chosen, request, budget, cores, progress))
        del case  # or its tensors would still be there while the next one's are made
        now = resident_bytes()
        room = before is not None and now is not None and now - before < TOGETHER_BYTES
        if waiting and (device.type == "cuda" or len(waiting) == TOGETHER or not room):
            time_those_waiting()
            before = resident_bytes()
    time_those_waiting()
    return Results(environment(), ceilings, results, sweep, tuple(left_out))


def judge(case: Case, variant: Variant, gates: dict) -> Verdict | None:
    """The verdict on one variant, or None for one with no gate; ``gates`` keeps the gates already made."""
    if variant.gate is None:
        variant.call(case.direction)
        return None
    if variant.gate not in gates:
        gates[variant.gate] = case.gates[variant.gate]()
    return gates[variant.gate](variant.outputs(case.direction))


def grad_mode(direction: str) -> AbstractContextManager:
    """The mode that :meth:`gossamer.bench.case.Variant.bare` wants to be called in."""
    return torch.no_grad() if direction == "forward" else nullcontext()


class _Checked:
    """A case whose variants were checked, and are timed in one visit or several.

    They are warmed up in the first: checks of other cases give memory back to the system.
    """

    def __init__(
        self,
        case: Case,
        chosen: Family,
        request: Request,
        budget: float,
        cores: Cores,
        progress: Callable[[str], None],
    ) -> None:
        self.case, self._chosen, self.request, self._cores = case, chosen, request, cores
        gates: dict = {}
        self._rows: dict[str, Row] = {}
        for variant in case.variants:
            progress(f"{case.title}: checking {variant.name}")
            self._rows[variant.name] = _first_calls(case, variant, gates)
        self._budget = budget
        self._timed: dict[str, Timed] = {}

    def visit(self, share: float, progress: Callable[[str], None]) -> None:
        """Take samples until ``share`` of all is done."""
        with grad_mode(self.case.direction):
            if not self._timed:
                self._warm_up(progress)
            self._turns.take(share, lambda message: progress(f"{self.case.title}: {message}"))

    def _warm_up(self, progress: Callable[[str], None]) -> None:
        progress(f"{self.case.title}: warming up")
        timer, limit = clock(self.case.device), SETTLE_LIMIT[self.case.device.type]
        right = [v for v in self.case.variants if self._rows[v.name].status == "ok"]
        self._timed = {v.name: timer.prepare(v.bare(self.case.direction)) for v in right}
        for found in self._timed.values():
            if found.first < limit:
                settle(found.sample, limit)
        compared = {v.name for v in right if v.role in (OURS, DENSE)}
        samplers = {name: found.sample for name, found in self._timed.items()}
        self._turns = Turns(samplers, self._budget, compared, self._cores)

    def rows(self, progress: Callable[[str], None]) -> list[Row]:
        """What was found, with the host's latency."""
        progress(f"{self.case.title}: host latency")
        host = {name: found.host for name, found in self._timed.items()}
        if self.case.device.type == "cpu":
            host = _host_latency(self._chosen, self.request)
        for name, samples in self._turns.samples.items():
            self._rows[name] = replace(
                self._rows[name],
                seconds=list(samples.values()),
                rounds=list(samples),
                near=self._turns.near(name),
                host_seconds=host.get(name),
                timed_by=self._timed[name].method,
            )
        return list(self._rows.values())


def _time(
    cases: list[_Checked],
    ceilings: Ceilings,
    cores: Cores,
    stage: Callable[[str], None],
    progress: Callable[[str], None],
) -> Iterator[CaseResult]:
    """Time cases that are there together, each in turn; the result of each."""
    start, visits = time.perf_counter(), VISITS if len(cases) > 1 else 1
    for visit in range(visits):
        for checked in cases:
            checked.visit((visit + 1) / visits, progress)
        if visit == 0 and visits > 1:
            left = (time.perf_counter() - start) * (visits - 1)
            stage(f"timing {len(cases)} cases in turns, about {left:.0f} s left")
    for checked in cases:
        without_tensors = replace(checked.case, variants=(), gates={})
        rows = checked.rows(progress)
        floor = ceilings.floor_seconds(checked.case)
        yield CaseResult(without_tensors, rows, floor, checked.request, cores.least)


def _host_latency(chosen: Family, request: Request) -> dict[str, float]:
    """Seconds of each variant's call at sizes with next to no work, on the CPU."""
    sizes = chosen.host_sizes(request.sizes)
    if chosen.rule(sizes):
        return {}
    case = chosen.build(replace(request, sizes=sizes))
    timer, found = clock(case.device), {}
    with grad_mode(case.direction):
        for variant in case.variants:
            try:
                call = variant.bare(case.direction)
                call()
                sample = timer.prepare(call).sample
            except Exception:
                # Another system may not take sizes as small as these; its row then shows no host latency.
                continue
            settle(sample, SETTLE_LIMIT[case.device.type])
            found[variant.name] = quantile([sample() for _ in range(HOST_SAMPLES)], 0.5)
    return found


def _first_calls(case: Case, variant: Variant, gates: dict) -> Row:
    try:
        verdict = judge(case, variant, gates)
        if verdict is not None and verdict.failures:
            found = verdict.error, "; ".join(verdict.failures)
            return Row(variant.name, variant.role, "wrong", *found, package=variant.package)
        peak = peak_memory(lambda: variant.call(case.direction), case.device)
    except Exception as error:
        # A benchmark of several systems goes on when one breaks: the row says how, and ours sets the exit status.
        reason = str(error).strip().splitlines() or [""]
        return Row(variant.name, variant.role, "failed", None, f"{type(error).__name__}: {reason[0]}")
    return Row(variant.name, variant.role, "ok", verdict and verdict.error, variant.note, peak_bytes=peak)


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
            "bytes_per_second": result.case.bytes / row.median,
        }
        found |= {"fraction_of_ceiling": result.floor / row.median}
        found |= {"ratio_to_dense": row.times(dense) if dense else None}
        found |= {"ratio_interval": row.times_interval(dense) if dense else None}
    return found
