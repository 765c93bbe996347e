"""Linear layers with a low-rank update of a frozen weight, beside the plain linear layer and other people's layers."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import gossamer
from gossamer.bench.harness.case import (
    DENSE,
    DTYPES,
    OURS,
    PEER,
    REFERENCE,
    Case,
    Family,
    FloatGate,
    Outputs,
    Request,
    Variant,
)
from gossamer.bench.harness.cold import as_held, copies, held_copy, in_turn, passes
from gossamer.bench.harness.cost import Cost, nbytes
from gossamer.bench.harness.peers import Peer, attribute, gather, import_module
from gossamer.ops._weights import BLOCK
from gossamer.ops.low_rank import base_linear, low_rank_linear_reference

SHAPES = {
    "square": (8192, 4096, 4096, 16),
    "square-rank-64": (8192, 4096, 4096, 64),
    "wide": (8192, 14336, 4096, 16),
    "square-2048": (2048, 4096, 4096, 16),
    "square-64": (64, 4096, 4096, 16),
    "cpu": (1024, 2048, 2048, 16),
    "cpu-64": (64, 2048, 2048, 16),
    "decode-1": (1, 4096, 4096, 16),
    "decode-4": (4, 4096, 4096, 16),
    "decode-16": (16, 4096, 4096, 16),
}
SYMBOLS = ("M", "N", "C", "r")
DEFAULTS = {
    "cpu": ("cpu", "cpu-64", "decode-1", "decode-4", "decode-16"),
    "cuda": ("square", "wide", "square-2048", "square-64"),
}
QUICK = {"cpu": "cpu", "cuda": "square"}
DIMENSIONS = {"rows": "M", "rank": "r"}
SCALE = 2.0
# Products of at most this many multiplications are checked completely, in float64; larger ones by a sample of rows.
WHOLE = 2**33
SAMPLE_ROWS = 128


def rule(sizes: Mapping[str, int]) -> str | None:
    """The reason why sizes are invalid, or None."""
    most = min(sizes["N"], sizes["C"])
    return None if sizes["r"] <= most else f"r must be at most min(N, C) = {most}, got {sizes['r']}"


@dataclass(frozen=True)
class Problem:
    """The tensors of a case."""

    x: torch.Tensor
    weight: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    dy: torch.Tensor

    def leaves(self) -> dict[str, torch.Tensor]:
        """Copies of x, a and b that take gradients."""
        return {f"d{name}": getattr(self, name).detach().clone().requires_grad_() for name in ("x", "a", "b")}

    def variant(self, name: str, role: str, call, gate: str | None = "truth", only_x: bool = False) -> Variant:
        """A variant that computes ``call(x, a, b)``."""
        leaves = self.leaves()
        tensors = list(leaves.values())
        wanted = {"dx": leaves["dx"]} if only_x else leaves
        return Variant(name, role, lambda: call(*tensors), wanted, self.dy, gate=gate)


def make_problem(request: Request) -> Problem:
    """Draw the tensors of a case."""
    m, n, c, rank = (request.sizes[s] for s in SYMBOLS)
    generator = torch.Generator(request.device).manual_seed(request.seed)

    def normal(*shape: int, over: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=request.device) / over).to(DTYPES[request.dtype])

    return Problem(normal(m, c), normal(n, c, over=c**0.5), normal(rank, c, over=c**0.5), normal(n, rank), normal(m, n))


def _outputs(problem: Problem, rows: torch.Tensor, both: bool, dtype: torch.dtype) -> Outputs:
    """Results by plain torch in ``dtype``: rows of y and dx, and the factors' gradients, which all rows add to."""
    x, w, a, b, dy = (getattr(problem, name).to(dtype) for name in ("x", "weight", "a", "b", "dy"))
    found = {"y": F.linear(x[rows], w) + SCALE * F.linear(F.linear(x[rows], a), b)}
    if both:
        s, ds = F.linear(x, a), SCALE * (dy @ b)
        found |= {"dx": dy[rows] @ w + ds[rows] @ a, "da": ds.T @ x, "db": SCALE * (dy.T @ s)}
    return found


def _gate(problem: Problem, rows: torch.Tensor, both: bool) -> FloatGate:
    picks = {"y": lambda y: y[rows], "dx": lambda dx: dx[rows]}
    truth = _outputs(problem, rows, both, torch.float64)
    return FloatGate(truth, _outputs(problem, rows, both, problem.x.dtype), picks)


def peft(name: str, role: str, problem: Problem) -> Variant:
    """PEFT's own layer over a frozen ``nn.Linear``."""
    layers = import_module("peft.tuners.lora.layer", "peft")
    (n, c), rank = problem.weight.shape, problem.a.shape[0]
    with torch.device(problem.x.device):
        base = torch.nn.Linear(c, n, bias=False, dtype=problem.x.dtype)
    base.weight = torch.nn.Parameter(problem.weight, requires_grad=False)
    alpha = int(SCALE * rank)
    config = importlib.import_module("peft").LoraConfig(r=rank, lora_alpha=alpha)
    layer = attribute(layers, "Linear", "peft")(base, "default", config=config, r=rank, lora_alpha=alpha)
    leaves = problem.leaves()
    for key, part in (("da", layer.lora_A), ("db", layer.lora_B)):
        part["default"].weight = torch.nn.Parameter(leaves[key].detach())
        leaves[key] = part["default"].weight
    return Variant(name, role, lambda: layer(leaves["dx"]), leaves, problem.dy)


