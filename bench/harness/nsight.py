"""Composes the command line that profiles one kernel of a layer with Nsight Compute."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import shlex
from types import ModuleType

from gossamer.bench.harness.case import Family

# Calls before the profiled one, for compilation and clocks.
WARM_UP = 3
_PACKAGE = "gossamer.triton_kernels"


def _modules(name: str, seen: dict[str, ModuleType]) -> None:
    """A module of Triton kernels and those whose functions it uses."""
    if name in seen:
        return
    seen[name] = module = importlib.import_module(name)
    for value in vars(module).values():
        owner = getattr(value, "__module__", None)
        if isinstance(owner, str) and owner.startswith(f"{_PACKAGE}."):
            _modules(owner, seen)


@functools.cache
def triton_kernels(primitives: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the Triton kernels that serve primitives, including those of the primitives that these are made of."""
    seen: dict[str, ModuleType] = {}
    for primitive in primitives:
        _modules(f"{_PACKAGE}.{primitive}", seen)
    # A kernel is a @triton.jit function with this suffix; an imported one is listed under its own module too.
    return tuple(
        sorted({k for m in seen.values() for k, v in vars(m).items() if k.endswith("_kernel") and hasattr(v, "fn")})
    )


def primitives(chosen: Family) -> tuple[str, ...]:
    """The primitives that a family's layer runs: its module's ``PRIMITIVES``, else the one of its name."""
    module = importlib.import_module(f"gossamer.bench.families.{chosen.name}")
    return getattr(module, "PRIMITIVES", (chosen.name,))


def command_line(
    chosen: Family, kernel: str, *, shape: str | None, dtype: str | None, direction: str, skew: str
) -> str:
    """The command, quoted for a shell, that profiles one launch of ``kernel`` on a machine with a GPU.

    Raises:
        ValueError: the layer has no such kernel, Triton is missing, or the shape, dtype, direction or skew is unknown.
    """
    from gossamer.bench.harness.profile import single_request

    if importlib.util.find_spec("triton") is None:
        raise ValueError("--ncu: the kernels are Triton's, and the package triton is not installed")
    found = tuple(p for p in primitives(chosen) if importlib.util.find_spec(f"{_PACKAGE}.{p}"))
    names = triton_kernels(found)
    if kernel not in names:
        raise ValueError(f"--ncu must be one of {', '.join(names) or '(no kernels)'} for {chosen.name}, got {kernel!r}")
    request = single_request(chosen, "cuda", shape=shape, dtype=dtype, direction=direction, skew=skew)
    run = ["gossamer", "profile", chosen.name, "--shape", request.shape, "--device", "cuda"]
    run += ["--direction", request.direction, "--skew", skew, "--calls", str(WARM_UP + 1)]
    if request.dtype != "int":
        run += ["--dtype", request.dtype]
    ncu = ["ncu", "--set", "full", "--target-processes", "all", "--kernel-name", kernel]
    ncu += ["--launch-skip", str(WARM_UP), "--launch-count", "1", "--export", f"{chosen.name}-{kernel.strip('_')}"]
    return shlex.join([*ncu, *run])
