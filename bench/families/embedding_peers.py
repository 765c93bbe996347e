"""Other people's embedding tables with fused steps, behind one interface; each needs its package to be installed."""

from __future__ import annotations

import torch

from gossamer.bench.families.tables import LR, Problem, training
from gossamer.bench.harness.case import Variant
from gossamer.bench.harness.peers import Peer, Unavailable, attribute, import_module


def _types(problem: Problem, package: str) -> tuple[object, object]:
    """FBGEMM's module of configurations, and its name for the tables' dtype."""
    configs = import_module("fbgemm_gpu.split_embedding_configs", package)
    names = {torch.float32: "FP32", torch.float16: "FP16"}
    if problem.dy.dtype not in names:
        raise Unavailable(f"{package} has no tables of {problem.dy.dtype}")
    return configs, getattr(configs.SparseType, names[problem.dy.dtype])


def fbgemm(name: str, role: str, problem: Problem) -> Variant:
    """FBGEMM's table-batched embedding with exact SGD in its backward pass."""
    package = "fbgemm-gpu"
    configs, dtype = _types(problem, package)
    module = import_module("fbgemm_gpu.split_table_batched_embeddings_ops_training", package)
    common = import_module("fbgemm_gpu.split_table_batched_embeddings_ops_common", package)
    cuda = problem.ids.device.type == "cuda"
    location = common.EmbeddingLocation.DEVICE if cuda else common.EmbeddingLocation.HOST
    device = module.ComputeDevice.CUDA if cuda else module.ComputeDevice.CPU
    rows, dim = problem.tables[0].shape
    layer = attribute(module, "SplitTableBatchedEmbeddingBagsCodegen", package)(
        [(rows, dim, location, device)] * len(problem.tables),
        optimizer=configs.EmbOptimType.EXACT_SGD,
        learning_rate=LR,
        pooling_mode=common.PoolingMode.SUM,
        weights_precision=dtype,
        output_dtype=dtype,
        stochastic_rounding=False,
    )
    views = layer.split_embedding_weights()
    for view, table in zip(views, problem.tables, strict=True):
        view.copy_(table)
    ids, offsets = problem.ids.reshape(-1), problem.offsets
    return training(name, role, problem, lambda: layer(ids, offsets), views)


def torchrec(name: str, role: str, problem: Problem) -> Variant:
    """TorchRec's EmbeddingBagCollection; for a step, its fused version over FBGEMM."""
    package = "torchrec"
    _, dtype = _types(problem, "fbgemm-gpu")
    configs = import_module("torchrec.modules.embedding_configs", package)
    jagged = import_module("torchrec.sparse.jagged_tensor", package)
    rows, dim = problem.tables[0].shape
    tables = [
        configs.EmbeddingBagConfig(
            name=f"t{t}",
            embedding_dim=dim,
            num_embeddings=rows,
            feature_names=[f"f{t}"],
            pooling=configs.PoolingType.SUM,
            data_type=configs.DataType.FP32 if dtype.name == "FP32" else configs.DataType.FP16,
        )
        for t in range(len(problem.tables))
    ]
    device = problem.ids.device
    if problem.both:
        fused = import_module("torchrec.modules.fused_embedding_modules", package)
        layer = attribute(fused, "FusedEmbeddingBagCollection", package)(
            tables, optimizer_type=torch.optim.SGD, optimizer_kwargs={"lr": LR}, device=device
        )
    else:
        modules = import_module("torchrec.modules.embedding_modules", package)
        layer = attribute(modules, "EmbeddingBagCollection", package)(tables, device=device)
    weights = dict(layer.state_dict())
    views = [weights[f"embedding_bags.t{t}.weight"] for t in range(len(tables))]
    with torch.no_grad():
        for view, table in zip(views, problem.tables, strict=True):
            view.copy_(table)
    lengths = torch.full((problem.ids.numel() // problem.ids.shape[2],), problem.ids.shape[2], device=device)
    keys = [f"f{t}" for t in range(len(tables))]
    features = jagged.KeyedJaggedTensor(keys=keys, values=problem.ids.reshape(-1), lengths=lengths)

    def forward() -> torch.Tensor:
        return layer(features).values()

    return training(name, role, problem, forward, views)


PEERS = (
    Peer("FBGEMM", "fbgemm_gpu", "fbgemm-gpu", fbgemm),
    Peer("TorchRec", "torchrec", "torchrec", torchrec),
)
