"""Chunked outer-product state updates by the delta rule: plain, gated by head, and gated by channel."""

from __future__ import annotations

import itertools

import torch

from gossamer._autocast import autocast
from gossamer._checks import (
    check_float,
    check_index,
    check_same_device,
    check_same_dtype,
    check_scale,
    check_shape,
    check_tensor,
)
from gossamer.ops import _delta_rule_reference
from gossamer.ops._delta_rule_reference import DeltaRule, accumulator


def _check_dims(name: str, tensor: torch.Tensor, dims: int, symbols: str) -> None:
    check_tensor(name, tensor)
    if tensor.dim() != dims:
        raise ValueError(f"{name} must have shape {symbols}, got {tuple(tensor.shape)}")


def _check_wide(dtype: torch.dtype, **tensors: torch.Tensor | None) -> None:
    """The tensors given must have ``dtype`` or that of its accumulator."""
    wide = accumulator(dtype)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (dtype, wide):
            allowed = f"{wide}" if wide == dtype else f"the dtype of q, {dtype}, or {wide}"
            raise TypeError(f"{name} must have {allowed}, got {tensor.dtype}")


def _record(
    q, k, v, beta, g, scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm, a_log, dt_bias, lower_bound
) -> DeltaRule:
    """The checked arguments; names in messages are those of the public functions."""
    _check_dims("q", q, 4, "(B, T, H_k, D_k)")
    b, t, key_heads, key_size = q.shape
    check_shape("k", k, (b, t, key_heads, key_size), "(B, T, H_k, D_k)")
    check_shape("v", v, (b, t, None, None), "(B, T, H, D_v)")
    heads, value_size = v.shape[2:]
    if key_heads == 0 or heads == 0 or heads % key_heads:
        raise ValueError(f"the heads of v must be a multiple of those of q and k, got H={heads} and H_k={key_heads}")
    if key_size == 0 or value_size == 0:
        raise ValueError(f"heads must have at least one channel, got D_k={key_size} and D_v={value_size}")
    check_shape("beta", beta, (b, t, heads), "(B, T, H)")
    if g is not None:
        check_tensor("g", g)
        if tuple(g.shape) not in ((b, t, heads), (b, t, heads, key_size)):
            raise ValueError(
                f"g must have shape (B, T, H) = {(b, t, heads)} or (B, T, H, D_k) = {(b, t, heads, key_size)}, "
                f"got {tuple(g.shape)}"
            )
    if a_log is None and (dt_bias is not None or lower_bound is not None):
        raise ValueError("dt_bias and lower_bound belong to a gate: they need A_log")
    if a_log is not None:
        if g is None:
            raise ValueError("A_log needs g, the raw gate")
        check_tensor("A_log", a_log)
        if a_log.numel() != heads:
            raise ValueError(f"A_log must have one value a head, H={heads}, got shape {tuple(a_log.shape)}")
        a_log = a_log.reshape(heads)
        if dt_bias is not None:
            check_tensor("dt_bias", dt_bias)
            expected = (heads, key_size) if g.dim() == 4 else (heads,)
            if dt_bias.numel() != heads * (key_size if g.dim() == 4 else 1):
                symbols = "(H, D_k) or (H·D_k,)" if g.dim() == 4 else "(H,)"
                raise ValueError(f"dt_bias must have shape {symbols} with {expected}, got {tuple(dt_bias.shape)}")
            dt_bias = dt_bias.reshape(expected)
        if lower_bound is not None:
            lower_bound = float(lower_bound)
            if not lower_bound < 0:
                raise ValueError(f"lower_bound must be below 0, got {lower_bound}")
    sequences = b
    if cu_seqlens is not None:
        check_index("cu_seqlens", cu_seqlens)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"cu_seqlens must have shape (N + 1,), got {tuple(cu_seqlens.shape)}")
        if b != 1:
            raise ValueError(f"a pack of sequences must have batch size 1 with cu_seqlens, got B={b}")
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        symbols = "(B, H, D_k, D_v)" if cu_seqlens is None else "(N, H, D_k, D_v)"
        check_shape("initial_state", initial_state, (sequences, heads, key_size, value_size), symbols)
    scale = key_size**-0.5 if scale is None else float(check_scale("scale", scale))
    q, k, v = autocast(q, k, v)
    check_same_dtype(q=q, k=k, v=v)
    _check_wide(q.dtype, beta=beta, g=g, A_log=a_log, dt_bias=dt_bias)
    if initial_state is not None and initial_state.dtype != accumulator(q.dtype):
        raise TypeError(f"initial_state must be {accumulator(q.dtype)}, got {initial_state.dtype}")
    check_same_device(
        q=q, k=k, v=v, beta=beta, g=g, A_log=a_log, dt_bias=dt_bias, initial_state=initial_state, cu_seqlens=cu_seqlens
    )
    return DeltaRule(
        q,
        k,
        v,
        beta,
        g,
        a_log,
        dt_bias,
        initial_state,
        cu_seqlens,
        scale,
        lower_bound,
        use_qk_l2norm,
        output_final_state,
    )


