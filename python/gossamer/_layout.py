"""Memory layouts that operators and kernels agree on."""

from __future__ import annotations

import torch


def stored_transposed(weight: torch.Tensor) -> bool:
    """Whether ``weight (E, N, C)`` is a view of ``(E, C, N)`` storage, as its gradient then is too."""
    return weight.stride(1) == 1 and weight.stride(2) != 1


def stored_by_columns(matrix: torch.Tensor) -> bool:
    """Whether the columns of a 2-D ``matrix``, not its rows, are contiguous in memory, as its gradient's then are."""
    return matrix.stride(0) == 1 and matrix.stride(1) != 1
