"""Launchers of the native activation of rows."""

from __future__ import annotations

import torch

from gossamer import _C
from gossamer._activation import Activation
from gossamer.cpu_kernels._native import empty_huge, matrix, unit_rows


def _launch(
    preact: torch.Tensor, dact: torch.Tensor | None, out: torch.Tensor, activation: Activation, interleaved: bool
) -> torch.Tensor:
    rows, wide = preact.shape
    form = (activation.code, activation.gated, interleaved, activation.alpha, activation.limit)
    operands = matrix(preact), matrix(dact), out.data_ptr()
    _C.activate(form, rows, wide // activation.halves, *operands, torch.get_num_threads())
    return out


def activate(preact: torch.Tensor, activation: Activation, interleaved: bool) -> torch.Tensor:
    """``act(preact)``: ``(R, 2I)`` to ``(R, I)`` when gated, else ``(R, I)`` to ``(R, I)``; contiguous."""
    rows, wide = preact.shape
    out = empty_huge((rows, wide // activation.halves), preact.dtype)
    return _launch(unit_rows(preact), None, out, activation, interleaved)


def activate_backward(
    dact: torch.Tensor, preact: torch.Tensor, activation: Activation, interleaved: bool
) -> torch.Tensor:
    """What flows back to ``preact`` from ``dact (R, I)``; contiguous."""
    out = empty_huge(tuple(preact.shape), preact.dtype)
    return _launch(unit_rows(preact), unit_rows(dact), out, activation, interleaved)
