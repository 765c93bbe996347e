"""Hostile calls of everything public: no signal, no result that plain torch contradicts, no error without a name.

``python tests/fuzz/fuzzer.py --cases 50000`` runs so many, each a seed; ``--seed N --cases 1`` repeats one. A case
takes a good call of one subject, spoils some of its arguments and runs it in a fork of a process that has loaded
everything, so that a signal ends that case alone. Subjects are functions of a ``random.Random`` that return what to
call and its arguments by name; every file ``subjects_*.py`` beside this one has a tuple ``SUBJECTS`` of them.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import os
import pkgutil
import random
import re
import resource
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import NoReturn

import torch
from draws import FLOATS, nudged, nudging

import gossamer
import gossamer.cpu_kernels
from gossamer.optim import Optimizer

ERRORS = (TypeError, ValueError, IndexError)
# Relative RMS errors that separate rounding from wrong results.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.4}
MEMORY = 3 << 30
# Processor time of one case, which takes milliseconds; a case that waits may take ten times as long.
SECONDS = 120
# Cases of one fork, which takes as long as several cases.
BATCH = 20
# How often a case that differs is repeated with other rounding errors.
NUDGES = 8


def subjects() -> list[tuple[Callable, bool]]:
    """Every subject of the files here, with whether its file says that its calls are differentiated."""
    found = []
    for path in sorted(Path(__file__).parent.glob("subjects_*.py")):
        module = importlib.import_module(path.stem)
        found += [(placed(subject), getattr(module, "DIFFERENTIABLE", False)) for subject in module.SUBJECTS]
    return found


def placed(subject: Callable) -> Callable:
    """A subject that also gives the ``device`` and ``dtype`` that its call takes, so that they are spoiled too."""

    def drawn(rng: random.Random) -> tuple[Callable, dict]:
        call, args = subject(rng)
        return call, getattr(call, "places", {}) | args

    return drawn


def _spread(t: torch.Tensor) -> torch.Tensor:
    return torch.stack([t, t], -1)[..., 0]


def _beyond(t: torch.Tensor) -> torch.Tensor:
    return torch.empty(1, device="meta", dtype=t.dtype).expand(2**31 + 1, *t.shape[1:] or (1,))


def _moved(t: torch.Tensor, value: float, step: int) -> torch.Tensor:
    """``value`` throughout a floating tensor, ``step`` added to integers, the opposite of truth values."""
    if t.dtype in FLOATS:
        return torch.full_like(t, value)
    return ~t if t.dtype == torch.bool else t + step


# What becomes of a tensor: the same values stored otherwise, other values, other kinds.
SPOILED: tuple[Callable[[random.Random, torch.Tensor], object], ...] = (
    lambda rng, t: _spread(t) if t.dim() else t,
    lambda rng, t: t.mT.contiguous().mT if t.dim() >= 2 else t,
    lambda rng, t: t[:1].expand(t.shape) if t.dim() and t.shape[0] else t,
    lambda rng, t: t.to("meta"),
    lambda rng, t: _beyond(t),
    lambda rng, t: t[:0] if t.dim() else t,
    lambda rng, t: t[..., :0] if t.dim() else t,
    lambda rng, t: t[1:] if t.dim() else t,
    lambda rng, t: torch.cat([t, t]) if t.dim() else t,
    lambda rng, t: t.unsqueeze(0),
    lambda rng, t: t.to(rng.choice((*FLOATS, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool))),
    lambda rng, t: _moved(t, torch.nan, -1),
    lambda rng, t: _moved(t, torch.inf, 2**20),
    lambda rng, t: _moved(t, -torch.inf, 2**31),
    lambda rng, t: t * 0 if t.dtype in (*FLOATS, torch.int32, torch.int64) else t,
    lambda rng, t: t.flip(0) if t.dim() else t,
    lambda rng, t: t.detach().requires_grad_() if t.dtype in FLOATS else t,
    lambda rng, t: t.to_sparse() if t.dtype in FLOATS else t,
    lambda rng, t: t.tolist(),
    lambda rng, t: None,
    lambda rng, t: "text",
)
# Numbers of many sizes and kinds; dtypes and devices that nothing is computed in or on; everything else.
OTHERS = (
    *(-1, 0, 2**31, 2**62, 2**63, 10**400, 1.5, 1e308, float("nan"), Fraction(1, 3)),
    *(torch.int64, torch.complex64, torch.float8_e4m3fn, torch.device("cuda", 99)),
    *(None, True, "text", [1], (16, 16), torch.ones(2), torch.tensor(0.5)),
)


def spoil(rng: random.Random, value: object) -> tuple[object, str]:
    """A spoilt version of a value, and the name of the field that was changed, ``""`` if it is the value itself."""
    if isinstance(value, torch.Tensor):
        try:
            return rng.choice(SPOILED)(rng, value), ""
        except (NotImplementedError, RuntimeError):  # torch lacks the operation for the dtype
            return None, ""
    if is_dataclass(value) and not isinstance(value, type) and rng.random() < 0.9:
        field = rng.choice(fields(value)).name
        if rng.random() < 0.15 and isinstance(getattr(value, field), torch.Tensor) and getattr(value, field).numel():
            # A structure that was right when it was made, and whose tensor is written to afterwards.
            overwrite(rng, getattr(value, field))
            return value, field
        inner, deeper = spoil(rng, getattr(value, field))
        return replace(value, **{field: inner}), deeper or field
    if isinstance(value, dict) and value:
        key = rng.choice(sorted(value))
        inner, deeper = spoil(rng, value[key])
        return {**value, key: inner}, deeper or key
    if isinstance(value, tuple) and any(isinstance(part, torch.Tensor) for part in value) and rng.random() < 0.9:
        at = rng.randrange(len(value))
        inner, deeper = spoil(rng, value[at])
        return (*value[:at], inner, *value[at + 1 :]), deeper
    return rng.choice(OTHERS), ""


def overwrite(rng: random.Random, tensor: torch.Tensor) -> None:
    """Another value at one place of a tensor that is not empty."""
    with torch.no_grad():
        tensor.detach()[tuple(rng.randrange(size) for size in tensor.shape)] = rng.choice((-1, 1, 100))


def names_in(value: object) -> Iterator[str]:
    """Names that an error in a structure may speak of."""
    if is_dataclass(value):
        for field in fields(value):
            yield field.name.lstrip("_")
            yield from names_in(getattr(value, field.name))
    elif isinstance(value, dict):
        yield from (key for key in value if isinstance(key, str))


def tensors_of(result: object) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif is_dataclass(result):
        for field in fields(result):
            yield from tensors_of(getattr(result, field.name))
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from tensors_of(part)
    elif isinstance(result, dict):
        yield from tensors_of(list(result.values()))


def norms_of(tensors: Iterable[torch.Tensor]) -> Iterator[float]:
    for tensor in tensors:
        if tensor.dtype in FLOATS and on_cpu(tensor):
            yield float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))


def factors_of(args: object) -> Iterator[float]:
    """The learning rates and other factors among a call's arguments."""
    for name, value in args.items() if isinstance(args, dict) else ():
        if name.endswith(("lr", "alpha", "scale")) and isinstance(value, (int, float)):
            yield value
        elif name == "optimizer" and is_dataclass(value):
            yield from factors_of(vars(value))


