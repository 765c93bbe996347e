"""Structures of index tensors that kernels rely on: their contents are checked once, and again after a change in place.

A structure is a frozen dataclass. A structure made by a function of the package is right by construction, so it is only
marked as checked. A structure that a user puts together is checked when it is first used, and again after one of its
tensors was written to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.compiler import is_compiling

from gossamer import _backend
from gossamer._checks import check_tensor

# The attribute in which a structure remembers the version of its tensors at the last check. It is not a field, so
# ``dataclasses.replace`` leaves it out.
CHECKED = "_checked_version"


def in_inference_mode() -> bool:
    """Whether new tensors would have no versions, which show later writes: in ``torch.inference_mode``, uncompiled."""
    return not is_compiling() and torch.is_inference_mode_enabled()


def mark(structure: object, tensors: Sequence[torch.Tensor]) -> None:
    """Mark a structure as checked with its ``tensors`` as they are now.

    Inference tensors have no versions that would show a write, so a structure with one is checked at every use.
    """
    if is_compiling() or any(tensor.is_inference() for tensor in tensors):
        return
    # Not through __dict__: after its first use, Python reads all of the object's attributes more slowly.
    object.__setattr__(structure, CHECKED, sum(tensor._version for tensor in tensors))


def copy_mark(source: object, structure: object) -> None:
    """Mark a structure that has the tensors of ``source`` as checked if ``source`` is."""
    if not is_compiling():
        object.__setattr__(structure, CHECKED, getattr(source, CHECKED))


def state_without_mark(structure: object) -> dict[str, object]:
    """The state for copies and pickles: without the mark, since a copy's tensors have versions of their own."""
    return {name: value for name, value in structure.__dict__.items() if name != CHECKED}


def check_indices(name: str, tensor: object, size: int, symbols: str, first: str, device: torch.device) -> None:
    """``tensor`` must be ``(size,)`` int32, contiguous, on the ``device`` of the tensor called ``first``."""
    check_tensor(name, tensor)
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {tensor.dtype}")
    if tensor.dim() != 1 or tensor.shape[0] != size:
        raise ValueError(f"{name} must have shape {symbols} = ({size}), got {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of {first}, {device}, got {tensor.device}")


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether the host can read a tensor's values without waiting: on the CPU, outside compilers and traces."""
    if is_compiling() or type(tensor) is not torch.Tensor or not tensor.is_cpu:
        return False
    return not (torch.jit.is_tracing() or _backend.transformed())


def check_offsets(name: str, offsets: torch.Tensor, limit: int) -> None:
    """``offsets`` must ascend from 0 to at most ``limit``."""
    bad = torch.cat([offsets[:1] != 0, offsets.diff() < 0]) | (offsets > limit)
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"{name} must ascend from 0 to at most {limit}, got {int(offsets[at])} at position {at}")


def check_range(name: str, indices: torch.Tensor, limit: int) -> None:
    """Every index must be in ``[0, limit)``."""
    bad = (indices < 0) | (indices >= limit)
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"{name} must be in [0, {limit}), got {int(indices[at])} at position {at}")


def check_permutation(name: str, indices: torch.Tensor) -> None:
    """Every number below the length must occur once."""
    check_range(name, indices, indices.shape[0])
    counts = torch.bincount(indices, minlength=indices.shape[0])
    if (counts != 1).any():
        number = int((counts > 1).nonzero()[0])
        raise ValueError(f"{name} must have every number once, got {number} {int(counts[number])} times")
