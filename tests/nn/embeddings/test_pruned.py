"""Tables that are trained dense and served as their largest entries."""

import pytest
import torch
from contracts import TrainedTableContract, assert_near

import gossamer
from gossamer.nn import PrunedEmbedding
from gossamer.nn.embeddings.pruned import SparseRows


def case(density=0.4, **how):
    def make(num_embeddings, embedding_dim, **options):
        table = PrunedEmbedding(num_embeddings, embedding_dim, density, **how | options)
        if how.get("initial_threshold") is not None and not table.weight.is_meta:
            # Entries on both sides of their thresholds.
            with torch.no_grad():
                table.weight.mul_(3)
        return table

    return make


def sparsified(**how):
    def make(*args, **options):
        table = case(**how)(*args, **options)
        table.sparsify()
        return table

    return make


class TestPruned(
    TrainedTableContract.over(
        {
            "magnitudes": sparsified(),
            "magnitudes, few a row": sparsified(density=0.05),
            "a mask after scales": sparsified(criterion="group_scales", mode="mean"),
            "a mask after thresholds": sparsified(criterion="thresholds", initial_threshold=-3.0),
        }
    )
):
    # Masked entries get no gradient, which the step leaves where they are.
    def test_fused_step(self, make, device):
        plain, fused = self.make(make, device), self.make(make, device, optimizer=gossamer.optim.SGD(lr=0.5))
        fused.weight.data.copy_(plain.weight)
        fused.mask.copy_(plain.mask)
        ids = torch.arange(self.N, device=device)
        for table in (plain, fused):
            table.lookup(ids).square().sum().backward()
        assert_near(fused.weight, plain.weight - 0.5 * plain.weight.grad)
        assert not fused.weight[~fused.mask].any()


class TestInTraining(
    TrainedTableContract.over(
        {
            "scales": case(density=1.0, criterion="group_scales"),
            "thresholds of rows": case(density=1.0, criterion="thresholds", initial_threshold=-3.0),
            "thresholds of entries": case(
                density=1.0, criterion="thresholds", threshold_shape="entry", initial_threshold=-3.0
            ),
            "one threshold": case(
                density=1.0, criterion="thresholds", threshold_shape="table", initial_threshold=-3.0, mode="mean"
            ),
        }
    )
):
    # Freezing folds the scales in; that the vectors stay the same is tested below.
    test_budget = None


def test_published_threshold():
    """E = 0.3, s = −1: ê = 0.03106, and the gradients 1 and −σ(s)(1 − σ(s))."""
    table = PrunedEmbedding(1, 1, 1.0, criterion="thresholds", dtype=torch.float64)
    table.weight.data.fill_(0.3)
    table.thresholds.data.fill_(-1.0)
    out = table.lookup(torch.tensor([0]))
    out.sum().backward()
    assert out.item() == pytest.approx(0.03106, abs=5e-6)
    assert table.weight.grad.item() == 1 and table.thresholds.grad.item() == pytest.approx(-0.19661, abs=5e-6)


@pytest.mark.parametrize("num_embeddings", [1, 2])
@pytest.mark.parametrize("shape", ["table", "column", "row", "entry"])
def test_thresholds_of_rows_and_entries_are_in_the_fused_step(shape, num_embeddings):
    """Those of one row too; thresholds that rows share keep their gradient for an optimizer of the user's."""
    how = {"criterion": "thresholds", "threshold_shape": shape, "initial_threshold": -1.0, "dtype": torch.float64}
    plain = PrunedEmbedding(num_embeddings, 3, 1.0, **how)
    fused = PrunedEmbedding(num_embeddings, 3, 1.0, **how, optimizer=gossamer.optim.SGD(lr=0.5))
    for table in (plain, fused):
        table.weight.data.fill_(0.9)
        table.lookup(torch.arange(num_embeddings)).square().sum().backward()
    gradient = plain.thresholds.grad
    assert (gradient != 0).all()
    assert_near(fused.weight, plain.weight - 0.5 * plain.weight.grad)
    if shape in ("row", "entry"):
        assert fused.thresholds.grad is None and not fused.thresholds.requires_grad
        assert_near(fused.thresholds, plain.thresholds - 0.5 * gradient)
    else:
        assert torch.equal(fused.thresholds, plain.thresholds) and torch.equal(fused.thresholds.grad, gradient)


