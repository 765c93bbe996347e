"""Compile kernels for an architecture without a GPU, and report the resources they need.

A case is ``(kernel, signature, constexprs, options)``. The signature holds the types of runtime arguments, with
``":16"`` after one that is divisible by 16. An argument that is a tuple has a tuple of types, a named tuple has a named
tuple of them, and either may hold values for parts that are constant. ``constexprs`` holds the values of compile-time
arguments, None for a pointer that is not passed, and ``options`` warps and stages.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource


@dataclass(frozen=True)
class Compiled:
    """The resources of a compiled kernel.

    Attributes:
        registers: registers per thread.
        spills: bytes that a thread spills to local memory.
        shared: bytes of shared memory per program.
        tensor_memory: columns of tensor memory per program, on sm_100.
        matrix_instruction: the matrix instruction of its products; empty if it uses none.
    """

    registers: int
    spills: int
    shared: int
    tensor_memory: int
    matrix_instruction: str


def compile_case(case: tuple, arch: int) -> Compiled:
    """Compile one case; passes on errors of the compiler, and raises ValueError if the case does not fit the kernel."""
    kernel, signature, constexprs, options = case
    source = _source(kernel, signature, constexprs)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(options))
    ptx = compiled.asm["ptx"]
    instruction = next((name for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if name in ptx), "")
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    return Compiled(*_registers(compiled, arch), compiled.metadata.shared, columns, instruction)


def _types(described: object, path: tuple[int, ...], attrs: dict, constants: dict) -> object:
    """The type of an argument, or of each in a group; alignment goes to attrs, values to constants."""
    if isinstance(described, tuple):
        types = [_types(part, (*path, i), attrs, constants) for i, part in enumerate(described)]
        # A kernel reads the parts of a named tuple by their names.
        return type(described)(*types) if hasattr(described, "_fields") else tuple(types)
    if not isinstance(described, str):
        constants[path] = described
        return "constexpr"
    kind, _, divisor = described.partition(":")
    if divisor:
        attrs[path] = [["tt.divisibility", int(divisor)]]
    return kind


def _source(kernel, signature: dict, constexprs: dict) -> ASTSource:
    types, attrs, constants = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constexprs:
            types[name], constants[(i,)] = "constexpr", constexprs[name]
        elif name in signature:
            types[name] = _types(signature[name], (i,), attrs, constants)
        else:
            raise ValueError(f"{kernel.__name__}: aot_cases gives argument {name!r} neither a type nor a value")
    unknown = (signature.keys() | constexprs.keys()) - set(kernel.arg_names)
    if unknown:
        raise ValueError(f"{kernel.__name__} has no arguments {sorted(unknown)}, which aot_cases names")
    return ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attrs)


def flat_types(signature: dict) -> list[str]:
    """The types in a signature, including those in tuples."""

    def types(described: object) -> list[str]:
        if isinstance(described, tuple):
            return [name for part in described for name in types(part)]
        return [described] if isinstance(described, str) else []

    return types(tuple(signature.values()))


def _registers(compiled, arch: int) -> tuple[int, int]:
    """Registers per thread, and bytes that a thread spills to local memory."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
        if int(usage["STACK"]) + int(usage["LOCAL"]) == 0:
            return int(usage["REG"]), 0
        # Some releases reserve a stack without spills; the assembler's report tells them apart.
        ptx.write_text(compiled.asm["ptx"])
        target = re.search(r"^\.target (sm_\w+)", compiled.asm["ptx"], re.MULTILINE)[1]
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", ptx, "-o", cubin]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        return int(usage["REG"]), sum(int(n) for n in re.findall(r"(\d+) bytes spill", text))
