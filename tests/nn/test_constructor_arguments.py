"""Numbers of constructors: each refuses lists, texts, NaN and truth values, and says which argument it was."""

from __future__ import annotations

import inspect
import math
import re
from fractions import Fraction

import pytest
import torch

import gossamer
from gossamer import nn, optim

NAN = math.nan
# The beginning of an annotation -> values of other kinds.
FOREIGN = {
    "float": ([1.0], "1", NAN, True, (1.0, 2.0)),
    "int": ([1], "1", NAN, True, 1.5, -1),
    "Sequence[int]": (3, "12", [1.5], [True]),
    "Sequence[float]": (3, "12", [NAN, NAN], [True, True]),
}
# Arguments that may be negative.
SIGNED = ("padding_idx",)


def router():
    return nn.SoftmaxRouter(4, 4, 2)


def quantized():
    return gossamer.QuantizedExpertWeight.quantize(torch.ones(1, 4, 32), "int8")


def moved(**options):
    layer = nn.BlockSparseLinear(16, 16)
    return nn.PruneAndRegrow(layer, torch.optim.SGD(layer.parameters(), 0.1), **options)


CASES = {
    nn.BasisExperts: {"num_experts": 4, "hidden_size": 8, "intermediate_size": 8, "num_bases": 2},
    nn.BlockSparseLinear: {"in_features": 16, "out_features": 16},
    nn.BroadcastUncertain: {"router": router(), "entropy": 0.5},
    nn.CartesianMoE: {"hidden_size": 4, "intermediate_size": 4, "num_experts": 4, "top_k": 2},
    nn.ClusterRouter: {"hidden_size": 4, "num_experts": 4, "num_clusters": 2},
    nn.ClusteredEmbedding: {"num_embeddings": 4, "embedding_dim": 2, "clusters": torch.tensor([0, 1, 0, 1])},
    nn.CompositionalEmbedding: {"num_embeddings": 9, "embedding_dim": 4},
    nn.ConstantSchedule: {"value": 0.5},
    nn.CosineSchedule: {"first": 0.5, "last": 0.1, "until": 9},
    nn.DSelectKRouter: {"hidden_size": 4, "num_experts": 4, "num_selectors": 2, "gamma": 1.0},
    nn.DeduplicatedEmbedding: {
        "num_embeddings": 8,
        "embedding_dim": 2,
        "stored": torch.tensor([0, 1]),
        "block_rows": 4,
    },
    nn.DeepHashEmbedding: {"num_embeddings": 9, "embedding_dim": 4, "hidden_size": 4, "num_hashes": 2},
    nn.DeltaNet: {"hidden_size": 4, "num_heads": 2, "head_dim": 2},
    nn.DoubleHashEmbedding: {"num_embeddings": 9, "embedding_dim": 4, "num_rows": 3},
    nn.DynamicEmbedding: {"dim": 2, "capacity": 8},
    nn.Embedding: {"num_embeddings": 9, "embedding_dim": 4},
    nn.EmbeddingBag: {"num_embeddings": 9, "embedding_dim": 4},
    nn.ExpertChoiceRouter: {"hidden_size": 4, "num_experts": 4, "capacity_factor": 1.0},
    nn.Experts: {"num_experts": 4, "hidden_size": 4, "intermediate_size": 4},
    nn.FrequencyAdmission: {"threshold": 2},
    nn.FrequencyEmbedding: {
        "num_embeddings": 4,
        "embedding_dim": 2,
        "num_rows": 2,
        "frequencies": torch.tensor([3, 1, 2, 0]),
    },
    nn.GatedDeltaNet: {"hidden_size": 4, "num_heads": 2, "head_dim": 2},
    nn.HashEmbedding: {"num_embeddings": 9, "embedding_dim": 4, "num_rows": 3},
    nn.HashRouter: {"table": torch.tensor([0, 1, 2]), "num_experts": 3},
    nn.HashRouter.balanced: {"vocabulary": 9, "num_experts": 3},
    nn.KimiDeltaAttention: {"hidden_size": 4, "num_heads": 2, "head_dim": 2},
    nn.LatentExperts: {"num_experts": 4, "hidden_size": 8, "intermediate_size": 8, "latent_size": 4},
    nn.LearnedPermutation: {"router": router(), "phase_steps": 5},
    nn.LinearRouter: {"hidden_size": 4, "num_experts": 4, "top_k": 2},
    nn.LoRAEmbedding: {"num_embeddings": 9, "embedding_dim": 4, "rank": 2},
    nn.LoRAExperts: {"num_experts": 4, "hidden_size": 8, "intermediate_size": 8, "rank": 2},
    nn.LoRALinear: {"in_features": 8, "out_features": 8, "rank": 2},
    nn.LowRankLinear: {"in_features": 8, "out_features": 8, "rank": 2},
    nn.MaskedEmbedding: {"num_embeddings": 9, "embedding_dim": 4},
    nn.MixedDimensionEmbedding: {"num_embeddings": 9, "embedding_dim": 4, "row_dim": 2},
    nn.MixtureOfAttention: {"hidden_size": 8, "num_experts": 4, "top_k": 2, "num_heads": 2, "head_dim": 4},
    nn.MoE: {"hidden_size": 4, "intermediate_size": 4, "num_experts": 4, "top_k": 2},
    nn.ProbabilisticAdmission: {"threshold": 2.0},
    nn.ProductKeyExperts: {"hidden_size": 4, "num_experts": 4, "num_heads": 1, "top_k": 1, "key_dim": 2},
    nn.ProductQuantizedEmbedding: {"num_embeddings": 9, "embedding_dim": 4, "num_codes": 2, "num_parts": 2},
    nn.PrototypeRouter: {"hidden_size": 4, "num_experts": 4, "num_prototypes": 2},
    moved: {"until": 9},
    nn.PrunedEmbedding: {"num_embeddings": 9, "embedding_dim": 4, "density": 0.5},
    nn.QuantizedEmbedding: {"num_embeddings": 9, "embedding_dim": 4},
    nn.RandomBlockEmbedding: {"num_embeddings": 9, "embedding_dim": 4, "num_weights": 8, "block_size": 4},
    nn.ResidualQuantizer: {"dim": 4, "num_levels": 2, "num_codes": 3},
    nn.SearchedDimensionEmbedding: {"num_embeddings": 9, "embedding_dim": 4, "candidates": [1, 4]},
    nn.SelfReferentialLinear: {"hidden_size": 4, "num_heads": 2},
    nn.SemanticIdEmbedding: {
        "num_embeddings": 2,
        "embedding_dim": 2,
        "codes": torch.tensor([[0, 1], [1, 1]]),
        "num_codes": 2,
    },
    nn.SharedExpert: {"hidden_size": 4, "intermediate_size": 4},
    nn.SigmoidRouter: {"hidden_size": 4, "num_experts": 4, "top_k": 2},
    nn.SoftmaxRouter: {"hidden_size": 4, "num_experts": 4, "top_k": 2},
    nn.TensorTrainEmbedding: {"num_embeddings": 9, "embedding_dim": 4, "ranks": (2, 2)},
    nn.ThresholdRouter: {"hidden_size": 4, "num_experts": 4, "threshold": 0.2},
    nn.TokenRounding: {"router": router()},
    nn.TopKSoftmaxRouter: {"hidden_size": 4, "num_experts": 4, "top_k": 2},
    nn.TopPRouter: {"hidden_size": 4, "num_experts": 4, "top_p": 0.5},
    nn.TreeRouter: {"hidden_size": 4, "num_experts": 4, "num_trees": 2, "gamma": 1.0},
    optim.Adam: {"lr": 0.1},
    optim.FTRL: {"lr": 0.1},
    optim.RowwiseAdagrad: {"lr": 0.1},
    optim.SGD: {"lr": 0.1},
}


