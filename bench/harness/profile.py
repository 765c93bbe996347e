"""Profiles of a layer's time and memory, beside a reference implementation's."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from gossamer import _backend
from gossamer._checks import check_flags
from gossamer._environment import environment
from gossamer.bench.harness.case import DENSE, DTYPES, OURS, REFERENCE, Case, Family, Request, Variant
from gossamer.bench.harness.ceilings import Ceilings, measure
from gossamer.bench.harness.cost import Called, CostRecorder
from gossamer.bench.harness.files import check_file
from gossamer.bench.harness.flatten import floats, synchronise
from gossamer.bench.harness.profile_events import KernelRow, Phase, kernel_rows, launches
from gossamer.bench.harness.profile_memory import MemoryTimeline, timeline
from gossamer.bench.harness.runner import requests
from gossamer.bench.harness.timing import quantile

# Seconds of profiled calls for each subject, and of calls without the profiler for all together.
PROFILE_BUDGET, TIMING_BUDGET = 1.5, 3.0
MAX_CALLS = 20
MIN_TURNS = 3

# Names of gradients of activations; a training step updates all other leaves.
ACTIVATIONS = ("dx", "dweights")


@dataclass(frozen=True)
class Subject:
    """The subject of a profile: one way to compute a layer.

    Attributes:
        name: its name in tables.
        forward: computes the result.
        backward: computes the gradients from the result and returns them in the order of ``leaves``; a fused optimizer
            takes its step in it. None for a forward pass alone.
        parameters: the tensors that a training step updates, by name; their gradients have the same names in
            ``leaves``.
        leaves: names of the gradients.
    """

    name: str
    forward: Callable[[], object]
    backward: Callable[[object], Sequence[torch.Tensor | None]] | None
    parameters: Mapping[str, torch.Tensor]
    leaves: tuple[str, ...]

    def phases(self) -> tuple[str, ...]:
        """The names of the phases of :meth:`run`."""
        return ("forward",) if self.backward is None else ("forward", "backward")

    def run(self, phase: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext) -> None:
        """Make one call; the context ``phase`` is entered around each phase."""
        with torch.set_grad_enabled(self.backward is not None):
            with phase("forward"):
                y = self.forward()
            if self.backward is not None:
                with phase("backward"):
                    self.backward(y)


def variant_subject(variant: Variant, direction: str) -> Subject:
    """A variant of a benchmark's case."""
    if direction == "forward":
        return Subject(variant.name, variant.forward, None, {}, ())
    leaves = dict(variant.leaves)
    return Subject(
        variant.name,
        variant.forward,
        variant.backward,
        {name: leaf for name, leaf in leaves.items() if name not in ACTIVATIONS},
        tuple(leaves),
    )


def module_subject(
    name: str, module: Callable, inputs: Sequence[object], kwargs: Mapping[str, object], backward: bool
) -> Subject:
    """A module, or any callable, on given inputs.

    Raises:
        ValueError: with ``backward``, nothing requires a gradient.
    """

    def forward() -> object:
        return module(*inputs, **kwargs)

    if not backward:
        return Subject(name, forward, None, {}, ())
    parameters = dict(module.named_parameters()) if isinstance(module, torch.nn.Module) else {}
    parameters = {key: p for key, p in parameters.items() if p.requires_grad}
    given = {f"input {key}": value for key, value in floats((inputs, dict(kwargs))).items() if value.requires_grad}
    leaves = parameters | given
    if not leaves:
        raise ValueError(f"backward=True needs a parameter or an input that requires a gradient, {name} has none")
    drawn: dict[str, torch.Tensor] = {}

    def grads(y: object) -> Sequence[torch.Tensor | None]:
        results = {key: value for key, value in floats(y).items() if value.requires_grad}
        if not results:
            raise ValueError(f"backward=True needs a result that requires a gradient, {name} returns none")
        for key, value in results.items():
            if key not in drawn:
                generator = torch.Generator(value.device).manual_seed(0)
                drawn[key] = torch.randn(value.shape, generator=generator, device=value.device).to(value.dtype)
        douts = [drawn[key] for key in results]
        return torch.autograd.grad(list(results.values()), list(leaves.values()), douts, allow_unused=True)

    return Subject(name, forward, grads, parameters, tuple(leaves))


