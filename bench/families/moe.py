"""The mixture-of-experts layer without its router: sort the assignments, run the experts, sum back to tokens."""

from __future__ import annotations

import contextlib

import torch

import gossamer
from gossamer import _backend
from gossamer._activation import Activation
from gossamer.bench.families.expert_peers import PEERS
from gossamer.bench.families.experts import (
    DEFAULTS,
    DIMENSIONS,
    QUICK,
    SHAPES,
    SYMBOLS,
    WORK,
    Problem,
    costs,
    dense_variant,
    make_gates,
    make_problem,
    make_sample,
    rule,
)
from gossamer.bench.families.skew import EXPERT_SKEWS
from gossamer.bench.harness.case import OURS, PEER, REFERENCE, Case, Family, Request, Variant
from gossamer.bench.harness.peers import Peer, Unavailable, gather
from gossamer.nn.moe.experts.block_sparse import block_sparse_mlp
from gossamer.ops.block_topology import BLOCK_SIZES

# The primitives among whose kernels nsight.py searches.
PRIMITIVES = ("dispatch", "expert_mlp")
LEAVES = {"dx": "x", "dgate_up": "gate_up", "ddown": "down", "dweights": "weights"}


def gossamer_variant(problem: Problem, name: str = "gossamer", role: str = OURS, backend: str | None = None) -> Variant:
    """The layer by :func:`gossamer.dispatch` and :func:`gossamer.expert_mlp`, with their default or other kernels."""
    x, gate_up, down, weights = (problem.leaf(leaf) for leaf in LEAVES.values())

    def forward() -> torch.Tensor:
        with gossamer.backend(backend) if backend else contextlib.nullcontext():
            dispatch = gossamer.dispatch(problem.ids, problem.num_experts)
            return gossamer.expert_mlp(x, gate_up, down, dispatch, weights)

    return Variant(name, role, forward, dict(zip(LEAVES, (x, gate_up, down, weights), strict=True)), problem.dy)


def cuda_variant(problem: Problem) -> tuple[list[Variant], dict[str, str]]:
    """The layer by the CUDA kernels, beside Triton's, on a GPU that has both; else the reason why not."""
    name = "gossamer, CUDA kernels"
    if not problem.x.is_cuda:
        return [], {}
    if reason := _backend.cuda_kernels_unavailable() or _backend.hopper_refuses(problem.x):
        return [], {name: reason}
    return [gossamer_variant(problem, name, PEER, "cuda")], {}


def block_sparse(name: str, role: str, problem: Problem) -> Variant:
    """The same layer in block-sparse form, as :class:`gossamer.nn.Experts` computes it."""
    i = problem.down.shape[2]
    if i % BLOCK_SIZES[0]:
        raise Unavailable(f"block-sparse form needs I in blocks of {BLOCK_SIZES[0]}, got {i}")
    if _backend.resolve("block_sparse", problem.x) == "reference":
        raise Unavailable("plain torch computes block-sparse products as dense ones")
    x, gate_up, down, weights = (problem.leaf(name) for name in LEAVES.values())

    def forward() -> torch.Tensor:
        dispatch = gossamer.dispatch(problem.ids, problem.num_experts)
        return block_sparse_mlp(x, gate_up, down, dispatch, weights, activation=Activation("swiglu"))

    leaves = dict(zip(LEAVES, (x, gate_up, down, weights), strict=True))
    return Variant(name, role, forward, leaves, problem.dy, gate="plain")


# The block-sparse form is listed as a peer, so that --peers can leave it out.
ALL_PEERS = (*PEERS, Peer("gossamer block-sparse", None, "gossamer", block_sparse, role=REFERENCE))


def build(request: Request) -> Case:
    """Build the layer with every reference and peer that is installed."""
    problem = make_problem(request)
    sample = make_sample(problem)
    by_cuda, refused = cuda_variant(problem)
    peers, skipped = gather(ALL_PEERS, request, problem)
    flops, moved = costs(problem, request.direction)
    return Case(
        "moe",
        request.shape,
        request.sizes,
        request.dtype,
        request.device,
        request.direction,
        (gossamer_variant(problem), *by_cuda, dense_variant(request), *peers),
        refused | skipped,
        flops,
        moved,
        make_gates(problem, sample, request),
        sample.words,
        f"{request.skew} routing",
    )


FAMILY = Family(
    "moe",
    SHAPES,
    SYMBOLS,
    DEFAULTS,
    QUICK,
    build,
    skews=EXPERT_SKEWS,
    dimensions=DIMENSIONS,
    work=WORK,
    peers=ALL_PEERS,
    rule=rule,
)


def bench_moe(measured):
    """Entry point of pytest-benchmark."""
    measured()
