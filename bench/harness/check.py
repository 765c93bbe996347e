"""Compares a layer with its replacement: errors against float64, gradients, determinism, and then speed."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

import gossamer
from gossamer._checks import check_flags, check_seed
from gossamer.bench.harness.flatten import floats, synchronise, tensors
from gossamer.bench.harness.profile import check_keywords, module_subject, samples_of
from gossamer.bench.harness.timing import mean_slowing, quantile
from gossamer.testing import MAX_EPS, MAX_FACTOR, RMS_EPS, RMS_FACTOR, errors

# Number of draws of the baseline's error: a single draw of a few rounding errors says little.
DRAWS = 8
TIMING_BUDGET = 3.0
# Added to an error that the original raised, which says nothing about the replacement.
ORIGINAL_FAILED = "The original itself failed with these inputs and settings"

RESULT, INPUT_GRADIENT, PARAMETER_GRADIENT = "result", "input gradient", "parameter gradient"


@dataclass(frozen=True)
class CheckRow:
    """One tensor that both modules compute.

    Attributes:
        name: its path in the result or the inputs, or the parameter's name.
        kind: ``"result"``, ``"input gradient"`` or ``"parameter gradient"``.
        error: relative RMS error of the replacement against float64; None if it was not compared with float64.
        worst: its maximum error over the RMS of the truth.
        original_error: relative RMS error of the original in its own dtype.
        original_worst: its maximum error.
        message: what is wrong; empty if it is right.
    """

    name: str
    kind: str
    error: float | None
    worst: float | None
    original_error: float | None
    original_worst: float | None
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether it is right."""
        return not self.message


@dataclass(frozen=True)
class CheckSpeed:
    """Median seconds of the two modules in one direction.

    Attributes:
        direction: ``"forward"`` or ``"forward+backward"``.
        original: seconds of the original.
        replacement: seconds of the replacement.
        slowing: share by which medians exceed the shortest samples, as in a benchmark; None with few samples.
    """

    direction: str
    original: float
    replacement: float
    slowing: float | None = None


@dataclass(frozen=True)
class CheckReport:
    """The findings of :func:`gossamer.check`; ``print`` shows them.

    Attributes:
        title: the names of both, in one line.
        rows: every tensor that was compared.
        not_compared: parameters that only one of the two has.
        deterministic: whether the replacement gave the same bits twice.
        original_deterministic: whether the original did.
        speed: the times; empty unless ``ok``, or if none were requested.
    """

    title: str
    rows: tuple[CheckRow, ...]
    not_compared: tuple[str, ...]
    deterministic: bool
    original_deterministic: bool
    speed: tuple[CheckSpeed, ...]

    @property
    def ok(self) -> bool:
        """Whether every tensor is right, and the replacement gives the same bits twice if the original does."""
        return all(row.ok for row in self.rows) and (self.deterministic or not self.original_deterministic)

    def to_json(self) -> dict:
        """Everything as plain values."""
        found = asdict(self) | {"ok": self.ok}
        for row, plain in zip(self.rows, found["rows"], strict=True):
            plain["ok"] = row.ok
        return {"schema": 1, **found}

    def __rich_console__(self, console: object, options: object) -> Iterator[object]:
        """The tables, for ``rich.print``."""
        from gossamer.bench.harness import check_report

        yield from check_report.render(self)

    def __str__(self) -> str:
        from gossamer.bench.harness import check_report

        return check_report.text(self)


@dataclass(frozen=True)
class _Call:
    """The call of both modules: positional and keyword arguments, and whether gradients are taken."""

    inputs: Sequence[object]
    kwargs: Mapping[str, object]
    backward: bool
    seed: int

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> _Call:
        """The same call with its floating-point tensors changed."""

        def apply(value: object) -> object:
            if isinstance(value, torch.Tensor):
                return change(value) if value.is_floating_point() else value
            if isinstance(value, Mapping):
                return type(value)((k, apply(v)) for k, v in value.items())
            if type(value) in (tuple, list):
                return type(value)(apply(v) for v in value)
            return value

        return _Call(apply(tuple(self.inputs)), apply(dict(self.kwargs)), self.backward, self.seed)

    def leaves(self) -> tuple[_Call, dict[str, torch.Tensor]]:
        """Return the same call on fresh leaves, and the leaves whose gradients are taken."""
        fresh = self.mapped(lambda t: t.detach().clone().requires_grad_(self.backward))
        given = floats(fresh.inputs) | floats(fresh.kwargs)
        return fresh, given if self.backward else {}


def _drawn(shape: torch.Size, name: str, seed: int, like: torch.Tensor) -> torch.Tensor:
    """Return the output gradient, with the same numbers for every dtype and module."""
    generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
    return torch.randn(shape, generator=generator).to(like.device)


