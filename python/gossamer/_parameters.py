"""Parameters of layers, by the ``device`` and ``dtype`` that a constructor was given."""

from __future__ import annotations

import torch
from torch import nn

from gossamer._checks import check_device, check_dtype


def factory_of(device: torch.device | str | None, dtype: torch.dtype | None) -> dict[str, object]:
    """Both arguments, checked, for torch's layers and for :func:`new_parameter`."""
    check_device("device", device)
    check_dtype("dtype", dtype)
    return {"device": device, "dtype": dtype}


def new_parameter(*shape: int, **factory: object) -> nn.Parameter:
    """A parameter of this shape, not initialised, made with what :func:`factory_of` returned."""
    return nn.Parameter(torch.empty(shape, **factory))
