"""The K experts of highest score, as functions of logits."""

from __future__ import annotations

import math

import torch

from gossamer._checks import check_flag, check_same_device, check_shape, check_strided
from gossamer.nn.moe.routing import Routing, as_logits, check_selection, sigmoid_probabilities
from gossamer.ops.topk_routing import EPSILON, finite_logits, fused_topk, highest, masked_softmax, select_experts


def _outside_groups(choice: torch.Tensor, n_group: int, topk_group: int, best: int) -> torch.Tensor:
    """``(T, E)`` bool, true outside the ``topk_group`` groups with the largest sums of their ``best`` highest choices.

    A masked expert (−inf) adds nothing to its group's sum, and a wholly masked group ranks last.
    """
    num_tokens, num_experts = choice.shape
    size = num_experts // n_group
    top = choice.view(num_tokens, n_group, size).topk(min(best, size), dim=-1).values
    rest = top[..., 1:]
    group_scores = top[..., 0] + rest.masked_fill(rest == -math.inf, 0.0).sum(dim=-1)
    chosen = highest(group_scores, topk_group)
    outside = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, chosen, False)
    return outside.unsqueeze(-1).expand(num_tokens, n_group, size).reshape(num_tokens, num_experts)


def softmax_topk(
    logits: torch.Tensor,
    top_k: int,
    *,
    renormalize: bool = False,
    n_group: int = 1,
    topk_group: int = 1,
    scale: float = 1.0,
) -> Routing:
    """The K experts of highest softmax probability: ``w = scale · softmax(logits)[ids]``, as in OLMoE.

    With ``renormalize`` a token's weights are divided by their sum (Mixtral, Qwen3-MoE). This equals the softmax over
    the chosen logits and is computed as such, so experts not chosen get exactly zero gradient. At K = 1 the
    renormalised weight is constant, so that a task loss cannot train the router.

    With ``n_group > 1`` only the ``topk_group`` groups (of E / n_group neighbouring experts each) whose best expert is
    most probable take part (DeepSeek-V2).

    Among experts with equal scores the lower id comes first.

    A logit of −inf masks its expert. Where a token has fewer than K unmasked experts, its other slots hold distinct
    masked experts with weight 0. NaN and +inf are errors on the CPU. On CUDA, where values are not read back, NaN is
    treated as −inf and +inf as the largest finite number, so that ids stay distinct and in range and other tokens are
    not affected; ``Routing.logits`` keeps the original values.

    Args:
        logits: ``(..., E)``, floating, converted to float32 (float64 stays); T is the product of the leading sizes.
        top_k: K, at most E.
        renormalize: whether a token's weights add up to ``scale``.
        n_group: groups that the experts form; divides E.
        topk_group: groups that a token may use.
        scale: factor on the weights.

    Returns:
        A :class:`Routing` with a token's experts in descending order of probability.

    Raises:
        TypeError: ``logits`` is not a floating tensor, or a size is not an int.
        ValueError: K, ``n_group`` or ``topk_group`` do not fit E, or ``scale`` is not finite; on the CPU, a logit is
            NaN or +inf.
    """
    logits = as_logits(logits)
    check_selection(logits.shape[1], top_k, n_group, topk_group, scale)
    check_flag("renormalize", renormalize)
    options = {"renormalize": renormalize, "n_group": n_group, "topk_group": topk_group, "scale": scale}
    if (fused := fused_topk(logits, None, top_k, sigmoid=False, **options)) is not None:
        return Routing(*fused, logits.shape[1], logits)
    if n_group == 1:
        ids = select_experts(logits, logits, top_k)
        picked, outside = logits.gather(1, ids), None
    else:
        choice = finite_logits(logits.detach())
        outside = _outside_groups(choice, n_group, topk_group, best=1)
        ids = select_experts(logits, choice.masked_fill(outside, -math.inf), top_k)
        outside = outside.gather(1, ids)
        picked = logits.gather(1, ids).masked_fill(outside, -math.inf)
    if renormalize:
        weights = masked_softmax(picked)
    else:
        weights = masked_softmax(logits).gather(1, ids)
        if outside is not None:
            weights = weights.masked_fill(outside, 0.0)
    return Routing(ids, weights if scale == 1.0 else weights * scale, logits.shape[1], logits)


