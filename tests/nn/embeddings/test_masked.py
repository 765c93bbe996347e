"""Tables that drop rows by a trained norm and columns by search."""

import math

import pytest
import torch
from contracts import TrainedTableContract, assert_near

import gossamer
from gossamer.nn import MaskedEmbedding, search_widths
from gossamer.nn.embeddings.masked import step_above


def case(width=None, drop=0, **how):
    def make(num_embeddings, embedding_dim, **options):
        table = MaskedEmbedding(num_embeddings, embedding_dim, width, regularization=0.0, **how | options)
        if drop and num_embeddings > 1 and not table.weight.is_meta:
            table.weight.data[::drop] *= 1e-3
            table.threshold.data.fill_(0.05 / math.sqrt(num_embeddings))
        return table

    return make


class TestMasked(
    TrainedTableContract.over(
        {"all rows": case(), "some columns": case(width=3, mode="mean"), "some rows": case(drop=3, width=5)},
        # What stands in for the step's derivative is tested below.
        detached=("threshold", "weight"),
    )
):
    test_gradients = None

    def test_fused_step(self, make, device):
        plain, fused = self.make(make, device), self.make(make, device, optimizer=gossamer.optim.SGD(lr=0.5))
        fused.load_state_dict(plain.state_dict(), strict=False)
        ids = torch.arange(self.N, device=device)
        for table in (plain, fused):
            table.lookup(ids).square().sum().backward()
        assert_near(fused.weight, plain.weight - 0.5 * plain.weight.grad)
        assert_near(fused.threshold.grad, plain.threshold.grad)


def test_published_slopes():
    u = torch.tensor([0.0, 0.2, 0.4, 0.7, 1.2, -0.2], requires_grad=True)
    step = step_above(u)
    assert step.tolist() == [0, 1, 1, 1, 1, 0]
    (slopes,) = torch.autograd.grad(step.sum(), u)
    assert slopes.tolist() == pytest.approx([2, 1.2, 0.4, 0.4, 0, 1.2])


def test_gradients_by_their_formulas():
    """Dt = −Σ slope·⟨g, e⟩ − r·exp(−t), and de = g·mask + slope·sign(e)·⟨g, e⟩."""
    table = MaskedEmbedding(6, 4, regularization=0.3, dtype=torch.float64)
    table.weight.data.uniform_(-0.3, 0.3)
    table.threshold.data.fill_(0.5)
    ids = torch.tensor([0, 3, 3, 5])
    g = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (table.lookup(ids) * g).sum().backward()
    e = table.weight.detach()[ids]
    u = e.abs().sum(1) - 0.5
    distance = u.abs()
    slope = torch.where(distance <= 0.4, 2 - 4 * distance, torch.where(distance <= 1, 0.4, 0.0))
    along = (g * e).sum(1) * slope
    assert_near(table.threshold.grad, -along.sum().view(1) - 0.3 * math.exp(-0.5))
    per_id = g * (u > 0).unsqueeze(1) + along.unsqueeze(1) * e.sign()
    assert_near(table.weight.grad, torch.zeros_like(table.weight).index_add(0, ids, per_id))


def test_drops_rows_and_columns():
    table = MaskedEmbedding(4, 3, 2)
    table.weight.data.copy_(torch.tensor([[1.0, 1, 1], [0, 0.1, 0], [2, -2, 5], [0.1, 0, 0]]))
    table.threshold.data.fill_(0.5)
    expected = torch.tensor([[1.0, 1, 0], [0, 0, 0], [2, -2, 0], [0, 0, 0]])
    ids = torch.arange(4)
    assert torch.equal(table.lookup(ids), expected)
    promised = table.inference_nbytes()
    table.freeze()
    assert table.row_of_id.tolist() == [0, -1, 1, -1] and table.weight.shape == (2, 2)
    assert torch.equal(table.lookup(ids), expected)
    assert table.nbytes() == promised == 2 * 2 * 4 + 4 * 4
    nothing = MaskedEmbedding(2, 3)
    nothing.threshold.data.fill_(99.0)
    assert not nothing.freeze().lookup(torch.tensor([1, 0])).any()


def test_samples_widths_in_training():
    """Every width from 1 to D comes, as a prefix, and none in evaluation."""
    table = MaskedEmbedding(3, 4)
    table.sample_widths = True
    torch.manual_seed(0)
    rows = table.lookup(torch.zeros(400, dtype=torch.int64)) != 0
    widths = rows.sum(1)
    assert torch.equal(rows, torch.arange(4) < widths.unsqueeze(1))
    assert widths.bincount(minlength=5).tolist()[0] == 0 and widths.unique().tolist() == [1, 2, 3, 4]
    assert bool((table.eval().lookup(torch.tensor([0])) != 0).all())


def test_regularization_drops_rows_that_nothing_needs():
    """Rows that carry a signal stay, noise of small norm goes, once the threshold is trained."""
    torch.manual_seed(0)
    table = MaskedEmbedding(40, 4, regularization=0.05)
    table.weight.data.normal_(std=0.02)
    targets = torch.zeros(40, 4)
    targets[:10] = torch.randn(10, 4)
    optimizer = torch.optim.Adam(table.parameters(), lr=0.02)
    for _ in range(150):
        loss = (table.lookup(torch.arange(40)) - targets).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    kept = table.kept()
    assert kept[:10].all() and not kept[10:].any()


def test_search_finds_the_widths_that_count():
    """A score that only some columns of some tables earn, under a bound on bytes."""
    tables = [MaskedEmbedding(100, 8) for _ in range(3)]
    useful = (1, 6, 3)

    def score():
        return sum(min(table.width, most) for table, most in zip(tables, useful, strict=True))

    bound = 100 * 10 * 4 + 3 * 400
    found = search_widths(tables, score, rounds=30, mutation_probability=0.4, nbytes=bound, seed=1)
    assert found == list(useful) == [table.width for table in tables]
    assert search_widths(tables, score, rounds=2, seed=1) == search_widths(tables, score, rounds=2, seed=1)
    with pytest.raises(ValueError, match=r"nbytes must be at least \d+ for one column of each table, got 10"):
        search_widths(tables, score, nbytes=10)
    with pytest.raises(ValueError, match="tables must be at least one, got none"):
        search_widths([], score)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
def test_budgets(share):
    wanted = int(share * 1000 * 16 * 4)
    table = MaskedEmbedding.from_budget(1000, 16, wanted)
    assert 0.98 * wanted < table.inference_nbytes() <= wanted
    assert table.freeze().nbytes() <= wanted


def test_a_budget_holds_after_training():
    """Frozen, the largest rows are left that the budget has room for, however many are above the threshold by then."""
    for threshold in (-1.0, 100.0):
        table = MaskedEmbedding.from_budget(50, 4, 4 * 50 + 4 * 20)
        norms = table.weight.detach().abs().sum(1)
        table.threshold.data.fill_(threshold)
        assert table.freeze().nbytes() == 280
        assert set(norms.topk(20).indices.tolist()) == set(table.kept().nonzero().flatten().tolist())
    with pytest.raises(ValueError, match="count must be at most 10, of a table in training, got 11"):
        MaskedEmbedding(10, 4).keep_largest(11)


def test_bad_arguments():
    with pytest.raises(ValueError, match="width must be at most embedding_dim, 4, got 5"):
        MaskedEmbedding(10, 4, 5)
    with pytest.raises(ValueError, match=r"regularization must be at least 0, got -1\.0"):
        MaskedEmbedding(10, 4, regularization=-1.0)
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], of a table in training, got 0"):
        MaskedEmbedding(10, 4).set_share(0)
