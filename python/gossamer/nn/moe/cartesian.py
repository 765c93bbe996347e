"""Two mixture-of-experts layers in sequence, whose experts combine to pairs (CartesianMoE)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from gossamer._activation import Activation
from gossamer._checks import MAX_SIZE, check_number, check_positive, check_same_device, check_shape, check_widths
from gossamer._parameters import factory_of
from gossamer.nn.moe.experts.shared import SharedExpert
from gossamer.nn.moe.layer import MoE
from gossamer.nn.moe.routing import Routing, check_hidden


class CartesianHalf(nn.Module):
    """One of the two layers: ``x + M(norm(x))``, ``M(u) = Σ_k w_k·expert_k(u)``.

    With a shared expert, ``M(u) = β₀·Σ_k w_k·expert_k(u) + β₁·shared(u)`` with ``β = softmax(mix(u))``.

    Attributes:
        norm: RMS norm of the input.
        moe: the :class:`MoE`.
        shared_expert: :class:`SharedExpert` or None.
        mix: ``nn.Linear(H, 2)``, or None without a shared expert.
    """

    def __init__(
        self,
        moe: MoE,
        shared_intermediate_size: int | None,
        *,
        activation: str | Activation,
        eps: float | None,
        **factory: object,
    ) -> None:
        super().__init__()
        hidden_size = moe.hidden_size
        self.norm = nn.RMSNorm(hidden_size, eps=eps, **factory)
        self.moe = moe
        self.shared_expert = self.mix = None
        if shared_intermediate_size is not None:
            self.shared_expert = SharedExpert(hidden_size, shared_intermediate_size, activation=activation, **factory)
            self.mix = nn.Linear(hidden_size, 2, **factory)

    def forward(self, x: torch.Tensor, *, token_ids: torch.Tensor | None = None) -> tuple[torch.Tensor, Routing]:
        """The residual stream after this half, and the routing of its experts."""
        u = self.norm(x)
        y, routing = self.moe(u, token_ids=token_ids, return_routing=True)
        if self.shared_expert is not None:
            logits = self.mix(u)
            shares = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).to(y.dtype)
            routed, shared = shares.split(1, -1)
            y = routed * y + shared * self.shared_expert(u)
        return x + y, routing


class CartesianMoE(nn.Module):
    """Two layers of E small experts each that replace one layer, giving E² pairs of experts (CartesianMoE).

    ``h = x + M_A(norm_A(x))`` and ``y = h + M_B(norm_B(h))``: a token that meets K experts in each half uses K² pairs
    (i, j), and every expert belongs to E pairs. After CartesianMoE (Su et al., 2025). Two halves of E experts with I/2
    have as many parameters as E experts with I, and K experts in each half cost the FLOPs of K plain ones. The second
    half depends on the first, so there are two rounds of routing, sorting and combining.

    Unlike :class:`MoE` it contains its norms and the residual additions: it takes the residual stream and returns it.

    >>> layer = gossamer.nn.CartesianMoE(1024, 256, num_experts=16, top_k=2, shared_intermediate_size=256)
    >>> x, routings = layer(x, return_routing=True)
    >>> loss = task_loss(x) + 0.01 * sum(gossamer.nn.load_balance_loss(r) for r in routings)

    Args:
        hidden_size: H.
        intermediate_size: I of an expert of either half; None with ``experts`` modules.
        num_experts: E of either half.
        top_k: K of either half.
        router: a name as in :class:`MoE`, or a pair of router modules.
        experts: None, a ``form`` as in :class:`MoE`, or a pair of expert layers.
        activation: of all experts.
        bias: whether the routed experts' products have biases.
        shared_intermediate_size: I of a shared expert in each half, mixed in with learned weights; None for no shared
            expert.
        capacity_factor: capacity factor of the routed experts; not allowed with expert layers.
        eps: of the norms.
        device: of the parameters.
        dtype: of the parameters.
        **router_options: options of routers given by name. Weights are renormalised by default if K > 1.

    Attributes:
        halves: two :class:`CartesianHalf`.

    Raises:
        TypeError: as in :class:`MoE`, or a pair does not hold modules.
        ValueError: as in :class:`MoE`, or a pair does not have two elements.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int | None,
        num_experts: int | None = None,
        top_k: int | None = None,
        *,
        router: str | Sequence[nn.Module] = "softmax_topk",
        experts: str | Sequence[nn.Module] | None = None,
        activation: str | Activation = "swiglu",
        bias: bool = False,
        shared_intermediate_size: int | None = None,
        capacity_factor: float | None = None,
        eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **router_options: object,
    ) -> None:
        super().__init__()
        check_positive(hidden_size=hidden_size)
        if top_k is not None:
            check_positive(top_k=top_k)
        if shared_intermediate_size is not None:
            check_widths(shared_intermediate_size=shared_intermediate_size)
        check_number("eps", eps, least=0, finite=True, optional=True)
        factory = factory_of(device, dtype)
        if router == "softmax_topk" and top_k != 1:
            router_options.setdefault("renormalize", True)
        routers, layers = _pair("router", router), _pair("experts", experts)
        self.hidden_size = hidden_size
        self.halves = nn.ModuleList(
            CartesianHalf(
                MoE(
                    hidden_size,
                    intermediate_size,
                    num_experts,
                    top_k,
                    router=half_router,
                    experts=half_experts,
                    activation=activation,
                    bias=bias,
                    capacity_factor=capacity_factor,
                    **factory,
                    **router_options,
                ),
                shared_intermediate_size,
                activation=activation,
                eps=eps,
                **factory,
            )
            for half_router, half_experts in zip(routers, layers, strict=True)
        )

    def forward(
        self, x: torch.Tensor, *, token_ids: torch.Tensor | None = None, return_routing: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, tuple[Routing, Routing]]:
        """The residual stream ``(..., H)`` after both halves.

        Args:
            x: ``(..., H)``.
            token_ids: one integer per token, for routers that use them.
            return_routing: whether to return both halves' routings too; :func:`product_routing` combines them.

        Returns:
            ``y`` of the shape of ``x``; with ``return_routing`` the pair ``(y, (first, second))``.

        Raises:
            As :class:`MoE`.
        """
        check_hidden(x, self.hidden_size, self.halves[0].norm.weight)
        routings = []
        for half in self.halves:
            x, routing = half(x, token_ids=token_ids)
            routings.append(routing)
        return (x, tuple(routings)) if return_routing else x


