"""Lookups and training steps of a dynamic embedding that holds all keys, beside those of static tables.

Sizes, ids, popularity and least bytes are those of :mod:`gossamer.bench.families.embedding` for one table; bytes read
to find a key are not counted. Ids are spread over int64 for the dynamic table.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gossamer.bench.families.embedding import EPS, SKEWS, dense_layer, draw_ids, gossamer_layer, step_outputs
from gossamer.bench.families.embedding_peers import PEERS
from gossamer.bench.families.hash_table import keys_of
from gossamer.bench.families.tables import LR, SAMPLE, Problem, Training, training
from gossamer.bench.harness.case import DENSE, DTYPES, OURS, REFERENCE, Case, Family, FloatGate, Request
from gossamer.bench.harness.peers import gather
from gossamer.nn import DynamicEmbedding
from gossamer.optim import SGD, Optimizer, RowwiseAdagrad

SHAPES = {
    "bag-64": (10_000_000, 64, 65536, 20),
    "bag-128": (10_000_000, 128, 65536, 20),
    "cpu-bag": (1_000_000, 64, 8192, 20),
    "cpu-16": (1_000_000, 16, 8192, 20),
    "cpu-256": (250_000, 256, 8192, 20),
}
SYMBOLS = ("N", "D", "B", "J")
DEFAULTS = {"cpu": ("cpu-bag",), "cuda": ("bag-64", "bag-128")}
QUICK = {"cpu": "cpu-bag", "cuda": "bag-128"}
LOAD = 0.75


class _Rows:
    """The rows of a dynamic embedding by the ids of the static problem."""

    def __init__(self, layer: DynamicEmbedding) -> None:
        self.layer = layer

    def detach(self) -> _Rows:
        """Return itself, since nothing records reads from it."""
        return self

    def __getitem__(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layer.table.find(keys_of(ids))[0]


def _dynamic(name: str, problem: Problem, optimizer: Optimizer | None, gate: str) -> Training:
    n, d = problem.tables[0].shape
    device = problem.ids.device
    layer = DynamicEmbedding(d, max(int(n / LOAD), n), optimizer=optimizer, dtype=problem.dy.dtype, device=device)
    layer.table.insert_or_assign(keys_of(torch.arange(n, device=device)), problem.tables[0])
    layer.train(problem.both)
    keys = keys_of(problem.ids[0])
    return training(name, OURS, problem, lambda: layer(keys), [_Rows(layer)], gate)


def _static(name: str, problem: Problem, optimizer: Optimizer | None, gate: str) -> Training:
    layer, args, views = gossamer_layer(problem, optimizer)
    return training(name, REFERENCE, problem, lambda: layer(*args), views, gate)


def build(request: Request) -> Case:
    """Build :class:`gossamer.nn.DynamicEmbedding` beside static tables of ours, of torch.nn, FBGEMM and TorchRec."""
    n, d, bags, _ = (request.sizes[s] for s in SYMBOLS)
    device, dtype, both = request.device, DTYPES[request.dtype], request.direction == "both"
    generator = torch.Generator(device).manual_seed(request.seed)
    ids = draw_ids(request, generator)
    dy = torch.randn(bags, d, generator=generator, device=device).to(dtype)
    problem = Problem([torch.randn(n, d, generator=generator, device=device).to(dtype)], ids, dy, both)
    sgd, adagrad = SGD(lr=LR), RowwiseAdagrad(lr=LR, eps=EPS)
    pairs: list[tuple[str, Optimizer | None, str]] = [(" SGD" if both else "", sgd if both else None, "truth")]
    if both:
        pairs.append((" row-wise Adagrad", adagrad, "row-wise"))
    make: tuple[tuple[str, Callable], ...] = (("dynamic", _dynamic), ("static", _static))
    variants = [one(f"gossamer {kind}{name}", problem, opt, gate) for kind, one in make for name, opt, gate in pairs]
    others, skipped = gather(PEERS, request, problem)
    touched = int(ids.unique().numel())
    moved = float(touched * d * dtype.itemsize + ids.nbytes + dy.nbytes)
    if both:
        moved += 2 * touched * d * dtype.itemsize + ids.nbytes + dy.nbytes

    def gate(optimizer: Optimizer) -> FloatGate:
        step = optimizer if both else None
        return FloatGate(step_outputs(problem, torch.float64, step), step_outputs(problem, dtype, step))

    return Case(
        "dynamic_embedding",
        request.shape,
        request.sizes,
        request.dtype,
        device,
        request.direction,
        (*variants, dense_layer(problem, DENSE), *others),
        skipped,
        1.0 * ids.numel() * d * (2 if both else 1),
        moved,
        {"truth": lambda: gate(sgd), "row-wise": lambda: gate(adagrad)},
        f"the result, whole, and after a step the {SAMPLE} most listed rows",
        f"ids of exponent {SKEWS[request.skew]:g}, {touched / ids.numel():.0%} of them distinct, load {LOAD:g}",
    )


FAMILY = Family(
    "dynamic_embedding",
    SHAPES,
    SYMBOLS,
    DEFAULTS,
    QUICK,
    build,
    skews=tuple(SKEWS),
    dimensions={"rows": "N", "columns": "D", "bags": "B", "ids": "J"},
    work=("N", "B", "J"),
    peers=PEERS,
)


def bench_dynamic_embedding(measured):
    """Entry point of pytest-benchmark."""
    measured()
