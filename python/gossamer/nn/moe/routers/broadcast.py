"""GW-MoE: uncertain tokens go to all experts in training."""

from __future__ import annotations

import torch

from gossamer._checks import check_number, check_positive, check_same_device
from gossamer.nn.moe.routers.base import Router, RouterAround
from gossamer.nn.moe.routing import Routing, padded


def _check_broadcast(entropy: float, slots: int | None) -> None:
    check_number("entropy", entropy, least=0)
    if slots is not None:
        check_positive(slots=slots)


def broadcast_uncertain(
    routing: Routing, entropy: float, *, slots: int | None = None, sequence_length: int | None = None
) -> Routing:
    """The routing with uncertain tokens sent to all experts (GW-MoE, Wu et al., 2024).

    A token is uncertain where ``−Σ_e p_e·log(p_e + 1e-5) >= entropy``, in nats, of its probabilities p. It then gets
    every expert with weight p_e; other tokens keep their experts. In each sequence only the first ``slots`` uncertain
    tokens are sent to all experts.

    Args:
        routing: with probabilities.
        entropy: threshold, at least 0; a uniform router has entropy log E. The paper uses 1.6 for 8 experts.
        slots: number of uncertain tokens per sequence that are broadcast; None for all.
        sequence_length: S, the length of the consecutive sequences; None for one sequence of T tokens.

    Returns:
        A :class:`Routing` with E slots.

    Raises:
        TypeError: ``routing`` is not a Routing, or an argument no number.
        ValueError: it has no probabilities, ``entropy`` is negative, ``slots`` below 1, S does not divide T, or the
            routing's tensors differ in shape or device.
    """
    if not isinstance(routing, Routing):
        raise TypeError(f"routing must be a Routing, got {type(routing).__name__}")
    _check_broadcast(entropy, slots)
    e, num_tokens = routing.num_experts, routing.num_tokens
    check_same_device(expert_ids=routing.expert_ids, weights=routing.weights)
    probabilities = routing.probabilities.to(routing.weights.dtype)
    max_rows = None
    with torch.no_grad():
        uncertain = -(probabilities * (probabilities + 1e-5).log()).sum(dim=1) >= entropy
        if slots is not None:
            length = max(num_tokens, 1) if sequence_length is None else sequence_length
            check_positive(sequence_length=length)
            if num_tokens % length:
                raise ValueError(f"sequence_length must divide T = {num_tokens}, got {length}")
            of_sequence = uncertain.view(-1, length)
            uncertain = (of_sequence & (of_sequence.cumsum(dim=1) <= slots)).flatten()
            bound = num_tokens * routing.top_k if routing.max_rows is None else routing.max_rows
            max_rows = bound + num_tokens // length * slots * e
        experts = torch.arange(e, device=uncertain.device)
        every = torch.where(probabilities > 0, experts, e)
    ids, weights = padded(routing, max(routing.top_k, e))
    return routing.with_experts(
        torch.where(uncertain.unsqueeze(1), every, ids),
        torch.where(uncertain.unsqueeze(1), probabilities, weights),
        max_rows=max_rows,
    )


class BroadcastUncertain(RouterAround):
    """Applies :func:`broadcast_uncertain` to another router in training; in evaluation it returns that router's
    routing.

    The sequences are those of the hidden states ``(..., S, H)`` that the router is called with; ``(T, H)`` is one.

    Args:
        router: a router with probabilities; top-1 by raw probabilities in the paper.
        entropy: as in :func:`broadcast_uncertain`, like ``slots``.
        slots: number of uncertain tokens per sequence that are broadcast.

    Raises:
        TypeError: ``router`` is not a Router, or an argument no number.
        ValueError: ``entropy`` is negative, or ``slots`` below 1.
    """

    def __init__(self, router: Router, entropy: float, *, slots: int | None = None) -> None:
        super().__init__(router)
        _check_broadcast(entropy, slots)
        self.top_k = self.num_experts
        self.entropy = entropy
        self.slots = slots

    @classmethod
    def from_top_k(
        cls,
        hidden_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        entropy: float | None = None,
        **options: object,
    ) -> Router:
        """Wrap a router of K experts; by default ``entropy`` is the fraction of log E that the paper uses for 8
        experts.
        """
        if entropy is None:
            entropy = 0.77 * torch.tensor(float(num_experts)).log().item()
        return super().from_top_k(hidden_size, num_experts, top_k, entropy=entropy, **options)

    def forward(self, x: torch.Tensor, *, token_ids: torch.Tensor | None = None) -> Routing:
        """The routing of ``x (..., H)``."""
        routing = self.router(x, token_ids=token_ids)
        if not self.training:
            return routing
        length = x.shape[-2] if x.dim() > 2 and x.shape[-2] else None
        return broadcast_uncertain(routing, self.entropy, slots=self.slots, sequence_length=length)

    def extra_repr(self) -> str:
        """Options."""
        return f"entropy={self.entropy}, slots={self.slots}"
