"""Compile the Triton kernels ahead of time, without a GPU, and show the resources that each needs.

``python tests/support/aot_triton.py --arch 90 grouped_matmul`` prints, for each kernel in its default tiles, registers
and spilled bytes per thread and shared memory a program, with violated limits marked; the exit status is 1 when there
are any. Without ``--arch`` it compiles all cases for sm_80, sm_90 and sm_100, and for sm_89 and sm_120, whose programs
have only 99 KiB of shared memory, the first case of each kernel and format of weights. Without a module it compiles all
modules. ``--brief`` leaves out cases with the tile, format and dtype of an earlier case, such as those that differ only
in activation or layout, and on architectures other than sm_90 also cases that differ only in dtype. It takes the
numbers of sm_89 from the same case on sm_80, which needs the same shared memory and nearly as many registers.

Each module of ``triton_kernels/`` that has kernels describes its default launches in a plain function::

    def aot_cases(arch: int) -> list[tuple[kernel, dict, dict, dict]]

with ``arch`` of ARCHS or SMALL_ARCHS, and one ``(kernel, signature, constexprs, options)`` for each variant worth
compiling:

* ``signature`` gives each runtime argument its type, ``"*bf16"``, ``"i32"``, ``"fp32"``; with ``":16"`` appended it
  counts as divisible by 16, as aligned pointers and round sizes do when Triton launches; an argument that is a named
  tuple has a named tuple of types, with values for parts that are constant;
* ``constexprs`` gives each ``tl.constexpr`` parameter its value, and None to a pointer that is not passed;
* ``options`` is ``{"num_warps": ..., "num_stages": ...}``.

``AOT_SPILLS`` of a module names the kernels that may spill in float32, with the bytes that a thread may spill.

Kernels are the ``@triton.jit`` functions whose names end in ``_kernel``; each must have a case.
"""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)  # read at import: interpreted kernels cannot be compiled

import argparse
import functools
import importlib
import json
import multiprocessing
import re
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType

from triton.runtime.jit import JITFunction

import gossamer.triton_kernels
from gossamer.triton_kernels import ahead_of_time
from gossamer.triton_kernels.ahead_of_time import flat_types
from gossamer.triton_kernels.tiles import shared_limit

ARCHS = (80, 90, 100)
# Cards with the least shared memory, for which only the first case of each kernel and format of weights is compiled.
SMALL_ARCHS = (89, 120)
# Columns of tensor memory of an sm_100 multiprocessor.
TENSOR_MEMORY = 512


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"gossamer.triton_kernels.{name}")


def _kernels(name: str) -> set[str]:
    module = _module(name)
    jitted = {k: v for k, v in vars(module).items() if isinstance(v, JITFunction) and k.endswith("_kernel")}
    return {k for k, v in jitted.items() if v.__module__ == module.__name__}


def modules() -> list[str]:
    """Names of the modules that define kernels."""
    folder = Path(gossamer.triton_kernels.__file__).parent
    names = sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")
    return [name for name in names if _kernels(name)]


@functools.cache
def _cases(module_name: str, arch: int) -> list[tuple]:
    describe = getattr(_module(module_name), "aot_cases", None)
    return describe(arch) if describe else []


def uncovered(module_name: str, arch: int) -> list[str]:
    """Kernels of a module for which ``aot_cases`` has no case."""
    return sorted(_kernels(module_name) - {case[0].__name__ for case in _cases(module_name, arch)})


def _kind(case: tuple, arch: int) -> tuple:
    """The key of cases that stand for each other: kernel, tile, ways of loading and decoding, and for sm_90 dtypes."""
    kernel, signature, constexprs, options = case
    dtypes = sorted({t.split(":")[0] for t in flat_types(signature) if t.startswith("*") and arch == 90})
    tile = [(k, v) for k, v in constexprs.items() if k.startswith("BLOCK") or k.endswith("TMA") or k == "FORMAT"]
    return kernel.__name__, *dtypes, *tile, *options.items()


def _chosen(module_name: str, arch: int, brief: bool = False) -> list[int]:
    """The indices of the cases to compile: all, the first of each kind, or the first of each kernel."""
    cases = _cases(module_name, arch)
    if arch in SMALL_ARCHS:
        kinds = [(kernel.__name__, constexprs.get("FORMAT")) for kernel, _, constexprs, _ in cases]
    elif brief:
        kinds = [_kind(case, arch) for case in cases]
    else:
        kinds = list(range(len(cases)))
    return [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]


