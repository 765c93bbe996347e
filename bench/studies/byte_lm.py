"""A small byte-level language model whose feed-forward layers combine any router with any expert layer of the package.

``examples/train_moe_lm.py`` and the study of routers train it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from gossamer.bench.studies.text import windows
from gossamer.nn import (
    BasisExperts,
    CartesianMoE,
    ExpertChoiceRouter,
    Experts,
    LatentExperts,
    MoE,
    ProductKeyExperts,
    Router,
    Routing,
    cluster_variance_loss,
    expert_counts,
    router_losses,
    router_z_loss,
    routing_entropy_loss,
    slot_balance_loss,
    step_routers,
    update_expert_bias,
)
from gossamer.nn.moe.routers import ROUTERS, router_class

VOCABULARY = 256
FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Sizes:
    """Everything that shapes the model.

    Attributes:
        layers: blocks of attention and experts.
        hidden_size: H.
        heads: attention heads.
        intermediate_size: I of a plain expert; other expert layers get as many parameters as plain ones with this I.
        num_experts: E.
        top_k: K.
        sequence: bytes per window.
    """

    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    num_experts: int
    top_k: int
    sequence: int


@dataclass(frozen=True)
class Recipe:
    """How a router is made and balanced in this model.

    Attributes:
        options: returns the options of its ``from_top_k``, given the sizes and the expected number of steps.
        varying: whether it chooses the number of experts of each token itself and ignores K.
        balanced: whether a balance loss and a z-loss train it.
        by_bias: whether a moving bias balances it; if the bias moves at all, it replaces those losses.
        by_cluster: whether MoEC's loss balances it.
        note: what a reader needs to know to compare it with other routers.
    """

    options: Callable[[Sizes, int], dict[str, object]] = lambda sizes, steps: {}
    varying: bool = False
    balanced: bool = True
    by_bias: bool = False
    by_cluster: bool = False
    note: str = ""


def _around(sizes: Sizes, **options: object) -> dict[str, object]:
    """Options of a router around the plain one."""
    return options | {"router_options": {"renormalize": sizes.top_k > 1}}


_VARYING = "the number of experts per token varies; all of them count towards the budget of FLOPs"
_SMOOTH = "it uses nearly all experts until its gates saturate; all of them count towards the budget of FLOPs"
RECIPES: dict[str, Recipe] = {
    "softmax_topk": Recipe(lambda sizes, steps: {"renormalize": sizes.top_k > 1}),
    "sigmoid_topk": Recipe(by_bias=True, note="balanced by a moving bias, without a loss"),
    "hash": Recipe(
        lambda sizes, steps: {"vocabulary": VOCABULARY}, balanced=False, note="a fixed table from bytes to experts"
    ),
    "domain": Recipe(lambda sizes, steps: {"num_domains": 4}, note="by kind of byte: letter, digit, space or other"),
    "top_p": Recipe(varying=True, note=_VARYING),
    "threshold": Recipe(varying=True, note=_VARYING),
    "expert_choice": Recipe(
        balanced=False, note="in training its choices depend on later bytes; it is evaluated causally"
    ),
    "prototype": Recipe(balanced=False),
    "tree": Recipe(balanced=False, note=_SMOOTH),
    "dselect_k": Recipe(balanced=False, note=_SMOOTH),
    "cluster": Recipe(
        lambda sizes, steps: {"resample_every": max(steps // 10, 1)},
        balanced=False,
        by_cluster=True,
        note="one expert per token, so its budget of FLOPs pays for more steps",
    ),
    "token_rounding": Recipe(
        lambda sizes, steps: _around(sizes, tile=16),
        note="in training, the experts' counts are rounded over all tokens of a batch",
    ),
    "broadcast_uncertain": Recipe(
        lambda sizes, steps: _around(sizes),
        note="in training, uncertain tokens go to all experts, which counts towards the budget of FLOPs",
    ),
    "learned_permutation": Recipe(
        lambda sizes, steps: _around(sizes, phase_steps=max(steps // 10, 1)),
        note="for the first tenth of the steps it searches with all experts, which count towards the budget of FLOPs",
    ),
}
# Coefficients of the routers' own loss terms.
OWN_TERMS = {
    "tree_entropy": 0.1,
    "selector_entropy": 0.1,
    "selector_unreachable": 1e-3,
    "permutation": 1e-4,
    "domain": 0.1,
}


def recipe_of(router: str) -> Recipe:
    """The recipe of a router; the default one if :data:`RECIPES` has none."""
    return RECIPES.get(router, Recipe())


def byte_kinds() -> torch.Tensor:
    """``(256,)``: the kind of each byte: 0 a letter, 1 a digit, 2 white space, 3 anything else."""
    kinds = (str.isalpha, str.isdigit, str.isspace)
    return torch.tensor([next((k for k, test in enumerate(kinds) if test(chr(b))), 3) for b in range(VOCABULARY)])


def make_router(name: str, sizes: Sizes, steps: int) -> Router:
    """A new router by its name, with schedules for ``steps`` steps of training."""
    recipe = recipe_of(name)
    top_k = None if recipe.varying else sizes.top_k
    options = recipe.options(sizes, steps)
    return router_class(name).from_top_k(sizes.hidden_size, sizes.num_experts, top_k, **options)


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def of_equal_size(make: Callable[[int], nn.Module], parameters: int) -> int:
    """The size at which a module comes nearest to ``parameters`` parameters, whose number grows with the size."""
    with torch.device("meta"):
        high = 1
        while _numel(make(high)) < parameters:
            high *= 2
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if _numel(make(middle)) < parameters else (low, middle)
        return min((low or 1, high), key=lambda size: abs(_numel(make(size)) - parameters))


def _plain(sizes: Sizes, form: str = "grouped") -> Experts:
    return Experts(sizes.num_experts, sizes.hidden_size, sizes.intermediate_size, form=form)


def _latent(sizes: Sizes) -> LatentExperts:
    def make(inner: int) -> LatentExperts:
        return LatentExperts(sizes.num_experts, sizes.hidden_size, inner, max(1, sizes.hidden_size // 2))

    return make(of_equal_size(make, _plain_parameters(sizes)))


def _basis(sizes: Sizes) -> BasisExperts:
    def make(inner: int) -> BasisExperts:
        return BasisExperts(sizes.num_experts, sizes.hidden_size, inner, max(1, sizes.num_experts // 4))

    return make(of_equal_size(make, _plain_parameters(sizes)))


def _plain_parameters(sizes: Sizes) -> int:
    with torch.device("meta"):
        return _numel(_plain(sizes))


def _over(experts: Callable[[Sizes], nn.Module]) -> Callable[[Sizes, str, int], nn.Module]:
    """A function that makes a mixture-of-experts layer over the experts that ``experts`` makes."""
    return lambda sizes, router, steps: MoE(
        sizes.hidden_size, None, router=make_router(router, sizes, steps), experts=experts(sizes)
    )


def _cartesian(sizes: Sizes, router: str, steps: int) -> CartesianMoE:
    def make(inner: int) -> CartesianMoE:
        return CartesianMoE(sizes.hidden_size, inner, sizes.num_experts, sizes.top_k)

    with torch.device("meta"):
        routers = 2 * _numel(make_router("softmax_topk", sizes, steps)) + 2 * sizes.hidden_size
    inner = of_equal_size(make, _plain_parameters(sizes) + routers)
    experts = [Experts(sizes.num_experts, sizes.hidden_size, inner) for _ in range(2)]
    return CartesianMoE(
        sizes.hidden_size, None, router=[make_router(router, sizes, steps) for _ in range(2)], experts=experts
    )


# For product-key experts: heads, experts per head, and the size of a query.
HEADS, CHOSEN, KEY_DIM = 4, 8, 32


def _product_key(sizes: Sizes, router: str, steps: int) -> ProductKeyExperts:
    def make(side: int) -> ProductKeyExperts:
        return ProductKeyExperts(
            sizes.hidden_size, side * side, num_heads=HEADS, top_k=min(CHOSEN, side), key_dim=KEY_DIM
        )

    return make(of_equal_size(make, _plain_parameters(sizes)))


# Name -> the feed-forward layer of a block, from the sizes, the router's name and the steps of training.
EXPERT_LAYERS: dict[str, Callable[[Sizes, str, int], nn.Module]] = {
    "grouped": _over(_plain),
    "block_sparse": _over(lambda sizes: _plain(sizes, "block_sparse")),
    "latent": _over(_latent),
    "basis": _over(_basis),
    "cartesian": _cartesian,
    "product_key": _product_key,
}
# Expert layers that choose their experts without a router.
OWN_ROUTERS = frozenset({"product_key"})


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, hidden_size: int, heads: int, sequence: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        half = hidden_size // heads // 2
        angles = torch.arange(sequence)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Turn each pair of channels by its position's angle."""
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.cos[: x.shape[-2]].to(x.dtype), self.sin[: x.shape[-2]].to(x.dtype)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, S, H)`` to ``(B, S, H)``."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a feed-forward layer of experts, each behind a norm and added to the stream."""

    def __init__(self, sizes: Sizes, moe: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(sizes.hidden_size)
        self.attention = Attention(sizes.hidden_size, sizes.heads, sizes.sequence)
        # A Cartesian layer has its norms inside.
        self.moe_norm = None if isinstance(moe, CartesianMoE) else nn.RMSNorm(sizes.hidden_size)
        self.moe = moe

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, list[Routing]]:
        """The stream after this block, and the routings that its experts used."""
        x = x + self.attention(self.attention_norm(x))
        if isinstance(self.moe, CartesianMoE):
            x, routings = self.moe(x, token_ids=tokens, return_routing=True)
            return x, list(routings)
        u = self.moe_norm(x)
        if isinstance(self.moe, ProductKeyExperts):
            routing = self.moe.route(u)
            y = self.moe.compute(u.flatten(0, -2), routing).view(u.shape)
        else:
            y, routing = self.moe(u, token_ids=tokens, return_routing=True)
        return x + y, [routing]


