"""Gated DeltaNet: the delta rule with a decay for each head."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gossamer.nn.delta_rule.layer import DeltaRuleLayer, decay_parameters


class GatedDeltaNet(DeltaRuleLayer):
    """Gated DeltaNet (Yang, Kautz and Hatamizadeh, 2025), as in Qwen3-Next.

    ``S_t = (I − β_t k_t k_tᵀ) α_t S_{t−1} + β_t k_t v_tᵀ`` with ``log α_t = −exp(A_log)·softplus(x·W_aᵀ + dt_bias)``
    for each head; the normalised output is multiplied by ``SiLU(x·W_zᵀ)``. Arguments are those of
    :class:`DeltaRuleLayer`.

    Attributes:
        decay_proj: ``nn.Linear(hidden_size, H)`` without bias, W_a.
        A_log: ``(H,)``.
        dt_bias: ``(H,)``.
        gate_proj: ``nn.Linear(hidden_size, H·D_v)`` without bias, W_z.
    """

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, **options: object) -> None:
        super().__init__(hidden_size, num_heads, head_dim, **options)
        self.decay_proj = self._linear(hidden_size, num_heads)
        self.A_log, self.dt_bias = decay_parameters(num_heads, num_heads, **self._factory)
        self.gate_proj = self._linear(hidden_size, num_heads * self.value_head_dim)

    def decay(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The raw gate of each head, and the parameters that turn it into a decay."""
        return {"g": self.decay_proj(x), "A_log": self.A_log, "dt_bias": self.dt_bias}

    def gated(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``o · SiLU(x·W_zᵀ)``."""
        return o * F.silu(self.gate_proj(x)).reshape(o.shape)
