"""Expert parallelism in several gloo processes: ours against the ``all_to_all`` implementation of transformers.

Every variant has the same experts, the same tokens on each process and the same routing. Outputs and gradients are
checked against those of a single process in float64, by the rule of :mod:`gossamer.testing`, before anything is timed;
then variants take turns. The time of a call is that of the slowest process, and a ratio is the median of the ratios of
all rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import gossamer
from gossamer.bench.harness.case import DTYPES, FloatGate
from gossamer.bench.harness.parallel import SYMBOLS
from gossamer.bench.harness.timing import keep_freed_memory
from gossamer.bench.harness.traffic import SentBytes
from gossamer.parallel.planning.measure import write_answer

# The tokens and experts of each process that are checked, and the number of draws if one does not settle it.
CHECKED_TOKENS, CHECKED_EXPERTS, DRAWS = 256, 2, 3
LEAST_ROUNDS = 6

OURS = ("gossamer", "gossamer static", "gossamer overlap")


@dataclass(frozen=True)
class Problem:
    """The problem that the processes compute: the experts, and the tokens of every process.

    Attributes:
        sizes: T (tokens per process), H, I, E and K.
        dtype: dtype of all tensors.
        gate_up: ``(E, 2I, H)``.
        down: ``(E, H, I)``.
        x: ``(P, T, H)``, the tokens of all processes.
        ids: ``(P, T, K)``.
        weights: ``(P, T, K)``.
        dy: ``(P, T, H)``.
    """

    sizes: tuple[int, ...]
    dtype: torch.dtype
    gate_up: torch.Tensor
    down: torch.Tensor
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    dy: torch.Tensor

    @staticmethod
    def draw(sizes: tuple[int, ...], dtype: torch.dtype, processes: int) -> Problem:
        """Draw the problem, which is the same on every process."""
        _, h, i, e, _ = sizes
        generator = torch.Generator().manual_seed(0)
        gate_up = _normal((e, 2 * i, h), dtype, generator, h**-0.5)
        down = _normal((e, h, i), dtype, generator, i**-0.5)
        return Problem(sizes, dtype, gate_up, down, *_tokens(sizes, dtype, processes, 1))

    def with_tokens(self, count: int, seed: int) -> Problem:
        """The same experts, with ``count`` other tokens on each process."""
        sizes = (count, *self.sizes[1:])
        return Problem(sizes, self.dtype, self.gate_up, self.down, *_tokens(sizes, self.dtype, len(self.x), seed))

    def outputs(self, rank: int, checked: range, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """What a process should compute, by plain torch: its tokens' results, and gradients of ``checked`` experts."""
        x, weights = (t.flatten(0, 1).to(dtype).requires_grad_() for t in (self.x, self.weights))
        ids, mine = self.ids.flatten(0, 1), slice(rank * self.sizes[0], (rank + 1) * self.sizes[0])
        y, leaves = torch.zeros_like(x), []
        for expert in range(self.sizes[3]):
            token, slot = (ids == expert).nonzero(as_tuple=True)
            gate_up, down = (w[expert].to(dtype).requires_grad_(expert in checked) for w in (self.gate_up, self.down))
            leaves += [gate_up, down] if expert in checked else []
            gate, up = (x[token] @ gate_up.T).chunk(2, dim=1)
            rows = (torch.nn.functional.silu(gate) * up) @ down.T
            y = y.index_add(0, token, rows * weights[token, slot].unsqueeze(1))
        dx, dweights, *own = torch.autograd.grad(y, (x, weights, *leaves), self.dy.flatten(0, 1).to(dtype))
        found = {"y": y.detach()[mine], "dx": dx[mine], "dweights": dweights[mine]}
        return found | {"dgate_up": torch.stack(own[0::2]), "ddown": torch.stack(own[1::2])}


def _normal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=generator)).to(dtype)


