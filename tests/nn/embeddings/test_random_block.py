"""Vectors cut from one array at hashed places."""

import pytest
import torch
from contracts import TrainedTableContract, assert_near

from gossamer.nn import RandomBlockEmbedding
from gossamer.nn.embeddings.random_block import block_parts
from gossamer.ops.composed_rows import composed_rows


def case(**how):
    def make(num_embeddings, embedding_dim, **options):
        return RandomBlockEmbedding(num_embeddings, embedding_dim, 61, **how | options)

    make.from_budget = lambda *sizes, **options: RandomBlockEmbedding.from_budget(*sizes, **how | options)
    return make


class TestRandomBlock(
    TrainedTableContract.over({"blocks": case(block_size=4), "blocks that wrap": case(block_size=3, wrap=True)})
):
    any_ids = True


def test_published_places():
    """Twenty weights, blocks of two, r = (17, 13, 11)."""
    places = composed_rows(torch.arange(3), block_parts(20, 4, 2, False, [17, 13, 11]), 20)
    assert places.tolist() == [[17, 18, 11, 12], [9, 10, 3, 4], [1, 2, 14, 15]]
    wrapped = composed_rows(torch.arange(2), block_parts(20, 4, 2, True, [19, 13, 11]), 20)
    assert wrapped.tolist() == [[19, 0, 12, 13], [10, 11, 3, 4]]


@pytest.mark.parametrize("wrap", [False, True])
def test_gradients_of_shared_weights_add(wrap):
    """The gradient of the array is the sum over ids of what their vectors get, aliases within one vector too."""
    table = RandomBlockEmbedding(100, 8, 12, block_size=3, wrap=wrap, dtype=torch.float64)
    ids = torch.arange(100)
    factors = torch.randn(100, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (table.lookup(ids) * factors).sum().backward()
    expected = torch.zeros(12, dtype=torch.float64).index_add(0, table.addresses(ids).flatten(), factors.flatten())
    assert_near(table.weight.grad.flatten(), expected)
    assert_near(table.weight.grad.sum(), factors.sum())


def test_budget_is_spent():
    table = RandomBlockEmbedding.from_budget(5000, 16, 32_000)
    assert table.inference_nbytes() == 32_000 and table.weight.shape == (31_992 // 4, 1)


def test_bad_block():
    with pytest.raises(ValueError, match="block_size must be at most the number of weights, 4, got 8"):
        RandomBlockEmbedding(10, 8, 4, block_size=8)
