"""The expert layer with weights in 8 or 4 bits, for inference: its floor is the bytes of the touched experts' codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import gossamer
from gossamer.bench.families.experts import DIMENSIONS, SHAPES, SYMBOLS, Problem, make_problem, make_sample, rule
from gossamer.bench.families.experts import sampled_outputs as plain_outputs
from gossamer.bench.families.skew import EXPERT_SKEWS
from gossamer.bench.harness.case import DENSE, DTYPES, OURS, PEER, Case, Family, FloatGate, Request, Variant
from gossamer.ops.quantized_expert_weight import FORMATS

# Decoding is what quantised weights are for; on a GPU the shapes of large models with few tokens.
DECODE = {name: (64, *sizes[1:]) for name, sizes in SHAPES.items() if not name.startswith("cpu-")}
QUANTIZED_SHAPES = {"cpu-decode": SHAPES["cpu-decode"], "cpu-small": SHAPES["cpu-small"], **DECODE}
DEFAULTS = {"cpu": ("cpu-decode", "cpu-small"), "cuda": tuple(DECODE)}
QUICK = {"cpu": "cpu-decode", "cuda": "olmoe"}


def _rule(sizes: dict[str, int]) -> str | None:
    if wrong := rule(sizes):
        return wrong
    if sizes["H"] % 32 or sizes["I"] % 32:
        return f"H and I must be multiples of 32, the groups of 4-bit formats, got H={sizes['H']} and I={sizes['I']}"
    return None


def _variants(problem: Problem, dispatch: gossamer.Dispatch) -> tuple[list[Variant], dict, dict[str, int]]:
    """A variant of each format with its own gate, whose truth has the weights that its codes stand for."""
    variants, gates, sizes = [], {}, {}
    sample = None
    for weight_format in FORMATS:
        gate_up, down = (
            gossamer.QuantizedExpertWeight.quantize(w, weight_format) for w in (problem.gate_up, problem.down)
        )
        sizes[weight_format] = (gate_up.nbytes + down.nbytes) // problem.num_experts

        def forward(gate_up=gate_up, down=down) -> torch.Tensor:
            return gossamer.expert_mlp(problem.x, gate_up, down, dispatch, problem.weights)

        def gate(gate_up=gate_up, down=down) -> FloatGate:
            def outputs(dtype: torch.dtype, accumulate: torch.dtype) -> dict[str, torch.Tensor]:
                dense = (w.dequantize() for w in (gate_up, down))
                decoded = Problem(problem.x, *dense, problem.ids, problem.weights, None, problem.dy)
                weights = problem.weights.to(torch.promote_types(dtype, problem.weights.dtype))
                return plain_outputs(decoded, sample, "forward", dtype, accumulate, weights)

            return FloatGate(
                outputs(torch.float64, torch.float64), outputs(problem.x.dtype, torch.float32), sample.picks
            )

        role = PEER if variants else OURS
        variants.append(Variant(f"gossamer {weight_format}", role, forward, gate=weight_format))
        gates[weight_format] = gate
    sample = make_sample(problem)
    return variants, gates, sizes


def build(request: Request) -> Case:
    """Each format beside gossamer's layer in the dtype of x, and a dense layer of as many FLOPs."""
    problem = make_problem(request)
    dispatch = gossamer.dispatch(problem.ids, problem.num_experts)
    variants, gates, sizes = _variants(problem, dispatch)
    (t, h), i, k = problem.x.shape, problem.down.shape[2], problem.top_k
    rows, up, out = problem.x.repeat_interleave(k, dim=0), problem.gate_up[0], problem.down[0]

    def dense() -> torch.Tensor:
        gate, linear = F.linear(rows, up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * linear, out)

    def whole() -> torch.Tensor:
        return gossamer.expert_mlp(problem.x, problem.gate_up, problem.down, dispatch, problem.weights)

    variants.append(Variant("equal-FLOP dense", DENSE, dense, gate=None))
    variants.append(Variant(f"gossamer {request.dtype}", PEER, whole, gate=None, note="the same layer, not quantised"))
    touched = int(problem.ids.unique().numel())
    first = next(iter(FORMATS))
    moved = 2.0 * problem.x.nbytes + touched * sizes[first] + problem.weights.nbytes
    return Case(
        "quantized_experts",
        request.shape,
        request.sizes,
        request.dtype,
        request.device,
        request.direction,
        tuple(variants),
        {},
        6.0 * t * k * h * i,
        moved,
        gates,
        make_sample(problem).words,
        f"{request.skew} routing; bytes are those of {first}",
    )


FAMILY = Family(
    "quantized_experts",
    QUANTIZED_SHAPES,
    SYMBOLS,
    DEFAULTS,
    QUICK,
    build,
    dtypes=tuple(DTYPES),
    directions=("forward",),
    skews=EXPERT_SKEWS,
    dimensions=DIMENSIONS,
    # The 4-bit formats need H and I to hold whole groups.
    work=("T",),
    rule=_rule,
)


def bench_quantized_experts(measured):
    """Entry point of pytest-benchmark."""
    measured()
