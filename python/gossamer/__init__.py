"""Sparse compute for PyTorch at the speed of dense."""

from gossamer import nn, optim
from gossamer._activation import Activation
from gossamer._backend import backend
from gossamer._measure import check, profile
from gossamer._memory import empty_cache
from gossamer.integrations import (
    compress_embeddings,
    freeze_embeddings,
    load_quantized_experts,
    quantize_experts,
    replace,
    restore,
    serve_adapters,
    sparsify,
)
from gossamer.ops._registration import key_compiled_code
from gossamer.ops.activate import activate
from gossamer.ops.block_sparse import BlockSparseTensor, dds, dsd, sdd
from gossamer.ops.block_topology import BlockTopology
from gossamer.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from gossamer.ops.composed_rows import Parts
from gossamer.ops.delta_rule import delta_rule, delta_rule_step
from gossamer.ops.dispatch import Dispatch, dispatch
from gossamer.ops.expert_mlp import expert_mlp
from gossamer.ops.gather_compose import gather_compose
from gossamer.ops.gather_compose_step import gather_compose_step
from gossamer.ops.gather_dot import gather_dot, gather_dot_step
from gossamer.ops.gather_matmul import gather_matmul
from gossamer.ops.gather_reduce import gather_reduce
from gossamer.ops.gather_reduce_step import gather_reduce_step, gather_reduce_tables_step
from gossamer.ops.gather_reduce_tables import TableLayout, gather_reduce_tables
from gossamer.ops.grouped_matmul import grouped_matmul
from gossamer.ops.hash_table import HashTable, HashTableFull
from gossamer.ops.low_rank import low_rank_linear
from gossamer.ops.map_ids import IdMaps, map_ids
from gossamer.ops.multi_low_rank import adapter_dispatch, multi_low_rank, multi_low_rank_linear
from gossamer.ops.product_key_topk import product_key_topk
from gossamer.ops.quantized_expert_weight import QuantizedExpertWeight
from gossamer.ops.quantized_weight import Float8Weight, Int8Weight, NF4Weight
from gossamer.ops.self_referential import self_referential
from gossamer.ops.sparse_update import sparse_update_, sparse_update_tables_

__version__ = "0.1.0"
key_compiled_code(__version__)

__all__ = [
    "Activation",
    "BlockSparseTensor",
    "BlockTopology",
    "Dispatch",
    "Float8Weight",
    "HashTable",
    "HashTableFull",
    "IdMaps",
    "Int8Weight",
    "NF4Weight",
    "Parts",
    "QuantizedExpertWeight",
    "TableLayout",
    "activate",
    "adapter_dispatch",
    "backend",
    "causal_conv1d",
    "causal_conv1d_step",
    "check",
    "compress_embeddings",
    "dds",
    "delta_rule",
    "delta_rule_step",
    "dispatch",
    "dsd",
    "empty_cache",
    "expert_mlp",
    "freeze_embeddings",
    "gather_compose",
    "gather_compose_step",
    "gather_dot",
    "gather_dot_step",
    "gather_matmul",
    "gather_reduce",
    "gather_reduce_step",
    "gather_reduce_tables",
    "gather_reduce_tables_step",
    "grouped_matmul",
    "load_quantized_experts",
    "low_rank_linear",
    "map_ids",
    "multi_low_rank",
    "multi_low_rank_linear",
    "nn",
    "optim",
    "product_key_topk",
    "profile",
    "quantize_experts",
    "replace",
    "restore",
    "sdd",
    "self_referential",
    "serve_adapters",
    "sparse_update_",
    "sparse_update_tables_",
    "sparsify",
]
