"""Shared parts of layers that store experts' matrices as factors: sizes, biases, conversion from and to plain
experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from gossamer._activation import Activation, as_activation
from gossamer._checks import check_widths
from gossamer.nn.moe.capacity import check_capacity_factor
from gossamer.nn.moe.experts.base import ExpertLayer
from gossamer.nn.moe.experts.grouped import Experts


class FactoredExperts(ExpertLayer):
    """The base of layers whose experts are feed-forward networks with factorised matrices.

    Attributes:
        intermediate_size: I.
        activation: of the experts.
        up_bias: ``(E, 2I)``, or ``(E, I)`` with an ungated activation; or None.
        down_bias: one row per expert, or None.
    """

    intermediate_size: int
    activation: Activation
    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def _set_sizes(self, sizes: Mapping[str, int], activation: str | Activation, capacity_factor: float | None) -> None:
        """Check the sizes and options, and keep them."""
        check_widths(**sizes)
        check_capacity_factor(capacity_factor)
        for name, size in sizes.items():
            setattr(self, name, size)
        self.activation = as_activation(activation)
        self.capacity_factor = capacity_factor

    def _add_biases(self, bias: bool, like: torch.Tensor) -> None:
        """Register the biases of the up and down products, for matrices of the shapes of ``like (E, N, C)``."""
        shapes = {"up_bias": self.activation.halves * self.intermediate_size, "down_bias": like.shape[1]}
        for name, width in shapes.items():
            self.register_parameter(name, nn.Parameter(like.new_empty(self.num_experts, width)) if bias else None)

    @torch.no_grad()
    def _copy_biases(self, up_bias: torch.Tensor | None, down_bias: torch.Tensor | None) -> None:
        if up_bias is not None:
            self.up_bias.copy_(up_bias)
            self.down_bias.copy_(down_bias)

    @torch.no_grad()
    def _plain(self, up: torch.Tensor, down: torch.Tensor, down_bias: torch.Tensor | None) -> Experts:
        """Plain experts with matrices ``(E, 2I, H)`` and ``(E, H, I)`` and this layer's biases, the down bias as
        given.
        """
        layer = Experts(
            self.num_experts,
            self.hidden_size,
            self.intermediate_size,
            activation=self.activation,
            bias=self.up_bias is not None,
            capacity_factor=self.capacity_factor,
            device=up.device,
            dtype=up.dtype,
        )
        up_name, down_name = layer.weight_stacks
        getattr(layer, up_name).copy_(up)
        getattr(layer, down_name).copy_(down)
        if self.up_bias is not None:
            getattr(layer, f"{up_name}_bias").copy_(self.up_bias)
            getattr(layer, f"{down_name}_bias").copy_(down_bias)
        return layer


def sizes_and_options(experts: Experts, up: torch.Tensor) -> tuple[tuple[int, int, int], dict[str, object]]:
    """E, H and I of plain experts, and the options of a layer that replaces them, with the dtype and device of
    ``up``.
    """
    sizes = (experts.num_experts, experts.hidden_size, experts.intermediate_size)
    options = {
        "activation": experts.activation,
        "bias": experts.down_proj_bias is not None,
        "capacity_factor": experts.capacity_factor,
        "device": up.device,
        "dtype": up.dtype,
    }
    return sizes, options
