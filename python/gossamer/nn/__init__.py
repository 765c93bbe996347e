"""Layers over the primitives."""

from gossamer.nn.losses import load_balance_loss, router_z_loss, sequence_balance_loss, update_expert_bias
from gossamer.nn.moe import Experts, MoE, SharedExpert
from gossamer.nn.routers import HashRouter, Router, SigmoidRouter, SoftmaxRouter, TopKSoftmaxRouter
from gossamer.nn.routing import Routing, given_experts, sigmoid_topk, softmax_topk, topk_softmax

__all__ = [
    "Experts",
    "HashRouter",
    "MoE",
    "Router",
    "Routing",
    "SharedExpert",
    "SigmoidRouter",
    "SoftmaxRouter",
    "TopKSoftmaxRouter",
    "given_experts",
    "load_balance_loss",
    "router_z_loss",
    "sequence_balance_loss",
    "sigmoid_topk",
    "softmax_topk",
    "topk_softmax",
    "update_expert_bias",
]
