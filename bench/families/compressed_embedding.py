"""Bags of compressed tables, decoded as they are read, beside the same in plain torch and a dense table.

Variants have tables of their own, so that a ratio to the dense baseline is what compression costs in time. With the
backward pass their gradients are dense. Plain torch stores what it decodes: indices, rows and vectors of all ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

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
from gossamer.nn import CompositionalEmbedding, EmbeddingBag, RandomBlockEmbedding, Table, TensorTrainEmbedding
from gossamer.nn.embeddings.codes import CodedRowsTable

SYMBOLS = ("N", "D", "B", "J")
SHAPES = {"million": (1_000_000, 16, 4096, 20), "small": (10_000, 16, 512, 20)}
DEFAULTS = {"cpu": ("million",), "cuda": ("million",)}
QUICK = {"cpu": "million", "cuda": "million"}
# Codewords per part, and weights of an array by ids.
CODES, PARTS, SHARE, RANK = 256, 4, 10, 16
PRIMITIVES = ("gather_compose", "gather_matmul")

Vectors = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Method:
    """A table, and its vectors ``(ids.shape, D)`` in plain torch as a function of ids and parameters."""

    table: Table
    vectors: Vectors


def _compositional(n: int, d: int, device: torch.device, operation: str) -> Method:
    table = CompositionalEmbedding(n, d, operation=operation, device=device)
    m = table.moduli[0]

    def vectors(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        first, second = F.embedding(ids % m, weight), F.embedding(m + ids // m, weight)
        if operation == "concat":
            return torch.cat([first, second], -1)
        return first * second if operation == "mul" else first + second

    return Method(table, vectors)


def _coded(n: int, d: int, device: torch.device, generator: torch.Generator) -> Method:
    codes = torch.randint(CODES, (n, PARTS), generator=generator, device=device)
    table = CodedRowsTable(n, d, codes, [CODES] * PARTS, operation="concat", device=device)
    stored, first = codes.to(torch.uint8), torch.arange(PARTS, device=device) * CODES

    def vectors(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.embedding(stored[ids].long() + first, weight).flatten(-2)

    return Method(table, vectors)


def _blocks(n: int, d: int, device: torch.device) -> Method:
    table = RandomBlockEmbedding(n, d, max(n * d // SHARE, d), block_size=d, device=device)
    maps = table.parts().maps
    (modulus, _, _, multiplier, addend), within = maps.numbers()[0], torch.arange(d, device=device)

    def vectors(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        start = (ids * multiplier + addend) % maps.prime % modulus
        return F.embedding(start.unsqueeze(-1) + within, weight).squeeze(-1)

    return Method(table, vectors)


def _tensor_train(n: int, d: int, device: torch.device) -> Method:
    table = TensorTrainEmbedding(n, d, (RANK, RANK), device=device)
    (_, n2, n3), (d1, d2, d3) = table.row_factors, table.dim_factors

    def vectors(ids: torch.Tensor, *cores: torch.Tensor) -> torch.Tensor:
        flat = ids.flatten()
        rows = [
            F.embedding(i, core) for i, core in zip((flat // n3 // n2, flat // n3 % n2, flat % n3), cores, strict=True)
        ]
        left = torch.bmm(rows[0].view(-1, d1, RANK), rows[1].view(-1, RANK, d2 * RANK))
        return torch.bmm(left.view(-1, d1 * d2, RANK), rows[2].view(-1, RANK, d3)).view(*ids.shape, d)

    return Method(table, vectors)


def _methods(n: int, d: int, device: torch.device, generator: torch.Generator) -> dict[str, Method]:
    operations = {"added": "add", "multiplied": "mul", "joined": "concat"}
    methods = {
        f"quotient-remainder {name}": _compositional(n, d, device, operation) for name, operation in operations.items()
    }
    return methods | {
        "codes": _coded(n, d, device, generator),
        "random blocks": _blocks(n, d, device),
        f"tensor train of rank {RANK}": _tensor_train(n, d, device),
    }


def _outputs(method: Method, ids: torch.Tensor, dy: torch.Tensor, both: bool, dtype: torch.dtype) -> Outputs:
    leaves = {f"d{k}": p.detach().to(dtype).requires_grad_() for k, p in method.table.named_parameters()}
    y = method.vectors(ids, *leaves.values()).sum(1)
    found = {"y": y.detach()}
    if both:
        found |= dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.to(dtype)), strict=True))
    return found


def build(request: Request) -> Case:
    """Each method beside itself in plain torch, and a dense table."""
    n, d, bags, length = (request.sizes[s] for s in SYMBOLS)
    device, dtype, both = request.device, DTYPES[request.dtype], request.direction == "both"
    generator = torch.Generator(device).manual_seed(request.seed)
    ids = torch.randint(n, (bags, length), generator=generator, device=device)
    dy = torch.randn(bags, d, generator=generator, device=device).to(dtype)
    dense = EmbeddingBag(n, d, mode="sum", device=device)
    methods = _methods(n, d, device, generator)
    plain = torch.nn.EmbeddingBag.from_pretrained(dense.weight.detach(), freeze=False, mode="sum")
    variants = []
    for name, method in methods.items():
        leaves = {f"d{k}": p for k, p in method.table.named_parameters()}
        variants.append(Variant(name, OURS, lambda t=method.table: t(ids), leaves, dy, gate=name))
    leaf = {"dweight": plain.weight}
    variants.append(Variant("dense torch.nn", DENSE, lambda: plain(ids), leaf, dy, gate=None))
    variants.append(Variant("dense gossamer", REFERENCE, lambda: dense(ids), {"dweight": dense.weight}, dy, gate=None))
    for name, method in methods.items():
        leaves = {f"d{k}": p for k, p in method.table.named_parameters()}

        def forward(method: Method = method, leaves: dict = leaves) -> torch.Tensor:
            return method.vectors(ids, *leaves.values()).sum(1)

        variants.append(Variant(f"{name}, plain torch", REFERENCE, forward, leaves, dy, gate=None))

    def gate(method: Method) -> FloatGate:
        return FloatGate(*(_outputs(method, ids, dy, both, kind) for kind in (torch.float64, dtype)))

    # Of the dense table: each row once, ids and results.
    moved = float(ids.unique().numel() * d * dtype.itemsize + ids.nbytes + dy.nbytes)
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
        moved * (2 if both else 1),
        {name: lambda m=method: gate(m) for name, method in methods.items()},
        "the result" + (" and all gradients, whole" if both else ", whole"),
    )


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
