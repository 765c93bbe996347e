"""Every header of the native code compiles by itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests" / "support" / "cuda_on_host"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
HEADERS = sorted(path for kind in ("h", "cuh") for path in (ROOT / "csrc").rglob(f"*.{kind}"))

if COMPILER is None or not (ROOT / "csrc").is_dir():
    pytest.skip("there is no C++ compiler, or no checkout", allow_module_level=True)


def fault(text: str, *options: str) -> str:
    """The first error of a source, parsed without code being made; empty where there is none."""
    import pybind11

    # Files with PTX are stood for by those of the model.
    folders = [MODEL, ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = ["-std=c++20", "-w", "-fopenmp", "-fsyntax-only", "-DGOSSAMER_WITH_CUDA=1", *(f"-I{f}" for f in folders)]
    command = [COMPILER, *flags, *options, "-x", "c++", "-"]
    done = subprocess.run(command, input=text, text=True, capture_output=True)
    return "" if done.returncode == 0 else next((ln for ln in done.stderr.splitlines() if "error" in ln), done.stderr)


def begins_with(text: str) -> str | None:
    """The header of this project that a header includes before any other code."""
    code = (line for line in text.splitlines() if line and not line.startswith("//") and line != "#pragma once")
    found = re.match(r'#include "([^"]+)"', next(code, ""))
    return found and found[1]


def test_each_header_compiles_by_itself():
    """A header compiles, and its guard makes a second inclusion in the same source harmless.

    A header that another one includes before any other code is compiled with that one, and not by itself.
    """
    texts = {str(path.relative_to(ROOT / "csrc")): path.read_text() for path in HEADERS}
    assert len(texts) > 60
    begun = {begins_with(text) for text in texts.values()}
    assert [name for name in texts if name in begun and "\n#pragma once\n" not in texts[name]] == []
    alone = [name for name in texts if name not in begun]

    def check(name: str) -> str:
        include = f'#include "{name}"\n'
        return fault(include + include)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(alone, pool.map(check, alone), strict=True))
    assert {name: error for name, error in found.items() if error} == {}


def test_headers_that_begin_with_another():
    assert begins_with('// A comment.\n#pragma once\n\n#include "cpu/vec.h"\n#include <vector>\n') == "cpu/vec.h"
    assert begins_with('#pragma once\n#include <vector>\n#include "cpu/vec.h"\n') is None
    assert begins_with('#define A\n#include "cpu/vec.h"\n') is None and begins_with("") is None


@pytest.mark.parametrize("part", sorted(path.stem for path in (ROOT / "csrc" / "cpu" / "kernels").glob("*.cpp")))
def test_only_kernels_come_after_a_target(part):
    """The linker keeps one copy of an inline function that several sets compile, so every processor must run it."""
    source = ROOT / "csrc" / "cpu" / "kernels" / f"{part}.cpp"
    command = [COMPILER, "-std=c++20", "-fopenmp", "-E", f"-I{ROOT / 'csrc'}", str(source)]
    done = subprocess.run(command, text=True, capture_output=True, check=True)
    entered = re.findall(r'^# 1 "([^"<]+)" 1', done.stdout, re.M)
    after = [Path(path) for path in entered[entered.index(str(ROOT / "csrc" / "cpu" / "isa_generic.h")) + 1 :]]
    assert ROOT / "csrc" / "cpu" / "vec.h" in after
    opening = "namespace gossamer::GOSSAMER_ISA {"
    kernels = [path for path in after if ROOT in path.parents and opening in path.read_text()]
    assert [str(path) for path in after if path not in kernels and path.name != "isa_end.h"] == []


def test_a_header_that_leans_on_others_is_found():
    assert "error" in fault("inline int64_t twice(int64_t x) { return 2 * x; }\n")
