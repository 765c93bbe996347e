"""A frozen linear layer with many low-rank updates, each row by its own adapter."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import gossamer
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
from gossamer.bench.harness.cost import Cost, nbytes
from gossamer.bench.harness.peers import Peer, Unavailable, gather, import_module
from gossamer.ops.multi_low_rank import multi_low_rank_reference

SHAPES = {
    "prefill-1": (8192, 4096, 4096, 16, 1),
    "prefill-16": (8192, 4096, 4096, 16, 16),
    "prefill-64": (8192, 4096, 4096, 16, 64),
    "decode-1": (64, 4096, 4096, 16, 1),
    "decode-16": (64, 4096, 4096, 16, 16),
    "decode-64": (64, 4096, 4096, 16, 64),
    "cpu-prefill-1": (1024, 2048, 2048, 16, 1),
    "cpu-prefill-16": (1024, 2048, 2048, 16, 16),
    "cpu-prefill-64": (1024, 2048, 2048, 16, 64),
    "cpu-decode-1": (64, 2048, 2048, 16, 1),
    "cpu-decode-16": (64, 2048, 2048, 16, 16),
    "cpu-decode-64": (64, 2048, 2048, 16, 64),
}
SYMBOLS = ("M", "N", "C", "r", "A")
DIMENSIONS = {"rows": "M", "outputs": "N", "inputs": "C", "rank": "r", "adapters": "A"}
DEFAULTS = {device: tuple(n for n in SHAPES if n.startswith("cpu-") == (device == "cpu")) for device in ("cpu", "cuda")}
QUICK = {"cpu": "cpu-decode-16", "cuda": "prefill-16"}
SCALE = 2.0
# Above this many bytes, the variant that copies its adapter's factors for every row is skipped.
MOST_COPIED = 2**30


@dataclass(frozen=True)
class Problem:
    """The inputs of a case: rows, a frozen weight, factors, and the adapter of each row."""

    x: torch.Tensor
    weight: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    ids: torch.Tensor
    dy: torch.Tensor

    def leaves(self) -> dict[str, torch.Tensor]:
        """Views for which a variant takes its own gradients."""
        return {f"d{name}": getattr(self, name).detach().requires_grad_() for name in "xab"}


def draw_ids(rows: int, adapters: int, skew: str, generator: torch.Generator) -> torch.Tensor:
    """The adapter of each row: uniform, by popularity 1/(i + 1), or always the last one."""
    popularity = torch.ones(adapters, device=generator.device)
    if skew == "zipf":
        popularity = 1.0 / torch.arange(1, adapters + 1, device=generator.device)
    elif skew == "one":
        popularity = torch.arange(adapters, device=generator.device).eq(adapters - 1).float()
    return torch.multinomial(popularity, rows, True, generator=generator)


def make_problem(request: Request) -> Problem:
    """Draw the inputs of a case."""
    m, n, c, r, adapters = (request.sizes[s] for s in SYMBOLS)
    generator = torch.Generator(request.device).manual_seed(request.seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(shape, generator=generator, device=request.device) * scale
        return drawn.to(DTYPES[request.dtype])

    return Problem(
        normal(m, c),
        normal(n, c, scale=c**-0.5),
        normal(adapters, r, c, scale=c**-0.5),
        normal(adapters, n, r, scale=r**-0.5 / SCALE),
        draw_ids(m, adapters, request.skew, generator),
        normal(m, n),
    )


def _outputs(problem: Problem, both: bool, dtype: torch.dtype, plain: Callable[..., torch.Tensor]) -> Outputs:
    """The results of ``plain`` torch in ``dtype``."""
    names = ("x", "a", "b", "weight", "dy")
    x, a, b, weight, dy = (getattr(problem, name).detach().to(dtype) for name in names)
    leaves = [t.requires_grad_(both) for t in (x, a, b)]
    y = plain(problem, x, a, b, weight)
    if not both:
        return {"y": y}
    return {"y": y.detach(), **dict(zip(("dx", "da", "db"), torch.autograd.grad(y, leaves, dy), strict=True))}


def loop(name: str, role: str, problem: Problem) -> Variant:
    """Plain torch, one adapter after the other, each on its rows."""
    leaves = problem.leaves()
    return Variant(name, role, lambda: _looped(problem, *leaves.values(), problem.weight), leaves, problem.dy)


def sorted_in_the_call(name: str, role: str, problem: Problem) -> Variant:
    """Our operator with the rows sorted in every call, as in a model with one layer."""
    leaves = problem.leaves()

    def forward() -> torch.Tensor:
        x, a, b = leaves.values()
        return gossamer.multi_low_rank_linear(x, problem.weight, a, b, problem.ids, scale=SCALE)

    return Variant(name, role, forward, leaves, problem.dy)


def gathered(name: str, role: str, problem: Problem) -> Variant:
    """Plain torch, with a copy of its adapter's factors for every row."""
    copied = problem.ids.numel() * (nbytes(problem.a) + nbytes(problem.b)) / problem.a.shape[0]
    if copied > MOST_COPIED:
        raise Unavailable(f"it would copy {copied / 2**30:.1f} GiB of factors")
    leaves = problem.leaves()
    return Variant(
        name, role, lambda: _gathered(problem, *leaves.values(), problem.weight), leaves, problem.dy, gate="gathered"
    )


