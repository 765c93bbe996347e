"""Compile kernels for an architecture without a GPU, and report the resources they need.

A case is ``(kernel, signature, constexprs, options)``: types of the runtime arguments, with ``":16"`` after one that
is divisible by 16, and tuples of types and of compile-time values for arguments in groups; values of the compile-time
arguments, None for a pointer that is not passed; and warps and stages.
An argument that is a named tuple has one of types for its signature, with values in it where it is constant.
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
        registers: of a thread.
        spills: bytes that a thread spills to local memory.
        shared: bytes of shared memory of a program.
        tensor_memory: columns of tensor memory of a program, on sm_100.
        matrix_instruction: the one that its products use; empty where it has none.
    """

    registers: int
    spills: int
    shared: int
    tensor_memory: int
    matrix_instruction: str


def compile_case(case: tuple, arch: int) -> Compiled:
    """Compile one case; raises what the compiler raises, and ValueError where the case does not fit the kernel."""
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
    """The types in a signature, those in groups too."""

    def types(described: object) -> list[str]:
        if isinstance(described, tuple):
            return [name for part in described for name in types(part)]
        return [described] if isinstance(described, str) else []

    return types(tuple(signature.values()))


def _registers(compiled, arch: int) -> tuple[int, int]:
    """Registers per thread, and bytes a thread that they spill to local memory."""
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
