"""The expert layer with weights in 8 or 4 bits, for inference: its floor is the bytes of the touched experts' codes."""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
import torch.nn.functional as F

import gossamer
from gossamer.bench.families.experts import DIMENSIONS, SHAPES, SYMBOLS, Problem, make_problem, make_sample, rule
from gossamer.bench.families.experts import sampled_outputs as plain_outputs
from gossamer.bench.families.skew import EXPERT_SKEWS
from gossamer.bench.harness.case import DENSE, DTYPES, OURS, PEER, Case, Family, FloatGate, Request, Variant
from gossamer.bench.harness.cold import as_held, held_copy, in_turn, passes
from gossamer.ops._weights import INT4_GROUPS, MX_GROUP, WHOLE_FORMATS
from gossamer.ops.quantized_expert_weight import FORMATS

# Decoding shapes for GPUs: the sizes of large models, with few tokens.
DECODE = {name: (64, *sizes[1:]) for name, sizes in SHAPES.items() if not name.startswith("cpu-")}
# Decoding shapes of few rows, for which the experts must be read from memory.
STEPS = {f"decode-{rows}": (rows, 1024, 512, 32, 4) for rows in (1, 4, 16)}
QUANTIZED_SHAPES = {"cpu-decode": SHAPES["cpu-decode"], "cpu-small": SHAPES["cpu-small"], **STEPS, **DECODE}
DEFAULTS = {"cpu": (*STEPS, "cpu-decode", "cpu-small"), "cuda": tuple(DECODE)}
QUICK = {"cpu": "cpu-decode", "cuda": "olmoe"}


def _rule(sizes: dict[str, int]) -> str | None:
    if wrong := rule(sizes):
        return wrong
    if sizes["H"] % 32 or sizes["I"] % 32:
        return f"H and I must be multiples of 32, the groups of 4-bit formats, got H={sizes['H']} and I={sizes['I']}"
    return None


def _first_experts(problem: Problem) -> Problem:
    """The same problem, with the experts that have rows before the others."""
    return dataclasses.replace(problem, ids=torch.searchsorted(problem.ids.unique(), problem.ids))


