"""Routers: one file a method, and the short names that :class:`gossamer.nn.MoE` knows them by."""

from gossamer.nn.moe.routers.base import Router
from gossamer.nn.moe.routers.expert_choice import ExpertChoiceRouter
from gossamer.nn.moe.routers.linear import SigmoidRouter, SoftmaxRouter, TopKSoftmaxRouter
from gossamer.nn.moe.routers.prototype import PrototypeRouter
from gossamer.nn.moe.routers.threshold import ThresholdRouter
from gossamer.nn.moe.routers.top_p import TopPRouter

# Short name -> class, which MoE makes by its from_top_k(hidden_size, num_experts, top_k, **options).
ROUTERS: dict[str, type[Router]] = {
    "softmax_topk": SoftmaxRouter,
    "topk_softmax": TopKSoftmaxRouter,
    "sigmoid_topk": SigmoidRouter,
    "top_p": TopPRouter,
    "threshold": ThresholdRouter,
    "expert_choice": ExpertChoiceRouter,
    "prototype": PrototypeRouter,
}


def router_class(name: str) -> type[Router]:
    """The router of a short name.

    Raises:
        ValueError: there is none.
    """
    if name not in ROUTERS:
        raise ValueError(f"router must be one of {sorted(ROUTERS)}, a module or None, got {name!r}")
    return ROUTERS[name]
