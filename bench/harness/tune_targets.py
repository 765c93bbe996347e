"""The launches that ``gossamer tune`` searches tiles for: products of an expert layer, with their float64 truth."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import gossamer
from gossamer.bench.families.experts import WHOLE, make_problem
from gossamer.bench.harness.case import DTYPES, FloatGate, Outputs, Request
from gossamer.ops._weights import Weight
from gossamer.ops.expert_mlp import ExpertMlp, ExpertMlpBackward
from gossamer.triton_kernels import expert_mlp, expert_mlp_backward, grouped_matmul, grouped_matmul_dweight
from gossamer.triton_kernels.common import dot_precision
from gossamer.triton_kernels.tiles import Problem, Tile

# The weights of at most this many experts, evenly spread, are checked.
SAMPLE_EXPERTS = 4
SWIGLU = gossamer.Activation("swiglu")

AOT_CASES: dict[str, Callable[[int, Problem, Tile, str], tuple]] = {
    "grouped_matmul": grouped_matmul.aot_case,
    "expert_mlp_up": expert_mlp.aot_case,
    "expert_mlp_down_backward": expert_mlp_backward.aot_case,
    "grouped_matmul_dweight": grouped_matmul_dweight.aot_case,
}


@dataclass(frozen=True)
class Target:
    """One launch to find a tile for.

    Attributes:
        name: its role in the layer.
        problem: the sizes and dtypes by which the tile is chosen.
        launch: runs it with a tile and returns its outputs by name.
        gate: makes the gate that judges these outputs by the error rule of :mod:`gossamer.testing`.
    """

    name: str
    problem: Problem
    launch: Callable[[Tile], Outputs]
    gate: Callable[[], FloatGate]


@dataclass(frozen=True)
class _Layer:
    """Inputs of the launches. A name that ends in ``_rows`` means that rows are in expert order."""

    x: torch.Tensor
    dy: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    weights: torch.Tensor
    dispatch: gossamer.Dispatch
    preact_rows: torch.Tensor
    act_rows: torch.Tensor

    @property
    def forward(self) -> ExpertMlp:
        """The layer's arguments."""
        gate_up, down = Weight(self.gate_up), Weight(self.down)
        return ExpertMlp(self.x, gate_up, down, self.dispatch.groups, self.weights, SWIGLU, False, True)

    @functools.cached_property
    def starts(self) -> list[int]:
        """First row of each expert, and the end of the last."""
        return self.dispatch.offsets.tolist()

    @functools.cached_property
    def checked(self) -> list[int]:
        """The experts whose rows and weights are checked."""
        e = self.gate_up.shape[0]
        if self.dispatch.slots.shape[0] * self.gate_up[0].numel() <= WHOLE or e <= SAMPLE_EXPERTS:
            return list(range(e))
        return torch.linspace(0, e - 1, SAMPLE_EXPERTS).round().long().tolist()

    def rows(self, expert: int) -> slice:
        """The rows of an expert."""
        return slice(self.starts[expert], self.starts[expert + 1])

    def tokens(self, expert: int) -> torch.Tensor:
        """The token of each row of an expert."""
        return self.dispatch.slots[self.rows(expert)].long() // self.dispatch.top_k

    def pick_rows(self, value: torch.Tensor) -> torch.Tensor:
        """The checked experts' rows of ``value``."""
        return torch.cat([value[self.rows(e)] for e in self.checked])


def _make_layer(request: Request) -> _Layer:
    made = make_problem(request)
    dispatch = gossamer.dispatch(made.ids, made.num_experts)
    i = made.down.shape[2]
    generator = torch.Generator(request.device).manual_seed(2)
    shape = (made.ids.numel(), 2 * i)
    preact = torch.randn(shape, generator=generator, device=request.device).to(made.x.dtype)
    weights = made.weights.contiguous()
    return _Layer(made.x, made.dy, made.gate_up, made.down, weights, dispatch, preact, preact[:, :i].contiguous())


def _gate(layer: _Layer, expected: Callable[[int, torch.dtype], Outputs], by_expert: tuple[str, ...] = ()) -> FloatGate:
    """Make a gate. ``expected`` computes one expert's rows, or its weights for names in ``by_expert``, in a dtype."""

    def outputs(dtype: torch.dtype) -> Outputs:
        parts = [expected(e, dtype) for e in layer.checked]
        return {name: (torch.stack if name in by_expert else torch.cat)([p[name] for p in parts]) for name in parts[0]}

    truth = outputs(torch.float64)
    picks = {name: (lambda v: v[layer.checked]) if name in by_expert else layer.pick_rows for name in truth}
    return FloatGate(truth, outputs(layer.x.dtype), picks)


def _problem(layer: _Layer, kernel: str, form: str, n: int, c: int) -> Problem:
    name = {dtype: name for name, dtype in DTYPES.items()}[layer.x.dtype]
    if dot_precision(layer.x.dtype) == "tf32":
        name = "tf32"
    e = layer.gate_up.shape[0]
    return Problem(kernel, form, name, layer.dispatch.slots.shape[0] / e, e, n, c)


