"""A training step of an embedding table: lookup, backward pass and optimizer, with and without fusing the last two."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

import torch

import gossamer
from gossamer import optim
from gossamer.bench.families.gather_reduce import SYMBOLS, touched
from gossamer.bench.harness.case import DENSE, DTYPES, OURS, PEER, Case, Family, FloatGate, Outputs, Request, Variant
from gossamer.bench.harness.cost import Cost, nbytes

SHAPES = {
    "table": (10_000_000, 128, 65536, 20),
    "cpu-table": (1_000_000, 64, 8192, 20),
    "cpu-16": (1_000_000, 16, 8192, 20),
    "cpu-256": (250_000, 256, 8192, 20),
    "small": (20_000, 32, 512, 10),
}
DEFAULTS = {"cpu": ("cpu-table",), "cuda": ("table",)}
QUICK = {"cpu": "cpu-table", "cuda": "table"}
LR = 0.05
OPTIMIZERS = {"SGD": optim.SGD(LR), "row-wise Adagrad": optim.RowwiseAdagrad(LR), "Adam": optim.Adam(LR)}


SKEWS = ("uniform", "zipf", "1.05", "1.15", "one")


def draw_ids(request: Request, generator: torch.Generator) -> torch.Tensor:
    """Ids ``(B, J)``: uniform, by a power law with exponent 1 (zipf) or another in the name, or only the last row."""
    n, _, bags, length = (request.sizes[s] for s in SYMBOLS)
    if request.skew == "one":
        return torch.full((bags, length), n - 1, device=request.device)
    uniform = torch.rand(bags, length, generator=generator, device=request.device, dtype=torch.float64)
    if request.skew == "uniform":
        return (uniform * n).long().clamp_(max=n - 1)
    if request.skew == "zipf":
        ids = (n + 1.0) ** uniform
    else:
        rest = 1 - float(request.skew)
        ids = (uniform * ((n + 1.0) ** rest - 1) + 1).pow(1 / rest)
    # Popular ids are spread over the table.
    return torch.randperm(n, generator=generator, device=request.device)[ids.long().clamp_(1, n) - 1]


def _fused(table: torch.Tensor, ids: torch.Tensor, dy: torch.Tensor, optimizer: optim.Optimizer) -> Callable:
    state = optimizer.state(*table.shape, table.device)
    handle = torch.zeros(0, device=table.device, requires_grad=True)

    def step() -> torch.Tensor:
        with torch.enable_grad():
            y = gossamer.gather_reduce_step(table, ids, handle=handle, optimizer=optimizer, state=state)
        y.backward(dy)
        return table

    return step


def _torch_bag(table: torch.Tensor, ids: torch.Tensor, dy: torch.Tensor) -> Callable:
    bag = torch.nn.EmbeddingBag(*table.shape, mode="sum", sparse=True, _weight=table)
    optimizer = torch.optim.SGD(bag.parameters(), LR)

    def step() -> torch.Tensor:
        with torch.enable_grad():
            y = bag(ids)
        y.backward(dy)
        optimizer.step()
        optimizer.zero_grad()
        return bag.weight

    return step


def _fbgemm(table: torch.Tensor, ids: torch.Tensor, dy: torch.Tensor) -> Callable:
    """FBGEMM's table-batched layer with its exact SGD; its weights are in one flat tensor."""
    package = "fbgemm_gpu.split_table_batched_embeddings_ops"
    training = importlib.import_module(f"{package}_training")
    common = importlib.import_module(f"{package}_common")
    place = ("HOST", "CPU") if table.device.type == "cpu" else ("DEVICE", "CUDA")
    where = getattr(common.EmbeddingLocation, place[0]), getattr(training.ComputeDevice, place[1])
    layer = training.SplitTableBatchedEmbeddingBagsCodegen(
        [(*table.shape, *where)], optimizer=training.OptimType.EXACT_SGD, learning_rate=LR, stochastic_rounding=False
    )
    weights = layer.split_embedding_weights()[0]
    weights.data.copy_(table)
    flat = ids.reshape(-1)
    offsets = torch.arange(0, flat.numel() + 1, ids.shape[1], device=ids.device)

    def step() -> torch.Tensor:
        with torch.enable_grad():
            y = layer(flat, offsets)
        y.backward(dy)
        return weights

    return step


