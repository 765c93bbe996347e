"""Tables that search their width among candidates."""

import pytest
import torch
from contracts import TrainedTableContract, assert_near

import gossamer
from gossamer.nn import SearchedDimensionEmbedding, choose_widths


def case(chosen=None, **how):
    def make(num_embeddings, embedding_dim, **options):
        table = SearchedDimensionEmbedding(
            num_embeddings, embedding_dim, (2, 4), norm=False, noise=False, **how | options
        )
        if chosen:
            table.choose(chosen)
        return table

    make.from_budget = lambda *sizes, **options: SearchedDimensionEmbedding.from_budget(
        *sizes, candidates=(2, 4), norm=False, noise=False, **how | options
    )
    return make


class TestChosen(TrainedTableContract.over({"chosen": case(chosen=2), "chosen, means": case(chosen=4, mode="mean")})):
    computed = True


class TestSearching(TrainedTableContract.over(searching=case())):
    computed = True
    # What is searched is served as one of the candidates, with other vectors.
    test_bytes = test_budget = None


def test_one_share_is_that_candidate():
    """With all weight on a candidate the mixture is its normalised projection, to the last bit at τ near 0."""
    table = SearchedDimensionEmbedding(20, 8, (2, 4), temperature=0.01, noise=False, dtype=torch.float64)
    table.alpha.data.copy_(torch.tensor([0.0, 50.0]))
    ids = torch.arange(20)
    rows = table.weight_4 @ table.projection_4.T
    expected = (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt()
    assert table.shares().tolist() == [0, 1]
    assert_near(table.lookup(ids), expected)


def test_noise_in_training_alone():
    """Gumbel noise makes a draw of the shares: each candidate is largest as often as its share says."""
    table = SearchedDimensionEmbedding(4, 8, (2, 4), temperature=0.05)
    table.alpha.data.copy_(torch.tensor([0.0, 1.0]))
    torch.manual_seed(0)
    largest = torch.stack([table.shares().argmax() for _ in range(2000)]).float().mean().item()
    assert largest == pytest.approx(torch.tensor(1.0).sigmoid().item(), abs=0.03)
    table.eval()
    assert torch.equal(table.shares(), table.shares())


def test_published_temperatures_and_bytes():
    assert SearchedDimensionEmbedding.temperature_at(0, 2000) == 1
    assert SearchedDimensionEmbedding.temperature_at(10_000, 2000) == pytest.approx(0.5)
    assert SearchedDimensionEmbedding.temperature_at(10**6, 2000) == 0.01
    table = SearchedDimensionEmbedding(1000, 16, norm=False, device="meta")
    assert table.nbytes() - 4 * 4 == 4 * (1000 + 16) * 30 and 4 * 1000 * 30 + 4 * 16 * 30 + 4 * 16 == 121_984


def test_finds_the_width_that_the_data_has():
    """Vectors of rank 4 are fitted better by the wider table, whose share grows."""
    torch.manual_seed(0)
    targets = torch.randn(60, 4) @ torch.randn(4, 8)
    ids = torch.arange(60)
    table = SearchedDimensionEmbedding(60, 8, (1, 4), norm=False)
    for name in ("weight_1", "weight_4"):
        torch.nn.init.normal_(getattr(table, name))
    alpha = [table.alpha]
    weights = [p for name, p in table.named_parameters() if name != "alpha"]
    optimizers = torch.optim.Adam(weights, lr=0.05), torch.optim.Adam(alpha, lr=0.05)
    for step in range(120):
        loss = (table.lookup(ids) - targets).square().mean()
        chosen = optimizers[step % 2]
        chosen.zero_grad()
        loss.backward()
        chosen.step()
    assert table.alpha[1] > table.alpha[0] and table.choose() == 4


def test_choosing():
    """The largest α, or the width that is asked for; with the optimizer; once."""
    optimizer = gossamer.optim.Adagrad(lr=0.1)
    table = SearchedDimensionEmbedding(10, 8, (2, 4), norm=False, noise=False, optimizer=optimizer)
    table.alpha.data.copy_(torch.tensor([1.0, 0.0]))
    promised = table.inference_nbytes()
    before = table.weight_2.clone()
    assert table.choose(restart=False) == 2
    assert torch.equal(table.weight, before) and table.optimizer is optimizer
    assert table.inference_nbytes() == promised == 4 * (10 * 2 + 8 * 3)
    assert set(dict(table.named_parameters())) == {"weight", "projection", "bias"}
    table.lookup(torch.tensor([1, 2])).sum().backward()
    assert not torch.equal(table.weight, before)
    with pytest.raises(ValueError, match="choose is for a table that searches, got one that chose the width 2"):
        table.choose()
    with pytest.raises(ValueError, match="shares are for a table that searches"):
        table.shares()


def budgeted(n, nbytes, alpha):
    table = SearchedDimensionEmbedding.from_budget(n, 8, nbytes, norm=False, noise=False)
    table.alpha.data.copy_(torch.tensor(alpha))
    return table


def test_a_budget_is_filled():
    """Columns that fit, a last one of some rows; frozen without a choice, the first columns of a wider candidate."""
    nbytes = 4 * (3 * 100 + 40 + 8 * 5)
    table = budgeted(100, nbytes, [0.0, 1.0, 0.0])
    assert table.candidates == (2, 4, 8) and table.inference_nbytes() == nbytes
    searched, projection = table.weight_4.clone(), table.projection_4.clone()
    assert table.freeze().nbytes() == nbytes and table.wide_rows == 40
    rows = searched * torch.tensor([1.0, 1.0, 1.0, 0.0])
    rows[:40] = searched[:40]
    assert_near(table.lookup(torch.arange(100)), (rows @ projection.T).double())


def test_budgets_of_several_tables():
    """The table whose wider candidates promise more for their bytes gets them; together the budget is filled."""
    nbytes = 4 * (100 * 3 + 8 * 4 - 20)
    tables = [budgeted(100, nbytes, [0.0, 0.1, 0.2]), budgeted(100, nbytes, [0.0, 2.0, 3.0])]
    widths = choose_widths(tables)
    # A column alone is 116 numbers, four are 440: 60 rows and a column of the projection are left.
    assert widths == [1, 4] and [t.wide_rows for t in tables] == [0, 60]
    assert [t.chosen for t in tables] == widths and sum(t.inference_nbytes() for t in tables) == 2 * nbytes
    assert choose_widths([budgeted(n, 4 * (n * 3 + 8 * 4), [0.0] * 3) for n in (100, 200)]) == [4, 2]
    with pytest.raises(ValueError, match="tables must search, got one that chose the width 1"):
        choose_widths(tables)
    with pytest.raises(ValueError, match=r"nbytes must be at least 464 for one column of each table, got 400"):
        choose_widths([budgeted(100, nbytes, [0.0] * 3)], 400)
    with pytest.raises(ValueError, match="nbytes must be given where a table has no budget, got None"):
        choose_widths([SearchedDimensionEmbedding(10, 8, (2, 4))])
    with pytest.raises(ValueError, match="tables must be at least one, got none"):
        choose_widths([])


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ((), r"candidates must be different widths up to 8, got \(\)"),
        ((2, 2), r"candidates must be different widths up to 8, got \(2, 2\)"),
        ((16,), r"candidates must be different widths up to 8, got \(16,\)"),
        ((0, 2), r"candidates\[0\] must be at least 1, got 0"),
    ],
)
def test_bad_candidates(candidates, message):
    with pytest.raises(ValueError, match=message):
        SearchedDimensionEmbedding(10, 8, candidates)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"temperature must be positive and finite, got 0\.0"):
        SearchedDimensionEmbedding(10, 8, (2,), temperature=0.0)
    with pytest.raises(ValueError, match=r"width must be one of the candidates \(2,\) without a budget, got 3"):
        SearchedDimensionEmbedding(10, 8, (2,)).choose(3)