@dataclass(frozen=True)
class SubjectTime:
    """How long a subject's calls took.

    Attributes:
        name: name of the subject.
        seconds: median of calls without the profiler.
        profiled_seconds: mean of calls under the profiler, phase by phase; the shares of rows refer to it.
        calls: number of profiled calls.
        launches: kernels and copies that one call starts on the device; None on the CPU.
    """

    name: str
    seconds: float
    profiled_seconds: Mapping[str, float]
    calls: int
    launches: float | None


@dataclass(frozen=True)
class ProfileResult:
    """The findings of :func:`gossamer.profile`; ``print`` shows them.

    Attributes:
        title: the name of the profiled layer, in one line.
        device: the device it ran on.
        subjects: the time of each subject.
        rows: operators, and the stages or kernels within them, by subject and phase.
        memory: memory of a training step for each subject; empty for a forward pass alone.
        ceilings: the rates that the machine reached in the same run.
        environment: versions, devices and threads.
    """

    title: str
    device: str
    subjects: tuple[SubjectTime, ...]
    rows: tuple[KernelRow, ...]
    memory: tuple[MemoryTimeline, ...]
    ceilings: Ceilings
    environment: Mapping[str, object]

    def to_json(self) -> dict:
        """Everything as plain values."""
        return {"schema": 1, **asdict(self)}

    def __rich_console__(self, console: object, options: object) -> Iterator[object]:
        """The tables, for ``rich.print``."""
        from gossamer.bench.harness import profile_report

        yield from profile_report.render(self)

    def __str__(self) -> str:
        from gossamer.bench.harness import profile_report

        return profile_report.text(self)


def _dtype_names(called: Mapping[tuple[str, str], Mapping[str, Called]]) -> list[str]:
    seen = {found.dtype for operators in called.values() for found in operators.values()}
    return [name for name, dtype in DTYPES.items() if dtype in seen]


def _count(subject: Subject, phase_costs: dict[tuple[str, str], Mapping[str, Called]]) -> None:
    """Run once, with one recorder per phase, so that an operator's calls are attributed to their phase."""

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        with CostRecorder() as recorder:
            yield
        phase_costs[subject.name, name] = recorder.called

    subject.run(phase)


@contextlib.contextmanager
def _stages(device: torch.device, into: dict[str, dict[str, tuple[float, int]]]) -> Iterator[None]:
    """Add the stages that native kernels recorded to ``into``."""
    if device.type != "cpu" or _backend.native_unavailable():
        yield
        return
    from gossamer.cpu_kernels.recorder import record

    with record() as recording:
        yield
    for kernel, stages in recording.stages.items():
        mine = into.setdefault(kernel, {})
        for stage, (seconds, pieces) in stages.items():
            before = mine.get(stage, (0.0, 0))
            mine[stage] = (before[0] + seconds, before[1] + pieces)


def medians(calls: Mapping[str, Callable[[], object]], device: torch.device, budget: float) -> dict[str, float]:
    """Return median wall-clock seconds of warmed-up calls, host and device together; subjects take turns."""
    return {name: quantile(found, 0.5) for name, found in samples_of(calls, device, budget).items()}


