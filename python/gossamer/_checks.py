"""Argument checks shared by the primitives: each raises before any launch, naming argument, rule and values."""

from __future__ import annotations

import numbers

import torch
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import TransformType, get_interpreter_stack

from gossamer._backend import takes

INDEX_DTYPES = (torch.int32, torch.int64)
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_tensor(name: str, value: object) -> None:
    """``value`` must be a torch.Tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_positive(**sizes: int) -> None:
    """Every size given must be an int of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, (int, torch.SymInt)) or isinstance(size, bool):
            raise TypeError(f"{name} must be an int, got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int | None, ...], symbols: str) -> None:
    """``tensor.shape`` must equal ``expected``, where None is any size; ``symbols`` is the documented shape."""
    check_tensor(name, tensor)
    shape = tensor.shape
    if len(shape) == len(expected):
        for size, wanted in zip(shape, expected, strict=True):
            if wanted is not None and wanted != size:
                break
        else:
            return
    wanted = ", ".join("any" if e is None else str(e) for e in expected)
    raise ValueError(f"{name} must have shape {symbols} = ({wanted}), got {tuple(shape)}")


def last_size(name: str, tensor: torch.Tensor, symbols: str) -> int:
    """The last size of ``tensor``, which must have one; ``symbols`` is the documented shape."""
    check_tensor(name, tensor)
    if tensor.dim() < 1:
        raise ValueError(f"{name} must have shape {symbols}, got {tuple(tensor.shape)}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must have the layout torch.strided, got {tensor.layout}")
    return tensor.shape[-1]


def _first_to_differ(attribute: str, tensors: dict[str, torch.Tensor | None]) -> tuple | None:
    """The name of the first tensor given, its attribute, and the name and attribute of the first that has another."""
    first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        value = getattr(tensor, attribute)
        if first is None:
            first_name, first = name, value
        elif value != first:
            return first_name, first, name, value
    return None


def check_scale(name: str, scale: float | torch.Tensor) -> float:
    """The number ``scale``, or that of a tensor on the CPU that wants no gradient, for it would get none."""
    if isinstance(scale, torch.Tensor):
        if scale.requires_grad:
            raise ValueError(f"{name} must be a number, which has no gradient, got a tensor that requires one")
        if scale.numel() != 1:
            raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(scale.shape)}")
        if scale.device.type != "cpu":
            raise ValueError(
                f"{name} must be a number or a tensor on the CPU, got one on {scale.device}, which would have to be "
                "waited for"
            )
        return scale.item()
    if not isinstance(scale, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a number, got {scale!r}")
    return scale


def check_same_device(**tensors: torch.Tensor | None) -> None:
    """All tensors given must lie on the first one's device."""
    if odd := _first_to_differ("device", tensors):
        first_name, device, name, found = odd
        raise ValueError(f"{name} must be on the device of {first_name}, {device}, got {found}")


def check_same_dtype(**tensors: torch.Tensor | None) -> None:
    """All tensors given must have the first one's dtype."""
    if odd := _first_to_differ("dtype", tensors):
        first_name, dtype, name, found = odd
        raise TypeError(f"{name} must have the dtype of {first_name}, {dtype}, got {found}")


def check_float(name: str, tensor: torch.Tensor, backend: str) -> None:
    """``tensor`` must be float32, float16 or bfloat16; float64 too, where ``backend`` computes in it."""
    check_tensor(name, tensor)
    check_float_dtype(name, tensor.dtype, tensor.device, backend)


def check_float_dtype(name: str, dtype: torch.dtype, device: torch.device, backend: str) -> None:
    """``dtype`` must be one that :func:`check_float` takes of a tensor on ``device``."""
    if dtype in FLOAT_DTYPES or (dtype == torch.float64 and takes(backend, torch.float64)):
        return
    extra = " or float64" if takes(backend, torch.float64) else ", or float64 on the CPU"
    raise TypeError(f"{name} must be float32, float16, bfloat16{extra}, got {dtype} on {device}")


def check_index(name: str, tensor: torch.Tensor) -> None:
    """``tensor`` must hold int32 or int64."""
    check_tensor(name, tensor)
    if tensor.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")


def check_traceable(name: str) -> None:
    """Refuse tracers that cannot record the layer called ``name``: ``torch.jit.trace`` and ``torch.func.vmap``.

    Raises:
        RuntimeError: one of them looks at what is computed; the message says what to do instead.
    """
    if torch.compiler.is_compiling():
        return
    if torch.jit.is_tracing():
        raise RuntimeError(f"torch.jit.trace cannot record {name}: take torch.export.export or torch.compile instead")
    if _are_functorch_transforms_active() and any(
        interpreter.key() == TransformType.Vmap for interpreter in get_interpreter_stack() or ()
    ):
        raise RuntimeError(
            f"torch.func.vmap cannot take {name}, which sends each sample to experts of its own: for gradients of "
            "single samples call torch.func.grad in a loop over them"
        )
