"""Tables whose like blocks of rows are stored once."""

import pytest
import torch
from contracts import TrainedTableContract

from gossamer.nn import DeduplicatedEmbedding


def case(num_embeddings, embedding_dim, **options):
    blocks = -(-num_embeddings // 4)
    given = {"stored": torch.arange(blocks) % max(blocks // 2, 1), "block_rows": 4}
    return DeduplicatedEmbedding(num_embeddings, embedding_dim, **given | options)


def from_budget(num_embeddings, embedding_dim, nbytes, **options):
    blocks = -(-num_embeddings // 4)
    stored = torch.arange(blocks) % max(blocks // 2, 1)
    return DeduplicatedEmbedding.from_budget(
        num_embeddings, embedding_dim, nbytes, stored=stored, block_rows=4, **options
    )


case.from_budget = from_budget
TestDeduplicated = TrainedTableContract.over(deduplicated=case)


def test_published_blocks():
    """Of three blocks of two rows the first two are alike: four rows stay, 32 bytes and a map of 12."""
    weight = torch.tensor([[1, 1], [2, 2], [1, 1.005], [2, 2], [9, 9], [9, 9]])
    table = DeduplicatedEmbedding.from_table(weight, block_rows=2)
    assert table.stored.tolist() == [0, 0, 1]
    assert table.inference_nbytes() == 4 * 2 * 4 + 3 * 4
    assert torch.equal(table.lookup(torch.arange(6)), weight[[0, 1, 0, 1, 4, 5]])
    table.lookup(torch.tensor([0, 2, 3])).sum().backward()
    assert table.weight.grad[:2].tolist() == [[2, 2], [1, 1]]


def planted(blocks=40, kinds=10, rows=8, d=4):
    """A table of blocks of ``kinds`` kinds with noise below the tolerance."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(blocks) % kinds
    values = torch.randn(kinds, rows, d, generator=generator)
    noise = (torch.rand(blocks, rows, d, generator=generator) - 0.5) * 0.008
    return kind, (values[kind] + noise).flatten(0, 1)


def test_finds_planted_blocks():
    """Every block stands for blocks of its kind alone, and every kind is stored once."""
    kind, weight = planted()
    table = DeduplicatedEmbedding.from_table(weight, block_rows=8)
    assert int(table.stored.max()) + 1 == 10
    pairs = torch.stack([table.stored.long(), kind]).T.unique(dim=0)
    assert len(pairs) == 10
    assert (table.lookup(torch.arange(len(weight))) - weight).abs().max() <= 0.01
    assert torch.equal(DeduplicatedEmbedding.from_table(weight, block_rows=8).stored, table.stored)


def test_tolerance_that_a_budget_needs():
    """Without a tolerance it is doubled until the table fits: here to that of the noise, of which kinds are left."""
    kind, weight = planted()
    weight = weight.view(40, 8, 4) + torch.linspace(-0.03, 0.03, 40).view(40, 1, 1)
    weight = weight.flatten(0, 1)
    nbytes = 10 * 8 * 4 * 4 + 4 * 40
    with pytest.raises(ValueError, match="with all similar blocks merged"):
        DeduplicatedEmbedding.from_table(weight, nbytes=nbytes)
    table = DeduplicatedEmbedding.from_table(weight, nbytes=nbytes, tolerance=None)
    assert table.inference_nbytes() == nbytes
    assert len(torch.stack([table.stored.long(), kind]).T.unique(dim=0)) == 10
    with pytest.raises(ValueError, match="tolerance must be given without nbytes, got None"):
        DeduplicatedEmbedding.from_table(weight, tolerance=None)


def test_budget_of_a_trained_table():
    """Merging ends once the budget is met; if it cannot be met, an error names the smallest one that can."""
    _, weight = planted()
    half = weight.numel() * 4 // 2
    table = DeduplicatedEmbedding.from_table(weight, block_rows=8, nbytes=half)
    block = 8 * 4 * 4
    assert half - block < table.inference_nbytes() <= half
    with pytest.raises(
        ValueError, match=f"nbytes must be at least {10 * block + 160} for .* similar blocks merged, got 900"
    ):
        DeduplicatedEmbedding.from_table(weight, block_rows=8, nbytes=900)


def test_a_tail_that_is_no_whole_block():
    weight = torch.randn(11, 3)
    table = DeduplicatedEmbedding.from_table(weight, block_rows=4)
    assert torch.equal(table.lookup(torch.arange(11)), weight)
    with pytest.raises(IndexError):
        table.lookup(torch.tensor([11]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 0.0}, r"share must be above 0 and at most 1, got 0\.0"),
        ({"tolerance": 0.0}, r"tolerance must be positive and finite, got 0\.0"),
        ({"block_rows": 0}, "block_rows must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeduplicatedEmbedding.from_table(torch.randn(4, 2), **{"block_rows": 2} | arguments)
