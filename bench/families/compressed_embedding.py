"""Bags of compressed tables, decoded as they are read, beside the same method in plain torch and a dense table.

Every variant has its own tables, so the ratio to the dense baseline is the cost of compression in time. Plain torch
stores everything that it decodes: indices, rows and vectors of all ids. "both" is forward, backward and a step of plain
SGD, which our variants take inside the backward pass and plain torch from sparse gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from gossamer.bench.families.embedding import decoded, quantized_bags
from gossamer.bench.families.tables import Problem, Training
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
)
from gossamer.bench.harness.cost import Cost, arguments, nbytes
from gossamer.nn import (
    ClusteredEmbedding,
    CompositionalEmbedding,
    EmbeddingBag,
    FrequencyEmbedding,
    HashEmbedding,
    RandomBlockEmbedding,
    Table,
    TensorTrainEmbedding,
)
from gossamer.nn.embeddings.codes import CodedRowsTable
from gossamer.ops._bags import Bags
from gossamer.ops.composed_rows import Parts, live_positions, part_rows
from gossamer.ops.gather_compose import GatherCompose
from gossamer.ops.gather_compose_gradient import ComposeGradient
from gossamer.ops.gather_compose_step import GatherComposeStep
from gossamer.ops.gather_matmul import GatherMatmul, ProductGradient
from gossamer.optim import SGD, Optimizer

SYMBOLS = ("N", "D", "B", "J")
SHAPES = {"million": (1_000_000, 16, 4096, 20), "small": (10_000, 16, 512, 20)}
DEFAULTS = {"cpu": ("million",), "cuda": ("million",)}
QUICK = {"cpu": "million", "cuda": "million"}
# Codewords per part; rows of the dense table per row of other tables; and the rank of tensor trains.
CODES, PARTS, SHARE, RANK = 256, 4, 10, 16
# Steps repeat the same gradient, so larger steps would soon leave the range of numbers.
LR = 1e-4
PRIMITIVES = ("gather_compose", "gather_matmul")

Make = Callable[..., Table]
Vectors = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Method:
    """A way to make a table, and its vectors ``(ids.shape, D)`` in plain torch as a function of ids and parameters.

    Attributes:
        make: makes the table, given ``optimizer``.
        vectors: computes vectors from ids, the parameters in their order, and ``sparse``, whether gradients are sparse.
        initial: the parameters that every variant starts from, by name.
    """

    make: Make
    vectors: Vectors
    initial: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        found = {f"d{name}": p.detach().clone() for name, p in self.make(optimizer=None).named_parameters()}
        object.__setattr__(self, "initial", found)

    def table(self, optimizer: Optimizer | None) -> Table:
        """A table with the initial parameters."""
        table = self.make(optimizer=optimizer)
        with torch.no_grad():
            for p, value in zip(table.parameters(), self.initial.values(), strict=True):
                p.copy_(value)
        return table


def _compositional(n: int, d: int, device: torch.device, operation: str) -> Method:
    def make(**options: object) -> CompositionalEmbedding:
        return CompositionalEmbedding(n, d, operation=operation, device=device, **options)

    m = make(optimizer=None).moduli[0]

    def vectors(ids: torch.Tensor, weight: torch.Tensor, **how: bool) -> torch.Tensor:
        first, second = F.embedding(ids % m, weight, **how), F.embedding(m + ids // m, weight, **how)
        if operation == "concat":
            return torch.cat([first, second], -1)
        return first * second if operation == "mul" else first + second

    return Method(make, vectors)


def _coded(n: int, d: int, device: torch.device, generator: torch.Generator) -> Method:
    codes = torch.randint(CODES, (n, PARTS), generator=generator, device=device)
    stored, first = codes.to(torch.uint8), torch.arange(PARTS, device=device) * CODES

    def make(**options: object) -> CodedRowsTable:
        return CodedRowsTable(n, d, codes, [CODES] * PARTS, operation="concat", device=device, **options)

    def vectors(ids: torch.Tensor, weight: torch.Tensor, **how: bool) -> torch.Tensor:
        return F.embedding(stored[ids].long() + first, weight, **how).flatten(-2)

    return Method(make, vectors)


def _blocks(n: int, d: int, device: torch.device) -> Method:
    def make(**options: object) -> RandomBlockEmbedding:
        return RandomBlockEmbedding(n, d, max(n * d // SHARE, d), block_size=d, device=device, **options)

    maps = make(optimizer=None).parts().maps
    (modulus, _, _, multiplier, addend), within = maps.numbers()[0], torch.arange(d, device=device)

    def vectors(ids: torch.Tensor, weight: torch.Tensor, **how: bool) -> torch.Tensor:
        start = (ids * multiplier + addend) % maps.prime % modulus
        return F.embedding(start.unsqueeze(-1) + within, weight, **how).squeeze(-1)

    return Method(make, vectors)


def _hashed(n: int, d: int, device: torch.device) -> Method:
    rows = max(n // SHARE, 1)

    def vectors(ids: torch.Tensor, weight: torch.Tensor, **how: bool) -> torch.Tensor:
        return F.embedding(ids % rows, weight, **how)

    return Method(lambda **options: HashEmbedding(n, d, rows, device=device, **options), vectors)


def _listed(n: int, d: int, device: torch.device, generator: torch.Generator, clustered: bool) -> Method:
    """One row per id by a stored list: of frequent ids and a shared rest, or of clusters."""
    rows = max(n // SHARE, 2)
    clusters = torch.randint(rows, (n,), generator=generator, device=device)
    clusters[:1] = rows - 1
    frequencies = torch.rand(n, generator=generator, device=device)

    def make(**options: object) -> Table:
        if clustered:
            return ClusteredEmbedding(n, d, clusters, device=device, **options)
        return FrequencyEmbedding(n, d, rows, frequencies=frequencies, device=device, **options)

    stored = make(optimizer=None).row_of_id.clone()

    def vectors(ids: torch.Tensor, weight: torch.Tensor, **how: bool) -> torch.Tensor:
        return F.embedding(stored[ids], weight, **how)

    return Method(make, vectors)


def _tensor_train(n: int, d: int, device: torch.device) -> Method:
    def make(**options: object) -> TensorTrainEmbedding:
        return TensorTrainEmbedding(n, d, (RANK, RANK), device=device, **options)

    shape = make(optimizer=None)
    (_, n2, n3), (d1, d2, d3) = shape.row_factors, shape.dim_factors

    def vectors(ids: torch.Tensor, *cores: torch.Tensor, **how: bool) -> torch.Tensor:
        flat = ids.flatten()
        digits = (flat // n3 // n2, flat // n3 % n2, flat % n3)
        rows = [F.embedding(i, core, **how) for i, core in zip(digits, cores, strict=True)]
        left = torch.bmm(rows[0].view(-1, d1, RANK), rows[1].view(-1, RANK, d2 * RANK))
        return torch.bmm(left.view(-1, d1 * d2, RANK), rows[2].view(-1, RANK, d3)).view(*ids.shape, d)

    return Method(make, vectors)


def _methods(n: int, d: int, device: torch.device, generator: torch.Generator) -> dict[str, Method]:
    operations = {"added": "add", "multiplied": "mul", "joined": "concat"}
    methods = {
        f"quotient-remainder {name}": _compositional(n, d, device, operation) for name, operation in operations.items()
    }
    return methods | {
        "codes": _coded(n, d, device, generator),
        "hash": _hashed(n, d, device),
        "frequency": _listed(n, d, device, generator, clustered=False),
        "clustered": _listed(n, d, device, generator, clustered=True),
        "random blocks": _blocks(n, d, device),
        f"tensor train of rank {RANK}": _tensor_train(n, d, device),
    }


@dataclass(frozen=True)
class Stepped(Training):
    """A variant whose backward pass ends in a step; ``tables`` holds its parameters by name, and all are judged."""

    tables: dict[str, torch.Tensor] = field(default_factory=dict)

    def outputs(self, direction: str) -> Outputs:
        """The result and, after a step, the parameters."""
        found = self.call(direction)
        return found if direction == "forward" else found | {k: p.detach().clone() for k, p in self.tables.items()}


def _ours(name: str, method: Method, problem: Problem) -> Stepped:
    table = method.table(SGD(lr=LR) if problem.both else None)
    named = dict(zip(method.initial, table.parameters(), strict=True))
    step = lambda y: y.backward(problem.dy)  # noqa: E731
    return Stepped(name, OURS, lambda: table(problem.ids[0]), gate=name, step=step, tables=named)


def _plain(name: str, method: Method, problem: Problem) -> Stepped:
    """The method in plain torch; it is not judged, since it adds duplicates to a table one by one."""
    leaves = [p.clone().requires_grad_() for p in method.initial.values()]
    optimizer = torch.optim.SGD(leaves, lr=LR)

    def forward() -> torch.Tensor:
        return method.vectors(problem.ids[0], *leaves, sparse=problem.both).sum(1)

    def step(y: torch.Tensor) -> None:
        y.backward(problem.dy)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Stepped(f"{name}, plain torch", REFERENCE, forward, gate=None, step=step)


def _dense(problem: Problem) -> tuple[Stepped, Stepped]:
    """The dense table, in plain torch and in our layer."""
    (weight,) = problem.tables
    plain = torch.nn.EmbeddingBag.from_pretrained(weight.clone(), freeze=False, mode="sum", sparse=problem.both)
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR)

    def step(y: torch.Tensor) -> None:
        y.backward(problem.dy)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    ours = EmbeddingBag(*weight.shape, mode="sum", device=weight.device, optimizer=SGD(lr=LR) if problem.both else None)
    with torch.no_grad():
        ours.weight.copy_(weight)
    ids = problem.ids[0]
    own_step = lambda y: y.backward(problem.dy)  # noqa: E731
    return (
        Stepped("dense torch.nn", DENSE, lambda: plain(ids), gate=None, step=step),
        Stepped("dense gossamer", REFERENCE, lambda: ours(ids), gate=None, step=own_step),
    )


def _outputs(method: Method, problem: Problem, dtype: torch.dtype) -> Outputs:
    """The result and, after a step, the parameters, by plain torch in ``dtype``."""
    leaves = {k: p.to(dtype).requires_grad_() for k, p in method.initial.items()}
    y = method.vectors(problem.ids[0], *leaves.values(), sparse=False).sum(1)
    found = {"y": y.detach()}
    if problem.both:
        gradients = torch.autograd.grad(y, list(leaves.values()), problem.dy.to(dtype))
        found |= {k: (p - LR * g).detach() for (k, p), g in zip(leaves.items(), gradients, strict=True)}
    return found


def build(request: Request) -> Case:
    """Build each method, the same in plain torch, and a dense table."""
    n, d, bags, length = (request.sizes[s] for s in SYMBOLS)
    device, dtype, both = request.device, DTYPES[request.dtype], request.direction == "both"
    generator = torch.Generator(device).manual_seed(request.seed)
    ids = torch.randint(n, (1, bags, length), generator=generator, device=device)
    dy = torch.randn(bags, d, generator=generator, device=device).to(dtype)
    problem = Problem([torch.randn(n, d, generator=generator, device=device).to(dtype)], ids, dy, both)
    methods = _methods(n, d, device, generator)
    quantized = quantized_bags(problem, SGD(lr=LR) if both else None, LR)
    int8 = dataclasses.replace(quantized[0], name="int8")
    plain_int8 = dataclasses.replace(quantized[1], name="int8, plain torch", role=REFERENCE, gate=None)
    variants = [_ours(name, method, problem) for name, method in methods.items()]
    variants += [int8, *_dense(problem)]
    variants += [_plain(name, method, problem) for name, method in methods.items()]
    variants.append(plain_int8)
    gates: dict[str, Callable[[], FloatGate]] = {}
    for name, method in methods.items():
        gates[name] = lambda m=method: FloatGate(*(_outputs(m, problem, kind) for kind in (torch.float64, dtype)))
    stored = decoded(problem).tables[0]
    gates["int8"] = lambda: FloatGate(*({"y": stored.to(kind)[ids[0]].sum(1)} for kind in (torch.float64, dtype)))
    # Bytes of the dense table: each touched row once, and in a step twice more; ids and results.
    rows = ids.unique().numel() * d * dtype.itemsize
    moved = float(rows + ids.nbytes + dy.nbytes)
    return Case(
        "compressed_embedding",
        request.shape,
        request.sizes,
        request.dtype,
        device,
        request.direction,
        tuple(variants),
        {},
        1.0 * ids.numel() * d * (2 if both else 1),
        moved + (2 * rows + ids.nbytes + dy.nbytes if both else 0),
        gates,
        "the result" + (" and all parameters after a step, whole" if both else ", whole"),
    )


def _read(bags: Bags, parts: Parts, *tables: torch.Tensor) -> tuple[int, float, float]:
    """Positions that may count, bytes of lists and codes, and bytes of distinct rows, of one table or one per part."""
    kept = live_positions(bags, parts)
    ids = bags.index.reshape(-1)[kept]
    rows = part_rows(ids, parts, tables[0].shape[0])
    columns = rows.unbind(1) if len(tables) > 1 else [rows]
    touched = sum(
        float(own.unique().numel() * table.shape[1] * table.element_size())
        for table, own in zip(tables, columns, strict=True)
    )
    codes = sum(
        float(stored.shape[1] * stored.element_size() * ids.unique().numel() * stored.shape[0] / parts.num_ids)
        for stored in (parts.codes, parts.rare)
        if stored is not None
    )
    return ids.numel(), nbytes(bags.index, bags.offsets, bags.weights) + codes, touched


def _cost_compose(args: GatherCompose, result: torch.Tensor) -> Cost:
    bags, parts = args.bags, args.parts
    positions, lists, rows = _read(bags, parts, args.table)
    combined = 0 if parts.operation == "concat" else parts.maps.count - 1
    flops = positions * parts.dim * (combined + 1 + (bags.weights is not None))
    return Cost(float(flops), lists + rows + nbytes(result))


def cost(call: Mapping[str, object], result: torch.Tensor) -> Cost:
    """The cost of sums of composed vectors: each distinct row, and the codes of each distinct id, are read once."""
    return _cost_compose(arguments(GatherCompose, call), result)


def cost_step(call: Mapping[str, object], result: torch.Tensor) -> Cost:
    """The cost of the lookup in a table that is trained in place."""
    return _cost_compose(arguments(GatherComposeStep, call).compose, result)


def cost_gradient(call: Mapping[str, object], result: tuple) -> Cost:
    """Cost of gradients: ids and codes are decoded once; factors and dot products also read dout and distinct rows."""
    args = arguments(ComposeGradient, call)
    positions, lists, rows = _read(args.bags, args.parts, args.table)
    count, each = args.parts.maps.count, positions * args.parts.dim
    flops = 0.0
    if args.factors:
        flops += each * count * (count - 1 + (args.bags.weights is not None))
    if args.weights:
        flops += each * (2 + (0 if args.parts.operation == "concat" else count - 1))
    values = rows + nbytes(args.dout) if args.factors or args.weights else 0.0
    return Cost(flops, lists + values + nbytes(*result))


def cost_matmul(call: Mapping[str, object], result: torch.Tensor) -> Cost:
    """The cost of sums of products: each distinct matrix is read once."""
    args = arguments(GatherMatmul, call)
    positions, lists, rows = _read(args.bags, args.parts, args.left, args.right)
    m, k, n = args.sizes
    return Cost(float(positions * m * n * (2 * k + 1 + (args.bags.weights is not None))), lists + rows + nbytes(result))


def cost_product_gradient(call: Mapping[str, object], result: tuple) -> Cost:
    """The cost of both gradients of products: a product of two matrices for each, and each array is read once."""
    args = arguments(ProductGradient, call)
    m, k, n = args.sizes
    return Cost(float(4 * int(args.offsets[-1]) * m * k * n), nbytes(*args[:-1]) + nbytes(*result))


def cost_map(call: Mapping[str, object], result: torch.Tensor) -> Cost:
    """The cost of maps: ids are read and rows written, with integer arithmetic."""
    return Cost(0.0, nbytes(call["ids"], result))


COSTS = {
    "gossamer::gather_compose": cost,
    "gossamer::gather_compose_step": cost_step,
    "gossamer::compose_gradient": cost_gradient,
    "gossamer::gather_matmul": cost_matmul,
    "gossamer::product_gradient": cost_product_gradient,
    "gossamer::map_ids": cost_map,
}
FAMILY = Family(
    "compressed_embedding",
    SHAPES,
    SYMBOLS,
    DEFAULTS,
    QUICK,
    build,
    dtypes=("fp32",),
    skews=("uniform",),
    dimensions={"rows": "N", "columns": "D", "bags": "B", "ids": "J"},
    work=("N", "B", "J"),
)


def bench_compressed_embedding(measured):
    """Entry point of pytest-benchmark."""
    measured()
