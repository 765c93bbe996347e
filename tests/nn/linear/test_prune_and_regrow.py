"""Prune and regrow: rules by hand, the budget, the optimizer's state, and a model that learns with it."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import randn
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gossamer import _backend
from gossamer.nn import BlockSparseLinear, PruneAndRegrow
from gossamer.nn.linear.prune_and_regrow import moved_mask


def network(device, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        BlockSparseLinear(64, 128, density=0.2, block=16, device=device),
        nn.ReLU(),
        BlockSparseLinear(128, 40, density=0.25, block=16, device=device),
    )


def test_rigl_by_hand():
    """One of three is dropped, and the place of largest gradient is grown."""
    mask = torch.tensor([1, 1, 1, 0, 0, 0], dtype=torch.bool)
    norms = torch.tensor([0.9, 0.1, 0.4, 0.0, 0.0, 0.0])
    gradient = torch.tensor([0.2, 0.0, 0.1, 0.5, 0.7, 0.3])
    assert moved_mask(mask, norms, gradient, 1).int().tolist() == [1, 0, 1, 0, 1, 0]
    # What was just dropped can come back, what is kept cannot be grown twice, and nothing at all may move.
    gradient[1] = 0.8
    assert moved_mask(mask, norms, gradient, 1).int().tolist() == [1, 1, 1, 0, 0, 0]
    gradient[0] = 9.0
    assert moved_mask(mask, norms, gradient, 2).int().tolist() == [1, 1, 0, 0, 1, 0]
    assert torch.equal(moved_mask(mask, norms, gradient, 0), mask)
    assert torch.equal(moved_mask(~torch.zeros(3, dtype=torch.bool), norms[:3], gradient[:3], 3), torch.ones(3) > 0)


def test_fractions_by_hand():
    model = network("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rigl = PruneAndRegrow(model, optimizer, until=25_000)
    assert [round(rigl.fraction_at(t), 12) for t in (0, 12_500, 25_000, 30_000)] == [0.3, 0.15, 0.0, 0.0]
    dsl = PruneAndRegrow(model, optimizer, rule="dsl", until=1000)
    assert [round(dsl.fraction_at(t), 12) for t in (0, 500, 1000)] == [0.5, 0.2525, 0.005]
    assert PruneAndRegrow(model, optimizer, until=10, anneal="constant").fraction_at(7) == 0.3


def steps(model, optimizer, moves, count, device, each=None):
    """Regression on a fixed teacher; returns the losses and which steps moved blocks."""
    teacher = randn(40, 64, seed=99, device=device) * 0.3
    losses, moved = [], []
    for step in range(count):
        x = randn(32, 64, seed=step, device=device)
        loss = F.mse_loss(model(x), torch.tanh(x @ teacher.t()))
        optimizer.zero_grad()
        loss.backward()
        moved.append(moves.step())
        losses.append(float(loss.detach()))
        if each is not None:
            each(step)
    return losses, moved


@pytest.mark.parametrize("rule", ["set", "rigl", "dsl"])
def test_training(device, rule):
    """The loss goes down while blocks move; each layer keeps its number of blocks, and something does move."""
    model = network(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    moves = PruneAndRegrow(model, optimizer, rule=rule, every=5, until=60)
    layers = [model[0], model[2]]
    budgets, seen = [layer.values.shape[0] for layer in layers], [set(), set()]

    def each(step):
        for layer, budget, masks in zip(layers, budgets, seen, strict=True):
            assert int(layer.block_mask.sum()) == layer.values.shape[0] == budget
            assert torch.equal(layer.topology.to_mask(), layer.block_mask)
            masks.add(tuple(layer.block_mask.flatten().tolist()))

    losses, moved = steps(model, optimizer, moves, 80, device, each)
    assert [step + 1 for step, due in enumerate(moved) if due] == list(range(5, 60, 5)) and moves.steps == 80
    assert min(len(masks) for masks in seen) >= 3
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_state_of_the_optimizer_moves_along(device):
    """Adam's moments and SGD's momentum stay with the blocks they are of; new blocks have none."""
    for make in (
        lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    ):
        model = network(device)
        layer, optimizer = model[0], make(model.parameters())
        moves = PruneAndRegrow(model, optimizer, rule="rigl", every=4, until=100, fraction=0.5)
        steps(model, optimizer, moves, 3, device)
        names = [n for n, v in optimizer.state[layer.values].items() if v is not None and v.shape == layer.values.shape]
        assert names in (["exp_avg", "exp_avg_sq", "max_exp_avg_sq"], ["momentum_buffer"])

        def by_place(names=names, layer=layer, optimizer=optimizer):
            places = layer.topology.flat_places().tolist()
            held = [layer.values.detach(), *(optimizer.state[layer.values][n] for n in names)]
            return {place: [t[i].clone() for t in held] for i, place in enumerate(places)}

        before, bias = by_place(), layer.bias.detach().clone()
        _, moved = steps(model, optimizer, moves, 1, device)
        after = by_place()
        assert moved == [True] and before.keys() != after.keys()
        for place, tensors in after.items():
            if place in before:
                assert all(torch.equal(*pair) for pair in zip(tensors, before[place], strict=True))
            else:
                assert not any(t.any() for t in tensors)
        # The move took the place of the step of all parameters.
        assert torch.equal(layer.bias, bias) and layer.values.grad is None
        steps(model, optimizer, moves, 1, device)


def test_dsl_moves_after_the_step(device):
    model = network(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moves = PruneAndRegrow(model, optimizer, rule="dsl", every=1, until=10, fraction=0.01, final_fraction=0.01)
    bias, mask = model[0].bias.detach().clone(), model[0].block_mask.clone()
    steps(model, optimizer, moves, 1, device)
    assert not torch.equal(model[0].bias, bias)
    # ⌈6 · 0.01⌉ is one block out and one in, unless the one out came back.
    assert int((mask ^ model[0].block_mask).sum()) in (0, 2)


@pytest.mark.parametrize("rule", ["rigl", "dsl"])
def test_growth_follows_the_dense_gradient(device, rule):
    """Blocks grown are those of largest gradient among what was not kept, by the dense computation."""
    model = network(device)
    layer, optimizer = model[0], torch.optim.SGD(model.parameters(), lr=0.0)
    moves = PruneAndRegrow(model, optimizer, rule=rule, every=1, until=100, fraction=0.5)
    norms = {
        place: float(block.norm())
        for place, block in zip(layer.topology.flat_places().tolist(), layer.values.detach(), strict=True)
    }
    dense = nn.Sequential(layer.to_linear(), nn.ReLU(), model[2].to_linear())
    x = randn(32, 64, seed=0, device=device)
    F.mse_loss(dense(x), torch.tanh(x @ (randn(40, 64, seed=99, device=device) * 0.3).t())).backward()
    gradient = dense[0].weight.grad.view(8, 16, 4, 16).square().sum((1, 3)).flatten()
    share = moves.fraction_at(1) * len(norms)
    count = math.ceil(share) if rule == "dsl" else math.floor(share)
    kept = set(sorted(norms, key=norms.get)[count:])
    grown = sorted((p for p in range(32) if p not in kept), key=lambda p: -float(gradient[p]))[:count]
    steps(model, optimizer, moves, 1, device)
    assert set(layer.topology.flat_places().tolist()) == kept | set(grown) and count >= 2


def test_gradients_are_watched_in_due_steps_only(device):
    model = network(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moves = PruneAndRegrow(model, optimizer, every=3, until=100)
    watched, called = [], []
    for step in range(6):
        model(randn(4, 64, seed=step, device=device)).sum().backward()
        watched.append([bool(layer._observed) for layer in moves.layers])
        moves.step(lambda step=step: called.append(step))
    assert called == [0, 1, 3, 4]
    assert watched == [[False] * 2, [False] * 2, [True] * 2] * 2
    assert all(layer._observed is None for layer in moves.layers)
    with pytest.raises(ValueError, match="gradient_norms needs observe_gradient"):
        moves.move()


class Sizes(TorchDispatchMode):
    """The most elements of a tensor that an operator returned."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_nothing_dense_is_held(device):
    """Training at 1/32 makes no tensor as large as the dense weight, in a move too; its optimizer holds 1/32."""
    layer = BlockSparseLinear(512, 1024, density=1 / 32, block=16, device=device)
    if _backend.resolve("block_sparse", layer.values) == "reference":
        pytest.skip("plain torch computes block-sparse products by dense ones")
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    moves = PruneAndRegrow(layer, optimizer, every=2, until=100)
    x = randn(16, 512, device=device)
    for due in (False, True):
        with Sizes() as sizes:
            layer(x).square().sum().backward()
            assert moves.step() == due
        # A band of the gradient in a move; otherwise nothing but the blocks and the activations.
        assert sizes.largest <= (256 * 512 if due else 16 * 1024)
    held = [v for v in optimizer.state[layer.values].values() if v.numel() > 1]
    assert [v.numel() for v in held] == [layer.values.numel()] * 2 and layer.values.numel() == 512 * 1024 // 32


