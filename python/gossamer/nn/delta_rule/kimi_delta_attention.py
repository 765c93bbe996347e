"""Kimi delta attention: the delta rule with a decay for each channel of the keys."""

from __future__ import annotations

import torch

from gossamer.nn.delta_rule.layer import DeltaRuleLayer, decay_parameters


class KimiDeltaAttention(DeltaRuleLayer):
    """Kimi delta attention (Kimi Team, 2025): each channel of the keys decays at its own rate.

    ``S_t = (I − β_t k_t k_tᵀ) Diag(α_t) S_{t−1} + β_t k_t v_tᵀ`` with
    ``log α_t = −exp(A_log)·softplus(x·W_faᵀ·W_fbᵀ + dt_bias)``; the normalised output is multiplied by
    ``σ(x·W_gaᵀ·W_gbᵀ)``. Both gates have a bottleneck as wide as a head. Arguments are those of
    :class:`DeltaRuleLayer`; keys and values have as many heads.

    Attributes:
        decay_down: ``nn.Linear(hidden_size, D_k)`` without bias, W_fa.
        decay_up: ``nn.Linear(D_k, H·D_k)`` without bias, W_fb.
        A_log: ``(H,)``.
        dt_bias: ``(H·D_k,)``.
        gate_down: ``nn.Linear(hidden_size, D_v)`` without bias, W_ga.
        gate_up: ``nn.Linear(D_v, H·D_v)`` without bias, W_gb.
    """

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, **options: object) -> None:
        super().__init__(hidden_size, num_heads, head_dim, **options)
        self.decay_down = self._linear(hidden_size, head_dim)
        self.decay_up = self._linear(head_dim, num_heads * head_dim)
        self.A_log, self.dt_bias = decay_parameters(num_heads, num_heads * head_dim, **self._factory)
        self.gate_down = self._linear(hidden_size, self.value_head_dim)
        self.gate_up = self._linear(self.value_head_dim, num_heads * self.value_head_dim)

    def decay(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The raw gate of each head's channels, and the parameters that turn it into a decay."""
        raw = self.decay_up(self.decay_down(x)).unflatten(-1, (self.num_heads, self.head_dim))
        return {"g": raw, "A_log": self.A_log, "dt_bias": self.dt_bias}

    def gated(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``o · σ(x·W_gaᵀ·W_gbᵀ)``."""
        return o * self.gate_up(self.gate_down(x)).sigmoid().reshape(o.shape)
