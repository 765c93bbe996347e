"""Memory layouts that operators and kernels agree on."""

from __future__ import annotations

import torch


def stored_transposed(weight: torch.Tensor) -> bool:
    """Whether ``weight (E, N, C)`` is a view of ``(E, C, N)`` storage; its gradient then has that layout too."""
    return weight.stride(1) == 1 and weight.stride(2) != 1


def stored_by_columns(matrix: torch.Tensor) -> bool:
    """Whether a matrix, or each of a stack, is stored by columns; its gradient then is too."""
    return matrix.stride(-2) == 1 and matrix.stride(-1) != 1


def unit_stride(operand: torch.Tensor) -> torch.Tensor:
    """A matrix, or a stack of them, itself when rows or columns are contiguous, else a copy."""
    return operand if 1 in operand.stride()[-2:] else operand.contiguous()


def side_by_side(parts: torch.Tensor, dim: int) -> torch.Tensor:
    """``parts (G, ·, ·)`` one after the other along ``dim``, 0 or 1, as one matrix: a view where strides allow one."""
    return parts.flatten(0, 1) if dim == 0 else parts.transpose(0, 1).flatten(1, 2)


def merged(operand: torch.Tensor, dim: int) -> torch.Tensor:
    """An operand in parts along ``dim`` as one matrix if strides allow a view, else unchanged."""
    if operand.dim() == 2 or operand.stride(0) != operand.shape[dim + 1] * operand.stride(dim + 1):
        return operand
    return side_by_side(operand, dim)


def with_leading_sizes(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``rows (T, N)``, computed from those of ``x (..., C)``, as ``(..., N)``; unchanged if ``x`` has two dimensions.

    A view costs autograd a node, and FSDP2 warns of modules that return views: changes in place bypass its hooks.
    """
    return rows if x.dim() == 2 else rows.view(x.shape[:-1] + rows.shape[-1:])