def _truth(
    table: torch.Tensor, ids: torch.Tensor, dy: torch.Tensor, optimizer: optim.Optimizer, dtype: torch.dtype
) -> torch.Tensor:
    """The probed rows after one step, computed in ``dtype`` by plain torch on a table of only the touched rows."""
    rows, index = torch.unique(ids, return_inverse=True)
    small = table[rows].to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = optimizer.state(*small.shape, small.device, wide)
    with gossamer.backend("reference"):
        gossamer.sparse_update_(small, index, dy.to(dtype), optimizer=optimizer, state=state)
    return small


def build(request: Request) -> Case:
    """Build our fused steps beside :class:`torch.nn.EmbeddingBag` with sparse gradients and torch's SGD, and FBGEMM."""
    n, d, bags, length = (request.sizes[s] for s in SYMBOLS)
    device, dtype = request.device, DTYPES[request.dtype]
    generator = torch.Generator(device).manual_seed(request.seed)
    ids = draw_ids(request, generator)
    table = torch.randn(n, d, generator=generator, device=device).to(dtype)
    dy = torch.randn(bags, d, generator=generator, device=device).to(dtype)
    touched = torch.unique(ids)
    initial = table[touched]

    def rows(outputs: Outputs) -> Outputs:
        return {"rows": outputs["y"].detach()[touched]}

    variants, skipped = [], {}
    for name, optimizer in OPTIMIZERS.items():
        step = _fused(table.clone(), ids, dy, optimizer)
        variants.append(Variant(f"gossamer {name}", OURS, step, layout=rows, gate=name))
    # Others add duplicates to the table one by one and round each sum to its dtype, which is less exact than the gate
    # allows.
    baseline = _torch_bag(table.clone(), ids, dy)
    variants.append(Variant("torch EmbeddingBag, SGD", DENSE, baseline, layout=rows, gate=None))
    try:
        variants.append(Variant("FBGEMM, SGD", PEER, _fbgemm(table, ids, dy), layout=rows, gate=None))
    except Exception as error:
        # Another package may raise anything, and the rest of the run does not need it.
        missing = isinstance(error, ModuleNotFoundError)
        skipped["FBGEMM, SGD"] = "fbgemm_gpu is not installed" if missing else f"{type(error).__name__}: {error}"

    def gate(optimizer: optim.Optimizer) -> Callable[[], FloatGate]:
        def make() -> FloatGate:
            index = torch.searchsorted(touched, ids)
            lists = (initial, index, dy, optimizer)
            return FloatGate({"rows": _truth(*lists, torch.float64)}, {"rows": _truth(*lists, dtype)})

        return make

    size = table.element_size()
    # Each touched row is read and written once; ids and both sides of the output once each.
    moved = 2.0 * touched.numel() * d * size + ids.nbytes + 2 * dy.nbytes
    return Case(
        "sparse_update",
        request.shape,
        request.sizes,
        request.dtype,
        device,
        request.direction,
        tuple(variants),
        skipped,
        4.0 * bags * length * d,
        moved,
        {name: gate(optimizer) for name, optimizer in OPTIMIZERS.items()},
        "every touched row after the first step",
        f"{request.skew} ids, {touched.numel()} distinct of {ids.numel()}",
    )


def elements(call: Mapping[str, object]) -> int:
    """Distinct elements of the blocks that the ids begin."""
    first = call["bags_index"].reshape(-1, 1)
    within = torch.arange(call["dout"].shape[1], device=first.device)
    return (first[first[:, 0] >= 0] + within).unique().numel()


def cost(call: Mapping[str, object], result: object) -> Cost:
    """The bytes of a step: lists and gradients read, touched rows and their states read and written.

    FLOPs depend on the optimizer, and are unknown; so are the bytes of many tables in one storage.
    """
    if call["bags_features_element"]:
        return Cost()
    rows = elements(call) if call["blocks"] else touched(call)[1]
    tables = (call["table"], call["update_state1"], call["update_state2"])
    row = sum(nbytes(t) / t.shape[0] for t in tables if t is not None and t.shape[0])
    lists = nbytes(call["bags_index"], call["dout"], call["bags_offsets"], call["bags_weights"], call["argmax"])
    return Cost(None, lists + 2 * rows * row)


COSTS = {"gossamer::sparse_update_": cost}
FAMILY = Family("sparse_update", SHAPES, SYMBOLS, DEFAULTS, QUICK, build, directions=("forward",), skews=SKEWS)


def bench_sparse_update(measured):
    """Entry point of pytest-benchmark."""
    measured()
