"""Experts by domain or label, with a learned router for tokens without one."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gossamer._checks import check_index, check_positive, check_same_device
from gossamer.nn.moe.routers.base import Router, RouterAround
from gossamer.nn.moe.routers.hash import check_ids, checked_table
from gossamer.nn.moe.routing import Routing, padded


class DomainRouter(RouterAround):
    """Chooses experts by a token's domain or label id, and by another router if the id is missing.

    ``token_ids`` are domain ids. A token of domain d gets the K experts ``table[d]`` with weight 1/K each, for experts
    that are trained by domain (Meta-DMoE, Zhong et al., 2022) or label; with a negative id, or without ids, ``router``
    routes the token. In training that router learns from the given ids: the routing's ``losses["domain"]`` is ``−log
    Σ_{e in table[d]} p_e`` of its probabilities for each token with an id, and 0 for the others.

    Args:
        table: ``(D,)`` or ``(D, K)`` int32 or int64, the experts of each of D domains; saved with the state.
        router: router for tokens without an id; over the same experts.

    Raises:
        TypeError: ``table`` does not hold int32 or int64, or ``router`` is not a Router.
        ValueError: ``table`` has another rank, no rows, or ids outside ``0 ... E-1``, or K > E.
    """

    def __init__(self, table: torch.Tensor, router: Router) -> None:
        super().__init__(router)
        table = checked_table("table", table, self.num_experts, "D")
        if table.shape[0] < 1:
            raise ValueError("table must have at least one domain, got 0")
        self.top_k = max(router.top_k, table.shape[1])
        self.register_buffer("table", table)

    @classmethod
    def from_top_k(
        cls,
        hidden_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        num_domains: int | None = None,
        **options: object,
    ) -> Router:
        """With K experts per domain: domain d has the K experts from ``d·K`` on, modulo E; ``num_domains`` is E by
        default.
        """
        domains = num_experts if num_domains is None else num_domains
        width, device = 1 if top_k is None else top_k, options.get("device")
        check_positive(num_domains=domains, top_k=width)
        inner = cls.inner(hidden_size, num_experts, top_k, options)
        table = torch.arange(domains * width, device=device).view(domains, width) % num_experts
        return cls(table, inner, **options)

    def forward(self, x: torch.Tensor, *, token_ids: torch.Tensor | None = None) -> Routing:
        """The routing of ``x (..., H)``.

        Args:
            x: hidden states.
            token_ids: T int32 or int64 domain ids below D; a negative value means "no id". None for no ids.

        Raises:
            TypeError: ``token_ids`` are not int32 or int64.
            ValueError: their number is not T.
            IndexError: on the CPU, an id is D or larger.
        """
        routing = self.router(x)
        if token_ids is None:
            return routing
        check_index("token_ids", token_ids)
        check_same_device(x=x, table=self.table, token_ids=token_ids)
        domains, width = self.table.shape
        check_ids(token_ids.clamp(min=0), 0, domains, "D")
        token_ids = token_ids.reshape(-1)
        if token_ids.shape[0] != routing.num_tokens:
            raise ValueError(f"token_ids must be one for each of T = {routing.num_tokens} tokens, got {len(token_ids)}")
        given = (token_ids >= 0).unsqueeze(1)
        table_ids = F.embedding(token_ids.clamp(0, domains - 1), self.table).long()
        slots = max(routing.top_k, width)
        own = Routing(table_ids, torch.full_like(table_ids, 1 / width, dtype=routing.weights.dtype), self.num_experts)
        (ids, weights), (domain_ids, domain_weights) = padded(routing, slots), padded(own, slots)
        changed = {}
        if routing.has_probabilities:
            probabilities = routing.probabilities
            share = torch.zeros_like(probabilities).scatter_add(
                1, table_ids, torch.full_like(table_ids, 1 / width, dtype=probabilities.dtype)
            )
            changed["probabilities"] = torch.where(given, share, probabilities)
            if self.training:
                mass = (probabilities * (share > 0)).sum(dim=1).clamp(min=torch.finfo(probabilities.dtype).tiny)
                changed["losses"] = {**routing.losses, "domain": -mass.log() * given.squeeze(1)}
        if routing.residual is not None:
            changed["residual"] = routing.residual.masked_fill(given.squeeze(1), 0.0)
        return routing.with_experts(
            torch.where(given, domain_ids, ids), torch.where(given, domain_weights, weights), max_rows=None, **changed
        )

    def extra_repr(self) -> str:
        """Sizes."""
        return f"num_domains={self.table.shape[0]}"
