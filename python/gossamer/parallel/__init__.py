"""Experts and tables over several processes, on torch.distributed.

It runs on the process groups, DeviceMesh and DTensor of torch.distributed: gloo on CPUs, NCCL on GPUs.
"""

from gossamer.parallel.checkpoint import load_checkpoint, save_checkpoint
from gossamer.parallel.embedding_folder import ShardedEmbeddingFolder
from gossamer.parallel.exchange import Pending, RowExchange
from gossamer.parallel.experts import (
    ShardedExperts,
    check_overflow,
    gather_experts,
    overflow_counts,
    shard_experts,
)
from gossamer.parallel.gradients import clip_grad_norm_
from gossamer.parallel.placement import Lookups, TablePlan, measure_lookups, plan_tables
from gossamer.parallel.processes import shutdown
from gossamer.parallel.table_layers import (
    ShardedDynamicEmbedding,
    ShardedEmbedding,
    ShardedEmbeddingBag,
    ShardedTableBatchedEmbeddingBags,
    lookup,
)
from gossamer.parallel.tables import shard_tables
from gossamer.parallel.traffic import Flow, Traffic, count_traffic

__all__ = [
    "Flow",
    "Lookups",
    "Pending",
    "RowExchange",
    "ShardedDynamicEmbedding",
    "ShardedEmbedding",
    "ShardedEmbeddingBag",
    "ShardedEmbeddingFolder",
    "ShardedExperts",
    "ShardedTableBatchedEmbeddingBags",
    "TablePlan",
    "Traffic",
    "check_overflow",
    "clip_grad_norm_",
    "count_traffic",
    "gather_experts",
    "load_checkpoint",
    "lookup",
    "measure_lookups",
    "overflow_counts",
    "plan_tables",
    "save_checkpoint",
    "shard_experts",
    "shard_tables",
    "shutdown",
]
