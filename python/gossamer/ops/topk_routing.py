"""Experts and routing weights from logits as one operator, computed by one kernel."""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import NamedTuple

import torch

from gossamer import _backend
from gossamer.ops._records import define
from gossamer.ops._registration import register

# Keeps the normalisation of sigmoid scores finite if all K of them underflow, as in DeepSeek-V3.
EPSILON = 1e-20
# The Triton kernel's limit on experts, because a program holds all logits of a token; and the native kernel's limit on
# experts per token, because it scans all logits once for each.
MOST_EXPERTS, MOST_CHOSEN = 1024, 64


def _raise_not_a_logit(logits: torch.Tensor) -> None:
    """Raise an error that gives the position of NaN or +inf in ``logits (T, E)``."""
    bad = logits.isnan() | logits.isposinf()
    token, expert = (int(i) for i in bad.nonzero()[0])
    raise ValueError(
        f"logits must hold neither NaN nor +inf (-inf masks an expert), got {float(logits[token, expert])} at token "
        f"{token}, expert {expert}, and {int(bad.sum())} such values among {tuple(logits.shape)}"
    )


def finite_logits(logits: torch.Tensor) -> torch.Tensor:
    """Replace NaN and −inf by the lowest finite number and +inf by the highest, with zero gradient."""
    limits = torch.finfo(logits.dtype)
    return torch.nan_to_num(logits, nan=limits.min, posinf=limits.max, neginf=limits.min)


