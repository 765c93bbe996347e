"""What ``torch.autocast`` does to the arguments of a product."""

from __future__ import annotations

import torch
from torch import is_autocast_enabled
from torch.amp import is_autocast_available


def autocast(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Under ``torch.autocast`` the float tensors in its dtype, as ``nn.Linear`` takes them; otherwise as they are."""
    device_type = tensors[0].device.type
    if not is_autocast_available(device_type) or not is_autocast_enabled(device_type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    casts = (torch.float32, torch.float16, torch.bfloat16)
    return [t.to(dtype) if t is not None and t.dtype in casts else t for t in tensors]


def no_autocast(device: torch.device) -> torch.autocast:
    """A context without autocast for tensors on ``device``."""
    # Meta tensors have no autocast of their own, and asking for one raises.
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)
