"""The role of a router."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from gossamer.nn.moe.routing import Routing


class Router(nn.Module):
    """What picks the experts of each token: the base of all routers.

    A router is a module with ``forward(x, *, token_ids=None)`` that returns a :class:`Routing`. K, the columns of its
    ``expert_ids``, is an upper bound: a slot without an expert holds an id ``>= num_experts`` and weight 0. Balance
    losses average the ``probabilities`` that the router gives the routing. Expert layers and losses ask for nothing
    else, so :class:`MoE` takes any router. :class:`LinearRouter` is the base of those that rank a linear map's logits.

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
        top_k: K, the most experts of a token.
    """

    num_experts: int
    top_k: int

    def __new__(cls, *args: object, **options: object) -> Router:
        """A module; a :class:`LinearRouter` where the sizes of one are given."""
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

    def forward(self, x: torch.Tensor, *, token_ids: torch.Tensor | None = None) -> Routing:
        """The routing of T tokens.

        Args:
            x: hidden states ``(..., H)``; T is the product of the leading sizes.
            token_ids: ``(T,)`` integers, for routers that go by them.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(x, *, token_ids=None)")


def _warn_moved(what: str) -> None:
    message = f"{what} is deprecated: a router over a linear map's logits derives from gossamer.nn.LinearRouter"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
