"""Routers, one file per method, and their short names for :class:`gossamer.nn.MoE`."""

from gossamer.nn.moe.routers.base import Router
from gossamer.nn.moe.routers.broadcast import BroadcastUncertain
from gossamer.nn.moe.routers.cluster import ClusterRouter
from gossamer.nn.moe.routers.domain import DomainRouter
from gossamer.nn.moe.routers.dselect_k import DSelectKRouter
from gossamer.nn.moe.routers.expert_choice import ExpertChoiceRouter
from gossamer.nn.moe.routers.hash import HashRouter
from gossamer.nn.moe.routers.linear import SigmoidRouter, SoftmaxRouter, TopKSoftmaxRouter
from gossamer.nn.moe.routers.permutation import LearnedPermutation
from gossamer.nn.moe.routers.prototype import PrototypeRouter
from gossamer.nn.moe.routers.threshold import ThresholdRouter
from gossamer.nn.moe.routers.token_rounding import TokenRounding
from gossamer.nn.moe.routers.top_p import TopPRouter
from gossamer.nn.moe.routers.tree import TreeRouter

# Short name -> class, which MoE makes by its from_top_k(hidden_size, num_experts, top_k, **options).
ROUTERS: dict[str, type[Router]] = {
    "softmax_topk": SoftmaxRouter,
    "topk_softmax": TopKSoftmaxRouter,
    "sigmoid_topk": SigmoidRouter,
    "top_p": TopPRouter,
    "threshold": ThresholdRouter,
    "expert_choice": ExpertChoiceRouter,
    "prototype": PrototypeRouter,
    "tree": TreeRouter,
    "dselect_k": DSelectKRouter,
    "cluster": ClusterRouter,
    "hash": HashRouter,
    "domain": DomainRouter,
    "token_rounding": TokenRounding,
    "broadcast_uncertain": BroadcastUncertain,
    "learned_permutation": LearnedPermutation,
}


def router_class(name: str) -> type[Router]:
    """The router class with a short name.

    Raises:
        ValueError: the name is unknown.
    """
    if not isinstance(name, str) or name not in ROUTERS:
        raise ValueError(f"router must be one of {sorted(ROUTERS)}, a module or None, got {name!r}")
    return ROUTERS[name]
