"""Gates of experts by soft trees or by binary codes, and the experts that they choose, as one operator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch

from gossamer import _backend
from gossamer.ops._records import define
from gossamer.ops.topk_routing import MOST_CHOSEN, MOST_EXPERTS, check_logits, finite_logits, masked_softmax

# Added to the share of a token that reaches a leaf of a tree, as in COMET, which takes the logarithm of the sum.
REACH_EPSILON = 1e-8
# Added to the same share in the entropy term that makes gates decide for a leaf, as in COMET and DSelect-k.
LOG_EPSILON = 1e-6
# Narrower steps have infinite slopes in float32, and kernels multiply by the inverse of the width.
NARROWEST, WIDEST = 1e-36, 1e36


class TreeRouting(NamedTuple):
    """Arguments of gates that are products of smooth steps, as in gossamer.nn.tree_gates and selector_gates.

    Attributes:
        scores: ``(T, C)`` float32. For trees ``C = k·(2n − 1)``: for each tree the n − 1 splits in heap order, then the
            scores of the n leaves. With ``coded``, ``C = k·(m + 1)``: the m = ⌈log₂ n⌉ bits of each part, highest bit
            first, then one score for each part.
        num_parts: k.
        num_experts: n, which is E.
        gamma: width of the smooth step.
        coded: whether parts are binary codes of experts; otherwise they are trees.
        top_k: K slots per token. E: one slot per expert, empty if its gate is 0. Less than E: the highest gates in
            descending order. 0: no experts are chosen, and scores are not checked.
        keep_reach: whether to return the share that reaches each leaf.
        keep_sums: whether to return the sums of these shares.
    """

    scores: torch.Tensor
    num_parts: int
    num_experts: int
    gamma: float
    coded: bool
    top_k: int
    keep_reach: bool
    keep_sums: bool


class TreeRoutingBackward(NamedTuple):
    """Arguments of the backward pass.

    Attributes:
        dgates: ``(T, E)`` or None.
        dweights: ``(T, K)`` or None.
        dreach: ``(T, k, E)`` or None.
        dsums: ``(T, k, 2)`` or None.
        gates: result of the forward pass, like ``norm`` and ``ids``.
        norm: ``(T, 2)``.
        ids: ``(T, K)``.
        forward: the arguments of the forward pass.
    """

    dgates: torch.Tensor | None
    dweights: torch.Tensor | None
    dreach: torch.Tensor | None
    dsums: torch.Tensor | None
    gates: torch.Tensor
    norm: torch.Tensor
    ids: torch.Tensor
    forward: TreeRouting


class PartGates(NamedTuple):
    """The result of :func:`tree_routing`.

    Attributes:
        gates: ``(T, E)``.
        reach: ``(T, k, E)``, or None if it was not requested.
        sums: ``(T, k, 2)``: ``Σ −s·log(s + 1e-6)`` and ``Σ s`` over each part's leaves; None if not requested.
        expert_ids: ``(T, K)``, E in slots without an expert; None if the caller has to choose.
        weights: ``(T, K)``; None if the ids are.
    """

    gates: torch.Tensor
    reach: torch.Tensor | None
    sums: torch.Tensor | None
    expert_ids: torch.Tensor | None = None
    weights: torch.Tensor | None = None


def _distances(v: torch.Tensor, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """How far v/γ lies above −1/2 and below 1/2; NaN as −1/2."""
    u = torch.nan_to_num(v / gamma, nan=-0.5).clamp(-0.5, 0.5)
    return u + 0.5, 0.5 - u


class _SmoothStep(torch.autograd.Function):
    """``S(v)`` and ``1 − S(v)``, both to the precision of the dtype; the backward pass keeps ``v`` alone."""

    @staticmethod
    def forward(v, gamma):
        over, under = _distances(v, gamma)
        return over * over * (3 - 2 * over), under * under * (3 - 2 * under)

    @staticmethod
    def setup_context(ctx, inputs, output):
        v, ctx.gamma = inputs
        ctx.save_for_backward(v)

    @staticmethod
    def backward(ctx, dstep, drest):
        (v,) = ctx.saved_tensors
        # At both ends of the step the slope is exactly 0, so values that were clamped to the ends get no gradient.
        over, under = _distances(v, ctx.gamma)
        return (dstep - drest) * (6 / ctx.gamma * over * under), None


def smooth_steps(v: torch.Tensor, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """gossamer.nn.smooth_step of ``v``, and 1 minus it."""
    return _SmoothStep.apply(v, max(gamma, NARROWEST))


def tree_reach(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The share ``(T, k, n)`` that reaches each leaf, from the shares ``(T, k, n − 1)`` going left and right at splits.

    Nodes are numbered as in a heap: the children of i are 2i + 1 and 2i + 2. Leaves are ordered from left to right, so
    leaves of the last level come before those of the level above it.
    """
    level, shallow = torch.ones_like(left[..., :1]), left[..., :0]
    begin, count = 0, left.shape[-1]
    while begin < count:
        inner = min(level.shape[-1], count - begin)
        parents, here = level[..., :inner], slice(begin, begin + inner)
        shallow = level[..., inner:]
        begin += level.shape[-1]
        level = torch.stack([parents * left[..., here], parents * right[..., here]], dim=-1).flatten(-2)
    return torch.cat([level, shallow], dim=-1)


