"""Tables of 8- and 16-bit codes: the contract of tables, steps that round, learned steps, budgets, a small training."""

import functools

import pytest
import torch
from contracts import TrainedTableContract, bag_lists, hidden_states

from gossamer import optim
from gossamer.nn import QuantizedEmbedding


def of(**more):
    """A case of the contract with options of its own, which its ``from_budget`` is given too."""

    def make(num_embeddings, embedding_dim, **options):
        return QuantizedEmbedding(num_embeddings, embedding_dim, **more, **options)

    make.from_budget = functools.partial(QuantizedEmbedding.from_budget, **more)
    return make


class TestQuantized(
    TrainedTableContract.over(
        {
            "int8": of(),
            "int16, means": of(bits=16, mode="mean", include_last_offset=True),
            "learned": of(step="learned"),
        }
    )
):
    def test_gradients(self, make, device):
        """Codes get no gradient; the weights of bags get theirs."""
        table = self.make(make, device)
        if table.mode != "sum":
            return
        ids, offsets, bags = bag_lists(self.N, device)
        factors = hidden_states(6, self.D, device=device, seed=8)
        weights = torch.linspace(-1, 1, 12, device=device).requires_grad_()
        (self.pooled(table, ids, offsets, weights) * factors).sum().backward()
        expected = (table.lookup(ids).double() * factors.double()[bags]).sum(1)
        torch.testing.assert_close(weights.grad.double(), expected, rtol=1e-5, atol=1e-7)
        assert not any(p.requires_grad for p in table.parameters())

    def test_fused_step(self, make, device):
        """Rows that were looked up take the step of plain descent, to one of the two codes about it; others stay."""
        table = self.make(make, device, optimizer=optim.SGD(lr=0.5, seed=3))
        ids, offsets, bags = bag_lists(self.N, device)
        before, scale = table.lookup(torch.arange(self.N, device=device)).double(), table.scale.double().clone()
        factors = 0.01 * hidden_states(6, self.D, device=device, seed=8)
        (self.pooled(table, ids, offsets) * factors).sum().backward()
        grad = factors.double()[bags]
        if table.mode == "mean":
            grad = grad / bags.bincount(minlength=6)[bags].unsqueeze(1)
        wanted = before.index_add(0, ids, grad, alpha=-0.5)
        after = table.lookup(torch.arange(self.N, device=device)).double()
        assert bool(((after - wanted).abs() < 1.01 * scale.unsqueeze(1)).all())
        listed = torch.zeros(self.N, dtype=torch.bool, device=device).index_fill(0, ids, True)
        assert torch.equal(after[~listed], before[~listed]) and not torch.equal(after[listed], before[listed])
        assert table.weight.grad is None and table.optimizer_step.item() == 1
        assert torch.equal(table.scale.double(), scale) == (table.step == "fixed")


def test_starts_small_and_unbiased(device):
    """Numbers uniform in ±1/√N, rounded by chance where they are far below a step."""
    table = QuantizedEmbedding(20_000, 16, device=device)
    numbers = table.lookup(torch.arange(20_000, device=device))
    bound = 20_000**-0.5
    assert set(table.weight.unique().tolist()) == {-1, 0, 1} and table.scale.item() == pytest.approx(0.01)
    # P(±1) is the mean of |x|/Δ, bound/2Δ.
    assert (numbers != 0).double().mean().item() == pytest.approx(bound / 0.02, rel=0.02)
    assert abs(numbers.mean().item()) < 6 * numbers.std().item() / (20_000 * 16) ** 0.5


def test_sizes(device):
    """Codes, and one step or a step a row."""
    for bits, step, nbytes in ((8, "fixed", 404), (16, "fixed", 804), (8, "learned", 480), (16, "learned", 880)):
        table = QuantizedEmbedding(20, 20, bits=bits, step=step, optimizer=optim.SGD(0.1), device=device)
        assert table.inference_nbytes() == nbytes == table.freeze().nbytes()
    options = {"optimizer": optim.Adam(), "device": device}
    assert QuantizedEmbedding.from_budget(20, 20, 804, **options).bits == 16
    assert QuantizedEmbedding.from_budget(20, 20, 803, **options).bits == 8
    assert QuantizedEmbedding.from_budget(20, 20, 900, bits=8, step="learned", **options).inference_nbytes() == 480
    with pytest.raises(ValueError, match=r"nbytes must be at least 404 for QuantizedEmbedding with 20 .* got 403"):
        QuantizedEmbedding.from_budget(20, 20, 403)


@pytest.mark.parametrize("step", ["fixed", "learned"])
@pytest.mark.parametrize("bits", [8, 16])
def test_from_trained_rows(device, bits, step):
    """Vectors are within half a step of the rows, and the largest is kept."""
    rows = torch.randn(50, 12, generator=torch.Generator().manual_seed(1)).to(device)
    rows[7] = 0
    table = QuantizedEmbedding.from_table(rows, bits=bits, step=step)
    found = table.lookup(torch.arange(50, device=device))
    assert bool(((found - rows).abs() <= 0.5001 * table.scale.unsqueeze(1)).all())
    assert found.abs().max().item() == pytest.approx(rows.abs().max().item(), rel=1e-6)
    assert QuantizedEmbedding.from_table(rows, nbytes=50 * 12 + 4).bits == 8
    assert QuantizedEmbedding.from_table(rows.half(), bits=bits, step_size=0.1).dtype == torch.float16
    # Far below a step that leaves room to grow, rows are rounded so that their mean stays.
    trained = QuantizedEmbedding.from_table(0.002 * rows.abs(), bits=8, step=step, optimizer=optim.SGD(0.1))
    assert bool((trained.scale == torch.tensor(0.01)).all()) and set(trained.weight.unique().tolist()) == {0, 1}
    assert trained.weight.double().mean().item() == pytest.approx(0.2 * rows.abs().mean().item(), rel=0.3)
    with pytest.raises(ValueError, match="weight must be finite, got NaN or infinity"):
        QuantizedEmbedding.from_table(torch.full((3, 2), torch.nan), bits=8)


