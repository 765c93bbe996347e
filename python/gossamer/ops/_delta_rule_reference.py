"""The delta rule in plain torch: token by token, and in chunks whose products are matrix products."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F

# Added to the sum of squares before the square root in the norm of q and k.
L2_EPS = 1e-6
# Tokens of a chunk, and of a block within it: per-channel decays are relative to the start of a block.
CHUNK, BLOCK = 64, 16


class DeltaRule(NamedTuple):
    """The checked arguments of the delta rule, passed as one record to fakes, autograd, the references and the kernels.

    ``delta_rule_step`` uses the same record with T = 1 and with the state that it updates as ``initial_state``.
    """

    q: torch.Tensor  # (B, T, H_k, D_k)
    k: torch.Tensor  # (B, T, H_k, D_k)
    v: torch.Tensor  # (B, T, H, D_v), H a multiple of H_k
    beta: torch.Tensor  # (B, T, H), the dtype of q or the accumulator's
    g: torch.Tensor | None  # (B, T, H) or (B, T, H, D_k), the same; log decays, or raw gates where a_log is given
    a_log: torch.Tensor | None  # (H,)
    dt_bias: torch.Tensor | None  # (H,) or (H, D_k), as g has channels; only with a_log
    initial_state: torch.Tensor | None  # (B, H, D_k, D_v) in the accumulator's dtype; (N, ...) with cu_seqlens
    cu_seqlens: torch.Tensor | None  # (N + 1,) int32 or int64, B = 1 then
    scale: float
    lower_bound: float | None  # of the sigmoid form of the gate; None for the softplus form
    use_qk_l2norm: bool
    output_final_state: bool

    @property
    def by_channel(self) -> bool:
        """Whether each channel of the keys has its own decay."""
        return self.g is not None and self.g.dim() == 4

    @property
    def num_sequences(self) -> int:
        """N with ``cu_seqlens``, otherwise B."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """The shape of the initial and the final state."""
        return self.num_sequences, self.v.shape[2], self.q.shape[3], self.v.shape[3]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and states: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def log_decay(args: DeltaRule) -> torch.Tensor | None:
    """The decays in log space, in the accumulator's dtype; None without a gate."""
    if args.g is None:
        return None
    dtype = accumulator(args.q.dtype)
    g = args.g.to(dtype)
    if args.a_log is None:
        return g
    rate = args.a_log.to(dtype).exp()
    if args.by_channel:
        rate = rate.unsqueeze(-1)
    x = g if args.dt_bias is None else g + args.dt_bias.to(dtype)
    return -rate * F.softplus(x) if args.lower_bound is None else args.lower_bound * torch.sigmoid(rate * x)


def _heads_first(args: DeltaRule) -> list[torch.Tensor | None]:
    """q, k, v, beta and log decays in the accumulator's dtype as ``(B, H, T, ...)``, normalised and scaled."""
    dtype = accumulator(args.q.dtype)
    q, k, v, beta = (x.to(dtype) for x in (args.q, args.k, args.v, args.beta))
    if args.use_qk_l2norm:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS) for x in (q, k))
    q = q * args.scale
    group = v.shape[2] // q.shape[2]
    if group > 1:
        q, k = q.repeat_interleave(group, 2), k.repeat_interleave(group, 2)
    g = log_decay(args)
    return [None if x is None else x.transpose(1, 2) for x in (q, k, v, beta, g)]


def _recurrent(q, k, v, beta, g, state):
    outputs = []
    for t in range(q.shape[2]):
        if g is not None:
            decay = g[:, :, t].exp()
            state = state * (decay.unsqueeze(-1) if g.dim() == 4 else decay[..., None, None])
        read = (k[:, :, t, None] @ state).squeeze(2)
        update = beta[:, :, t, None] * (v[:, :, t] - read)
        state = state + k[:, :, t, :, None] * update.unsqueeze(2)
        outputs.append((q[:, :, t, None] @ state).squeeze(2))
    return (torch.stack(outputs, 2) if outputs else torch.zeros_like(v)), state


def _sums_between(g: torch.Tensor, dim: int) -> torch.Tensor:
    """``s[i, j]``, the sum of ``g`` over ``j < t <= i`` along ``dim``; ``i`` and ``j`` replace that dimension.

    Computed by sums only, without differences: −inf stays −inf, and a sum of nonpositive terms stays nonpositive.
    """
    size = g.shape[dim]
    later = torch.ones(size, size, dtype=torch.bool, device=g.device).tril(-1)
    later = later.view(size, size, *[1] * (g.dim() - 1 - dim % g.dim()))
    return torch.where(later, g.unsqueeze(dim % g.dim() + 1), 0).cumsum(dim % g.dim())