def test_published_schedule():
    table = PrunedEmbedding(10, 10, 0.1)
    shares = [table.sparsity(step) for step in (100, 1000, 5000, 68_740)]
    assert shares == pytest.approx([0.009, 0.08606, 0.35549, 0.89910], abs=6e-6)
    table.prune(5000)
    assert int((table.weight == 0).sum()) == 35
    smallest = table.weight[table.weight != 0].abs().min()
    table.weight.data[table.weight == 0] = smallest / 2
    table.prune(1000)
    assert int((table.weight == 0).sum()) == 8


def test_scales_of_one_are_the_dense_table():
    frequencies = torch.tensor([5.0, 1, 9, 3])
    table = PrunedEmbedding(4, 3, 1.0, criterion="group_scales", num_groups=2, frequencies=frequencies)
    ids = torch.arange(4)
    assert torch.equal(table.lookup(ids), table.weight)
    assert table.group_of_id.tolist() == [0, 1, 0, 1]
    table.scales.data.copy_(torch.tensor([[2.0, 0.5, 1], [0, 1, -1]]))
    table.clip_scales()
    expected = table.weight * torch.tensor([[1.0, 0.5, 1], [0, 1, 0]])[[0, 1, 0, 1]]
    assert torch.equal(table.lookup(ids), expected)
    assert torch.equal(table.freeze().lookup(ids), expected)


def test_keeps_the_largest():
    """The share that is asked for, the first among equals; a restart keeps the mask and takes the old values."""
    table = PrunedEmbedding(4, 4, 0.25)
    first = torch.arange(16.0).view(4, 4) * 0.5
    table.weight.data.copy_(torch.ones(4, 4))
    table.weight.data[2] = torch.tensor([3.0, -4.0, 0.5, 1.0])
    table.sparsify(restart_from=first)
    assert table.mask.nonzero().tolist() == [[0, 0], [0, 1], [2, 0], [2, 1]]
    assert torch.equal(table.weight, first * table.mask)
    rows = table.lookup(torch.tensor([2, 3])).detach()
    assert torch.equal(table.freeze().lookup(torch.tensor([2, 3])), rows)


def test_stores_entries_by_row_or_alone():
    """Where rows begin, for many entries a row; the row of each entry, for few; columns in a byte."""
    for density, rows in ((0.5, 101), (0.05, 40)):
        table = PrunedEmbedding(100, 8, density)
        promised = table.inference_nbytes()
        table.freeze()
        kept = int(density * 800)
        assert table.served.rows.shape == (rows,) and table.served.values.shape == (kept,)
        assert table.nbytes() == promised == kept * 5 + rows * 4
    with pytest.raises(IndexError, match=r"ids must be in \[0, N\) with N=100, got 3 to 100"):
        table.lookup(torch.tensor([3, 100]))


@pytest.mark.parametrize("by_row", [True, False])
def test_rows_without_entries(by_row):
    dense = torch.tensor([[0.0, 0, 0], [1, 0, 2], [0, 0, 0], [0, 3, 0]])
    stored = SparseRows(dense != 0, dense, by_row)
    assert torch.equal(stored.lookup(torch.tensor([3, 0, 1, 1, 2])), dense[[3, 0, 1, 1, 2]])
    empty = SparseRows(torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3), by_row)
    assert not empty.lookup(torch.tensor([0, 1])).any()


@pytest.mark.parametrize("share", [0.5, 0.2, 0.05, 0.01])
def test_budgets_are_spent(share):
    wanted = int(share * 5000 * 16 * 4)
    table = PrunedEmbedding.from_budget(5000, 16, wanted)
    assert 0.99 * wanted < table.inference_nbytes() <= wanted
    assert table.freeze().nbytes() <= wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0\.0"),
        ({"criterion": "luck"}, "criterion must be one of .*, got 'luck'"),
        ({"threshold_shape": "cube"}, "threshold_shape must be one of .*, got 'cube'"),
        (
            {"criterion": "group_scales", "frequencies": torch.ones(3)},
            r"frequencies must have shape \(N,\) = \(4\), got \(3,\)",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PrunedEmbedding(4, 4, **{"density": 0.5} | arguments)


def test_bad_calls():
    table = PrunedEmbedding(4, 4, 0.5, criterion="thresholds")
    with pytest.raises(ValueError, match="prune is for tables in training by 'magnitude', got criterion='thresholds'"):
        table.prune(3)
    with pytest.raises(ValueError, match="clip_scales is for criterion='group_scales', got criterion='thresholds'"):
        table.clip_scales()
    with pytest.raises(ValueError, match="sparsify is for tables in training, got a frozen one"):
        table.freeze().sparsify()
