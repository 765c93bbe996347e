"""Routings: the experts of each token and their weights, as functions of logits or of given ids."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling

from gossamer._backend import transformed
from gossamer._checks import (
    MAX_SIZE,
    check_flag,
    check_floating,
    check_index,
    check_number,
    check_positive,
    check_same_device,
    check_shape,
    check_sizes,
    check_strided,
    check_tensor,
)
from gossamer.ops.dispatch import Dispatch, dispatch
from gossamer.ops.topk_routing import (
    EPSILON,
    check_logits,
    finite_logits,
    fused_mass,
    fused_topk,
    live_experts,
    masked_softmax,
    select_experts,
)
from gossamer.ops.tree_routing import PartGates, smooth_steps


def check_hidden(x: torch.Tensor, hidden_size: int, parameter: torch.Tensor | None = None) -> None:
    """``x`` must have shape ``(..., H)``, and be on the device of ``parameter`` if one is given."""
    check_tensor("x", x)
    check_strided("x", x)
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.dim() < 1 or x.shape[-1] != hidden_size:
        raise ValueError(f"x must have shape (..., H) with H = {hidden_size}, got {tuple(x.shape)}")
    if parameter is not None and x.device != parameter.device:
        raise ValueError(f"x must be on the device of the parameters, {parameter.device}, got {x.device}")


def check_selection(num_experts: int, top_k: int, n_group: int = 1, topk_group: int = 1, scale: float = 1.0) -> None:
    """Check that ``topk_group`` of ``n_group`` equal groups contain at least K experts, and that ``scale`` is
    finite.
    """
    # float is checked first: isinstance with an abstract class takes a microsecond.
    if not isinstance(scale, (float, numbers.Real)) or isinstance(scale, bool):
        raise TypeError(f"scale must be a number, got {scale!r}")
    # Compared instead of math.isfinite, which does not accept the symbolic numbers of compilers.
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")
    check_positive(num_experts=num_experts, top_k=top_k, n_group=n_group, topk_group=topk_group)
    if top_k > num_experts:
        raise ValueError(f"top_k must be at most num_experts, got top_k={top_k}, num_experts={num_experts}")
    if num_experts % n_group:
        raise ValueError(f"n_group must divide num_experts, got n_group={n_group}, num_experts={num_experts}")
    if topk_group > n_group:
        raise ValueError(f"topk_group must be at most n_group, got topk_group={topk_group}, n_group={n_group}")
    reachable = num_experts // n_group * topk_group
    if top_k > reachable:
        raise ValueError(
            f"top_k must be at most num_experts / n_group * topk_group = {reachable}, the experts of the chosen "
            f"groups, got top_k={top_k}"
        )


def softmax_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """``softmax(logits)`` over the experts; masked experts have 0, also if all experts of a token are masked."""
    check_floating("logits", logits)
    return masked_softmax(logits)


def sigmoid_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """``σ(logits)`` divided by its sum over the experts; masked ones have 0."""
    check_floating("logits", logits)
    scores = finite_logits(logits).sigmoid()
    return scores / (scores.sum(dim=-1, keepdim=True) + EPSILON)


SCORES = {"softmax": softmax_probabilities, "sigmoid": sigmoid_probabilities}


def _check_fits(routing: Routing, dispatch: Dispatch) -> None:
    """A routing's dispatch must have the routing's numbers of tokens, experts, and experts per token."""
    if not isinstance(dispatch, Dispatch):
        raise TypeError(f"dispatch must be a gossamer.Dispatch, got {type(dispatch).__name__}")
    if not type(dispatch.num_tokens) is type(dispatch.top_k) is type(dispatch.num_experts) is int:
        check_sizes(num_tokens=dispatch.num_tokens, top_k=dispatch.top_k, num_experts=dispatch.num_experts)
    (num_tokens, top_k), num_experts = routing.expert_ids.shape, routing.num_experts
    if dispatch.num_tokens != num_tokens or dispatch.top_k != top_k or dispatch.num_experts != num_experts:
        raise ValueError(
            f"dispatch must be of T, K, E = {num_tokens}, {top_k}, {num_experts} as its routing, got "
            f"{dispatch.num_tokens}, {dispatch.top_k}, {dispatch.num_experts}"
        )


def check_probabilities(routing: Routing, probabilities: torch.Tensor) -> None:
    """The probabilities of a routing must be ``(T, E)``, on the device of its ids."""
    check_shape("probabilities", probabilities, (routing.num_tokens, routing.num_experts), "(T, E)")
    check_same_device(expert_ids=routing.expert_ids, probabilities=probabilities)


@dataclass(frozen=True, eq=False, init=False)
class Routing:
    """The experts of T tokens: the result of a router, and the input of expert layers and balance losses.

    Args:
        expert_ids: ``(T, K)`` int64 or int32, where K is the maximum number of experts per token. An id ``>=
            num_experts`` means "no expert".
        weights: ``(T, K)`` routing weights, float32 (float64 for float64 logits); 0 where there is no expert.
        num_experts: E.
        logits: ``(T, E)`` float32 (or float64) as the router computed them, or None.
        score: deprecated; ``"softmax"`` or ``"sigmoid"`` stand for those ``probabilities``.
        dispatch: the assignments sorted by expert, or None until :meth:`dispatched` sorts them.
        probabilities: ``(T, E)`` scores that add up to one over a token's experts, which balance losses average; or a
            function that computes them from the logits, called when a loss needs them. None with logits means their
            softmax.
        max_rows: upper bound on the number of slots that have an expert, which sets the size of expert layers' buffers
            on CUDA and in compiled code; None for T·K. On the CPU buffers have the exact size. See
            :func:`gossamer.dispatch`.
        residual: ``(T,)`` weights of the tokens themselves: :class:`MoE` adds ``residual[t] · x[t]``. None for nothing.
        losses: the router's own loss terms by name, without coefficients, differentiable: ``(T,)``, one value per
            token, or a scalar. :func:`router_losses` averages them.

    Attributes:
        expert_ids: as given, like ``weights``, ``num_experts``, ``logits``, ``dispatch``, ``max_rows``, ``residual``
            and ``losses``.
    """

    expert_ids: torch.Tensor
    weights: torch.Tensor
    num_experts: int
    logits: torch.Tensor | None
    dispatch: Dispatch | None
    max_rows: int | None
    residual: torch.Tensor | None
    losses: Mapping[str, torch.Tensor]
    _probabilities: torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None = field(repr=False)

    def __init__(
        self,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        num_experts: int,
        logits: torch.Tensor | None = None,
        score: str | None = None,
        dispatch: Dispatch | None = None,
        *,
        probabilities: torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None = None,
        max_rows: int | None = None,
        residual: torch.Tensor | None = None,
        losses: Mapping[str, torch.Tensor] | None = None,
        _probabilities: torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        if score is not None:
            if score not in SCORES:
                raise ValueError(f"score must be one of {sorted(SCORES)}, got {score!r}")
            warnings.warn("score is deprecated: give probabilities", DeprecationWarning, stacklevel=2)
            probabilities = SCORES[score]
        if probabilities is None:
            probabilities = _probabilities
        if probabilities is None and logits is not None:
            probabilities = softmax_probabilities
        if not (probabilities is None or callable(probabilities) or isinstance(probabilities, torch.Tensor)):
            raise TypeError(f"probabilities must be a tensor or a function, got {type(probabilities).__name__}")
        if not isinstance(num_experts, (int, torch.SymInt)):
            raise TypeError(f"num_experts must be an int, got {type(num_experts).__name__}")
        if type(num_experts) is int and num_experts > MAX_SIZE:
            raise ValueError(f"num_experts must be at most {MAX_SIZE}, got {num_experts}")
        check_index("expert_ids", expert_ids)
        # One comparison accepts valid arguments; the checks that follow only word the error.
        if not isinstance(weights, torch.Tensor) or len(expert_ids.shape) != 2 or weights.shape != expert_ids.shape:
            check_shape("expert_ids", expert_ids, (None, None), "(T, K)")
            check_shape("weights", weights, tuple(expert_ids.shape), "(T, K)")
        check_floating("weights", weights)
        if not (max_rows is None or isinstance(max_rows, (int, torch.SymInt))):
            raise TypeError(f"max_rows must be an int or None, got {type(max_rows).__name__}")
        object.__setattr__(self, "expert_ids", expert_ids)
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "num_experts", num_experts)
        object.__setattr__(self, "logits", logits)
        object.__setattr__(self, "dispatch", dispatch)
        object.__setattr__(self, "max_rows", max_rows)
        object.__setattr__(self, "residual", residual)
        object.__setattr__(self, "losses", {} if losses is None else losses)
        object.__setattr__(self, "_probabilities", probabilities)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.expert_ids.shape[0]

    @property
    def top_k(self) -> int:
        """K, the maximum number of experts per token."""
        return self.expert_ids.shape[1]

    @property
    def counts(self) -> torch.Tensor:
        """``(E,)`` int32: slots given to each expert. Slots with no expert are not counted; no gradient."""
        return self.dispatched().dispatch.counts

    @property
    def has_probabilities(self) -> bool:
        """Whether the router gave :attr:`probabilities`."""
        return self._probabilities is not None

    @property
    def probabilities(self) -> torch.Tensor:
        """``(T, E)`` differentiable scores that add up to one over a token's experts; balance losses average them.

        The router defines them. If it gave a function of the logits, each access calls it.

        Raises:
            ValueError: this routing has no probabilities, or they are of another shape or device.
        """
        if self._probabilities is None:
            raise ValueError("routing must have logits for probabilities, got a routing by given ids")
        if isinstance(self._probabilities, torch.Tensor):
            found = self._probabilities
        elif self.logits is None:
            raise ValueError("logits must be there for probabilities that are a function of them, got None")
        else:
            found = self._probabilities(self.logits)
        check_probabilities(self, found)
        return found

    @property
    def score(self) -> str:
        """Deprecated: the name of the function that gives :attr:`probabilities`."""
        warnings.warn("score is deprecated: read probabilities", DeprecationWarning, stacklevel=2)
        return next((name for name, known in SCORES.items() if known is self._probabilities), "softmax")

    def with_experts(self, expert_ids: torch.Tensor, weights: torch.Tensor, **changed: object) -> Routing:
        """The same routing with other experts, not yet sorted; ``changed`` replaces other arguments of the class."""
        return self.replaced(expert_ids=expert_ids, weights=weights, dispatch=None, **changed)

    def dispatched(self) -> Routing:
        """The same routing with its ``dispatch``, so that several expert layers over one routing sort it once."""
        if self.dispatch is not None:
            _check_fits(self, self.dispatch)
            return self
        max_rows = self.expert_ids.numel() if self.max_rows is None else self.max_rows
        sorted_slots = dispatch(self.expert_ids, self.num_experts, max_rows=max_rows)
        if is_compiling():
            return self.replaced(dispatch=sorted_slots)
        # Every layer of a model calls this, so the object is copied without checking its arguments again.
        made = object.__new__(Routing)
        made.__dict__.update(self.__dict__, dispatch=sorted_slots)
        return made

    def replaced(self, **changed: object) -> Routing:
        """The same routing with other values for arguments of the class, including ``dispatch``."""
        arguments = {
            "expert_ids": self.expert_ids,
            "weights": self.weights,
            "num_experts": self.num_experts,
            "logits": self.logits,
            "dispatch": self.dispatch,
            "probabilities": self._probabilities,
            "max_rows": self.max_rows,
            "residual": self.residual,
            "losses": self.losses,
        }
        return Routing(**arguments | changed)


def _outside_groups(choice: torch.Tensor, n_group: int, topk_group: int, best: int) -> torch.Tensor:
    """``(T, E)`` bool, true outside the ``topk_group`` groups with the largest sums of their ``best`` highest choices.

    A masked expert (−inf) adds nothing to its group's sum, and a wholly masked group ranks last.
    """
    num_tokens, num_experts = choice.shape
    size = num_experts // n_group
    top = choice.view(num_tokens, n_group, size).topk(min(best, size), dim=-1).values
    rest = top[..., 1:]
    group_scores = top[..., 0] + rest.masked_fill(rest == -math.inf, 0.0).sum(dim=-1)
    chosen = group_scores.topk(topk_group, dim=-1).indices
    outside = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, chosen, False)
    return outside.unsqueeze(-1).expand(num_tokens, n_group, size).reshape(num_tokens, num_experts)


def as_logits(logits: torch.Tensor) -> torch.Tensor:
    """``(..., E)`` of any floating dtype as ``(T, E)`` of at least float32."""
    check_tensor("logits", logits)
    check_strided("logits", logits)
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must have shape (..., E) with E >= 1, got {tuple(logits.shape)}")
    logits = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def token_entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """``(T,)`` entropies ``−Σ_e p·log p`` in nats of ``probabilities (T, E)``; p = 0 adds nothing."""
    # Clamped, because the gradient of p·log p at 0 is infinite, and infinity times the zero after it is NaN.
    logarithms = probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()
    return -(probabilities * logarithms).sum(dim=-1)


def check_share(name: str, value: float) -> None:
    """``value`` must be a number above 0 and at most 1."""
    check_number(name, value, above=0, most=1)


def most_experts(num_experts: int, max_experts: int | None) -> int:
    """The maximum number of experts per token: ``max_experts``, which is checked, or E."""
    check_positive(num_experts=num_experts)
    if max_experts is None:
        return num_experts
    check_positive(max_experts=max_experts)
    if max_experts > num_experts:
        raise ValueError(
            f"max_experts must be at most num_experts, got max_experts={max_experts}, num_experts={num_experts}"
        )
    return max_experts


def check_rows_per_token(rows_per_token: float | None) -> None:
    """A bound on the mean number of experts of a token must be a positive, finite number, or None."""
    check_number("rows_per_token", rows_per_token, above=0, finite=True, optional=True)


def row_bound(routing: Routing, rows_per_token: float | None) -> Routing:
    """The routing with ``max_rows`` for ``rows_per_token`` experts per token on average; unchanged for None."""
    if rows_per_token is None:
        return routing
    return routing.replaced(max_rows=int(rows_per_token * routing.num_tokens) + 1)


def route_where(live: torch.Tensor, weights: torch.Tensor, **arguments: object) -> Routing:
    """The routing with expert e in slot e where ``live (T, E)`` is true, weighted by its column of ``weights (T,
    E)``.
    """
    num_experts = live.shape[1]
    experts = torch.arange(num_experts, device=live.device)
    ids = torch.where(live, experts, num_experts)
    return Routing(ids, torch.where(live, weights, 0.0), num_experts, **arguments)


def route_gates(
    scores: torch.Tensor, gates: torch.Tensor, max_experts: int | None = None, **arguments: object
) -> Routing:
    """The experts with a positive gate in ``gates (T, E)``, or the ``max_experts`` highest of them.

    The gates were computed from ``scores (T, any)``, which must not be NaN on the CPU.
    """
    if max_experts is None or max_experts == gates.shape[1]:
        return route_where(live_experts(scores.detach(), gates.detach()), gates, **arguments)
    num_experts = gates.shape[1]
    ids = select_experts(scores.detach(), gates.detach(), max_experts)
    weights = gates.gather(1, ids)
    absent = weights <= 0
    return Routing(ids.masked_fill(absent, num_experts), weights.masked_fill(absent, 0.0), num_experts, **arguments)


def route_parts(scores: torch.Tensor, parts: PartGates, max_experts: int, **arguments: object) -> Routing:
    """The experts that a kernel has chosen by the gates of parts, or those of :func:`route_gates`."""
    if parts.expert_ids is None:
        return route_gates(scores, parts.gates, max_experts, **arguments)
    return Routing(parts.expert_ids, parts.weights, parts.gates.shape[1], **arguments)


def smooth_step(v: torch.Tensor, gamma: float) -> torch.Tensor:
    """``S(v)``, 0 up to −γ/2, 1 from γ/2 on, between them ``−2v³/γ³ + 3v/(2γ) + 1/2``; its derivative is continuous.

    NaN and −inf give 0, +inf gives 1. The ends are exact, so that a saturated value is saturated in every dtype.

    Args:
        v: floating, of any shape.
        gamma: the width of the rise, positive.

    Raises:
        TypeError: ``v`` is not floating, or ``gamma`` is not a number.
        ValueError: ``gamma`` is not positive and finite.
    """
    check_floating("v", v)
    check_gamma(gamma)
    return smooth_steps(v, gamma)[0]


def check_gamma(gamma: float) -> None:
    """The width of a smooth step must be a positive, finite number."""
    check_number("gamma", gamma, above=0, finite=True)


def dense_weights(routing: Routing) -> torch.Tensor:
    """``(T, E)``: each expert's weight for each token, repeated experts added up, 0 for those not chosen."""
    e = routing.num_experts
    absent = routing.expert_ids >= e
    ids = routing.expert_ids.clamp(max=e - 1).long()
    empty = routing.weights.new_zeros(routing.num_tokens, e)
    return empty.scatter_add(1, ids, routing.weights.masked_fill(absent, 0.0))


