"""Expert choice: each expert takes its most probable tokens."""

from __future__ import annotations

import math
import warnings

import torch

from gossamer._checks import check_floating, check_number, check_positive, check_same_device, check_shape
from gossamer.nn.moe.capacity import expert_capacity
from gossamer.nn.moe.routers.linear import LinearRouter
from gossamer.nn.moe.routing import Routing, as_logits, route_where, softmax_probabilities
from gossamer.ops.topk_routing import choose_tokens, live_experts


def _check_factor(capacity_factor: float) -> None:
    check_number("capacity_factor", capacity_factor, above=0, finite=True)


def expert_choice(logits: torch.Tensor, capacity_factor: float) -> Routing:
    """Each expert takes its C most probable tokens (expert choice, Zhou et al., 2022), so loads are equal without a
    loss.

    ``p = softmax(logits)`` over the experts; expert e takes the C highest entries of column e (the earlier token among
    equal ones), with ``C = int(capacity_factor · T/E)`` but at least 1 and at most T; the weight is ``p_te``. A token
    may get any number of experts from none to E. A masked expert (−inf) is never chosen. The rules for +inf and NaN are
    those of :func:`softmax_topk`.

    Warning:
        The experts of a token depend on all other tokens of the batch, also on later ones of its sequence: the rule is
        not causal. A language model trained with it cannot be decoded with it; see :func:`expert_choice_threshold`.

    Args:
        logits: ``(..., E)``, floating, converted to float32 (float64 stays); T is the product of the leading sizes.
        capacity_factor: average number of experts per token; positive.

    Returns:
        A :class:`Routing` with E slots, slot e of expert e.

    Raises:
        TypeError: ``logits`` is not a floating tensor, or ``capacity_factor`` is not a number.
        ValueError: ``capacity_factor`` is not positive and finite; on the CPU, a logit is NaN or +inf.
    """
    _check_factor(capacity_factor)
    logits = as_logits(logits)
    num_tokens, num_experts = logits.shape
    capacity = min(num_tokens, max(1, expert_capacity(num_tokens, 1, num_experts, capacity_factor)))
    probabilities = softmax_probabilities(logits)
    chosen = choose_tokens(logits, probabilities.detach(), capacity)
    return route_where(chosen, probabilities, logits=logits, max_rows=num_experts * capacity)


def expert_choice_threshold(logits: torch.Tensor, thresholds: torch.Tensor) -> Routing:
    """The experts for which a token's probability reaches their threshold: a causal form of expert choice.

    If an expert's threshold is the lowest probability that it accepted in training, as
    :meth:`ExpertChoiceRouter.update_thresholds` tracks it, the loads equal those of :func:`expert_choice` on average.

    Args:
        logits: as in :func:`expert_choice`.
        thresholds: ``(E,)`` floating.

    Returns:
        A :class:`Routing` with E slots, slot e of expert e.

    Raises:
        TypeError: ``logits`` or ``thresholds`` is not a floating tensor.
        ValueError: ``thresholds`` has another shape or device; on the CPU, a logit is NaN or +inf.
    """
    logits = as_logits(logits)
    check_shape("thresholds", thresholds, (logits.shape[1],), "(E,)")
    check_floating("thresholds", thresholds)
    check_same_device(logits=logits, thresholds=thresholds)
    probabilities = softmax_probabilities(logits)
    live = live_experts(logits, probabilities.detach(), thresholds.detach().to(logits.dtype))
    return route_where(live, probabilities, logits=logits)


class ExpertChoiceRouter(LinearRouter):
    """:func:`expert_choice` over a linear map; with ``causal``, :func:`expert_choice_threshold`.

    Warning:
        The choice over a batch is not causal. For autoregressive decoding, update the thresholds in training, and then
        set ``causal``:

        >>> y, routing = moe(x, return_routing=True)
        >>> moe.router.update_thresholds(routing)  # after each training step
        >>> moe.eval().router.causal = True

    Args:
        hidden_size: H.
        num_experts: E.
        capacity_factor: average number of experts per token; 2 in the paper.
        causal: whether tokens are routed one by one, by :attr:`thresholds`.
        **options: ``bias``, ``upcast``, ``device``, ``dtype`` of :class:`LinearRouter`.

    Attributes:
        causal: as given; ``eval()`` warns if it is False.
        thresholds: ``(E,)`` float32 buffer, 1/E initially, which stays float32 when the module is cast.

    Raises:
        TypeError: a size is not an int, or ``capacity_factor`` is not a number.
        ValueError: a size is below 1, or ``capacity_factor`` is not positive and finite.
    """

    _wide_buffers = ("thresholds",)

    def __init__(
        self, hidden_size: int, num_experts: int, capacity_factor: float, *, causal: bool = False, **options: object
    ) -> None:
        _check_factor(capacity_factor)
        check_positive(num_experts=num_experts)
        super().__init__(hidden_size, num_experts, num_experts, **options)
        self.capacity_factor = capacity_factor
        self.causal = causal
        thresholds = torch.full((num_experts,), 1 / num_experts, device=self.weight.device, dtype=torch.float32)
        self.register_buffer("thresholds", thresholds)

    @classmethod
    def from_top_k(
        cls, hidden_size: int, num_experts: int, top_k: int | None = None, **options: object
    ) -> ExpertChoiceRouter:
        """With K experts per token on average."""
        check_positive(top_k=top_k)
        return cls(hidden_size, num_experts, top_k, **options)

    def train(self, mode: bool = True) -> ExpertChoiceRouter:
        """As for any module, with a warning if evaluation will not be causal."""
        if self.training and not mode and not self.causal:
            warnings.warn(
                "ExpertChoiceRouter looks at all tokens of a batch, later ones of a sequence too, which is not causal: "
                "set causal=True after update_thresholds() for autoregressive decoding",
                UserWarning,
                stacklevel=2,
            )
        return super().train(mode)

    @torch.no_grad()
    def update_thresholds(self, routing: Routing, momentum: float = 0.99) -> None:
        """Track the lowest weight that each expert accepted: ``threshold = momentum · threshold + (1 − momentum) ·
        least``.

        Args:
            routing: of a training step, by this router. Experts without tokens keep their threshold.
            momentum: at least 0, below 1.

        Raises:
            ValueError: ``momentum`` is out of range, or the routing is of another number of experts or slots.
        """
        check_number("momentum", momentum, least=0, below=1)
        if routing.num_experts != self.num_experts or routing.top_k != self.num_experts:
            raise ValueError(
                f"routing must have a slot for each of {self.num_experts} experts, got {routing.top_k} slots of "
                f"{routing.num_experts} experts"
            )
        weights = routing.weights.masked_fill(routing.expert_ids >= self.num_experts, math.inf)
        least = torch.cat([weights, weights.new_full((1, self.num_experts), math.inf)]).amin(dim=0)
        least = torch.where(least < math.inf, least, self.thresholds)
        self.thresholds.lerp_(least.to(self.thresholds.dtype), 1 - momentum)

    def route(self, logits: torch.Tensor) -> Routing:
        """:func:`expert_choice` of ``logits (T, E)``, or :func:`expert_choice_threshold` if ``causal``."""
        if self.causal:
            return expert_choice_threshold(logits, self.thresholds)
        return expert_choice(logits, self.capacity_factor)

    def reset_parameters(self) -> None:
        """Redraw the weight and set the thresholds back."""
        super().reset_parameters()
        if "thresholds" in self._buffers:
            self.thresholds.fill_(1 / self.num_experts)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"{super().extra_repr()}, capacity_factor={self.capacity_factor}, causal={self.causal}"
