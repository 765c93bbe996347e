"""Embedding layers: lookups and pooled bags of one table or many, forward, and with a training step of plain SGD.

"both" is forward, backward and the optimizer's step, which our layers take inside the backward pass. Its least bytes
are: each touched row read, read again and written; ids read once per pass; results and their gradient once. Row-wise
Adagrad's four bytes per row are not counted. A single table in float32 is also timed as a table of 8-bit codes, whose
results are judged by the numbers that the codes stand for.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from gossamer.bench.families.embedding_peers import PEERS
from gossamer.bench.families.tables import LR, SAMPLE, Problem, Training, training
from gossamer.bench.harness.case import DENSE, DTYPES, OURS, PEER, Case, Family, FloatGate, Outputs, Request
from gossamer.bench.harness.peers import gather
from gossamer.nn import Embedding, EmbeddingBag, QuantizedEmbedding, TableBatchedEmbeddingBags
from gossamer.optim import SGD, Optimizer, RowwiseAdagrad

SHAPES = {
    "lookup": (1_000_000, 128, 1_048_576, 1, 1),
    "bag-64": (10_000_000, 64, 65536, 20, 1),
    "bag-128": (10_000_000, 128, 65536, 20, 1),
    "tables": (1_000_000, 128, 8192, 20, 8),
    "cpu-lookup": (1_000_000, 64, 65536, 1, 1),
    "cpu-bag": (1_000_000, 64, 8192, 20, 1),
    "cpu-16": (1_000_000, 16, 4096, 20, 1),
    "cpu-tables": (100_000, 64, 2048, 10, 8),
}
SYMBOLS = ("N", "D", "B", "J", "T")
DEFAULTS = {"cpu": ("cpu-lookup", "cpu-bag", "cpu-tables"), "cuda": ("lookup", "bag-64", "bag-128", "tables")}
QUICK = {"cpu": "cpu-bag", "cuda": "bag-128"}
# Exponent of the popularity of ids, by name.
SKEWS = {"uniform": 0.0, "zipf": 1.0, "1.05": 1.05, "1.15": 1.15}
EPS = 1e-8


def draw_ranks(
    n: int, exponent: float, shape: tuple[int, ...], generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    """Ranks in ``[0, n)`` by a power law of that exponent; 0 is the most popular."""
    u = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
    gamma = 1 - exponent
    if gamma == 0:
        rank = torch.exp(u * math.log(n + 1)) - 1
    else:
        rank = (u * ((n + 1) ** gamma - 1) + 1) ** (1 / gamma) - 1
    return rank.long().clamp_(0, n - 1)


def draw_ids(request: Request, generator: torch.Generator) -> torch.Tensor:
    """``(T, B, J)`` ids by a power law; each rank has its own row, and ids may repeat within bags."""
    n, bags, length = (request.sizes[s] for s in ("N", "B", "J"))
    shape = (request.sizes.get("T", 1), bags, length)
    # A prime step through the rows, so that popular ones are not neighbours.
    return (draw_ranks(n, SKEWS[request.skew], shape, generator, request.device) * 2_147_483_647) % n


def step_outputs(problem: Problem, dtype: torch.dtype, optimizer: Optimizer | None) -> Outputs:
    """The result, and the sampled rows after a step, by plain torch in ``dtype`` with sums in float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    dim = problem.tables[0].shape[1]
    ys, rows = [], []
    for t, (table, ids, sampled) in enumerate(zip(problem.tables, problem.ids, problem.sampled(), strict=True)):
        y = torch.zeros(ids.shape[0], dim, dtype=wide, device=ids.device)
        for j in range(ids.shape[1]):
            y += table[ids[:, j]].to(dtype).to(wide)
        ys.append(y.to(dtype))
        if optimizer is None:
            continue
        place = torch.full((table.shape[0],), -1, device=ids.device).index_copy(
            0, sampled, torch.arange(len(sampled), device=ids.device)
        )[ids]
        grad = torch.zeros(len(sampled) + 1, dim, dtype=wide, device=ids.device)
        dy = problem.dy[:, t * dim : (t + 1) * dim].to(dtype).to(wide)
        for j in range(ids.shape[1]):
            grad.index_add_(0, torch.where(place[:, j] < 0, len(sampled), place[:, j]), dy)
        grad = grad[:-1]
        if isinstance(optimizer, RowwiseAdagrad):
            grad = grad / (grad.square().mean(1, keepdim=True).sqrt() + EPS)
        rows.append((table[sampled].to(dtype).to(wide) - LR * grad).to(dtype))
    found = {"y": torch.cat(ys, 1)}
    return found if optimizer is None else found | {"rows": torch.cat(rows)}