def samples_of(
    calls: Mapping[str, Callable[[], object]], device: torch.device, budget: float
) -> dict[str, list[float]]:
    """Return all samples that :func:`medians` takes."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + budget
    for turn in itertools.count():
        if turn >= MIN_TURNS and time.perf_counter() > end:
            return samples
        for name, call in calls.items():
            synchronise(device)
            start = time.perf_counter()
            call()
            synchronise(device)
            samples[name].append(time.perf_counter() - start)


def run(
    title: str,
    subjects: Sequence[Subject],
    device: torch.device,
    *,
    trace: str | os.PathLike | None = None,
    memory: bool = True,
    budget: float = PROFILE_BUDGET,
    progress: Callable[[str], None] = lambda message: None,
) -> ProfileResult:
    """Profile subjects in one run.

    Args:
        title: the name of the layer that they compute, in one line.
        subjects: ours first; all on ``device``.
        device: where they run.
        trace: file for the trace of all profiled calls, as Chrome and Perfetto read it.
        memory: whether to record the memory of a training step.
        budget: seconds of profiled calls for each subject.
        progress: called with a sentence on what is being done.
    """
    costs: dict[tuple[str, str], Mapping[str, Called]] = {}
    calls = {}
    for subject in subjects:
        progress(f"counting FLOPs and bytes of {subject.name}")
        _count(subject, costs)
        synchronise(device)
        start = time.perf_counter()
        subject.run()
        synchronise(device)
        calls[subject.name] = max(1, min(MAX_CALLS, int(budget / max(time.perf_counter() - start, 1e-6))))
    progress("measuring the ceilings: a matrix product and a copy")
    ceilings = measure(device, _dtype_names(costs))
    progress("timing without the profiler")
    seconds = medians({s.name: s.run for s in subjects}, device, TIMING_BUDGET)

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    stages: dict[tuple[str, str], dict] = {}
    with torch_profile(activities=activities) as profiler:
        for subject in subjects:
            progress(f"profiling {subject.name}")

            @contextlib.contextmanager
            def phase(name: str, subject: Subject = subject) -> Iterator[None]:
                into = stages.setdefault((subject.name, name), {})
                with _stages(device, into), record_function(Phase.label(subject.name, name)):
                    yield
                    synchronise(device)

            for _ in range(calls[subject.name]):
                subject.run(phase)
    if trace is not None:
        profiler.export_chrome_trace(os.fspath(trace))
    rows, times = kernel_rows(profiler.events(), [s.name for s in subjects], calls, costs, stages, ceilings, device)
    timelines = []
    if memory:
        for subject in subjects:
            if subject.backward is not None:
                progress(f"memory of a training step of {subject.name}")
                timelines.append(timeline(subject, device))
    return ProfileResult(
        title,
        str(device),
        tuple(
            SubjectTime(s.name, seconds[s.name], times[s.name], calls[s.name], launches(rows, s.name, device))
            for s in subjects
        ),
        tuple(rows),
        tuple(timelines),
        ceilings,
        environment(),
    )


def single_request(
    chosen: Family, device: torch.device | str, *, shape: str | None, dtype: str | None, direction: str, skew: str
) -> Request:
    """The request for one case: by default the quick shape, in float32 on the CPU or bfloat16 on CUDA.

    Raises:
        ValueError: an unknown shape, dtype, direction or skew.
    """
    device = torch.device(device)
    wanted = requests(
        chosen,
        device,
        shape=shape or chosen.quick[device.type],
        dtype=dtype or ("fp32" if device.type == "cpu" else "bf16"),
        direction=direction,
        skew=skew,
    )
    return wanted[-1]


def run_bare(subject: Subject, device: torch.device, calls: int) -> None:
    """Run a subject without measuring anything, for another program's profiler."""
    for _ in range(calls):
        subject.run()
    synchronise(device)


