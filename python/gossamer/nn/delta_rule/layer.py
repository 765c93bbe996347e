"""The base of delta-rule layers: projections, short convolution, state between calls, and output norm."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from gossamer._checks import (
    check_flag,
    check_input,
    check_number,
    check_same_device,
    check_shape,
    check_sizes,
    check_strided,
    check_widths,
)
from gossamer._parameters import factory_of, new_parameter
from gossamer.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from gossamer.ops.delta_rule import delta_rule, delta_rule_step


class DeltaRuleState(NamedTuple):
    """The state of a delta-rule layer between calls, updated in place by each call.

    Attributes:
        conv: ``(B, C, W − 1)``, the last inputs of the convolution.
        recurrent: ``(B, H, D_k, D_v)`` float32 (float64 for a float64 layer).
    """

    conv: torch.Tensor
    recurrent: torch.Tensor


class DeltaRuleLayer(nn.Module):
    """A linear-attention layer whose state follows the delta rule; subclasses define the decay and the output gate.

    ``q, k, v = SiLU(conv(x·W_qkvᵀ))`` with a causal depthwise convolution, ``β = σ(x·W_βᵀ)``, then
    :func:`gossamer.delta_rule` with L2-normalised ``q`` and ``k``, an RMS norm over each head's output, and the output
    projection. Cost and memory are linear in the number of tokens; decoding needs the state alone.

    Args:
        hidden_size: of the inputs and outputs.
        num_heads: H, value heads.
        head_dim: D_k, channels of a query and a key.
        num_key_heads: H_k, which divides H; H when None.
        value_head_dim: D_v, channels of a value; D_k when None.
        conv_size: W, taps of the convolution, 2 to 8.
        negative_eigenvalues: whether ``β`` is ``2σ(·)``, so that the transition ``I − β k kᵀ`` can reflect (Grazzi et
            al., 2025).
        norm_eps: ε of the RMS norm.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        qkv_proj: ``nn.Linear(hidden_size, C)`` without bias, ``C = 2·H_k·D_k + H·D_v``: queries, keys, then values.
        conv_weight: ``(C, W)``.
        beta_proj: ``nn.Linear(hidden_size, H)`` without bias.
        norm_weight: ``(D_v,)``.
        out_proj: ``nn.Linear(H·D_v, hidden_size)`` without bias.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1, ``conv_size`` is outside 2 to 8, or H is not a multiple of ``num_key_heads``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        num_key_heads: int | None = None,
        value_head_dim: int | None = None,
        conv_size: int = 4,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_key_heads = num_heads if num_key_heads is None else num_key_heads
        value_head_dim = head_dim if value_head_dim is None else value_head_dim
        check_widths(
            hidden_size=hidden_size,
            num_heads=num_heads,
            head_dim=head_dim,
            num_key_heads=num_key_heads,
            value_head_dim=value_head_dim,
            conv_size=conv_size,
        )
        check_flag("negative_eigenvalues", negative_eigenvalues)
        check_number("norm_eps", norm_eps, least=0, finite=True)
        if num_heads % num_key_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_key_heads, got num_heads={num_heads}, "
                f"num_key_heads={num_key_heads}"
            )
        if not 2 <= conv_size <= 8:
            raise ValueError(f"conv_size must be in [2, 8], got {conv_size}")
        self.hidden_size, self.num_heads, self.head_dim = hidden_size, num_heads, head_dim
        self.num_key_heads, self.value_head_dim, self.conv_size = num_key_heads, value_head_dim, conv_size
        self.negative_eigenvalues, self.norm_eps = negative_eigenvalues, norm_eps
        factory = self._factory = factory_of(device, dtype)
        self._sizes = [num_key_heads * head_dim, num_key_heads * head_dim, num_heads * value_head_dim]
        self.qkv_proj = self._linear(hidden_size, sum(self._sizes))
        self.conv_weight = new_parameter(sum(self._sizes), conv_size, **factory)
        self.beta_proj = self._linear(hidden_size, num_heads)
        self.norm_weight = new_parameter(value_head_dim, **factory)
        self.out_proj = self._linear(num_heads * value_head_dim, hidden_size)
        nn.init.uniform_(self.conv_weight, -(conv_size**-0.5), conv_size**-0.5)
        nn.init.ones_(self.norm_weight)

    def _linear(self, inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False, **self._factory)

    def decay(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The arguments ``g``, ``A_log`` and ``dt_bias`` of :func:`gossamer.delta_rule` for ``x (B, T, hidden)``."""
        return {}

    def gated(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The normalised output ``(B, T, H, D_v)`` after the layer's gate, which ``x`` may decide."""
        return o

    def initial_state(self, batch_size: int) -> DeltaRuleState:
        """Zeros to start ``batch_size`` sequences with, on the parameters' device."""
        check_sizes(batch_size=batch_size)
        weight = self.conv_weight
        channels, wide = weight.shape[0], torch.promote_types(weight.dtype, torch.float32)
        shape = (batch_size, self.num_heads, self.head_dim, self.value_head_dim)
        return DeltaRuleState(
            torch.zeros(batch_size, channels, self.conv_size - 1, device=weight.device, dtype=weight.dtype),
            torch.zeros(shape, device=weight.device, dtype=wide),
        )

    def forward(
        self,
        x: torch.Tensor,
        *,
        state: DeltaRuleState | None = None,
        cu_seqlens: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The layer's output for ``x (B, T, hidden)``.

        Args:
            x: ``(B, T, hidden)`` float.
            state: from :meth:`initial_state` or an earlier call; the sequences continue from it, and it is updated in
                place. No gradient flows through it.
            cu_seqlens: ``(N + 1,)``, for a pack of N sequences in a batch of one.
            mask: ``(B, T)``, false or 0 at padding, whose inputs are taken as zeros. Padding belongs before a
                sequence: after it, the state would still decay.

        Returns:
            ``(B, T, hidden)`` in the dtype of ``x``, or autocast's.

        Raises:
            TypeError: ``x`` is not a tensor, or dtypes do not fit.
            ValueError: shapes do not fit, or both ``state`` and ``cu_seqlens`` are given.
        """
        check_shape("x", x, (None, None, self.hidden_size), "(B, T, hidden)")
        check_input(x, self.hidden_size, self.qkv_proj.weight)
        if state is not None and cu_seqlens is not None:
            raise ValueError("state and cu_seqlens exclude each other: a pack starts from zeros")
        if mask is not None:
            check_shape("mask", mask, tuple(x.shape[:2]), "(B, T)")
            check_strided("mask", mask)
            check_same_device(x=x, mask=mask)
            x = x * mask.unsqueeze(-1).to(x.dtype)
        b, t, _ = x.shape
        if state is not None and state.recurrent.shape[0] != b:
            raise ValueError(f"state must be of as many sequences as x has, {b}, got {state.recurrent.shape[0]}")
        one_token = state is not None and t == 1 and not torch.is_grad_enabled()
        mixed = self._convolved(self.qkv_proj(x), state, cu_seqlens, one_token)
        q, k, v = mixed.split(self._sizes, dim=-1)
        q, k = (part.reshape(b, t, self.num_key_heads, self.head_dim) for part in (q, k))
        v = v.reshape(b, t, self.num_heads, self.value_head_dim)
        beta = self.beta_proj(x).sigmoid()
        beta = 2 * beta if self.negative_eigenvalues else beta
        decay = self.decay(x)
        if one_token:
            decay = {name: value[:, 0] if name == "g" else value for name, value in decay.items()}
            tokens = (part[:, 0] for part in (q, k, v, beta))
            o = delta_rule_step(*tokens, state.recurrent, use_qk_l2norm=True, **decay).unsqueeze(1)
        else:
            before = None if state is None else state.recurrent.clone()
            o, last = delta_rule(
                q,
                k,
                v,
                beta,
                initial_state=before,
                output_final_state=state is not None,
                cu_seqlens=cu_seqlens,
                use_qk_l2norm=True,
                **decay,
            )
            if state is not None:
                state.recurrent.copy_(last.detach())
        normed = F.rms_norm(o.float() if o.dtype != torch.float64 else o, (self.value_head_dim,), eps=self.norm_eps)
        o = (normed * self.norm_weight).to(o.dtype)
        return self.out_proj(self.gated(o, x).flatten(2))

    def _convolved(
        self, mixed: torch.Tensor, state: DeltaRuleState | None, cu_seqlens: torch.Tensor | None, one_token: bool
    ) -> torch.Tensor:
        weight = self.conv_weight
        if state is None:
            return causal_conv1d(mixed, weight, activation="silu", cu_seqlens=cu_seqlens)[0]
        if one_token:
            # The state has the dtype of the weights; results under autocast are narrower.
            y = causal_conv1d_step(mixed[:, 0].to(state.conv.dtype), state.conv, weight, activation="silu")
            return y.unsqueeze(1).to(mixed.dtype)
        before = state.conv.to(mixed.dtype, copy=True)
        y, last = causal_conv1d(mixed, weight, activation="silu", initial_state=before, output_final_state=True)
        state.conv.copy_(last.detach())
        return y

    def extra_repr(self) -> str:
        """Sizes."""
        return (
            f"hidden_size={self.hidden_size}, num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"num_key_heads={self.num_key_heads}, value_head_dim={self.value_head_dim}, conv_size={self.conv_size}"
        )


def decay_parameters(num_heads: int, channels: int, **factory: object) -> tuple[nn.Parameter, nn.Parameter]:
    """``A_log (num_heads,)`` and ``dt_bias (channels,)`` as Gated DeltaNet starts them (after Mamba; Gu and Dao, 2024).

    ``exp(A_log)`` is uniform in [1, 16], and ``softplus(dt_bias)`` log-uniform in [0.001, 0.1].
    """
    a_log = torch.empty(num_heads, **factory).uniform_(1, 16).log_()
    step = torch.empty(channels, **factory).uniform_(-6.907755, -2.302585).exp_()
    return nn.Parameter(a_log), nn.Parameter(step + torch.log(-torch.expm1(-step)))