def _tokens(sizes: tuple[int, ...], dtype: torch.dtype, processes: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Tokens, ids, routing weights and output gradients of all processes."""
    t, h, _, e, k = sizes
    generator = torch.Generator().manual_seed(seed)
    weights, ids = torch.randn((processes, t, e), generator=generator).softmax(-1).topk(k)
    shape = (processes, t, h)
    return _normal(shape, dtype, generator), ids, weights.to(dtype), _normal(shape, dtype, generator)


@dataclass
class Variant:
    """One implementation.

    Attributes:
        name: its name.
        layer: the layer, called with tokens, ids and weights.
        parameters: parameters of the layer: gate and up projections, and down projections.
    """

    name: str
    layer: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    parameters: tuple[nn.Parameter, nn.Parameter]


def _ours(problem: Problem, mesh: DeviceMesh, name: str, **options: object) -> Variant:
    from gossamer.parallel import shard_experts

    _, h, i, e, _ = problem.sizes
    experts = gossamer.nn.Experts(e, h, i, device="meta")
    experts.gate_up_proj, experts.down_proj = nn.Parameter(problem.gate_up), nn.Parameter(problem.down)
    shard_experts(experts, mesh, "expert", gradients="sum", **options)
    return Variant(name, experts, (experts.gate_up_proj, experts.down_proj))


def _theirs(problem: Problem, mesh: DeviceMesh, name: str, experts: str, exchange: str) -> Variant:
    """The experts of transformers behind one of its expert-parallel implementations."""
    from transformers.distributed.expert_parallel import apply_expert_parallelism
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

    import gossamer.integrations.transformers  # noqa: F401, registers ours

    _, h, i, e, k = problem.sizes
    config = Qwen3MoeConfig(hidden_size=h, moe_intermediate_size=i, num_experts=e, num_experts_per_tok=k)
    config._experts_implementation = experts
    holder = nn.Module()
    with torch.device("meta"):
        holder.experts = Qwen3MoeExperts(config)
    holder.experts.gate_up_proj = nn.Parameter(problem.gate_up)
    holder.experts.down_proj = nn.Parameter(problem.down)
    plan = {
        "experts.gate_up_proj": "grouped_gemm",
        "experts.down_proj": "grouped_gemm",
        "experts": "ep_dispatch_experts",
    }
    apply_expert_parallelism(holder, mesh["expert"], mesh["tensor"], plan, ep_implementation=exchange)
    return Variant(name, holder.experts, (holder.experts.gate_up_proj, holder.experts.down_proj))


def variants(problem: Problem, mesh: DeviceMesh) -> list[Variant]:
    """All implementations that can run here."""
    found = [
        _ours(problem, mesh, OURS[0]),
        # Room for as many rows per pair of processes as there are tokens, so that no row can be left out.
        _ours(problem, mesh, OURS[1], exchange="static", capacity=problem.sizes[0]),
        _ours(problem, mesh, OURS[2], overlap=True),
        _theirs(problem, mesh, "transformers all_to_all", "grouped_mm", "all_to_all"),
        _theirs(problem, mesh, "transformers all_to_all, our experts", "gossamer", "all_to_all"),
    ]
    from transformers.distributed.expert_parallel import EPImplementationInterface

    if "gossamer" in EPImplementationInterface():
        found.append(_theirs(problem, mesh, "our exchange in transformers", "gossamer", "gossamer"))
    return found


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def inputs(problem: Problem, rank: int) -> tuple[torch.Tensor, ...]:
    """Tokens, ids, routing weights and output gradients of a process."""
    x, weights = (tensor[rank].clone().requires_grad_() for tensor in (problem.x, problem.weights))
    return x, problem.ids[rank].contiguous(), weights, problem.dy[rank].contiguous()


def call(variant: Variant, given: tuple[torch.Tensor, ...], direction: str) -> tuple[torch.Tensor, ...]:
    """The output of a variant; with the backward pass, also the gradients of tokens, routing weights and experts."""
    x, ids, weights, dy = given
    if direction == "forward":
        with torch.no_grad():
            return (variant.layer(x, ids, weights),)
    y = variant.layer(x, ids, weights)
    return (y, *torch.autograd.grad(y, (x, weights, *variant.parameters), dy))


def check(problem: Problem, found: list[Variant]) -> None:
    """Check every variant on every process: the results of its tokens, and the gradients of its first experts.

    The largest of many rounding errors is a matter of chance for any implementation. So a narrow failure counts only if
    most of several draws fail.

    Raises:
        AssertionError: a variant is wrong, on every process.
    """
    rank, processes = dist.get_rank(), dist.get_world_size()
    first = problem.sizes[3] // processes * rank
    checked = range(first, first + min(CHECKED_EXPERTS, problem.sizes[3] // processes))
    failed: dict[str, list[str]] = {}
    for draw in range(DRAWS):
        drawn = problem.with_tokens(min(problem.sizes[0], CHECKED_TOKENS), draw + 2)
        truth, baseline = (drawn.outputs(rank, checked, kind) for kind in (torch.float64, problem.dtype))
        picks = dict.fromkeys(("dgate_up", "ddown"), lambda gradient: _local(gradient)[: len(checked)])
        gate, mine = FloatGate(truth, baseline, picks), {}
        for variant in found:
            verdict = gate(dict(zip(truth, call(variant, inputs(drawn, rank), "both"), strict=True)))
            if verdict.failures:
                mine[variant.name] = (list(verdict.failures), len(verdict.narrow) == len(verdict.failures))
        every: list[dict] = [{} for _ in range(processes)]
        dist.all_gather_object(every, mine)
        for name in {name: None for others in every for name in others}:
            said = [others[name] for others in every if name in others]
            failed.setdefault(name, []).append(said[0][0][0])
            if not all(narrow for _, narrow in said):
                raise AssertionError(f"{name}: {said[0][0][0]}")
        if not failed:
            return
    for name, messages in failed.items():
        if 2 * len(messages) > DRAWS:
            raise AssertionError(f"{name}: {messages[0]}")


def measure(sizes: tuple[int, ...], dtype: str, directions: tuple[str, ...], seconds: float) -> dict:
    """Check and time all variants; every process gets the same answer."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (processes, 1), mesh_dim_names=("expert", "tensor"))
    problem = Problem.draw(sizes, DTYPES[dtype], processes)
    found, given = variants(problem, mesh), inputs(problem, rank)
    check(problem, found)
    cases = []
    for direction in directions:
        traffic = {}
        for variant in found:
            with SentBytes() as traffic[variant.name]:
                call(variant, given, direction)
        times: dict[str, list[float]] = {variant.name: [] for variant in found}
        begin, rounds, going = time.perf_counter(), 0, True
        while going:
            # Each round begins with a different variant, so that a temporary slowdown of the machine affects all of
            # them.
            turn = rounds % len(found)
            for variant in found[turn:] + found[:turn]:
                dist.barrier()
                start = time.perf_counter()
                call(variant, given, direction)
                times[variant.name].append(time.perf_counter() - start)
            rounds += 1
            # The first process decides when to stop.
            more = torch.tensor(rounds < LEAST_ROUNDS or time.perf_counter() - begin < seconds / len(directions))
            dist.broadcast(more, 0)
            going = bool(more)
        # The time of the slowest process in each round; the first round only warms up.
        slowest = torch.tensor([times[variant.name][1:] for variant in found], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        rows = []
        for variant, sampled in zip(found, slowest.tolist(), strict=True):
            counted = torch.tensor([traffic[variant.name].nbytes, traffic[variant.name].collectives])
            dist.all_reduce(counted, dist.ReduceOp.MAX)
            ordered = sorted(sampled)
            rows.append(
                {
                    "name": variant.name,
                    "median": statistics.median(ordered),
                    "p20": ordered[len(ordered) // 5],
                    "p80": ordered[-1 - len(ordered) // 5],
                    "ratio": statistics.median(a / b for a, b in zip(sampled, slowest[0].tolist(), strict=True)),
                    "seconds": sampled,
                    "sent_bytes": int(counted[0]),
                    "collectives": int(counted[1]),
                }
            )
        cases.append({"direction": direction, "variants": rows})
    return {
        "processes": processes,
        "threads": torch.get_num_threads(),
        "sizes": dict(zip(SYMBOLS, sizes, strict=True)),
        "dtype": dtype,
        "one_row_a_rank_bytes": row_bytes(problem),
        "cases": cases,
    }


def row_bytes(problem: Problem) -> int:
    """Bytes of one row for each (token, other process) pair, on the process that has the most of them."""
    processes, (_, h, _, e, _) = problem.x.shape[0], problem.sizes
    owner = problem.ids // -(-e // processes)
    pairs = [
        sum(int((owner[rank] == other).any(-1).sum()) for other in range(processes) if other != rank)
        for rank in range(processes)
    ]
    return max(pairs) * h * problem.x.element_size()


def main(arguments: list[str] | None = None) -> None:
    """Measure the processes that RANK and WORLD_SIZE describe; rank 0 writes the answer."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--sizes", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--directions", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    keep_freed_memory(torch.device("cpu"))
    sizes, directions = tuple(map(int, chosen.sizes.split(","))), tuple(chosen.directions.split(","))
    write_answer(chosen.output, lambda: measure(sizes, chosen.dtype, directions, chosen.seconds))


if __name__ == "__main__":
    main()
