"""Optimizer steps on rows held in registers, and stochastic rounding, as device functions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from gossamer._step_rules import StepRule


class RuleForm(NamedTuple):
    """The parts of a rule that a kernel is compiled for.

    Attributes:
        name: a key of gossamer's RULES.
        decay: the way in which weight decay enters.
        nesterov: whether the momentum is Nesterov's.
        clips_value: whether gradient elements are clipped.
        clips_norm: whether the norm of a row's gradient is clipped.
        row_state1: whether the first state holds a value per row.
        row_state2: whether the second state does.
        rounds: whether new rows are rounded stochastically.
        learns_scale: whether the scales of rows of codes are trained.
    """

    name: str
    decay: str
    nesterov: bool
    clips_value: bool
    clips_norm: bool
    row_state1: bool
    row_state2: bool
    rounds: bool
    learns_scale: bool = False


class Numbers(NamedTuple):
    """A rule's numbers, and the logarithms of its betas."""

    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    log_beta1: float
    log_beta2: float
    eps: float
    l1: float
    l2: float
    clip_value: float
    clip_norm: float


def rule_form(rule: StepRule, dtype: torch.dtype, learns_scale: bool = False) -> RuleForm:
    """The compile-time parts of a rule's step on a table of ``dtype``."""
    return RuleForm(
        rule.name,
        rule.decay,
        rule.nesterov,
        math.isfinite(rule.clip_value),
        math.isfinite(rule.clip_norm),
        *rule.row_states,
        rule.rounds(dtype),
        learns_scale,
    )


def rule_numbers(rule: StepRule) -> Numbers:
    """A rule's numbers as passed to kernels."""
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in (rule.beta1, rule.beta2)]
    return Numbers(
        log_beta1=logs[0], log_beta2=logs[1], **{k: getattr(rule, k) for k in Numbers._fields if "log" not in k}
    )


_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_GOLDEN32 = tl.constexpr(0x9E3779B9)
_MIX64_A, _MIX64_B = tl.constexpr(0xBF58476D1CE4E5B9), tl.constexpr(0x94D049BB133111EB)
_MIX32_A, _MIX32_B = tl.constexpr(0x21F0AAAD), tl.constexpr(0x735A2D97)


@triton.jit
def _mix64(z):
    z = (z ^ (z >> 30)) * _MIX64_A
    z = (z ^ (z >> 27)) * _MIX64_B
    return z ^ (z >> 31)


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * _MIX32_A
    x = (x ^ (x >> 15)) * _MIX32_B
    return x ^ (x >> 15)


@triton.jit
def random_bits(seed, step, rows, columns):
    """Uniform 32-bit numbers of ``rows [R]`` and ``columns [C]``, by the generator that gossamer.ops documents."""
    golden = tl.full((1,), _GOLDEN, tl.uint64)
    key = _mix64(tl.full((1,), seed, tl.int64).to(tl.uint64, bitcast=True))
    key = _mix64(key + step.to(tl.uint64) * golden)
    key = _mix64(key + rows.to(tl.uint64) * golden)[:, None]
    low = (key & 0xFFFFFFFF).to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    return _mix32((low + columns.to(tl.uint32)[None, :] * tl.full((1, 1), _GOLDEN32, tl.uint32)) ^ high)