def _gathered(
    problem: Problem, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    s = torch.bmm(a[problem.ids], x.unsqueeze(2))
    return F.linear(x, weight) + SCALE * torch.bmm(b[problem.ids], s).squeeze(2)


def _looped(problem: Problem, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return multi_low_rank_reference(x, a, b, problem.ids, scale=SCALE, out=F.linear(x, weight))


def one_adapter(name: str, role: str, problem: Problem) -> Variant:
    """The same rows with one adapter for all: :func:`gossamer.low_rank_linear`."""
    leaves = problem.leaves()
    leaves["da"], leaves["db"] = (leaves[k].detach()[0].contiguous().requires_grad_() for k in ("da", "db"))

    def forward() -> torch.Tensor:
        x, a, b = leaves.values()
        return gossamer.low_rank_linear(x, problem.weight, a, b, scale=SCALE)

    return Variant(name, role, forward, leaves, problem.dy, gate=None, note="another problem: one adapter")


def peft(name: str, role: str, problem: Problem) -> Variant:
    """PEFT's batches of several adapters, ``adapter_names`` (Mangrulkar et al.)."""
    import_module("peft", "peft")
    layer = importlib.import_module("peft.tuners.lora.layer").Linear
    config = importlib.import_module("peft").LoraConfig
    n, c = problem.weight.shape
    with torch.device("meta"):
        base = torch.nn.Linear(c, n, bias=False)
    base.weight = torch.nn.Parameter(problem.weight, requires_grad=False)
    rank, adapters = problem.a.shape[1], problem.a.shape[0]
    wrapped = layer(base, "0", config=config(r=rank, lora_alpha=SCALE * rank), r=rank, lora_alpha=SCALE * rank)
    for i in range(1, adapters):
        wrapped.update_layer(str(i), r=rank, lora_alpha=SCALE * rank, config=config(r=rank))
    for i in range(adapters):
        wrapped.lora_A[str(i)].weight = torch.nn.Parameter(problem.a[i].clone())
        wrapped.lora_B[str(i)].weight = torch.nn.Parameter(problem.b[i].clone())
    names, x = [str(i) for i in problem.ids.tolist()], problem.x.detach().requires_grad_()
    used = sorted(set(names), key=int)
    leaves = {"dx": x}
    for letter, factors in (("a", wrapped.lora_A), ("b", wrapped.lora_B)):
        leaves |= {f"d{letter}{i}": factors[i].weight for i in used}

    def layout(outputs: Outputs) -> Outputs:
        if "dx" not in outputs:
            return outputs
        zero = {"a": torch.zeros_like(problem.a[0]), "b": torch.zeros_like(problem.b[0])}
        stacked = {
            f"d{k}": torch.stack([outputs.get(f"d{k}{i}", zero[k]) for i in range(adapters)]) for k in ("a", "b")
        }
        return {"y": outputs["y"], "dx": outputs["dx"], **stacked}

    return Variant(name, role, lambda: wrapped(x, adapter_names=names), leaves, problem.dy, layout)


PEERS = (
    Peer("one adapter", None, "gossamer", one_adapter, REFERENCE),
    Peer("rows sorted in the call", None, "gossamer", sorted_in_the_call, REFERENCE),
    Peer("torch loop", None, "torch", loop, REFERENCE),
    Peer("torch gathered factors", None, "torch", gathered, REFERENCE),
    Peer("PEFT adapter_names", "peft", "peft", peft),
)


def build(request: Request) -> Case:
    """Build :func:`gossamer.multi_low_rank_linear` beside the layer without any update."""
    problem, both = make_problem(request), request.direction == "both"
    m, n, c, r, _ = (request.sizes[s] for s in SYMBOLS)
    leaves, x0 = problem.leaves(), problem.x.detach().requires_grad_()

    # A model sorts the rows of a batch once, for all its layers.
    routing = gossamer.adapter_dispatch(problem.ids, problem.a.shape[0])

    def ours() -> torch.Tensor:
        x, a, b = leaves.values()
        return gossamer.multi_low_rank_linear(x, problem.weight, a, b, routing, scale=SCALE)

    variants = [
        Variant("gossamer", OURS, ours, leaves, problem.dy),
        Variant("linear alone", DENSE, lambda: F.linear(x0, problem.weight), {"dx": x0}, problem.dy, gate=None),
    ]
    peers, skipped = gather(PEERS, request, problem)
    truth = functools.cache(lambda: _outputs(problem, both, torch.float64, _looped))
    dtype, used = DTYPES[request.dtype], int(problem.ids.unique().numel())
    factors = used * r * (n + c) * problem.x.element_size()
    product, update = 2.0 * m * n * c, 2.0 * m * r * (n + c)
    moved = nbytes(problem.x, problem.weight, problem.dy, problem.ids) + factors
    if both:
        product, update = 2 * product, 3 * update
        moved += nbytes(problem.x, problem.dy) + factors
    return Case(
        "multi_low_rank",
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
            "truth": lambda: FloatGate(truth(), _outputs(problem, both, dtype, _looped)),
            # A different order of sums, which the gate's baseline must share.
            "gathered": lambda: FloatGate(truth(), _outputs(problem, both, dtype, _gathered)),
        },
        "every output, whole",
        f"{request.skew} adapters",
    )


def _sizes(call: Mapping[str, object], prefix: str) -> tuple[float, float]:
    """FLOPs of a product with one factor for each of C and N columns together, and bytes of the factors in use."""
    a, b, offsets = (call[f"{prefix}{name}"] for name in ("a", "b", "offsets"))
    columns = a.shape[2] + b.shape[1]
    used = int((offsets.diff() > 0).sum())
    return 2.0 * int(offsets[-1]) * a.shape[1] * columns, used * a.shape[1] * columns * a.element_size()


def cost(call: Mapping[str, object], result: object) -> Cost:
    """The cost of a forward call."""
    prefix = "update_" if "out" in call else ""
    flops, factors = _sizes(call, prefix)
    y = 2 * nbytes(call["out"]) if "out" in call else nbytes(result[0])
    read = (call[f"{prefix}{name}"] for name in ("x", "slots", "offsets"))
    return Cost(flops, nbytes(*read) + factors + y)


def cost_backward(call: Mapping[str, object], result: object) -> Cost:
    """The cost of a backward call, without the gradients that ``needs`` does not name."""
    flops, factors = _sizes(call, "forward_")
    c, n = call["forward_a"].shape[2], call["forward_b"].shape[1]
    need_x, need_a, need_b = (name in call["needs"] for name in ("x", "a", "b"))
    parts = n * (need_x or need_a) + c * need_x + c * need_a + n * need_b
    moved = nbytes(call["dy"], call["s"], call["forward_slots"], call["forward_offsets"], *result) + factors
    return Cost(flops * parts / (c + n), moved + nbytes(call["forward_x"]) * need_a)


COSTS = {
    "gossamer::multi_low_rank": cost,
    "gossamer::multi_low_rank_": cost,
    "gossamer::multi_low_rank_backward": cost_backward,
}
FAMILY = Family(
    "multi_low_rank",
    SHAPES,
    SYMBOLS,
    DEFAULTS,
    QUICK,
    build,
    dimensions=DIMENSIONS,
    work=("M", "N", "C"),
    peers=PEERS,
    rule=lambda sizes: None if sizes["r"] <= min(sizes["N"], sizes["C"]) else f"r must be at most N and C, got {sizes}",
)


def bench_multi_low_rank(measured):
    """Entry point of pytest-benchmark."""
    measured()