def test_frozen_and_unused_layers_stay(device):
    model = network(device)
    model[0].values.requires_grad_(False)
    unused = BlockSparseLinear(64, 64, block=16, density=0.5, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moves = PruneAndRegrow([model[0], model[2], unused], optimizer, every=1, until=10, fraction=1.0)
    before = [layer.block_mask.clone() for layer in moves.layers]
    steps(model, optimizer, moves, 1, device)
    same = [torch.equal(a, layer.block_mask) for a, layer in zip(before, moves.layers, strict=True)]
    assert same == [True, False, True]


@pytest.mark.parametrize("rule", ["set", "rigl"])
def test_going_on_from_a_checkpoint(device, rule):
    """Model, optimizer and schedule saved and loaded go on bit by bit."""
    model = network(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    moves = PruneAndRegrow(model, optimizer, rule=rule, every=2, until=100)
    steps(model, optimizer, moves, 5, device)
    other = network(device, seed=1)
    resumed = torch.optim.AdamW(other.parameters(), lr=1e-2)
    resumed_moves = PruneAndRegrow(other, resumed, rule=rule, every=2, until=100, seed=7)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed_moves.load_state_dict(moves.state_dict())
    runs = [steps(m, o, s, 4, device) for m, o, s in ((model, optimizer, moves), (other, resumed, resumed_moves))]
    assert runs[0] == runs[1]
    for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_state_not_stored_by_block_is_an_error(device):
    model = network(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moves = PruneAndRegrow(model, optimizer, rule="set", every=1, until=10)
    optimizer.state[model[0].values] = {"row_sums": torch.zeros(3, 3)}
    before = model[0].block_mask.clone()
    with pytest.raises(ValueError, match="optimizer's row_sums of a block-sparse weight must be stored by block"):
        moves.move()
    assert torch.equal(model[0].block_mask, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "snip"}, "rule must be one of .* got 'snip'"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"fraction": 1.5}, "fraction must be from 0 to 1, got 1.5"),
        ({"anneal": "linear"}, "anneal must be 'cosine' or 'constant', got 'linear'"),
    ],
)
def test_bad_arguments(options, message):
    model = network("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        PruneAndRegrow(model, optimizer, **({"until": 10} | options))
    with pytest.raises(ValueError, match="model must hold BlockSparseLinear layers, got none in Linear"):
        PruneAndRegrow(nn.Linear(3, 3), optimizer, until=10)
