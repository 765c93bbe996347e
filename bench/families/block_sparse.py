"""A linear layer that stores only some blocks of its weight, beside the dense layer of the same shape."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
import torch.nn.functional as F

import gossamer
from gossamer import BlockSparseTensor, BlockTopology
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
from gossamer.bench.harness.cold import copies, in_turn, passes
from gossamer.bench.harness.cost import Cost, nbytes
from gossamer.bench.harness.peers import Peer, gather
from gossamer.ops.block_topology import BLOCK_SIZES

SYMBOLS = ("M", "N", "K", "BLOCK", "SPARSE")
SHAPES = {
    "4096-128-75": (8192, 4096, 4096, 128, 75),
    "4096-128-90": (8192, 4096, 4096, 128, 90),
    "4096-64-75": (8192, 4096, 4096, 64, 75),
    "8192-128-90": (8192, 8192, 8192, 128, 90),
    "cpu-75": (1024, 2048, 2048, 32, 75),
    "cpu-90": (1024, 2048, 2048, 32, 90),
    "decode-1-50": (1, 4096, 4096, 64, 50),
    "decode-1-75": (1, 4096, 4096, 64, 75),
    "decode-4-75": (4, 4096, 4096, 64, 75),
    "decode-16-75": (16, 4096, 4096, 64, 75),
    "decode-1-97": (1, 4096, 4096, 32, 97),
}
DIMENSIONS = {"rows": "M", "outputs": "N", "inputs": "K", "block": "BLOCK", "sparsity": "SPARSE"}
DEFAULTS = {
    "cpu": ("cpu-75", "cpu-90", "decode-1-50", "decode-1-75", "decode-4-75", "decode-16-75", "decode-1-97"),
    "cuda": ("4096-128-75", "4096-128-90", "4096-64-75", "8192-128-90"),
}
QUICK = {"cpu": "cpu-75", "cuda": "4096-128-75"}


def rule(sizes: Mapping[str, int]) -> str | None:
    """The reason why a shape is invalid, or None."""
    n, k, block, sparse = (sizes[s] for s in SYMBOLS[1:])
    if block not in BLOCK_SIZES:
        return f"BLOCK must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block}"
    if n % block or k % block:
        return f"N and K must be multiples of BLOCK, got N={n}, K={k} and BLOCK={block}"
    if sparse > 99:
        return f"SPARSE is the percentage of blocks left out, at most 99, got {sparse}"
    return None


def _topology(request: Request) -> BlockTopology:
    """Blocks with equal chance everywhere, or with weight 1/r in the block row of rank r, or nearly all in one row."""
    _, n, k, block, sparse = (request.sizes[s] for s in SYMBOLS)
    generator = torch.Generator().manual_seed(request.seed)
    if request.skew == "uniform":
        drawn = BlockTopology.random((n, k), block, 1 - sparse / 100, generator=generator)
        return drawn.to(request.device)
    rows, columns = n // block, k // block
    weights = 1 / torch.arange(1, rows + 1) if request.skew == "zipf" else torch.eye(rows)[-1] + 1e-6
    # Weighted sampling without replacement: the largest u^(1/w).
    keys = torch.rand(rows, columns, generator=generator).log() / weights.unsqueeze(1)
    chosen = keys.view(-1).topk(round((1 - sparse / 100) * rows * columns)).indices
    mask = torch.zeros(rows * columns, dtype=torch.bool).index_fill(0, chosen, True).view(rows, columns)
    return BlockTopology.from_mask(mask.to(request.device), block)


class Problem:
    """Inputs of a case: ``x (M, K)``, ``dy (M, N)`` and the sparse ``weight (N, K)``."""

    def __init__(self, request: Request):
        m, n, k = (request.sizes[s] for s in SYMBOLS[:3])
        generator = torch.Generator(request.device).manual_seed(request.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=request.device).to(DTYPES[request.dtype])

        self.topology = _topology(request)
        self.x, self.dy = normal(m, k), normal(m, n)
        self.values = normal(self.topology.nnz_blocks, *self.topology.block) / max(1, k * self.topology.density) ** 0.5

    @property
    def weight(self) -> BlockSparseTensor:
        """The weight over the values, without a copy."""
        return BlockSparseTensor(self.values, self.topology)

    def blocks(self, dense: torch.Tensor) -> torch.Tensor:
        """The values of a dense ``(N, K)`` matrix at the weight's blocks."""
        return BlockSparseTensor.from_dense(dense, self.topology).values

    def outputs(self, both: bool, dtype: torch.dtype) -> Outputs:
        """The results of a dense product in plain torch in ``dtype``: the gate's baseline, and its truth."""
        x, dy, weight = self.x.to(dtype), self.dy.to(dtype), self.weight.to_dense().to(dtype)
        found = {"y": x @ weight.t()}
        return found | {"dx": dy @ weight, "dvalues": self.blocks(dy.t() @ x)} if both else found


def masked_dense(name: str, role: str, problem: Problem) -> Variant:
    """The usual way without sparse kernels: a dense weight, multiplied by its mask in every call."""
    x = problem.x.detach().requires_grad_()
    weight = problem.weight.to_dense().requires_grad_()
    ones = BlockSparseTensor(torch.ones_like(problem.values), problem.topology)
    mask = ones.to_dense()

    def layout(outputs: Outputs) -> Outputs:
        return outputs | ({"dvalues": problem.blocks(outputs["dvalues"])} if "dvalues" in outputs else {})

    return Variant(
        name, role, lambda: F.linear(x, weight * mask), {"dx": x, "dvalues": weight}, problem.dy, layout=layout
    )