def _run(module: Callable, call: _Call, dtype_of: Mapping[str, torch.dtype] | None = None) -> dict[str, dict]:
    """Kind -> name -> tensor, or None for a gradient that does not exist.

    ``dtype_of`` rounds an output's gradient to the dtype of the original's output, so that the float64 run starts from
    the same numbers.
    """
    fresh, given = call.leaves()
    torch.manual_seed(call.seed)
    with torch.set_grad_enabled(call.backward):
        y = module(*fresh.inputs, **fresh.kwargs)
    results = dict(tensors(y))
    found: dict[str, dict] = {RESULT: {name: value.detach() for name, value in results.items()}}
    if not call.backward:
        return found
    parameters = dict(module.named_parameters()) if isinstance(module, torch.nn.Module) else {}
    parameters = {name: p for name, p in parameters.items() if p.requires_grad}
    sources = {name: value for name, value in results.items() if value.is_floating_point() and value.requires_grad}
    leaves = [*given.values(), *parameters.values()]
    grads: Sequence[torch.Tensor | None] = [None] * len(leaves)
    if sources and leaves:
        douts = [
            _drawn(value.shape, name, call.seed, value).to((dtype_of or {}).get(name, value.dtype)).to(value.dtype)
            for name, value in sources.items()
        ]
        grads = torch.autograd.grad(list(sources.values()), leaves, douts, allow_unused=True)
    found[INPUT_GRADIENT] = dict(zip(given, grads[: len(given)], strict=True))
    found[PARAMETER_GRADIENT] = dict(zip(parameters, grads[len(given) :], strict=True))
    return found


def _bounds(baseline: Mapping[str, dict], truth: Mapping[str, dict]) -> dict[tuple[str, str], tuple[float, float]]:
    """(kind, name) -> the original's errors."""
    return {
        (kind, name): errors(value, truth[kind][name])
        for kind, values in baseline.items()
        for name, value in values.items()
        if value is not None and value.is_floating_point() and _same_form(value, truth[kind].get(name))
    }


def _same_form(value: torch.Tensor, truth: torch.Tensor | None) -> bool:
    return truth is not None and truth.shape == value.shape


def _row(
    kind: str,
    name: str,
    value: torch.Tensor | None,
    base: torch.Tensor | None,
    truth: torch.Tensor | None,
    bound: tuple[float, float] | None,
) -> CheckRow | None:
    if value is None and base is None:
        return None
    if value is None or base is None:
        # No gradient and a gradient of zeros are equivalent.
        there = value if base is None else base
        if not kind.endswith("gradient") or bool(there.any()):
            return CheckRow(
                name, kind, None, None, None, None, f"only the {'replacement' if base is None else 'original'} has it"
            )
        return None
    if value.shape != base.shape or value.dtype != base.dtype:
        message = f"{value.dtype} {tuple(value.shape)}, expected {base.dtype} {tuple(base.shape)}"
        return CheckRow(name, kind, None, None, None, None, message)
    if not value.is_floating_point():
        wrong = int((value != base).sum())
        return CheckRow(name, kind, None, None, None, None, f"{wrong} of {base.numel()} values differ" if wrong else "")
    if bound is None:
        return CheckRow(
            name, kind, None, None, None, None, "the float64 run of the original does not give it in this shape"
        )
    rms, worst = errors(value, truth)
    eps = torch.finfo(value.dtype).eps
    message = ""
    if not all(map(math.isfinite, bound)):
        message = "the original itself is not finite, or its float64 run is not"
    elif not rms <= RMS_FACTOR * bound[0] + RMS_EPS * eps:
        message = f"RMS error above {RMS_FACTOR} times the original's plus {RMS_EPS} epsilon"
    elif not worst <= MAX_FACTOR * bound[1] + MAX_EPS * eps:
        message = f"maximum error above {MAX_FACTOR} times the original's plus {MAX_EPS:g} epsilon"
    return CheckRow(name, kind, rms, worst, *bound, message)


def _rows(actual: Mapping, baseline: Mapping, truth: Mapping, bounds: Mapping) -> list[CheckRow]:
    rows = []
    for kind in baseline:
        # Parameters that only one of the two has are listed separately: a replacement may store its weights
        # differently.
        either = dict.fromkeys([*baseline[kind], *actual[kind]])
        names = [n for n in either if kind != PARAMETER_GRADIENT or (n in baseline[kind] and n in actual[kind])]
        for name in names:
            row = _row(
                kind,
                name,
                actual[kind].get(name),
                baseline[kind].get(name),
                truth[kind].get(name),
                bounds.get((kind, name)),
            )
            if row is not None:
                rows.append(row)
    return rows


def _same_bits(first: Mapping[str, dict], second: Mapping[str, dict]) -> bool:
    for kind, values in first.items():
        for name, value in values.items():
            other = second[kind].get(name)
            if (value is None) != (other is None) or (value is not None and not torch.equal(value, other)):
                return False
    return True


def _in_float64(module: torch.nn.Module) -> torch.nn.Module:
    """Copy a module to float64, with transformers experts as a plain loop: torch's grouped product has no float64."""
    wide = copy.deepcopy(module).double()
    for part in wide.modules():
        config = part.__dict__.get("config")
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"
    return wide


