"""Memory layouts that operators and kernels agree on."""

from __future__ import annotations

import torch


def stored_transposed(weight: torch.Tensor) -> bool:
    """Whether ``weight (E, N, C)`` is a view of ``(E, C, N)`` storage, as its gradient then is too."""
    return weight.stride(1) == 1 and weight.stride(2) != 1
