"""The environment of this process: versions, devices, threads; printed by ``gossamer info``, stored by benchmarks."""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from gossamer import _backend

PACKAGES = ("gossamer", "torch", "triton", "numpy", "transformers")
ISA_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "sve",
    "bf16",
)


def version(package: str) -> str | None:
    """The installed version of a distribution, or None; for torch, the version that torch itself reports."""
    if package == "torch":
        return str(torch.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n", 1)[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def commit() -> str | None:
    """The commit of the checkout that holds this code, with ``+changes`` if files differ from it; None outside a
    checkout.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or not (root / "csrc").is_dir():
        return None
    try:
        head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "-C", root, "status", "--porcelain", "-uno"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if changed.stdout else "")


def environment() -> dict:
    """Versions, devices, threads and the date, as plain values."""
    cpu = _cpuinfo()
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": found.name,
                "capability": f"{found.major}.{found.minor}",
                "memory_bytes": found.total_memory,
                "multiprocessors": found.multi_processor_count,
            }
        )
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "system": platform.platform(),
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "native_isa": None if _backend.native_unavailable() else importlib.import_module("gossamer._C").isa(),
        "missing_isa": _backend.missing_isa(),
        "cuda": torch.version.cuda,
        "gpus": gpus,
    }


def served_by() -> dict[str, dict[str, dict]]:
    """Device type -> primitive -> the backend that serves it here, and the reason why each other one does not.

    A device that this machine lacks is not listed.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {device: {name: _serving(name, device) for name in _backend.primitives()} for device in devices}


def _serving(primitive: str, device: str) -> dict:
    reasons = {name: _backend.unavailable(name, device) for name in _backend.BACKENDS}
    for name, family in _backend.FAMILIES.items():
        if primitive not in family.primitives:
            reasons[name] = reasons[name] or f"it has no {family.title} of {primitive}"
        elif not reasons[name]:
            reasons[name] = _backend.refuses(name, primitive, torch.empty(0, dtype=torch.bfloat16, device=device))
    return {
        "serves": _backend.resolve(primitive, torch.empty(0, device=device)),
        "unavailable": {name: reason for name, reason in reasons.items() if reason},
    }


def tile_tables() -> dict:
    """The folder of the user's tile tables, and the tables in use for each GPU: their entries, or why one is
    ignored.
    """
    from gossamer.triton_kernels import tile_tables

    tables = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = tile_tables.cuda_device(index)
        for source in tile_tables.sources(device):
            found = {"path": str(source.path), "entries": len(source.entries), "ignored": source.fault}
            tables.append({"device": device.name, **found})
    return {"folder": str(tile_tables.cache_folder()), "tables": tables}