def gossamer_layer(problem: Problem, optimizer: Optimizer | None) -> tuple[torch.nn.Module, tuple, list[torch.Tensor]]:
    """Our layer over copies of the tables, its arguments, and its tables."""
    n, d = problem.tables[0].shape
    tables, _, length = problem.ids.shape
    options = {"device": problem.ids.device, "optimizer": optimizer}
    if tables > 1:
        layer = TableBatchedEmbeddingBags([(n, d)] * tables, weights_dtype=problem.dy.dtype, **options)
        args, views = (problem.ids.reshape(-1), problem.offsets), layer.split_embedding_weights()
    else:
        options["dtype"] = problem.dy.dtype
        layer = Embedding(n, d, **options) if length == 1 else EmbeddingBag(n, d, mode="sum", **options)
        args, views = (problem.ids[0, :, 0] if length == 1 else problem.ids[0],), [layer.weight.detach()]
    for view, table in zip(views, problem.tables, strict=True):
        view.copy_(table)
    return layer, args, views


def _ours(name: str, problem: Problem, optimizer: Optimizer | None, gate: str) -> Training:
    layer, args, views = gossamer_layer(problem, optimizer)
    return training(name, OURS, problem, lambda: layer(*args), views, gate)


def dense_layer(problem: Problem, role: str) -> Training:
    """torch.nn's layers with sparse gradients, and torch.optim.SGD."""
    length = problem.ids.shape[2]
    layers, inputs = [], []
    for table, ids in zip(problem.tables, problem.ids, strict=True):
        options = {"freeze": False, "sparse": problem.both}
        if length == 1:
            layers.append(torch.nn.Embedding.from_pretrained(table.clone(), **options))
            inputs.append(ids[:, 0].contiguous())
        else:
            layers.append(torch.nn.EmbeddingBag.from_pretrained(table.clone(), mode="sum", **options))
            inputs.append(ids.contiguous())
    optimizer = torch.optim.SGD([layer.weight for layer in layers], lr=LR)

    def forward() -> torch.Tensor:
        ys = [layer(ids) for layer, ids in zip(layers, inputs, strict=True)]
        return ys[0] if len(ys) == 1 else torch.cat(ys, 1)

    def step(y: torch.Tensor) -> None:
        y.backward(problem.dy)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    name = "torch.nn" if not problem.both else "torch.nn sparse + SGD"
    # It coalesces duplicates in the table's dtype, which the gate would call wrong if ids are skewed.
    return training(name, role, problem, forward, [layer.weight for layer in layers], None, step)