def check_values(args: DeltaRule) -> None:
    """On the CPU: beta in [0, 2], no log decay above 0, ``cu_seqlens`` ascending from 0 to T."""
    if not args.q.is_cpu:
        return
    if args.cu_seqlens is not None:
        bounds = args.cu_seqlens.tolist()
        length = args.q.shape[1]
        if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in itertools.pairwise(bounds)):
            raise ValueError(f"cu_seqlens must ascend from 0 to T={length}, got {bounds}")
    if args.beta.numel():
        least, most = (float(x) for x in args.beta.detach().aminmax())
        if least < 0 or most > 2:
            raise ValueError(f"beta must be in [0, 2], got values from {least} to {most}")
        if args.g is not None and args.a_log is None and (most := float(args.g.detach().amax())) > 0:
            raise ValueError(f"g must be at most 0, the logarithm of a decay, got {most}")


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    *,
    g: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""Linear attention whose state is corrected by each token, the delta rule.

    For each head, with its state ``S (D_k, D_v)`` and ``α_t = exp(g_t)``::

        S_t = (I − β_t k_t k_tᵀ) Diag(α_t) S_{t−1} + β_t k_t v_tᵀ        o_t = scale · S_tᵀ q_t

    Without ``g`` this is DeltaNet (Schlag et al., 2021; in chunks by Yang et al., 2024), with a decay for each head
    Gated DeltaNet (Yang et al., 2025), with one for each channel of the keys Kimi Delta Attention (Kimi Team, 2025).
    Chunks of tokens are computed by matrix products. The cost is linear in T. The backward pass keeps the arguments and
    a state for every few chunks, and computes the rest again. Decays are multiplied as exponentials of sums that are at
    most 0: long products do not overflow, and ``g = −inf`` empties the state.

    With ``A_log``, ``g`` is a raw gate, from which the decay is ``−exp(A_log)·softplus(g + dt_bias)``, or with
    ``lower_bound`` ``lower_bound·sigmoid(exp(A_log)·(g + dt_bias))``.

    Args:
        q: ``(B, T, H_k, D_k)`` float.
        k: the shape and dtype of ``q``. Keys should have at most unit length: the state grows without bound where
            ``β·|k|²`` is above 2.
        v: ``(B, T, H, D_v)``, the dtype of ``q``. H is a multiple of H_k: each key head serves H/H_k value heads that
            follow each other.
        beta: ``(B, T, H)`` in [0, 2], the dtype of ``q`` or float32.
        g: ``(B, T, H)`` or ``(B, T, H, D_k)``, at most 0 (any number with ``A_log``), the dtype of ``q`` or float32; or
            None.
        scale: the factor of the output, ``D_k**-0.5`` when None.
        initial_state: ``(B, H, D_k, D_v)`` float32 (float64 for float64), zero when None; ``(N, H, D_k, D_v)`` with
            ``cu_seqlens``.
        output_final_state: whether the state after the last token is returned.
        cu_seqlens: ``(N + 1,)`` int32 or int64 for a pack of N sequences, which start at ``cu_seqlens[n]`` of the T
            tokens of a batch of one; ascending from 0 to T. Sequences may be empty.
        use_qk_l2norm: whether ``q`` and ``k`` are divided by ``sqrt(Σ x² + 1e-6)`` first.
        A_log: ``(H,)``, or of any shape with H values; needs ``g``.
        dt_bias: ``(H,)``, by channel ``(H, D_k)`` or ``(H·D_k,)``; or None.
        lower_bound: below 0, of the sigmoid form; or None.

    Returns:
        ``o (B, T, H, D_v)`` in the dtype of ``q``, and the final state in the shape and dtype of ``initial_state`` or
        None. Sums are float32 (float64 for float64). Differentiable in all float tensors. Under ``torch.autocast``
        ``q``, ``k`` and ``v`` are cast to its dtype.

    Raises:
        TypeError: an argument is no tensor, a dtype is not supported, or dtypes do not fit.
        ValueError: shapes or devices do not fit, H is no multiple of H_k, ``lower_bound`` is not below 0; on the CPU
            also for ``beta`` outside [0, 2], ``g`` above 0, and ``cu_seqlens`` that does not ascend from 0 to T.
    """
    args = _record(
        q,
        k,
        v,
        beta,
        g,
        scale,
        initial_state,
        output_final_state,
        cu_seqlens,
        use_qk_l2norm,
        A_log,
        dt_bias,
        lower_bound,
    )
    check_float("q", args.q, "reference")
    if not torch.compiler.is_compiling():
        check_values(args)
    return _delta_rule_reference.chunked(args)


def delta_rule_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    *,
    g: torch.Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
) -> torch.Tensor:
    """One token of :func:`delta_rule`, with the state changed in place: decoding.

    Args:
        q: ``(B, H_k, D_k)`` float.
        k: the shape and dtype of ``q``.
        v: ``(B, H, D_v)``, the dtype of ``q``.
        beta: ``(B, H)`` in [0, 2], the dtype of ``q`` or float32.
        state: ``(B, H, D_k, D_v)`` float32 (float64 for float64), contiguous; becomes the state after the token.
        g: ``(B, H)`` or ``(B, H, D_k)`` or None, as in :func:`delta_rule`.
        scale: the factor of the output, ``D_k**-0.5`` when None.
        use_qk_l2norm: as in :func:`delta_rule`, and so are the rest.
        A_log: ``(H,)``.
        dt_bias: ``(H,)`` or ``(H, D_k)``.
        lower_bound: below 0 or None.

    Returns:
        ``o (B, H, D_v)`` in the dtype of ``q``. Not differentiable.

    Raises:
        TypeError, ValueError: as :func:`delta_rule` does; also where ``state`` is not contiguous, and where gradients
            are enabled and an argument requires one.
    """
    for name, tensor, dims, symbols in (
        ("q", q, 3, "(B, H_k, D_k)"),
        ("k", k, 3, "(B, H_k, D_k)"),
        ("v", v, 3, "(B, H, D_v)"),
        ("beta", beta, 2, "(B, H)"),
    ):
        _check_dims(name, tensor, dims, symbols)
    if g is not None:
        check_tensor("g", g)
        if g.dim() not in (2, 3):
            raise ValueError(f"g must have shape (B, H) or (B, H, D_k), got {tuple(g.shape)}")
    b, _, key_size = q.shape
    check_shape("state", state, (b, v.shape[1], key_size, v.shape[2]), "(B, H, D_k, D_v)")
    if not state.is_contiguous():
        raise ValueError(f"state must be contiguous, got strides {state.stride()} for shape {tuple(state.shape)}")
    tokens = (x if x is None else x.unsqueeze(1) for x in (q, k, v, beta, g))
    args = _record(*tokens, scale, state, False, None, use_qk_l2norm, A_log, dt_bias, lower_bound)
    check_float("q", args.q, "reference")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args[:8]):
        raise ValueError("delta_rule_step has no derivative: use torch.no_grad(), or delta_rule with T = 1")
    if not torch.compiler.is_compiling():
        check_values(args)
    o, last = _delta_rule_reference.recurrent(args._replace(output_final_state=True))
    state.copy_(last)
    return o.squeeze(1)
