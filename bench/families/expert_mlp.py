"""The expert layer's operator alone, with assignments already sorted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

import gossamer
from gossamer.bench.families.experts import (
    DEFAULTS,
    DIMENSIONS,
    QUICK,
    SHAPES,
    SYMBOLS,
    WORK,
    costs,
    dense_variant,
    make_gates,
    make_problem,
    make_sample,
    rule,
)
from gossamer.bench.families.skew import EXPERT_SKEWS
from gossamer.bench.harness.case import OURS, Case, Family, Request, Variant
from gossamer.bench.harness.cost import Cost, arguments, nbytes
from gossamer.ops._groups import Groups
from gossamer.ops._weights import Weight
from gossamer.ops.expert_mlp import ExpertMlp, ExpertMlpBackward


def build(request: Request) -> Case:
    """Build :func:`gossamer.expert_mlp` beside a dense layer of equal FLOPs."""
    problem = make_problem(request)
    sample = make_sample(problem)
    dispatch = gossamer.dispatch(problem.ids, problem.num_experts)
    names = {"dx": "x", "dgate_up": "gate_up", "ddown": "down", "dweights": "weights"}
    leaves = {gradient: problem.leaf(name) for gradient, name in names.items()}

    def forward() -> torch.Tensor:
        return gossamer.expert_mlp(leaves["dx"], leaves["dgate_up"], leaves["ddown"], dispatch, leaves["dweights"])

    flops, moved = costs(problem, request.direction)
    return Case(
        "expert_mlp",
        request.shape,
        request.sizes,
        request.dtype,
        request.device,
        request.direction,
        (Variant("gossamer", OURS, forward, leaves, problem.dy), dense_variant(request)),
        {},
        flops,
        moved,
        make_gates(problem, sample, request),
        sample.words,
        f"{request.skew} routing",
    )


class _Sizes:
    """The terms of a call's costs: products in FLOPs, and rows, weights and panels in bytes."""

    def __init__(self, args: ExpertMlp) -> None:
        x, gate_up, down, (slots, rows_of_slots, offsets) = args.x, args.gate_up, args.down, args.groups
        tokens, h = x.shape
        inner, wide = down.shape[2], gate_up.shape[1]
        rows = int(offsets[-1])
        experts = int((offsets.diff() > 0).sum())
        item, wide_item = x.element_size(), max(x.element_size(), 4)
        self.up_flops, self.down_flops = 2.0 * rows * h * wide, 2.0 * rows * h * inner
        self.tokens, self.token_sums = tokens * h * item, tokens * h * wide_item
        self.gate_up, self.down = experts * wide * h * item, experts * h * inner * item
        self.dgate_up, self.ddown = nbytes(gate_up.data), nbytes(down.data)
        # Rows by expert, as stored and as packed by the native kernels.
        self.x_rows, self.preact, self.act = (rows * n * item for n in (h, wide, inner))
        self.x_panel, self.preact_panel, self.act_panel = (rows * n * wide_item for n in (h, wide, inner))
        # A result that accumulates in a wider type is rounded at the end.
        self.rounding = self.token_sums + self.tokens if wide_item > item else 0.0
        self.routing = nbytes(args.weights, slots, rows_of_slots, offsets)
        self.biases = nbytes(gate_up.bias, down.bias)


def matrix_cost(weight: Weight, groups: Groups, label: str = "") -> Cost:
    """One product of every row: its FLOPs, and the bytes of experts in use, including the factors of an update."""
    rows, used = int(groups.offsets[-1]), int((groups.offsets.diff() > 0).sum())
    e, n, c = weight.shape
    rank = 0 if weight.a is None else weight.a.shape[1]
    stored = nbytes(weight.data, weight.scale, weight.a, weight.b)
    return Cost(2.0 * rows * (n * c + rank * (n + c)), used * (stored / e), label=label)


def _cost_of_parts(args: ExpertMlp, result: object) -> Cost:
    """The cost of a layer whose weights are quantised or have updates: its two products are parts."""
    up, down = matrix_cost(args.gate_up, args.groups, "gate_up GEMM"), matrix_cost(args.down, args.groups, "down GEMM")
    moved = nbytes(args.x, *result, args.weights, *args.groups, args.gate_up.bias, args.down.bias)
    return replace(up + down + Cost(0.0, moved), label="", parts={"gate_up": up, "down": down})


