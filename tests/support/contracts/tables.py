"""The contracts of tables, and of tables that are trained."""

import functools
import inspect
import re

import pytest
import torch

import gossamer
from contracts.base import FLOATS, Contract, assert_gradients, assert_near, functional, hidden_states, parameters


def bag_lists(num_embeddings, device):
    """Ids, offsets without the last one, and the bag of each id: empty bags, one id twice in a bag, one in two bags."""
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(0, num_embeddings, (12,), generator=generator)
    ids[1] = ids[0]
    ids[7] = ids[0]
    offsets = torch.tensor([0, 0, 3, 3, 9, 12])
    bags = torch.repeat_interleave(torch.arange(6), torch.tensor([0, 3, 0, 6, 3, 0]))
    return ids.to(device), offsets.to(device), bags.to(device)


class TableContract(Contract):
    """The contract of tables; a case makes one from ``num_embeddings``, ``embedding_dim``, ``device`` and ``dtype``.

    A case's table knows all ids below ``num_embeddings``, pools sums or means, and takes ``optimizer`` too.
    ``both_widths`` says whether it takes ids of both 32 and 64 bits; ``computed`` says whether vectors come from
    products, whose last bits depend on how many are computed at once.
    """

    N, D = 30, 8
    both_widths = True
    computed = False

    def assert_same(self, found, expected):
        if self.computed:
            assert_near(found, expected.double())
        else:
            assert torch.equal(found, expected)

    def make(self, make, device, dtype=torch.float32, n=None, **options):
        return make(num_embeddings=n or self.N, embedding_dim=self.D, device=device, dtype=dtype, **options)

    def test_lookup(self, make, device):
        """The vector of an id is the same whatever the shape of the ids and whatever else is looked up."""
        table = self.make(make, device)
        ids = torch.randint(0, self.N, (3, 4), generator=torch.Generator().manual_seed(1)).to(device)
        rows = table.lookup(ids)
        assert rows.shape == (3, 4, self.D) and rows.dtype == torch.float32
        for index in ((0, 0), (2, 3)):
            self.assert_same(rows[index], table.lookup(ids[index].reshape(1))[0])
        if self.both_widths:
            assert torch.equal(table.lookup(ids.int()), rows)
        assert table.lookup(ids[:0]).shape == (0, 4, self.D)
        assert table.embedding_dim == self.D

    def test_bags(self, make, device):
        """Pooled vectors by offsets and by rows of ids; empty bags are zero."""
        table = self.make(make, device)
        ids, offsets, bags = bag_lists(self.N, device)
        rows = table.lookup(ids).detach().double()
        sums = torch.zeros(6, self.D, dtype=torch.float64, device=device).index_add(0, bags, rows)
        if getattr(table, "mode", "sum") == "mean":
            sums = sums / bags.bincount(minlength=6).clamp(min=1).unsqueeze(1)
        pooled = self.pooled(table, ids, offsets)
        assert_near(pooled, sums)
        assert not pooled[[0, 2, 5]].any()
        fixed = self.pooled(table, ids.view(4, 3))
        ends = torch.arange(0, 12, 3, device=device)
        assert_near(fixed, self.pooled(table, ids, ends).double())
        assert self.pooled(table, ids[:0], offsets[:0]).shape == (0, self.D)

    def pooled(self, table, ids, offsets=None, weights=None, through=None):
        """The bags of a table, or of a function of it, by offsets without the last one."""
        if offsets is not None and getattr(table, "include_last_offset", False):
            offsets = torch.cat([offsets, offsets.new_full((1,), ids.shape[0])])
        return (table if through is None else through)(ids, offsets, weights)

    def test_weighted_bags(self, make, device):
        table = self.make(make, device)
        if getattr(table, "mode", "sum") != "sum":
            return
        ids, offsets, bags = bag_lists(self.N, device)
        weights = torch.linspace(-1, 1, 12, device=device)
        rows = table.lookup(ids).detach().double() * weights.double().unsqueeze(1)
        sums = torch.zeros(6, self.D, dtype=torch.float64, device=device).index_add(0, bags, rows)
        assert_near(self.pooled(table, ids, offsets, weights), sums)

    def test_shapes_are_refused_by_name(self, make, device):
        """Errors use the names of the layer's arguments, not those of the primitives behind it."""
        table = self.make(make, device)
        ids, offsets, _ = bag_lists(self.N, device)
        name = next(iter(inspect.signature(table.forward).parameters))
        with pytest.raises(ValueError, match=rf"\b{name}\b .*(shape|1D or 2D)"):
            table(ids.view(2, 2, 3))
        with pytest.raises(ValueError, match=rf"weights must have .*shape .*{name}"):
            table(ids, offsets, torch.ones(5, device=device))

    def test_same_bits_twice(self, make, device):
        table = self.make(make, device)
        ids, offsets, _ = bag_lists(self.N, device)
        assert torch.equal(self.pooled(table, ids, offsets), self.pooled(table, ids, offsets))

    def test_one_row(self, make, device):
        table = self.make(make, device, n=1)
        rows = table.lookup(torch.zeros(5, dtype=torch.int64, device=device))
        self.assert_same(rows, rows[:1].expand(5, -1))

    def test_bytes(self, make, device):
        """Bytes for training include the optimizer's state; after freezing, the bytes held are those promised."""
        table = self.make(make, device, optimizer=gossamer.optim.Adam(lr=0.1))
        plain = self.make(make, device)
        assert table.nbytes() > plain.inference_nbytes() == table.inference_nbytes() > 0
        ids = torch.arange(self.N, device=device)
        with torch.no_grad():
            before = table.eval().lookup(ids)
        assert table.freeze() is table
        assert table.nbytes() == table.inference_nbytes() == plain.inference_nbytes()
        assert table.frozen and not table.training
        assert torch.equal(table.lookup(ids), before)
        if device == "cpu":
            with pytest.raises((TypeError, ValueError), match="device"):
                table.lookup(ids.to("meta"))
        with pytest.raises(ValueError, match="optimizer must be None for a frozen table"):
            table.optimizer = gossamer.optim.Adam(lr=0.1)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_dtypes(self, make, device, dtype):
        table = self.make(make, device, dtype)
        rows = table.lookup(torch.arange(self.N, device=device))
        assert rows.dtype == dtype and bool(rows.isfinite().all())

    def test_state_dict(self, make, device):
        first = self.make(make, device, optimizer=gossamer.optim.Adam(lr=0.1))
        ids = torch.arange(self.N, device=device)
        first.lookup(ids).square().sum().backward()
        second = self.make(make, device, optimizer=gossamer.optim.Adam(lr=0.1))
        second.load_state_dict(first.state_dict())
        for table in (first, second):
            table.lookup(ids).square().sum().backward()
        assert torch.equal(first.lookup(ids), second.lookup(ids))
        # The state of a frozen table loads into another frozen one.
        served = self.make(make, device).freeze()
        served.load_state_dict(first.freeze().state_dict())
        assert torch.equal(served.lookup(ids), first.lookup(ids))


