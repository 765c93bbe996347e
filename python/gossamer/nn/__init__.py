"""Layers over the primitives."""

from gossamer.nn import init
from gossamer.nn.delta_rule.delta_net import DeltaNet
from gossamer.nn.delta_rule.gated_delta_net import GatedDeltaNet
from gossamer.nn.delta_rule.kimi_delta_attention import KimiDeltaAttention
from gossamer.nn.delta_rule.layer import DeltaRuleState
from gossamer.nn.delta_rule.self_referential import SelfReferentialLinear
from gossamer.nn.embeddings.admission import FrequencyAdmission, ProbabilisticAdmission
from gossamer.nn.embeddings.compositional import CompositionalEmbedding
from gossamer.nn.embeddings.deduplicated import DeduplicatedEmbedding
from gossamer.nn.embeddings.deep_hash import DeepHashEmbedding
from gossamer.nn.embeddings.dynamic_embedding import DynamicEmbedding
from gossamer.nn.embeddings.embedding import Embedding, EmbeddingBag
from gossamer.nn.embeddings.embedding_folder import DeltaGap, EmbeddingFolder, read_manifest
from gossamer.nn.embeddings.fused_step import FusedTable
from gossamer.nn.embeddings.graph_clusters import GraphClusters, graph_clusters, resize_clusters
from gossamer.nn.embeddings.hash_embedding import DoubleHashEmbedding, HashEmbedding
from gossamer.nn.embeddings.masked import MaskedEmbedding, search_widths
from gossamer.nn.embeddings.mixed_dimension import MixedDimensionEmbedding, mixed_dimensions
from gossamer.nn.embeddings.product_quantized import ProductQuantizedEmbedding
from gossamer.nn.embeddings.pruned import PrunedEmbedding
from gossamer.nn.embeddings.quantized import QuantizedEmbedding
from gossamer.nn.embeddings.random_block import RandomBlockEmbedding
from gossamer.nn.embeddings.remapped import ClusteredEmbedding, FrequencyEmbedding
from gossamer.nn.embeddings.residual_quantizer import (
    ResidualQuantization,
    ResidualQuantizer,
    balanced_kmeans,
    unique_codes,
)
from gossamer.nn.embeddings.searched_dimension import SearchedDimensionEmbedding, choose_widths
from gossamer.nn.embeddings.semantic_id import SemanticIdEmbedding
from gossamer.nn.embeddings.table import Table
from gossamer.nn.embeddings.table_batched import TableBatchedEmbeddingBags
from gossamer.nn.embeddings.tensor_train import TensorTrainEmbedding
from gossamer.nn.linear.block_sparse import BlockSparseLinear, erk_densities
from gossamer.nn.linear.factorized import LowRankLinear, frobenius_decay_
from gossamer.nn.linear.lora_factors import lora_plus_groups
from gossamer.nn.linear.low_rank import LoRAEmbedding, LoRALinear
from gossamer.nn.linear.prune_and_regrow import PruneAndRegrow
from gossamer.nn.linear.quantized import QuantizedLinear
from gossamer.nn.moe.capacity import limit_capacity
from gossamer.nn.moe.cartesian import CartesianMoE, product_routing
from gossamer.nn.moe.experts.base import ExpertLayer
from gossamer.nn.moe.experts.basis import BasisExperts
from gossamer.nn.moe.experts.grouped import Experts
from gossamer.nn.moe.experts.latent import LatentExperts
from gossamer.nn.moe.experts.lora import LoRAExperts, expert_factors, flat_expert_factors
from gossamer.nn.moe.experts.product_key import ProductKeyExperts
from gossamer.nn.moe.experts.quantized_stack import QuantizedExpertStack
from gossamer.nn.moe.experts.shared import SharedExpert
from gossamer.nn.moe.layer import MoE
from gossamer.nn.moe.losses import (
    cluster_variance_loss,
    expert_counts,
    gshard_balance_loss,
    importance_loss,
    load_balance_loss,
    load_loss,
    router_losses,
    router_z_loss,
    routing_entropy_loss,
    sequence_balance_loss,
    slot_balance_loss,
    switch_balance_loss,
    update_expert_bias,
)
from gossamer.nn.moe.mixture_of_attention import KeyValueCache, MixtureOfAttention
from gossamer.nn.moe.routers.base import Router, RouterAround, step_routers
from gossamer.nn.moe.routers.broadcast import BroadcastUncertain, broadcast_uncertain
from gossamer.nn.moe.routers.cluster import ClusterRouter
from gossamer.nn.moe.routers.domain import DomainRouter
from gossamer.nn.moe.routers.dselect_k import DSelectKRouter, selector_gates
from gossamer.nn.moe.routers.expert_choice import ExpertChoiceRouter, expert_choice, expert_choice_threshold
from gossamer.nn.moe.routers.gates import smooth_step
from gossamer.nn.moe.routers.hash import HashRouter, frequency_table
from gossamer.nn.moe.routers.linear import LinearRouter, SigmoidRouter, SoftmaxRouter, TopKSoftmaxRouter
from gossamer.nn.moe.routers.permutation import LearnedPermutation
from gossamer.nn.moe.routers.prototype import PrototypeRouter, softmax_prototypes
from gossamer.nn.moe.routers.threshold import ThresholdRouter, softmax_threshold
from gossamer.nn.moe.routers.token_rounding import TokenRounding, round_tokens
from gossamer.nn.moe.routers.top_p import TopPRouter, softmax_top_p
from gossamer.nn.moe.routers.topk import sigmoid_topk, softmax_topk, topk_softmax
from gossamer.nn.moe.routers.tree import TreeRouter, tree_gates
from gossamer.nn.moe.routing import Routing, given_experts, sigmoid_probabilities, softmax_probabilities
from gossamer.nn.schedules import ConstantSchedule, CosineSchedule, Schedule

