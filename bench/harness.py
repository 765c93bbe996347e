"""Runs benchmark cases: the gate first, then peak memory, then time, every variant in turns in one process."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

import torch

from gossamer._environment import environment
from gossamer.bench.case import DENSE, DIRECTIONS, DTYPES, OURS, SKEWS, Case, Family, Request, Variant, Verdict
from gossamer.bench.ceilings import Ceilings, measure
from gossamer.bench.timing import PEAK_MEMORY_METHOD, interleave, peak_memory, quantile

FAMILIES = ("moe", "expert_mlp", "grouped_matmul", "gather_reduce", "dispatch")
BUDGET = {"quick": 2.5, "full": 15.0}


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
        peak_bytes: memory at the peak of a call; None where it was not measured.
    """

    name: str
    role: str
    status: str
    error: float | None
    message: str
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        """Median seconds."""
        return quantile(self.seconds, 0.5)


@dataclass(frozen=True)
class CaseResult:
    """A case and its rows."""

    case: Case
    rows: list[Row]
    floor: float

    def row(self, role: str) -> Row | None:
        """The first timed row of a role, or None."""
        return next((r for r in self.rows if r.role == role and r.seconds), None)


@dataclass(frozen=True)
class Results:
    """All cases of a run, with what they were measured on."""

    environment: dict
    ceilings: Ceilings
    cases: list[CaseResult]

    @property
    def correct(self) -> bool:
        """Whether no variant was wrong and none of ours failed."""
        rows = [row for result in self.cases for row in result.rows]
        return not any(row.status == "wrong" or (row.status == "failed" and row.role == OURS) for row in rows)

    def as_json(self) -> dict:
        """Everything as plain values."""
        return {
            "schema": 1,
            "environment": self.environment,
            "ceilings": asdict(self.ceilings),
            "cases": [_case_json(result) for result in self.cases],
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
    quick: bool = False,
) -> list[Request]:
    """The cases that a command asks for: each shape in each dtype, forward, and forward with backward unless forbidden.

    Raises:
        ValueError: an unknown shape, dtype, direction or skew.
    """
    _check("--direction", direction, DIRECTIONS)
    _check("--skew", skew, SKEWS)
    if shape is not None:
        shapes = (shape,)
    else:
        shapes = (chosen.quick[device.type],) if quick else chosen.defaults[device.type]
    if dtype is not None and chosen.dtypes != ("int",):
        _check("--dtype", dtype, DTYPES)
        dtypes = (dtype,)
    else:
        dtypes = tuple(d for d in ("fp32", "bf16", "int") if d in chosen.dtypes)
    directions = ("forward",) if direction == "forward" else chosen.directions
    return [
        Request(name, chosen.sizes(name), d, device, way, skew) for name in shapes for d in dtypes for way in directions
    ]


def _check(option: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")


def run(
    chosen: Family,
    wanted: list[Request],
    *,
    budget: float = BUDGET["full"],
    progress: Callable[[str], None] = lambda message: None,
    finished: Callable[[CaseResult, Ceilings], None] = lambda result, ceilings: None,
) -> Results:
    """Run cases of one family.

    Args:
        chosen: the family.
        wanted: the cases, all on one device; see :func:`requests`.
        budget: seconds of timing for a case, shared by its variants.
        progress: told in words what is going on.
        finished: given each case's result as it comes.
    """
    device = wanted[0].device
    progress("measuring the ceilings: a matrix product and a copy")
    ceilings = measure(device, [request.dtype for request in wanted])
    results = []
    for request in wanted:
        progress(f"preparing {chosen.name} {request.shape} {request.dtype}")
        case = chosen.build(request)
        result = CaseResult(case, _run_case(case, budget, progress), ceilings.floor_seconds(case))
        results.append(result)
        finished(result, ceilings)
        del case
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return Results(environment(), ceilings, results)


def judge(case: Case, variant: Variant, gates: dict) -> Verdict | None:
    """The verdict on one variant, or None for one with no gate; ``gates`` keeps the gates already made."""
    if variant.gate is None:
        variant.call(case.direction)
        return None
    if variant.gate not in gates:
        gates[variant.gate] = case.gates[variant.gate]()
    return gates[variant.gate](variant.outputs(case.direction))


def _run_case(case: Case, budget: float, progress: Callable[[str], None]) -> list[Row]:
    gates: dict = {}
    rows: dict[str, Row] = {}
    for variant in case.variants:
        progress(f"{case.title}: checking {variant.name}")
        rows[variant.name] = _first_calls(case, variant, gates)
    gates.clear()
    calls = {v.name: (lambda v=v: v.call(case.direction)) for v in case.variants if rows[v.name].status == "ok"}
    samples = interleave(calls, case.device, budget, lambda message: progress(f"{case.title}: {message}"))
    for name, seconds in samples.items():
        rows[name].seconds.extend(seconds)
    return list(rows.values())


def _first_calls(case: Case, variant: Variant, gates: dict) -> Row:
    try:
        verdict = judge(case, variant, gates)
        if verdict is not None and verdict.failures:
            return Row(variant.name, variant.role, "wrong", verdict.error, "; ".join(verdict.failures))
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
        "shape": case.shape,
        "sizes": dict(case.sizes),
        "dtype": case.dtype,
        "device": str(case.device),
        "direction": case.direction,
        "routing": case.routing,
        "flops": case.flops,
        "bytes": case.bytes,
        "floor_seconds": result.floor,
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
        found |= {"ratio_to_dense": row.median / dense.median if dense else None}
    return found