def code_reach(zero: torch.Tensor, one: torch.Tensor, num_experts: int) -> torch.Tensor:
    """The products ``(T, k, n)`` along the experts' codes, from the shares ``(T, k, m)`` of both values of each bit."""
    reach = zero.new_ones(*zero.shape[:-1], 1)
    for bit in range(zero.shape[-1]):
        here = slice(bit, bit + 1)
        reach = torch.stack([reach * zero[..., here], reach * one[..., here]], dim=-1).flatten(-2)
    return reach[..., :num_experts]


def tree_routing_reference(
    args: TreeRouting, arrange: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates ``(T, E)`` and reach ``(T, k, E)`` in plain torch, differentiable, in the dtype of the scores.

    ``arrange`` maps the gates of the parts ``(T, k, E)`` to the experts before they are summed.
    """
    scores, parts, experts, gamma, coded, *_ = args
    if coded:
        bits, mixture = scores.split([scores.shape[1] - parts, parts], dim=1)
        one, zero = smooth_steps(bits.unflatten(1, (parts, bits.shape[1] // parts)), gamma)
        reach = code_reach(zero, one, experts)
        arranged = reach if arrange is None else arrange(reach)
        return (masked_softmax(mixture).unsqueeze(2) * arranged).sum(dim=1), reach
    splits, leaves = scores.unflatten(1, (parts, 2 * experts - 1)).split([experts - 1, experts], dim=2)
    reach = tree_reach(*smooth_steps(splits, gamma))
    leaves = finite_logits(leaves)
    lowest = torch.finfo(leaves.dtype).min
    leaves = leaves.masked_fill((reach == 0) | (leaves == lowest), -torch.inf)
    # exp(a + log(s + 1e-8)) is exp(a)·(s + 1e-8).
    top = leaves.detach().flatten(1).amax(dim=1).clamp(min=lowest).view(-1, 1, 1)
    shares = (leaves - top).exp() * (reach + REACH_EPSILON)
    if arrange is not None:
        shares = arrange(shares)
    total = shares.sum(dim=(1, 2)).clamp(min=torch.finfo(scores.dtype).tiny)
    return shares.sum(dim=1) / total.unsqueeze(1), reach


def reach_sums(reach: torch.Tensor) -> torch.Tensor:
    """``(T, k, 2)`` from ``reach (T, k, E)``: ``−Σ s·log(s + 1e-6)`` and ``Σ s`` of each part."""
    return torch.stack([-(reach * (reach + LOG_EPSILON).log()).sum(dim=2), reach.sum(dim=2)], dim=2)


@functools.cache
def _kernels(backend: str) -> ModuleType:
    if backend == "native":
        from gossamer.cpu_kernels import tree_routing
    else:
        from gossamer.triton_kernels import tree_routing
    return tree_routing


def _forward(args: TreeRouting, backend: str) -> tuple[torch.Tensor | None, ...]:
    if backend == "native":
        results, sound = _kernels(backend).tree_routing(args)
        if args.top_k and not sound:
            check_logits(args.scores, None)
        return results
    if args.top_k:
        check_logits(args.scores, None)
    return _kernels(backend).tree_routing(args)


def _forward_fake(args: TreeRouting) -> tuple[torch.Tensor, ...]:
    scores, parts, experts, _, _, top_k, keep_reach, keep_sums = args
    tokens = scores.shape[0]
    return (
        scores.new_empty(tokens, experts),
        scores.new_empty(tokens, 2),
        scores.new_empty(tokens, top_k, dtype=torch.int64),
        scores.new_empty(tokens, top_k) if 0 < top_k < experts else scores.new_empty(0),
        scores.new_empty(tokens, parts, experts) if keep_reach else scores.new_empty(0),
        scores.new_empty(tokens, parts, 2) if keep_sums else scores.new_empty(0),
    )


_tree_routing = define(
    "tree_routing",
    TreeRouting,
    kernel=_forward,
    fake=_forward_fake,
    returns="(Tensor gates, Tensor norm, Tensor expert_ids, Tensor weights, Tensor reach, Tensor sums)",
)


def _backward(args: TreeRoutingBackward, backend: str) -> torch.Tensor:
    return _kernels(backend).tree_routing_backward(args)


def _backward_fake(args: TreeRoutingBackward) -> torch.Tensor:
    return args.forward.scores.new_empty(args.forward.scores.shape)


_tree_routing_backward = define(
    "tree_routing_backward", TreeRoutingBackward, kernel=_backward, fake=_backward_fake, returns="Tensor"
)


def _save(ctx, args: TreeRouting, output):
    gates, norm, ids, *_ = output
    # Otherwise autograd would allocate zeros as gradients of unused results.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(norm, ids)
    return args, gates, norm, ids


def _differentiate(ctx, args: TreeRouting, tensors, dgates, _, __, dweights, dreach, dsums):
    # Results that were not requested are empty tensors where the dispatcher returned them, as are their gradients.
    kept = True, 0 < args.top_k < args.num_experts, args.keep_reach, args.keep_sums
    flows = [d if there else None for d, there in zip((dgates, dweights, dreach, dsums), kept, strict=True)]
    if all(d is None for d in flows):
        return {}
    if torch.is_grad_enabled():
        # Plain torch serves second derivatives.
        gates, reach = tree_routing_reference(args)
        weights = torch.nn.functional.pad(gates, (0, 1)).gather(1, tensors[2])
        results = gates, weights, reach, reach_sums(reach)
        pairs = [(y, d) for y, d in zip(results, flows, strict=True) if d is not None]
        results, gradients = zip(*pairs, strict=True)
        return {"scores": torch.autograd.grad(results, args.scores, gradients, create_graph=True)[0]}
    return {"scores": _tree_routing_backward(TreeRoutingBackward(*flows, *tensors, args), ctx.backend)}


_tree_routing.differentiate(_save, _differentiate)

# Backends with kernels, and the most experts that they serve.
_FITS = {"native": None, "triton": MOST_EXPERTS}


def tree_routing(args: TreeRouting, arrange: Callable[[torch.Tensor], torch.Tensor] | None = None) -> PartGates:
    """Compute the gates; a kernel also chooses the experts, if there are at most 64 slots or one per expert.

    Kernels serve float32 scores without ``arrange``; Triton's serves up to 1024 experts. The reference neither chooses
    experts nor checks scores.

    Args:
        args: as documented, already checked; scores of any floating dtype.
        arrange: maps the gates of the parts ``(T, k, E)`` to the experts before they are summed.
    """
    scores, experts = args.scores, args.num_experts
    backend = _backend.resolve("tree_routing", scores)
    served = backend in _FITS and scores.dtype == torch.float32 and arrange is None
    if not served or (_FITS[backend] is not None and experts > _FITS[backend]):
        gates, reach = tree_routing_reference(args, arrange)
        return PartGates(gates, reach, reach_sums(reach) if args.keep_sums else None)
    if MOST_CHOSEN < args.top_k < experts:
        args = args._replace(top_k=0)
    args = args._replace(gamma=min(max(args.gamma, NARROWEST), WIDEST))
    gates, _, ids, weights, reach, sums = _tree_routing(args, backend)
    kept = reach if args.keep_reach else None, sums if args.keep_sums else None
    if args.top_k == 0:
        return PartGates(gates, *kept)
    return PartGates(gates, *kept, ids, gates if args.top_k == experts else weights)
