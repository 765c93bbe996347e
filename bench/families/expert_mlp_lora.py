"""Frozen experts with low-rank updates: the expert layer's operator, with assignments already sorted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import gossamer
from gossamer.bench.families.experts import Problem, make_problem
from gossamer.bench.families.experts import rule as expert_rule
from gossamer.bench.families.skew import EXPERT_SKEWS
from gossamer.bench.harness.case import (
    DENSE,
    DTYPES,
    OURS,
    REFERENCE,
    Case,
    Family,
    FloatGate,
    Outputs,
    Request,
    Variant,
)
from gossamer.bench.harness.cost import nbytes
from gossamer.bench.harness.peers import Peer, attribute, gather, import_module
from gossamer.nn.moe.experts.lora import expert_factors, flat_expert_factors
from gossamer.ops.expert_mlp import expert_mlp_reference

SHAPES = {
    "olmoe": (4096, 2048, 1024, 64, 8, 16),
    "olmoe-decode": (64, 2048, 1024, 64, 8, 16),
    "cpu-small": (1024, 1024, 512, 32, 4, 16),
    "cpu-decode": (16, 1024, 512, 64, 8, 16),
}
SYMBOLS = ("T", "H", "I", "E", "K", "r")
DIMENSIONS = {"tokens": "T", "hidden": "H", "intermediate": "I", "experts": "E", "top-k": "K", "rank": "r"}
DEFAULTS = {"cpu": ("cpu-small", "cpu-decode"), "cuda": ("olmoe", "olmoe-decode")}
QUICK = {"cpu": "cpu-small", "cuda": "olmoe"}
SCALE = 2.0
FACTORS = ("a1", "b1", "a2", "b2")


@dataclass(frozen=True)
class LowRankProblem:
    """An expert layer's inputs, and the factors of its two updates by name."""

    experts: Problem
    factors: Mapping[str, torch.Tensor]
    dispatch: gossamer.Dispatch

    def leaves(self) -> dict[str, torch.Tensor]:
        """Views for which a variant takes its own gradients: rows, routing weights and factors."""
        found = {"dx": self.experts.leaf("x"), "dweights": self.experts.leaf("weights")}
        return found | {f"d{name}": factor.detach().requires_grad_() for name, factor in self.factors.items()}


def _factors(request: Request) -> dict[str, torch.Tensor]:
    _, h, i, e, _, r = (request.sizes[s] for s in SYMBOLS)
    generator = torch.Generator(request.device).manual_seed(request.seed + 1)
    shapes = {"a1": (e, r, h), "b1": (e, 2 * i, r), "a2": (e, r, i), "b2": (e, h, r)}
    scales = {"a1": h**-0.5, "b1": r**-0.5 / SCALE, "a2": i**-0.5, "b2": r**-0.5 / SCALE}
    return {
        name: (torch.randn(shape, generator=generator, device=request.device) * scales[name]).to(DTYPES[request.dtype])
        for name, shape in shapes.items()
    }


def _lora(leaves: Mapping[str, torch.Tensor]) -> dict[str, object]:
    a1, b1, a2, b2 = (leaves[f"d{name}"] for name in FACTORS)
    return {"gate_up_lora": (a1, b1), "down_lora": (a2, b2), "lora_scale": SCALE}


def _outputs(problem: LowRankProblem, both: bool, dtype: torch.dtype) -> Outputs:
    """Results by plain torch in ``dtype``, one expert after the other; tokens' sums are in float32 or wider."""
    leaves = {name: leaf.detach().to(dtype).requires_grad_(both) for name, leaf in problem.leaves().items()}
    gate_up, down = (getattr(problem.experts, name).detach().to(dtype) for name in ("gate_up", "down"))
    y = expert_mlp_reference(leaves["dx"], gate_up, down, problem.dispatch, leaves["dweights"], **_lora(leaves))
    if not both:
        return {"y": y}
    grads = torch.autograd.grad(y, list(leaves.values()), problem.experts.dy.to(dtype))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def unfused(name: str, role: str, problem: LowRankProblem) -> Variant:
    """The same layer as six separate products by :func:`gossamer.grouped_matmul`."""
    leaves, dispatch = problem.leaves(), problem.dispatch

    def product(rows: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **form) -> torch.Tensor:
        y = gossamer.grouped_matmul(rows, weight, dispatch, y_grouped=True, **form)
        s = gossamer.grouped_matmul(rows, a, dispatch, y_grouped=True, **form)
        return torch.add(y, gossamer.grouped_matmul(s, b, dispatch, x_grouped=True, y_grouped=True), alpha=SCALE)

    def forward() -> torch.Tensor:
        x, weights, a1, b1, a2, b2 = leaves.values()
        gate, up = product(x, problem.experts.gate_up, a1, b1).chunk(2, dim=1)
        out = product(F.silu(gate) * up, problem.experts.down, a2, b2, x_grouped=True)
        return gossamer.gather_reduce(out, dispatch.rows.view(weights.shape), weights=weights)

    return Variant(name, role, forward, leaves, problem.experts.dy)


