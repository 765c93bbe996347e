"""A permutation from a router's outputs to experts, learnt with Sinkhorn iterations and then fixed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from gossamer._checks import check_flags, check_number, check_positive, check_sequence
from gossamer._parameters import factory_of, new_parameter
from gossamer.nn.moe.experts.base import ExpertLayer
from gossamer.nn.moe.routers.base import Router, RouterAround, StepCount
from gossamer.nn.moe.routing import Routing, dense_weights, route_where


def sinkhorn(scores: torch.Tensor, iterations: int) -> torch.Tensor:
    """``exp(scores)`` of ``scores (..., n, n)``, normalised alternately by rows and by columns ``iterations`` times, in
    float64.
    """
    scores = scores.double()
    for _ in range(iterations):
        scores = scores - scores.logsumexp(dim=-1, keepdim=True)
        scores = scores - scores.logsumexp(dim=-2, keepdim=True)
    return scores.exp()


def best_assignment(profit: torch.Tensor) -> torch.Tensor:
    """``(n,)`` int64 on the CPU: the permutation π that maximises ``Σ_i profit[i, π(i)]`` (Hungarian method)."""
    cost = -profit.detach().double().cpu()
    if not bool(cost.isfinite().all()):
        raise ValueError("log_weights must be finite to choose a permutation, got NaN or infinity in its matrix")
    n = cost.shape[0]
    # Column 0 is the root of each search; rows are counted from 1 so that 0 means none.
    row_price = torch.zeros(n + 1, dtype=torch.float64)
    column_price = torch.zeros(n + 1, dtype=torch.float64)
    owner = [0] * (n + 1)
    for row in range(1, n + 1):
        owner[0], column = row, 0
        least = torch.full((n + 1,), math.inf, dtype=torch.float64)
        before = torch.zeros(n + 1, dtype=torch.int64)
        done = torch.zeros(n + 1, dtype=torch.bool)
        while owner[column]:
            done[column] = True
            reduced = cost[owner[column] - 1] - row_price[owner[column]] - column_price[1:]
            better = ~done[1:] & (reduced < least[1:])
            least[1:] = torch.where(better, reduced, least[1:])
            before[1:] = torch.where(better, column, before[1:])
            open_least = least.masked_fill(done, math.inf)
            open_least[0] = math.inf
            following = int(open_least.argmin())
            step = float(open_least[following])
            held = torch.tensor([owner[c] for c in done.nonzero().flatten().tolist()])
            row_price[held] += step
            column_price[done] -= step
            least[~done] -= step
            column = following
        while column:
            previous = int(before[column])
            owner[column] = owner[previous]
            column = previous
    assignment = torch.empty(n, dtype=torch.int64)
    assignment[torch.tensor(owner[1:]) - 1] = torch.arange(n)
    return assignment


class LearnedPermutation(StepCount, RouterAround):
    """A router whose outputs are assigned to experts by a learnt permutation (Ibrahim et al., COMET, 2023).

    For a phase of ``phase_steps`` training steps, a token's weights g over the E outputs of ``router`` become ``g·P``,
    rescaled to the same sum, with ``P = sinkhorn((Λ + ν·Gumbel)/τ)``; log τ decreases and the number of iterations
    grows linearly over the phase. ``losses["permutation"]`` of the routings, the entropy of P and of P with normalised
    rows, drives P to a permutation. At the end of the phase the assignment π with the largest ``Σ_i P[i, π(i)]``
    replaces P, and Λ no longer gets a gradient: output i drives expert π(i). :meth:`absorb` then reorders the experts,
    so that the permutation costs nothing.

    Call :func:`step_routers` after each optimizer step. During the phase, tokens go to every expert to which P gives
    weight.

    With ``per_part`` each tree of a :class:`TreeRouter`, or each selector of a :class:`DSelectKRouter`, has its own
    permutation, which cannot be absorbed.

    Args:
        router: a router over E experts.
        phase_steps: number of training steps of the phase.
        temperatures: τ at the beginning and end of the phase.
        iterations: number of Sinkhorn iterations at the beginning and end.
        noise: ν, the scale of the Gumbel noise in training.
        per_part: whether each of the R parts whose sum gives the router's gates has its own permutation.
        device: of Λ.
        dtype: of Λ.

    Attributes:
        log_weights: Λ ``(E, E)``, initially uniform in ±0.05; ``(R, E, E)`` with ``per_part``.
        assignment: ``(E,)`` int64 buffer, π after the phase; ``(R, E)`` with ``per_part``.
        num_steps: training steps so far.

    Raises:
        TypeError: ``router`` is not a Router, ``phase_steps`` or an iteration no int, or ``per_part`` is not a bool.
        ValueError: one is below 1, a temperature is not positive, ``noise`` is negative, or ``per_part`` of a router
            without parts.
    """

    def __init__(
        self,
        router: Router,
        phase_steps: int,
        *,
        temperatures: Sequence[float] = (1e-3, 1e-7),
        iterations: Sequence[int] = (20, 150),
        noise: float = 0.0,
        per_part: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(router)
        check_positive(phase_steps=phase_steps)
        check_sequence("temperatures", temperatures)
        for temperature in temperatures:
            check_number("temperatures", temperature)
        if len(temperatures) != 2 or not all(0 < t < math.inf for t in temperatures):
            raise ValueError(f"temperatures must be two positive, finite numbers, got {tuple(temperatures)}")
        check_sequence("iterations", iterations)
        if len(iterations) != 2:
            raise ValueError(f"iterations must be two ints, got {tuple(iterations)}")
        for count in iterations:
            check_positive(iterations=count)
        check_number("noise", noise, least=0, finite=True)
        check_flags(per_part=per_part)
        if per_part and not hasattr(router, "num_parts"):
            raise ValueError(
                f"router must have gates in parts for per_part, as TreeRouter has, got {type(router).__name__}"
            )
        self.top_k = router.top_k if per_part else self.num_experts
        self.per_part = per_part
        self.phase_steps = phase_steps
        self.temperatures = tuple(temperatures)
        self.iterations = tuple(iterations)
        self.noise = noise
        e, parts = self.num_experts, (router.num_parts,) if per_part else ()
        factory = factory_of(device, dtype)
        self.log_weights = new_parameter(*parts, e, e, **factory)
        self.register_buffer("assignment", torch.arange(e, device=device).expand(*parts, e).clone())
        self.count_steps(device)
        self.reset_parameters()

    @classmethod
    def from_top_k(
        cls,
        hidden_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        phase_steps: int = 1000,
        **options: object,
    ) -> Router:
        """Around a router of K experts."""
        factory = {name: options.get(name) for name in ("device", "dtype")}
        inner = cls.inner(hidden_size, num_experts, top_k, options)
        return cls(inner, phase_steps, **options, **factory)

    def reset_parameters(self) -> None:
        """Redraw Λ."""
        nn.init.uniform_(self.log_weights, -0.05, 0.05)

    @property
    def searching(self) -> bool:
        """Whether the phase is still running."""
        return self.num_steps < self.phase_steps

    def matrix(self) -> torch.Tensor:
        """P at the current step, float64 with the shape of Λ, differentiable.

        Raises:
            ValueError: the phase is over.
        """
        if not self.searching:
            raise ValueError(
                f"matrix() must be called within the phase of {self.phase_steps} steps, got step {self.num_steps}"
            )
        share = self.num_steps / max(self.phase_steps - 1, 1)
        first, last = (math.log10(t) for t in self.temperatures)
        temperature = 10 ** (first + share * (last - first))
        begin, end = self.iterations
        scores = self.log_weights.double()
        if self.noise and self.training:
            uniform = torch.rand_like(scores).clamp(min=torch.finfo(scores.dtype).tiny)
            scores = scores - self.noise * (-uniform.log()).log()
        return sinkhorn(scores / temperature, round(begin + share * (end - begin)))

    @property
    def permutation(self) -> torch.Tensor:
        """π ``(E,)``, or ``(R, E)``: output i drives expert π(i).

        Raises:
            ValueError: the phase is not over yet.
        """
        if self.searching:
            raise ValueError(
                f"permutation must be read after the phase of {self.phase_steps} steps, got step {self.num_steps}"
            )
        return self.assignment

    @torch.no_grad()
    def step(self) -> None:
        """Count a training step; the last one of the phase fixes the assignment.

        Raises:
            ValueError: Λ holds NaN or infinity then; nothing was changed.
        """
        if self.num_steps == self.phase_steps - 1:
            training, self.training = self.training, False  # without noise
            try:
                matrix = self.matrix()
            finally:
                self.training = training
            found = [best_assignment(part) for part in matrix.view(-1, self.num_experts, self.num_experts)]
            self.assignment.copy_(torch.stack(found).view_as(self.assignment))
        super().step()

    @torch.no_grad()
    def absorb(self, experts: ExpertLayer) -> Router:
        """Reorder the experts in place by the permutation, and return the wrapped router, which then needs no
        permutation.

        >>> moe.router = moe.router.absorb(moe.experts)

        Optimizer state of the experts' parameters is not reordered: create the optimizer again.

        Args:
            experts: a layer of E experts that defines :meth:`ExpertLayer.reorder`.

        Raises:
            ValueError: the phase is not over, or the layer does not have E experts.
            NotImplementedError: the layer cannot be reordered, or there is a permutation for each part.
        """
        permutation = self.permutation
        if self.per_part:
            raise NotImplementedError(f"experts cannot absorb {len(permutation)} permutations, one for each part")
        if experts.num_experts != self.num_experts:
            raise ValueError(f"experts must be {self.num_experts}, got {experts.num_experts}")
        experts.reorder(permutation)
        return self.router

    def forward(self, x: torch.Tensor, *, token_ids: torch.Tensor | None = None) -> Routing:
        """The routing of ``x (..., H)``."""
        if self.per_part:
            matrix = self.matrix() if self.searching else None
            routing = self.router.route(self.router.logits(x), lambda parts: self._arranged(parts, matrix))
            return routing.replaced(losses={**routing.losses, **self._entropy(matrix, routing.weights.dtype)})
        routing = self.router(x, token_ids=token_ids)
        e = self.num_experts
        changed = {}
        if not self.searching:
            to = torch.cat([self.assignment, self.assignment.new_full((1,), e)])
            from_ = torch.argsort(self.assignment)
            if routing.logits is not None:
                changed["logits"] = routing.logits.index_select(1, from_)
            if routing.has_probabilities:
                changed["probabilities"] = routing.probabilities.index_select(1, from_)
            return routing.with_experts(to[routing.expert_ids.clamp(max=e).long()], routing.weights, **changed)
        matrix = self.matrix()
        own = dense_weights(routing)
        gates = own @ matrix.to(own.dtype)
        tiny = torch.finfo(own.dtype).tiny
        gates = gates * (own.sum(dim=1, keepdim=True) / gates.sum(dim=1, keepdim=True).clamp(min=tiny))
        if routing.has_probabilities:
            mixed = routing.probabilities @ matrix.to(routing.probabilities.dtype)
            changed["probabilities"] = mixed / mixed.sum(dim=1, keepdim=True).clamp(min=tiny)
        losses = {**routing.losses, **self._entropy(matrix, own.dtype)}
        return route_where(
            gates.detach() > 0, gates, logits=routing.logits, residual=routing.residual, losses=losses, **changed
        )

    def _arranged(self, parts: torch.Tensor, matrix: torch.Tensor | None) -> torch.Tensor:
        """``parts (T, R, E)``, ordered by output, in the order of the experts."""
        if matrix is not None:
            return torch.einsum("tre,ref->trf", parts, matrix.to(parts.dtype))
        return parts.gather(2, torch.argsort(self.assignment, dim=1).expand_as(parts))

    def _entropy(self, matrix: torch.Tensor | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The loss of the search, of P and of P with normalised rows, in training."""
        if matrix is None or not self.training:
            return {}
        rows = matrix / matrix.sum(dim=-1, keepdim=True)
        return {"permutation": -sum((p * (p + 1e-6).log()).sum() for p in (matrix, rows)).to(dtype)}

    def extra_repr(self) -> str:
        """Options and the step."""
        return f"phase_steps={self.phase_steps}, num_steps={self.num_steps}, per_part={self.per_part}"
