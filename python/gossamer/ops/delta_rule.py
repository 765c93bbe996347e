"""Chunked outer-product state updates by the delta rule: plain, gated by head, and gated by channel."""

from __future__ import annotations

import functools
import itertools
import math
from types import ModuleType
from typing import NamedTuple

import torch

from gossamer import _backend
from gossamer._autocast import autocast
from gossamer._checks import (
    check_flags,
    check_float,
    check_index,
    check_no_gradient,
    check_same_device,
    check_same_dtype,
    check_scale,
    check_shape,
    check_strided,
    check_tensor,
)
from gossamer.ops import _delta_rule_reference
from gossamer.ops._delta_rule_reference import DeltaRule, accumulator
from gossamer.ops._records import define, define_gradients
from gossamer.ops._registration import is_plain

# Number of tokens between the states that a family's forward pass saves for the backward pass.
CHECKPOINT_TOKENS = {"native": 256, "triton": 0}


class DeltaRuleForward(NamedTuple):
    """Arguments of the operator: those of the delta rule, and how far apart states are kept (0: none are)."""

    args: DeltaRule
    checkpoint_tokens: int

    @property
    def checkpoint_shape(self) -> tuple[int, int, int, int]:
        """The shape of the saved states, which are those before tokens ``0, checkpoint_tokens, ...`` of each sequence.

        Sequence n of a pack, which begins at token b, has its states from row ``b // checkpoint_tokens + n`` on;
        sequence n of a batch from row ``n·ceil(T / checkpoint_tokens)`` on. Rows after a sequence's last state are not
        written.
        """
        b, t = self.args.q.shape[:2]
        if not self.checkpoint_tokens:
            return (0, 0, 0, 0)
        if self.args.cu_seqlens is None:
            rows = b * ((t + self.checkpoint_tokens - 1) // self.checkpoint_tokens)
        else:
            rows = t // self.checkpoint_tokens + self.args.num_sequences
        return rows, *self.args.state_shape[1:]


# Dtypes of the operands, and the dtype of sums and states for each.
_WIDE = {dtype: accumulator(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}
# The fields that have gradients.
_GRADIENTS = ("q", "k", "v", "beta", "g", "a_log", "dt_bias", "initial_state")


class DeltaRuleBackward(NamedTuple):
    """Arguments of the gradients: those of the forward pass, its saved states, and the gradients of its results.

    Attributes:
        forward: the arguments of the forward pass.
        checkpoints: the states that it saved.
        d_o: the gradient of its output.
        dfinal_state: that of the final state, or None.
        needs: names of the fields of the delta rule whose gradients are needed.
    """

    forward: DeltaRuleForward
    checkpoints: torch.Tensor
    d_o: torch.Tensor
    dfinal_state: torch.Tensor | None
    needs: list[str]


@functools.cache
def _kernels(backend: str) -> ModuleType:
    if backend == "native":
        from gossamer.cpu_kernels import delta_rule
    else:
        from gossamer.triton_kernels import delta_rule
    return delta_rule


def _empty_unless(found: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0) if found is None else found


def _forward(call: DeltaRuleForward, backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (check_pack if backend == "native" else check_values)(call.args)
    o, final_state, checkpoints = _kernels(backend).delta_rule(call)
    wide = o.new_empty(0, dtype=accumulator(o.dtype))
    return o, _empty_unless(final_state, wide), _empty_unless(checkpoints, wide)


def _forward_fake(call: DeltaRuleForward) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    args, dtype = call.args, accumulator(call.args.q.dtype)
    final_shape = args.state_shape if args.output_final_state else (0,)
    checkpoint_shape = call.checkpoint_shape if call.checkpoint_tokens else (0,)
    o = args.v.new_empty(args.v.shape)
    return o, o.new_empty(final_shape, dtype=dtype), o.new_empty(checkpoint_shape, dtype=dtype)


_delta_rule = define(
    "delta_rule",
    DeltaRuleForward,
    kernel=_forward,
    fake=_forward_fake,
    returns="(Tensor o, Tensor final_state, Tensor checkpoints)",
)


def _backward(call: DeltaRuleBackward, backend: str) -> dict[str, torch.Tensor]:
    return _kernels(backend).delta_rule_backward(call)


def _backward_fake(call: DeltaRuleBackward) -> dict[str, torch.Tensor]:
    tensors = {name: getattr(call.forward.args, name) for name in call.needs}
    return {name: tensor.new_empty(tensor.shape) for name, tensor in tensors.items()}


_delta_rule_backward = define_gradients(
    "delta_rule_backward", DeltaRuleBackward, _GRADIENTS, kernel=_backward, fake=_backward_fake
)


def _save(ctx, call: DeltaRuleForward, output):
    ctx.set_materialize_grads(False)
    return call, output[2]


def _differentiate(ctx, call: DeltaRuleForward, tensors, d_o, dfinal_state, _):
    if d_o is None and dfinal_state is None:
        return {}
    if d_o is None:
        d_o = torch.zeros_like(call.args.v)
    needs = [name for name in _GRADIENTS if f"args.{name}" in ctx.needs]
    found = _delta_rule_backward(DeltaRuleBackward(call, *tensors, d_o, dfinal_state, needs), ctx.backend)
    return {f"args.{name}": gradient for name, gradient in found.items()}


_delta_rule.differentiate(_save, _differentiate)


def _step(args: DeltaRule, backend: str) -> torch.Tensor:
    if backend != "native":
        check_values(args)
    return _kernels(backend).delta_rule_step(args)


def _step_fake(args: DeltaRule) -> torch.Tensor:
    return args.v.new_empty(args.v.shape)


_delta_rule_step = define(
    "delta_rule_step", DeltaRule, kernel=_step, fake=_step_fake, returns="Tensor", mutates=("initial_state",)
)


def _check_dims(name: str, tensor: torch.Tensor, dims: int, symbols: str) -> None:
    check_tensor(name, tensor)
    check_strided(name, tensor)
    if tensor.dim() != dims:
        raise ValueError(f"{name} must have shape {symbols}, got {tuple(tensor.shape)}")


def _check_wide(dtype: torch.dtype, **tensors: torch.Tensor | None) -> None:
    """The tensors given must have ``dtype`` or that of its accumulator."""
    wide = accumulator(dtype)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (dtype, wide):
            allowed = f"{wide}" if wide == dtype else f"the dtype of q, {dtype}, or {wide}"
            raise TypeError(f"{name} must have {allowed}, got {tensor.dtype}")


def _checked(args: DeltaRule, state_name: str = "initial_state") -> DeltaRule:
    """The arguments as given, checked and completed; names in messages are those of the public functions."""
    q, k, v, beta, g, a_log, dt_bias, initial_state, cu_seqlens = args[:9]
    scale, lower_bound, use_qk_l2norm, output_final_state = args[9:]
    check_flags(output_final_state=output_final_state, use_qk_l2norm=use_qk_l2norm)
    _check_dims("q", q, 4, "(B, T, H_k, D_k)")
    b, t, key_heads, key_size = q.shape
    check_shape("k", k, (b, t, key_heads, key_size), "(B, T, H_k, D_k)")
    check_shape("v", v, (b, t, None, None), "(B, T, H, D_v)")
    heads, value_size = v.shape[2:]
    if key_heads == 0 or heads == 0 or heads % key_heads:
        raise ValueError(f"the heads of v must be a multiple of those of q and k, got H={heads} and H_k={key_heads}")
    if key_size == 0 or value_size == 0:
        raise ValueError(f"heads of q and v must have at least one channel, got D_k={key_size} and D_v={value_size}")
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
        check_strided("A_log", a_log)
        if a_log.numel() != heads:
            raise ValueError(f"A_log must have one value a head, H={heads}, got shape {tuple(a_log.shape)}")
        a_log = a_log.reshape(heads)
        if dt_bias is not None:
            check_tensor("dt_bias", dt_bias)
            check_strided("dt_bias", dt_bias)
            expected = (heads, key_size) if g.dim() == 4 else (heads,)
            if dt_bias.numel() != heads * (key_size if g.dim() == 4 else 1):
                symbols = "(H, D_k) or (H·D_k,)" if g.dim() == 4 else "(H,)"
                raise ValueError(f"dt_bias must have shape {symbols} with {expected}, got {tuple(dt_bias.shape)}")
            dt_bias = dt_bias.reshape(expected)
        if lower_bound is not None:
            lower_bound = float(check_scale("lower_bound", lower_bound))
            if not lower_bound < 0:
                raise ValueError(f"lower_bound must be below 0, got {lower_bound}")
            if lower_bound == -math.inf:
                raise ValueError("lower_bound must be finite, got -inf")
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
        check_shape(state_name, initial_state, (sequences, heads, key_size, value_size), symbols)
    scale = key_size**-0.5 if scale is None else float(check_scale("scale", scale))
    q, k, v = autocast(q, k, v)
    check_same_dtype(q=q, k=k, v=v)
    _check_wide(q.dtype, beta=beta, g=g, A_log=a_log, dt_bias=dt_bias)
    if initial_state is not None and initial_state.dtype != accumulator(q.dtype):
        raise TypeError(f"{state_name} must be {accumulator(q.dtype)}, got {initial_state.dtype}")
    tensors = {"q": q, "k": k, "v": v, "beta": beta, "g": g, "A_log": a_log, "dt_bias": dt_bias}
    check_same_device(**tensors, **{state_name: initial_state}, cu_seqlens=cu_seqlens)
    return DeltaRule(q, k, v, beta, g, a_log, dt_bias, initial_state, cu_seqlens, scale, lower_bound, *args[11:])


def check_pack(args: DeltaRule) -> None:
    """On the CPU: ``cu_seqlens`` ascends from 0 to T."""
    if args.cu_seqlens is None or not args.q.is_cpu:
        return
    bounds, length = args.cu_seqlens.tolist(), args.q.shape[1]
    if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens must ascend from 0 to T={length}, got {bounds}")


def check_values(args: DeltaRule) -> None:
    """On the CPU: beta in [0, 2], no log decay above 0, and :func:`check_pack`. The native kernels make these checks
    themselves.
    """
    check_pack(args)
    if not args.q.is_cpu or not args.beta.numel():
        return
    least, most = (float(x) for x in args.beta.detach().aminmax())
    if least < 0 or most > 2:
        raise ValueError(f"beta must be in [0, 2], got {least if least < 0 else most}")
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
    r"""Linear attention by the delta rule: each token corrects the state.

    For each head, with its state ``S (D_k, D_v)`` and ``α_t = exp(g_t)``::

        S_t = (I − β_t k_t k_tᵀ) Diag(α_t) S_{t−1} + β_t k_t v_tᵀ        o_t = scale · S_tᵀ q_t

    Without ``g`` this is DeltaNet (Schlag et al., 2021; in chunks by Yang et al., 2024), with one decay per head it is
    Gated DeltaNet (Yang et al., 2025), and with one per key channel Kimi Delta Attention (Kimi Team, 2025). Chunks of
    tokens are computed by matrix products. The cost is linear in T. For the backward pass the arguments and a state for
    every few chunks are saved, and the rest is computed again. Products of decays are exponentials of sums that are at
    most 0: long products do not overflow, and ``g = −inf`` clears the state.

    With ``A_log``, ``g`` is a raw gate. The log decay is then ``−exp(A_log)·softplus(g + dt_bias)``, or, if
    ``lower_bound`` is given, ``lower_bound·sigmoid(exp(A_log)·(g + dt_bias))``.

    Args:
        q: ``(B, T, H_k, D_k)`` float.
        k: the shape and dtype of ``q``. Keys should have at most unit norm: the state grows without bound where
            ``β·|k|²`` is above 2.
        v: ``(B, T, H, D_v)``, the dtype of ``q``. H is a multiple of H_k: each key head is shared by H/H_k consecutive
            value heads.
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
        lower_bound: a number below 0 for the sigmoid form; or None.

    Returns:
        ``o (B, T, H, D_v)`` in the dtype of ``q``, and the final state in the shape and dtype of ``initial_state`` or
        None. Sums are float32 (float64 for float64). Differentiable in all float tensors. Under ``torch.autocast``
        ``q``, ``k`` and ``v`` are cast to its dtype.

    Raises:
        TypeError: an argument is not a tensor, a dtype is not supported, or dtypes do not fit.
        ValueError: shapes or devices do not fit, H is not a multiple of H_k, ``lower_bound`` is not below 0; on the CPU
            also for ``beta`` outside [0, 2], ``g`` above 0, and ``cu_seqlens`` that does not ascend from 0 to T.
    """
    operands = (q, k, v, beta, g, A_log, dt_bias, initial_state, cu_seqlens)
    args = _checked(DeltaRule(*operands, scale, lower_bound, use_qk_l2norm, output_final_state))
    backend = _backend.resolve("delta_rule", args.q)
    check_float("q", args.q, backend)
    if backend == "reference":
        if not torch.compiler.is_compiling():
            check_values(args)
        return _delta_rule_reference.chunked(args)
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args[:8])
    o, final_state, _ = _delta_rule(
        DeltaRuleForward(args, CHECKPOINT_TOKENS[backend] if differentiated else 0), backend
    )
    return o, final_state if output_final_state else None


def _is_plain_step(q, k, v, beta, state, g) -> bool:
    """Whether the full checks and the dispatcher would do nothing beyond these simple comparisons.

    A step takes less time than the full checks.
    """
    operands = (q, k, v, beta, state) if g is None else (q, k, v, beta, state, g)
    if (
        torch.compiler.is_compiling()
        or not all(type(x) is torch.Tensor and x.is_cpu for x in operands)
        or not is_plain(operands)
    ):
        return False
    shape, dtype = q.shape, q.dtype
    if v.dim() != 3 or len(shape) != 3 or not v.shape[1] or torch.is_autocast_enabled("cpu"):
        return False
    b, heads, value_size = v.shape
    wide = _WIDE.get(dtype)
    return (
        wide is not None
        and k.shape == shape
        and shape[0] == b
        and min(shape[1], shape[2], value_size) > 0
        and heads % shape[1] == 0
        and beta.shape == (b, heads)
        and state.shape == (b, heads, shape[2], value_size)
        and (g is None or g.shape == (b, heads) or g.shape == (b, heads, shape[2]))
        and k.dtype == v.dtype == dtype
        and state.dtype == wide
        and beta.dtype in (dtype, wide)
        and (g is None or g.dtype in (dtype, wide))
        and state.is_contiguous()
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in operands))
    )


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
    """One token of :func:`delta_rule`, for decoding; the state is updated in place.

    Args:
        q: ``(B, H_k, D_k)`` float.
        k: the shape and dtype of ``q``.
        v: ``(B, H, D_v)``, the dtype of ``q``.
        beta: ``(B, H)`` in [0, 2], the dtype of ``q`` or float32.
        state: ``(B, H, D_k, D_v)`` float32 (float64 for float64), contiguous; becomes the state after the token.
        g: ``(B, H)`` or ``(B, H, D_k)`` or None, as in :func:`delta_rule`.
        scale: the factor of the output, ``D_k**-0.5`` when None.
        use_qk_l2norm: as in :func:`delta_rule`, like the remaining arguments.
        A_log: ``(H,)``.
        dt_bias: ``(H,)`` or ``(H, D_k)``.
        lower_bound: below 0 or None.

    Returns:
        ``o (B, H, D_v)`` in the dtype of ``q``. Not differentiable.

    Raises:
        TypeError, ValueError: as in :func:`delta_rule`; also if ``state`` is not contiguous, or if gradients are
            enabled and an argument requires one.
    """
    if (
        A_log is None
        and dt_bias is None
        and lower_bound is None
        and type(use_qk_l2norm) is bool
        and _is_plain_step(q, k, v, beta, state, g)
        and _backend.resolve("delta_rule", q) == "native"
    ):
        scale = q.shape[2] ** -0.5 if scale is None else float(check_scale("scale", scale))
        o = _kernels("native").step_of_tokens(q, k, v, beta, g, state, scale, use_qk_l2norm)
        torch.autograd.graph.increment_version(state)
        return o
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
    args = _checked(DeltaRule(*tokens, A_log, dt_bias, state, None, scale, lower_bound, use_qk_l2norm, False), "state")
    backend = _backend.resolve("delta_rule", args.q)
    check_float("q", args.q, backend)
    named = dict(zip(("q", "k", "v", "beta", "g", "A_log", "dt_bias", "state"), args[:8], strict=True))
    check_no_gradient("delta_rule_step", "delta_rule", **named)
    if backend != "reference":
        return _delta_rule_step(args, backend).squeeze(1)
    if not torch.compiler.is_compiling():
        check_values(args)
    o, last = _delta_rule_reference.recurrent(args._replace(output_final_state=True))
    state.copy_(last)
    return o.squeeze(1)
