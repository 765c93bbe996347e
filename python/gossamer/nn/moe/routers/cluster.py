"""MoEC: experts in clusters, found by cosine, with dropout of whole experts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from gossamer._checks import check_fits, check_number, check_positive, check_seed
from gossamer._parameters import factory_of, new_parameter
from gossamer.nn.moe.capacity import check_capacity_factor, expert_capacity, limit_capacity
from gossamer.nn.moe.routers.base import StepCount
from gossamer.nn.moe.routers.linear import LinearRouter
from gossamer.nn.moe.routing import Routing, as_logits
from gossamer.ops.topk_routing import select_experts

# The temperature of the probabilities for balance losses, independent of the gates' learnt temperature.
BALANCE_TEMPERATURE = 0.07
LEAST_TEMPERATURE = 1e-4


class ClusterRouter(StepCount, LinearRouter):
    """The nearest expert by cosine, mixed with the token itself (MoEC, Xie et al., 2023).

    Tokens are projected to a few dimensions, ``h = W·x``, and compared with a centroid per expert: ``cos_e = ⟨h, c_e⟩ /
    (‖h‖·‖c_e‖)``. A token goes to the expert with the largest cosine, with the gate ``α = σ(cos/τ)``, where τ is
    learnt. It keeps ``1 − α`` of itself: the layer returns ``α·expert(x) + (1 − α)·x`` (:attr:`Routing.residual`).
    Balance losses use ``softmax(cos/0.07)``; :func:`cluster_variance_loss` is the loss of the paper.

    The E experts form clusters of ``L = E / num_clusters`` neighbours. In training only ``int((1 − dropout)·L)``
    experts of each cluster, at least one, take part. Their positions are the same in every cluster and are drawn again
    every ``resample_every`` steps. Call :func:`step_routers` after each optimizer step. The draws depend only on
    ``seed`` and the step, so data-parallel ranks make the same draws.

    Args:
        hidden_size: H.
        num_experts: E.
        num_clusters: number of clusters; divides E.
        dropout: share of each cluster that is left out in training; at least 0, below 1.
        resample_every: training steps with the same survivors.
        capacity_factor: each expert serves its first ``int(capacity_factor · T/E)`` tokens, at least one; other tokens
            pass unchanged. None drops nothing.
        projection_size: dimensions of h.
        temperature: initial τ; gates use at least 1e-4.
        seed: seed of the draws.
        **options: ``upcast``, ``device``, ``dtype`` of :class:`LinearRouter`.

    Attributes:
        weight: ``(projection_size, H)``, W.
        centroids: ``(E, projection_size)``, initially orthogonal with gain 0.1.
        temperature: τ, a scalar parameter.
        survivors: int64 buffer, the positions within a cluster of the experts that take part.

    Raises:
        TypeError: a size is not an int, or ``capacity_factor`` is not a number.
        ValueError: a size is below 1, ``num_clusters`` does not divide E, or an option is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_clusters: int,
        *,
        dropout: float = 0.5,
        resample_every: int = 250,
        capacity_factor: float | None = None,
        projection_size: int = 32,
        temperature: float = 0.07,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: object,
    ) -> None:
        check_positive(
            num_experts=num_experts,
            num_clusters=num_clusters,
            resample_every=resample_every,
            projection_size=projection_size,
        )
        if num_experts % num_clusters:
            raise ValueError(
                f"num_clusters must divide num_experts, got num_clusters={num_clusters}, num_experts={num_experts}"
            )
        check_number("dropout", dropout, least=0, below=1)
        check_number("temperature", temperature, above=0, finite=True)
        check_seed(seed)
        check_capacity_factor(capacity_factor)
        factory = factory_of(device, dtype)
        super().__init__(hidden_size, num_experts, 1, num_logits=projection_size, **options, **factory)
        self.num_clusters = num_clusters
        self.dropout = dropout
        self.resample_every = resample_every
        self.capacity_factor = capacity_factor
        self.seed = seed
        self._first_temperature = temperature
        self.centroids = new_parameter(num_experts, projection_size, **factory)
        self.temperature = new_parameter(**factory)
        check_fits("temperature", temperature, self.temperature.dtype)
        self.register_buffer("survivors", self._draw(0).to(device))
        self.count_steps(device)
        self.reset_parameters()

    @classmethod
    def from_top_k(
        cls,
        hidden_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        num_clusters: int | None = None,
        **options: object,
    ) -> ClusterRouter:
        """With one expert per token, whatever K is; by default ``num_clusters`` is the largest divisor of E up to 8."""
        if num_clusters is None:
            num_clusters = math.gcd(num_experts, 8)
        return cls(hidden_size, num_experts, num_clusters, **options)

    def reset_parameters(self) -> None:
        """Redraw the projection and the centroids, and set the temperature back."""
        super().reset_parameters()
        if "centroids" not in self._parameters:
            return
        with torch.no_grad():
            # Orthogonal initialisation needs a factorisation, which is computed in float32.
            self.centroids.copy_(nn.init.orthogonal_(torch.empty_like(self.centroids, dtype=torch.float32), gain=0.1))
            self.temperature.fill_(self._first_temperature)

    def _draw(self, period: int) -> torch.Tensor:
        size = self.num_experts // self.num_clusters
        kept = max(1, int((1 - self.dropout) * size))
        generator = torch.Generator().manual_seed(self.seed + period)
        return torch.randperm(size, generator=generator)[:kept].sort().values

    def step(self) -> None:
        """Count a training step, and draw survivors where their period ends."""
        super().step()
        if self.num_steps % self.resample_every == 0:
            self.survivors.copy_(self._draw(self.num_steps // self.resample_every))

    def route(self, scores: torch.Tensor) -> Routing:
        """The routing for projected tokens ``scores (T, projection_size)``."""
        scores = as_logits(scores)
        centroids = self.centroids.to(scores.dtype)
        cosines = F.normalize(scores, dim=1) @ F.normalize(centroids, dim=1).T
        logits = cosines / BALANCE_TEMPERATURE
        if self.training and self.survivors.numel() * self.num_clusters < self.num_experts:
            dropped = torch.ones(self.num_experts // self.num_clusters, dtype=torch.bool, device=logits.device)
            dropped = dropped.index_fill(0, self.survivors, False).repeat(self.num_clusters)
            logits = logits.masked_fill(dropped, -math.inf)
        ids = select_experts(logits.detach(), logits.detach(), 1)
        temperature = self.temperature.to(scores.dtype).clamp(min=LEAST_TEMPERATURE)
        weights = (cosines.gather(1, ids) / temperature).sigmoid()
        routing = Routing(ids, weights, self.num_experts, logits, residual=1 - weights.squeeze(1))
        if self.capacity_factor is None or routing.num_tokens == 0:
            return routing
        capacity = max(1, expert_capacity(routing.num_tokens, 1, self.num_experts, self.capacity_factor))
        limited = limit_capacity(routing, capacity=capacity)
        weights = weights.masked_fill(limited.expert_ids >= self.num_experts, 0.0)
        return limited.replaced(weights=weights, residual=1 - weights.squeeze(1))

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"{super().extra_repr()}, num_clusters={self.num_clusters}, dropout={self.dropout}"
