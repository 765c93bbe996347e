"""The activation functions of expert layers: one table that the operators and every kernel family read."""

from __future__ import annotations

import functools
import math
import numbers
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# name -> (function of the gate, gated)
ACTIVATIONS: dict[str, tuple[str, bool]] = {
    "silu": ("silu", False),
    "gelu": ("gelu", False),
    "gelu_tanh": ("gelu_tanh", False),
    "relu": ("relu", False),
    "relu2": ("relu2", False),
    "swiglu": ("silu", True),
    "geglu": ("gelu", True),
    "geglu_tanh": ("gelu_tanh", True),
    "reglu": ("relu", True),
    "clamped_swiglu": ("clamped_silu", True),
}


@dataclass(frozen=True)
class Activation:
    """An activation by name, with the two constants that only ``clamped_swiglu`` reads.

    With gate ``g`` and up ``u`` (an ungated activation has ``g`` alone):

    ====================  ==========================================================================
    ``silu``              ``g·σ(g)``
    ``gelu``              ``g·Φ(g)`` with the exact error function
    ``gelu_tanh``         its tanh approximation
    ``relu``, ``relu2``   ``max(g, 0)``, ``max(g, 0)²``
    ``swiglu``            ``silu(g)·u``
    ``geglu``             ``gelu(g)·u``; ``geglu_tanh`` and ``reglu`` likewise
    ``clamped_swiglu``    ``g' ·σ(alpha·g')·(u' + 1)``, ``g' = min(g, limit)``, ``u' = clip(u, ±limit)`` (gpt-oss)
    ====================  ==========================================================================
    """

    name: str
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {self.name!r}")
        for constant, value in (("alpha", self.alpha), ("limit", self.limit)):
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"activation {constant} must be a float, got {value!r}")
        # By comparison: torch 2.10 cannot compile math.isfinite of a symbolic number.
        if not -math.inf < self.alpha < math.inf:
            raise ValueError(f"activation alpha must be finite, got {self.alpha}")
        if not self.limit > 0:
            raise ValueError(f"activation limit must be positive, got {self.limit}")

    @property
    def gate(self) -> str:
        """The function of the gate, by the name that kernels take; gated and ungated activations share it."""
        return ACTIVATIONS[self.name][0]

    @property
    def gated(self) -> bool:
        """Whether the pre-activation has a gate half and an up half."""
        return ACTIVATIONS[self.name][1]

    @property
    def halves(self) -> int:
        """Pre-activation columns per activation column: 2 when gated, else 1."""
        return 2 if self.gated else 1


_NAMED = {name: Activation(name) for name in ACTIVATIONS}


def check_interleaved(interleaved: bool, activation: Activation) -> None:
    """``interleaved`` must be a bool, and True only for a gated activation."""
    if not isinstance(interleaved, bool):
        raise TypeError(f"interleaved must be a bool, got {interleaved!r}")
    if interleaved and not activation.gated:
        raise ValueError(f"interleaved needs a gated activation, got {activation.name!r}")


def as_activation(activation: str | Activation) -> Activation:
    """Turn a name into an :class:`Activation`; raises ValueError for an unknown name, TypeError for another type."""
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        return _NAMED.get(activation) or Activation(activation)
    raise TypeError(f"activation must be a str or gossamer.Activation, got {type(activation).__name__}")


def _split_gate_up(preact: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the gate and up halves of ``preact (..., 2I)``: even and odd columns, or first and second half."""
    if interleaved:
        return preact[..., 0::2], preact[..., 1::2]
    gate, up = preact.chunk(2, dim=-1)
    return gate, up


_GATES = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda gate: F.relu(gate).square(),
}


def activate_reference(preact: torch.Tensor, activation: Activation, interleaved: bool = False) -> torch.Tensor:
    """:func:`gossamer.activate` in plain torch, differentiable, in any floating dtype."""
    gate, up = _split_gate_up(preact, interleaved) if activation.gated else (preact, None)
    if activation.name == "clamped_swiglu":
        # Gradients pass at the limit itself, as in the kernels; with torch.clamp that depends on torch's version.
        limit = activation.limit
        gate = torch.where(gate > limit, limit, gate)
        up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
        return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)
    out = _GATES[activation.gate](gate)
    return out if up is None else out * up
