"""The choice of kernels for a call: by device, or forced with :func:`backend` in tests and benchmarks."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad
from torch.compiler import is_compiling

# A plain global, not a ContextVar: torch.compile guards on it. Only public functions read it, never kernels or backward
# passes, so autograd's threads need not see it.
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


# Determined once, at import: torch.compile cannot trace imports, but reads constants.
_NO_NATIVE = _why_no_native()
_NO_TRITON = None if importlib.util.find_spec("triton") else "the package triton is not installed"
_NO_CUDA_KERNELS = _why_no_cuda_kernels()


def missing_isa() -> str | None:
    """The best instruction set of this processor where the extension was compiled without its kernels, else None."""
    if _NO_NATIVE:
        return None
    native = importlib.import_module("gossamer._C")
    best = native.best_isa()
    return None if best in native.compiled_isas else best


if _MISSING_ISA := missing_isa():
    warnings.warn(
        f"gossamer was compiled without kernels for {_MISSING_ISA}, the best instruction set of this processor; "
        "install it here from source, or with GOSSAMER_ISAS=all, for faster ones",
        RuntimeWarning,
        stacklevel=2,
    )


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
    """The reason why the CUDA kernels for Hopper GPUs cannot multiply operands like ``x``, or None when they can."""
    if not x.is_cuda:
        return f"its kernels run on cuda, not on {x.device.type}"
    if not importlib.import_module("gossamer._C").with_hopper:
        return "gossamer was built without sm_90a among the CUDA architectures"
    if (capability := torch.cuda.get_device_capability(x.device)) != (9, 0):
        return f"its kernels are for compute capability 9.0, this GPU has {capability[0]}.{capability[1]}"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"its kernels multiply float16 and bfloat16, got {x.dtype}"
    return None


@dataclass(frozen=True)
class Served:
    """The weights and operands that a family's kernels of one primitive accept.

    Attributes:
        weights: sets of kinds of weights (:attr:`gossamer.ops._weights.Weight.kind`); one call may mix the kinds of one
            set. Empty for a primitive without weights.
        trained: the kinds of weights that may be present when gradients are computed.
        refuses: returns why the kernels cannot serve operands like a given tensor, or None when they can. It covers
            only what the requirements of the whole family do not; None if there is nothing more to check.
        by: if this family has no kernels of its own for the primitive but can be forced all the same, the family whose
            kernels run instead; else None.
    """

    weights: tuple[frozenset[str], ...] = ()
    trained: frozenset[str] = frozenset()
    refuses: Callable[[torch.Tensor], str | None] | None = None
    by: str | None = None


@dataclass(frozen=True)
class Family:
    """A family of kernels. Primitives that it does not serve are composed of other primitives, or run in plain torch.

    Attributes:
        name: the name that :func:`backend` takes.
        title: the name of its kernels in messages.
        devices: types of device that it serves.
        dtypes: floating dtypes that it serves.
        missing: returns why it cannot be used on this machine, or None when it can.
        primitives: name of a primitive -> what its kernels accept.
        interpreter: the environment variable that, set to 1, lets it serve the CPU too.
    """

    name: str
    title: str
    devices: tuple[str, ...]
    dtypes: frozenset[torch.dtype]
    missing: Callable[[], str | None]
    primitives: Mapping[str, Served]
    interpreter: str | None = None

    def runs_on(self, device_type: str) -> bool:
        """Whether it serves tensors on this type of device."""
        if device_type in self.devices:
            return True
        return self.interpreter is not None and device_type == "cpu" and os.environ.get(self.interpreter) == "1"


_FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16})
_DENSE, _QUANTIZED = frozenset({"dense"}), frozenset({"quantized"})
_UPDATED = frozenset({"dense", "dense + low rank"})
_ROUNDS = frozenset({"quantized", "quantized, int8 rows"})
_ANY = Served()
# Served by both the native and the Triton kernels.
_COMMON = {
    "activate": _ANY,
    "block_sparse": _ANY,
    "causal_conv1d": _ANY,
    "delta_rule": _ANY,
    "dispatch": _ANY,
    "expert_mlp": Served(weights=(_UPDATED, _QUANTIZED), trained=_UPDATED),
    "expert_topology": _ANY,
    "gather_compose": _ANY,
    "gather_matmul": _ANY,
    "gather_reduce": _ANY,
    "gather_reduce_tables": _ANY,
    "grouped_matmul": Served(weights=(_DENSE, _QUANTIZED), trained=_DENSE | _QUANTIZED),
    "low_rank": _ANY,
    "map_ids": _ANY,
    "multi_low_rank": _ANY,
    "product_key_topk": _ANY,
    "sparse_update": _ANY,
    "topk_routing": _ANY,
    "tree_routing": _ANY,
}
_HOPPER_PRODUCT = Served(weights=(_DENSE,), trained=_DENSE, refuses=lambda x: hopper_refuses(x))
_HOPPER_LAYER = replace(_HOPPER_PRODUCT, weights=(_UPDATED,), trained=_UPDATED)
_BY_TRITON = Served(by="triton")

# The default of a device is the first family that serves it.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "native",
            "native kernels",
            devices=("cpu",),
            dtypes=_FLOATS | {torch.float64},
            missing=native_unavailable,
            primitives=_COMMON
            | {
                "expert_mlp": Served(weights=(_UPDATED, _ROUNDS), trained=_UPDATED),
                "grouped_matmul": Served(weights=(_DENSE, _ROUNDS), trained=_DENSE | _ROUNDS),
                "hash_table": _ANY,
                "self_referential": _ANY,
            },
        ),
        Family(
            "triton",
            "Triton kernels",
            devices=("cuda",),
            dtypes=_FLOATS,
            missing=triton_unavailable,
            primitives=_COMMON,
            interpreter="TRITON_INTERPRET",
        ),
        Family(
            "cuda",
            "CUDA kernels",
            devices=("cuda",),
            dtypes=_FLOATS,
            missing=cuda_kernels_unavailable,
            primitives={
                "activate": _BY_TRITON,
                "dispatch": _ANY,
                "expert_mlp": _HOPPER_LAYER,
                "grouped_matmul": _HOPPER_PRODUCT,
                "hash_table": _ANY,
                "product_key_topk": _BY_TRITON,
                "topk_routing": _BY_TRITON,
                "tree_routing": _BY_TRITON,
            },
        ),
    )
}
BACKENDS = ("reference", *FAMILIES)


def primitives() -> tuple[str, ...]:
    """The names of all primitives that a family serves."""
    return tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family.primitives))


def takes(backend_name: str, dtype: torch.dtype) -> bool:
    """Whether a backend computes in a floating dtype; plain torch computes in all of them."""
    return backend_name == "reference" or dtype in FAMILIES[backend_name].dtypes


def serves_weights(backend_name: str, primitive: str, kinds: Iterable[str], trains: bool) -> bool:
    """Whether one call of a family's kernels takes weights of these kinds; ``trains``: whether it needs a gradient."""
    served, kinds = FAMILIES[backend_name].primitives[primitive], frozenset(kinds)
    return any(kinds <= mixed for mixed in served.weights) and (not trains or kinds <= served.trained)