def _products_by_channel(left: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """``Σ_d left[i, d]·k[j, d]·exp(Σ_{j<t<=i} g[t, d])`` for ``j <= i``: ``(..., C, C)`` from ``(..., C, D)``."""
    blocks = k.shape[-2] // BLOCK
    left, k, g = (x.unflatten(-2, (blocks, BLOCK)) for x in (left, k, g))
    from_start = g.cumsum(-2).exp() * left
    to_end = (F.pad(g, (0, 0, 0, 1))[..., 1:, :].flip(-2).cumsum(-2).flip(-2)).exp() * k
    total = g.sum(-2).exp()
    within = (_sums_between(g, -2).exp() * k.unsqueeze(-3) * left.unsqueeze(-2)).sum(-1).tril()
    rows = []
    for i in range(blocks):
        parts, right = [within[..., i, :, :]], None
        for j in range(i - 1, -1, -1):
            right = torch.ones_like(total[..., i, :]) if right is None else right * total[..., j + 1, :]
            parts.insert(0, from_start[..., i, :, :] @ (to_end[..., j, :, :] * right.unsqueeze(-2)).mT)
        parts.append(within.new_zeros(*within.shape[:-3], BLOCK, BLOCK * (blocks - 1 - i)))
        rows.append(torch.cat(parts, -1))
    return torch.cat(rows, -2)


def _chunked(q, k, v, beta, g, state):
    length = q.shape[2]
    if length == 0:
        return torch.zeros_like(v), state
    padding = -length % CHUNK
    q, k, v = (F.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, CHUNK)) for x in (q, k, v))
    beta = F.pad(beta, (0, padding)).unflatten(2, (-1, CHUNK)).unsqueeze(-1)
    # Decays from the start of the chunk, to its end, and over the whole chunk.
    entry = exit = total = None
    if g is None:
        ours, theirs = (k @ k.mT).tril(-1), (q @ k.mT).tril()
    elif g.dim() == 4:
        g = F.pad(g, (0, 0, 0, padding)).unflatten(2, (-1, CHUNK))
        ours, theirs = _products_by_channel(k, k, g).tril(-1), _products_by_channel(q, k, g)
        entry, total = g.cumsum(-2).exp(), g.sum(-2).exp().unsqueeze(-1)
        exit = F.pad(g, (0, 0, 0, 1))[..., 1:, :].flip(-2).cumsum(-2).flip(-2).exp()
    else:
        g = F.pad(g, (0, padding)).unflatten(2, (-1, CHUNK))
        between = _sums_between(g, -1).exp()
        ours, theirs = ((k @ k.mT) * between).tril(-1), ((q @ k.mT) * between).tril()
        entry, total = g.cumsum(-1).exp().unsqueeze(-1), g.sum(-1).exp()[..., None, None]
        exit = between[..., -1, :].unsqueeze(-1)
    system = beta * ours
    k_in, q_in, k_out = (k, q, k) if entry is None else (k * entry, q * entry, k * exit)
    solved = torch.linalg.solve_triangular(
        system, torch.cat([beta * v, beta * k_in], -1), upper=False, unitriangular=True
    )
    values, keys = solved.split([v.shape[-1], k.shape[-1]], -1)
    outputs = []
    for n in range(q.shape[2]):
        update = values[:, :, n] - keys[:, :, n] @ state
        outputs.append(q_in[:, :, n] @ state + theirs[:, :, n] @ update)
        state = (state if total is None else total[:, :, n] * state) + k_out[:, :, n].mT @ update
    return torch.cat(outputs, 2)[:, :, :length], state


def _evaluate(args: DeltaRule, compute) -> tuple[torch.Tensor, torch.Tensor | None]:
    q, k, v, beta, g = _heads_first(args)
    state = args.initial_state
    if state is None:
        state = v.new_zeros(args.state_shape)
    if args.cu_seqlens is None:
        o, state = compute(q, k, v, beta, g, state)
    else:
        outputs, states = [v.new_zeros(*v.shape[:2], 0, v.shape[3])], [state[:0]]
        bounds = args.cu_seqlens.tolist()
        for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
            sequence = (None if x is None else x[:, :, begin:end] for x in (q, k, v, beta, g))
            part, last = compute(*sequence, state[n : n + 1])
            outputs.append(part)
            states.append(last)
        o, state = torch.cat(outputs, 2), torch.cat(states)
    return o.transpose(1, 2).to(args.q.dtype), state if args.output_final_state else None


def recurrent(args: DeltaRule) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The delta rule token by token: the reference for all other implementations."""
    return _evaluate(args, _recurrent)


def chunked(args: DeltaRule) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The delta rule in chunks of matrix products, used where there are no kernels."""
    return _evaluate(args, _chunked)