def case_subjects(case: Case, against: str | None = None) -> list[Subject]:
    """Ours and the variant to compare it with: the one named, else the first reference, else the dense baseline.

    Raises:
        ValueError: there is no such variant.
    """
    ours = next(v for v in case.variants if v.role == OURS)
    others = [v for v in case.variants if v is not ours]
    if against is not None:
        chosen = [v for v in others if v.name == against]
        if not chosen:
            names = ", ".join(v.name for v in others)
            missing = f" ({case.skipped[against]})" if against in case.skipped else ""
            raise ValueError(f"--against must be one of {names or '(there are none)'}, got {against!r}{missing}")
    else:
        ranked = sorted((v for v in others if v.role in (REFERENCE, DENSE)), key=lambda v: v.role != REFERENCE)
        chosen = ranked[:1]
    return [variant_subject(v, case.direction) for v in (ours, *chosen)]


def check_writable(option: str, path: str | os.PathLike, suffixes: Sequence[str] = ()) -> None:
    """Check a file that a long run will write at its end, and return its path.

    Raises:
        ValueError: it cannot be written, or its name does not end in one of ``suffixes``.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{option} must be a str or a path, got {type(path).__name__}")
    path = Path(path)
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"{option} must end in {' or '.join(suffixes)}, got {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"{option} must be a file, {str(path)!r} is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"{option}: there is no folder {str(path.parent)!r}")
    check_file(option, path)


def check_keywords(kwargs: Mapping[str, object] | None) -> None:
    """``kwargs`` must be a mapping of names to arguments, or None."""
    if kwargs is not None and not (isinstance(kwargs, Mapping) and all(isinstance(name, str) for name in kwargs)):
        raise TypeError(f"kwargs must be a mapping of names to arguments, or None, got {type(kwargs).__name__}")


def profile(
    module: Callable,
    *inputs: object,
    reference: Callable | None = None,
    kwargs: Mapping[str, object] | None = None,
    backward: bool = True,
    memory: bool = True,
    trace: str | os.PathLike | None = None,
    plot: str | os.PathLike | None = None,
    budget: float = PROFILE_BUDGET,
) -> ProfileResult:
    """:func:`gossamer.profile`."""
    if not callable(module):
        raise TypeError(f"module must be a torch.nn.Module or another callable, got {type(module).__name__}")
    if reference is not None and not callable(reference):
        raise TypeError(f"reference must be a torch.nn.Module or another callable, got {type(reference).__name__}")
    if not (isinstance(budget, (int, float)) and math.isfinite(budget) and budget > 0):
        raise ValueError(f"budget must be a positive number of seconds, got {budget!r}")
    check_flags(backward=backward, memory=memory)
    check_keywords(kwargs)
    if trace is not None:
        check_writable("trace", trace, (".json", ".gz"))
    if plot is not None:
        check_writable("plot", plot, (".png", ".svg"))
    kwargs = dict(kwargs or {})
    names = [_name(module)]
    if reference is not None:
        names.append(_name(reference) if _name(reference) != names[0] else f"{_name(reference)} (reference)")
    subjects = [
        module_subject(name, m, inputs, kwargs, backward) for name, m in zip(names, (module, reference), strict=False)
    ]
    device = _device(module, inputs, kwargs)
    shapes = ", ".join(
        f"{tuple(v.shape)} {str(v.dtype).removeprefix('torch.')}" for v in floats((inputs, kwargs)).values()
    )
    way = "forward+backward" if backward else "forward"
    title = f"{' and '.join(names)} {way} on {device}" + (f", inputs {shapes}" if shapes else "")
    result = run(title, subjects, device, trace=trace, memory=memory, budget=budget)
    if plot is not None:
        from gossamer.bench.harness import profile_report

        profile_report.plot_memory(result, plot)
    return result


def _name(module: Callable) -> str:
    if isinstance(module, torch.nn.Module):
        return type(module).__name__
    return getattr(module, "__name__", type(module).__name__)


def _device(module: Callable, inputs: Sequence[object], kwargs: Mapping[str, object]) -> torch.device:
    tensors = list(module.parameters()) if isinstance(module, torch.nn.Module) else []
    tensors += list(floats((inputs, dict(kwargs))).values())
    return next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
