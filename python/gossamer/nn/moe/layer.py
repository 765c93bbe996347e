"""The mixture-of-experts layer: a router, the experts it routes to, and a shared expert."""

from __future__ import annotations

import torch
from torch import nn

from gossamer._activation import Activation
from gossamer.nn.moe.experts.grouped import Experts
from gossamer.nn.moe.experts.shared import SharedExpert
from gossamer.nn.moe.routers.linear import ROUTERS
from gossamer.nn.moe.routing import Routing, check_hidden, check_selection


class MoE(nn.Module):
    """A mixture-of-experts feed-forward layer: ``y = Σ_k w_k · expert_k(x)``, plus a shared expert if asked for.

    The layer keeps no state from a call: balance losses are functions of the routing that ``return_routing`` gives.

    >>> moe = gossamer.nn.MoE(1024, 512, num_experts=64, top_k=8, router="softmax_topk", renormalize=True)
    >>> y, routing = moe(x, return_routing=True)
    >>> loss = task_loss(y) + 0.01 * gossamer.nn.load_balance_loss(routing)

    Args:
        hidden_size: H.
        intermediate_size: I of each routed expert.
        num_experts: E.
        top_k: K.
        router: ``"softmax_topk"``, ``"topk_softmax"`` or ``"sigmoid_topk"``; a module from hidden states ``(T, H)`` to
            a :class:`Routing`; or None, and every call is given its routing.
        activation: of all experts; a name of :class:`gossamer.Activation`, or one with its constants.
        bias: whether the experts' products have biases.
        interleaved: whether the routed experts' gate and up alternate along 2I.
        transposed: whether the routed experts' matrices are stored as ``(E, in, out)``.
        shared_intermediate_size: I of the shared expert, or None for no shared expert.
        shared_gate: whether the shared expert's output is multiplied by ``σ(x·w_g)``, as in Qwen2-MoE.
        capacity_factor: of the routed experts; see :func:`limit_capacity`. The routing that a call returns is the
            router's, before anything is dropped.
        form: ``"grouped"`` or ``"block_sparse"``: how :class:`Experts` computes the routed experts.
        device: of the parameters.
        dtype: of the parameters.
        **router_options: of a router given by name, such as ``renormalize``, ``n_group``, ``scale`` or ``upcast``; see
            :class:`SoftmaxRouter`, :class:`TopKSoftmaxRouter`, :class:`SigmoidRouter`. The logits' bias is here
            ``router_bias``.

    Attributes:
        router: the router, or None.
        experts: :class:`Experts`.
        shared_expert: :class:`SharedExpert` or None.
        shared_expert_gate: ``nn.Linear(H, 1)`` without bias, or None.

    Raises:
        TypeError: a size is no int, an option is unknown to the router, or ``router`` is something else.
        ValueError: a size is below 1, K > E, the name of the router or activation is unknown, groups do not fit,
            ``shared_gate`` without a shared expert, or options beside a router that is not given by name.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        router: str | nn.Module | None = "softmax_topk",
        activation: str | Activation = "swiglu",
        bias: bool = False,
        interleaved: bool = False,
        transposed: bool = False,
        shared_intermediate_size: int | None = None,
        shared_gate: bool = False,
        capacity_factor: float | None = None,
        form: str = "grouped",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **router_options: object,
    ) -> None:
        super().__init__()
        check_selection(num_experts, top_k)
        if shared_gate and shared_intermediate_size is None:
            raise ValueError("shared_gate needs a shared expert, got shared_intermediate_size=None")
        factory = {"device": device, "dtype": dtype}
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.router = self._router(router, router_options, factory)
        self.experts = Experts(
            num_experts,
            hidden_size,
            intermediate_size,
            activation=activation,
            bias=bias,
            interleaved=interleaved,
            transposed=transposed,
            capacity_factor=capacity_factor,
            form=form,
            **factory,
        )
        self.shared_expert = None
        if shared_intermediate_size is not None:
            self.shared_expert = SharedExpert(
                hidden_size, shared_intermediate_size, activation=activation, bias=bias, **factory
            )
        self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False, **factory) if shared_gate else None

    def _router(self, router: object, options: dict[str, object], factory: dict[str, object]) -> nn.Module | None:
        if isinstance(router, str):
            if router not in ROUTERS:
                raise ValueError(f"router must be one of {sorted(ROUTERS)}, a module or None, got {router!r}")
            if "router_bias" in options:
                options["bias"] = options.pop("router_bias")
            return ROUTERS[router](self.hidden_size, self.num_experts, self.top_k, **options, **factory)
        if router is not None and not isinstance(router, nn.Module):
            raise TypeError(f"router must be a str, an nn.Module or None, got {type(router).__name__}")
        if options:
            raise ValueError(f"router options need a router given by name, got {sorted(options)} beside {router!r}")
        return router

    def forward(
        self, x: torch.Tensor, *, routing: Routing | None = None, return_routing: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, Routing]:
        """The layer's output for ``x (..., H)``.

        Args:
            x: ``(..., H)``; T is the product of the leading sizes.
            routing: takes the place of the router's, for experts by hash or by another layer.
            return_routing: whether to return the :class:`Routing` too, for balance losses and bias updates.

        Returns:
            ``y`` of the shape of ``x``, in its dtype or autocast's; with ``return_routing`` the pair ``(y, routing)``.

        Raises:
            TypeError: the router returns no Routing, or dtypes do not fit.
            ValueError: shapes or devices do not fit, there is no routing and no router, or, on the CPU, logits are NaN
                or +inf.
        """
        check_hidden(x, self.hidden_size)
        tokens = x.reshape(-1, self.hidden_size)
        if routing is None:
            if self.router is None:
                raise ValueError("routing must be given to a layer without a router, got None")
            routing = self.router(tokens)
        if not isinstance(routing, Routing):
            raise TypeError(f"routing must be a gossamer.nn.Routing, got {type(routing).__name__}")
        if routing.top_k != self.top_k:
            raise ValueError(f"routing must have K = {self.top_k} experts per token, got {routing.top_k}")
        routing = routing.dispatched()
        y = self.experts(tokens, routing)
        if self.shared_expert is not None:
            shared = self.shared_expert(tokens)
            if self.shared_expert_gate is not None:
                shared = self.shared_expert_gate(tokens).sigmoid() * shared
            y = y + shared
        y = y.view(x.shape)
        return (y, routing) if return_routing else y

    def extra_repr(self) -> str:
        """Sizes."""
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}"