def padded(routing: Routing, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(T, num_slots)`` ids and weights of a routing, padded with slots without an expert."""
    missing = num_slots - routing.top_k
    ids = F.pad(routing.expert_ids, (0, missing), value=routing.num_experts)
    return ids.long(), F.pad(routing.weights, (0, missing))


def check_finite_logits(logits: torch.Tensor) -> None:
    """Reject NaN and +inf on the CPU if values can be read, for rules that pass other shapes to the operators."""
    if not is_compiling() and not transformed():
        check_logits(logits.detach(), None)


def softmax_until(
    logits: torch.Tensor, mass: float, *, exceed: bool, num_experts: int, max_experts: int | None = None
) -> Routing:
    """The most probable experts of each token, as many as their probabilities need to add up to ``mass``.

    With ``exceed`` the sum must be greater than ``mass``, else at least ``mass``. Weights are probabilities. Logits
    beyond the first ``num_experts`` belong to null experts: a slot that holds one has no expert. Arguments are checked
    by the callers, softmax_top_p and softmax_threshold.
    """
    logits = as_logits(logits)
    ranks = logits.shape[1] if max_experts is None else max_experts
    if exceed and mass >= 1:
        # Rounded sums may exceed 1, unlike exact ones.
        mass = math.inf
    fused = fused_mass(logits, mass, exceed=exceed, num_experts=num_experts, max_ranks=ranks)
    if fused is not None:
        return Routing(*fused, num_experts, logits[:, :num_experts])
    ids = select_experts(logits, logits, ranks)
    weights = masked_softmax(logits).gather(1, ids)
    with torch.no_grad():
        before = F.pad(weights.cumsum(dim=1)[:, :-1], (1, 0))
        beyond = before > mass if exceed else before >= mass
        absent = beyond | (weights <= 0) | (ids >= num_experts)
        ids = ids.masked_fill(absent, num_experts)
        if logits.shape[1] > num_experts:
            order = absent.int().argsort(dim=1, stable=True)[:, :num_experts]
    weights = weights.masked_fill(absent, 0.0)
    if logits.shape[1] > num_experts:
        ids, weights, logits = ids.gather(1, order), weights.gather(1, order), logits[:, :num_experts]
    return Routing(ids, weights, num_experts, logits)


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

    Among experts with equal scores the kernels take the lower id first. Plain torch, which computes float64 logits and
    cases without a kernel, guarantees no order.

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


def given_experts(expert_ids: torch.Tensor, num_experts: int, weights: torch.Tensor | None = None) -> Routing:
    """A routing decided elsewhere: by a table, a hash, a teacher, or another layer.

    Args:
        expert_ids: ``(T, K)`` int32 or int64; ids ``>= num_experts`` mean "no expert", ids may repeat within a token.
        num_experts: E.
        weights: ``(T, K)`` floating, or None for 1/K each.

    Returns:
        A :class:`Routing` without logits, and therefore without probabilities and balance losses.

    Raises:
        TypeError: ``expert_ids`` does not hold int32 or int64, or ``weights`` is not floating.
        ValueError: shapes or devices differ, or K > E. A negative id is an error on the CPU once it is dispatched.
    """
    check_index("expert_ids", expert_ids)
    check_shape("expert_ids", expert_ids, (None, None), "(T, K)")
    if expert_ids.shape[1] < 1:
        raise ValueError(f"expert_ids must have at least one column, got shape {tuple(expert_ids.shape)}")
    check_selection(num_experts, expert_ids.shape[1])
    if weights is None:
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        weights = torch.full(expert_ids.shape, 1.0 / expert_ids.shape[1], dtype=dtype, device=expert_ids.device)
    check_shape("weights", weights, tuple(expert_ids.shape), "(T, K)")
    if not weights.is_floating_point():
        raise TypeError(f"weights must be floating point, got {weights.dtype}")
    check_same_device(expert_ids=expert_ids, weights=weights)
    return Routing(expert_ids, weights, num_experts)