def foreign(parameter: inspect.Parameter) -> tuple:
    """Values of other kinds than a parameter's."""
    kind = str(parameter.annotation)
    found = next((values for begin, values in FOREIGN.items() if kind.startswith(begin)), ())
    return tuple(value for value in found if not (value == -1 and parameter.name in SIGNED))


def name_of(make) -> str:
    return make.__qualname__


@pytest.mark.parametrize("make", CASES, ids=name_of)
def test_a_number_of_another_kind_is_refused_by_name(make):
    """And so is a negative size."""
    make(**CASES[make])
    signature = inspect.signature(nn.PruneAndRegrow if make is moved else make)
    silent = []
    for parameter in signature.parameters.values():
        for value in foreign(parameter):
            if problem := unnamed(make, parameter.name, value):
                silent.append((parameter.name, value, problem))
    assert not silent


def unnamed(make, name: str, value: object) -> str:
    """What a constructor raises that is no error of this argument, or "taken"; "" for such an error."""
    try:
        make(**CASES[make] | {name: value})
    except Exception as error:
        named = isinstance(error, (TypeError, ValueError)) and re.search(rf"\b{name.removesuffix('s')}", str(error))
        return "" if named else f"{type(error).__name__}: {error}"
    return "taken"


# Tensors of another size than N, torch's own words of a padding row, and what it says of memory.
OTHERS = "must have shape|adding_idx must be within|Storage size calculation overflowed|allocate"


@pytest.mark.parametrize("make", CASES, ids=name_of)
def test_a_number_that_no_float_or_memory_holds_is_refused_by_name(make):
    """Ids may be any of 64 bits."""
    signature = inspect.signature(nn.PruneAndRegrow if make is moved else make)
    wrong = []
    for parameter in signature.parameters.values():
        kind, allowed = str(parameter.annotation), ("", "taken")
        if kind.startswith("int"):
            values = {10**400: ("",), 2**63: ("",), 2**63 - 1: allowed, 2**62: allowed}
        elif kind.startswith("float"):
            values = {10**400: ("",), -(10**400): ("",), Fraction(10**400, 3): ("",)}
            values |= {2**70: allowed, 1e308: allowed, Fraction(1, 3): allowed}
        else:
            continue
        for value, wanted in values.items():
            found = unnamed(make, parameter.name, value)
            if found not in wanted and not re.search(OTHERS, found):
                wrong.append((parameter.name, value if value < 2**64 else "huge", found))
    assert not wrong


FACTORY = {
    "dtype": (torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64, "float32", 5),
    "device": ("nonsense", "cuda:99", "xla", -1, 5.5, True),
}


def taken(make, name: str, value: object) -> bool:
    """Whether a constructor takes an argument of this name, by its signature or among its options."""
    try:
        make(**CASES[make] | {name: value})
    except TypeError as error:
        if re.search("unexpected|unknown option", str(error)):
            return False
        raise
    return True


@pytest.mark.parametrize("make", CASES, ids=name_of)
def test_a_dtype_or_device_that_cannot_be_is_refused_by_name(make):
    """Torch speaks of gradients, of random numbers or of dispatch; it computes in no floating dtype of 8 bits."""
    silent = []
    for name, good in (("dtype", torch.float32), ("device", "cpu")):
        for value in FACTORY[name] if taken(make, name, good) else ():
            with pytest.raises((TypeError, ValueError)) as caught:
                make(**CASES[make] | {name: value})
            if not str(caught.value).startswith(f"{name} must be "):
                silent.append((name, value, str(caught.value)))
    assert not silent