def _label(signature: dict, constexprs: dict) -> str:
    dtype = next((t.split(":")[0][1:] for t in flat_types(signature) if re.match(r"\*(fp|bf)", t)), "")
    return " ".join([dtype, *(f"{k}={v}" for k, v in constexprs.items() if v is not None)]).strip()


def _as_on_sm80(module_name: str, number: int) -> int | None:
    """The index of the brief sm_80 case whose program a case of sm_89 shares; None if there is none."""
    kernel, signature, *rest = _cases(module_name, 89)[number]
    if any("fp8" in kind for kind in flat_types(signature)):
        return None
    same = (kernel, signature, *rest)
    return next((i for i in _chosen(module_name, 80, True) if tuple(_cases(module_name, 80)[i]) == same), None)


def _allowed_spills(row: dict) -> int:
    in_float32 = row["case"].startswith("fp32")
    return getattr(_module(row["module"]), "AOT_SPILLS", {}).get(row["kernel"], 0) if in_float32 else 0


def _problems(row: dict, numbers: dict) -> str:
    problems, arch = [], row["arch"]
    if numbers["spills"] > _allowed_spills(row):
        problems.append(f"spills {numbers['spills']} bytes a thread")
    if numbers["shared"] > shared_limit(arch):
        problems.append(f"shared memory {numbers['shared']} over the limit {shared_limit(arch)}")
    return "; ".join(problems)


def compile_case(module_name: str, arch: int, number: int) -> dict:
    """Compile one case; returns its row of the table, with ``error`` set when it breaks a limit or does not compile."""
    kernel, signature, constexprs, options = _cases(module_name, arch)[number]
    row = {"module": module_name, "kernel": kernel.__name__, "arch": arch, "case": _label(signature, constexprs)}
    try:
        compiled = ahead_of_time.compile_case((kernel, signature, constexprs, options), arch)
    except Exception:  # any failure of the compiler is a result to show
        return row | {"error": traceback.format_exc()}
    numbers = {
        "registers": compiled.registers,
        "spills": compiled.spills,
        "shared": compiled.shared,
        "mma": compiled.matrix_instruction,
    }
    problems = _problems(row, numbers)
    if compiled.tensor_memory > TENSOR_MEMORY:
        # The compiler then returns an empty program, whose numbers would pass the limits.
        problems = f"{compiled.tensor_memory} columns of tensor memory, more than {TENSOR_MEMORY}; {problems}"
    return row | numbers | {"error": problems}


def compile_all(archs: list[int], names: list[str], jobs: int, brief: bool) -> list[dict]:
    """Compile every case of the modules for every architecture in ``jobs`` processes."""
    tasks = [(n, a, i) for n in names for a in archs for i in _chosen(n, a, brief)]
    shared = {(n, a, i): (n, 80, _as_on_sm80(n, i)) for n, a, i in tasks if brief and a == 89 and 80 in archs}
    shared = {task: source for task, source in shared.items() if source[2] is not None}
    tasks = [task for task in tasks if task not in shared]
    rows = []
    for name in names:
        for arch in archs:
            for kernel in uncovered(name, arch):
                rows.append(
                    {"module": name, "kernel": kernel, "arch": arch, "case": "", "error": "no case in aot_cases"}
                )
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        compiled = dict(zip(tasks, pool.map(compile_case, *zip(*tasks, strict=True)) if tasks else (), strict=True))
    for task, source in shared.items():
        row = compiled[source] | {"arch": task[1]}
        compiled[task] = row | ({"error": _problems(row, row)} if "registers" in row else {})
    return rows + list(compiled.values())


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("modules", nargs="*", help="modules of triton_kernels/ (default: all)")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS + SMALL_ARCHS, help="default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--brief", action="store_true", help="leave out cases that are like others")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    args = parser.parse_args()
    rows = compile_all(args.arch or [*ARCHS, *SMALL_ARCHS], args.modules or modules(), args.jobs, args.brief)
    if args.json:
        json.dump(rows, sys.stdout)
        return 0
    print(f"{'kernel':32} {'arch':>4} {'regs':>4} {'spill':>5} {'shared':>7}  {'mma':15} case")
    for row in rows:
        if "registers" in row:
            sizes = f"{row['registers']:4} {row['spills']:5} {row['shared']:7}  {row['mma']:15}"
        else:
            sizes = f"{'-':>4} {'-':>5} {'-':>7}  {'':15}"
        print(f"{row['kernel']:32} {row['arch']:4} {sizes} {row['case']}")
        if row["error"]:
            print(f"  ERROR: {row['error']}")
    return 1 if any(row["error"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