@triton.jit
def round_stochastically(x, bits, DTYPE: tl.constexpr):
    """Float32 ``x`` rounded to bfloat16 or float16, up or down with the probability that makes the mean exact."""
    pattern = x.to(tl.uint32, bitcast=True)
    if DTYPE == tl.bfloat16:
        rounded = ((pattern + (bits & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        rounded = ((pattern + (bits & 0x1FFF)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        # Below the smallest normal number the spacing is constant.
        units = tl.abs(x) * 16777216.0
        whole = tl.floor(units)
        up = (bits >> 8).to(tl.float32) * 5.9604644775390625e-08 < units - whole
        small = (whole + up.to(tl.float32)) * 5.9604644775390625e-08
        small = (small.to(tl.uint32, bitcast=True) | (pattern & 0x80000000)).to(tl.float32, bitcast=True)
        rounded = tl.where(tl.abs(x) < 6.103515625e-05, small, rounded)
    finite = (pattern & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded, x).to(DTYPE)


@triton.jit
def _divide(a, b):
    return tl.div_rn(a, b)


@triton.jit
def _code_limits(DTYPE: tl.constexpr):
    """The lowest and the highest code in float32."""
    if DTYPE == tl.int8:
        return -128.0, 127.0
    else:
        return -32768.0, 32767.0


@triton.jit
def _nearest(v):
    """The nearest whole numbers, halves to even, of magnitudes below 2²²."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def to_codes(w, scale, bits, DTYPE: tl.constexpr):
    """Rows ``w [R, C]`` in units of ``scale [R]`` as codes, rounded by ``bits``, or to the nearest without them."""
    low, high = _code_limits(DTYPE)
    v = _divide(w, tl.broadcast_to(scale[:, None], w.shape))
    v = tl.where(v == v, v, 0.0)
    v = tl.where(v < low, low, tl.where(v > high, high, v))
    if bits is None:
        code = _nearest(v)
    else:
        whole = tl.floor(v)
        up = (bits >> 8).to(tl.float32) * 5.9604644775390625e-08 < v - whole
        code = whole + up.to(tl.float32)
    return code.to(tl.int32).to(DTYPE)


@triton.jit
def moved_scale(w, grad, mask, scale, rate, DTYPE: tl.constexpr):
    """The scales ``[R]`` after a step down the slope that gradients ``grad`` have in them at rows ``w``."""
    low, high = _code_limits(DTYPE)
    v = _divide(w, tl.broadcast_to(scale[:, None], w.shape))
    by_scale = tl.where(v < low, low, tl.where(v > high, high, _nearest(v) - v))
    moved = scale - rate * tl.sum(tl.where(mask, grad * by_scale, 0.0), 1)
    # A scale of zero would divide by zero; NaN stays NaN.
    return tl.where(moved < 9.5367431640625e-07, 9.5367431640625e-07, moved)


@triton.jit
def _norm(x):
    return tl.sqrt_rn(tl.sum(x * x, 1))[:, None]


@triton.jit
def _correction(log_beta, step):
    """``1 − βᵗ``; a direct float32 evaluation would lose most digits while it is small."""
    return 1.0 - tl.exp(step.to(tl.float64) * log_beta)


@triton.jit
def take_step(
    w,
    grad,
    live,
    mask,
    dim,
    state1_ptrs,
    state2_ptrs,
    step,
    lr,
    numbers,
    RULE: tl.constexpr,
):
    """The new rows ``[R, C]`` after one step on rows ``w`` with summed gradients ``grad``; the new states are stored.

    ``mask [R, C]`` marks the elements that exist; ``w`` and ``grad`` are zero elsewhere. ``live [R]`` marks the rows
    that exist, and ``dim [R, 1]`` is their dim in float32. State pointers have the shape of rows, or ``[R]`` for one
    value per row.
    """
    weight_decay, eps, clip_value, clip_norm = numbers.weight_decay, numbers.eps, numbers.clip_value, numbers.clip_norm
    beta1, beta2 = numbers.beta1, numbers.beta2
    # Comparisons keep NaN: a NaN gradient must not become a clipped one.
    if RULE.clips_value:
        grad = tl.where(grad > clip_value, clip_value, tl.where(grad < -clip_value, -clip_value, grad))
    if RULE.clips_norm:
        norm = _norm(grad)
        long = norm > clip_norm
        grad *= tl.where(long, _divide(clip_norm + tl.zeros_like(norm), tl.where(long, norm, 1.0)), 1.0)
    if RULE.decay == "weights":
        w *= 1.0 - lr * weight_decay
    elif RULE.decay == "gradient":
        grad += weight_decay * w
    if RULE.name == "sgd":
        if state1_ptrs is not None:
            momentum = beta1 * tl.load(state1_ptrs, mask, other=0.0) + grad
            tl.store(state1_ptrs, momentum, mask)
            if RULE.nesterov:
                grad += beta1 * momentum
            else:
                grad = momentum
        return w - lr * grad
    elif RULE.name == "adagrad":
        total = tl.load(state1_ptrs, mask, other=0.0) + grad * grad
        tl.store(state1_ptrs, total, mask)
        return w - _divide(lr * grad, tl.sqrt_rn(total) + eps)
    elif RULE.name == "rowwise_adagrad":
        total = tl.load(state1_ptrs, live, other=0.0)[:, None] + _divide(tl.sum(grad * grad, 1)[:, None], dim)
        tl.store(state1_ptrs, tl.sum(total, 1), live)
        denominator = tl.sqrt_rn(total) + eps
        return w - _divide(lr * grad, tl.broadcast_to(denominator, grad.shape))
    elif RULE.name == "ftrl":
        l1, l2 = numbers.l1, numbers.l2
        before = tl.load(state1_ptrs, mask, other=0.0)
        after = before + grad * grad
        root = tl.sqrt_rn(after)
        # The rule divides by the rate; at a rate of zero nothing changes.
        rate = lr + tl.zeros_like(grad)
        steps = rate != 0.0
        rate = tl.where(steps, rate, 1.0)
        # √n' − √n without cancellation.
        both = root + tl.sqrt_rn(before)
        grown = _divide(grad * grad, tl.where(both > 0, both, 1.0))
        z = tl.load(state2_ptrs, mask, other=0.0) + grad - _divide(grown, rate) * w
        tl.store(state1_ptrs, after, mask & steps)
        tl.store(state2_ptrs, z, mask & steps)
        shrunk = tl.where(z > 0, l1 - z, -l1 - z)
        new = tl.where(tl.abs(z) <= l1, 0.0, _divide(shrunk, _divide(beta1 + root, rate) + l2))
        return tl.where(steps, new, w)
    else:
        m = beta1 * tl.load(state1_ptrs, mask, other=0.0) + (1.0 - beta1) * grad
        tl.store(state1_ptrs, m, mask)
        if RULE.name == "partial_rowwise_adam":
            square = _divide(tl.sum(grad * grad, 1)[:, None], dim)
            v = beta2 * tl.load(state2_ptrs, live, other=0.0)[:, None] + (1.0 - beta2) * square
            tl.store(state2_ptrs, tl.sum(v, 1), live)
        else:
            v = beta2 * tl.load(state2_ptrs, mask, other=0.0) + (1.0 - beta2) * grad * grad
            tl.store(state2_ptrs, v, mask)
        root = tl.sqrt(_correction(numbers.log_beta2, step)).to(tl.float32)
        denominator = _divide(tl.sqrt_rn(v), root + tl.zeros_like(v)) + eps
        correction = _correction(numbers.log_beta1, step).to(tl.float32) + tl.zeros_like(m)
        q = _divide(_divide(m, correction), tl.broadcast_to(denominator, m.shape))
        if RULE.name == "lamb":
            # With an ε of zero, padding elements would give 0/0.
            q = tl.where(mask, q + weight_decay * w, 0.0)
            norm_w, norm_q = _norm(w), _norm(q)
            known = (norm_w > 0) & (norm_q > 0)
            q *= tl.where(known, _divide(norm_w, tl.where(known, norm_q, 1.0)), 1.0)
        return w - lr * q
