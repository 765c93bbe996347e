"""Narrow rows with a projection, and the rule for their widths."""

import pytest
import torch
from contracts import TrainedTableContract, assert_near

from gossamer.nn import EmbeddingBag, MixedDimensionEmbedding, mixed_dimensions


def case(row_dim, **how):
    def make(num_embeddings, embedding_dim, **options):
        return MixedDimensionEmbedding(num_embeddings, embedding_dim, row_dim, **how | options)

    return make


def two_widths(row_dim, **how):
    def make(num_embeddings, embedding_dim, **options):
        wide_rows = min(num_embeddings, 11)
        return MixedDimensionEmbedding(num_embeddings, embedding_dim, row_dim, wide_rows=wide_rows, **how | options)

    return make


TestMixedDimension = TrainedTableContract.over(
    {"narrow": case(3), "narrow means": case(3, mode="mean"), "of full width": case(8)}
)


class TestTwoWidths(
    TrainedTableContract.over({"two widths": two_widths(3), "two widths, means": two_widths(5, mode="mean")})
):
    computed = True


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


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("last", [True, False])
def test_rows_of_two_widths(mode, last):
    """Rows beyond ``wide_rows`` have a zero in the last column, and count in a mean; the ends of bags may be given."""
    table = MixedDimensionEmbedding(20, 6, 2, wide_rows=5, mode=mode, include_last_offset=last, dtype=torch.float64)
    whole = torch.cat([table.weight, torch.zeros(20, 1)], 1).detach()
    whole[:5, 2:] = table.extra.detach()
    vectors = whole @ table.projection.T
    ids, offsets = torch.tensor([3, 4, 3, 19, 5]), torch.tensor([0, 4, 4, *([5] if last else [])])
    pool = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax}[mode]
    expected = torch.stack([pool(vectors[[3, 4, 3, 19]], 0), torch.zeros(6), vectors[5]])
    assert_near(table(ids, offsets), expected)
    assert_near(table.lookup(ids), vectors[ids])
    if mode == "sum":
        weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 2.0], dtype=torch.float64)
        assert_near(table(ids, offsets, weights)[0], weights[:4] @ vectors[ids[:4]])


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
    filled = MixedDimensionEmbedding.from_budget(1000, 8, 5 * row + 5 * 32 + 32 + 4 * 700)
    assert (filled.row_dim, filled.wide_rows) == (5, 700) and filled.inference_nbytes() == 5 * row + 6 * 32 + 4 * 700
    with pytest.raises(ValueError, match=f"nbytes must be at least {row + 32} for MixedDimensionEmbedding"):
        MixedDimensionEmbedding.from_budget(1000, 8, row)


def test_bad_arguments():
    with pytest.raises(ValueError, match="wide_rows must be at most 10 with row_dim=3, got 11"):
        MixedDimensionEmbedding(10, 4, 3, wide_rows=11)
    with pytest.raises(ValueError, match="wide_rows must be at most 0 with row_dim=4, got 1"):
        MixedDimensionEmbedding(10, 4, 4, wide_rows=1)
    with pytest.raises(ValueError, match="row_dim must be at most embedding_dim, 4, got 5"):
        MixedDimensionEmbedding(10, 4, 5)
    with pytest.raises(ValueError, match=r"alpha must be at least 0, got -0\.1"):
        mixed_dimensions([3], base_dim=4, alpha=-0.1)