class Steps:
    """Calls of a layer on weights that no cache holds: in turn with other experts, then with copies of the layer.

    Args:
        problem: the problem, with the experts that have rows before the others.
        rows: number of rows.
    """

    def __init__(self, problem: Problem, rows: int) -> None:
        e, used = problem.num_experts, int(problem.ids.max()) + 1
        values = used * (problem.gate_up[0].numel() + problem.down[0].numel())
        # The bytes of the smallest format, so that all variants make equally many calls.
        self.count = 1 if problem.x.is_cuda else passes(values // 2, rows)
        parts = e // used if self.count > 1 else 1
        self._dispatches = [gossamer.dispatch(problem.ids + part * used, e) for part in range(parts)]
        self.touched = used

    def forward(self, layer, weights, copy):
        """A function that calls ``layer(weights, dispatch)`` with each in turn; ``copy`` copies weights."""
        distinct = passes(sum(w.nbytes for w in weights), 1) if self.count > 1 else 1
        made = [weights, *(copy(weights) for _ in range(min(distinct, self.count) - 1))]
        calls = itertools.cycle(itertools.product(made, self._dispatches))
        return in_turn(lambda call: layer(*call), list(itertools.islice(calls, self.count)))


def _clone(weights):
    return tuple(w.clone() if isinstance(w, torch.Tensor) else held_copy(w) for w in weights)


def _variants(problem: Problem, steps: Steps) -> tuple[list[Variant], dict, dict[str, int]]:
    """A variant of each format with its own gate, whose truth uses the weights that the codes stand for."""
    variants, gates, sizes = [], {}, {}

    def layer(weights, dispatch: gossamer.Dispatch) -> torch.Tensor:
        return gossamer.expert_mlp(problem.x, *weights, dispatch, problem.weights)

    sample = None
    kinds = [(name, name, MX_GROUP) for name in FORMATS]
    if steps.count > 1:
        largest = math.gcd(problem.gate_up.shape[2], problem.down.shape[2])
        kinds += [(f"int4 of {size}", "int4", size) for size in INT4_GROUPS[1:] if largest % size == 0]
    for kind, weight_format, size in kinds:
        gate_up, down = (
            as_held(gossamer.QuantizedExpertWeight.quantize(w, weight_format, group_size=size))
            for w in (problem.gate_up, problem.down)
        )
        sizes[kind] = (gate_up.nbytes + down.nbytes) // problem.num_experts

        def gate(gate_up=gate_up, down=down) -> FloatGate:
            def outputs(dtype: torch.dtype, accumulate: torch.dtype) -> dict[str, torch.Tensor]:
                dense = (w.dequantize() for w in (gate_up, down))
                decoded = Problem(problem.x, *dense, problem.ids, problem.weights, None, problem.dy)
                weights = problem.weights.to(torch.promote_types(dtype, problem.weights.dtype))
                return plain_outputs(decoded, sample, "forward", dtype, accumulate, weights)

            return FloatGate(
                outputs(torch.float64, torch.float64), outputs(problem.x.dtype, torch.float32), sample.picks
            )

        role, moved = PEER if variants else OURS, float(steps.count * steps.touched * sizes[kind])
        forward = steps.forward(layer, (gate_up, down), _clone)
        variants.append(Variant(f"gossamer {kind}", role, forward, gate=kind, bytes=moved))
        gates[kind] = gate
        if weight_format in WHOLE_FORMATS:
            rounding = tuple(dataclasses.replace(w, activations="int8") for w in (gate_up, down))
            forward = steps.forward(layer, rounding, _clone)
            name = f"gossamer {kind} with int8 rows"
            note = "activations rounded to 8 bits; not checked, since the truth does not round them"
            variants.append(Variant(name, PEER, forward, gate=None, note=note, bytes=moved))
    sample = make_sample(problem)
    return variants, gates, sizes


def build(request: Request) -> Case:
    """Build each format beside gossamer's layer in the dtype of x, and a dense layer of equal FLOPs."""
    problem = _first_experts(make_problem(request))
    steps = Steps(problem, request.sizes["T"])
    variants, gates, sizes = _variants(problem, steps)
    (t, h), i, k = problem.x.shape, problem.down.shape[2], problem.top_k
    rows, up, out = problem.x.repeat_interleave(k, dim=0), problem.gate_up[0], problem.down[0]

    def dense() -> torch.Tensor:
        gate, linear = F.linear(rows, up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * linear, out)

    def layer(weights, dispatch: gossamer.Dispatch) -> torch.Tensor:
        return gossamer.expert_mlp(problem.x, *weights, dispatch, problem.weights)

    weights = problem.gate_up, problem.down
    whole = steps.forward(layer, weights, _clone)
    size = float(steps.count * steps.touched * sum(w[0].nbytes for w in weights))
    variants.append(Variant("equal-FLOP dense", DENSE, in_turn(lambda _: dense(), range(steps.count)), gate=None))
    variants.append(
        Variant(f"gossamer {request.dtype}", PEER, whole, gate=None, note="the same layer, not quantised", bytes=size)
    )
    first = next(iter(FORMATS))
    moved = 2.0 * problem.x.nbytes + steps.touched * sizes[first] + problem.weights.nbytes
    return Case(
        "quantized_experts",
        request.shape,
        request.sizes,
        request.dtype,
        request.device,
        request.direction,
        tuple(variants),
        {},
        6.0 * t * k * h * i * steps.count,
        moved * steps.count,
        gates,
        make_sample(problem).words,
        f"{request.skew} routing; bytes are those of {first}" + (f"; {steps.count} calls" if steps.count > 1 else ""),
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
