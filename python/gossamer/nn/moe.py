"""Mixture-of-experts layers: the experts, and the whole layer with its router and shared expert."""

from __future__ import annotations

import torch
from torch import nn

from gossamer._activation import Activation, as_activation, check_interleaved
from gossamer.nn._block_sparse_experts import best_block, block_sparse_mlp
from gossamer.nn.quantized_stack import expert_weight
from gossamer.nn.routers import ROUTERS
from gossamer.nn.routing import (
    Routing,
    check_capacity_factor,
    check_positive,
    check_selection,
    given_experts,
    limit_capacity,
)
from gossamer.ops._checks import check_tensor
from gossamer.ops.activate import activate
from gossamer.ops.expert_mlp import expert_mlp

FORMS = ("grouped", "block_sparse")


def _check_hidden(x: torch.Tensor, hidden_size: int) -> None:
    check_tensor("x", x)
    if x.dim() < 1 or x.shape[-1] != hidden_size:
        raise ValueError(f"x must have shape (..., H) with H = {hidden_size}, got {tuple(x.shape)}")


class Experts(nn.Module):
    """E feed-forward networks, of which each token meets K: :func:`gossamer.expert_mlp` with its parameters.

    Names and layouts are those of transformers' expert modules, so their tensors load as they are.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        activation: a name of :class:`gossamer.Activation`, or one with its constants.
        bias: whether both products have biases.
        interleaved: whether gate and up alternate along 2I, as in gpt-oss.
        transposed: whether matrices are stored as ``(E, in, out)``, as in gpt-oss, instead of ``(E, out, in)``.
        capacity_factor: of :func:`limit_capacity`, which drops what passes an expert's capacity; None drops nothing.
        form: ``"grouped"`` computes :func:`gossamer.expert_mlp`; ``"block_sparse"`` the same by SDD, activation and
            DSD over a :class:`gossamer.BlockTopology`, for which I must be a multiple of 16.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        gate_up_proj: ``(E, 2I, H)``, or ``(E, H, 2I)`` when transposed. With an ungated activation it is called
            ``up_proj`` and has I in place of 2I.
        down_proj: ``(E, H, I)``, or ``(E, I, H)`` when transposed.
        gate_up_proj_bias: ``(E, 2I)`` or None; ``up_proj_bias`` with an ungated activation.
        down_proj_bias: ``(E, H)`` or None.

    Raises:
        TypeError: a size is no int, ``activation`` neither str nor Activation, or ``capacity_factor`` no number.
        ValueError: a size is below 1, the activation or form is unknown, ``interleaved`` with an ungated activation, a
            ``capacity_factor`` that is not positive, or an I that is not in whole blocks.
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
        check_positive(num_experts=num_experts, hidden_size=hidden_size, intermediate_size=intermediate_size)
        self.activation = as_activation(activation)
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

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        up_shape, down_shape = (wide, hidden_size), (hidden_size, intermediate_size)
        if transposed:
            up_shape, down_shape = up_shape[::-1], down_shape[::-1]
        self.register_parameter(self._up_name, parameter(num_experts, *up_shape))
        self.register_parameter("down_proj", parameter(num_experts, *down_shape))
        self.register_parameter(f"{self._up_name}_bias", parameter(num_experts, wide) if bias else None)
        self.register_parameter("down_proj_bias", parameter(num_experts, hidden_size) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, each expert's as ``nn.Linear`` does: uniform in ±1/√(inputs)."""
        for name, inputs in ((self._up_name, self.hidden_size), ("down_proj", self.intermediate_size)):
            for parameter in (getattr(self, name), getattr(self, f"{name}_bias")):
                if parameter is not None:
                    nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5)

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
            TypeError: ``weights`` is missing beside ids or given beside a Routing, or dtypes do not fit.
            ValueError: shapes or devices do not fit, or the routing is over another number of experts.
        """
        _check_hidden(x, self.hidden_size)
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
        return self._compute(tokens, routing.dispatched()).view(x.shape)

    def _compute(self, tokens: torch.Tensor, routing: Routing, **updates: object) -> torch.Tensor:
        """The layer's output ``(T, H)`` for ``tokens (T, H)``; ``updates`` are the low-rank ones of expert_mlp."""
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


class SharedExpert(nn.Module):
    """A dense feed-forward network that every token meets, with gate and up in one product.

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
        check_positive(hidden_size=hidden_size, intermediate_size=intermediate_size)
        self.activation = as_activation(activation)
        self._up_name = "gate_up_proj" if self.activation.gated else "up_proj"
        form = {"bias": bias, "device": device, "dtype": dtype}
        self.add_module(self._up_name, nn.Linear(hidden_size, self.activation.halves * intermediate_size, **form))
        self.down_proj = nn.Linear(intermediate_size, hidden_size, **form)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``act(x·W1ᵀ + b1)·W2ᵀ + b2`` for ``x (..., H)``."""
        return self.down_proj(activate(getattr(self, self._up_name)(x), self.activation))


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
        _check_hidden(x, self.hidden_size)
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
