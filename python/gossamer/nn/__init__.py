"""Layers over the primitives."""

from gossamer.nn._lora import lora_plus_groups
from gossamer.nn.admission import FrequencyAdmission, ProbabilisticAdmission
from gossamer.nn.block_sparse import BlockSparseLinear, erk_densities
from gossamer.nn.dynamic_embedding import DynamicEmbedding
from gossamer.nn.embedding import Embedding, EmbeddingBag
from gossamer.nn.embedding_folder import DeltaGap, EmbeddingFolder, read_manifest
from gossamer.nn.factorized import LowRankLinear, frobenius_decay_
from gossamer.nn.losses import load_balance_loss, router_z_loss, sequence_balance_loss, update_expert_bias
from gossamer.nn.low_rank import LoRAEmbedding, LoRALinear
from gossamer.nn.low_rank_experts import LoRAExperts, expert_factors, flat_expert_factors
from gossamer.nn.moe import Experts, MoE, SharedExpert
from gossamer.nn.prune_and_regrow import PruneAndRegrow
from gossamer.nn.quantized_stack import QuantizedExpertStack
from gossamer.nn.routers import HashRouter, Router, SigmoidRouter, SoftmaxRouter, TopKSoftmaxRouter
from gossamer.nn.routing import Routing, given_experts, limit_capacity, sigmoid_topk, softmax_topk, topk_softmax
from gossamer.nn.table_batched import TableBatchedEmbeddingBags

__all__ = [
    "BlockSparseLinear",
    "DeltaGap",
    "DynamicEmbedding",
    "Embedding",
    "EmbeddingBag",
    "EmbeddingFolder",
    "Experts",
    "FrequencyAdmission",
    "HashRouter",
    "LoRAEmbedding",
    "LoRAExperts",
    "LoRALinear",
    "LowRankLinear",
    "MoE",
    "ProbabilisticAdmission",
    "PruneAndRegrow",
    "QuantizedExpertStack",
    "Router",
    "Routing",
    "SharedExpert",
    "SigmoidRouter",
    "SoftmaxRouter",
    "TableBatchedEmbeddingBags",
    "TopKSoftmaxRouter",
    "erk_densities",
    "expert_factors",
    "flat_expert_factors",
    "frobenius_decay_",
    "given_experts",
    "limit_capacity",
    "load_balance_loss",
    "lora_plus_groups",
    "read_manifest",
    "router_z_loss",
    "sequence_balance_loss",
    "sigmoid_topk",
    "softmax_topk",
    "topk_softmax",
    "update_expert_bias",
]