class ByteLM(nn.Module):
    """A decoder over bytes whose feed-forward layers are mixtures of experts.

    Args:
        sizes: sizes of the model.
        router: a name of ``gossamer.nn.moe.routers.ROUTERS``; ignored by expert layers that choose experts themselves.
        experts: a name of :data:`EXPERT_LAYERS`.
        steps: steps of training, for routers with a schedule.
    """

    def __init__(
        self, sizes: Sizes, router: str = "softmax_topk", experts: str = "grouped", *, steps: int = 1000
    ) -> None:
        super().__init__()
        self.sizes = sizes
        make = EXPERT_LAYERS[experts]
        self.embedding = nn.Embedding(VOCABULARY, sizes.hidden_size)
        self.blocks = nn.ModuleList(Block(sizes, make(sizes, router, steps)) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.hidden_size)
        self.head = nn.Linear(sizes.hidden_size, VOCABULARY, bias=False)
        # At first every byte is equally likely, which costs 8 bits.
        nn.init.zeros_(self.head.weight)
        self.register_buffer("kinds", byte_kinds() if router == "domain" else None, persistent=False)

    def train(self, mode: bool = True) -> ByteLM:
        """Set the mode as for any module; in evaluation, expert-choice routers become causal."""
        for module in self.modules():
            if isinstance(module, ExpertChoiceRouter):
                module.causal = not mode
        return super().train(mode)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[Routing]]:
        """Logits ``(B, S, 256)`` for bytes ``(B, S)``, and each layer's routings."""
        x, routings = self.embedding(tokens), []
        token_ids = tokens if self.kinds is None else self.kinds[tokens]
        for block in self.blocks:
            x, found = block(x, token_ids)
            routings += found
        return self.head(self.norm(x)), routings


