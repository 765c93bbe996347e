"""The shared expert, which every token uses."""

from __future__ import annotations

import torch
from torch import nn

from gossamer._activation import Activation, as_activation
from gossamer._checks import check_flag, check_input, check_widths
from gossamer._parameters import factory_of
from gossamer.ops.activate import activate


class SharedExpert(nn.Module):
    """A dense feed-forward network for every token, with gate and up in one product.

    Args:
        hidden_size: H.
        intermediate_size: I of this expert.
        activation: a name of :class:`gossamer.Activation`, or one with its constants.
        bias: whether both products have biases.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        gate_up_proj: ``nn.Linear(H, 2I)``, the gate's rows first; with an ungated activation ``up_proj``,
            ``nn.Linear(H, I)``.
        down_proj: ``nn.Linear(I, H)``.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str | Activation = "swiglu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_widths(hidden_size=hidden_size, intermediate_size=intermediate_size)
        check_flag("bias", bias)
        self.activation = as_activation(activation)
        self._up_name = "gate_up_proj" if self.activation.gated else "up_proj"
        form = {"bias": bias, **factory_of(device, dtype)}
        self.add_module(self._up_name, nn.Linear(hidden_size, self.activation.halves * intermediate_size, **form))
        self.down_proj = nn.Linear(intermediate_size, hidden_size, **form)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``act(x·W1ᵀ + b1)·W2ᵀ + b2`` for ``x (..., H)``."""
        up = getattr(self, self._up_name)
        if type(up) is nn.Linear:
            check_input(x, up.in_features, up.weight)
        return self.down_proj(activate(up(x), self.activation))
