"""Other people's expert layers behind one interface."""

from __future__ import annotations

import functools
import importlib

import torch

from gossamer.bench.families.experts import Problem
from gossamer.bench.harness.case import REFERENCE, Outputs, Variant
from gossamer.bench.harness.peers import Peer, Unavailable, attribute, import_module


def _leaves(problem: Problem) -> dict[str, torch.Tensor]:
    pairs = (("dx", "x"), ("dgate_up", "gate_up"), ("ddown", "down"), ("dweights", "weights"))
    return {gradient: problem.leaf(name) for gradient, name in pairs}


def transformers(implementation: str, name: str, role: str, problem: Problem) -> Variant:
    """The experts of transformers, by the implementation of this name."""
    modeling = import_module("transformers.models.qwen3_moe.modeling_qwen3_moe", "transformers")
    experts_type = attribute(modeling, "Qwen3MoeExperts", "transformers")
    e, h, i = problem.down.shape
    config = attribute(modeling, "Qwen3MoeConfig", "transformers")(
        hidden_size=h,
        moe_intermediate_size=i,
        num_experts=e,
        num_experts_per_tok=problem.top_k,
        hidden_act="silu",
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = experts_type(config)
    leaves = _leaves(problem)
    experts.gate_up_proj = torch.nn.Parameter(leaves["dgate_up"])
    experts.down_proj = torch.nn.Parameter(leaves["ddown"])
    leaves |= {"dgate_up": experts.gate_up_proj, "ddown": experts.down_proj}

    def forward() -> torch.Tensor:
        return experts(leaves["dx"], problem.ids, leaves["dweights"])

    return Variant(name, role, forward, leaves, problem.dy, gate="plain")


def sonicmoe(name: str, role: str, problem: Problem) -> Variant:
    """SonicMoE's experts with the routing given (Guo et al., 2025)."""
    package = import_module("sonicmoe", "sonic-moe")
    layer = attribute(package, "moe_general_routing_inputs", "sonic-moe")
    activation = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU
    (t, _), k = problem.x.shape, problem.top_k
    tokens = torch.arange(t, device=problem.x.device, dtype=torch.int32).repeat_interleave(k)
    ids = problem.ids.reshape(-1).int()
    leaves = _leaves(problem) | {"dgate_up": _interleaved(problem)}

    def forward() -> torch.Tensor:
        y, _ = layer(
            leaves["dx"],
            leaves["dweights"].reshape(-1),
            tokens,
            ids,
            leaves["dgate_up"].permute(1, 2, 0),
            None,
            leaves["ddown"].permute(1, 2, 0),
            None,
            problem.num_experts,
            torch.cuda.current_stream().cuda_stream,
            activation,
            not torch.is_grad_enabled(),
        )
        return y

    return Variant(name, role, forward, leaves, problem.dy, _separated, "plain")


def sonicmoe_with_router(name: str, role: str, problem: Problem) -> Variant:
    """SonicMoE's layer as it is published, with its own router in front (Guo et al., 2025)."""
    package = import_module("sonicmoe", "sonic-moe")
    if problem.router is None:
        raise Unavailable("a linear router cannot produce this shape's routing")
    layer = attribute(package, "moe_TC_softmax_topk_layer", "sonic-moe")
    activation = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU
    router = problem.leaf("router")
    leaves = {
        "dx": problem.leaf("x"),
        "dgate_up": _interleaved(problem),
        "ddown": problem.leaf("down"),
        "drouter": router,
    }

    def forward() -> torch.Tensor:
        y, *_ = layer(
            leaves["dx"],
            router,
            leaves["dgate_up"].permute(1, 2, 0),
            None,
            leaves["ddown"].permute(1, 2, 0),
            None,
            problem.top_k,
            torch.cuda.current_stream().cuda_stream,
            activation,
            not torch.is_grad_enabled(),
        )
        return y

    note = "its time includes its router; dx is not checked, since the router's gradient is part of it"
    return Variant(name, role, forward, leaves, problem.dy, _separated, "own router", note)


def _interleaved(problem: Problem) -> torch.Tensor:
    gate, up = problem.gate_up.chunk(2, dim=1)
    return torch.stack([gate, up], dim=2).flatten(1, 2).requires_grad_()


def _separated(outputs: Outputs) -> Outputs:
    if "dgate_up" not in outputs:
        return outputs
    mixed = outputs["dgate_up"]
    return outputs | {"dgate_up": torch.cat([mixed[:, 0::2], mixed[:, 1::2]], dim=1)}


def scattermoe(name: str, role: str, problem: Problem) -> Variant:
    """ScatterMoE's parallel experts (Tan et al., 2024)."""
    package = import_module("scattermoe.parallel_experts", "scattermoe")
    sort = attribute(package, "flatten_sort_count", "scattermoe")
    product = attribute(package, "parallel_linear", "scattermoe")
    leaves = _leaves(problem)

    def forward() -> torch.Tensor:
        order = sort(problem.ids, num_experts=problem.num_experts)
        up_weight, down_weight = leaves["dgate_up"].permute(0, 2, 1), leaves["ddown"].permute(0, 2, 1)
        gate, up = product(leaves["dx"], up_weight, problem.top_k, *order, grouped_out=True).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up
        return product(hidden, down_weight, 1, *order, gates=leaves["dweights"], grouped_in=True)

    return Variant(name, role, forward, leaves, problem.dy, gate="plain")


def liger(name: str, role: str, problem: Problem) -> Variant:
    """Liger's fused mixture of experts."""
    package = import_module("liger_kernel.ops.fused_moe", "liger-kernel")
    function = attribute(package, "LigerFusedMoEFunction", "liger-kernel")
    leaves, ids = _leaves(problem), problem.ids.int()

    def forward() -> torch.Tensor:
        return function.apply(leaves["dx"], leaves["dgate_up"], leaves["ddown"], ids, leaves["dweights"])

    return Variant(name, role, forward, leaves, problem.dy, gate="plain")


def megablocks(name: str, role: str, problem: Problem) -> Variant:
    """MegaBlocks' dropless experts over its grouped product (Gale et al., 2022)."""
    package = import_module("megablocks.layers.dmoe", "megablocks")
    arguments = importlib.import_module("megablocks.layers.arguments").Arguments(
        hidden_size=problem.x.shape[1],
        ffn_hidden_size=problem.down.shape[2],
        bias=False,
        return_bias=False,
        activation_fn=torch.nn.functional.silu,
        moe_num_experts=problem.num_experts,
        moe_top_k=problem.top_k,
        moe_loss_weight=0.0,
        mlp_type="glu",
        mlp_impl="grouped",
        fp16=problem.x.dtype == torch.float16,
        bf16=problem.x.dtype == torch.bfloat16,
        device=problem.x.device,
    )
    experts = attribute(package, "ParallelDroplessMLP", "megablocks")(arguments)
    gate, up = problem.gate_up.chunk(2, dim=1)
    e, h, i = problem.down.shape
    experts.mlp.w1 = torch.nn.Parameter(gate.reshape(e * i, h))
    experts.mlp.v1 = torch.nn.Parameter(up.reshape(e * i, h))
    experts.mlp.w2 = torch.nn.Parameter(problem.down.transpose(1, 2).reshape(e * i, h))
    x, weights = problem.leaf("x"), problem.leaf("weights")
    leaves = {"dx": x, "dgate": experts.mlp.w1, "dup": experts.mlp.v1, "ddown": experts.mlp.w2, "dweights": weights}

    def forward() -> torch.Tensor:
        y, _ = experts.forward_once(x, weights, problem.ids)
        return y.view_as(x)

    def layout(outputs: Outputs) -> Outputs:
        if "ddown" not in outputs:
            return outputs
        dgate, dup, ddown = (outputs[key].view(e, i, h) for key in ("dgate", "dup", "ddown"))
        return outputs | {"dgate_up": torch.cat([dgate, dup], dim=1), "ddown": ddown.transpose(1, 2)}

    return Variant(name, role, forward, leaves, problem.dy, layout, "plain")


_QWEN3 = "transformers.models.qwen3_moe.modeling_qwen3_moe"
PEERS = (
    Peer("transformers eager", _QWEN3, "transformers", functools.partial(transformers, "eager"), REFERENCE),
    Peer("transformers grouped_mm", _QWEN3, "transformers", functools.partial(transformers, "grouped_mm"), REFERENCE),
    Peer("SonicMoE", "sonicmoe", "sonic-moe", sonicmoe, cuda_only=True, half_only=True),
    Peer("SonicMoE + its router", "sonicmoe", "sonic-moe", sonicmoe_with_router, cuda_only=True, half_only=True),
    Peer("ScatterMoE", "scattermoe.parallel_experts", "scattermoe", scattermoe, cuda_only=True),
    Peer("Liger", "liger_kernel.ops.fused_moe", "liger-kernel", liger, cuda_only=True),
    Peer("MegaBlocks", "megablocks.layers.dmoe", "megablocks", megablocks, cuda_only=True, half_only=True),
)
