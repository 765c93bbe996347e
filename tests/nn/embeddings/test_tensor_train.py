"""Vectors as products of three matrices that an id's digits choose."""

import pytest
import torch
from contracts import TrainedTableContract, assert_gradients, assert_near, functional, parameters

import gossamer
from gossamer.nn import TensorTrainEmbedding


def case(ranks, **how):
    def make(num_embeddings, embedding_dim, **options):
        return TensorTrainEmbedding(num_embeddings, embedding_dim, ranks, **how | options)

    return make


TestTensorTrain = TrainedTableContract.over({"sums": case((3, 2)), "means": case((2, 2), mode="mean")})


def published():
    """Eight ids of two numbers, with rows by hand."""
    table = TensorTrainEmbedding(8, 2, (2, 2), row_factors=(2, 2, 2), dim_factors=(1, 2, 1))
    with torch.no_grad():
        table.core1.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        middle = [[[[1, 0], [0, 1]], [[1, 1], [0, 2]]], [[[2, 0], [1, 0]], [[0, 1], [1, 1]]]]
        table.core2.copy_(torch.tensor(middle, dtype=torch.float32).flatten(1))
        table.core3.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return table


def test_published_values():
    assert published().lookup(torch.tensor([0, 1, 2, 7])).tolist() == [[5, 5], [1, -5], [4, 5], [-1, 0]]


def test_formula():
    """Entry by entry, by loops over both ranks."""
    table = TensorTrainEmbedding(50, 12, (3, 2), dtype=torch.float64)
    (n1, n2, n3), (d1, d2, d3) = table.row_factors, table.dim_factors
    assert n1 * n2 * n3 >= 50 and (d1, d2, d3) == (2, 2, 3)
    ids = torch.tensor([0, 7, 49])
    cores = table.core1.view(n1, d1, 3), table.core2.view(n2, 3, d2, 2), table.core3.view(n3, 2, d3)
    expected = torch.stack(
        [
            torch.einsum("ap,pbq,qc->abc", cores[0][x // n3 // n2], cores[1][x // n3 % n2], cores[2][x % n3]).flatten()
            for x in ids.tolist()
        ]
    )
    assert_near(table.lookup(ids), expected)


def test_shared_first_product():
    """More ids than pairs of digits give the vectors, gradients and steps of few."""
    table = TensorTrainEmbedding(8, 4, (2, 2), dtype=torch.float64)
    ids = torch.tensor([0, 7, 3, 3, 1, 6, 5, 2, 0, 0])
    assert len(ids) > table.row_factors[0] * table.row_factors[1]
    one_by_one = torch.cat([table.lookup(ids[i : i + 1]) for i in range(len(ids))])
    assert_near(table.lookup(ids), one_by_one)
    factors = torch.linspace(-1, 1, 40, dtype=torch.float64).view(10, 4)

    def call(forward):
        return (forward(ids, torch.tensor([0, 4])) * factors[:2]).sum()

    assert_gradients(functional(table, call), parameters(table))
    optimizer = gossamer.optim.SGD(lr=0.1)
    fused = TensorTrainEmbedding(8, 4, (2, 2), dtype=torch.float64, optimizer=optimizer)
    for name in table.tables:
        getattr(fused, name).data.copy_(getattr(table, name))
    (table.lookup(ids) * factors).sum().backward()
    (fused.lookup(ids) * factors).sum().backward()
    for name in table.tables:
        assert_near(getattr(fused, name), getattr(table, name) - 0.1 * getattr(table, name).grad)


def test_no_ids_in_plain_torch():
    """Bags without any id are zero."""
    table = TensorTrainEmbedding(6, 10, (2, 2))
    with gossamer.backend("reference"):
        pooled = table(torch.empty(0, dtype=torch.int64), torch.tensor([0, 0]))
    assert torch.equal(pooled, torch.zeros(2, 10))


def test_published_bytes():
    """Ten million rows of 16: ranks 16, 32 and 64."""
    for rank, nbytes in ((16, 527_616), (32, 1_944_064), (64, 7_443_456)):
        table = TensorTrainEmbedding(
            10_131_227, 16, (rank, rank), row_factors=(216, 217, 217), dim_factors=(2, 2, 4), device="meta"
        )
        assert table.inference_nbytes() == nbytes


def test_starts_with_the_variance_of_a_table():
    torch.manual_seed(0)
    table = TensorTrainEmbedding(20_000, 16, (8, 8))
    variance = table.lookup(torch.arange(20_000)).var().item()
    assert 0.5 < variance * 3 * 20_000 < 2


def test_learns_a_table_of_low_rank():
    """A table that is such a product is fitted by it."""
    torch.manual_seed(1)
    target = TensorTrainEmbedding(60, 8, (2, 2))
    for core in target.parameters():
        torch.nn.init.normal_(core)
    ids = torch.arange(60)
    wanted = target.lookup(ids).detach()
    table = TensorTrainEmbedding(60, 8, (4, 4))
    for core in table.parameters():
        torch.nn.init.normal_(core, std=0.5)
    optimizer = torch.optim.Adam(table.parameters(), lr=0.03)
    for _ in range(250):
        loss = (table.lookup(ids) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05 * wanted.square().mean().item()


def test_budget_takes_the_highest_ranks():
    table = TensorTrainEmbedding.from_budget(10_000, 16, 50_000)
    assert 0.9 * 50_000 < table.inference_nbytes() <= 50_000
    assert table.ranks[0] - table.ranks[1] in (0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"row_factors": (2, 2, 2)}, r"row_factors must have a product of at least 10, got \(2, 2, 2\)"),
        ({"dim_factors": (2, 2, 2)}, r"dim_factors must have the product 4, got \(2, 2, 2\)"),
        ({"dim_factors": (4, 1)}, r"dim_factors must be 3 numbers, got \(4, 1\)"),
        ({"ranks": (0, 2)}, r"ranks\[0\] must be at least 1, got 0"),
        ({"ranks": (2,)}, r"ranks must be 2 numbers, got \(2,\)"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TensorTrainEmbedding(10, 4, **{"ranks": (2, 2)} | arguments)
