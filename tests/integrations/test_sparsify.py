"""gossamer.sparsify: which layers change, to what, what the report says, and what cannot be."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gossamer
from gossamer.nn import BlockSparseLinear
from gossamer.nn.linear.block_sparse import block_scores


class Net(nn.Module):
    def __init__(self, device="cpu"):
        super().__init__()
        self.up = nn.Linear(64, 128, device=device)
        self.blocks = nn.ModuleList(nn.Linear(128, 128, bias=False, device=device) for _ in range(2))
        self.head = nn.Linear(128, 20, device=device)

    def forward(self, x):
        x = F.relu(self.up(x))
        for block in self.blocks:
            x = F.relu(block(x))
        return self.head(x)


def test_whole_model(device):
    """Every layer has its share of blocks and computes with them; the report counts parameters and FLOPs."""
    torch.manual_seed(0)
    model = Net(device)
    dense = copy.deepcopy(model)
    model.blocks[1].weight.requires_grad_(False)
    report = gossamer.sparsify(model, 0.25, 16)
    names = ["up", "blocks.0", "blocks.1", "head"]
    assert [layer.name for layer in report.layers] == names and report.skipped == ()
    for name in names:
        layer, linear = model.get_submodule(name), dense.get_submodule(name)
        assert type(layer) is BlockSparseLinear
        scores = block_scores(linear.weight, (16, 16))
        assert scores[layer.block_mask].min() >= scores[~layer.block_mask].max()
        mask = layer.block_mask.repeat_interleave(16, 0).repeat_interleave(16, 1)
        with torch.no_grad():
            linear.weight.mul_(mask[: linear.out_features, : linear.in_features])
    x = torch.randn(9, 64, device=device)
    torch.testing.assert_close(model(x), dense(x))
    assert [layer.values.requires_grad for layer in model.blocks] == [True, False]
    blocks = [8, 16, 16, 4]
    assert [layer.blocks for layer in report.layers] == blocks
    assert report.layers[3].shape == (20, 128) and report.layers[3].places == 16
    sizes = [64 * 128, 128 * 128, 128 * 128, 128 * 20]
    assert report.flops == (2 * sum(sizes), 2 * 256 * sum(blocks))
    assert report.parameters == (sum(sizes) + 148, 256 * sum(blocks) + 148) == report.model_parameters
    assert sum(p.numel() for p in model.parameters()) == report.parameters[1]
    lines = str(report).splitlines()
    assert lines[0] == "gossamer made 4 of 4 linear modules block-sparse"
    assert lines[1].startswith("  parameters of these: 43,668 to 11,412 (26.1%); of the model")
    assert lines[2] == "  FLOPs of a row through these: 87,040 to 22,528 (25.9%)"
    assert lines[4] == "  blocks.0: 128 x 128, 16 of 64 blocks of 16 x 16 (25.0%)"


def test_names_and_patterns(device):
    model = Net(device)
    report = gossamer.sparsify(model, 0.5, 32, include=["blocks.*", "up"], exclude="blocks.1")
    assert [layer.name for layer in report.layers] == ["up", "blocks.0"]
    assert {(m.name, m.reason) for m in report.skipped} == {("blocks.1", "excluded"), ("head", "not included")}
    assert type(model.head) is nn.Linear and type(model.blocks[0]) is BlockSparseLinear
    assert "  head: Linear, left alone: not included" in str(report)
    assert report.model_parameters[1] == sum(p.numel() for p in model.parameters()) < report.model_parameters[0]
    with pytest.raises(ValueError, match="include must name linear layers of the model, got 'dowm'"):
        gossamer.sparsify(Net(), 0.5, include=["dowm"])


def test_small_densities(device):
    """At 1/32 a layer of few blocks keeps one."""
    model = Net(device)
    report = gossamer.sparsify(model, 1 / 32, 32)
    assert [layer.blocks for layer in report.layers] == [1, 1, 1, 1]
    assert model(torch.randn(3, 64, device=device)).isfinite().all()


def test_erk(device):
    """Small layers get more, the whole is as dense as asked; a layer that would be full stays dense."""
    model = nn.Sequential(nn.Linear(512, 512, device=device), nn.Linear(512, 64, device=device))
    report = gossamer.sparsify(model, 0.2, 16, distribution="erk")
    first, second = (layer.blocks / layer.places for layer in report.layers)
    assert first < 0.2 < second and abs(second / first - (576 / 64) / (1024 / 512)) < 0.05
    assert abs(sum(layer.blocks for layer in report.layers) / (32 * 36) - 0.2) < 0.01
    model = nn.Sequential(nn.Linear(512, 512, device=device), nn.Linear(32, 16, device=device))
    report = gossamer.sparsify(model, 0.2, 16, distribution="erk")
    assert [m.reason for m in report.skipped] == ["its share of the budget is all its blocks"]
    assert type(model[1]) is nn.Linear


def test_layers_that_would_grow_stay_dense():
    """A block reaches over the edge of a small weight, and its values there count."""
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(64, 16), nn.Linear(16, 16))
    before = sum(p.numel() for p in model.parameters())
    report = gossamer.sparsify(model, 0.5, 32)
    reasons = {m.name: m.reason for m in report.skipped}
    assert reasons["0"] == "its blocks would hold 1,024 values, more than its 100"
    assert set(reasons) == {"0", "2"} and [layer.name for layer in report.layers] == ["1"]
    assert type(model[0]) is nn.Linear and sum(p.numel() for p in model.parameters()) <= before
    assert "0: Linear, left alone: its blocks would hold 1,024 values, more than its 100" in str(report)


def test_global_choice(device):
    """The best blocks of all layers together, whichever layer they are of."""
    torch.manual_seed(0)
    model = Net(device)
    with torch.no_grad():
        model.blocks[0].weight.mul_(1.02)
    dense = copy.deepcopy(model)
    report = gossamer.sparsify(model, 0.5, 16, distribution="global", criterion="magnitude_l1")
    names = [layer.name for layer in report.layers]
    scores = torch.cat([block_scores(dense.get_submodule(n).weight, (16, 16), "magnitude_l1").flatten() for n in names])
    kept = torch.cat([model.get_submodule(n).block_mask.flatten() for n in names])
    assert int(kept.sum()) == round(0.5 * kept.numel()) and scores[kept].min() >= scores[~kept].max()
    shares = {layer.name: layer.blocks / layer.places for layer in report.layers}
    assert shares["blocks.0"] > shares["blocks.1"]
    lopsided = Net(device)
    with torch.no_grad():
        lopsided.head.weight.zero_()
    with pytest.raises(ValueError, match=r"leave every layer a block, but at density 0\.3 these have none: head"):
        gossamer.sparsify(lopsided, 0.3, 16, distribution="global")


def test_a_module_used_twice(device):
    model = Net(device)
    model.again = model.blocks[0]
    gossamer.sparsify(model, 0.5, 32)
    assert model.again is model.blocks[0] and type(model.again) is BlockSparseLinear


def test_training_goes_on(device):
    """A pruned model under RigL gets better than it was after pruning."""
    torch.manual_seed(0)
    model = Net(device)
    x = torch.randn(64, 64, device=device)
    target = torch.tanh(x @ torch.randn(64, 20, device=device) * 0.2)
    gossamer.sparsify(model, 0.25, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    moves = gossamer.nn.PruneAndRegrow(model, optimizer, every=5, until=30)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        moves.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0] and len(moves.layers) == 4


def tied():
    model = Net()
    model.embedding = nn.Embedding(20, 128)
    model.head.weight = model.embedding.weight
    return model


def tied_bias():
    model = Net()
    model.other = nn.Linear(128, model.up.out_features)
    model.other.bias = model.up.bias
    return model


def watched():
    model = Net()
    model.up.register_forward_hook(lambda module, args, out: None)
    return model


def attention():
    return nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "out": nn.Linear(16, 16)})


@pytest.mark.parametrize(
    ("make", "message", "culprit"),
    [
        (tied, "head: its weight is tied with that of embedding", "head"),
        (tied_bias, "up: its bias is tied with that of other", ["up", "other"]),
        (watched, "up: its calls are watched by hooks", "up"),
        (attention, "attention.out_proj: NonDynamicallyQuantizableLinear may compute something else", "*.out_proj"),
        (lambda: Net("meta"), "up: its weight is on meta", None),
        (lambda: nn.Linear(4, 4), r"\(the model itself\): the model itself is a linear layer", None),
    ],
)
def test_layers_that_cannot_be(make, message, culprit):
    """Nothing is changed, the message names them all, and excluding them helps."""
    model = make()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        gossamer.sparsify(model, 0.5, 16)
    assert [type(module) for module in model.modules()] == before
    if culprit:
        report = gossamer.sparsify(model, 0.5, 16, exclude=culprit)
        assert report.layers and report.skipped[0].reason == "excluded"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"density": 0}, ValueError, "density must be above 0"),
        ({"block": 24}, ValueError, "block must be"),
        ({"distribution": "even"}, ValueError, "distribution must be one of .* got 'even'"),
        ({"criterion": "l2"}, ValueError, "criterion must be one of"),
        ({"distribution": "global", "criterion": "random"}, ValueError, "criterion must score blocks"),
        ({"exclude": 5}, TypeError, "exclude must be names or patterns of names, got 5"),
        ({"include": [3]}, TypeError, "include must be names or patterns"),
    ],
)
def test_bad_arguments(options, error, message):
    model = Net()
    with pytest.raises(error, match=message):
        gossamer.sparsify(model, **({"density": 0.5, "block": 16} | options))
    assert type(model.up) is nn.Linear
    with pytest.raises(ValueError, match="model must hold linear layers to make block-sparse, got none in ReLU"):
        gossamer.sparsify(nn.ReLU(), 0.5)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        gossamer.sparsify(3, 0.5)
