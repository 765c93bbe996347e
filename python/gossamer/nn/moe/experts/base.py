"""The role of an expert layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from gossamer._checks import check_same_device, check_traceable
from gossamer._layout import with_leading_sizes
from gossamer.nn.moe.capacity import limit_capacity
from gossamer.nn.moe.experts.quantized_stack import QuantizedExpertStack
from gossamer.nn.moe.routing import Routing, check_hidden, given_experts


class ExpertExchange(Protocol):
    """Computes a layer whose experts are in several processes; ``gossamer.parallel.shard_experts`` sets it."""

    def __call__(
        self,
        layer: ExpertLayer,
        x: torch.Tensor,
        routing: Routing | torch.Tensor,
        weights: torch.Tensor | None,
        beside: Callable[[], Any] | None,
    ) -> tuple[torch.Tensor, Any]:
        """The layer's output for the arguments of its ``forward``, and what ``beside`` returns."""
        ...


class Columns(NamedTuple):
    """The dimension of a stack that tensor parallelism divides: the intermediate size I.

    Attributes:
        shape: shape of the stack with I as a separate dimension; gate and up form another dimension.
        dim: the dimension of I; None for a tensor that is added once, after the products over I.
        merged: the first of two dimensions that the stack stores as one, or None.
    """

    shape: tuple[int, ...]
    dim: int | None
    merged: int | None = None


def _with_tensors(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """A shallow copy of a module in which some names hold other tensors; the module itself is not changed."""
    view = object.__new__(type(module))
    view.__dict__.update(module.__dict__)
    held = {kind: dict(module.__dict__[kind]) for kind in ("_parameters", "_buffers", "_modules")}
    view.__dict__.update(held)
    inside: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".")
        if rest:
            inside.setdefault(head, {})[rest] = tensor
        else:
            held["_parameters" if head in held["_parameters"] else "_buffers"][head] = tensor
    for head, part in inside.items():
        held["_modules"][head] = _with_tensors(held["_modules"][head], part)
    return view