def masked_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension in which NaN and −inf get 0, even if all values are NaN or −inf."""
    clean = finite_logits(logits)
    return clean.softmax(dim=-1).masked_fill(clean == torch.finfo(clean.dtype).min, 0.0)


def check_logits(logits: torch.Tensor, biased: torch.Tensor | None) -> None:
    """Raise on the CPU if ``logits`` hold NaN or +inf, or ``biased``, a bias or biased scores, holds NaN.

    This reads values, so it must be called inside an operator, where values exist in compiled calls too.
    """
    if logits.device.type != "cpu" or logits.numel() == 0:
        return
    if not float(logits.max()) < math.inf:
        _raise_not_a_logit(logits)
    if biased is not None and bool(biased.isnan().any()):
        raise ValueError("correction_bias must not hold NaN, got NaN in the scores of finite logits")


class TopkRouting(NamedTuple):
    """Arguments of a router's choice; the rules are those of gossamer.nn.softmax_topk and sigmoid_topk.

    Attributes:
        logits: ``(T, E)`` float32.
        bias: ``(E,)`` float, added to the scores that experts are chosen by, or None.
        top_k: K.
        sigmoid: whether scores are sigmoids of the logits, else their softmax.
        renormalize: whether a token's weights are divided by their sum.
        n_group: groups that the experts form.
        topk_group: groups that a token may use.
        scale: factor on the weights.
    """

    logits: torch.Tensor
    bias: torch.Tensor | None
    top_k: int
    sigmoid: bool
    renormalize: bool
    n_group: int
    topk_group: int
    scale: float


class TopkRoutingBackward(NamedTuple):
    """Arguments of the backward pass: those of :class:`TopkRouting`, its results, and ``dweights (T, K)``."""

    dweights: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    forward: TopkRouting


@functools.cache
def _kernels(backend: str) -> ModuleType:
    if backend == "native":
        from gossamer.cpu_kernels import topk_routing
    else:
        from gossamer.triton_kernels import topk_routing
    return topk_routing


def _forward(args: TopkRouting, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    check_logits(args.logits, args.bias)
    return _kernels(backend).topk_routing(args)


def _forward_fake(args: TopkRouting) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (args.logits.shape[0], args.top_k)
    return args.logits.new_empty(shape), args.logits.new_empty(shape, dtype=torch.int64)


_topk_routing = define(
    "topk_routing",
    TopkRouting,
    kernel=_forward,
    fake=_forward_fake,
    returns="(Tensor weights, Tensor expert_ids)",
)


def _backward(args: TopkRoutingBackward, backend: str) -> torch.Tensor:
    return _kernels(backend).topk_routing_backward(args)


def _backward_fake(args: TopkRoutingBackward | MassRoutingBackward) -> torch.Tensor:
    return args.forward.logits.new_empty(args.forward.logits.shape)


_topk_routing_backward = define(
    "topk_routing_backward", TopkRoutingBackward, kernel=_backward, fake=_backward_fake, returns="Tensor"
)


def _save(ctx, args: TopkRouting, output):
    # Otherwise autograd would make zeros as the gradient of ids.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    # The bias may change between forward and backward pass; the backward pass does not read it.
    return args._replace(bias=None), *output


def _differentiate(ctx, args: TopkRouting, tensors, dweights: torch.Tensor | None, _):
    if dweights is None or "logits" not in ctx.needs:
        return {}
    backward = TopkRoutingBackward(dweights, *tensors, args)
    if torch.is_grad_enabled():
        # Second derivatives are computed in plain torch.
        return {"logits": topk_routing_backward_reference(backward)}
    return {"logits": _topk_routing_backward(backward, ctx.backend)}


_topk_routing.differentiate(_save, _differentiate)


def topk_routing_backward_reference(args: TopkRoutingBackward) -> torch.Tensor:
    """The gradient of ``logits (T, E)`` in plain torch, differentiable."""
    dweights, weights, ids, (logits, _, _, sigmoid, renormalize, _, _, scale) = args
    # Slots without an expert and scores that underflow have weight 0 and pass no gradient.
    live = weights > 0
    dweights = torch.where(live, dweights, 0.0)
    if sigmoid:
        scores = torch.where(live, logits.gather(1, ids).sigmoid(), 0.0)
        dscores = scale * dweights
        if renormalize:
            total = scores.sum(1, keepdim=True) + EPSILON
            dscores = (dscores - (dscores * scores).sum(1, keepdim=True) / total) / total
        dpicked = dscores * scores * (1 - scores)
    else:
        mean = (dweights * weights).sum(1, keepdim=True)
        if renormalize:
            dpicked = weights * (dweights - mean / scale)
        else:
            dpicked = weights * dweights
    dlogits = torch.zeros_like(logits).scatter_add_(1, ids, torch.where(live, dpicked, 0.0))
    finite = logits.isfinite()
    if not sigmoid and not renormalize:
        limits = torch.finfo(logits.dtype)
        clean = torch.nan_to_num(logits, nan=limits.min, posinf=limits.max, neginf=limits.min)
        dlogits = dlogits - clean.softmax(1) * mean
    return torch.where(finite, dlogits, 0.0)


class MassRouting(NamedTuple):
    """Arguments of choosing experts until probabilities reach a sum, by the rules of gossamer.nn.softmax_top_p and
    softmax_threshold.

    Attributes:
        logits: ``(T, E + null experts)`` float32.
        mass: the sum.
        exceed: whether the sum must be exceeded; otherwise reaching it is enough.
        num_experts: E; logits after the first E belong to null experts, whose slots are left out.
        max_ranks: maximum number of choices per token, including null experts.
    """

    logits: torch.Tensor
    mass: float
    exceed: bool
    num_experts: int
    max_ranks: int


class MassRoutingBackward(NamedTuple):
    """Arguments of the backward pass: :class:`MassRouting`, its results, and ``dweights (T, min(E, max_ranks))``."""

    dweights: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    forward: MassRouting


def _mass_forward(args: MassRouting, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    check_logits(args.logits, None)
    return _kernels(backend).mass_routing(args)


def _mass_fake(args: MassRouting) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (args.logits.shape[0], min(args.num_experts, args.max_ranks))
    return args.logits.new_empty(shape), args.logits.new_empty(shape, dtype=torch.int64)


_mass_routing = define(
    "mass_routing", MassRouting, kernel=_mass_forward, fake=_mass_fake, returns="(Tensor weights, Tensor expert_ids)"
)


def _mass_backward(args: MassRoutingBackward, backend: str) -> torch.Tensor:
    return _kernels(backend).mass_routing_backward(args)


_mass_routing_backward = define(
    "mass_routing_backward", MassRoutingBackward, kernel=_mass_backward, fake=_backward_fake, returns="Tensor"
)


def _save_mass(ctx, args: MassRouting, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    return args, *output


def _differentiate_mass(ctx, args: MassRouting, tensors, dweights: torch.Tensor | None, _):
    if dweights is None or "logits" not in ctx.needs:
        return {}
    weights, ids = tensors
    if torch.is_grad_enabled():
        # Slots without an expert have weight 0, so any valid id may replace theirs.
        ids = ids.clamp(max=args.logits.shape[1] - 1)
        plain = TopkRouting(args.logits, None, ids.shape[1], False, False, 1, 1, 1.0)
        return {"logits": topk_routing_backward_reference(TopkRoutingBackward(dweights, weights, ids, plain))}
    return {"logits": _mass_routing_backward(MassRoutingBackward(dweights, weights, ids, args), ctx.backend)}


_mass_routing.differentiate(_save_mass, _differentiate_mass)


def fused_mass(
    logits: torch.Tensor, mass: float, *, exceed: bool, num_experts: int, max_ranks: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``expert_ids`` int64 and ``weights`` float32, both ``(T, min(E, max_ranks))``; None if no kernel serves the call.

    The arguments are those of :class:`MassRouting`. A token's experts come first; id E and weight 0 mean no expert.
    Kernels serve float32 logits: Triton's up to 1024 experts without null experts, native ones any number.
    """
    backend = _backend.resolve("topk_routing", logits)
    if backend not in _FITS or logits.dtype != torch.float32:
        return None
    if backend == "triton" and not num_experts == logits.shape[1] <= MOST_EXPERTS:
        return None
    weights, ids = _mass_routing(MassRouting(logits, mass, exceed, num_experts, max_ranks), backend)
    return ids, weights


