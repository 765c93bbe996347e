"""Compile the CUDA kernels for Hopper, without a GPU, and show the resources that each needs.

``python tests/support/cuda_resources.py`` prints, for each kernel, registers and spilled bytes per thread, shared
memory a block, and how many wgmma (HGMMA) and local-memory instructions its machine code has, with violated limits
marked; the exit status is 1 when there are any. Compiled files are kept in ``build/cuda_resources`` until a source
changes.
"""

from __future__ import annotations

import glob
import os
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from gossamer import _C

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "cuda_resources"
# Registers per thread in a launch of 384 threads; warpgroups then exchange some.
MOST_REGISTERS = 168
NAME = re.compile(
    r"(?P<problem>RowProduct|WeightGradient)INS0_5ShapeI\d+(?P<dtype>__half|__nv_bfloat16)"
    r"Li(?P<m>\d+)ELi(?P<n>\d+)ELi(?P<stages>\d+)ELb(?P<ping_pong>\d)ELb(?P<copies>\d)ELi(?P<cluster>\d)EEE(?:NS0_\d+(?P<finish>[A-Za-z]+)I)?"
)


def build_script() -> dict:
    """The functions of setup.py; importing them builds nothing."""
    here = os.getcwd()
    os.chdir(ROOT)
    try:
        with mock.patch("setuptools.setup"):
            return runpy.run_path("setup.py")
    finally:
        os.chdir(here)


def unavailable() -> str | None:
    """Why the kernels cannot be compiled here, or None when they can."""
    if not (ROOT / "setup.py").is_file():
        return "there is no checkout"
    script = build_script()
    nvcc = script["find_nvcc"]()
    if nvcc is None:
        return "there is no nvcc"
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return None if "compute_90" in listed else "nvcc does not know sm_90a"


def tool(name: str) -> str | None:
    """Path of one of CUDA's binary tools: the one on the search path, or the one that comes with Triton."""
    if found := shutil.which(name):
        return found
    try:
        import triton
    except ImportError:
        return None
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(bundled) if bundled.is_file() else None


def compile_source(script: dict, source: str) -> tuple[str, Path]:
    """The report of ptxas on a source's kernels, and their machine code, of this checkout's build if it has them."""
    made = [FOLDER / f"{Path(source).name}.o", *Path("build").glob(f"objects.*/*/{source}.o")]
    target = next((path for path in made if not script["out_of_date"](path, source)), made[0])
    script["compile_cuda_source"](script["find_nvcc"](), source, target, [script["HOPPER_GENCODE"]])
    return target.with_suffix(".txt").read_text(), target


def count_instructions(machine_code: Path) -> dict[str, dict[str, int]]:
    """By kernel, the number of wgmma and local-memory instructions and of faults in their use; empty without a tool."""
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        return {}
    path = os.pathsep.join([str(Path(nvdisasm).parent), os.environ.get("PATH", "")])
    command = [cuobjdump, "-sass", str(machine_code)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}).stdout
    counts = {}
    for part in text.split("Function : ")[1:]:
        name = part.split(None, 1)[0]
        wanted = {"hgmma": r"\bHGMMA\.", "local": r"\b(?:LDL|STL)\b", "setmaxreg": r"\bUSETMAXREG\b"}
        counts[name] = {key: len(re.findall(pattern, part)) for key, pattern in wanted.items()}
        counts[name]["touched"] = touched_in_flight(part)
    return counts


def touched_in_flight(code: str) -> int:
    """Instructions that name an accumulator of a wgmma before the wait for all of them, in the order of the code."""
    found, in_flight = 0, set()
    for line in re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(.*?);", code, re.MULTILINE):
        if product := re.search(r"HGMMA\.64x(\d+)x16\S* R(\d+),", line):
            first = int(product[2])
            in_flight |= set(range(first, first + int(product[1]) // 2))
        elif re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0\b", line):
            in_flight = set()
        elif in_flight & set(map(int, re.findall(r"\bR(\d+)\b", line))):
            found += 1
    return found


def report() -> list[dict]:
    """One row for each kernel, with ``error`` naming the limits it breaks."""
    script = build_script()
    FOLDER.mkdir(parents=True, exist_ok=True)
    here = os.getcwd()
    os.chdir(ROOT)
    try:
        sources = sorted(glob.glob(script["HOPPER_SOURCES"]))
        with ThreadPoolExecutor(int(os.environ.get("GOSSAMER_BUILD_JOBS", 0)) or os.cpu_count()) as pool:
            compiled = list(pool.map(lambda source: compile_source(script, source), sources))
    finally:
        os.chdir(here)
    return [row for source, (log, code) in zip(sources, compiled, strict=True) for row in _rows(source, log, code)]


def _rows(source: str, log: str, machine_code: Path) -> list[dict]:
    counts = count_instructions(machine_code)
    warnings = [line for line in log.splitlines() if re.search(r"warning|Performance Loss|\(C7\d\d\d\)", line)]
    rows = []
    for part in log.split("Compiling entry function '")[1:]:
        mangled = part.split("'", 1)[0]
        name = NAME.search(mangled)
        if name is None:
            raise RuntimeError(f"{source}: a kernel of an unknown form: {mangled}")
        shape = tuple(int(name[key]) for key in ("m", "n", "stages"))
        row = {
            "source": source,
            "kernel": name["finish"] or name["problem"],
            "dtype": name["dtype"].removeprefix("__nv_").removeprefix("__"),
            "tile": f"{shape[0]}x{shape[1]}, {shape[2]} stages",
            "form": f"{'ping-pong' if name['ping_pong'] == '1' else 'cooperative'}"
            f"{', chunk copies' if name['copies'] == '1' else ''}{', paired' if name['cluster'] == '2' else ''}",
            "registers": int(re.search(r"Used (\d+) registers", part)[1]),
            "spills": sum(map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part).groups())),
            "shared": _C.hopper_logic.shared_bytes(*shape),
        } | counts.get(mangled, {})
        faults = list(warnings)
        if row["spills"]:
            faults.append(f"spills {row['spills']} bytes a thread")
        if row["registers"] > MOST_REGISTERS:
            faults.append(f"{row['registers']} registers are more than {MOST_REGISTERS}")
        if row["shared"] > _C.hopper_logic.SHARED_LIMIT:
            faults.append(f"shared memory {row['shared']} is over the limit {_C.hopper_logic.SHARED_LIMIT}")
        if counts and (not row["hgmma"] or row["local"] or row["setmaxreg"] != 2):
            faults.append("no wgmma, use of local memory, or warpgroups that do not exchange registers")
        if counts and row["touched"]:
            faults.append(f"{row['touched']} instructions touch accumulators that are being computed")
        rows.append(row | {"error": "; ".join(faults)})
    return rows


def main() -> int:
    """Command line; returns the exit status."""
    if reason := unavailable():
        print(reason, file=sys.stderr)
        return 1
    rows = report()
    print(f"{'kernel':18} {'dtype':8} {'tile':18} {'form':25} regs spill  shared HGMMA local")
    for row in rows:
        print(
            f"{row['kernel']:18} {row['dtype']:8} {row['tile']:18} {row['form']:25} {row['registers']:4} "
            f"{row['spills']:5} {row['shared']:7} {row.get('hgmma', '-'):>5} {row.get('local', '-'):>5}"
        )
        if row["error"]:
            print(f"  ERROR: {row['error']}")
    return 1 if any(row["error"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
