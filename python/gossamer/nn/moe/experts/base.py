"""The role of an expert layer."""

from __future__ import annotations

import torch
from torch import nn

from gossamer._checks import check_traceable
from gossamer.nn.moe.routing import Routing, check_hidden, given_experts, limit_capacity


class ExpertLayer(nn.Module):
    """A layer that routed tokens pass through: the base of all expert layers.

    An expert layer is a module with :attr:`num_experts` and :attr:`hidden_size` and with ``forward(x, routing)``, which
    returns ``y[t] = Σ_k weights[t,k] · expert_{ids[t,k]}(x[t])``; slots without an expert add nothing. :class:`MoE`
    asks for no more. A subclass of this one defines :meth:`compute` alone, behind checks and capacity.

    Attributes:
        num_experts: E.
        hidden_size: H.
        capacity_factor: of :func:`limit_capacity`, which drops what passes an expert's capacity; None drops nothing.
    """

    num_experts: int
    hidden_size: int
    capacity_factor: float | None = None

    @property
    def weight_stacks(self) -> tuple[str, ...]:
        """Names of the parameters ``(E, N, C)`` that may be quantised.

        They are what :func:`gossamer.quantize_experts` quantises; a layer that names none is left alone. They are
        stored as ``(E, C, N)`` where the layer has a true attribute ``transposed``.
        """
        return ()

    def forward(
        self, x: torch.Tensor, routing: Routing | torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``y[t] = Σ_k weights[t,k] · expert_{ids[t,k]}(x[t])``.

        Args:
            x: ``(..., H)``; T is the product of the leading sizes.
            routing: a :class:`Routing` of T tokens over E experts; or expert ids ``(T, K)``, with ``weights``.
            weights: ``(T, K)``, only with expert ids.

        Returns:
            The shape of ``x``; its dtype, or autocast's.

        Raises:
            RuntimeError: ``torch.jit.trace`` or ``torch.func.vmap`` records the call.
            TypeError: ``weights`` is missing beside ids or given beside a Routing, or dtypes do not fit.
            ValueError: shapes or devices do not fit, or the routing is over another number of experts.
        """
        check_traceable(type(self).__name__)
        check_hidden(x, self.hidden_size)
        if isinstance(routing, Routing):
            if weights is not None:
                raise TypeError("weights must be None beside a Routing, which has its own")
        elif weights is None:
            raise TypeError(
                f"routing must be a Routing, or expert ids with weights, got {type(routing).__name__} alone"
            )
        else:
            routing = given_experts(routing, self.num_experts, weights)
        if routing.num_experts != self.num_experts:
            raise ValueError(f"routing must be over {self.num_experts} experts, got {routing.num_experts}")
        tokens = x.reshape(-1, self.hidden_size)
        if routing.num_tokens != tokens.shape[0]:
            raise ValueError(f"routing must be of the {tokens.shape[0]} tokens of x, got {routing.num_tokens}")
        if self.capacity_factor is not None:
            routing = limit_capacity(routing, self.capacity_factor)
        return self.compute(tokens, routing.dispatched()).view(x.shape)

    def reorder(self, order: torch.Tensor) -> None:
        """Make expert ``order[i]`` expert i, in place, as :meth:`LearnedPermutation.absorb` does.

        Args:
            order: ``(E,)`` int64, a permutation.

        Raises:
            NotImplementedError: the layer does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define reorder(order)")

    def compute(self, tokens: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The output ``(T, H)`` of ``tokens (T, H)``, by a routing that has its dispatch."""
        raise NotImplementedError(f"{type(self).__name__} must define compute(tokens, routing)")
