"""What is drawn or computed has the same bits whatever torch's default dtype is, which models are loaded under."""

import pytest
import torch
from torch import nn

import gossamer
from gossamer.nn import (
    BlockSparseLinear,
    DeduplicatedEmbedding,
    PruneAndRegrow,
    QuantizedEmbedding,
    given_experts,
)
from gossamer.ops import quantized_weight


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def under(request):
    """Runs a function under another default dtype, from the same seed."""

    def call(function, dtype=request.param):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            torch.manual_seed(3)
            return function()
        finally:
            torch.set_default_dtype(before)

    return call


def codes():
    return QuantizedEmbedding(4, 8, bits=16, dtype=torch.float32).weight


def nf4_codes():
    # A table of values that an earlier call made must not hide one that this call would make.
    quantized_weight._nf4_code.cache_clear()
    weight = torch.linspace(-1, 1, 512, dtype=torch.float32).sin().view(8, 64)
    return gossamer.NF4Weight.quantize(weight).data


def merged_blocks():
    weight = torch.randn(64, 4, dtype=torch.float32)
    weight[32:] = weight[:32] + 1e-3
    return DeduplicatedEmbedding.from_table(weight, block_rows=2).stored


def random_blocks():
    generator = torch.Generator().manual_seed(5)
    return gossamer.BlockTopology.random((512, 512), 16, 0.3, generator=generator).to_mask()


def layer(criterion="magnitude"):
    linear = nn.Linear(256, 256, dtype=torch.float32)
    with torch.no_grad():
        linear.weight.copy_(torch.linspace(-1, 1, 256 * 256, dtype=torch.float32).sin().view(256, 256))
    generator = torch.Generator().manual_seed(5)
    return BlockSparseLinear.from_linear(linear, density=0.3, block=16, criterion=criterion, generator=generator)


def random_choice():
    return layer("random").block_mask


def moved_blocks():
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moves = PruneAndRegrow(model, optimizer, rule="set", until=10)
    moves.move()
    return model.block_mask


@pytest.mark.parametrize(
    "drawn", [codes, nf4_codes, merged_blocks, random_blocks, random_choice, moved_blocks], ids=lambda f: f.__name__
)
def test_same_bits(under, drawn):
    assert torch.equal(under(drawn), under(drawn, torch.float32))


def test_equal_weights_of_given_experts(under):
    """At least float32, in which a routing's weights are."""
    weights = under(lambda: given_experts(torch.tensor([[0, 1, 2]]), 4).weights)
    assert weights.dtype in (torch.float32, torch.float64)
    assert torch.equal(weights.float(), torch.full((1, 3), 1 / 3))