class TrainedTableContract(TableContract):
    """The additional contract of tables that are parameters: gradients, fused steps, compilation, a budget.

    A case whose ``from_budget`` needs arguments other than the sizes supplies them by an attribute ``from_budget``.
    ``any_ids`` says whether the table takes all ids of 64 bits.
    """

    any_ids = False

    def test_gradients(self, make, device):
        table = self.make(make, device, torch.float64)
        ids, offsets, _ = bag_lists(self.N, device)
        factors = hidden_states(6, self.D, device=device, dtype=torch.float64, seed=8)

        def call(forward):
            return (self.pooled(table, ids, offsets, through=forward) * factors).sum()

        inputs = parameters(table, self.detached)
        assert inputs
        assert_gradients(functional(table, call), inputs)

    def test_fused_step(self, make, device):
        """A backward pass moves the tables by a step of plain gradient descent, and leaves them without a gradient.

        Other parameters, such as projections, get the same gradient as with a plain table.
        """
        plain = self.make(make, device)
        fused = self.make(make, device, optimizer=gossamer.optim.SGD(lr=0.5))
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                fused.get_parameter(name).copy_(parameter)
        ids, offsets, _ = bag_lists(self.N, device)
        factors = hidden_states(6, self.D, device=device, seed=8)
        for table in (plain, fused):
            (self.pooled(table, ids, offsets) * factors).sum().backward()
        for name, parameter in plain.named_parameters():
            moved = fused.get_parameter(name)
            if name not in fused.tables:
                assert_near(moved.grad, parameter.grad)
                continue
            assert moved.grad is None and not moved.requires_grad
            assert_near(moved, parameter - 0.5 * parameter.grad)
            assert not torch.equal(moved, parameter)

    def test_compiles(self, make, device):
        table = self.make(make, device)
        ids, offsets, _ = bag_lists(self.N, device)
        # Tables share a forward function, and torch limits how many of them it compiles it for.
        torch._dynamo.reset()
        compiled = torch.compile(table, fullgraph=True, backend="aot_eager")
        assert torch.equal(self.pooled(table, ids, offsets, through=compiled), self.pooled(table, ids, offsets))

    def test_ids_outside(self, make, device):
        table = self.make(make, device)
        if self.any_ids:
            ids = torch.tensor([-1, -(2**63), 2**63 - 1, self.N], device=device)
            assert bool(table.lookup(ids).isfinite().all())
        elif device == "cpu":
            for bad in (-1, self.N):
                with pytest.raises(IndexError):
                    table.lookup(torch.tensor([0, bad]))

    def test_budget(self, make, device):
        """The smallest size that an error names is accepted, a byte less is refused, and tables fit their budgets."""
        table = self.make(make, device)
        from_budget = functools.partial(getattr(make, "from_budget", type(table).from_budget), self.N, self.D)
        with pytest.raises(ValueError, match=r"nbytes must be at least \d+ for .*, got 1$") as refused:
            from_budget(1, device=device)
        smallest = int(re.search(r"at least (\d+)", str(refused.value))[1])
        with pytest.raises(ValueError, match=f"nbytes must be at least {smallest} for .*, got {smallest - 1}"):
            from_budget(smallest - 1, device=device)
        for nbytes in (smallest, max(smallest, table.inference_nbytes())):
            made = from_budget(nbytes, device=device)
            assert made.inference_nbytes() <= nbytes
            assert made.lookup(torch.arange(self.N, device=device)).shape[0] == self.N
        assert made.inference_nbytes() >= table.inference_nbytes()
        with pytest.raises(TypeError, match="nbytes must be an int, got float"):
            from_budget(0.5, device=device)
        with pytest.raises(ValueError, match="nbytes must be at least 1, got 0"):
            from_budget(0, device=device)
