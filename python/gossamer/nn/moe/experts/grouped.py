"""Experts as one stack of feed-forward networks, computed by grouped or block-sparse products."""

from __future__ import annotations

import torch
from torch import nn

from gossamer._activation import Activation, as_activation, check_interleaved
from gossamer._checks import check_flags, check_widths
from gossamer._parameters import factory_of, new_parameter
from gossamer.nn.moe.capacity import check_capacity_factor
from gossamer.nn.moe.experts.base import Columns, ExpertLayer
from gossamer.nn.moe.experts.block_sparse import best_block, block_sparse_mlp
from gossamer.nn.moe.experts.quantized_stack import expert_weight
from gossamer.nn.moe.routing import Routing
from gossamer.ops.expert_mlp import expert_mlp

FORMS = ("grouped", "block_sparse")


def float_weights(experts: Experts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The weights of plain experts, whatever their layout: ``(E, 2I, H)`` gates first, ``(E, H, I)``, and both biases.

    Raises:
        TypeError: ``experts`` is not a plain :class:`Experts`.
        ValueError: they are quantised.
    """
    if type(experts) is not Experts:
        raise TypeError(f"experts must be a gossamer.nn.Experts, got {type(experts).__name__}")
    held = [getattr(experts, name) for name in experts.weight_stacks]
    if not all(isinstance(weight, torch.Tensor) for weight in held):
        raise ValueError("experts must hold floats, got quantised weights")
    up, down = (weight.detach().transpose(1, 2) if experts.transposed else weight.detach() for weight in held)
    biases = (getattr(experts, f"{name}_bias") for name in experts.weight_stacks)
    up_bias, down_bias = (bias if bias is None else bias.detach() for bias in biases)
    if experts.interleaved:
        up = torch.cat([up[:, 0::2], up[:, 1::2]], 1)
        up_bias = up_bias if up_bias is None else torch.cat([up_bias[:, 0::2], up_bias[:, 1::2]], 1)
    return up, down, up_bias, down_bias


class Experts(ExpertLayer):
    """E feed-forward networks, K of which are applied to each token: :func:`gossamer.expert_mlp` with its parameters.

    Names and layouts are those of transformers' expert modules, so their tensors load unchanged.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        activation: a name of :class:`gossamer.Activation`, or one with its constants.
        bias: whether both products have biases.
        interleaved: whether gate and up alternate along 2I, as in gpt-oss.
        transposed: whether matrices are stored as ``(E, in, out)``, as in gpt-oss, instead of ``(E, out, in)``.
        capacity_factor: see :func:`limit_capacity`, which drops slots beyond an expert's capacity; None drops nothing.
        form: ``"grouped"`` computes :func:`gossamer.expert_mlp`; ``"block_sparse"`` the same by SDD, activation and
            DSD over a :class:`gossamer.BlockTopology`, for which I must be a multiple of 16.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        gate_up_proj: ``(E, 2I, H)``, or ``(E, H, 2I)`` when transposed. With an ungated activation it is called
            ``up_proj`` and has I instead of 2I.
        down_proj: ``(E, H, I)``, or ``(E, I, H)`` when transposed.
        gate_up_proj_bias: ``(E, 2I)`` or None; ``up_proj_bias`` with an ungated activation.
        down_proj_bias: ``(E, H)`` or None.

    Raises:
        TypeError: a size is not an int, ``activation`` is neither a str nor an Activation, or ``capacity_factor`` is
            not a number.
        ValueError: a size is below 1, the activation or form is unknown, ``interleaved`` with an ungated activation, a
            ``capacity_factor`` that is not positive, or I is not a multiple of the block size.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str | Activation = "swiglu",
        bias: bool = False,
        interleaved: bool = False,
        transposed: bool = False,
        capacity_factor: float | None = None,
        form: str = "grouped",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_widths(num_experts=num_experts, hidden_size=hidden_size, intermediate_size=intermediate_size)
        self.activation = as_activation(activation)
        check_flags(bias=bias, interleaved=interleaved, transposed=transposed)
        check_interleaved(interleaved, self.activation)
        check_capacity_factor(capacity_factor)
        if form not in FORMS:
            raise ValueError(f"form must be one of {FORMS}, got {form!r}")
        if form == "block_sparse":
            best_block("intermediate_size", intermediate_size)
        self.form = form
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.capacity_factor = capacity_factor
        self.interleaved = interleaved
        self.transposed = transposed
        self._up_name = "gate_up_proj" if self.activation.gated else "up_proj"
        wide = self.activation.halves * intermediate_size

        factory = factory_of(device, dtype)
        up_shape, down_shape = (wide, hidden_size), (hidden_size, intermediate_size)
        if transposed:
            up_shape, down_shape = up_shape[::-1], down_shape[::-1]
        self.register_parameter(self._up_name, new_parameter(num_experts, *up_shape, **factory))
        self.register_parameter("down_proj", new_parameter(num_experts, *down_shape, **factory))
        self.register_parameter(f"{self._up_name}_bias", new_parameter(num_experts, wide, **factory) if bias else None)
        self.register_parameter("down_proj_bias", new_parameter(num_experts, hidden_size, **factory) if bias else None)
        self.reset_parameters()

    @property
    def weight_stacks(self) -> tuple[str, ...]:
        return self._up_name, "down_proj"

    def reset_parameters(self) -> None:
        """Initialise all parameters again, each expert's as ``nn.Linear``: uniform in ±1/√(inputs)."""
        for name, inputs in ((self._up_name, self.hidden_size), ("down_proj", self.intermediate_size)):
            for parameter in (getattr(self, name), getattr(self, f"{name}_bias")):
                if parameter is not None:
                    nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5)

    def columns(self) -> dict[str, Columns]:
        """I is the rows of gate and up, and the columns of down; the down bias has no dimension of I.

        Raises:
            NotImplementedError: the layer has low-rank updates, or an expert weight is quantised.
        """
        if type(self) is not Experts or next(self.children(), None) is not None:
            raise NotImplementedError(f"{type(self).__name__} must hold plain float experts to be divided along I")
        e, h, i, halves = self.num_experts, self.hidden_size, self.intermediate_size, self.activation.halves
        pair, place = ((i, halves), 0) if self.interleaved else ((halves, i), 1)
        up = Columns((e, h, *pair), 2 + place, 2) if self.transposed else Columns((e, *pair, h), 1 + place, 1)
        found = {
            self._up_name: up,
            "down_proj": Columns((e, i, h), 1) if self.transposed else Columns((e, h, i), 2),
        }
        if self.down_proj_bias is not None:
            found[f"{self._up_name}_bias"] = Columns((e, *pair), 1 + place, 1)
            found["down_proj_bias"] = Columns((e, h), None)
        return found

    @torch.no_grad()
    def reorder(self, order: torch.Tensor) -> None:
        """Make expert ``order[i]`` expert i, in place.

        Raises:
            NotImplementedError: an expert weight is quantised.
        """
        if next(self.children(), None) is not None:
            raise NotImplementedError("reorder(order) must come before the experts are quantised")
        for parameter in self.parameters(recurse=False):
            parameter.copy_(parameter.index_select(0, order))

    def compute(self, tokens: torch.Tensor, routing: Routing, **updates: object) -> torch.Tensor:
        """The layer's output ``(T, H)`` for ``tokens (T, H)``; ``updates`` are the low-rank updates of expert_mlp."""
        gate_up = expert_weight(getattr(self, self._up_name), self.transposed)
        down = expert_weight(self.down_proj, self.transposed)
        compute = expert_mlp if self.form == "grouped" else block_sparse_mlp
        return compute(
            tokens,
            gate_up,
            down,
            routing.dispatch,
            routing.weights,
            activation=self.activation,
            gate_up_bias=getattr(self, f"{self._up_name}_bias"),
            down_bias=self.down_proj_bias,
            interleaved=self.interleaved,
            **updates,
        )

    def extra_repr(self) -> str:
        """Sizes and options."""
        options = {
            "bias": self.down_proj_bias is not None,
            "interleaved": self.interleaved,
            "transposed": self.transposed,
            "capacity_factor": self.capacity_factor,
            "form": None if self.form == "grouped" else repr(self.form),
        }
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, activation={self.activation.name!r}"
            + "".join(f", {name}={value}" for name, value in options.items() if value)
        )
