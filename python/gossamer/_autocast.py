"""What ``torch.autocast`` does to the arguments of a product."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch._C import _is_any_autocast_enabled
from torch.compiler import is_compiling


def autocast(*tensors: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
    """Under ``torch.autocast`` the float tensors in its dtype, as ``nn.Linear`` takes them; otherwise as they are."""
    # Asked first, because it takes a tenth of what asking for the device takes; a compiler may not trace it.
    if not is_compiling() and not _is_any_autocast_enabled():
        return tensors
    device_type = tensors[0].device.type
    # Meta tensors have no autocast of their own, and asking for it raises.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    casts = (torch.float32, torch.float16, torch.bfloat16)
    return [t.to(dtype) if t is not None and t.dtype in casts else t for t in tensors]


def no_autocast(device: torch.device) -> AbstractContextManager:
    """A context without autocast for tensors on ``device``."""
    if not is_compiling() and not _is_any_autocast_enabled():
        return nullcontext()
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)
