"""Experts and tables over several processes, on torch.distributed.

It runs on the process groups, DeviceMesh and DTensor of torch.distributed: gloo on CPUs, NCCL on GPUs.
"""

from gossamer.parallel.exchange import Flow, Pending, RowExchange, Traffic, count_traffic
from gossamer.parallel.experts import (
    ShardedExperts,
    check_overflow,
    clip_grad_norm_,
    gather_experts,
    overflow_counts,
    shard_experts,
)

__all__ = [
    "Flow",
    "Pending",
    "RowExchange",
    "ShardedExperts",
    "Traffic",
    "check_overflow",
    "clip_grad_norm_",
    "count_traffic",
    "gather_experts",
    "overflow_counts",
    "shard_experts",
]