def reads_panels(codes: torch.Tensor) -> bool:
    """Whether products with quantised codes run on kernels that read panels faster than rows.

    AMX kernels do not: they multiply whole tiles however few the rows, and decode the codes row by row.
    """
    if not codes.is_cpu or _forced not in (None, "native") or _NO_NATIVE is not None:
        return False
    return importlib.import_module("gossamer._C").isa() != "amx"


def rounds_rows(backend_name: str, primitive: str, x: torch.Tensor) -> bool:
    """Whether a family's kernels of a primitive round rows like ``x`` to 8 bits themselves."""
    return x.dtype != torch.float64 and serves_weights(backend_name, primitive, ("quantized, int8 rows",), False)


def refuses(backend_name: str, primitive: str, x: torch.Tensor) -> str | None:
    """Why a family's kernels of a primitive cannot serve operands like ``x``, or None when they can."""
    if backend_name == "reference":
        return None
    ask = FAMILIES[backend_name].primitives[primitive].refuses
    return None if ask is None else ask(x)


def check_served(primitive: str, backend_name: str, x: torch.Tensor, quantized: bool = False) -> None:
    """Check that the kernels of a primitive accept ``x``, and quantised weights if the call has them.

    Nothing is checked while a compiler traces the call; the kernels check when they run.
    """
    if backend_name == "reference":
        return
    served = FAMILIES[backend_name].primitives[primitive]
    if served.refuses is None or is_compiling():
        return
    reason = served.refuses(x)
    if quantized and not any("quantized" in mixed for mixed in served.weights):
        reason = reason or "its kernels take no quantised weights"
    if reason:
        raise ValueError(f'gossamer.backend("{backend_name}") cannot serve {primitive} on {x.device}: {reason}')


def unavailable(name: str, device_type: str) -> str | None:
    """Why the backend ``name`` cannot serve tensors on ``device_type``, or None when it can."""
    if name == "reference":
        return None
    family = FAMILIES[name]
    if family.runs_on(device_type):
        return family.missing()
    where = " or ".join("the CPU" if kind == "cpu" else kind for kind in family.devices)
    if family.interpreter:
        where += f" (on the CPU only with {family.interpreter}=1)"
    return f"{family.title} run on {where}, not on {device_type}"


# (primitive, type of device) -> the first family with kernels for the pair, or plain torch if that family cannot be
# used here.
_PREFERRED: dict[tuple[str, str], str] = {}
for _family in FAMILIES.values():
    for _name, _served in _family.primitives.items():
        if _served.by is None:
            for _device in _family.devices:
                _PREFERRED.setdefault((_name, _device), "reference" if _family.missing() else _family.name)


def _default(primitive: str, device_type: str) -> str:
    return _PREFERRED.get((primitive, device_type), "reference")


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is active; kernels have no rules for either."""
    if is_compiling():
        return False
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def resolve(primitive: str, tensor: torch.Tensor) -> str:
    """The backend that serves ``primitive`` for tensors like ``tensor``: the forced one, or the device's default.

    Plain torch serves under torch.func and forward-mode differentiation, where kernels would give no tangents.

    Raises:
        ValueError: the forced backend cannot serve this device, or kernels are forced under torch.func or forward-mode
            differentiation.
    """
    # is_cpu first: it takes a sixth of the time of device.type.
    device_type = "cpu" if tensor.is_cpu else tensor.device.type
    if device_type == "meta":
        return "native"
    if transformed():
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
    if _forced != "reference" and primitive not in FAMILIES[_forced].primitives:
        family = FAMILIES[_forced]
        raise ValueError(
            f'gossamer.backend("{_forced}") cannot serve {primitive}: it has no {family.title}, which serve '
            f"{', '.join(family.primitives)}"
        )
    return _forced