def peft(name: str, role: str, problem: LowRankProblem) -> Variant:
    """PEFT's ``target_parameters`` over the experts of transformers (Mangrulkar et al.)."""
    package, experts = import_module("peft", "peft"), problem.experts
    modeling = import_module("transformers.models.qwen3_moe.modeling_qwen3_moe", "transformers")
    e, h, i = experts.down.shape
    config = attribute(modeling, "Qwen3MoeConfig", "transformers")(
        hidden_size=h, moe_intermediate_size=i, num_experts=e, num_experts_per_tok=experts.top_k, hidden_act="silu"
    )
    config._experts_implementation = "grouped_mm" if h % 8 == 0 and i % 8 == 0 else "eager"
    with torch.device("meta"):
        layer = attribute(modeling, "Qwen3MoeExperts", "transformers")(config)
    layer.gate_up_proj = torch.nn.Parameter(experts.gate_up, requires_grad=False)
    layer.down_proj = torch.nn.Parameter(experts.down, requires_grad=False)
    rank, targets = problem.factors["a1"].shape[1], ("gate_up_proj", "down_proj")
    options = package.LoraConfig(
        r=rank,
        lora_alpha=SCALE * rank,
        target_modules=[],
        target_parameters=[f"0.{target}" for target in targets],
    )
    model = package.get_peft_model(torch.nn.Sequential(layer), options)
    leaves = {key: leaf for key, leaf in problem.leaves().items() if key in ("dx", "dweights")}
    parameters = {}
    for module in model.modules():
        if getattr(module, "parameter_name", None) in targets:
            which = 1 + targets.index(module.parameter_name)
            flat = flat_expert_factors(problem.factors[f"a{which}"], problem.factors[f"b{which}"])
            for letter, factors, value in zip("ab", (module.lora_A, module.lora_B), flat, strict=True):
                factors["default"].weight = torch.nn.Parameter(value.contiguous())
                parameters[f"d{letter}{which}"] = factors["default"].weight
    leaves |= {f"d{key}": parameters[f"d{key}"] for key in FACTORS}
    wrapped = model.base_model.model[0]

    def layout(outputs: Outputs) -> Outputs:
        if "dx" not in outputs:
            return outputs
        unflat = {}
        for which in (1, 2):
            pair = expert_factors(outputs[f"da{which}"], outputs[f"db{which}"], e)
            unflat |= {f"da{which}": pair[0], f"db{which}": pair[1]}
        return outputs | unflat

    def forward() -> torch.Tensor:
        return wrapped(leaves["dx"], experts.ids, leaves["dweights"])

    return Variant(name, role, forward, leaves, experts.dy, layout, "merged")


PEERS = (
    Peer("separate products", None, "gossamer", unfused, REFERENCE),
    Peer("PEFT target_parameters", "peft", "peft", peft),
)


def _merged(problem: LowRankProblem, both: bool, dtype: torch.dtype) -> Outputs:
    """The results by plain torch in ``dtype``, with ``W + scale·B·A`` formed and rounded to it, as in PEFT."""
    leaves = {name: leaf.detach().to(dtype).requires_grad_(both) for name, leaf in problem.leaves().items()}
    x, weights, a1, b1, a2, b2 = leaves.values()
    gate_up = problem.experts.gate_up.detach().to(dtype) + SCALE * (b1 @ a1)
    down = problem.experts.down.detach().to(dtype) + SCALE * (b2 @ a2)
    y = expert_mlp_reference(x, gate_up, down, problem.dispatch, weights)
    if not both:
        return {"y": y}
    grads = torch.autograd.grad(y, list(leaves.values()), problem.experts.dy.to(dtype))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def build(request: Request) -> Case:
    """Build :func:`gossamer.expert_mlp` with low-rank updates of frozen experts, beside the layer without them."""
    experts, both = make_problem(request), request.direction == "both"
    t, h, i, e, k, r = (request.sizes[s] for s in SYMBOLS)
    problem = LowRankProblem(experts, _factors(request), gossamer.dispatch(experts.ids, e))
    leaves = problem.leaves()
    plain = {key: leaf for key, leaf in problem.leaves().items() if key in ("dx", "dweights")}

    def layer(given: Mapping[str, torch.Tensor], **lora) -> torch.Tensor:
        weights = given["dweights"]
        return gossamer.expert_mlp(given["dx"], experts.gate_up, experts.down, problem.dispatch, weights, **lora)

    variants = [
        Variant("gossamer", OURS, lambda: layer(leaves, **_lora(leaves)), leaves, experts.dy),
        Variant("without updates", DENSE, lambda: layer(plain), plain, experts.dy, gate=None),
    ]
    peers, skipped = gather(PEERS, request, problem)
    dtype, used = DTYPES[request.dtype], int(experts.ids.unique().numel())
    product, update = 6.0 * t * k * h * i, 2.0 * t * k * r * (2 * h + 3 * i)
    moved = nbytes(experts.x, experts.dy, experts.weights, experts.ids)
    moved += used * (3 * h * i + r * (2 * h + 3 * i)) * experts.x.element_size()
    if both:
        product, update = 2 * product, 3 * update
        moved += nbytes(experts.x, experts.dy, experts.weights, *problem.factors.values())
    return Case(
        "expert_mlp_lora",
        request.shape,
        request.sizes,
        request.dtype,
        request.device,
        request.direction,
        (*variants, *peers),
        skipped,
        product + update,
        moved,
        {
            "truth": lambda: FloatGate(_outputs(problem, both, torch.float64), _outputs(problem, both, dtype)),
            "merged": lambda: FloatGate(_outputs(problem, both, torch.float64), _merged(problem, both, dtype)),
        },
        "every output, whole",
        f"{request.skew} routing",
    )


def rule(sizes: Mapping[str, int]) -> str | None:
    """The reason why a shape is invalid, or None."""
    if sizes["r"] > min(sizes["H"], sizes["I"]):
        return f"r must be at most H and I, got r={sizes['r']}, H={sizes['H']}, I={sizes['I']}"
    return expert_rule(sizes)


FAMILY = Family(
    "expert_mlp_lora",
    SHAPES,
    SYMBOLS,
    DEFAULTS,
    QUICK,
    build,
    skews=EXPERT_SKEWS,
    dimensions=DIMENSIONS,
    work=("T",),
    peers=PEERS,
    rule=rule,
)


def bench_expert_mlp_lora(measured):
    """Entry point of pytest-benchmark."""
    measured()
