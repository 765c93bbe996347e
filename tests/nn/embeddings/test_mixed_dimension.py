"""Narrow rows with a projection, and the rule for their widths."""

import pytest
import torch
from contracts import TrainedTableContract, assert_near

from gossamer.nn import EmbeddingBag, MixedDimensionEmbedding, mixed_dimensions


def case(row_dim, **how):
    def make(num_embeddings, embedding_dim, **options):
        return MixedDimensionEmbedding(num_embeddings, embedding_dim, row_dim, **how | options)

    return make


TestMixedDimension = TrainedTableContract.over(
    {"narrow": case(3), "narrow means": case(3, mode="mean"), "of full width": case(8)}
)


def test_projects_what_is_pooled():
    """The bag of projected rows, and the same numbers of rows in the projection as bags."""
    table = MixedDimensionEmbedding(20, 6, 2, dtype=torch.float64)
    ids, offsets = torch.tensor([3, 4, 3, 19]), torch.tensor([0, 3])
    rows = table.weight @ table.projection.T
    expected = torch.stack([rows[[3, 4, 3]].sum(0), rows[19]])
    assert_near(table(ids, offsets), expected)
    largest = MixedDimensionEmbedding(20, 6, 2, mode="max", dtype=torch.float64)
    largest.load_state_dict(table.state_dict())
    assert_near(largest(ids, offsets), torch.stack([rows[[3, 4, 3]].amax(0), rows[19]]))


def test_full_width_is_a_dense_table():
    table = MixedDimensionEmbedding(9, 4, 4, mode="mean")
    bag = EmbeddingBag(9, 4, _weight=table.weight.detach().clone())
    ids = torch.tensor([[1, 8], [0, 0]])
    assert torch.equal(table(ids), bag(ids)) and table.projection is None


def test_published_widths():
    sizes = [10, 10**3, 10**5, 10**7]
    assert mixed_dimensions(sizes, base_dim=64) == [64, 16, 4, 1]
    tables = [MixedDimensionEmbedding(n, 64, d, device="meta") for n, d in zip(sizes, [64, 16, 4, 1], strict=True)]
    floats = sum(n * d for n, d in zip(sizes, [64, 16, 4, 1], strict=True))
    projections = 64 * (16 + 4 + 1)
    assert sum(table.inference_nbytes() for table in tables) == 4 * (floats + projections) and floats == 10_416_640
    assert mixed_dimensions(sizes, base_dim=64, alpha=0.0, most=32) == [32] * 4
    assert mixed_dimensions(sizes, base_dim=24, powers=True) == [32, 8, 2, 1]


def test_budget_takes_the_widest():
    """With a projection up to D − 1 columns, and without where that is smaller."""
    row = 1000 * 4
    assert MixedDimensionEmbedding.from_budget(1000, 8, 5 * row + 5 * 32).row_dim == 5
    assert MixedDimensionEmbedding.from_budget(1000, 8, 8 * row).projection is None
    with pytest.raises(ValueError, match=f"nbytes must be at least {row + 32} for MixedDimensionEmbedding"):
        MixedDimensionEmbedding.from_budget(1000, 8, row)


def test_bad_arguments():
    with pytest.raises(ValueError, match="row_dim must be at most embedding_dim, 4, got 5"):
        MixedDimensionEmbedding(10, 4, 5)
    with pytest.raises(ValueError, match=r"alpha must be at least 0, got -0\.1"):
        mixed_dimensions([3], base_dim=4, alpha=-0.1)
