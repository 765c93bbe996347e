"""DSelect-k: experts by binary codes of smooth steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gossamer._checks import check_fits, check_floating, check_positive, check_same_device, check_shape, check_widths
from gossamer.nn.moe.routers.gates import check_gamma, most_experts, route_parts
from gossamer.nn.moe.routers.linear import LinearRouter
from gossamer.nn.moe.routing import Routing, as_logits, check_hidden, check_rows_per_token, row_bound
from gossamer.ops.tree_routing import TreeRouting, tree_routing


def selector_gates(
    codes: torch.Tensor,
    mixture: torch.Tensor,
    num_experts: int,
    gamma: float,
    arrange: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gates of k selectors over n experts (DSelect-k, Hazimeh et al., 2021), and the output of each selector.

    A selector's m = ⌈log₂ n⌉ values encode the bits of an expert's number, most significant first. With q the
    :func:`smooth_step` of each value, expert i gets ``r_i = Π_b (q_b where bit b of i is 1, else 1 − q_b)``. The gates
    are ``g_i = Σ_j α_j·r_ji`` with ``α = softmax(mixture)``. If n is not a power of two, codes from n on belong to no
    expert, and the gates of a token add up to less than one.

    Args:
        codes: ``(T, k, m)`` floating.
        mixture: ``(T, k)`` floating.
        num_experts: n.
        gamma: width of the smooth step, positive.
        arrange: maps the selectors' outputs ``(T, k, n)`` to experts before they are summed; None for the identity.

    Returns:
        Gates ``(T, n)`` and r ``(T, k, n)``.

    Raises:
        TypeError: a tensor is not floating, or an argument is not a number.
        ValueError: shapes or devices do not fit, there is no selector, or a number is not positive.
    """
    check_positive(num_experts=num_experts)
    check_gamma(gamma)
    check_floating("codes", codes)
    check_floating("mixture", mixture)
    check_shape("codes", codes, (None, None, (num_experts - 1).bit_length()), "(T, k, ⌈log₂ n⌉)")
    check_shape("mixture", mixture, codes.shape[:2], "(T, k)")
    check_same_device(codes=codes, mixture=mixture)
    check_positive(num_selectors=codes.shape[1])
    scores = torch.cat([codes.flatten(1), mixture], dim=1)
    args = TreeRouting(
        scores, codes.shape[1], num_experts, gamma, coded=True, top_k=0, keep_reach=True, keep_sums=False
    )
    found = tree_routing(args, arrange)
    return found.gates, found.reach


class DSelectKRouter(LinearRouter):
    """:func:`selector_gates` over a linear map.

    It starts with all experts and becomes sparse in training, through the ``losses`` of its routings (see
    :func:`router_losses`): a token's ``"selector_entropy"``, ``−Σ_j Σ_i r_ji·log(r_ji + 1e-6)``, which saturates the
    bits, and, where E is not a power of two, ``"selector_unreachable"``, ``Σ_j 1/(1e-6 + Σ_i r_ji)``, which keeps codes
    within the experts. The paper sums the latter over the batch, so a coefficient from the paper must be multiplied by
    T here.

    Args:
        hidden_size: H.
        num_experts: E = n.
        num_selectors: k.
        gamma: width of the smooth step; 1 in the paper.
        max_experts: maximum number of experts per token, the highest gates; None for E.
        static: whether codes and mixture are parameters, the same for all tokens, instead of functions of the token.
        rows_per_token: as in :class:`TopPRouter`.
        **options: ``upcast``, ``device``, ``dtype`` of :class:`LinearRouter`.

    Attributes:
        num_parts: k, the number of parts whose sum gives the gates.
        weight: ``(k·m + k, H)``: the selectors' bits, initially uniform in ±γ/100, and the mixture, in ±1/√H; None if
            static. ``bias`` has as many rows; it is initially 0, and uniform in ±γ/100 if static.

    Raises:
        TypeError: a size is not an int, or ``gamma`` is not a number.
        ValueError: a size is below 1, or ``gamma`` is not positive and finite.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_selectors: int,
        gamma: float,
        max_experts: int | None = None,
        *,
        static: bool = False,
        rows_per_token: float | None = None,
        **options: object,
    ) -> None:
        check_widths(num_experts=num_experts, num_selectors=num_selectors)
        check_gamma(gamma)
        check_rows_per_token(rows_per_token)
        bits = (num_experts - 1).bit_length()
        self.num_selectors = self.num_parts = num_selectors
        self.gamma = gamma
        self.bits = bits
        self.static = static
        self.rows_per_token = rows_per_token
        rows = num_selectors * (bits + 1)
        super().__init__(
            hidden_size, num_experts, most_experts(num_experts, max_experts), bias=True, num_logits=rows, **options
        )
        if static:
            self.register_parameter("weight", None)

    @classmethod
    def from_top_k(
        cls, hidden_size: int, num_experts: int, top_k: int | None = None, *, gamma: float = 1.0, **options: object
    ) -> DSelectKRouter:
        """With K selectors."""
        return cls(hidden_size, num_experts, top_k, gamma, **options)

    def reset_parameters(self) -> None:
        """Redraw weight and bias."""
        check_fits("gamma", self.gamma, self.bias.dtype)
        codes = self.num_selectors * self.bits
        nn.init.zeros_(self.bias)
        with torch.no_grad():
            if self.static:
                self.bias.uniform_(-self.gamma / 100, self.gamma / 100)
            if self.weight is not None:
                self.weight[:codes].uniform_(-self.gamma / 100, self.gamma / 100)
                self.weight[codes:].uniform_(-(self.hidden_size**-0.5), self.hidden_size**-0.5)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """``(T, k·m + k)`` from hidden states ``x (..., H)``."""
        if not self.static:
            return super().logits(x)
        check_hidden(x, self.hidden_size, self.bias)
        wide = torch.promote_types(torch.promote_types(x.dtype, self.bias.dtype), torch.float32)
        return self.bias.to(wide).expand(x.reshape(-1, self.hidden_size).shape[0], -1)

    def route(self, scores: torch.Tensor, arrange: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Routing:
        """The routing for ``scores (T, k·m + k)``: the bits of each selector, then the mixture.

        ``arrange`` is that of :func:`selector_gates`.
        """
        scores = as_logits(scores)
        form = self.num_selectors, self.num_experts, self.gamma
        args = TreeRouting(scores, *form, coded=True, top_k=self.top_k, keep_reach=False, keep_sums=self.training)
        parts = tree_routing(args, arrange)
        gates = parts.gates
        total = gates.sum(dim=1, keepdim=True).clamp(min=torch.finfo(gates.dtype).tiny)
        losses = None
        if self.training:
            losses = {"selector_entropy": parts.sums[..., 0].sum(dim=1)}
            if self.num_experts != 2**self.bits:
                losses["selector_unreachable"] = (1 / (1e-6 + parts.sums[..., 1])).sum(dim=1)
        routing = route_parts(scores, parts, self.top_k, probabilities=gates / total, losses=losses)
        return row_bound(routing, self.rows_per_token)

    def extra_repr(self) -> str:
        """Sizes and options."""
        options = f", num_selectors={self.num_selectors}, gamma={self.gamma}" + (", static=True" if self.static else "")
        if self.static:
            return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}{options}"
        return f"{super().extra_repr()}{options}"