def on_cpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor has numbers here, one after the other."""
    return tensor.device.type == "cpu" and tensor.layout is torch.strided


def different(ours: object, theirs: object, args: object = ()) -> str | None:
    """The first difference between two results, or None; the rounding allowed is that of the coarsest of ``args``."""
    ours, theirs = list(tensors_of(ours)), list(tensors_of(theirs))
    if len(ours) != len(theirs):
        return f"{len(ours)} tensors, not {len(theirs)}"
    largest = max((norm for norm in norms_of(theirs) if math.isfinite(norm)), default=0.0)
    # With such a rate, a rounding error of one step is larger than the result of the next; such a factor leaves the
    # range of 16 bits; and float32 holds no sum of squares of such results.
    if largest > 1e18 or any(factor > 1e9 for factor in factors_of(args)):
        return None
    dtypes = {t.dtype for t in [*tensors_of(args), *ours] if t.dtype in TOLERANCE}
    coarsest = max(map(TOLERANCE.get, dtypes), default=0.0)
    # Steps between the numbers next to zero, of which an intermediate result may be off by some.
    grain = max((torch.finfo(dtype).tiny * torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    floor = 64 * grain
    if not dtypes & {torch.float16, torch.bfloat16} or max((t.numel() for t in theirs), default=0) <= 4:
        # Terms as large as the arguments may cancel, and leave their rounding errors; in 16 bits this is allowed for
        # only where a result has few numbers.
        eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
        floor += eps * max((norm for norm in norms_of(tensors_of(args)) if math.isfinite(norm)), default=0.0)
    found = (differs(one, other, largest, coarsest, floor) for one, other in zip(ours, theirs, strict=True))
    return next((f"tensor {place}: {wrong}" for place, wrong in enumerate(found) if wrong), None)


def differs(ours: torch.Tensor, theirs: torch.Tensor, largest: float, coarsest: float, grain: float) -> str | None:
    """How two tensors differ, or None if they agree.

    Args:
        ours: what was computed.
        theirs: what plain torch says.
        largest: the norm of the largest result, whose rounding may reach the others.
        coarsest: the least relative error that counts.
        grain: the least absolute error of an element that counts, in the mean.
    """
    if (ours.shape, ours.dtype, ours.device) != (theirs.shape, theirs.dtype, theirs.device):
        return (
            f"{tuple(ours.shape)} {ours.dtype} {ours.device}, not {tuple(theirs.shape)} {theirs.dtype} {theirs.device}"
        )
    if ours.device.type == "meta" or not ours.numel():
        return None
    if ours.dtype in (torch.int8, torch.int16):
        # The last bit of a number, or of its step, decides which of two codes it is rounded to.
        steps = (ours.int() - theirs.int()).abs()
        return None if steps.max() <= 1 and steps.sum() <= 1 + 0.1 * steps.numel() else "other codes"
    if ours.dtype not in TOLERANCE:
        same = (ours.double() == theirs.double()) | (ours.double().isnan() & theirs.double().isnan())
        return None if same.all() else "other numbers"
    error = scale = count = 0.0
    # In pieces: float64 copies of the largest tables take more memory than a case has.
    for one, other in zip(pieces_of(ours), pieces_of(theirs), strict=True):
        finite = other.isfinite()
        # A dense product has NaN where a sparse one leaves zero times infinity out.
        if (finite & ~one.isfinite()).any():
            return "not finite"
        finite &= one.isfinite()
        error = math.hypot(error, float((one - other)[finite].norm()))
        scale, count = math.hypot(scale, float(other[finite].norm())), count + int(finite.sum())
    if error <= coarsest * max(scale, largest / 100) + grain * count**0.5:
        return None
    return f"relative error {error / max(scale, 1e-30):.2g}"


def pieces_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The elements of a tensor in float64, a million at a time."""
    return (piece.double() for piece in tensor.detach().to_dense().reshape(-1).split(1 << 20))


