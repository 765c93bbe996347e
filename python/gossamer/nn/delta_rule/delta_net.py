"""DeltaNet: linear attention that corrects its state."""

from __future__ import annotations

from gossamer.nn.delta_rule.layer import DeltaRuleLayer


class DeltaNet(DeltaRuleLayer):
    """DeltaNet (Schlag et al., 2021; Yang et al., 2024): the state forgets only what a new value replaces.

    ``S_t = (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ`` and ``o_t = S_tᵀ q_t / √D_k``, normalised by head. Arguments and
    attributes are those of :class:`DeltaRuleLayer`.

    Use it where associations must be overwritten exactly and sequences are so short that nothing else need be
    forgotten; :class:`GatedDeltaNet` forgets faster.
    """