def unsloth(name: str, role: str, problem: Problem) -> Variant:
    """Unsloth's product with an update."""
    package = import_module("unsloth.kernels.fast_lora", "unsloth")
    function = attribute(package, "LoRA_W", "unsloth")
    leaves = problem.leaves()

    def forward() -> torch.Tensor:
        return function.apply(leaves["dx"], problem.weight, None, leaves["da"], leaves["db"], SCALE)

    return Variant(name, role, forward, leaves, problem.dy)


def _unfused(name: str, role: str, problem: Problem) -> Variant:
    call = functools.partial(low_rank_linear_reference, scale=SCALE)
    return problem.variant(name, role, lambda x, a, b: call(x, problem.weight, a, b))


# Frozen weights in few bits, with their updates, for few rows.
FORMATS = {
    "int8": gossamer.Int8Weight.quantize,
    "fp8": gossamer.Float8Weight.quantize,
    "nf4": gossamer.NF4Weight.quantize,
    "nf4 with float scales": functools.partial(gossamer.NF4Weight.quantize, double=False),
}


def _stacked(weight_format: str, **options):
    """A quantiser of a matrix as a stack of one, for a linear layer without an update."""
    return lambda weight: as_held(
        gossamer.QuantizedExpertWeight.quantize(weight.unsqueeze(0), weight_format, **options)
    )


# The formats of experts, for the other linear layers of a model.
LINEARS = {
    "fp8_block": _stacked("fp8_block"),
    "int8 stack": _stacked("int8"),
    "int8, int8 rows": _stacked("int8", activations="int8"),
    "int4": _stacked("int4"),
    "int4, int8 rows": _stacked("int4", activations="int8"),
    "int4 of 64": _stacked("int4", group_size=64),
    "int4 of 128": _stacked("int4", group_size=128),
    "mxfp4": _stacked("mxfp4"),
    "mxfp4, int8 rows": _stacked("mxfp4", activations="int8"),
}


def _tensors(weight) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(weight).items() if isinstance(value, torch.Tensor)}


def _copy(weight):
    if isinstance(weight, torch.Tensor):
        return weight.clone()
    if isinstance(weight, gossamer.QuantizedExpertWeight):
        return held_copy(weight)
    return type(weight)(**{**vars(weight), **{name: value.clone() for name, value in _tensors(weight).items()}})