def _power_of_two(value: int) -> bool:
    return value & (value - 1) == 0


def _fits_triton(experts: int, top_k: int, n_group: int, topk_group: int) -> bool:
    return experts <= MOST_EXPERTS and (n_group == 1 or (_power_of_two(experts) and _power_of_two(n_group)))


def _fits_native(experts: int, top_k: int, n_group: int, topk_group: int) -> bool:
    return max(top_k, topk_group) <= MOST_CHOSEN


# Backends with a kernel -> whether it supports these sizes.
_FITS = {"triton": _fits_triton, "native": _fits_native}


def fused_topk(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    *,
    sigmoid: bool,
    renormalize: bool,
    n_group: int,
    topk_group: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``expert_ids (T, K)`` int64 and ``weights (T, K)`` float32 by one kernel, or None if no kernel supports the call.

    The rules are those of gossamer.nn.softmax_topk and sigmoid_topk, whose checked arguments these are. There are
    kernels for float32 logits: Triton's for up to 1024 experts, in groups for powers of two; native ones for up to 64
    experts per token.
    """
    # A backend that was forced for other primitives may have no kernel for this one.
    backend = _backend.resolve("topk_routing", logits)
    if backend not in _FITS or logits.dtype != torch.float32 or not scale > 0:
        return None
    if not _FITS[backend](logits.shape[1], top_k, n_group, topk_group):
        return None
    if bias is not None:
        if bias.dtype == torch.float64:
            return None
        bias = bias.detach()
    args = TopkRouting(logits, bias, top_k, sigmoid, renormalize, n_group, topk_group, scale)
    weights, ids = _topk_routing(args, backend)
    return ids, weights


def _select_kernel(logits, choice, top_k):
    check_logits(logits, None if choice is logits else choice)
    # NaN compares unpredictably inside a top-k; as the lowest value it cannot displace or repeat another expert.
    return highest(torch.nan_to_num(choice, nan=-math.inf, posinf=math.inf, neginf=-math.inf), top_k)


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the ``count`` highest scores along the last dimension in descending order, the first of equal ones
    first.
    """
    # A topk guarantees no order of equal scores.
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].contiguous()


def _select_fake(logits, choice, top_k):
    return choice.new_empty((choice.shape[0], top_k), dtype=torch.int64)


_select = register(
    "select_experts(Tensor logits, Tensor choice, int top_k) -> Tensor expert_ids", _select_kernel, _select_fake
)


def _choose_kernel(logits, scores, capacity):
    check_logits(logits, None)
    if capacity == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # Among equal scores the first tokens are taken, which topk does not guarantee.
    lowest = scores.topk(capacity, dim=0).values[-1]
    above, level = scores > lowest, scores == lowest
    chosen = above | (level & (level.cumsum(0) <= capacity - above.sum(0)))
    return chosen & (scores > 0)


def _choose_fake(logits, scores, capacity):
    return torch.empty_like(scores, dtype=torch.bool)


_choose = register(
    "choose_tokens(Tensor logits, Tensor scores, SymInt capacity) -> Tensor", _choose_kernel, _choose_fake
)


def choose_tokens(logits: torch.Tensor, scores: torch.Tensor, capacity: int) -> torch.Tensor:
    """``(T, E)`` bool: the ``capacity`` highest positive scores of each column; checks ``logits`` on the CPU."""
    with torch.no_grad():
        return _choose(logits, scores, capacity)


def _live_kernel(logits, scores, lowest):
    check_logits(logits, None)
    live = scores > 0
    return live if lowest is None else live & (scores >= lowest)


def _live_fake(logits, scores, lowest):
    return torch.empty_like(scores, dtype=torch.bool)


_live = register("live_experts(Tensor logits, Tensor scores, Tensor? lowest) -> Tensor", _live_kernel, _live_fake)


def live_experts(logits: torch.Tensor, scores: torch.Tensor, lowest: torch.Tensor | None = None) -> torch.Tensor:
    """``(T, E)`` bool: positive scores, from ``lowest (E,)`` upwards; checks ``logits (T, any)`` on the CPU."""
    with torch.no_grad():
        return _live(logits, scores, lowest)


def select_experts(logits: torch.Tensor, choice: torch.Tensor, top_k: int) -> torch.Tensor:
    """``(T, K)`` int64, the K highest of each row of ``choice``, distinct, NaN lowest; checks ``logits`` on the CPU."""
    with torch.no_grad():
        return _select(logits, choice, top_k)