def torch_bsr(name: str, role: str, problem: Problem) -> Variant:
    """Torch's linear layer with a weight in its BSR layout."""
    x = problem.x.detach().requires_grad_()
    with warnings.catch_warnings():
        # Torch warns at every tensor in that layout that the layout is in beta; here it is only a reference.
        warnings.filterwarnings("ignore", "Sparse BSR tensor support")
        weight = problem.weight.to_sparse_bsr().requires_grad_()

    def layout(outputs: Outputs) -> Outputs:
        return outputs | ({"dvalues": outputs["dvalues"].values()} if "dvalues" in outputs else {})

    return Variant(name, role, lambda: F.linear(x, weight), {"dx": x, "dvalues": weight}, problem.dy, layout=layout)


PEERS = (
    # Peers with a backward pass everywhere come first, since a profile compares ours with the first one.
    Peer("masked dense", None, "torch", masked_dense, REFERENCE),
    Peer("torch BSR", None, "torch", torch_bsr, REFERENCE),
)


def _few_rows(problem: Problem, count: int) -> tuple[Variant, Variant]:
    """Our layer and the dense one, over weights that must come from memory."""
    x, full = problem.x, problem.weight.to_dense()

    def product(values: torch.Tensor) -> torch.Tensor:
        return gossamer.dds(x, BlockSparseTensor(values, problem.topology).t())

    def variant(name: str, role: str, call, weight: torch.Tensor, gate: str | None) -> Variant:
        forward = in_turn(call, copies(weight, torch.Tensor.clone, weight.nbytes, count))
        return Variant(name, role, forward, gate=gate, bytes=float(weight.nbytes * count))

    return (
        variant("gossamer", OURS, product, problem.values, "truth"),
        variant("dense linear", DENSE, lambda w: F.linear(x, w), full, None),
    )


def build(request: Request) -> Case:
    """Build ``gossamer.dds(x, weight.t())`` beside the dense layer of the same shape, which multiplies all blocks."""
    problem, both = Problem(request), request.direction == "both"
    x, values = problem.x.detach().requires_grad_(), problem.values.detach().requires_grad_()
    weight = BlockSparseTensor(values, problem.topology).t()
    ours = Variant("gossamer", OURS, lambda: gossamer.dds(x, weight), {"dx": x, "dvalues": values}, problem.dy)
    dense_x, dense_weight = x.detach().clone().requires_grad_(), problem.weight.to_dense().requires_grad_()
    dense = Variant(
        "dense linear",
        DENSE,
        lambda: F.linear(dense_x, dense_weight),
        {"dx": dense_x, "dweight": dense_weight},
        problem.dy,
        gate=None,
    )
    peers, skipped = gather(PEERS, request, problem)
    flops = 2.0 * problem.x.shape[0] * values.numel()
    moved = nbytes(problem.x, values, problem.dy) + 8.0 * problem.topology.nnz_blocks
    count = 1 if both or problem.x.is_cuda else passes(values.nbytes, problem.x.shape[0])
    if count > 1:
        (ours, dense), peers = _few_rows(problem, count), []
        flops, moved = flops * count, moved * count
    return Case(
        "block_sparse",
        request.shape,
        request.sizes,
        request.dtype,
        request.device,
        request.direction,
        (ours, dense, *peers),
        skipped,
        flops * (3 if both else 1),
        moved * (2 if both else 1),
        {
            "truth": lambda: FloatGate(
                problem.outputs(both, torch.float64), problem.outputs(both, DTYPES[request.dtype])
            )
        },
        "every output, whole",
        f"{request.skew} topology" + (f", {count} weights in turn" if count > 1 else ""),
    )


def _product_cost(flops: float, moved: float, kernel: str) -> Cost:
    return Cost(flops, moved, {kernel: Cost(flops, moved)})


def cost_dsd(call: Mapping[str, object], result: object) -> Cost:
    """The cost of a product with a sparse operand: its blocks, the dense operand and the result."""
    values, b = call["values"], call["b"]
    blocks = int(call["topology_row_offsets"][-1])
    size = values.shape[1] * values.shape[2]
    moved = blocks * (size * values.element_size() + 8) + nbytes(b, call["bias"], result)
    return _product_cost(2.0 * blocks * size * b.shape[-1], moved, "_dsd_kernel")


def cost_sdd(call: Mapping[str, object], result: object) -> Cost:
    """The cost of a product sampled at blocks: both operands and the result."""
    a, blocks = call["a"], int(call["topology_row_offsets"][-1])
    moved = nbytes(a, call["b"], call["bias"], result) + 8.0 * blocks
    return _product_cost(2.0 * blocks * call["bm"] * call["bn"] * a.shape[1], moved, "_sdd_kernel")


COSTS = {"gossamer::block_sparse_dsd": cost_dsd, "gossamer::block_sparse_sdd": cost_sdd}
FAMILY = Family(
    "block_sparse",
    SHAPES,
    SYMBOLS,
    DEFAULTS,
    QUICK,
    build,
    dimensions=DIMENSIONS,
    work=("M",),
    peers=PEERS,
    rule=rule,
)


def bench_block_sparse(measured):
    """Entry point of pytest-benchmark."""
    measured()