__all__ = [
    "BasisExperts",
    "BlockSparseLinear",
    "BroadcastUncertain",
    "CartesianMoE",
    "ClusterRouter",
    "ClusteredEmbedding",
    "CompositionalEmbedding",
    "ConstantSchedule",
    "CosineSchedule",
    "DSelectKRouter",
    "DeduplicatedEmbedding",
    "DeepHashEmbedding",
    "DeltaGap",
    "DeltaNet",
    "DeltaRuleState",
    "DomainRouter",
    "DoubleHashEmbedding",
    "DynamicEmbedding",
    "Embedding",
    "EmbeddingBag",
    "EmbeddingFolder",
    "ExpertChoiceRouter",
    "ExpertLayer",
    "Experts",
    "FrequencyAdmission",
    "FrequencyEmbedding",
    "FusedTable",
    "GatedDeltaNet",
    "GraphClusters",
    "HashEmbedding",
    "HashRouter",
    "KeyValueCache",
    "KimiDeltaAttention",
    "LatentExperts",
    "LearnedPermutation",
    "LinearRouter",
    "LoRAEmbedding",
    "LoRAExperts",
    "LoRALinear",
    "LowRankLinear",
    "MaskedEmbedding",
    "MixedDimensionEmbedding",
    "MixtureOfAttention",
    "MoE",
    "ProbabilisticAdmission",
    "ProductKeyExperts",
    "ProductQuantizedEmbedding",
    "PrototypeRouter",
    "PruneAndRegrow",
    "PrunedEmbedding",
    "QuantizedEmbedding",
    "QuantizedExpertStack",
    "QuantizedLinear",
    "RandomBlockEmbedding",
    "ResidualQuantization",
    "ResidualQuantizer",
    "Router",
    "RouterAround",
    "Routing",
    "Schedule",
    "SearchedDimensionEmbedding",
    "SelfReferentialLinear",
    "SemanticIdEmbedding",
    "SharedExpert",
    "SigmoidRouter",
    "SoftmaxRouter",
    "Table",
    "TableBatchedEmbeddingBags",
    "TensorTrainEmbedding",
    "ThresholdRouter",
    "TokenRounding",
    "TopKSoftmaxRouter",
    "TopPRouter",
    "TreeRouter",
    "balanced_kmeans",
    "broadcast_uncertain",
    "choose_widths",
    "cluster_variance_loss",
    "erk_densities",
    "expert_choice",
    "expert_choice_threshold",
    "expert_counts",
    "expert_factors",
    "flat_expert_factors",
    "frequency_table",
    "frobenius_decay_",
    "given_experts",
    "graph_clusters",
    "gshard_balance_loss",
    "importance_loss",
    "init",
    "limit_capacity",
    "load_balance_loss",
    "load_loss",
    "lora_plus_groups",
    "mixed_dimensions",
    "product_routing",
    "read_manifest",
    "resize_clusters",
    "round_tokens",
    "router_losses",
    "router_z_loss",
    "routing_entropy_loss",
    "search_widths",
    "selector_gates",
    "sequence_balance_loss",
    "sigmoid_probabilities",
    "sigmoid_topk",
    "slot_balance_loss",
    "smooth_step",
    "softmax_probabilities",
    "softmax_prototypes",
    "softmax_threshold",
    "softmax_top_p",
    "softmax_topk",
    "step_routers",
    "switch_balance_loss",
    "topk_softmax",
    "tree_gates",
    "unique_codes",
    "update_expert_bias",
]
