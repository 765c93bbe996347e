"""Launchers of the native activation of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import activation_form, empty_huge, matrix, unit_rows

if TYPE_CHECKING:
    from gossamer.ops.activate import Activate, ActivateBackward


def _launch(args: Activate, dact: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    preact = unit_rows(args.preact)
    rows, wide = preact.shape
    form = activation_form(args.activation, args.interleaved)
    operands = matrix(preact), matrix(dact), out.data_ptr()
    _C.activate(form, rows, wide // args.activation.halves, *operands, torch.get_num_threads())
    return out


def activate(args: Activate) -> torch.Tensor:
    """``act(preact)``, ``(R, I)`` contiguous."""
    rows, wide = args.preact.shape
    return _launch(args, None, empty_huge((rows, wide // args.activation.halves), args.preact.dtype))


def activate_backward(args: ActivateBackward) -> torch.Tensor:
    """The gradient of ``preact``; contiguous."""
    preact = args.forward.preact
    return _launch(args.forward, unit_rows(args.dact), empty_huge(tuple(preact.shape), preact.dtype))
