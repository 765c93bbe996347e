"""Runs benchmark cases: gates first, then peak memory and host latency, then times, with variants taking turns."""

from __future__ import annotations

import gc
import importlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from gossamer._environment import environment
from gossamer.bench.harness import peers as peers_
from gossamer.bench.harness.case import DENSE, DIRECTIONS, OURS, Case, Family, Request, Variant, Verdict
from gossamer.bench.harness.ceilings import Ceilings, measure
from gossamer.bench.harness.cores import Cores
from gossamer.bench.harness.record import CaseResult, Results, Row
from gossamer.bench.harness.timing import (
    HOST_SAMPLES,
    SETTLE_LIMIT,
    Timed,
    Turns,
    clock,
    keep_freed_memory,
    peak_memory,
    quantile,
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
    "compressed_embedding",
    "hash_table",
    "dynamic_embedding",
    "low_rank",
    "block_sparse",
    "expert_topology",
    "dispatch",
    "topk_routing",
    "tree_routing",
    "activate",
    "causal_conv1d",
    "multi_low_rank",
    "delta_rule",
    "expert_mlp_lora",
    "product_key_experts",
    "mixture_of_attention",
    "top_p_moe",
)
BUDGET = {"quick": 9.0, "full": 30.0}
# A case, including its checks, may exceed its budget by this factor while its ratios are uncertain. A quick run of the
# layer, four cases, should end within two minutes.
STRETCH = 2.8
# A case whose dtype was not requested is left out if torch's call takes more than this many seconds.
PATIENCE = {"quick": 1.5, "full": 10.0}
# How often a case that narrowly fails a gate is drawn, if it has at most this many bytes.
DRAWS, DRAWN_BYTES = 5, 64 << 20
# Seconds to wait for near cores before the ceilings are measured.
GATHERING_SECONDS = 2.0
# On the CPU this many cases are interleaved, if their memory allows it, each spread over this many visits. Other load
# on the host changes the cost of some calls for seconds at a time; a case timed in one go would see one such state.
TOGETHER, TOGETHER_BYTES, VISITS = 4, 3 << 29, 9


def family(name: str) -> Family:
    """The family of that name.

    Raises:
        ValueError: no family has that name.
    """
    if name not in FAMILIES:
        raise ValueError(f"the benchmark must be one of {', '.join(FAMILIES)}, got {name!r}")
    return importlib.import_module(f"gossamer.bench.families.{name}").FAMILY


