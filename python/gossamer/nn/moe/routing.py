"""Routings: the experts of each token and their weights, the result of a router and the input of an expert layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling

from gossamer._backend import transformed
from gossamer._checks import (
    MAX_SIZE,
    check_floating,
    check_index,
    check_no_negative,
    check_number,
    check_positive,
    check_same_device,
    check_shape,
    check_sizes,
)
from gossamer.ops.dispatch import Dispatch, check_dispatch, dispatch
from gossamer.ops.topk_routing import EPSILON, check_logits, finite_logits, fused_mass, masked_softmax, select_experts


def check_hidden(x: torch.Tensor, hidden_size: int, parameter: torch.Tensor | None = None) -> None:
    """``x`` must have shape ``(..., H)``, and be on the device of ``parameter`` if one is given."""
    check_floating("x", x)
    if x.dim() < 1 or x.shape[-1] != hidden_size:
        raise ValueError(f"x must have shape (..., H) with H = {hidden_size}, got {tuple(x.shape)}")
    if parameter is not None and x.device != parameter.device:
        raise ValueError(f"x must be on the device of the parameters, {parameter.device}, got {x.device}")


def check_selection(num_experts: int, top_k: int, n_group: int = 1, topk_group: int = 1, scale: float = 1.0) -> None:
    """Check that ``topk_group`` of ``n_group`` equal groups contain at least K experts, and that ``scale`` is
    finite.
    """
    check_number("scale", scale, finite=True)
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
        if weights.device != expert_ids.device:
            check_same_device(expert_ids=expert_ids, weights=weights)
        if not (max_rows is None or isinstance(max_rows, (int, torch.SymInt))):
            raise TypeError(f"max_rows must be an int or None, got {type(max_rows).__name__}")
        if not (losses is None or isinstance(losses, (dict, Mapping))):
            raise TypeError(f"losses must be a mapping of names to tensors, got {type(losses).__name__}")
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
        made = self.dispatched().dispatch
        check_dispatch(made)
        return made.counts

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
            raise ValueError("logits must be given where probabilities are a function of them, got None")
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


def as_logits(logits: torch.Tensor) -> torch.Tensor:
    """``(..., E)`` of any floating dtype as ``(T, E)`` of at least float32."""
    check_floating("logits", logits)
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


def dense_weights(routing: Routing) -> torch.Tensor:
    """``(T, E)``: each expert's weight for each token, repeated experts added up, 0 for those not chosen."""
    e = routing.num_experts
    if not torch.compiler.is_compiling():
        check_no_negative("routing.expert_ids", routing.expert_ids)
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
    """The most probable experts of each token, until their probabilities add up to ``mass``.

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
    check_same_device(expert_ids=expert_ids, weights=weights)
    return Routing(expert_ids, weights, num_experts)
