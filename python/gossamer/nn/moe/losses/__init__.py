"""Losses of mixture-of-experts layers, as pure functions of routings, and the bias update that needs no loss.

Counts carry no gradient; it flows only through the probabilities. The caller multiplies by coefficients.

Under data parallelism each rank sees a part of the batch. With ``group``, counts, sums of probabilities and numbers of
tokens are added over its ranks, so that every rank returns the loss of the whole batch. Averaging the gradients over
the ranks, as ``DistributedDataParallel`` does, gives the gradient of this loss. Every rank of the group must make the
call.
"""

from gossamer.nn.moe.losses.balance import (
    gshard_balance_loss,
    importance_loss,
    load_balance_loss,
    load_loss,
    sequence_balance_loss,
    slot_balance_loss,
    switch_balance_loss,
)
from gossamer.nn.moe.losses.cluster_variance import cluster_variance_loss
from gossamer.nn.moe.losses.expert_bias import expert_counts, update_expert_bias
from gossamer.nn.moe.losses.router import router_losses, router_z_loss, routing_entropy_loss

__all__ = [
    "cluster_variance_loss",
    "expert_counts",
    "gshard_balance_loss",
    "importance_loss",
    "load_balance_loss",
    "load_loss",
    "router_losses",
    "router_z_loss",
    "routing_entropy_loss",
    "sequence_balance_loss",
    "slot_balance_loss",
    "switch_balance_loss",
    "update_expert_bias",
]
