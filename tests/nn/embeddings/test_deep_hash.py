"""Vectors that a network computes from hashes of an id."""

import pytest
import torch
from contracts import TableContract, assert_gradients, assert_near, functional, parameters

from gossamer.nn import DeepHashEmbedding
from gossamer.nn.embeddings.deep_hash import hash_features

SMALL = {"num_hashes": 6, "num_layers": 2, "num_values": 1000}


def case(**how):
    def make(num_embeddings, embedding_dim, *, optimizer=None, **options):
        return DeepHashEmbedding(num_embeddings, embedding_dim, 5, **SMALL | how | options)

    return make


class TestDeepHash(
    TableContract.over(
        {"uniform": case(norm="layer"), "normal means": case(norm="layer", distribution="normal", mode="mean")}
    )
):
    computed = True
    # There is no table that an optimizer could step in the backward pass.
    test_bytes = test_state_dict = None


def test_published_numbers():
    """A uniform hash of 6947 below a million, and Box and Muller's pair of 0.3 and 0.8."""
    assert hash_features(torch.tensor([6947]), 10**6, "uniform").item() == pytest.approx(-0.9861059861, rel=1e-6)
    pair = hash_features(torch.tensor([3, 8]) * 10**5, 10**6, "normal")
    assert pair.tolist() == pytest.approx([0.4795189, -1.4758073], abs=1e-4)


@pytest.mark.parametrize(("distribution", "variance"), [("uniform", 1 / 3), ("normal", 1.0)])
def test_distribution(distribution, variance):
    table = DeepHashEmbedding(10, 4, 4, num_hashes=8, distribution=distribution)
    features = table.encode(torch.arange(20_000)).double()
    assert features.mean(0).abs().max() < 0.05
    assert (features.var(0) / variance - 1).abs().max() < 0.05
    correlation = torch.corrcoef(features.T) - torch.eye(8, dtype=torch.float64)
    assert correlation.abs().max() < 0.05


def test_formula():
    table = DeepHashEmbedding(100, 4, 5, norm="batch", dtype=torch.float64, **SMALL)
    ids = torch.tensor([[3, -7], [2**62, 3]])
    x = table.encode(ids.flatten())
    for linear, norm in ((table.layers[0], table.layers[1]), (table.layers[3], table.layers[4])):
        x = x @ linear.weight.T + linear.bias
        # Batch statistics count an id as often as it occurs.
        x = (x - x.mean(0)) / (x.var(0, unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias
        x = x * torch.tanh(torch.nn.functional.softplus(x))
    expected = x @ table.layers[-1].weight.T + table.layers[-1].bias
    assert_near(table.lookup(ids), expected.view(2, 2, 4))


def test_gradients():
    table = DeepHashEmbedding(100, 4, 5, norm="layer", dtype=torch.float64, **SMALL)
    ids = torch.tensor([[3, 3, 8], [50, 1, 2]])
    factors = torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)
    assert_gradients(functional(table, lambda forward: (forward(ids) * factors).sum()), parameters(table))


def test_frozen_vectors_and_size():
    """The vectors of evaluation, each id computed once; as many bytes whatever N is."""
    table = DeepHashEmbedding(100, 4, 5, **SMALL)
    table.lookup(torch.arange(50))
    ids = torch.tensor([5, 9, 5, 5])
    before = table.eval().lookup(ids)
    assert_near(table.freeze().lookup(ids), before.double())
    assert table.nbytes() == table.inference_nbytes()
    assert table.to("meta").lookup(ids.to("meta")).shape == (4, 4)
    assert DeepHashEmbedding(10**9, 4, 5, **SMALL).nbytes() == table.nbytes()


def test_published_bytes():
    """1024 hashes, five layers of 100, vectors of 16: 145,516 weights, and the norms' running statistics."""
    table = DeepHashEmbedding(10, 16, 100, device="meta")
    weights = sum(p.numel() for p in table.parameters())
    statistics = 5 * (100 + 100)
    assert weights == 145_516
    assert table.inference_nbytes() == 4 * (weights + statistics) + 5 * 8 + 8


def test_state_holds_the_hashes():
    first, second = (DeepHashEmbedding(100, 4, 5, seed=seed, norm="layer", **SMALL) for seed in (1, 2))
    second.load_state_dict(first.state_dict())
    ids = torch.arange(20)
    assert torch.equal(first.lookup(ids), second.lookup(ids))


def test_budget():
    table = DeepHashEmbedding.from_budget(20_000, 16, 300_000)
    assert 0.97 * 300_000 < table.inference_nbytes() <= 300_000
    with pytest.raises(ValueError, match=r"nbytes must be at least \d+ for DeepHashEmbedding"):
        DeepHashEmbedding.from_budget(20_000, 16, 1000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_hashes": 5, "distribution": "normal"}, "num_hashes must be even for distribution='normal', got 5"),
        ({"norm": "none"}, "norm must be one of .*, got 'none'"),
        ({"distribution": "cauchy"}, "distribution must be one of .*, got 'cauchy'"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_layers": 10**12}, "num_layers must be at most 1024, got 1000000000000"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeepHashEmbedding(10, 4, 4, **arguments)
