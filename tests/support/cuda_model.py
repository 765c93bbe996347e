"""CUDA kernels on the host: their sources compiled by the C++ compiler against a model of the hardware.

In place of CUDA's headers and of the files that contain PTX, ``tests/support/cuda_on_host`` has models of a block's
threads, mbarriers, the copy engine, chunk copies and wgmma. Everything else is the code that runs on a GPU: schedule,
producers, pipeline, products, epilogues, the counting sort, the hash table, launches and bindings.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from cuda_resources import build_script

import gossamer.cuda_kernels.dispatch
import gossamer.cuda_kernels.expert_mlp
import gossamer.cuda_kernels.grouped_matmul
import gossamer.cuda_kernels.hash_table
from gossamer import _backend

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests" / "support" / "cuda_on_host" / "module.cpp"
FOLDER = ROOT / "build" / "cuda_on_host"


def build() -> ModuleType:
    """Compile the model if a source has changed, and import it; skip the test if there is no compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or not (ROOT / "setup.py").is_file():
        pytest.skip("there is no C++ compiler, or no checkout")
    import pybind11

    FOLDER.mkdir(parents=True, exist_ok=True)
    target = FOLDER / f"cuda_on_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [
        ROOT / "tests" / "support" / "cuda_on_host",
        ROOT / "csrc",
        pybind11.get_include(),
        sysconfig.get_paths()["include"],
    ]
    # _FORTIFY_SOURCE would make the C library refuse longjmp between the stacks of a kernel's threads.
    flags = "-O1 -w -std=c++20 -U_FORTIFY_SOURCE -shared -fPIC -fvisibility=hidden -DGOSSAMER_WITH_CUDA=1 -MD".split()
    command = [compiler, *flags, *(f"-I{folder}" for folder in includes)]
    if build_script()["out_of_date"](target, SOURCE):
        # Another process may be building the module too, or have it open, so it is replaced as a whole.
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            made = Path(folder, target.name)
            command += ["-MF", str(made.with_suffix(".d")), str(SOURCE), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            for suffix in (".d", made.suffix):
                os.replace(made.with_suffix(suffix), target.with_suffix(suffix))
    spec = importlib.util.spec_from_file_location("cuda_on_host", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``gossamer.backend("cuda")`` compute on CPU tensors by the model."""
    really = _backend.unavailable
    monkeypatch.setattr(_backend, "unavailable", lambda name, device: None if name == "cuda" else really(name, device))
    monkeypatch.setattr(_backend, "hopper_refuses", lambda x: None)
    kernels = gossamer.cuda_kernels
    for launchers in (kernels.dispatch, kernels.hash_table, kernels.grouped_matmul, kernels.expert_mlp):
        monkeypatch.setattr(launchers, "_C", module)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