def _replacement(module: torch.nn.Module, replacement: Callable | None) -> Callable:
    if replacement is None:
        made = copy.deepcopy(module)
        gossamer.replace(made)
        return made
    if isinstance(replacement, torch.nn.Module):
        return replacement
    if not callable(replacement):
        raise TypeError(
            "replacement must be a torch.nn.Module, a function that builds one or makes one of a copy of the module, "
            f"or None, got {type(replacement).__name__}"
        )
    made, built_anew = made_by(replacement, module)
    if not isinstance(made, torch.nn.Module):
        raise TypeError(f"replacement must return a torch.nn.Module, got {type(made).__name__}")
    if built_anew:
        try:
            take_weights(made, module)
        except ValueError as error:
            raise ValueError(f"replacement {error}") from None
        if (like := next(module.parameters(), None)) is not None:
            made.to(like)
        made.train(module.training)
    return made


def made_by(function: Callable, original: torch.nn.Module) -> tuple[object, bool]:
    """Return what ``function`` makes, and whether it made it without the original.

    A callable that needs an argument is given a copy of the original.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        parameters = ()
    if any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters):
        return function(copy.deepcopy(original)), False
    return function(), True


def take_weights(made: torch.nn.Module, original: torch.nn.Module) -> None:
    """Load the original's weights into a newly built module.

    Raises:
        ValueError: the names or shapes of its weights differ from the original's.
    """
    try:
        made.load_state_dict(original.state_dict())
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"does not take the original's weights ({reason}); build it from the original in a function of one argument"
        ) from None


def _speeds(
    original: Callable, candidate: Callable, call: _Call, device: torch.device, budget: float
) -> Iterator[CheckSpeed]:
    for direction in ("forward", "forward+backward")[: 1 + call.backward]:
        backward = direction != "forward"
        fresh, _ = _Call(call.inputs, call.kwargs, backward, call.seed).leaves()
        runs = {
            name: module_subject(name, module, fresh.inputs, fresh.kwargs, backward).run
            for name, module in (("o", original), ("r", candidate))
        }
        for run in runs.values():
            run()
        synchronise(device)
        found = samples_of(runs, device, budget)
        original_seconds, seconds = (quantile(found[name], 0.5) for name in ("o", "r"))
        yield CheckSpeed(direction, original_seconds, seconds, mean_slowing(found.values()))


def check(
    module: torch.nn.Module,
    replacement: torch.nn.Module | Callable | None = None,
    *inputs: object,
    kwargs: Mapping[str, object] | None = None,
    backward: bool = True,
    speed: bool = True,
    seed: int = 0,
    progress: Callable[[str], None] = lambda message: None,
) -> CheckReport:
    """:func:`gossamer.check`."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    check_flags(backward=backward, speed=speed)
    check_seed(seed)
    check_keywords(kwargs)
    progress("making the replacement")
    candidate = _replacement(module, replacement)
    call = _Call(inputs, dict(kwargs or {}), backward, seed)
    device = next((t.device for _, t in (*tensors(inputs), *module.named_parameters())), torch.device("cpu"))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        progress("running the original")
        try:
            baseline = _run(module, call)
        except Exception as error:
            error.add_note(ORIGINAL_FAILED)
            raise
        repeated = _same_bits(baseline, _run(module, call))
        progress("running the original in float64")
        wide = _in_float64(module)
        dtype_of = {name: value.dtype for name, value in floats(baseline[RESULT]).items()}

        def run_truth(changed: _Call) -> dict[str, dict]:
            # Gossamer's kernels in the original must not be checked against themselves.
            with gossamer.backend("reference"):
                return _run(wide, changed.mapped(torch.Tensor.double), dtype_of)

        truth = run_truth(call)
        progress("running the replacement")
        actual = _run(candidate, call)
        deterministic = _same_bits(actual, _run(candidate, call))
        bounds = _bounds(baseline, truth)
        rows = _rows(actual, baseline, truth, bounds)
        for draw in range(1, DRAWS):
            if all(row.ok or row.error is None or not math.isfinite(row.error) for row in rows):
                break
            progress(f"drawing the original's error, {draw + 1} of {DRAWS}")
            changed = _Call(call.inputs, call.kwargs, backward, seed + draw)
            changed = changed.mapped(lambda t, draw=draw: t.roll(draw, -1) if t.dim() else t)
            drawn = _bounds(_run(module, changed), run_truth(changed))
            bounds = {key: tuple(map(max, bound, drawn.get(key, bound))) for key, bound in bounds.items()}
            rows = _rows(actual, baseline, truth, bounds)
        lonely = sorted(set(baseline.get(PARAMETER_GRADIENT, {})) ^ set(actual.get(PARAMETER_GRADIENT, {})))
        title = f"{type(module).__name__} and {_describe(candidate, module)} on {device}"
        report = CheckReport(title, tuple(rows), tuple(lonely), deterministic, repeated, ())
        if speed and report.ok:
            progress("timing")
            timed = tuple(_speeds(module, candidate, call, device, TIMING_BUDGET))
            report = CheckReport(title, report.rows, report.not_compared, deterministic, repeated, timed)
    return report


def _describe(candidate: torch.nn.Module, module: torch.nn.Module) -> str:
    name = type(candidate).__name__
    return f"its replacement {name}" if name != type(module).__name__ else "its replacement"
