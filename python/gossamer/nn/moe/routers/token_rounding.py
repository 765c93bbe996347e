"""Token rounding: every expert serves a multiple of a tile of tokens in training."""

from __future__ import annotations

import torch

from gossamer._checks import check_positive
from gossamer._trusted import is_readable
from gossamer.nn.moe.routers.base import Router, RouterAround
from gossamer.nn.moe.routing import Routing, dense_weights, route_where

MODES = ("nearest", "up", "down")


def _check_rounding(tile: int, mode: str) -> None:
    check_positive(tile=tile)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")


def round_counts(counts: torch.Tensor, tile: int, mode: str) -> torch.Tensor:
    """Integers rounded to multiples of ``tile``: to the nearest (ties to the even multiple), or always up or down."""
    below, rest = counts // tile, counts % tile
    if mode == "up":
        below = below + (rest > 0)
    elif mode == "nearest":
        below = below + ((2 * rest > tile) | ((2 * rest == tile) & (below % 2 == 1)))
    return below * tile


def round_tokens(routing: Routing, tile: int = 128, *, mode: str = "nearest") -> Routing:
    """The routing with each expert's number of tokens made a multiple of ``tile`` (SonicMoE, Guo et al., 2025).

    An expert that f tokens chose gets f̂ tokens, where f̂ is f rounded but at most T: first those that chose it, by
    descending weight, then others by descending probability. So an expert with f̂ < f loses its tokens of lowest
    weight, and one with f̂ > f takes the most probable additional tokens. Chosen tokens keep their weights; the weight
    of an additional token is its probability. The selection has no gradient. If all counts are multiples already, the
    routing is returned unchanged.

    Args:
        routing: a routing with probabilities. In the paper a token's weights add up to one, as with a
            :class:`SoftmaxRouter` with ``renormalize``.
        tile: rows of a tile of the grouped products.
        mode: ``"nearest"`` (half to even), ``"up"`` or ``"down"``.

    Returns:
        A :class:`Routing` with E slots, slot e of expert e. A token's experts depend on all tokens of the batch.

    Raises:
        TypeError: ``routing`` is not a Routing, or ``tile`` is not an int.
        ValueError: it has no probabilities, ``tile`` is below 1 or ``mode`` unknown.
    """
    if not isinstance(routing, Routing):
        raise TypeError(f"routing must be a Routing, got {type(routing).__name__}")
    _check_rounding(tile, mode)
    check_positive(**{"routing.num_experts": routing.num_experts})
    e, num_tokens = routing.num_experts, routing.num_tokens
    probabilities = routing.probabilities.to(routing.weights.dtype)
    weights = dense_weights(routing)
    with torch.no_grad():
        ids = routing.expert_ids.clamp(max=e).long()
        chosen = torch.zeros(num_tokens, e + 1, dtype=torch.bool, device=ids.device).scatter(1, ids, True)[:, :e]
        counts = round_counts(chosen.sum(dim=0), tile, mode)
        # Tokens that chose the expert come first; for others −1/p is below all weights and keeps the order of small p.
        keys = torch.where(chosen, weights, -1 / probabilities)
        most = int(counts.max()) if is_readable(counts) else num_tokens
        ranked = keys.topk(min(most, num_tokens), dim=0).values
        if ranked.shape[0]:
            lowest = ranked.gather(0, (counts - 1).clamp(0, ranked.shape[0] - 1).unsqueeze(0))
            above, level = keys > lowest, keys == lowest
            # Among equal tokens the first ones are kept.
            kept = above | (level & (level.cumsum(dim=0) <= counts - above.sum(dim=0)))
            kept = kept & (counts > 0)
        else:
            kept = torch.zeros_like(chosen)
    made = route_where(kept, torch.where(chosen, weights, probabilities))
    max_rows = num_tokens * min(routing.top_k, e) + e * (0 if mode == "down" else tile)
    return routing.with_experts(made.expert_ids, made.weights, max_rows=max_rows)


class TokenRounding(RouterAround):
    """Applies :func:`round_tokens` to another router in training; in evaluation it returns that router's routing.

    >>> router = TokenRounding(SoftmaxRouter(1024, 64, 8, renormalize=True), tile=128)

    Args:
        router: a router with probabilities.
        tile: as in :func:`round_tokens`, like ``mode``.
        mode: rounding of the counts.

    Raises:
        TypeError: ``router`` is not a Router, or ``tile`` is not an int.
        ValueError: ``tile`` is below 1, or ``mode`` unknown.
    """

    def __init__(self, router: Router, tile: int = 128, *, mode: str = "nearest") -> None:
        super().__init__(router)
        _check_rounding(tile, mode)
        self.top_k = self.num_experts
        self.tile = tile
        self.mode = mode

    def forward(self, x: torch.Tensor, *, token_ids: torch.Tensor | None = None) -> Routing:
        """The routing of ``x (..., H)``."""
        routing = self.router(x, token_ids=token_ids)
        return round_tokens(routing, self.tile, mode=self.mode) if self.training else routing

    def extra_repr(self) -> str:
        """Options."""
        return f"tile={self.tile}, mode={self.mode!r}"