def copied(value: object) -> object:
    """The arguments again, so that one call cannot change what the next sees, strides and all; structures as they are.

    Tensors beyond the memory of a case are left as they are.
    """
    if isinstance(value, torch.Tensor) and on_cpu(value):
        memory = value.detach().untyped_storage().clone()
        again = torch.empty(0, dtype=value.dtype).set_(memory, value.storage_offset(), value.shape, value.stride())
        return again.requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {name: copied(part) for name, part in value.items()}
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(copied(part) for part in value)
    return value


def attempt(call: Callable, args: dict, backend: str | None) -> object:
    torch.manual_seed(0)  # of parameters, and of dropout masks that the call draws itself
    if backend is None:
        return call(**args)
    with gossamer.backend(backend):
        return call(**args)


def unstable(call: Callable, args: dict, wanted: object) -> bool:
    """Whether plain torch contradicts itself where its numbers differ by rounding errors.

    A sum that cancels gives Adagrad a sign to step along, and a step of the size of codes rounds its own rounding
    error.
    """
    for seed in range(NUDGES):
        with nudging(seed):
            again = attempt(call, {name: nudged_in(copied(value)) for name, value in args.items()}, "reference")
        if different(again, wanted, args):
            return True
    return False


def nudged_in(value: object) -> object:
    """A value with its floating tensors and learning rate nudged; those of other structures are left."""
    if isinstance(value, torch.Tensor):
        return nudged(value.detach()).requires_grad_(value.requires_grad)
    if isinstance(value, Optimizer) and isinstance(value.lr, float):
        return replace(value, lr=float(nudged(torch.tensor(value.lr))))
    if isinstance(value, dict):
        return {name: nudged_in(part) for name, part in value.items()}
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(map(nudged_in, value))
    return value


