"""Block-sparse linear layers: against dense ones in float64, and moving from one topology to another."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import check, check_draws, randn, run
from torch import nn

import gossamer
from gossamer.nn import BlockSparseLinear, erk_densities
from gossamer.nn.linear.block_sparse import block_scores, highest
from gossamer.nn.replicas import EVALUATES_MODULES


def dense(values, mask, out_features, in_features):
    """The weight with zeros, block by block."""
    bm, bn = values.shape[1:]
    blocks = iter(values)
    zero = values.new_zeros(bm, bn)
    rows = [torch.cat([next(blocks) if there else zero for there in row], 1) for row in mask.tolist()]
    return torch.cat(rows)[:out_features, :in_features]


# Whole blocks; blocks cut at both edges, of two sizes; one block of many; a weight smaller than its only block.
SIZES = [(64, 96, 16, 0.25), (50, 75, (32, 16), 0.5), (512, 96, 16, 1 / 32), (5, 7, 16, 1.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs", "block", "density"), SIZES)
def test_against_a_dense_layer(device, inputs, outputs, block, density, dtype):
    layer = BlockSparseLinear(inputs, outputs, density=density, block=block, device=device, dtype=dtype)
    places = layer.block_mask.numel()
    assert layer.values.shape[0] == int(layer.block_mask.sum()) == max(1, round(density * places))

    def ours(x, values, bias):
        return torch.func.functional_call(layer, {"values": values, "bias": bias}, (x.view(3, 7, inputs),)).view(21, -1)

    def plain(x, values, bias):
        return F.linear(x, dense(values, layer.block_mask, outputs, inputs), bias)

    found = check(
        ours,
        plain,
        {
            "x": randn(21, inputs, device=device, dtype=dtype),
            "values": layer.values.detach(),
            "bias": layer.bias.detach(),
        },
    )
    assert found["values"].shape == layer.values.shape


def test_without_bias_or_rows(device):
    layer = BlockSparseLinear(40, 24, bias=False, density=0.5, block=16, device=device)
    assert layer.bias is None and set(layer.state_dict()) == {"values", "block_mask"}
    x = torch.zeros(0, 40, device=device, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, 40) and not layer.values.grad.any()
    x = randn(40, device=device)
    torch.testing.assert_close(layer(x), layer(x.view(1, 40))[0])


def test_initial_values(device):
    """Uniform for as many inputs as an output has; zero past the edge, and still so after training."""
    layer = BlockSparseLinear(1000, 500, density=0.1, block=16, device=device)
    bound = (layer.density * 1000) ** -0.5
    assert 0.99 * bound < float(layer.values.detach().abs().max()) <= bound
    padded = layer.weight.to_dense().detach().clone()
    padded[:500, :1000] = 0
    assert padded.shape == (512, 1008) and not padded.any()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for step in range(3):
        layer(randn(8, 1000, seed=step, device=device)).square().sum().backward()
        optimizer.step()
    trained = layer.weight.to_dense().detach().clone()
    trained[:500, :1000] = 0
    assert not trained.any()
    per_row = layer.block_mask.sum(1)
    assert int(per_row.max()) - int(per_row.min()) <= 1


def test_scores_by_hand():
    """The two norms disagree about which single block to keep."""
    weight = torch.tensor([[0.9, 0.0, 0.1, 0.0], [0.0, 0.2, 0.0, -0.8], [0.0, 0.0, 0.3, 0.3], [0.05, 0.0, 0.3, 0.3]])
    l1, l2 = (block_scores(weight, (2, 2), name) for name in ("magnitude_l1", "magnitude"))
    torch.testing.assert_close(4 * l1, torch.tensor([[1.1, 0.9], [0.05, 1.2]]))
    torch.testing.assert_close(2 * l2, torch.tensor([[0.922, 0.806], [0.05, 0.6]]), rtol=0, atol=5e-4)
    assert highest(l1, 1).tolist() == [[False, False], [False, True]]
    assert highest(l2, 1).tolist() == [[True, False], [False, False]]
    assert highest(torch.ones(2, 2), 3).tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("criterion", ["magnitude", "magnitude_l1", "random", "mask"])
def test_from_linear_and_back(device, criterion):
    linear = nn.Linear(50, 70).to(device)
    given = torch.rand(5, 4, generator=torch.Generator().manual_seed(1)) < 0.4
    layer = BlockSparseLinear.from_linear(linear, 0.25, 16, given if criterion == "mask" else criterion)
    count = int(given.sum()) if criterion == "mask" else 5
    assert int(layer.block_mask.sum()) == count and layer.bias is not linear.bias
    scores = block_scores(linear.weight, (16, 16), criterion if "magnitude" in criterion else "magnitude")
    if criterion == "mask":
        assert torch.equal(layer.block_mask.cpu(), given)
    elif criterion != "random":
        assert scores[layer.block_mask].min() > scores[~layer.block_mask].max()
    keep = layer.block_mask.repeat_interleave(16, 0).repeat_interleave(16, 1)[:70, :50]
    back = layer.to_linear()
    assert torch.equal(back.weight, linear.weight * keep) and torch.equal(back.bias, linear.bias)
    x = randn(9, 50, device=device)
    torch.testing.assert_close(layer(x), back(x))
    assert type(back) is nn.Linear and layer.training == linear.training


def test_random_choices_can_be_repeated():
    masks = [
        BlockSparseLinear(256, 256, density=0.2, block=16, generator=torch.Generator().manual_seed(seed)).block_mask
        for seed in (1, 1, 2)
    ]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_state_with_another_topology(device):
    """Loading moves the blocks; another number of them, or a mask that does not fit its values, is an error."""
    first, second = (
        BlockSparseLinear(96, 64, density=0.25, block=16, generator=torch.Generator().manual_seed(s), device=device)
        for s in (1, 2)
    )
    assert not torch.equal(first.block_mask, second.block_mask)
    x = randn(5, 96, device=device)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(x), first(x)) and torch.equal(second.block_mask, first.block_mask)
    torch.testing.assert_close(second.weight.to_dense(), first.weight.to_dense())
    third = BlockSparseLinear(96, 64, density=0.5, block=16, device=device)
    with pytest.raises(RuntimeError, match="size mismatch for values"):
        third.load_state_dict(first.state_dict())
    assert torch.equal(third.block_mask, third.topology.to_mask())
    state = first.state_dict()
    state["block_mask"] = torch.ones_like(state["block_mask"])
    before = second.block_mask.clone()
    with pytest.raises(RuntimeError, match="block_mask has 24 blocks, values 6 of them"):
        second.load_state_dict(state)
    assert torch.equal(second.block_mask, before) and torch.equal(second(x), first(x))


def test_copies_moves_and_meta(device):
    layer = BlockSparseLinear(96, 64, density=0.25, block=16)
    moved = copy.deepcopy(layer).to(device)
    x = randn(5, 96, device=device)
    torch.testing.assert_close(moved(x), F.linear(x, moved.to_linear().weight, moved.bias))
    assert moved.half().block_mask.dtype == torch.bool and moved(x.half()).dtype == torch.float16
    with pytest.raises(TypeError, match="dtype"):
        moved(x)
    meta = BlockSparseLinear(96, 64, density=0.25, block=16, device="meta")
    assert meta.values.is_meta and meta.topology.device.type == "meta"
    real = meta.to_empty(device=device)
    real.reset_parameters()
    assert int(real.block_mask.sum()) == 6 and real(x).isfinite().all()
    real.load_state_dict(layer.state_dict())
    assert torch.equal(real(x), layer.to(device)(x))


def test_change_topology(device):
    """Blocks kept keep their values wherever they move to in the list; new ones are zero, old gradients are gone."""
    layer = BlockSparseLinear(64, 64, density=0.5, block=16, device=device)
    layer(randn(3, 64, device=device)).sum().backward()
    old_mask, old = layer.block_mask.clone(), layer.weight.to_dense().detach()
    mask = old_mask.clone()
    there, free = old_mask.nonzero()[[0, 5]], (~old_mask).nonzero()[[1, 6]]
    mask[there[:, 0], there[:, 1]] = False
    mask[free[:, 0], free[:, 1]] = True
    source = layer.change_topology(mask)
    assert torch.equal(layer.block_mask, mask) and layer.values.grad is None
    both = (mask & old_mask).repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert torch.equal(layer.weight.to_dense(), old * both)
    assert (source < 0).sum() == 2 and sorted(source[source >= 0].tolist()) == [i for i in range(8) if i not in (0, 5)]
    x = randn(3, 64, device=device)
    torch.testing.assert_close(layer(x), F.linear(x, layer.to_linear().weight, layer.bias))


@pytest.mark.parametrize("calls", [1, 2])
def test_gradient_norms(device, calls):
    """Norms of every block of the dense gradient, summed over calls before the norm is taken."""
    layer = BlockSparseLinear(50, 300, density=0.1, block=16, device=device)
    xs = [randn(6, 50, seed=i, device=device).requires_grad_() for i in range(calls)]
    layer.observe_gradient()
    for x in xs:
        layer(x).square().sum().backward()

    def norms(cast):
        weight = layer.to_linear().weight.detach().to(cast)
        total = 0
        for x in xs:
            leaf = weight.clone().requires_grad_()
            y = F.linear(x.detach().to(cast), leaf, layer.bias.detach().to(cast))
            total = total + torch.autograd.grad(y.square().sum(), leaf)[0]
        padded = F.pad(total, (0, 14, 0, 4)).view(19, 16, 4, 16)
        return {"norms": padded.square().sum((1, 3)).sqrt()}

    check_draws({"norms": layer.gradient_norms()}, lambda draw: (norms(torch.float64), norms(torch.float32)))
    layer.observe_gradient()
    assert layer.gradient_norms() is None
    layer.observe_gradient(False)
    with pytest.raises(ValueError, match="gradient_norms needs observe_gradient"):
        layer.gradient_norms()


def test_same_bits_every_time(device):
    layer = BlockSparseLinear(200, 150, density=0.3, block=32, device=device)
    inputs = {"x": randn(17, 200, device=device)}
    results = [run(layer, inputs, ["x"], randn(17, 150, seed=1, device=device)) for _ in range(2)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_traces_without_a_graph_break(device):
    layer = BlockSparseLinear(50, 75, density=0.3, block=16, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (9, 4):
        x = randn(rows, 50, device=device).requires_grad_()
        results = [torch.autograd.grad(f(x).square().sum(), [x, layer.values, layer.bias]) for f in (layer, compiled)]
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_autocast(device):
    layer = BlockSparseLinear(50, 75, density=0.3, block=16, device=device)
    x = randn(9, 50, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, copy.deepcopy(layer).bfloat16()(x.bfloat16()))


def test_erk_by_hand():
    densities = erk_densities([(64, 3, 3, 3), (128, 64, 3, 3), (512, 512)], 0.1)
    assert [round(d, 4) for d in densities] == [1.0, 0.0704, 0.1024]
    assert erk_densities([(8, 8), (8, 8)], 1) == [1.0, 1.0]


TOPOLOGY = gossamer.BlockTopology.random((64, 32), 16, 0.5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BlockSparseLinear(0, 4), ValueError, "in_features must be at least 1, got 0"),
        (lambda: BlockSparseLinear(4, 4, density=0), ValueError, "density must be above 0 and at most 1, got 0"),
        (lambda: BlockSparseLinear(4, 4, density="1"), TypeError, "density must be a number, got str"),
        (lambda: BlockSparseLinear(4, 4, block=10), ValueError, "block must be"),
        (
            lambda: BlockSparseLinear(64, 64, topology=TOPOLOGY),
            ValueError,
            r"in whole blocks = \(64, 64\).*got \(64, 32",
        ),
        (lambda: BlockSparseLinear(64, 32, topology=TOPOLOGY.transposed()), ValueError, "not be a transposed view"),
        (
            lambda: BlockSparseLinear(32, 64, topology=TOPOLOGY)(torch.zeros(3, 33)),
            ValueError,
            r"x must have .* \(3, 32",
        ),
        (
            lambda: BlockSparseLinear.from_linear(nn.ReLU(), 0.5),
            TypeError,
            "linear must be .* got ReLU",
        ),
        (lambda: BlockSparseLinear.from_linear(nn.Linear(9, 9), 0.5, 16, "l2"), ValueError, "criterion must be one of"),
        (
            lambda: BlockSparseLinear(64, 64, block=16).change_topology(torch.zeros(4, 4, dtype=torch.bool)),
            ValueError,
            "mask must have as many blocks as the layer, 2, got 0",
        ),
        (lambda: erk_densities([(0, 3)], 0.5), ValueError, "shapes must have elements"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_room_for_more_blocks_than_there_are_is_an_error():
    topology = gossamer.BlockTopology.from_mask(torch.eye(4, dtype=torch.bool), 16, nnz=6)
    with pytest.raises(ValueError, match="topology must have as many blocks as it has room for, 6, got 4"):
        BlockSparseLinear(64, 64, topology=topology)


def other_layer(device):
    return BlockSparseLinear(64, 64, density=0.5, block=16, device=device, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("how", ["in place", "buffer", "average", "memory", "compiled"])
def test_blocks_follow_a_mask_that_someone_else_wrote(device, how):
    """Checkpoints that load in place, averages of weights and buffers sent between processes all write to the mask."""
    if how == "compiled" and not EVALUATES_MODULES:
        pytest.skip("this torch's compiler cannot look")
    one, other = BlockSparseLinear(64, 64, density=0.5, block=16, device=device), other_layer(device)
    assert not torch.equal(one.block_mask, other.block_mask)
    x = torch.randn(3, 64, device=device)
    result = other
    if how == "average":
        result = torch.optim.swa_utils.AveragedModel(other, avg_fn=lambda average, new, count: new)
        result.update_parameters(other)
        result.update_parameters(one)
    elif how == "buffer":
        # As accelerate and transformers put tensors into modules that lie on the meta device.
        other = BlockSparseLinear(64, 64, density=0.5, block=16, device="meta")
        result = other
        for name, tensor in one.state_dict().items():
            kept = other._buffers if name in other._buffers else other._parameters
            kept[name] = tensor.clone() if name in other._buffers else torch.nn.Parameter(tensor.clone())
    else:
        with torch.no_grad():
            for name, tensor in other.state_dict().items():
                tensor.copy_(one.state_dict()[name])
    if how == "compiled":
        result = torch.compile(other, backend="eager", fullgraph=True)
    if how == "memory":
        result = other.float()
    assert torch.equal(result(x), one(x))
    loaded = next(m for m in result.modules() if isinstance(m, BlockSparseLinear))
    assert torch.equal(loaded.block_mask, one.block_mask) and torch.equal(loaded.topology.to_mask(), one.block_mask)


def test_a_mask_of_another_number_of_blocks_is_an_error():
    layer = other_layer("cpu")
    layer.block_mask.fill_(True)
    with pytest.raises(ValueError, match="block_mask must have as many blocks as values, 8, got 16"):
        layer(torch.randn(3, 64))


def test_files_of_models_and_parameters_on_meta(tmp_path):
    """What safetensors and accelerate do with a module."""
    from safetensors.torch import load_model, save_model

    layer, other = other_layer("cpu"), BlockSparseLinear(64, 64, density=0.5, block=16)
    save_model(layer, tmp_path / "layer.safetensors")
    load_model(other, tmp_path / "layer.safetensors")
    x = torch.randn(3, 64)
    assert torch.equal(other(x), layer(x))
    register = torch.nn.Module.register_parameter

    def on_meta(module, name, parameter):
        register(module, name, None if parameter is None else torch.nn.Parameter(parameter.to("meta")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "register_parameter", on_meta)
        assert other_layer("cpu").values.is_meta


def test_a_layer_too_large_for_the_memory_is_refused_before_its_blocks_are_chosen(monkeypatch):
    """Choosing blocks among 2²⁶ places takes seconds."""
    monkeypatch.setattr(gossamer.BlockTopology, "random", lambda *args, **options: pytest.fail("chose blocks"))
    with pytest.raises(RuntimeError, match="allocate"):
        BlockSparseLinear(2**20, 2**30, block=128)