def routed_layers(model: ByteLM) -> list[nn.Module]:
    """The layers of experts, one for each routing that the model returns (a Cartesian layer has two)."""
    layers: list[nn.Module] = []
    for block in model.blocks:
        cartesian = isinstance(block.moe, CartesianMoE)
        layers += [half.moe for half in block.moe.halves] if cartesian else [block.moe]
    return layers


def live(routing: Routing) -> int:
    """The number of slots that have an expert."""
    return int((routing.expert_ids < routing.num_experts).sum())


def expert_flops(experts: nn.Module, rows: int, tokens: int, busy: int) -> float:
    """FLOPs of an expert layer's forward pass for these numbers of live slots, of tokens, and of experts with slots."""
    h = experts.hidden_size
    if isinstance(experts, ProductKeyExperts):
        side = math.isqrt(experts.num_experts)
        retrieval = 2 * h * experts.num_heads * experts.key_dim + 2 * experts.num_heads * side * experts.key_dim
        return tokens * retrieval + 4 * h * rows
    i, halves = experts.intermediate_size, experts.activation.halves
    if isinstance(experts, LatentExperts):
        latent = experts.latent_size
        outputs = h if experts.out_proj is None else latent
        shared = experts.in_proj.numel() + (0 if experts.out_proj is None else experts.out_proj.numel())
        return 2 * rows * i * (halves * latent + outputs) + 2 * tokens * shared / experts.in_proj.shape[0]
    made = 0
    if isinstance(experts, BasisExperts):
        made = 2 * busy * halves * experts.rank * h * (i + experts.num_bases)
    return 2 * rows * h * i * (halves + 1) + made