def topk_softmax(logits: torch.Tensor, top_k: int) -> Routing:
    """The K highest logits, and their softmax as weights: ``w = softmax(logits[ids])``, as in gpt-oss and Mixtral.

    The same as :func:`softmax_topk` with ``renormalize=True``, with the same errors and rules for −inf and NaN.

    Args:
        logits: ``(..., E)``, floating.
        top_k: K, at most E.
    """
    return softmax_topk(logits, top_k, renormalize=True)


def sigmoid_topk(
    logits: torch.Tensor,
    top_k: int,
    *,
    correction_bias: torch.Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
) -> Routing:
    """Selection by biased sigmoid scores inside the best groups, and weights from unbiased scores, as in DeepSeek-V3.

    ``s = σ(logits)`` and ``r = s + correction_bias``. A group of E / n_group neighbouring experts scores the sum of its
    two highest ``r``; inside the ``topk_group`` best groups the K highest ``r`` are chosen, and
    ``w = scale · s[ids] / (Σ s[ids] + 1e-20)``. The bias takes no gradient; :func:`update_expert_bias` moves it.

    Masked experts, NaN and +inf as in :func:`softmax_topk`. A masked expert adds nothing to its group's score, a wholly
    masked group ranks last, and ``correction_bias = -inf`` masks an expert for every token.

    Args:
        logits: ``(..., E)``, floating, converted to float32 (float64 stays).
        top_k: K, at most ``E / n_group · topk_group``.
        correction_bias: ``(E,)`` floating, or None.
        n_group: groups that the experts form; divides E.
        topk_group: groups that a token may use.
        renormalize: whether weights are divided by their sum.
        scale: factor on the weights (``routed_scaling_factor``).

    Returns:
        A :class:`Routing` with a token's experts in descending order of ``r``.

    Raises:
        TypeError: ``logits`` is not a floating tensor, or a size is not an int.
        ValueError: sizes do not fit E; ``correction_bias`` has another shape or device; on the CPU, a logit is NaN or
            +inf, or the bias NaN.
    """
    logits = as_logits(logits)
    num_experts = logits.shape[1]
    check_selection(num_experts, top_k, n_group, topk_group, scale)
    if correction_bias is not None:
        check_shape("correction_bias", correction_bias, (num_experts,), "(E,)")
        check_strided("correction_bias", correction_bias)
        check_same_device(logits=logits, correction_bias=correction_bias)
    check_flag("renormalize", renormalize)
    options = {"renormalize": renormalize, "n_group": n_group, "topk_group": topk_group, "scale": scale}
    if (fused := fused_topk(logits, correction_bias, top_k, sigmoid=True, **options)) is not None:
        return Routing(*fused, num_experts, logits, probabilities=sigmoid_probabilities)
    clean = finite_logits(logits)
    scores = clean.sigmoid()
    with torch.no_grad():
        choice = scores
        if correction_bias is not None:
            choice = scores + correction_bias
        choice = choice.masked_fill(clean == torch.finfo(clean.dtype).min, -math.inf)
        if n_group > 1:
            choice = choice.masked_fill(_outside_groups(choice, n_group, topk_group, best=2), -math.inf)
        ids = select_experts(logits, choice, top_k)
        # Not "== -inf", because a NaN from the bias must not pass either.
        unavailable = ~(choice.gather(1, ids) > -math.inf)
    weights = scores.gather(1, ids).masked_fill(unavailable, 0.0)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + EPSILON)
    weights = weights if scale == 1.0 else weights * scale
    return Routing(ids, weights, num_experts, logits, probabilities=sigmoid_probabilities)
