"""Which kernels serve a call: chosen by device, or forced with :func:`backend` in tests and benchmarks."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from types import ModuleType

import torch
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad
from torch.compiler import is_compiling

BACKENDS = ("reference", "native", "triton", "cuda")

# Kernel modules by backend. "reference" has none: public functions run their plain-torch reference for it.
_FAMILIES = {"native": "gossamer.cpu_kernels", "triton": "gossamer.triton_kernels", "cuda": "gossamer.cuda_kernels"}

# Primitives that have CUDA kernels for Hopper GPUs and 16-bit dtypes alone.
HOPPER_PRIMITIVES = ("grouped_matmul", "expert_mlp")
# Primitives that have CUDA kernels; Triton serves the others on a GPU.
CUDA_PRIMITIVES = ("dispatch", "hash_table", *HOPPER_PRIMITIVES)

# Primitives that have no Triton kernels.
NO_TRITON_PRIMITIVES = ("hash_table",)

# A plain global, not a ContextVar: torch.compile guards on it, and it is read in the public function, never in a kernel
# or in the backward pass, so the autograd threads need not see it.
_forced: str | None = None


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one kernel family inside a ``with`` block, for the whole process.

    Args:
        name: ``"reference"`` (plain torch), ``"native"`` (C++ on the CPU), ``"triton"``, or ``"cuda"``.

    Raises:
        ValueError: for another name; and from a primitive called inside the block, when that family cannot serve the
            tensors it is given (the message says why).
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def _why_no_native() -> str | None:
    if importlib.util.find_spec("gossamer._C") is None:
        return "gossamer was installed without its compiled extension (no C++ compiler at build time)"
    try:
        importlib.import_module("gossamer._C")
    except ImportError as error:
        return f"gossamer._C does not load: {error}"
    return None


def _why_no_cuda_kernels() -> str | None:
    if _NO_NATIVE:
        return _NO_NATIVE
    if not importlib.import_module("gossamer._C").with_cuda:
        return "gossamer was built without CUDA sources (no nvcc at build time)"
    return None


# Found out once, at import: torch.compile cannot trace the machinery of imports, but reads constants.
_NO_NATIVE = _why_no_native()
_NO_TRITON = None if importlib.util.find_spec("triton") else "the package triton is not installed"
_NO_CUDA_KERNELS = _why_no_cuda_kernels()


def native_unavailable() -> str | None:
    """Why the compiled extension ``gossamer._C`` cannot be used, or None when it can."""
    return _NO_NATIVE


def triton_unavailable() -> str | None:
    """Why Triton cannot be used, or None when it can."""
    return _NO_TRITON


def cuda_kernels_unavailable() -> str | None:
    """Why the compiled CUDA kernels cannot be used, or None when they can."""
    return _NO_CUDA_KERNELS


def hopper_refuses(x: torch.Tensor) -> str | None:
    """Why the CUDA kernels of ``HOPPER_PRIMITIVES`` cannot serve operands like ``x``, or None when they can."""
    if not x.is_cuda:
        return f"its kernels run on cuda, not on {x.device.type}"
    if not importlib.import_module("gossamer._C").with_hopper:
        return "gossamer was built without sm_90a among the CUDA architectures"
    if (capability := torch.cuda.get_device_capability(x.device)) != (9, 0):
        return f"its kernels are for compute capability 9.0, this GPU has {capability[0]}.{capability[1]}"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"its kernels multiply float16 and bfloat16, got {x.dtype}"
    return None


def check_served(primitive: str, backend_name: str, x: torch.Tensor, quantized: bool = False) -> None:
    """``x`` must be what the CUDA kernels of a primitive of ``HOPPER_PRIMITIVES`` take, where those are to serve it.

    They do not take quantised weights.

    A tracer does not ask; the kernels do when they run.
    """
    if backend_name != "cuda" or torch.compiler.is_compiling():
        return
    if reason := hopper_refuses(x) or ("its kernels take no quantised weights" if quantized else None):
        raise ValueError(f'gossamer.backend("cuda") cannot serve {primitive} on {x.device}: {reason}')


def unavailable(name: str, device_type: str) -> str | None:
    """Why the backend ``name`` cannot serve tensors on ``device_type``, or None when it can."""
    if name == "reference":
        return None
    if name == "native":
        return native_unavailable() if device_type == "cpu" else f"native kernels run on the CPU, not on {device_type}"
    if name == "triton":
        if device_type == "cuda" or (device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
            return triton_unavailable()
        return f"Triton kernels run on cuda (on the CPU only with TRITON_INTERPRET=1), not on {device_type}"
    return cuda_kernels_unavailable() if device_type == "cuda" else f"CUDA kernels run on cuda, not on {device_type}"


def _default(primitive: str, device_type: str) -> str:
    on_cuda = "cuda" if primitive in NO_TRITON_PRIMITIVES else "triton"
    preferred = {"cpu": "native", "cuda": on_cuda}.get(device_type, "reference")
    return "reference" if unavailable(preferred, device_type) else preferred


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation looks at what is computed, for which kernels have no rules."""
    if is_compiling():
        return False
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def resolve(primitive: str, tensor: torch.Tensor) -> str:
    """The backend that serves ``primitive`` for tensors like ``tensor``: the forced one, or the device's default.

    Plain torch serves under torch.func and forward-mode differentiation, where kernels would give no tangents.

    Raises:
        ValueError: the forced backend cannot serve this device, or kernels are forced under those.
    """
    device_type = tensor.device.type
    if device_type == "meta":
        return "native"
    if _transformed():
        if _forced in (None, "reference"):
            return "reference"
        raise ValueError(
            f'gossamer.backend("{_forced}") cannot serve {primitive} under torch.func or forward-mode differentiation: '
            "only plain torch has rules for them"
        )
    if _forced is None:
        return _default(primitive, device_type)
    if reason := unavailable(_forced, device_type):
        raise ValueError(f'gossamer.backend("{_forced}") cannot serve {primitive} on {tensor.device}: {reason}')
    if _forced == "cuda" and primitive not in CUDA_PRIMITIVES:
        raise ValueError(f'gossamer.backend("cuda") cannot serve {primitive}: only {CUDA_PRIMITIVES} have CUDA kernels')
    if _forced == "triton" and primitive in NO_TRITON_PRIMITIVES:
        raise ValueError(f'gossamer.backend("triton") cannot serve {primitive}: it has no Triton kernels')
    return _forced


@functools.cache
def kernels(backend_name: str, primitive: str) -> ModuleType:
    """The kernel module of ``primitive`` in a family, imported on first use; Triton's where CUDA kernels lack one."""
    if backend_name == "cuda" and primitive not in CUDA_PRIMITIVES:
        backend_name = "triton"
    return importlib.import_module(f"{_FAMILIES[backend_name]}.{primitive}")