def test_casts(device):
    """A cast changes the dtype of vectors; codes and steps keep theirs, and so does the optimizer's state."""
    table = QuantizedEmbedding(20, 8, step="learned", optimizer=optim.Adam(0.1), device=device)
    scale = table.scale.clone()
    table.bfloat16()
    assert table.weight.dtype == torch.int8 and table.scale.dtype == torch.float32 and torch.equal(table.scale, scale)
    assert table.optimizer_exp_avg.dtype == torch.float32
    ids = torch.tensor([[1, 2], [3, 1]], device=device)
    y = table(ids)
    assert y.dtype == table.lookup(ids).dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert table.optimizer_step.item() == 1


def test_maxima(device):
    """Bags of the largest go by the vectors, and step the rows that have them."""
    table = QuantizedEmbedding(20, 8, step="learned", mode="max", optimizer=optim.SGD(0.5), device=device)
    table.weight.random_(-99, 99)
    ids = torch.tensor([[1, 2, 3], [4, 5, 1]], device=device)
    rows = table.lookup(ids)
    y = table(ids)
    assert torch.equal(y, rows.amax(1))
    before = table.weight.clone()
    y.sum().backward()
    won = torch.zeros_like(before, dtype=torch.bool).scatter(
        0, ids.unsqueeze(1).gather(2, rows.transpose(1, 2).argmax(2, keepdim=True).transpose(1, 2)).squeeze(1), True
    )
    assert torch.equal(table.weight != before, won)


def test_rounds_as_the_table_says(device):
    """The optimizer's seed is kept, its way of rounding is not."""
    for rounding in ("stochastic", "nearest"):
        table = QuantizedEmbedding(20, 8, rounding=rounding, optimizer=optim.SGD(0.5, seed=9), device=device)
        assert table.optimizer.stochastic_rounding == (rounding == "stochastic") and table.optimizer.seed == 9
        table.optimizer = optim.SGD(0.1, stochastic_rounding=rounding == "nearest")
        assert table.optimizer.stochastic_rounding == (rounding == "stochastic") and table.optimizer.lr == 0.1


def test_errors(device):
    for bits in (4, 32, True, "8"):
        with pytest.raises(ValueError, match=f"bits must be 8 or 16, got {bits}"):
            QuantizedEmbedding(20, 8, bits=bits)
    with pytest.raises(ValueError, match=r"step must be one of \('fixed', 'learned'\), got 'row'"):
        QuantizedEmbedding(20, 8, step="row")
    with pytest.raises(ValueError, match=r"rounding must be one of \('stochastic', 'nearest'\), got 'up'"):
        QuantizedEmbedding(20, 8, rounding="up")
    with pytest.raises(ValueError, match=r"step_size must be in \[2\*\*-20, 2\*\*128\), got 0"):
        QuantizedEmbedding(20, 8, step_size=0)
    with pytest.raises(ValueError, match=r"step_lr must be in \[0, inf\), got -1"):
        QuantizedEmbedding(20, 8, step="learned", step_lr=-1)
    with pytest.raises(TypeError, match=r"dtype must be floating, got torch.int8"):
        QuantizedEmbedding(20, 8, dtype=torch.int8)
    table = QuantizedEmbedding(20, 8, optimizer=optim.SGD(0.5), device=device).freeze()
    with pytest.raises(ValueError, match="optimizer must be None for a frozen table, got SGD"):
        table.attach(optim.SGD(0.5))
    wide = QuantizedEmbedding(20, 8, bits=16, device=device)
    with pytest.raises(RuntimeError, match=r"weight must hold torch.int16, got torch.int8"):
        wide.load_state_dict(table.state_dict())


def distance(table, steps, device):
    """How far rows are from those of a planted table, in the mean square, after training on bags of it."""
    draw = torch.Generator().manual_seed(0)
    planted = 0.5 * torch.randn(200, 8, generator=draw).to(device)
    for _ in range(steps):
        ids = torch.randint(200, (64, 3), generator=draw).to(device)
        (table(ids) - planted[ids].sum(1)).square().mean().backward()
    return (table.lookup(torch.arange(200, device=device)) - planted).square().mean().item()


def test_trains_where_nearest_rounding_stalls(device):
    """Steps below half of Δ: rounded by chance, rows come near the planted ones; to the nearest, none is ever taken."""
    found = {}
    for rounding in ("stochastic", "nearest"):
        torch.manual_seed(1)
        table = QuantizedEmbedding(200, 8, rounding=rounding, step_size=0.3, optimizer=optim.SGD(lr=1.5), device=device)
        before = table.weight.clone()
        found[rounding] = distance(table, 400, device)
        assert torch.equal(table.weight, before) == (rounding == "nearest")
    assert found["stochastic"] < 0.3 * found["nearest"]


def test_learned_steps_outgrow_a_bad_start(device):
    """From a step that is far too wide, a table whose steps learn comes nearer to the planted rows."""
    found = {}
    for step in ("fixed", "learned"):
        torch.manual_seed(1)
        how = {"step": step, "step_size": 0.3, "step_lr": 200.0, "optimizer": optim.SGD(lr=5.0)}
        table = QuantizedEmbedding(200, 8, device=device, **how)
        found[step] = distance(table, 400, device)
    assert found["learned"] < 0.6 * found["fixed"] and table.scale.mean().item() < 0.25
