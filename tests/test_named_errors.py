"""Errors name their argument where torch, pybind or Python would speak of something else, or say nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import gossamer
from gossamer import nn, optim, parallel, testing
from gossamer.integrations.megablocks import Arguments
from gossamer.integrations.megablocks import ops as megablocks
from gossamer.nn import SharedExpert

HUGE = 2**63
PAIR = torch.ones(2)
META = torch.zeros(3, dtype=torch.int64, device="meta")


def empty_mask(rows, cols):
    return torch.empty(1, dtype=torch.bool, device="meta").expand(rows, cols)


def expert_ids(rows, columns, experts=4):
    return torch.arange(rows * columns).view(rows, columns) % experts


def routing(**fields):
    made = nn.given_experts(expert_ids(3, 2), 4)
    return dataclasses.replace(made, **fields)


def routing_of(tokens, experts):
    return nn.given_experts(torch.zeros(tokens, 1, dtype=torch.int64), experts, torch.ones(tokens, 1))


def low_rank(weight, **options):
    x, a, b = torch.randn(2, 64), torch.randn(1, 64), torch.randn(8, 1)
    return gossamer.low_rank_linear(x, weight, a, b, scale=1.0, **options)


def trained_offset():
    weight = gossamer.NF4Weight.quantize(torch.randn(8, 64))
    weight.offset.requires_grad_()
    return low_rank(weight)


def adapters(out):
    factors = torch.randn(1, 1, 4), torch.randn(1, 3, 1)
    return gossamer.multi_low_rank(torch.randn(2, 4), *factors, torch.zeros(2, dtype=torch.int64), scale=1.0, out=out)


def stepped(optimizer, **state):
    table = torch.ones(4, 3)
    state = optimizer.state(4, 3) | state
    gossamer.sparse_update_(table, torch.tensor([[1]]), torch.ones(1, 3), optimizer=optimizer, state=state)


def delta_step(state):
    q, v = torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    return gossamer.delta_rule_step(q, q, v, torch.rand(1, 2), state)


CASES = {
    "boolean_scale": (
        lambda: gossamer.low_rank_linear(
            torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1), scale=True
        ),
        TypeError,
        "scale must be a number, got True",
    ),
    "dispatch_top_k": (
        lambda: routing(
            dispatch=dataclasses.replace(gossamer.dispatch(expert_ids(3, 2), 4), top_k=PAIR),
        ).dispatched(),
        TypeError,
        "top_k must be an int, got Tensor",
    ),
    "overlapping_out": (
        lambda: adapters(torch.zeros(1, 3).expand(2, 3)),
        ValueError,
        "out must not have elements that share memory",
    ),
    "overlapping_bias": (
        lambda: nn.update_expert_bias(torch.zeros(1).expand(2), expert_ids(2, 1)[:, 0], 0.1),
        ValueError,
        "bias must not have elements that share",
    ),
    "sparse_state": (
        lambda: stepped(optim.Adagrad(lr=0.1), sum=torch.zeros(4, 3).to_sparse()),
        TypeError,
        r"state\['sum'\] must have the layout",
    ),
    "overlapping_state": (
        lambda: stepped(optim.Adagrad(lr=0.1), sum=torch.zeros(1, 3).expand(4, 3)),
        ValueError,
        r"state\['sum'\] must have rows that do not overlap",
    ),
    "sparse_correction": (
        lambda: nn.sigmoid_topk(torch.randn(2, 4), 2, correction_bias=torch.zeros(4).to_sparse()),
        TypeError,
        "correction_bias must have the layout",
    ),
    "integer_hidden": (lambda: nn.MoE(4, 4, 2, 1)(expert_ids(2, 4)), TypeError, "x must be floating point"),
    "step_state": (lambda: delta_step(torch.zeros(1, 2, 4, 4).long()), TypeError, "state must be torch.float32"),
    "table_flags": (lambda: nn.EmbeddingBag(3, 2, sparse=PAIR), TypeError, "sparse must be a bool"),
    "size_beyond_int64": (lambda: nn.Experts(2, HUGE, 4), ValueError, "hidden_size must be at most"),
    "table_size": (lambda: nn.Embedding([1], 2), TypeError, "num_embeddings must be an int"),
    "table_dim": (lambda: nn.EmbeddingBag(3, PAIR), TypeError, "embedding_dim must be an int"),
    "table_dtype": (lambda: nn.Embedding(3, 2, dtype="half"), TypeError, r"dtype must be a torch\.dtype"),
    "padding_idx": (lambda: nn.Embedding(3, 2, padding_idx=(1, 2)), TypeError, "padding_idx must be an int"),
    "ids": (lambda: nn.Embedding(3, 2)("text"), TypeError, r"input must be a torch\.Tensor, got str"),
    "bag_padding_idx": (
        lambda: gossamer.gather_reduce(torch.ones(3, 2), expert_ids(1, 2, 3), padding_idx=[1]),
        TypeError,
        "padding_idx must be an int or None, got list",
    ),
    "specs": (lambda: gossamer.TableLayout(3), TypeError, r"specs must be a sequence of \(rows, dim\) pairs, got 3"),
    "specs_of_floats": (lambda: gossamer.TableLayout([(1.5, 2)]), TypeError, "specs must be a sequence"),
    "feature_table_map": (lambda: gossamer.TableLayout([(1, 2)], 0), TypeError, "feature_table_map must be"),
    "poolings": (lambda: gossamer.TableLayout([(1, 2)], pooling=True), TypeError, "pooling must be a str"),
    "flat": (
        lambda: gossamer.TableLayout([(1, 2)]).views(torch.zeros(64).to_sparse()),
        TypeError,
        "flat must have the layout",
    ),
    "weights_dtype": (
        lambda: nn.TableBatchedEmbeddingBags([(1, 2)], weights_dtype=1.5),
        TypeError,
        "weights_dtype must be a",
    ),
    "output_dtype": (
        lambda: nn.TableBatchedEmbeddingBags([(1, 2)], output_dtype="half"),
        TypeError,
        "output_dtype must be a",
    ),
    "dynamic_dtype": (lambda: nn.DynamicEmbedding(2, 4, dtype=-1), TypeError, "dtype must be float32"),
    "dynamic_age": (lambda: nn.DynamicEmbedding(2, 4, expire_after="a"), TypeError, "expire_after must be a number"),
    "admission": (lambda: nn.FrequencyAdmission(2, 1.5), TypeError, "capacity must be an int"),
    "keys": (
        lambda: gossamer.HashTable(1, 4).insert_or_assign(torch.arange(2), torch.ones(2, 1).to_sparse()),
        TypeError,
        "values must have the layout",
    ),
    "mark": (
        lambda: gossamer.HashTable(1, 4).insert_rows(torch.arange(2), mark="a"),
        TypeError,
        "mark must be an int of 64 bits, got 'a'",
    ),
    "dim": (lambda: gossamer.HashTable(HUGE, 4), ValueError, "dim must be an int"),
    "lr": (lambda: optim.SGD(lr=torch.ones(1).to_sparse()), TypeError, "lr must be a number"),
    "rate": (lambda: nn.update_expert_bias(PAIR, expert_ids(2, 1)[:, 0], True), TypeError, "rate must be a number"),
    "alpha": (lambda: nn.LoRALinear(4, 4, 1, alpha=(1, 2)), TypeError, "alpha must be a number, got tuple"),
    "dropout": (lambda: nn.LoRALinear(4, 4, 1, dropout=[0.5]), TypeError, "dropout must be a number, got list"),
    "rank": (lambda: nn.LoRAExperts(2, 4, 4, PAIR), TypeError, "rank must be a number"),
    "dora": (lambda: nn.LoRAEmbedding(4, 4, 1, dora=PAIR), TypeError, "dora must be a bool, got Tensor"),
    "transposed": (lambda: nn.Experts(2, 4, 4, transposed=PAIR), TypeError, "transposed must be a bool"),
    "low_rank_input": (
        lambda: nn.LowRankLinear(4, 4, 1)(torch.ones(2, 3)),
        ValueError,
        r"x must have shape \(\.\.\., C\)",
    ),
    "low_rank_dtype": (
        lambda: nn.LowRankLinear(4, 4, 1)(torch.ones(2, 4).double()),
        TypeError,
        r"x must have the dtype of the parameters, torch\.float32, got torch\.float64",
    ),
    "block_sparse_input": (lambda: nn.BlockSparseLinear(16, 16)(expert_ids(2, 16)), TypeError, "x must be floating"),
    "ids_elsewhere": (lambda: nn.LoRAEmbedding(4, 4, 1)(META), ValueError, "ids must be on the device of weight"),
    "token_ids_elsewhere": (
        lambda: nn.HashRouter(expert_ids(5, 1), 4)(META),
        ValueError,
        "token_ids must be on the device of table",
    ),
    "flat_factors": (
        lambda: nn.expert_factors(torch.ones(2, 3).to_sparse(), torch.ones(3, 2), 2),
        TypeError,
        "flat_a must have the layout",
    ),
    "no_experts": (
        lambda: nn.given_experts(expert_ids(3, 0), 4),
        ValueError,
        "expert_ids must have at least one",
    ),
    "renormalize": (
        lambda: nn.softmax_topk(torch.randn(2, 4), 2, renormalize=PAIR),
        TypeError,
        "renormalize must be a bool",
    ),
    "x_grouped": (
        lambda: gossamer.grouped_matmul(
            torch.ones(3, 2), torch.ones(4, 2, 2), gossamer.dispatch(expert_ids(3, 1), 4), x_grouped=PAIR
        ),
        TypeError,
        "x_grouped must be a bool, got Tensor",
    ),
    "sparse_hidden": (lambda: nn.MoE(4, 4, 2, 1)(torch.ones(2, 4).to_sparse()), TypeError, "x must have the layout"),
    "capacity": (lambda: routing(num_experts=float("nan")), TypeError, "num_experts must be"),
    "foreign_dispatch": (
        lambda: routing(dispatch=gossamer.dispatch(expert_ids(2, 2), 4)).dispatched(),
        ValueError,
        r"dispatch must be of T, K, E = 3, 2, 4 as its routing, got 2, 2, 4",
    ),
    "residual": (
        lambda: nn.MoE(4, 4, 4, 2, router=None)(torch.ones(3, 4), routing=routing(residual=1)),
        TypeError,
        r"routing\.residual must be a torch\.Tensor, got int",
    ),
    "quantised_offset": (trained_offset, ValueError, r"weight\.offset requires a gradient"),
    "block_rows": (
        lambda: gossamer.BlockTopology.from_mask(empty_mask(2**31 + 1, 0), 16, nnz=3),
        ValueError,
        "mask must have at most 2147483647 block rows",
    ),
    "block_places": (
        lambda: gossamer.BlockTopology.from_mask(empty_mask(2**31 - 1, 2**23), 16, nnz=3),
        ValueError,
        "mask must have fewer than",
    ),
    "block_shape": (lambda: gossamer.BlockTopology.random((16, 1.5), 16, 0.5), ValueError, "shape must be"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_error_names_its_argument(case):
    call, error, message = CASES[case]
    with pytest.raises(error, match=message):
        call()


def test_capacity_may_pass_what_an_integer_holds():
    """So large a capacity is no limit."""
    made = nn.limit_capacity(routing(), 1e300)
    assert torch.equal(made.expert_ids, routing().expert_ids)


def test_capacity_may_pass_what_a_float_holds():
    """The largest factor times the slots of an expert is infinite, and no limit either."""
    made = nn.limit_capacity(routing_of(5, 2), 1e308)
    assert torch.equal(made.expert_ids, routing_of(5, 2).expert_ids)


@pytest.mark.parametrize("shape", [(2**31 - 1, 2**22 - 1), (5, 2**31 - 1), (2**31 - 1, 0)])
def test_topologies_of_the_largest_masks_have_sizes(shape):
    """On meta, where a mask of 2⁵³ places is only its sizes."""
    topology = gossamer.BlockTopology.from_mask(empty_mask(*shape), 16, nnz=3)
    assert topology.grid == shape and topology.column_indices.shape == (3,)


NUMBERS = {
    "maps by hand": (lambda: gossamer.IdMaps([0], [1], [0], [1], [0], 0, 5), ValueError, r"moduli must be in \[1, "),
    "maps of one length": (
        lambda: gossamer.IdMaps([5], [1, 1], [0], [1], [0], 0, 5),
        ValueError,
        "divisors must have",
    ),
    "no maps": (lambda: gossamer.map_ids(torch.tensor([1]), [5]), TypeError, "maps must be gossamer.IdMaps, got list"),
    "step": (lambda: nn.smooth_step(torch.tensor([1]), 1.0), TypeError, "v must be floating point, got torch.int64"),
    "gamma": (lambda: nn.smooth_step(torch.ones(1), 0), ValueError, "gamma must be positive and finite, got 0"),
    "codes": (
        lambda: nn.selector_gates(torch.ones(2, 3, 1), torch.ones(2, 3), 4, 1.0),
        ValueError,
        "codes must have",
    ),
    "mixture": (
        lambda: nn.selector_gates(torch.ones(2, 3, 2), None, 4, 1.0),
        TypeError,
        "mixture must be a torch",
    ),
    "leaves": (
        lambda: nn.tree_gates(torch.ones(2, 1, 3), torch.ones(2, 1, 3), 1.0),
        ValueError,
        "leaves must have",
    ),
    "selectors": (
        lambda: nn.selector_gates(torch.ones(2, 0, 2), torch.ones(2, 0), 4, 1.0),
        ValueError,
        "num_selectors must be at least 1, got 0",
    ),
    "trees": (
        lambda: nn.tree_gates(torch.ones(2, 0, 3), torch.ones(2, 0, 4), 1.0),
        ValueError,
        r"leaves must be of at least 1 tree with at least 2 leaves, got shape \(2, 0, 4\)",
    ),
    "one leaf": (
        lambda: nn.tree_gates(torch.ones(2, 1, 0), torch.ones(2, 1, 1), 1.0),
        ValueError,
        r"leaves must be of at least 1 tree with at least 2 leaves, got shape \(2, 1, 1\)",
    ),
    "scores": (lambda: nn.softmax_probabilities(torch.tensor([1])), TypeError, "logits must be floating point"),
    "widths": (lambda: nn.mixed_dimensions([5], base_dim=torch.ones(2)), TypeError, "base_dim must be a number"),
    "ranks": (lambda: nn.TensorTrainEmbedding(5, 4, 2), TypeError, "ranks must be a sequence, got int"),
    "candidates": (lambda: nn.SearchedDimensionEmbedding(5, 4, 2), TypeError, "candidates must be a sequence, got int"),
    "latents": (
        lambda: nn.LatentExperts(2, 4, 8, 2, separate_latents=[1]),
        TypeError,
        "separate_latents must be a bool, got list",
    ),
    "excluded": (
        lambda: gossamer.sparsify(torch.nn.Linear(8, 8), 0.5, exclude=None),
        TypeError,
        "exclude must be names",
    ),
    "budget": (
        lambda: gossamer.compress_embeddings(torch.nn.Embedding(9, 2), "hash", [1]),
        TypeError,
        "budget must be a number, got list",
    ),
    "steps": (lambda: nn.QuantizedEmbedding(5, 4, step_lr=None), TypeError, "step_lr must be a number, got NoneType"),
    "ids": (lambda: nn.MaskedEmbedding(5, 4)([1]), TypeError, "ids must be a torch.Tensor, got list"),
    "texts": (
        lambda: nn.init.from_text_embeddings(torch.ones(0, 3), 2),
        ValueError,
        "vectors must have at least one row, got 0",
    ),
    "moduli": (lambda: nn.CompositionalEmbedding(5, 4, True), TypeError, "moduli must be a sequence, got bool"),
    "density": (lambda: nn.PrunedEmbedding(5, 4, (1,)), TypeError, "density must be a number, got tuple"),
    "shapes": (lambda: nn.erk_densities(True, 0.5), TypeError, "shapes must be a sequence, got bool"),
    "clusters": (lambda: nn.balanced_kmeans(torch.ones(3, 2), 0), ValueError, "num_codes must be at least 1, got 0"),
    "noise": (
        lambda: nn.load_loss(torch.ones(2, 3), torch.ones(2, 3), "a", 1),
        TypeError,
        "noise_std must be a",
    ),
    "frequencies": (
        lambda: nn.frequency_table(torch.ones(3, device="meta"), 2),
        ValueError,
        "frequencies must hold v",
    ),
    "noises": (
        lambda: nn.load_loss(torch.ones(0, 4), torch.ones(0, 4), torch.ones(0, 2), 1),
        ValueError,
        r"noise_std must broadcast to \(0, 4\), got \(0, 2\)",
    ),
    "sparse noise": (
        lambda: nn.load_loss(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3).to_sparse(), 1),
        TypeError,
        "noise_std must have the layout",
    ),
    "domains": (
        lambda: nn.DomainRouter(expert_ids(3, 1), nn.SoftmaxRouter(4, 4, 1))(torch.ones(3, 4), token_ids=META),
        ValueError,
        "token_ids must be on the device of x, cpu, got meta",
    ),
    "sequences": (
        lambda: nn.DeltaNet(8, 2, 4).initial_state(PAIR),
        TypeError,
        "batch_size must be an int, got Tensor",
    ),
    "one id in training": (
        lambda: nn.SearchedDimensionEmbedding(5, 4, [1, 4], norm=True)(torch.tensor([[2]])),
        ValueError,
        "ids must be at least two in training with norm=True",
    ),
    "one hashed id in training": (
        lambda: nn.DeepHashEmbedding(5, 4, 3, num_hashes=2, num_layers=1)(torch.tensor([[2]])),
        ValueError,
        "ids must be at least two in training with norm='batch'",
    ),
    "seed of hashes": (
        lambda: gossamer.IdMaps.universal([5], seed=[1]),
        TypeError,
        "seed must be an int, got list",
    ),
    "seed of codes": (
        lambda: nn.ProductQuantizedEmbedding.from_table(torch.ones(9, 4), nbytes=90, seed=1.5, num_parts=2),
        TypeError,
        "seed must be an int, got float",
    ),
    "coded": (
        lambda: gossamer.gather_compose(
            torch.ones(4, 2), expert_ids(1, 2), gossamer.Parts.of(2, "add", gossamer.IdMaps.of([4], limit=9), coded=[1])
        ),
        TypeError,
        r"parts\.coded must be an int, got list",
    ),
    "columns": (
        lambda: nn.QuantizedLinear.from_linear(torch.nn.Linear(32, 2), "int8")(torch.ones(2, 0)),
        ValueError,
        r"x must have shape \(\.\.\., I\) with I = 32, got \(2, 0\)",
    ),
    "router": (
        lambda: nn.SoftmaxRouter(4, 2, 1)(torch.ones(3, 4, device="meta")),
        ValueError,
        "x must be on the device of the parameters, cpu, got meta",
    ),
    "two layers": (
        lambda: nn.CartesianMoE(4, 8, 2, 1)(torch.ones(3, 4, device="meta")),
        ValueError,
        "x must be on the device of the parameters, cpu, got meta",
    ),
    "a static router": (
        lambda: nn.DSelectKRouter(4, 2, 1, 1.0, static=True)(torch.ones(3, 4, device="meta")),
        ValueError,
        "x must be on the device of the parameters, cpu, got meta",
    ),
    "experts of product keys": (
        lambda: nn.ProductKeyExperts(4, 4, num_heads=1, top_k=1)(torch.ones(3, 4, device="meta")),
        ValueError,
        "x must be on the device of the parameters, cpu, got meta",
    ),
    "top_k of two layers": (lambda: nn.CartesianMoE(4, 8, 2, PAIR), TypeError, "top_k must be an int, got Tensor"),
    "a table wider than its experts": (
        lambda: nn.HashRouter(torch.zeros(5, 3, dtype=torch.int64), 2),
        ValueError,
        r"table must have at most num_experts = 2 columns, got shape \(5, 3\)",
    ),
    "padding of a layer": (
        lambda: nn.DeltaNet(8, 2, 4)(torch.ones(1, 3, 8), mask=torch.ones(1, 3, device="meta")),
        ValueError,
        "mask must be on the device of x, cpu, got meta",
    ),
    "ids of a network": (
        lambda: nn.DeepHashEmbedding(5, 4, 3, num_hashes=2, num_layers=1)(META.unsqueeze(1)),
        ValueError,
        "ids must be on the device of the parameters, cpu, got meta",
    ),
    "matrices": (
        lambda: gossamer.gather_matmul(
            torch.ones(1, 4, 2),
            torch.ones(4, 2),
            expert_ids(1, 2),
            gossamer.Parts.of(4, "matmul", gossamer.IdMaps.of([4, 4], limit=9)),
            1,
        ),
        ValueError,
        r"left must have shape \(N1, M·K\)",
    ),
    "latents of another dtype": (
        lambda: nn.LatentExperts(1, 4, 16, latent_size=2)(torch.ones(3, 4).double(), routing_of(3, 1)),
        TypeError,
        "x must have the dtype of the parameters, torch.float32, got torch.float64",
    ),
    "a shared expert": (
        lambda: SharedExpert(4, 8)(torch.ones(3, 4).double()),
        TypeError,
        "x must have the dtype of the parameters, torch.float32, got torch.float64",
    ),
    "another dtype on meta": (
        lambda: nn.DeltaNet(8, 2, 4, device="meta")(torch.ones(1, 3, 8, device="meta").double()),
        TypeError,
        "x must have the dtype of the parameters, torch.float32, got torch.float64",
    ),
    "columns of integers": (
        lambda: nn.QuantizedLinear.from_linear(torch.nn.Linear(32, 2), "int8")(torch.ones(2, 32).long()),
        TypeError,
        "x must be floating point, got torch.int64",
    ),
    "ids of another dtype": (
        lambda: nn.DynamicEmbedding(2, 4)(expert_ids(3, 2).int()),
        TypeError,
        "ids must have the table's key_dtype, torch.int64, got torch.int32",
    ),
    "state": (
        lambda: gossamer.sparse_update_(
            torch.ones(4, 3), expert_ids(3, 1), torch.ones(3, 3), optimizer=optim.SGD(lr=0.1), state=None
        ),
        TypeError,
        "state must be a mapping of names to tensors, got NoneType",
    ),
    "codes beyond a book": (
        lambda: nn.ResidualQuantizer(2, 1, 3).decode(torch.tensor([[3]])),
        IndexError,
        r"codes must be in \[0, K\) with K=3, got 3 to 3",
    ),
    "codes elsewhere": (
        lambda: nn.ResidualQuantizer(2, 1, 3).decode(META.unsqueeze(1)),
        ValueError,
        "codes must be on the device of codebooks, cpu, got meta",
    ),
    "vectors of another dtype": (
        lambda: nn.ResidualQuantizer(2, 1, 3)(torch.ones(4, 2).double()),
        TypeError,
        "x must have the dtype of the parameters",
    ),
    "survivors": (
        lambda: nn.cluster_variance_loss(nn.softmax_topk(torch.ones(3, 4), 1), 2, survivors=torch.tensor([2])),
        IndexError,
        r"survivors must be in \[0, E/N\) with E/N=2, got 2 to 2",
    ),
    "losses of nothing": (lambda: nn.router_losses(None), TypeError, "routing must be a Routing or a sequence of them"),
    "a norm": (
        lambda: parallel.clip_grad_norm_(torch.ones(2), None),
        TypeError,
        "max_norm must be a number, got NoneType",
    ),
    "parameters": (lambda: parallel.clip_grad_norm_([1], 1.0), TypeError, "parameters must be a torch.Tensor, got int"),
    "layers to prune": (
        lambda: nn.PruneAndRegrow(torch.tensor(1.0), torch.optim.SGD(torch.nn.Linear(2, 2).parameters()), until=1),
        TypeError,
        "model must be a torch.nn.Module or layers of one, got Tensor",
    ),
    "a model of tables": (
        lambda: parallel.measure_lookups([1]).__enter__(),
        TypeError,
        "model must be a torch.nn.Module, got list",
    ),
    "divided experts": (
        lambda: parallel.overflow_counts(None),
        TypeError,
        "module must be a torch.nn.Module, got NoneType",
    ),
    "values of a cache": (
        lambda: nn.KeyValueCache().append(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 3, 4)),
        ValueError,
        r"values must have shape that of keys = \(1, 1, 2, 4\), got \(1, 1, 3, 4\)",
    ),
    "a state of sequences in one place": (
        lambda: gossamer.causal_conv1d_step(torch.ones(2, 3), torch.ones(1, 3, 4).expand(2, 3, 4), torch.ones(3, 4)),
        ValueError,
        "state must not have elements that share memory",
    ),
    "probabilities of other experts": (
        lambda: nn.product_routing(
            dataclasses.replace(nn.softmax_topk(torch.ones(3, 2), 1), _probabilities=torch.ones(3)),
            nn.softmax_topk(torch.ones(3, 2), 1),
        ),
        ValueError,
        r"probabilities must have shape \(T, E\) = \(3, 2\), got \(3,\)",
    ),
    "more experts than an index can name": (
        lambda: routing(num_experts=2**63),
        ValueError,
        "num_experts must be at most",
    ),
    "whole weights of a routing": (
        lambda: routing(weights=torch.ones(3, 2, dtype=torch.bool)),
        TypeError,
        "weights must be floating point, got torch.bool",
    ),
    "rows of a routing": (lambda: routing(max_rows=[3]), TypeError, "max_rows must be an int or None, got list"),
    "sparse weights of a routing": (
        lambda: routing(weights=torch.ones(3, 2).to_sparse()),
        TypeError,
        "weights must have the layout torch.strided",
    ),
    "uncertain tokens elsewhere": (
        lambda: nn.broadcast_uncertain(
            dataclasses.replace(nn.softmax_topk(torch.ones(3, 2), 1), expert_ids=expert_ids(3, 1).to("meta")), 0.5
        ),
        ValueError,
        "weights must be on the device of expert_ids, meta, got cpu",
    ),
    "experts that begin after their rows": (
        lambda: megablocks.padded_gather(
            torch.ones(1, 1),
            torch.tensor([1, 0]),
            torch.tensor([1, 2]),
            torch.tensor([8, 9, 10]),
            torch.tensor([0, 16, 32]),
            2,
        ),
        ValueError,
        "bins must start each expert at or before its first row",
    ),
    "losses elsewhere": (
        lambda: nn.router_losses(routing(losses={"entropy": torch.ones(3, device="meta")})),
        ValueError,
        r"routing\.losses\['entropy'\] must be on the device of routing\.expert_ids",
    ),
    "sparse losses": (
        lambda: nn.router_losses(routing(losses={"entropy": torch.ones(3).to_sparse()})),
        TypeError,
        r"routing\.losses\['entropy'\] must have the layout torch\.strided",
    ),
    "widths beyond int64": (
        lambda: nn.mixed_dimensions([5], base_dim=2.0**70),
        ValueError,
        "base_dim must be positive",
    ),
    "tokens rounded by foreign logits": (
        lambda: nn.round_tokens(dataclasses.replace(nn.softmax_topk(torch.ones(3, 4), 1), logits=torch.ones(1, 4)), 2),
        ValueError,
        r"probabilities must have shape \(T, E\) = \(3, 4\), got \(1, 4\)",
    ),
    "probabilities that a z-loss does not read": (
        lambda: nn.router_z_loss(dataclasses.replace(nn.softmax_topk(torch.ones(3, 4), 1), _probabilities=PAIR)),
        ValueError,
        r"probabilities must have shape \(T, E\) = \(3, 4\), got \(2,\)",
    ),
    "experts drawn": (
        lambda: testing.random_expert_ids(4, 2, 3),
        ValueError,
        "top_k must be at most num_experts, got top_k=3, num_experts=2",
    ),
    "popularity": (
        lambda: testing.random_expert_ids(4, 2, 1, popularity=torch.ones(3)),
        ValueError,
        r"popularity must have shape \(E,\) = \(2\), got \(3,\)",
    ),
    "bias of a shared expert": (lambda: SharedExpert(4, 8, bias=PAIR), TypeError, "bias must be a bool, got Tensor"),
    "bias of a router": (lambda: nn.SoftmaxRouter(4, 2, 1, bias=PAIR), TypeError, "bias must be a bool, got Tensor"),
    "wrap": (lambda: nn.RandomBlockEmbedding(9, 4, 12, wrap=PAIR), TypeError, "wrap must be a bool, got Tensor"),
    "bias of MegaBlocks": (lambda: Arguments(bias=PAIR), TypeError, "bias must be a bool, got Tensor"),
    "capacity of MegaBlocks": (
        lambda: Arguments(moe_capacity_factor=PAIR),
        TypeError,
        "moe_capacity_factor must be a number, got Tensor",
    ),
    "counts of offsets in a list": (
        lambda: (
            routing(
                dispatch=dataclasses.replace(gossamer.dispatch(expert_ids(3, 2), 4), offsets=[0, 1, 2, 3, 4])
            ).counts
        ),
        TypeError,
        r"dispatch\.offsets must be a torch\.Tensor, got list",
    ),
    "a file of a table": (lambda: nn.DynamicEmbedding(2, 4).save(None), TypeError, "path must be a str or a path"),
    "a file that is read": (lambda: nn.DynamicEmbedding(2, 4).load(1), TypeError, "path must be a str or a path"),
    "a manifest": (lambda: nn.read_manifest(1.5), TypeError, "path must be a str or a path, got float"),
    "embeddings of a model": (
        lambda: gossamer.replace(torch.nn.Linear(2, 2), embeddings=PAIR),
        TypeError,
        "embeddings must be a bool, got Tensor",
    ),
    "numbers of an assertion": (
        lambda: testing.assert_close(PAIR, PAIR, PAIR.to("meta")),
        ValueError,
        "baseline must hold values, got a tensor on meta",
    ),
    "losses that are no mapping": (lambda: routing(losses=-1), TypeError, "losses must be a mapping of names"),
    "experts of groups elsewhere": (
        lambda: nn.LatentExperts(4, 4, 16, latent_size=2, group_size=2)(
            torch.ones(3, 4), routing(expert_ids=expert_ids(3, 2).to("meta"), weights=torch.ones(3, 2, device="meta"))
        ),
        ValueError,
        "expert_ids must be on the device of x, cpu, got meta",
    ),
    "logits of 8 bits": (
        lambda: nn.softmax_topk(torch.ones(3, 4).to(torch.float8_e4m3fn), 2),
        TypeError,
        r"logits must be float32, float16, bfloat16 or float64, got torch\.float8_e4m3fn",
    ),
    "integers of a layer": (lambda: nn.Embedding(3, 2, dtype=torch.int64), TypeError, "dtype must be floating"),
    "an assertion": (
        lambda: testing.assert_close([1.0], torch.ones(1), torch.ones(1)),
        TypeError,
        "actual must be a torch.Tensor, got list",
    ),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_and_lists(name):
    """Of the functions that routers and tables are made with, and of maps by hand."""
    call, error, message = NUMBERS[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("layer", [nn.DeltaNet, nn.GatedDeltaNet, nn.KimiDeltaAttention])
def test_no_sequences(layer):
    """A batch without sequences gives no outputs, and zero gradients."""
    made = layer(8, 2, 4)
    y = made(torch.ones(0, 5, 8))
    y.sum().backward()
    assert y.shape == (0, 5, 8) and all(not p.grad.any() for p in made.parameters())


def test_codes_of_nobody_are_unique():
    """Without levels, vectors are numbered; without vectors there is nothing to number."""
    assert nn.unique_codes(torch.zeros(2, 0, dtype=torch.int64)).tolist() == [[0], [1]]
    assert nn.unique_codes(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 4)


SPARSE = {
    "index": lambda: gossamer.gather_reduce(torch.ones(4, 2), expert_ids(2, 2).to_sparse()),
    "offsets": lambda: gossamer.gather_reduce(torch.ones(4, 2), expert_ids(1, 2)[0], torch.tensor([0, 2]).to_sparse()),
    "ids": lambda: nn.DynamicEmbedding(2, 4)(expert_ids(3, 2).to_sparse()),
    "input": lambda: nn.EmbeddingBag(4, 2)(expert_ids(2, 2).to_sparse()),
    "codes": lambda: nn.unique_codes(expert_ids(2, 2).to_sparse()),
    "table": lambda: nn.HashRouter(expert_ids(3, 2).to_sparse(), 4),
    "token_ids": lambda: nn.MoE(2, 8, router=nn.HashRouter(expert_ids(3, 1), 4))(
        torch.ones(3, 2), token_ids=torch.arange(3).to_sparse()
    ),
    "mask": lambda: nn.load_balance_loss(nn.softmax_topk(torch.ones(3, 2), 1), mask=torch.ones(3).to_sparse()),
    "counts": lambda: nn.update_expert_bias(torch.zeros(2), torch.ones(2).long().to_sparse(), 0.1),
    "frequencies": lambda: nn.frequency_table(torch.ones(3).to_sparse(), 2),
    "scores": lambda: gossamer.HashTable(2, 4, evict="score").rows(
        torch.arange(2), insert=True, scores=torch.ones(2).long().to_sparse()
    ),
    "rows": lambda: gossamer.BlockTopology.from_indices(
        torch.tensor([1]).to_sparse(), torch.tensor([1]), (32, 32), (16, 16)
    ),
}


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_tensors(name):
    """Sparse tensors are refused where numbers are read from them."""
    with pytest.raises(TypeError, match=rf"{name} must have the layout torch\.strided, got torch\.sparse_coo"):
        SPARSE[name]()


def test_an_integer_of_numpy_is_named_with_its_module():
    """Its bare name, int64, would read as an int."""
    numpy = pytest.importorskip("numpy")
    with pytest.raises(TypeError, match=r"^hidden_size must be an int, got numpy\.int64 32$"):
        nn.MoE(numpy.int64(32), 16, 4, 2)
    with pytest.raises(TypeError, match=r"^hidden_size must be an int, got float$"):
        nn.MoE(32.0, 16, 4, 2)