def resolve_device(name: str) -> torch.device:
    """``"auto"``, ``"cpu"`` or ``"cuda"`` as a device; auto is CUDA if there is a CUDA device, else the CPU.

    Raises:
        ValueError: another name, or ``"cuda"`` without a CUDA device.
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
    so_far: Callable[[Results], None] = lambda results: None,
    sweep: Mapping[str, object] | None = None,
) -> Results:
    """Run cases of one family. After a keyboard interrupt the results hold the cases that had finished.

    Args:
        chosen: the family.
        wanted: the cases, all on one device; see :func:`requests`.
        budget: seconds of timing for a case, shared by its variants.
        patience: a case is left out if its FLOPs take torch longer than this many seconds.
        stage: called with the name of each case when it begins.
        progress: called with a sentence on what is being done.
        finished: called with each case's result as soon as there is one.
        so_far: called each time that cases finish, with the results that a run interrupted at that time would have.
        sweep: the sweep that the cases belong to, stored with the results; see :mod:`gossamer.bench.harness.sweep`.
    """
    device, start = wanted[0].device, time.perf_counter()
    keep_freed_memory(device)
    stage("measuring the ceilings: a matrix product and a copy")
    cores = Cores.of(device)
    cores.look()
    cores.gather(GATHERING_SECONDS)
    ceilings = measure(device, [request.dtype for request in wanted])
    results: list[CaseResult] = []
    left_out: list[str] = []
    waiting: list[_Checked] = []

    def time_those_waiting(until: float) -> None:
        nonlocal ceilings
        _take_turns(waiting, until, stage, progress)
        if waiting and device.type == "cpu":
            # Another guest may have used a core during the whole first measurement.
            stage("measuring the ceilings again")
            ceilings = ceilings.best(measure(device, ceilings.gemm))
        for checked in waiting:
            results.append(checked.result(ceilings, progress))
            finished(results[-1], ceilings)
        waiting.clear()
        so_far(found(interrupted=True))
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def found(interrupted: bool) -> Results:
        # The last ceilings apply to all cases.
        cases = [replace(result, floor=ceilings.floor_seconds(result.case)) for result in results]
        return Results(environment(), ceilings, cases, sweep, tuple(left_out), interrupted)

    try:
        before = resident_bytes()
        for done, request in enumerate(wanted):
            asked = f"{chosen.name} {request.shape} {request.dtype} {request.direction}"
            gc.collect()
            stage(f"[{done + 1}/{len(wanted)}] {asked}")
            try:
                case = chosen.build(request)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                left_out.append(f"{asked}, which does not fit into memory")
                continue
            if (seconds := ceilings.torch_seconds(case)) > patience:
                left_out.append(
                    f"{case.title}, because torch's call takes about {seconds:.0f} s here (--dtype measures it anyway)"
                )
            else:
                waiting.append(_Checked(case, chosen, request, budget, cores, progress))
            del case  # the name would keep its tensors alive while the next case's are made
            now = resident_bytes()
            room = before is not None and now is not None and now - before < TOGETHER_BYTES
            if waiting and (device.type == "cuda" or len(waiting) == TOGETHER or not room):
                time_those_waiting(start + (done + 1) * STRETCH * budget)
                before = resident_bytes()
        time_those_waiting(start + len(wanted) * STRETCH * budget)
    except KeyboardInterrupt:
        return found(interrupted=True)
    return found(interrupted=False)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports exhausted memory; torch has no class for it on the CPU."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "not enough memory" in str(error) or "can't allocate memory" in str(error)


def judge_fairly(case: Case, variant: Variant, gates: dict, chosen: Family, request: Request) -> Verdict | None:
    """:func:`judge`, except that a narrow failure of a small case counts only if most of several draws fail so.

    The largest of a few rounding errors is a matter of chance for any implementation. A wrong result fails in every
    draw, or by more.
    """
    verdict = judge(case, variant, gates)
    if verdict is None or len(verdict.narrow) < len(verdict.failures) or case.bytes > DRAWN_BYTES:
        return verdict
    times = dict.fromkeys(verdict.narrow, 1)
    for draw in range(1, DRAWS) if times else ():
        other = chosen.build(replace(request, seed=request.seed + 100 * draw))
        again = judge(other, next(v for v in other.variants if v.name == variant.name), {})
        if len(again.narrow) < len(again.failures):
            return verdict
        times |= {name: times[name] + 1 for name in times.keys() & again.narrow}
    return verdict if any(2 * count > DRAWS for count in times.values()) else replace(verdict, failures=())


def judge(case: Case, variant: Variant, gates: dict) -> Verdict | None:
    """The verdict on one variant, or None for one without a gate; ``gates`` keeps the gates already made."""
    if variant.gate is None:
        variant.call(case.direction)
        return None
    if variant.gate not in gates:
        gates[variant.gate] = case.gates[variant.gate]()
    return gates[variant.gate](variant.outputs(case.direction))


def grad_mode(direction: str) -> AbstractContextManager:
    """Return the context in which :meth:`gossamer.bench.harness.case.Variant.bare` must be called."""
    return torch.no_grad() if direction == "forward" else nullcontext()


class _Checked:
    """A case whose variants have been checked, and are timed in one or more visits.

    Variants are warmed up in the first visit, since checks of other cases give memory back to the system.
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
            self._rows[variant.name] = _first_calls(case, variant, gates, chosen, request)
        self._budget = budget
        self._timed: dict[str, Timed] = {}

    def visit(self, share: float, progress: Callable[[str], None], until: float) -> None:
        """Take samples until ``share`` of all is done: see :meth:`gossamer.bench.harness.timing.Turns.take`."""
        with grad_mode(self.case.direction):
            if not self._timed:
                self._warm_up(progress)
            self._turns.take(share, lambda message: progress(f"{self.case.title}: {message}"), until)

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

    def result(self, ceilings: Ceilings, progress: Callable[[str], None]) -> CaseResult:
        """The result of the case, with the host's latency. The case's tensors are freed and cannot be timed again."""
        host = {name: found.host for name, found in self._timed.items()}
        for name, samples in self._turns.samples.items():
            self._rows[name] = replace(
                self._rows[name],
                seconds=list(samples.values()),
                rounds=list(samples),
                near=self._turns.near(name),
                timed_by=self._timed[name].method,
            )
        self.case = replace(self.case, variants=(), gates={})
        self._timed = self._turns = None
        # Optimizers of torch are in reference cycles, and hold their tables until these are collected.
        gc.collect()
        if self.case.device.type == "cpu":
            # Builds a small case, which for a family whose tables keep their size takes as much memory as this one.
            progress(f"{self.case.title}: host latency")
            host = _host_latency(self._chosen, self.request)
        rows = [replace(row, host_seconds=host.get(name)) for name, row in self._rows.items()]
        return CaseResult(self.case, rows, ceilings.floor_seconds(self.case), self.request, self._cores.least)


def _take_turns(
    cases: list[_Checked], until: float, stage: Callable[[str], None], progress: Callable[[str], None]
) -> None:
    """Time several cases held in memory together, in turns.

    Extra rounds for uncertain ratios end when the performance counter reaches ``until``; each visit of each case has
    its share of the time until then.
    """
    start, visits = time.perf_counter(), VISITS if len(cases) > 1 else 1
    for visit in range(visits):
        for before, checked in enumerate(cases):
            done = (visit * len(cases) + before + 1) / (visits * len(cases))
            checked.visit((visit + 1) / visits, progress, start + done * (until - start))
        if visit == 0 and visits > 1:
            left = (time.perf_counter() - start) * (visits - 1)
            stage(f"timing {len(cases)} cases in turns, about {left:.0f} s left")


def _host_latency(chosen: Family, request: Request) -> dict[str, float]:
    """Return the seconds of each variant's call at sizes with almost no work, on the CPU."""
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
                # A peer may refuse such small sizes; its row then shows no host latency.
                continue
            settle(sample, SETTLE_LIMIT[case.device.type])
            found[variant.name] = quantile([sample() for _ in range(HOST_SAMPLES)], 0.5)
    return found


def _first_calls(case: Case, variant: Variant, gates: dict, chosen: Family, request: Request) -> Row:
    try:
        verdict = judge_fairly(case, variant, gates, chosen, request)
        if verdict is not None and verdict.failures:
            found = verdict.error, "; ".join(verdict.failures)
            return Row(variant.name, variant.role, "wrong", *found, package=variant.package)
        peak = peak_memory(lambda: variant.call(case.direction), case.device)
    except Exception as error:
        # If one of several systems raises an error, the benchmark goes on: the error is shown in its row, and only a
        # failure of ours sets the exit status.
        reason = str(error).strip().splitlines() or [""]
        return Row(variant.name, variant.role, "failed", None, f"{type(error).__name__}: {reason[0]}")
    error = verdict and verdict.error
    return Row(variant.name, variant.role, "ok", error, variant.note, peak_bytes=peak, bytes=variant.bytes)