class ExpertLayer(nn.Module):
    """A layer that routed tokens pass through: the base of all expert layers.

    An expert layer is a module with :attr:`num_experts` and :attr:`hidden_size` and with ``forward(x, routing)``, which
    returns ``y[t] = Σ_k weights[t,k] · expert_{ids[t,k]}(x[t])``; slots without an expert add nothing. :class:`MoE`
    needs nothing else. A subclass of this class only defines :meth:`compute`; checks and capacity come before it.

    Attributes:
        num_experts: E.
        hidden_size: H.
        capacity_factor: see :func:`limit_capacity`, which drops slots beyond an expert's capacity; None drops nothing.
        exchange: sends tokens to experts in other processes; None if all experts are in this process.
    """

    num_experts: int
    hidden_size: int
    capacity_factor: float | None = None
    exchange: ExpertExchange | None = None

    @property
    def weight_stacks(self) -> tuple[str, ...]:
        """Names of the parameters ``(E, N, C)`` that may be quantised.

        :func:`gossamer.quantize_experts` quantises these; it skips a layer that names none. If the layer has a true
        attribute ``transposed``, they are stored as ``(E, C, N)``.
        """
        return ()

    def forward(
        self,
        x: torch.Tensor,
        routing: Routing | torch.Tensor,
        weights: torch.Tensor | None = None,
        *,
        beside: Callable[[], Any] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """``y[t] = Σ_k weights[t,k] · expert_{ids[t,k]}(x[t])``.

        Args:
            x: ``(..., H)``; T is the product of the leading sizes.
            routing: a :class:`Routing` of T tokens over E experts; or expert ids ``(T, K)``, with ``weights``.
            weights: ``(T, K)``, only with expert ids.
            beside: a function that is called once, while tokens travel if experts are in other processes; its result is
                returned together with y.

        Returns:
            The shape of ``x``; its dtype, or autocast's. With ``beside``, a pair of that and the function's result.

        Raises:
            RuntimeError: ``torch.jit.trace`` or ``torch.func.vmap`` records the call.
            TypeError: ``weights`` is missing with ids or given with a Routing, or dtypes do not fit.
            ValueError: shapes or devices do not fit, or the routing is over another number of experts.
        """
        if self.exchange is not None:
            y, other = self.exchange(self, x, routing, weights, beside)
            return y if beside is None else (y, other)
        tokens, routing = self.checked(x, routing, weights)
        y = self.compute(tokens, routing.dispatched())
        y = with_leading_sizes(y, x)
        return y if beside is None else (y, beside())

    def checked(
        self, x: torch.Tensor, routing: Routing | torch.Tensor, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Routing]:
        """The arguments of :meth:`forward` as tokens ``(T, H)`` and their routing, checked and within capacity."""
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
        if routing.expert_ids.device != x.device:
            check_same_device(x=x, expert_ids=routing.expert_ids)
        if self.capacity_factor is not None:
            routing = limit_capacity(routing, self.capacity_factor)
        return tokens, routing

    def stacks(self) -> dict[str, torch.Tensor]:
        """The tensors that have one part per expert along dimension 0, by name.

        Groups of neighbouring experts may share a part. Processes divide these tensors among themselves. All other
        parameters are shared by all experts, and every process holds them whole. By default all parameters and buffers
        are divided.

        Raises:
            NotImplementedError: a tensor has no dimension of experts, and the layer does not override this method.
        """
        found = self._held()
        for name, tensor in found.items():
            if tensor.dim() < 1 or tensor.shape[0] != self.num_experts:
                raise NotImplementedError(
                    f"{type(self).__name__} must define stacks(): {name} has shape {tuple(tensor.shape)}, without a "
                    f"part for each of {self.num_experts} experts along dimension 0"
                )
        return found

    def _held(self) -> dict[str, torch.Tensor]:
        """All parameters and buffers by name, quantised weights row after row."""
        for module in self.modules():
            if isinstance(module, QuantizedExpertStack):
                module.weight()
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def columns(self) -> dict[str, Columns]:
        """The dimension of the intermediate size in each of :meth:`stacks`: the outputs of slices along it add up to
        the layer's output.

        Raises:
            NotImplementedError: the layer does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define columns() to be divided along I")

    def over(self, stacks: Mapping[str, torch.Tensor], num_experts: int) -> ExpertLayer:
        """A layer over other experts that shares everything except these tensors with this layer.

        Args:
            stacks: as :meth:`stacks` gives them, of the other experts.
            num_experts: their number.
        """
        view = _with_tensors(self, stacks)
        view.num_experts, view.exchange = num_experts, None
        return view

    def reorder(self, order: torch.Tensor) -> None:
        """Make expert ``order[i]`` expert i, in place, as :meth:`LearnedPermutation.absorb` does.

        Args:
            order: ``(E,)`` int64, a permutation.

        Raises:
            NotImplementedError: the layer does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define reorder(order)")

    def compute(self, tokens: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The output ``(T, H)`` for ``tokens (T, H)`` and a routing that has its dispatch."""
        raise NotImplementedError(f"{type(self).__name__} must define compute(tokens, routing)")

    def enter(self, tokens: torch.Tensor) -> torch.Tensor:
        """The input that all experts of a token share, and that is sent to them: by default the tokens themselves.

        ``compute(tokens, routing)`` is ``leave(between(enter(tokens), routing))``. ``enter`` and ``leave`` work token
        by token, with parameters that all experts share.
        """
        return tokens

    def between(self, rows: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The weighted sums over experts, computed from :meth:`enter`'s result; sums over disjoint sets of experts add
        up.
        """
        return self.compute(rows, routing)

    def leave(self, rows: torch.Tensor) -> torch.Tensor:
        """The output of each token, from its sum over experts."""
        return rows
