"""Weighted sums of table rows over bags of equal length."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

import gossamer
from gossamer.bench.harness.case import DENSE, DTYPES, OURS, Case, Family, FloatGate, Request, Variant
from gossamer.bench.harness.cost import Cost, nbytes

SHAPES = {
    "embedding-bag": (1_000_000, 128, 65536, 20),
    "moe-combine": (131072, 2048, 16384, 8),
    "cpu-bag": (100_000, 64, 8192, 20),
    "cpu-combine": (32768, 512, 4096, 8),
}
SYMBOLS = ("N", "D", "B", "J")
DEFAULTS = {"cpu": ("cpu-bag", "cpu-combine"), "cuda": ("embedding-bag", "moe-combine")}
QUICK = {"cpu": "cpu-bag", "cuda": "embedding-bag"}


def _draw_ids(request: Request, generator: torch.Generator) -> torch.Tensor:
    n, _, bags, length = (request.sizes[s] for s in SYMBOLS)
    if request.skew == "one":
        return torch.full((bags, length), n - 1, device=request.device)
    uniform = torch.rand(bags, length, generator=generator, device=request.device)
    if request.skew == "zipf":
        # Popularity 1/(id + 1): the logarithm of the id is uniform.
        uniform = (torch.exp(uniform.double() * torch.log(torch.tensor(n + 1.0)).item()) - 1) / n
    return (uniform * n).long().clamp_(max=n - 1)


def _outputs(
    table: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, dy: torch.Tensor, both: bool, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The results by plain torch in ``dtype``, summed in float32 or wider: the gate's baseline, and its truth."""
    table, weights, dy = table.detach().to(dtype), weights.detach().to(dtype), dy.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    rows = table[ids]
    found = {"y": (rows.to(wide) * weights.to(wide).unsqueeze(2)).sum(1).to(dtype)}
    if both:
        dtable = torch.zeros(table.shape, dtype=wide, device=table.device)
        dtable.index_add_(0, ids.reshape(-1), (weights.to(wide).unsqueeze(2) * dy.to(wide).unsqueeze(1)).flatten(0, 1))
        found |= {"dtable": dtable.to(dtype), "dweights": (rows.to(wide) * dy.to(wide).unsqueeze(1)).sum(2).to(dtype)}
    return found


def build(request: Request) -> Case:
    """Build :func:`gossamer.gather_reduce` beside :func:`torch.nn.functional.embedding_bag`."""
    n, d, bags, length = (request.sizes[s] for s in SYMBOLS)
    device, dtype, both = request.device, DTYPES[request.dtype], request.direction == "both"
    generator = torch.Generator(device).manual_seed(request.seed)
    ids = _draw_ids(request, generator)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    table, weights, dy = normal(n, d), normal(bags, length), normal(bags, d)

    def variant(name: str, role: str, gate: str | None, call) -> Variant:
        t, w = table.detach().requires_grad_(), weights.detach().requires_grad_()
        return Variant(name, role, lambda: call(t, w), {"dtable": t, "dweights": w}, dy, gate=gate)

    ours = variant("gossamer", OURS, "truth", lambda t, w: gossamer.gather_reduce(t, ids, weights=w))
    torch_bag = variant(
        "torch embedding_bag",
        DENSE,
        None,
        lambda t, w: F.embedding_bag(ids, t, mode="sum", per_sample_weights=w),
    )
    # Each touched row is read once, not once for each of its ids.
    touched = int(ids.unique().numel())
    moved = float(touched * d * table.element_size() + ids.nbytes + weights.nbytes + dy.nbytes)
    flops = 2.0 * bags * length * d
    if both:
        flops, moved = 3 * flops, moved + dy.nbytes + table.nbytes + weights.nbytes
    return Case(
        "gather_reduce",
        request.shape,
        request.sizes,
        request.dtype,
        device,
        request.direction,
        (ours, torch_bag),
        {},
        flops,
        moved,
        {
            "truth": lambda: FloatGate(
                _outputs(table, ids, weights, dy, both, torch.float64), _outputs(table, ids, weights, dy, both, dtype)
            )
        },
        "every output, whole",
        f"{request.skew} ids",
    )


def touched(call: Mapping[str, object]) -> tuple[int, int]:
    """The positions that may count, and the number of distinct rows of the table among them."""
    table, index, limit = call["table"], call["bags_index"], call.get("bags_limit")
    ids = index.reshape(-1)
    live = ids[
        (ids >= 0) & (ids < (table.shape[0] if limit is None else int(limit))) & (ids != call["bags_padding_idx"])
    ]
    return live.numel(), live.unique().numel()


def _touched(call: Mapping[str, object]) -> tuple[int, float]:
    """The positions, and the bytes of the rows."""
    positions, rows = touched(call)
    return positions, float(rows * call["table"].shape[1] * call["table"].element_size())


def cost(call: Mapping[str, object], result: object) -> Cost:
    """The cost of one reduction: each distinct row is read once."""
    positions, rows = _touched(call)
    flops = (1.0 if call["bags_weights"] is None else 2.0) * positions * call["table"].shape[1]
    return Cost(flops, rows + nbytes(call["bags_index"], call["bags_offsets"], call["bags_weights"], result))


def cost_dot(call: Mapping[str, object], result: object) -> Cost:
    """The cost of the weights' gradient."""
    positions, rows = _touched(call)
    flops = 2.0 * positions * call["table"].shape[1]
    return Cost(flops, rows + nbytes(call["dout"], call["bags_index"], call["bags_offsets"], result))


def cost_step(call: Mapping[str, object], result: object) -> Cost:
    """The cost of the lookup in a table that is trained in place; unknown for many tables in one storage."""
    if call["bags_features_element"]:
        return Cost()
    if call["bags_mode"] == "max":
        return cost_max(call, result)
    return cost(call, result[0])


def cost_max(call: Mapping[str, object], result: object) -> Cost:
    """The cost of maxima, which do not count as FLOPs."""
    return Cost(0.0, _touched(call)[1] + nbytes(call["bags_index"], call["bags_offsets"], *result))


COSTS = {
    "gossamer::gather_reduce": cost,
    "gossamer::gather_dot": cost_dot,
    "gossamer::gather_max": cost_max,
    "gossamer::gather_reduce_step": cost_step,
}
DIMENSIONS = {"rows": "N", "columns": "D", "bags": "B", "ids": "J"}
FAMILY = Family("gather_reduce", SHAPES, SYMBOLS, DEFAULTS, QUICK, build, dimensions=DIMENSIONS)


def bench_gather_reduce(measured):
    """Entry point of pytest-benchmark."""
    measured()
