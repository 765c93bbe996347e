"""The contract suites over the routers and expert layers that are here."""

import torch
from contracts import ExpertsContract, RouterContract

import gossamer
from gossamer.nn import Experts, HashRouter, LoRAExperts, SigmoidRouter, SoftmaxRouter, TopKSoftmaxRouter


def router(kind, **options):
    return lambda num_experts, hidden_size, **factory: kind(
        hidden_size, num_experts, min(2, num_experts), **options, **factory
    )


def hash_router(num_experts, hidden_size, device, dtype):
    return HashRouter(torch.arange(20) % num_experts, num_experts).to(device)


TestRouters = RouterContract.over(
    {
        "softmax": router(SoftmaxRouter),
        "softmax renormalised": router(SoftmaxRouter, renormalize=True, scale=2.5),
        "softmax in the dtype of x": router(SoftmaxRouter, upcast=False),
        "top-k softmax": router(TopKSoftmaxRouter, bias=True),
        "sigmoid": router(SigmoidRouter),
        "hash": hash_router,
    }
)


def experts(**options):
    return lambda num_experts, hidden_size, **factory: Experts(num_experts, hidden_size, 16, **options, **factory)


def lora(**options):
    def make(num_experts, hidden_size, **factory):
        layer = LoRAExperts(num_experts, hidden_size, 16, 2, **options, **factory)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if name.endswith("lora_B"):
                    parameter.uniform_(-0.1, 0.1)
        return layer

    return make


def quantised(num_experts, hidden_size, **factory):
    layer = Experts(num_experts, hidden_size, 16, bias=True, **factory)
    gossamer.quantize_experts(layer, "int8")
    return layer


TestExperts = ExpertsContract.over(
    {
        "grouped": experts(),
        "biases": experts(bias=True, transposed=True),
        "ungated": experts(activation="gelu"),
        "block-sparse": experts(form="block_sparse"),
        "low-rank": lora(),
        "quantised": quantised,
    }
)
# The norm that divides the magnitudes is a constant to the factors, as DoRA has it.
TestDoRA = ExpertsContract.over(dora=lora(dora=True), detached=("lora_A", "lora_B"))
