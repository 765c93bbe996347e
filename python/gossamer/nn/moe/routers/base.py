"""The role of a router."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from gossamer.nn.moe.routing import Routing


class Router(nn.Module):
    """A rule that chooses the experts of each token: the base of all routers.

    A router is a module with ``forward(x, *, token_ids=None)`` that returns a :class:`Routing`. K, the columns of its
    ``expert_ids``, is an upper bound: a slot without an expert holds an id ``>= num_experts`` and weight 0. Balance
    losses average the ``probabilities`` that the router gives the routing. Expert layers and losses need nothing else,
    so :class:`MoE` takes any router. :class:`LinearRouter` is the base of routers that rank the logits of a linear map.

    >>> class Nearest(gossamer.nn.Router):
    ...     def __init__(self, centres):
    ...         super().__init__()
    ...         self.num_experts, self.top_k = centres.shape[0], 1
    ...         self.centres = torch.nn.Parameter(centres)
    ...
    ...     def forward(self, x, *, token_ids=None):
    ...         return gossamer.nn.softmax_topk(-torch.cdist(x, self.centres), 1)

    Attributes:
        num_experts: E.
        top_k: K, the maximum number of experts per token.
    """

    num_experts: int
    top_k: int
    # Buffers that keep their dtype when the module is cast: small steps round away in narrower ones.
    _wide_buffers: tuple[str, ...] = ()

    def __new__(cls, *args: object, **options: object) -> Router:
        """A module; a :class:`LinearRouter` if the sizes of one are given."""
        if cls is Router and (args or options):
            from gossamer.nn.moe.routers.linear import LinearRouter

            _warn_moved("Router(...)")
            return super().__new__(LinearRouter)
        return super().__new__(cls)

    def __init_subclass__(cls, **options: object) -> None:
        """Classes that define ``route(logits)`` and no ``forward`` derive from :class:`LinearRouter` (deprecated)."""
        super().__init_subclass__(**options)
        if Router in cls.__bases__ and "route" in vars(cls) and "forward" not in vars(cls):
            from gossamer.nn.moe.routers.linear import LinearRouter

            _warn_moved(f"{cls.__name__}(Router) with route(logits)")
            cls.__bases__ = tuple(LinearRouter if base is Router else base for base in cls.__bases__)

    def _apply(self, fn, recurse=True):
        before = {name: getattr(self, name) for name in self._wide_buffers}
        super()._apply(fn, recurse)
        for name, old in before.items():
            moved = getattr(self, name)
            if moved.dtype != old.dtype:
                setattr(self, name, old.to(moved.device))
        return self

    @classmethod
    def from_top_k(cls, hidden_size: int, num_experts: int, top_k: int | None = None, **options: object) -> Router:
        """The router that :class:`MoE` creates by name: with K experts per token, or as the class defines.

        Args:
            hidden_size: H.
            num_experts: E.
            top_k: K; None if the class does not need it.
            **options: options of the class, and ``device`` and ``dtype``.
        """
        return cls(hidden_size, num_experts, top_k, **options)

    def step(self) -> None:
        """Advance state that follows training steps, such as a schedule; :func:`step_routers` calls it. Does nothing
        here.

        It is separate from ``forward``, which may run several times per step: in evaluation, for micro-batches, or when
        activations are recomputed.
        """

    def forward(self, x: torch.Tensor, *, token_ids: torch.Tensor | None = None) -> Routing:
        """The routing of T tokens.

        Args:
            x: hidden states ``(..., H)``; T is the product of the leading sizes. For routers that look at sequences,
                the last leading dimension is the position.
            token_ids: ``(T,)`` integers, for routers that use them.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(x, *, token_ids=None)")


class RouterAround(Router):
    """The base of routers that change the routing of another router.

    Args:
        router: the other router.

    Raises:
        TypeError: ``router`` is not a Router.
    """

    def __init__(self, router: Router) -> None:
        super().__init__()
        if not isinstance(router, Router):
            raise TypeError(f"router must be a gossamer.nn.Router, got {type(router).__name__}")
        self.router = router
        self.num_experts = router.num_experts
        self.top_k = router.top_k

    @classmethod
    def from_top_k(cls, hidden_size: int, num_experts: int, top_k: int | None = None, **options: object) -> Router:
        """Wrap the router named ``router``, by default ``"softmax_topk"``, made with K and ``router_options``."""
        return cls(cls.inner(hidden_size, num_experts, top_k, options), **options)

    @staticmethod
    def inner(hidden_size: int, num_experts: int, top_k: int | None, options: dict[str, object]) -> Router:
        """The router to wrap, from the arguments of :meth:`from_top_k`; its options are removed from ``options``."""
        from gossamer.nn.moe.routers import router_class

        factory = {name: options.pop(name, None) for name in ("device", "dtype")}
        kind = router_class(options.pop("router", "softmax_topk"))
        return kind.from_top_k(hidden_size, num_experts, top_k, **options.pop("router_options", {}), **factory)


class StepCount:
    """Counts training steps for routers that depend on them: a saved buffer, and its value on the host."""

    def count_steps(self, device: torch.device | str | None) -> None:
        """Start at 0; called by the constructor."""
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self.num_steps = 0

    def step(self) -> None:
        """Count a step."""
        self.num_steps += 1
        self.steps.fill_(self.num_steps)

    def _load_from_state_dict(self, *arguments: object) -> None:
        super()._load_from_state_dict(*arguments)
        if self.steps.device.type != "meta":
            self.num_steps = int(self.steps)


def step_routers(module: nn.Module) -> None:
    """Call :meth:`Router.step` of every router in ``module``; do this after each optimizer step."""
    for child in module.modules():
        if isinstance(child, Router):
            child.step()


def _warn_moved(what: str) -> None:
    message = f"{what} is deprecated: a router over a linear map's logits derives from gossamer.nn.LinearRouter"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
