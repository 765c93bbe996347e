"""Millions of single-neuron experts, found by product keys (PEER)."""

from __future__ import annotations

import math

import torch
from torch import nn

from gossamer._activation import Activation, as_activation
from gossamer._autocast import no_autocast
from gossamer._checks import check_flags, check_input, check_positive, check_traceable, check_widths
from gossamer._layout import with_leading_sizes
from gossamer._parameters import factory_of, new_parameter
from gossamer.nn.embeddings.fused_step import FusedStep
from gossamer.nn.embeddings.table import bytes_of
from gossamer.nn.moe.experts.base import ExpertLayer
from gossamer.nn.moe.routing import Routing
from gossamer.ops.activate import activate
from gossamer.ops.embedding import advise_huge_pages
from gossamer.ops.product_key_topk import product_key_search
from gossamer.optim import Optimizer


class ProductKeyExperts(FusedStep, ExpertLayer):
    """A feed-forward layer of N single-neuron experts ``v_e · φ(⟨u_e, x⟩)``; each head of a token chooses K of them.

    Each head makes a query of two halves; a pair of sub-keys, one per half, identifies an expert, ``e = a·√N + b``,
    whose score is ``⟨q¹, C¹_a⟩ + ⟨q², C²_b⟩``. :func:`gossamer.product_key_topk` finds the K highest scores exactly
    among √N sub-keys per half, and their softmax gives the weights:

    ``y = Σ_heads Σ_k softmax(scores)_k · φ(⟨u_k, x⟩) · v_k``.

    He, "Mixture of a Million Experts", 2024. An expert that several heads choose counts as often as it is chosen, and
    its gradients are summed.

    With ``optimizer`` both tables are trained inside ``loss.backward()``, on the chosen rows only; no gradient of a
    table's size exists. See :class:`gossamer.nn.Embedding`. Without ``optimizer`` they get dense gradients, like any
    parameter.

    >>> ffn = gossamer.nn.ProductKeyExperts(256, 1024**2, num_heads=8, top_k=16, optimizer=gossamer.optim.Adam(1e-3))
    >>> y = ffn(x)

    Called with hidden states only, it is a complete layer with its own routing. Called with a routing it works like any
    other :class:`ExpertLayer`, and does not use its queries.

    Args:
        hidden_size: H.
        num_experts: N, a square.
        num_heads: queries per token.
        top_k: K, experts per head, at most √N.
        key_dim: size of a query, even.
        activation: φ, an ungated name of :class:`gossamer.Activation`, or one with its constants.
        query_norm: whether queries are batch-normalised over the tokens of a call in training, and by running
            statistics in evaluation. Padding tokens count; a call in training needs at least two tokens.
        shared_keys: whether all heads use one set of sub-keys, as in the paper, instead of one set per head.
        optimizer: one of :mod:`gossamer.optim` for both tables, or None.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        input_weight: ``(N, H)``, the rows ``u``; initially uniform in ±1/√H.
        output_weight: ``(N, H)``, the rows ``v``; initially uniform in ±1/√num_heads.
        keys: ``(G, 2, √N, key_dim/2)``, G being 1 for shared keys, else the number of heads; initially uniform in
            ±1/√(key_dim/2).
        query: ``nn.Linear(H, num_heads · key_dim)`` without bias.
        query_norm: ``nn.BatchNorm1d(num_heads · key_dim)`` or None.
        num_heads: as given, like ``top_k``, ``key_dim`` and ``activation``; a token has ``num_heads · K`` experts.

    Raises:
        TypeError: a size is not an int, a flag not a bool, or ``activation`` or ``optimizer`` something else.
        ValueError: a size is below 1, N is not a square, K is above √N, ``key_dim`` is odd, or φ is gated.
    """

    tables = ("input_weight", "output_weight")

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        num_heads: int,
        top_k: int,
        key_dim: int = 128,
        activation: str | Activation = "gelu",
        query_norm: bool = True,
        shared_keys: bool = True,
        optimizer: Optimizer | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(top_k=top_k)
        check_widths(hidden_size=hidden_size, num_experts=num_experts, num_heads=num_heads, key_dim=key_dim)
        check_flags(query_norm=query_norm, shared_keys=shared_keys)
        side = math.isqrt(num_experts)
        if side * side != num_experts:
            raise ValueError(f"num_experts must be a square, got {num_experts}")
        if top_k > side:
            raise ValueError(f"top_k must be at most the square root of num_experts, {side}, got {top_k}")
        if key_dim % 2:
            raise ValueError(f"key_dim must be even, for two halves, got {key_dim}")
        self.activation = as_activation(activation)
        if self.activation.gated:
            raise ValueError(f"activation must be ungated for single neurons, got {self.activation.name!r}")
        factory = factory_of(device, dtype)
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.num_heads = num_heads
        self.top_k = top_k
        self.key_dim = key_dim
        self.input_weight = new_parameter(num_experts, hidden_size, **factory)
        self.output_weight = new_parameter(num_experts, hidden_size, **factory)
        groups = 1 if shared_keys else num_heads
        self.keys = new_parameter(groups, 2, side, key_dim // 2, **factory)
        self.query = nn.Linear(hidden_size, num_heads * key_dim, bias=False, **factory)
        self.query_norm = nn.BatchNorm1d(num_heads * key_dim, **factory) if query_norm else None
        self._draw()
        self.attach(optimizer)

    def _draw(self) -> None:
        for table in self.tables:
            advise_huge_pages(getattr(self, table))
        for parameter, inputs in (
            (self.input_weight, self.hidden_size),
            (self.output_weight, self.num_heads),
            (self.keys, self.key_dim // 2),
        ):
            with torch.no_grad():
                parameter.uniform_(-(inputs**-0.5), inputs**-0.5)

    def reset_parameters(self) -> None:
        """Redraw tables and sub-keys, and reset the optimizer."""
        self._draw()
        self._reset_state()

    def route(self, x: torch.Tensor) -> Routing:
        """The experts of hidden states ``x (..., H)`` and their weights, ``num_heads · K`` per token, head by head.

        Queries and scores are computed in float32 (float64 for float64). Several heads may list the same expert.

        Raises:
            TypeError: ``x`` does not have the dtype of the parameters.
            ValueError: the size of ``x`` does not fit, or a call in training with batch normalisation has only one
                token; on the CPU, a query is not finite.
        """
        check_input(x, self.hidden_size, self.query.weight, "(..., H)")
        tokens = x.reshape(-1, self.hidden_size)
        queries = self._queries(tokens)
        with no_autocast(x.device):
            queries = queries.to(torch.promote_types(queries.dtype, torch.float32))
            logits, ids = product_key_search(queries, self.keys.to(queries.dtype), self.top_k)
        return Routing(
            ids.view(tokens.shape[0], self.num_heads * self.top_k),
            logits.softmax(-1).view(tokens.shape[0], self.num_heads * self.top_k),
            self.num_experts,
        )

    def _queries(self, tokens: torch.Tensor) -> torch.Tensor:
        """``(T · num_heads, key_dim)``."""
        queries = self.query(tokens)
        if self.query_norm is not None and tokens.shape[0] > 0:
            if self.training and tokens.shape[0] == 1:
                raise ValueError(
                    "x must hold at least two tokens, over which queries are normalised in training, got 1"
                )
            queries = self.query_norm(queries)
        return queries.view(tokens.shape[0] * self.num_heads, self.key_dim)

    def forward(
        self, x: torch.Tensor, routing: Routing | torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The layer's output for ``x (..., H)``.

        Args:
            x: ``(..., H)``; T is the product of the leading sizes.
            routing: replaces the routing by the layer's own queries; as for any :class:`ExpertLayer`. A token may list
                an expert several times.
            weights: ``(T, K)``, only with expert ids for ``routing``.

        Returns:
            The shape and dtype of ``x``.

        Raises:
            RuntimeError: ``torch.jit.trace`` or ``torch.func.vmap`` records the call.
            TypeError: as :class:`ExpertLayer`.
            ValueError: likewise, and as :meth:`route`.
        """
        if routing is not None:
            return super().forward(x, routing, weights)
        if weights is not None:
            raise TypeError("weights must be None without expert ids to weigh")
        check_traceable(type(self).__name__)
        routing = self.route(x)
        y = self.compute(x.reshape(-1, self.hidden_size), routing)
        return with_leading_sizes(y, x)

    def compute(self, tokens: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The output ``(T, H)`` of ``tokens (T, H)``; ids of N and more add nothing."""
        ids = routing.expert_ids
        with no_autocast(tokens.device):
            preact = self.dots("input_weight", ids, tokens, bounds="drop")
            factors = activate(preact, self.activation) * routing.weights.to(preact.dtype)
            return self.bags("output_weight", ids, weights=factors, bounds="drop", out_dtype=tokens.dtype)

    def nbytes(self) -> int:
        """Bytes that the layer holds now, optimizer state included."""
        return bytes_of([*self.parameters(), *self.buffers()])

    def freeze(self) -> ProductKeyExperts:
        """Convert the layer in place to its serving form, which cannot be trained, and return it.

        The optimizer is dropped, and the queries' batch norm is folded into their projection, with its running
        statistics.
        """
        self.detach_optimizer()
        norm, weight = self.query_norm, self.query.weight
        if norm is not None:
            scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
            folded = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
            with torch.no_grad():
                folded.weight.copy_(weight.double() * scale.unsqueeze(1))
                folded.bias.copy_(norm.bias.double() - norm.running_mean.double() * scale)
            self.query, self.query_norm = folded, None
        return self.requires_grad_(False).eval()

    def extra_repr(self) -> str:
        """Sizes and options."""
        text = (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, num_heads={self.num_heads}, "
            f"top_k={self.top_k}, key_dim={self.key_dim}, activation={self.activation.name!r}"
        )
        text += "" if self.keys.shape[0] == 1 else ", shared_keys=False"
        return text + (f", optimizer={self.optimizer}" if self.optimizer else "")