def forward_flops(model: ByteLM, routings: Sequence[Routing], tokens: int) -> float:
    """FLOPs of the model's forward pass over ``tokens`` bytes; the routings tell the work of the experts."""
    sizes = model.sizes
    h = sizes.hidden_size
    # Attention's products between positions stop at the diagonal.
    per_token = sizes.layers * (8 * h * h + 2 * h * sizes.sequence) + 2 * h * VOCABULARY
    total = float(per_token * tokens)
    for layer, routing in zip(routed_layers(model), routings, strict=True):
        own = isinstance(layer, ProductKeyExperts)
        busy = int((counts_of(routing) > 0).sum())
        total += 0 if own else 2 * tokens * _numel(layer.router)
        total += expert_flops(layer if own else layer.experts, live(routing), tokens, busy)
    return total


def counts_of(routing: Routing) -> torch.Tensor:
    """``(E,)``, the number of slots of each expert, computed without sorting."""
    flat = routing.expert_ids.reshape(-1)
    return flat.clamp(0, routing.num_experts).bincount(minlength=routing.num_experts + 1)[: routing.num_experts]


@dataclass(frozen=True)
class Balance:
    """Coefficients of the terms that training adds to the loss of the text.

    Attributes:
        balance_weight: coefficient of the load-balance loss, which is 1 at perfect balance.
        z_weight: coefficient of the router z-loss.
        entropy_weight: coefficient of the entropy of routers that decide themselves how many experts a token gets.
        bias_rate: rate of the moving bias of routers that have one; 0 to use the loss instead.
    """

    balance_weight: float = 0.02
    z_weight: float = 1e-3
    entropy_weight: float = 1e-2
    bias_rate: float = 1e-3


def balance_terms(
    model: ByteLM,
    routings: Sequence[Routing],
    recipe: Recipe,
    balance: Balance,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor | float:
    """The terms of each layer, averaged. Pooling the layers' tokens would hide an idle expert behind another layer's.

    With ``group``, terms other than a router's own are computed over the batches of all its ranks.
    """
    by_loss = recipe.balanced and not (recipe.by_bias and balance.bias_rate)
    total: torch.Tensor | float = 0.0
    for layer, routing in zip(routed_layers(model), routings, strict=True):
        for name, term in router_losses(routing).items():
            total = total + OWN_TERMS[name] * term
        if recipe.by_cluster:
            router = layer.router
            spread = cluster_variance_loss(routing, router.num_clusters, survivors=router.survivors, group=group)
            total = total + balance.balance_weight * spread
        if by_loss and balance.balance_weight and routing.has_probabilities:
            total = total + balance.balance_weight * slot_balance_loss(routing, group=group)
        if by_loss and balance.z_weight and routing.logits is not None:
            total = total + balance.z_weight * router_z_loss(routing, group=group)
        if recipe.varying:
            total = total + balance.entropy_weight * routing_entropy_loss(routing, group=group)
    return total / len(routings)


def after_step(
    model: ByteLM, routings: Sequence[Routing], balance: Balance, group: dist.ProcessGroup | None = None
) -> None:
    """Update schedules, biases (over all of ``group``) and thresholds of expert choice after an optimizer step."""
    step_routers(model)
    for layer, routing in zip(routed_layers(model), routings, strict=True):
        router = getattr(layer, "router", None)
        if balance.bias_rate and (bias := getattr(router, "e_score_correction_bias", None)) is not None:
            update_expert_bias(bias, expert_counts(routing, group=group), balance.bias_rate)
        if isinstance(router, ExpertChoiceRouter):
            router.update_thresholds(routing, momentum=0.9)


def cross_entropy(model: ByteLM, batch: torch.Tensor) -> tuple[torch.Tensor, list[Routing]]:
    """Mean loss in nats per byte of windows ``(B, S + 1)``, and each layer's routings."""
    logits, routings = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten()), routings


@torch.no_grad()
def validate(
    model: ByteLM,
    valid: torch.Tensor,
    num_windows: int,
    batch: int,
    device: str = "cpu",
    group: dist.ProcessGroup | None = None,
) -> float:
    """Bits per byte on windows spread evenly over the validation bytes, divided evenly among the ranks of ``group``."""
    model.eval()
    starts = torch.linspace(0, valid.numel() - model.sizes.sequence - 1, num_windows).long()
    if group is not None:
        starts, batch = starts[group.rank() :: group.size()], batch // group.size()
    losses = [
        cross_entropy(model, windows(valid, part, model.sizes.sequence).to(device))[0] * part.numel()
        for part in starts.split(batch)
    ]
    model.train()
    total = sum(losses)
    if group is not None:
        dist.all_reduce(total, group=group)
    return float(total) / num_windows / math.log(2)


def router_names() -> list[str]:
    """The routers to compare: all but topk_softmax, which equals softmax_topk with renormalised weights."""
    return [name for name in ROUTERS if name != "topk_softmax"]
