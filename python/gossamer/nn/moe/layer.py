"""The mixture-of-experts layer: a router, the experts it routes to, and a shared expert."""

from __future__ import annotations

import torch
from torch import nn

from gossamer._activation import Activation
from gossamer._checks import check_shape, check_strided, check_tensor, check_traceable, check_widths
from gossamer._parameters import factory_of
from gossamer.nn.moe.experts.grouped import Experts
from gossamer.nn.moe.experts.shared import SharedExpert
from gossamer.nn.moe.inference import infer, infer_routed
from gossamer.nn.moe.routers import router_class
from gossamer.nn.moe.routers.base import Router
from gossamer.nn.moe.routing import Routing, check_hidden, check_selection


def _agreed(name: str, given: int | None, role: str, module: nn.Module) -> int | None:
    """A size that the layer or a module sets; they must agree if both set it."""
    own = getattr(module, name, None)
    if given is not None and own is not None and own != given:
        raise ValueError(f"{role} must have {name} = {given}, got {own}")
    return own if given is None else given


class MoE(nn.Module):
    """A mixture-of-experts feed-forward layer: ``y = Σ_k w_k · expert_k(x)``, plus a shared expert if asked for.

    If the routing has a :attr:`Routing.residual`, the layer adds ``residual[t] · x[t]``. The layer keeps no state from
    a call: balance losses, and losses of the router, are functions of the routing that ``return_routing`` returns.

    >>> moe = gossamer.nn.MoE(1024, 512, num_experts=64, top_k=8, router="softmax_topk", renormalize=True)
    >>> y, routing = moe(x, return_routing=True)
    >>> loss = task_loss(y) + 0.01 * gossamer.nn.load_balance_loss(routing)

    Routers and expert layers are roles: any :class:`Router`, or module with the same call, works with any
    :class:`ExpertLayer`.

    Args:
        hidden_size: H.
        intermediate_size: I of each routed expert; None with an ``experts`` module.
        num_experts: E; None with an ``experts`` module, which defines it.
        top_k: K, the maximum number of experts per token; None for routers that define it themselves.
        router: a :class:`Router`, or the name of one to make, of ``gossamer.nn.moe.routers.ROUTERS``; a module from
            hidden states ``(T, H)`` to a :class:`Routing`; or None if every call is given its routing.
        experts: a module with ``num_experts``, ``hidden_size`` and ``forward(x, routing)``, such as an
            :class:`ExpertLayer`; or the ``form`` of the :class:`Experts` to create.
        activation: of all experts; a name of :class:`gossamer.Activation`, or one with its constants.
        bias: whether the experts' products have biases.
        interleaved: whether the routed experts' gate and up alternate along 2I.
        transposed: whether the routed experts' matrices are stored as ``(E, in, out)``.
        shared_intermediate_size: I of the shared expert, or None for no shared expert.
        shared_gate: whether the shared expert's output is multiplied by ``σ(x·w_g)``, as in Qwen2-MoE.
        capacity_factor: of the routed experts; see :func:`limit_capacity`. A call returns the router's routing, before
            slots are dropped.
        form: ``"grouped"`` or ``"block_sparse"``: how :class:`Experts` computes the routed experts; like
            ``interleaved``, ``transposed`` and ``capacity_factor``, not allowed with an ``experts`` module.
        device: of the parameters.
        dtype: of the parameters.
        **router_options: options of a router given by name, such as ``renormalize``, ``n_group``, ``scale`` or
            ``upcast``; see the router's ``from_top_k`` and class. The bias of the logits is called ``router_bias``
            here.

    Attributes:
        router: the router, or None.
        experts: :class:`Experts`, or the module given.
        shared_expert: :class:`SharedExpert` or None.
        shared_expert_gate: ``nn.Linear(H, 1)`` without bias, or None.

    Raises:
        TypeError: a size is not an int, the router has no such option, or ``router`` or ``experts`` is something else.
        ValueError: a size is below 1, K > E, the name of the router or activation is unknown, groups do not fit,
            ``shared_gate`` without a shared expert, options for a router or experts that were given as modules, or a
            router or experts of other sizes.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int | None,
        num_experts: int | None = None,
        top_k: int | None = None,
        *,
        router: str | nn.Module | None = "softmax_topk",
        experts: str | nn.Module | None = None,
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
        if isinstance(experts, nn.Module):
            num_experts = _agreed("num_experts", num_experts, "experts", experts)
            _agreed("hidden_size", hidden_size, "experts", experts)
        if isinstance(router, nn.Module):
            num_experts = _agreed("num_experts", num_experts, "router", router)
            top_k = getattr(router, "top_k", None) if top_k is None else top_k
        # Classes created by name check themselves whether they need K.
        without = top_k is None and isinstance(router, (str, nn.Module))
        check_selection(num_experts, num_experts if without else top_k)
        if shared_gate and shared_intermediate_size is None:
            raise ValueError("shared_gate needs a shared expert, got shared_intermediate_size=None")
        if shared_intermediate_size is not None:
            check_widths(shared_intermediate_size=shared_intermediate_size)
        factory = factory_of(device, dtype)
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.router = self._router(router, router_options, factory)
        if isinstance(router, str):
            self.top_k = self.router.top_k
        layout = {
            "interleaved": interleaved,
            "transposed": transposed,
            "capacity_factor": capacity_factor,
            "form": form if experts is None else experts,
        }
        if isinstance(experts, nn.Module):
            layout["form"] = form
            if given := [name for name, value in layout.items() if value not in (False, None, "grouped")]:
                raise ValueError(f"{', '.join(given)} must not be given beside an experts module, which has its own")
            if intermediate_size is not None:
                raise ValueError(f"intermediate_size must be None beside an experts module, got {intermediate_size}")
            self.experts = experts
        elif experts is not None and not isinstance(experts, str):
            raise TypeError(f"experts must be an nn.Module, a str or None, got {type(experts).__name__}")
        else:
            self.experts = Experts(
                num_experts, hidden_size, intermediate_size, activation=activation, bias=bias, **layout, **factory
            )
        self.shared_expert = None
        if shared_intermediate_size is not None:
            self.shared_expert = SharedExpert(
                hidden_size, shared_intermediate_size, activation=activation, bias=bias, **factory
            )
        self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False, **factory) if shared_gate else None

    def _router(self, router: object, options: dict[str, object], factory: dict[str, object]) -> nn.Module | None:
        if isinstance(router, str):
            if "router_bias" in options:
                options["bias"] = options.pop("router_bias")
            return router_class(router).from_top_k(self.hidden_size, self.num_experts, self.top_k, **options, **factory)
        if router is not None and not isinstance(router, nn.Module):
            raise TypeError(f"router must be a str, an nn.Module or None, got {type(router).__name__}")
        if options:
            raise ValueError(f"router options need a router given by name, got {sorted(options)} beside {router!r}")
        return router

    def forward(
        self,
        x: torch.Tensor,
        *,
        routing: Routing | None = None,
        token_ids: torch.Tensor | None = None,
        return_routing: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, Routing]:
        """The layer's output for ``x (..., H)``.

        Args:
            x: ``(..., H)``; T is the product of the leading sizes.
            routing: replaces the router's routing, for example with that of another layer.
            token_ids: one integer per token, in any shape of T elements, for routers that use them.
            return_routing: whether to return the :class:`Routing` too, for balance losses and bias updates.

        Returns:
            ``y`` of the shape of ``x``, in its dtype or autocast's; with ``return_routing`` the pair ``(y, routing)``.

        Raises:
            RuntimeError: ``torch.jit.trace`` or ``torch.func.vmap`` records the call.
            TypeError: the router returns no Routing, or dtypes do not fit.
            ValueError: shapes or devices do not fit, no routing is given to a layer without a router, a token has more
                than K experts, or, on the CPU, logits are NaN or +inf.
        """
        check_traceable(type(self).__name__)
        check_hidden(x, self.hidden_size)
        tokens = x.reshape(-1, self.hidden_size)
        y = shared = None
        if routing is None and token_ids is None and not return_routing:
            y = infer(self.router, self.experts, tokens, self.top_k)
        if y is None:
            routing = self._routing(x, tokens, routing, token_ids)
            y = None if return_routing else infer_routed(self.experts, routing, tokens)
            if y is None:
                routing = routing.dispatched()
                if self.shared_expert is not None and getattr(self.experts, "exchange", None) is not None:
                    # The shared expert is computed while tokens travel.
                    y, shared = self.experts(tokens, routing, beside=lambda: self._shared(tokens))
                else:
                    y = self.experts(tokens, routing)
            if routing.residual is not None:
                check_shape("routing.residual", routing.residual, (tokens.shape[0],), "(T,)")
                y = y + (routing.residual.unsqueeze(1) * tokens).to(y.dtype)
        if self.shared_expert is not None and shared is None:
            shared = self._shared(tokens)
        if x.dim() != 2:
            y, shared = y.view(x.shape), None if shared is None else shared.view(x.shape)
        if shared is not None:
            y = y + shared
        return (y, routing) if return_routing else y

    def _routing(
        self, x: torch.Tensor, tokens: torch.Tensor, routing: Routing | None, token_ids: torch.Tensor | None
    ) -> Routing:
        """The given routing, or the router's, checked."""
        if routing is None:
            if self.router is None:
                raise ValueError("routing must be given to a layer without a router, got None")
            given = x if isinstance(self.router, Router) else tokens
            routing = self.router(given, **self._by_token(token_ids, tokens.shape[0]))
        if not isinstance(routing, Routing):
            raise TypeError(f"routing must be a gossamer.nn.Routing, got {type(routing).__name__}")
        if self.top_k is not None and routing.top_k > self.top_k:
            raise ValueError(f"routing must have at most K = {self.top_k} experts per token, got {routing.top_k}")
        return routing

    def _shared(self, tokens: torch.Tensor) -> torch.Tensor:
        """The shared expert's output, gated if there is a gate."""
        shared = self.shared_expert(tokens)
        return shared if self.shared_expert_gate is None else self.shared_expert_gate(tokens).sigmoid() * shared

    @staticmethod
    def _by_token(token_ids: torch.Tensor | None, num_tokens: int) -> dict[str, torch.Tensor]:
        """The router's keyword arguments: none without ``token_ids``, since plain modules take hidden states alone."""
        if token_ids is None:
            return {}
        check_tensor("token_ids", token_ids)
        check_strided("token_ids", token_ids)
        if token_ids.numel() != num_tokens:
            raise ValueError(
                f"token_ids must have one id for each of T = {num_tokens} tokens, got shape {tuple(token_ids.shape)}"
            )
        return {"token_ids": token_ids.reshape(-1)}

    def extra_repr(self) -> str:
        """Sizes."""
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}"