def _product(layer: _Layer, name: str, x: torch.Tensor, weight: torch.Tensor, gathered: bool) -> Target:
    def launch(tile: Tile) -> Outputs:
        x_div = layer.dispatch.top_k if gathered else 0
        return {
            "y": grouped_matmul.rows_times_weight(x, weight, None, layer.dispatch.groups, x_div, False, False, tile)
        }

    def expected(e: int, dtype: torch.dtype) -> Outputs:
        rows = x[layer.tokens(e)] if gathered else x[layer.rows(e)]
        return {"y": rows.to(dtype) @ weight[e].to(dtype).T}

    problem = _problem(layer, "grouped_matmul", "gathered" if gathered else "sorted", *weight.shape[1:])
    return Target(name, problem, launch, lambda: _gate(layer, expected))


def _weight_gradient(layer: _Layer, name: str, x: torch.Tensor, dy: torch.Tensor, x_gathered: bool) -> Target:
    """``Σ dy[r]ᵀ x[r]`` of each expert; one of the two is in token order, and its rows are gathered."""
    x_div, dy_div = (layer.dispatch.top_k, 0) if x_gathered else (0, layer.dispatch.top_k)
    e, n, c = layer.gate_up.shape[0], dy.shape[1], x.shape[1]

    def launch(tile: Tile) -> Outputs:
        out = torch.empty(e, n, c, dtype=x.dtype, device=x.device)
        grouped_matmul_dweight.outer_sums(x, dy, layer.dispatch.groups, x_div, dy_div, True, out, tile)
        return {"dweight": out}

    def expected(e: int, dtype: torch.dtype) -> Outputs:
        token, rows = layer.tokens(e), layer.rows(e)
        left, right = dy[rows if x_gathered else token], x[token if x_gathered else rows]
        return {"dweight": left.to(dtype).T @ right.to(dtype)}

    gathered, sorted_, form_div = (x, dy, x_div) if x_gathered else (dy, x, dy_div)
    _, form = grouped_matmul_dweight.operand_form(sorted_, gathered, 0, form_div, True)
    problem = _problem(layer, "grouped_matmul_dweight", form, gathered.shape[1], sorted_.shape[1])
    return Target(name, problem, launch, lambda: _gate(layer, expected, ("dweight",)))


def _up(layer: _Layer) -> Target:
    def launch(tile: Tile) -> Outputs:
        act, preact = expert_mlp.up_projection(layer.forward, tile)
        return {"act": act, "preact": preact}

    def expected(e: int, dtype: torch.dtype) -> Outputs:
        preact = layer.x[layer.tokens(e)].to(dtype) @ layer.gate_up[e].to(dtype).T
        gate, up = preact.chunk(2, dim=1)
        return {"act": F.silu(gate) * up, "preact": preact}

    h, i = layer.down.shape[1:]
    return Target(
        "up-projection", _problem(layer, "expert_mlp_up", "gated", i, h), launch, lambda: _gate(layer, expected)
    )


def _down_backward(layer: _Layer) -> Target:
    def launch(tile: Tile) -> Outputs:
        args = ExpertMlpBackward(layer.dy, layer.forward, layer.preact_rows, None, None, [])
        dpreact, act, partial = expert_mlp_backward.down_backward(args, (True, True, True), False, tile)
        return {"dpreact": dpreact, "act": act, "dweights": partial.sum(0).to(act.dtype)}

    def expected(e: int, dtype: torch.dtype) -> Outputs:
        rows = layer.rows(e)
        dact = layer.dy[layer.tokens(e)].to(dtype) @ layer.down[e].to(dtype)
        weight = layer.weights.flatten()[layer.dispatch.slots[rows].long()].to(dtype)
        with torch.enable_grad():
            preact = layer.preact_rows[rows].to(dtype).requires_grad_()
            gate, up = preact.chunk(2, dim=1)
            act = F.silu(gate) * up
        (dpreact,) = torch.autograd.grad(act, preact, dact * weight[:, None])
        act = act.detach()
        return {"dpreact": dpreact, "act": act * weight[:, None], "dweights": (dact * act).sum(1)}

    h, i = layer.down.shape[1:]
    problem = _problem(layer, "expert_mlp_down_backward", "gated", i, h)
    return Target("backward of down-projection", problem, launch, lambda: _gate(layer, expected))


FAMILIES = ("expert_mlp", "grouped_matmul")
COUNT = {"expert_mlp": 6, "grouped_matmul": 3}


def targets(family: str, request: Request) -> Iterator[Target]:
    """The launches of a family at a shape, forward and backward: ``COUNT[family]`` of them."""
    layer = _make_layer(request)
    if family == "expert_mlp":
        yield _up(layer)
        yield _product(layer, "down-projection", layer.act_rows, layer.down, False)
        yield _down_backward(layer)
        yield _weight_gradient(layer, "down-projection's weight gradient", layer.act_rows, layer.dy, False)
    else:
        yield _product(layer, "product", layer.x, layer.gate_up, True)
    yield _product(layer, "input gradient", layer.preact_rows, layer.gate_up.transpose(1, 2), False)
    name = "up-projection's weight gradient" if family == "expert_mlp" else "weight gradient"
    yield _weight_gradient(layer, name, layer.x, layer.preact_rows, True)