def leaves_of(args: dict) -> list[torch.Tensor]:
    found = [t for t in tensors_of(args) if t.requires_grad and t.is_leaf]
    return list({id(t): t for t in found}.values())


def gradients(result: object, args: dict) -> list[torch.Tensor]:
    """The gradients of every leaf among the arguments, for a loss that weighs the outputs' elements differently."""
    outputs = [t for t in tensors_of(result) if t.requires_grad]
    leaves = leaves_of(args)
    if not outputs or not leaves:
        return []
    weights = [torch.linspace(0.5, 1.5, t.numel()).view(t.shape).to(t) for t in outputs]
    found = torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def unnamed(error: Exception, names: set[str]) -> bool:
    """Whether an error speaks of no name, nor of its singular or plural."""
    known = re.findall(r"\w+", str(error).lower())
    return not any(form.lower() in known for name in names for form in (name, name.removesuffix("s"), f"{name}s"))


def refused_by_torch(error: Exception) -> bool:
    """Whether memory is too small, or autograd forbids what was asked for, in torch's own words."""
    words = (
        "allocate",
        "bad_alloc",
        "Storage size calculation overflowed",
        "a leaf Variable that requires grad",
        "modified by an inplace operation",
    )
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


def run(seed: int, known: list[tuple[Callable, bool]]) -> dict | None:
    """One case; what is wrong with it, or None."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    subject, differentiable = rng.choice(known)
    call, args = subject(rng)
    fixed = getattr(call, "fixed", ())
    spoiled = rng.sample(sorted(args.keys() - set(fixed)), min(len(args) - len(fixed), rng.choice((0, 1, 1, 1, 2))))
    names = {"blocks", *args, *getattr(call, "signature", ())}
    names |= {name for value in args.values() for name in names_in(value)}
    about = {"seed": seed, "call": getattr(call, "__qualname__", str(call)), "spoiled": spoiled}
    try:
        if differentiable and rng.random() < 0.4:
            for tensor in tensors_of(args):
                if tensor.dtype in FLOATS and rng.random() < 0.7:
                    tensor.requires_grad_()
        for name in spoiled:
            args[name], field = spoil(rng, args[name])
            about["spoiled"] = [f"{n}.{field}" if n == name and field else n for n in about["spoiled"]]
            names |= {field} if field else set()
        given = {name: copied(value) for name, value in args.items()}
        ours = attempt(call, given, None)
    except Exception as error:
        if refused_by_torch(error):
            return None
        kind = "no name" if isinstance(error, (*ERRORS, *getattr(call, "errors", ()))) else "raw error"
        if kind == "no name" and not unnamed(error, names):
            return None
        return about | {"kind": kind, "what": f"{type(error).__name__}: {error}"[:300]}
    again = {name: copied(value) for name, value in args.items()}
    on_meta = any(t.device.type == "meta" for t in [*tensors_of(ours), *tensors_of(args)])
    wanted = None
    try:
        theirs = attempt(call, again, "reference")
        # Infinities are sums of infinities of both signs in one order, and not in another.
        if all(t.isfinite().all() for t in tensors_of([args, theirs]) if t.dtype in FLOATS and on_cpu(t)):
            wanted = gradients(theirs, again)
    except Exception as error:
        if "cannot serve" in str(error) or refused_by_torch(error) or on_meta:
            return None
        return about | {"kind": "accepted", "what": f"plain torch says {type(error).__name__}: {error}"[:300]}
    if wrong := different(ours, theirs, given):
        return None if unstable(call, args, theirs) else about | {"kind": "wrong result", "what": wrong}
    if not wanted:
        return None
    changeable = [t for t in tensors_of(given) if t.numel() and on_cpu(t)]
    if rng.random() < 0.15 and changeable:
        about["spoiled"] = [*about["spoiled"], "overwritten before the backward pass"]
        overwrite(rng, rng.choice(changeable))
    try:
        found = gradients(ours, given)
    except Exception as error:
        if refused_by_torch(error) or not unnamed(error, names):
            return None
        return about | {"kind": "raw error", "what": f"backward: {type(error).__name__}: {error}"[:300]}
    if wrong := different(found, wanted, given):
        return about | {"kind": "wrong gradient", "what": wrong}
    return None


def isolated(case: Callable[[int], dict | None], seeds: Iterable[int]) -> Iterator[dict | None]:
    """What a case finds for each of some seeds, run in forks of this process, which must have no other threads.

    A death is the finding of the seed that it met, and the seeds after it go on in another fork.
    """
    seeds = list(seeds)
    while seeds:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            _run_in_fork(case, seeds, write)
        os.close(write)
        with os.fdopen(read) as pipe:
            for line in pipe:
                yield json.loads(line)
                seeds.pop(0)
        _, status = os.waitpid(child, 0)
        if seeds:
            signalled = os.WIFSIGNALED(status)
            what = f"signal {os.WTERMSIG(status)}" if signalled else "an error in the fuzzer itself"
            yield {"seed": seeds.pop(0), "kind": "died", "what": what}


def _run_in_fork(case: Callable[[int], dict | None], seeds: list[int], write: int) -> NoReturn:
    try:
        with os.fdopen(write, "w") as pipe:
            for seed in seeds:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                signal.alarm(10 * SECONDS)
                print(json.dumps(case(seed)), file=pipe, flush=True)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(0)


def serve(first: int, last: int) -> None:
    """Run the cases of some seeds, a line after each."""
    torch.set_num_threads(1)
    # Sizes that nobody has memory for are refused by the allocator, not by the system. AddressSanitizer reserves
    # terabytes of addresses, and has a limit of its own.
    if "ASAN_OPTIONS" not in os.environ:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    known = subjects()
    # What calls load when they need it, once for all forks.
    for name in ("sympy", "torch.fx.experimental.symbolic_shapes", "gossamer.bench.harness.check"):
        importlib.import_module(name)
    for module in pkgutil.iter_modules(gossamer.cpu_kernels.__path__, "gossamer.cpu_kernels."):
        importlib.import_module(module.name)
    gc.freeze()
    for batch in range(first, last, BATCH):
        for found in isolated(lambda seed: run(seed, known), range(batch, min(batch + BATCH, last))):
            print(json.dumps(found), flush=True)


def fuzz(first: int, count: int, report: Callable[[dict], None] = lambda finding: None) -> list[dict]:
    """Run ``count`` cases from seed ``first`` on; returns the findings."""
    command = [sys.executable, "-W", "ignore", __file__, "--serve", str(first), str(first + count)]
    findings, done = [], 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            done += 1
            if finding := json.loads(line):
                findings.append(finding)
                report(finding)
    if process.returncode or done != count:
        raise RuntimeError(f"the fuzzer ended with status {process.returncode} after {done} of {count} cases")
    return findings


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--serve", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(*args.serve)
        return 0
    findings = fuzz(args.seed, args.cases, lambda finding: print(json.dumps(finding), flush=True))
    print(f"{args.cases} cases, {len(findings)} findings: {dict(Counter(f['kind'] for f in findings))}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