def quantized_bags(problem: Problem, optimizer: Optimizer | None, lr: float = LR) -> list[Training]:
    """Bags of a table of 8-bit codes: ours, and plain torch, which decodes the listed rows to floats and steps them."""
    ids, name = problem.ids[0], "int8 SGD" if optimizer else "int8"
    # The optimizer is set later: a table that starts with one is rounded stochastically.
    layers = [QuantizedEmbedding.from_table(problem.tables[0], bits=8) for _ in range(2)]
    layers[0].attach(optimizer)
    codes, scale = layers[1].weight.detach(), layers[1].scale
    bags = torch.arange(ids.shape[0], device=ids.device).repeat_interleave(ids.shape[1])

    def forward() -> torch.Tensor:
        return (codes[ids].float() * scale).sum(1)

    def step(y: torch.Tensor) -> None:
        rows, places = ids.flatten().unique(return_inverse=True)
        grad = torch.zeros(len(rows), codes.shape[1], device=ids.device).index_add_(0, places, problem.dy[bags])
        v = ((codes[rows].float() * scale - lr * grad) / scale).clamp_(-128, 127)
        low = v.floor()
        codes[rows] = (low + (torch.rand_like(v) < v - low)).to(torch.int8)

    numbers = [layer.weight.detach() for layer in layers]
    return [
        training(f"gossamer {name}", OURS, problem, lambda: layers[0](ids), numbers[:1], "int8"),
        training(f"plain torch {name}", PEER, problem, forward, numbers[1:], "int8", step),
    ]


def decoded(problem: Problem) -> Problem:
    """The problem with its tables replaced by the numbers that their 8-bit codes stand for."""
    tables = []
    for table in problem.tables:
        layer = QuantizedEmbedding.from_table(table, bits=8)
        tables.append(layer.weight.detach().float() * layer.scale)
    return dataclasses.replace(problem, tables=tables)


def build(request: Request) -> Case:
    """Build gossamer.nn's embedding layers beside torch.nn's, FBGEMM's and TorchRec's."""
    n, d, bags, _, tables = (request.sizes[s] for s in SYMBOLS)
    device, dtype, both = request.device, DTYPES[request.dtype], request.direction == "both"
    generator = torch.Generator(device).manual_seed(request.seed)
    ids = draw_ids(request, generator)
    dy = torch.randn(bags, tables * d, generator=generator, device=device).to(dtype)
    initial = [torch.randn(n, d, generator=generator, device=device).to(dtype) for _ in range(tables)]
    problem = Problem(initial, ids, dy, both)
    sgd, adagrad = SGD(lr=LR), RowwiseAdagrad(lr=LR, eps=EPS)
    ours = [_ours("gossamer SGD" if both else "gossamer", problem, sgd if both else None, "truth")]
    if both:
        ours.append(_ours("gossamer row-wise Adagrad", problem, adagrad, "row-wise"))
    if tables == 1 and problem.ids.shape[2] > 1 and dtype == torch.float32:
        ours += quantized_bags(problem, sgd if both else None)
    others, skipped = gather(PEERS, request, problem)
    touched = sum(int(part.unique().numel()) for part in ids)
    moved = float(touched * d * dtype.itemsize + ids.nbytes + dy.nbytes)
    if both:
        moved += 2 * touched * d * dtype.itemsize + ids.nbytes + dy.nbytes

    def gate(optimizer: Optimizer | None, problem: Problem = problem) -> FloatGate:
        step = optimizer if both else None
        return FloatGate(step_outputs(problem, torch.float64, step), step_outputs(problem, dtype, step))

    return Case(
        "embedding",
        request.shape,
        request.sizes,
        request.dtype,
        device,
        request.direction,
        (*ours, dense_layer(problem, DENSE), *others),
        skipped,
        1.0 * ids.numel() * d * (2 if both else 1),
        moved,
        # After a step rows of codes are rounded stochastically, so only their results are judged.
        {
            "truth": lambda: gate(sgd),
            "row-wise": lambda: gate(adagrad),
            "int8": lambda: gate(None, decoded(problem)),
        },
        f"the result, whole, and after a step the {SAMPLE} most listed rows of each table",
        f"ids of exponent {SKEWS[request.skew]:g}, {touched / ids.numel():.0%} of them distinct",
    )


FAMILY = Family(
    "embedding",
    SHAPES,
    SYMBOLS,
    DEFAULTS,
    QUICK,
    build,
    skews=tuple(SKEWS),
    dimensions={"rows": "N", "columns": "D", "bags": "B", "ids": "J", "tables": "T"},
    work=("N", "B", "J"),
    peers=PEERS,
)


def bench_embedding(measured):
    """Entry point of pytest-benchmark."""
    measured()