def cost(call: Mapping[str, object], result: object) -> Cost:
    """The cost of a forward call: native stages, and Triton kernels, are its parts."""
    args = arguments(ExpertMlp, call)
    if {args.gate_up.kind, args.down.kind} != {"dense"}:
        return _cost_of_parts(args, result)
    s = _Sizes(args)
    saved = s.preact if args.save else 0.0
    stages = {
        "zero": Cost(None, s.token_sums, label="zero y"),
        "pack": Cost(None, s.x_rows + s.x_panel, label="gather and pack x"),
        "gate_up": Cost(s.up_flops, s.gate_up + s.x_panel + s.preact_panel, label="gate_up GEMM"),
        "save": Cost(None, s.preact_panel + saved, label="save pre-activation"),
        "activation": Cost(None, s.preact_panel + s.act_panel, label="GLU"),
        "down": Cost(s.down_flops, s.down + s.act_panel + s.x_panel, label="down GEMM"),
        "combine": Cost(None, 3 * s.x_panel, label="combine into y"),
        "round": Cost(None, s.rounding, label="round y"),
        "wait": Cost(label="wait for other threads"),
    }
    kernels = {
        "_up_kernel": Cost(s.up_flops, s.tokens + s.gate_up + saved + s.act, label="_up_kernel: gate_up GEMM, GLU"),
        "_grouped_matmul_kernel": Cost(
            s.down_flops, s.act + s.down + s.x_rows, label="_grouped_matmul_kernel: down GEMM"
        ),
        "gather_reduce_kernel": Cost(None, s.x_rows + s.tokens, label="gather_reduce_kernel: combine into y"),
    }
    moved = 2 * s.tokens + s.gate_up + s.down + s.routing + s.biases + saved
    return Cost(s.up_flops + s.down_flops, moved, stages | kernels)


def cost_backward(call: Mapping[str, object], result: object) -> Cost:
    """The cost of a backward call, without the gradients that ``needs`` excludes."""
    args = arguments(ExpertMlpBackward, call)
    forward = args.forward
    if {forward.gate_up.kind, forward.down.kind} != {"dense"}:
        # The cost of the updates' products depends on what is frozen.
        weights = matrix_cost(forward.gate_up, forward.groups) + matrix_cost(forward.down, forward.groups)
        read = nbytes(args.dy, forward.x, args.preact, args.s1, args.s2, forward.weights, forward.groups.slots)
        return Cost(None, read + weights.bytes + nbytes(*result))
    s = _Sizes(forward)
    need_x, need_gate_up, need_down, need_weights, need_gate_up_bias = (
        name in args.needs for name in ("x", "gate_up.data", "down.data", "weights", "gate_up.bias")
    )
    through = need_x or need_gate_up or need_gate_up_bias or need_weights
    dact_flops, dx_flops = s.down_flops * through, s.up_flops * need_x
    dgate_up_flops, ddown_flops = s.up_flops * need_gate_up, s.down_flops * need_down
    stages = {
        "zero": Cost(label="zero dX"),
        "pack": Cost(
            None,
            2 * s.x_rows + s.preact + 2 * s.x_panel + s.preact_panel,
            label="gather and pack x, dY, pre-activation",
        ),
        "dact": Cost(dact_flops, s.down + s.x_panel + s.act_panel, label="dA = dY·W2"),
        "activation": Cost(None, 2 * s.preact_panel + 2 * s.act_panel, label="GLU and its gradient"),
        "transpose": Cost(label="transpose A"),
        "dx": Cost(dx_flops, s.gate_up + s.preact_panel + s.x_panel, label="dX = dH·W1"),
        "combine": Cost(None, 3 * s.x_panel, label="combine into dX"),
        "dgate_up": Cost(dgate_up_flops, s.dgate_up + s.preact_panel + s.x_panel, label="dW1 = dHᵀ·X"),
        "ddown": Cost(ddown_flops, s.ddown + s.x_panel + s.act_panel, label="dW2 = dYᵀ·A"),
        "sums": Cost(label="routing-weight and bias gradients"),
        "round": Cost(None, s.rounding, label="round dX"),
        "wait": Cost(label="wait for other threads"),
    }
    up, dx, dgate_up, ddown = (
        s.down * through + s.tokens + 2 * s.preact + s.act,
        s.preact + s.gate_up + s.x_rows,
        (s.tokens + s.preact + s.dgate_up) * need_gate_up,
        (s.tokens + s.act + s.ddown) * need_down,
    )
    kernels = {
        "_down_backward_kernel": Cost(dact_flops, up, label="_down_backward_kernel: dA, GLU gradient"),
        "_grouped_matmul_kernel": Cost(dx_flops, dx, label="_grouped_matmul_kernel: dX"),
        "gather_reduce_kernel": Cost(None, s.x_rows + s.tokens, label="gather_reduce_kernel: combine into dX"),
        "_dweight_kernel": Cost(dgate_up_flops + ddown_flops, dgate_up + ddown, label="_dweight_kernel: dW1, dW2"),
        "_weight_gradient_kernel": Cost(label="_weight_gradient_kernel: dweights"),
    }
    moved = 2 * s.tokens + s.preact + s.routing + s.gate_up * need_x + s.down * through + nbytes(*result)
    return Cost(dact_flops + dx_flops + dgate_up_flops + ddown_flops, moved, stages | kernels)


COSTS = {
    "gossamer::expert_mlp": cost,
    "gossamer::expert_mlp_backward": cost_backward,
    "gossamer::expert_mlp_backward_": cost_backward,
}
FAMILY = Family(
    "expert_mlp",
    SHAPES,
    SYMBOLS,
    DEFAULTS,
    QUICK,
    build,
    skews=EXPERT_SKEWS,
    dimensions=DIMENSIONS,
    work=WORK,
    rule=rule,
)


def bench_expert_mlp(measured):
    """Entry point of pytest-benchmark."""
    measured()
