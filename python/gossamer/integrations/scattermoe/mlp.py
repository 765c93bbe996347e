"""ScatterMoE's expert feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gossamer._checks import (
    check_flag,
    check_floating,
    check_index,
    check_input,
    check_positive,
    check_same_device,
    check_shape,
    check_widths,
)
from gossamer.integrations._activations import activation_name
from gossamer.integrations.scattermoe.parallel_experts import ParallelExperts, flatten_sort_count
from gossamer.integrations.surgery import hooked
from gossamer.ops.dispatch import dispatch
from gossamer.ops.expert_mlp import expert_mlp


class _FeedForward(nn.Module):
    """Two :class:`ParallelExperts` with an activation between them.

    Attributes:
        experts: from inputs to hidden.
        output_experts: from hidden to outputs.
        top_k: k, at most E.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        bias: bool,
        activation: Callable | None,
        halves: int,
    ) -> None:
        super().__init__()
        check_positive(num_experts=num_experts, top_k=top_k)
        check_widths(input_size=input_size, hidden_size=hidden_size)
        check_flag("bias", bias)
        if activation is not None and not callable(activation):
            raise TypeError(f"activation must be callable or None, got {type(activation).__name__}")
        self.num_experts = num_experts
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.experts = ParallelExperts(num_experts, input_size, halves * hidden_size, bias=bias)
        self.output_experts = ParallelExperts(num_experts, hidden_size, input_size, bias=bias)
        self.top_k = min(top_k, num_experts)
        self.activation = activation

    def extra_repr(self) -> str:
        """``top_k``."""
        return f"k={self.top_k}"

    def _check(self, x: torch.Tensor, expert_p: torch.Tensor, expert_idxs: torch.Tensor) -> None:
        """Check the arguments of :meth:`forward` by their names here."""
        check_input(x, self.input_size, self.experts.weight)
        check_index("expert_idxs", expert_idxs)
        check_shape("expert_idxs", expert_idxs, (x.shape[:-1].numel(), self.top_k), "(T, top_k)")
        check_floating("expert_p", expert_p)
        check_shape("expert_p", expert_p, tuple(expert_idxs.shape), "(T, top_k)")
        check_same_device(x=x, expert_p=expert_p, expert_idxs=expert_idxs)

    def _between(self, hidden: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define the activation between its products")

    def forward(self, x: torch.Tensor, expert_p: torch.Tensor, expert_idxs: torch.Tensor) -> torch.Tensor:
        """``y[t] = Σ_j expert_p[t,j]·expert_{expert_idxs[t,j]}(x[t])``.

        Args:
            x: ``(..., input_size)``; T is the product of the leading sizes.
            expert_p: ``(T, top_k)`` floating, the gates.
            expert_idxs: ``(T, top_k)`` int32 or int64; ids of ``num_experts`` and more mean no expert.

        Returns:
            The shape of ``x``.

        Raises:
            TypeError: dtypes do not fit.
            ValueError: shapes or devices do not fit, or (on the CPU) an id is negative.
        """
        self._check(x, expert_p, expert_idxs)
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        order = flatten_sort_count(expert_idxs, num_experts=self.num_experts)
        hidden = self._between(self.experts(x, self.top_k, *order, grouped_out=True))
        y = self.output_experts(hidden, 1, *order, gates=expert_p, grouped_in=True)
        return y.view(*shape[:-1], y.shape[-1])


class MLP(_FeedForward):
    """E networks ``W2·act(W1·x)``. With ``nn.Identity()`` as activation and a rank as hidden size, it is a mixture of
    LoRA.

    An activation that :func:`gossamer.expert_mlp` knows makes the whole layer one operator.

    Args:
        input_size: of inputs and outputs.
        hidden_size: of each expert.
        num_experts: E.
        top_k: k.
        bias: whether both products have biases.
        activation: a function or module; None for no activation.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        bias: bool = False,
        activation: Callable | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, num_experts, top_k, bias, activation, halves=1)

    def _between(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self.activation is None else self.activation(hidden)

    def forward(self, x: torch.Tensor, expert_p: torch.Tensor, expert_idxs: torch.Tensor) -> torch.Tensor:
        """As the base class says."""
        products = (self.experts, self.output_experts)
        name = activation_name(self.activation)
        # A product of another class, or one with hooks, must be called as a module.
        if name is None or any(type(product) is not ParallelExperts or hooked(product) for product in products):
            return super().forward(x, expert_p, expert_idxs)
        self._check(x, expert_p, expert_idxs)
        up, down = products
        y = expert_mlp(
            x.reshape(-1, x.shape[-1]),
            up.weight,
            down.weight,
            dispatch(expert_idxs, self.num_experts),
            expert_p,
            activation=name,
            gate_up_bias=up.bias,
            down_bias=down.bias,
        )
        return y.view(x.shape)


class GLUMLP(_FeedForward):
    """E gated networks ``W2·(act(g)·h)`` with ``(h, g) = W1·x``: the gate is the second half.

    Args:
        input_size: of inputs and outputs.
        hidden_size: of each expert.
        num_experts: E.
        top_k: k.
        bias: whether both products have biases.
        activation: of the gate; a function or module.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        bias: bool = False,
        activation: Callable | None = None,
    ) -> None:
        activation = nn.SiLU() if activation is None else activation
        super().__init__(input_size, hidden_size, num_experts, top_k, bias, activation, halves=2)

    def _between(self, hidden: torch.Tensor) -> torch.Tensor:
        value, gate = hidden.chunk(2, dim=-1)
        return self.activation(gate) * value
