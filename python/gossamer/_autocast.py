"""The casts of ``torch.autocast`` for products."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch._C import _is_any_autocast_enabled
from torch.compiler import is_compiling


def is_autocast(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for the tensor's device. Meta tensors have none, and querying it raises."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def autocast(*tensors: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
    """The tensors, float ones cast to autocast's dtype where it is on, as in ``nn.Linear``."""
    # The quickest test first; a compiler cannot trace it.
    if not is_compiling() and not _is_any_autocast_enabled():
        return tensors
    if not is_autocast(tensors[0]):
        return list(tensors)
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    casts = (torch.float32, torch.float16, torch.bfloat16)
    return [t.to(dtype) if t is not None and t.dtype in casts else t for t in tensors]


def no_autocast(device: torch.device) -> AbstractContextManager:
    """A context without autocast for tensors on ``device``."""
    if not is_compiling() and not _is_any_autocast_enabled():
        return nullcontext()
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)