def torch_int4(weight: torch.Tensor, group: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight packed for torch's int4 product on the CPU, with a scale and a zero point per group."""
    n, c = weight.shape
    grouped = weight.float().view(n, c // group, group)
    scale = grouped.abs().amax(-1) / 7
    codes = (grouped / scale.unsqueeze(-1)).round().clamp(-8, 7).add(8).view(n, c).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed, torch.stack([scale, torch.zeros_like(scale)], -1).to(weight.dtype).transpose(0, 1).contiguous()


def _few_rows(problem: Problem, rows: torch.Tensor, count: int) -> tuple[list[Variant], dict]:
    """Our layer over each kind of frozen weight, read from memory, and torch's own products without an update."""
    x, variants, gates = problem.x, [], {}

    def add(name: str, role: str, call, weight, copy, size: int, gate: str | None, note: str = "") -> None:
        forward = in_turn(call, copies(weight, copy, size, count))
        variants.append(Variant(name, role, forward, gate=gate, note=note, bytes=float(size * count)))

    def layer(weight) -> torch.Tensor:
        return gossamer.low_rank_linear(x, weight, problem.a, problem.b, scale=SCALE)

    add("gossamer", OURS, layer, problem.weight, _copy, nbytes(problem.weight), "truth")
    add("linear without update", DENSE, lambda w: F.linear(x, w), problem.weight, _copy, nbytes(problem.weight), None)
    for name, quantize in FORMATS.items():
        weight = quantize(problem.weight)
        size = nbytes(*_tensors(weight).values())

        def gate(weight=weight) -> FloatGate:
            dense = [weight.dequantize(dtype) for dtype in (torch.float64, x.dtype)]
            truth, plain = (dataclasses.replace(problem, weight=w) for w in dense)
            return FloatGate(_outputs(truth, rows, False, torch.float64), _outputs(plain, rows, False, x.dtype))

        gates[name] = gate
        add(f"gossamer {name}", PEER, layer, weight, _copy, size, name)
    n, c = problem.weight.shape
    if n % BLOCK == 0 and c % BLOCK == 0:
        for name, quantize in LINEARS.items():
            weight = quantize(problem.weight)

            def plain_gate(weight=weight) -> FloatGate:
                dense = [weight.dequantize(dtype)[0] for dtype in (torch.float64, x.dtype)]
                truth, plain = ({"y": F.linear(x[rows].to(w.dtype), w)} for w in dense)
                return FloatGate(truth, plain)

            exact = weight.activations == "float"
            gates |= {name: plain_gate} if exact else {}
            note = "no update" if exact else "no update, activations rounded to 8 bits"
            call = functools.partial(base_linear, x)
            add(f"gossamer {name}", PEER, call, weight, _copy, weight.nbytes, name if exact else None, note)
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        packed = torch_int4(problem.weight)
        call = lambda w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w[0], 32, w[1])  # noqa: E731
        copy = lambda w: tuple(t.clone() for t in w)  # noqa: E731
        add("torch int4", PEER, call, packed, copy, nbytes(*packed), None, "groups of 32, no update")
        int8 = FORMATS["int8"](problem.weight)
        stored = int8.values, (int8.absmax / 127).to(x.dtype)
        call8 = lambda w: torch.ops.aten._weight_int8pack_mm(x, w[0], w[1])  # noqa: E731
        add("torch int8", PEER, call8, stored, copy, nbytes(*stored), None, "a scale a row, no update")
    return variants, gates


PEERS = (
    Peer("unfused", None, "torch", _unfused, REFERENCE),
    Peer("PEFT", "peft.tuners.lora.layer", "peft", peft),
    Peer("Unsloth", "unsloth.kernels.fast_lora", "unsloth", unsloth, cuda_only=True, half_only=True),
)


def build(request: Request) -> Case:
    """Build :func:`gossamer.low_rank_linear` beside the plain linear layer, whose weight is frozen too."""
    m, n, c, rank = (request.sizes[s] for s in SYMBOLS)
    problem, both = make_problem(request), request.direction == "both"
    whole = m * n * c <= WHOLE
    count = passes(n * c // 2, m) if not both else 1
    rows = torch.arange(m, device=request.device)
    rows = rows if whole else rows[:: max(1, m // SAMPLE_ROWS)]
    weight = problem.weight
    ours = problem.variant("gossamer", OURS, lambda x, a, b: gossamer.low_rank_linear(x, weight, a, b, scale=SCALE))
    plain = problem.variant("linear without update", DENSE, lambda x, a, b: F.linear(x, weight), None, only_x=True)
    peers, skipped = gather(PEERS, request, problem)
    flops, moved = 2.0 * m * (n * c + rank * (n + c)), nbytes(problem.x, weight, problem.a, problem.b, problem.dy)
    if both:
        flops += 2.0 * m * (n * c + 2 * rank * (n + c))
        moved += nbytes(problem.x, problem.a, problem.b, problem.dy)
    variants, gates = [ours, plain], {}
    if count > 1:
        variants, gates = _few_rows(problem, rows, count)
        peers, flops, moved = [], flops * count, moved * count
    return Case(
        "low_rank",
        request.shape,
        request.sizes,
        request.dtype,
        request.device,
        request.direction,
        (*variants, *peers),
        skipped,
        flops,
        moved,
        {"truth": lambda: _gate(problem, rows, both), **gates},
        "every output, whole" if whole else f"{len(rows)} rows of y and dx; da and db, whole",
        f"{count} weights in turn" if count > 1 else "",
    )


# The tensors that a weight is read from.
_WEIGHT = ("weight_data", "weight_scale", "weight_blocks_nested_absmax")


def cost(call: Mapping[str, object], result: object) -> Cost:
    """The cost of the layer: the base product and the update's two."""
    (m, c), (n, rank) = call["x"].shape, call["weight_b"].shape
    read = (call[name] for name in ("x", *_WEIGHT, "weight_a", "weight_b", "bias"))
    moved = nbytes(*read, *result)
    return Cost(2.0 * m * (n * c + rank * (n + c)), moved)


def cost_backward(call: Mapping[str, object], result: object) -> Cost:
    """The cost of the requested gradients."""
    m, n = call["dy"].shape
    want_x, want_a = "x" in call["needs"], "weight.a" in call["needs"]
    dx, dweight, da, db, _ = result
    terms = n * dx.shape[-1] * want_x + dweight.numel() + db.numel()
    if want_x or want_a:
        rank = call["forward_weight_b"].shape[1]
        terms += rank * n + rank * dx.shape[-1] * want_x + da.numel()
    given = (call[f"forward_{name}"] for name in ("x", *_WEIGHT, "weight_a", "weight_b"))
    return Cost(2.0 * m * terms, nbytes(call["dy"], *given, call["s"], *result))


def cost_base(call: Mapping[str, object], result: object) -> Cost:
    """The cost of the layer's own product."""
    x, read = call["x"], [call[name] for name in _WEIGHT]
    return Cost(2.0 * x.numel() * result.shape[1], nbytes(x, *read, call["bias"], result))


COSTS = {
    "gossamer::base_linear": cost_base,
    "gossamer::low_rank_linear": cost,
    "gossamer::low_rank_linear_backward": cost_backward,
}
FAMILY = Family(
    "low_rank",
    SHAPES,
    SYMBOLS,
    DEFAULTS,
    QUICK,
    build,
    skews=("uniform",),
    dimensions=DIMENSIONS,
    peers=PEERS,
    rule=rule,
)


def bench_low_rank(measured):
    """Entry point of pytest-benchmark."""
    measured()