def _pair(name: str, given: object) -> tuple:
    """One value per half: a name or None twice, or the two given modules."""
    if given is None or isinstance(given, str):
        return given, given
    if isinstance(given, nn.Module) and not isinstance(given, nn.ModuleList):
        raise TypeError(f"{name} must be a pair of modules, one for each half, got one {type(given).__name__}")
    if not isinstance(given, (Sequence, nn.ModuleList)):
        raise TypeError(f"{name} must be a str, a pair of modules or None, got {type(given).__name__}")
    if len(given) != 2:
        raise ValueError(f"{name} must be a pair, got {len(given)} of them")
    if given[0] is given[1]:
        raise ValueError(f"{name} must be two modules, got one twice")
    return tuple(given)


def product_routing(first: Routing, second: Routing) -> Routing:
    """The routing over pairs of experts from two routings of the same tokens: pair ``i·E_B + j``, weight ``w_i·v_j``.

    It tells which of the ``E_A·E_B`` pairs each token used, for statistics of load and balance; no layer computes with
    it.

    Args:
        first: of T tokens, K_A experts each out of E_A.
        second: of the same tokens, K_B out of E_B.

    Returns:
        A :class:`Routing` with K_A·K_B experts per token; its probabilities are the products of both, if both have
        some.

    Raises:
        TypeError: one is not a Routing.
        ValueError: they have different numbers of tokens or are on different devices, or logits or
            probabilities have another shape.
    """
    both = (("first", first), ("second", second))
    for name, routing in both:
        if not isinstance(routing, Routing):
            raise TypeError(f"{name} must be a Routing, got {type(routing).__name__}")
        check_positive(**{f"{name}.num_experts": routing.num_experts})
    if first.num_experts * second.num_experts > MAX_SIZE:
        raise ValueError(f"first and second must have at most {MAX_SIZE} pairs of experts")
    if first.num_tokens != second.num_tokens:
        raise ValueError(
            f"first and second must be of the same tokens, got {first.num_tokens} and {second.num_tokens} of them"
        )
    e, f = first.num_experts, second.num_experts
    for name, routing in both:
        if routing.logits is not None:
            check_shape(f"{name}.logits", routing.logits, (routing.num_tokens, routing.num_experts), "(T, E)")
    parts = ("expert_ids", "weights", "logits")
    check_same_device(**{f"{name}.{part}": getattr(routing, part) for name, routing in both for part in parts})
    left, right = first.expert_ids.unsqueeze(2), second.expert_ids.unsqueeze(1)
    ids = torch.where((left < e) & (right < f), left * f + right, e * f).flatten(1)
    weights = (first.weights.unsqueeze(2) * second.weights.unsqueeze(1)).flatten(1)
    probabilities = None
    if first.has_probabilities and second.has_probabilities:
        probabilities = (first.probabilities.unsqueeze(2) * second.probabilities.unsqueeze(1)).flatten(1)
    return Routing(ids, weights, e * f, probabilities=probabilities)
