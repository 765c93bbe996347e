"""Layers with low-rank updates and factorised layers, against float64 and the numbers of hand-made examples."""

from __future__ import annotations

import copy
import math

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from gossamer.nn import (
    Experts,
    LoRAEmbedding,
    LoRAExperts,
    LoRALinear,
    LowRankLinear,
    expert_factors,
    flat_expert_factors,
    frobenius_decay_,
    lora_plus_groups,
)
from gossamer.testing import assert_close, random_expert_ids


def linear_reference(x, weight, lora_A, lora_B, bias=None, lora_magnitude=None, *, scale):
    """The formula in plain torch; the norm is constant in the backward pass."""
    y = F.linear(x, weight) + scale * F.linear(F.linear(x, lora_A), lora_B)
    if lora_magnitude is not None:
        norms = torch.linalg.vector_norm(weight.detach() + scale * (lora_B.detach() @ lora_A.detach()), dim=1)
        y = y * (lora_magnitude / norms)
    return y if bias is None else y + bias


def held(layer, name="x", **given):
    """The layer as a function of its parameters and input, and those tensors by name, random where they start at 0."""
    inputs = dict(given)
    for key, parameter in layer.named_parameters():
        inputs[key] = torch.randn_like(parameter) / 4 if key.startswith("lora_") else parameter.detach().clone()

    def function(**tensors):
        x = tensors.pop(name, given[name])
        return functional_call(layer, tensors, (x,))

    return function, inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("dora", "bias"), [(False, True), (True, True), (True, False)])
def test_linear_against_float64(dtype, dora, bias, device):
    # Odd sizes, more rows than a block of any kernel, and a row whose rank is the whole smaller side.
    layer = LoRALinear(37, 29, 5, alpha=3, rank_stabilized=True, dora=dora, bias=bias, device=device, dtype=dtype)
    assert layer.scale == 3 / math.sqrt(5)
    function, inputs = held(layer, x=torch.randn(3, 11, 37, device=device, dtype=dtype))
    wanted = ["x", "lora_A", "lora_B"] + ["lora_magnitude"] * dora
    reference = lambda **t: linear_reference(**t, scale=layer.scale)  # noqa: E731
    helpers.check(function, reference, inputs, wanted)
    helpers.check(function, reference, inputs)  # and with the base trained


def test_linear_starts_as_its_base(device):
    base = torch.nn.Linear(96, 40, device=device)
    x = torch.randn(64, 96, device=device)
    truth = F.linear(x.double(), base.weight.double(), base.bias.double())
    for options in ({}, {"init": "gaussian"}, {"rank_stabilized": True, "alpha": 7}):
        assert_close(LoRALinear.from_linear(base, 3, **options)(x), truth, base(x))
    layer = LoRALinear.from_linear(base, 3, dora=True, alpha=6, dropout=0.5)
    assert layer.weight is base.weight and layer.scale == 2
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B", "lora_magnitude"}
    torch.testing.assert_close(layer(x), base(x))


def test_dora_by_hand():
    layer = LoRALinear(2, 2, 1, alpha=1, dora=True, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        layer.reset_lora_parameters()
        assert layer.lora_magnitude.tolist() == [5, 2]
        layer.lora_A.copy_(torch.tensor([[1.0, 0.0]]))
        layer.lora_B.copy_(torch.tensor([[1.0], [2.0]]))
    wanted = torch.tensor([[3.535534, 3.535534], [1.414214, 1.414214]], dtype=torch.float64)
    torch.testing.assert_close(layer(torch.eye(2, dtype=torch.float64)).T, wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(layer.to_linear().weight, wanted, atol=1e-6, rtol=0)
    # The backward pass takes the norm as a constant: no gradient of a loss that only the norm moves.
    layer(torch.eye(2, dtype=torch.float64)).sum().backward()
    gain = 1 / math.sqrt(2) * 5 / 4
    torch.testing.assert_close(layer.lora_B.grad, torch.tensor([[gain], [gain * 0.8]], dtype=torch.float64))


@pytest.mark.parametrize("dora", [False, True])
def test_linear_merges_and_unmerges(dora, device):
    layer = LoRALinear(40, 24, 6, dora=dora, device=device, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        layer.lora_B.normal_()
    before, state = layer.weight.clone(), copy.deepcopy(layer.state_dict())
    x = torch.randn(16, 40, device=device, dtype=torch.bfloat16)
    wide = copy.deepcopy(layer).double()
    unmerged, truth = layer(x), wide(x.double())
    layer.merge()
    assert layer.merged and not torch.equal(layer.weight, before)
    assert_close(layer(x), truth, F.linear(x, wide.to_linear().weight.bfloat16(), layer.bias))
    assert torch.equal(layer.to_linear().weight, layer.weight)
    with pytest.raises(ValueError, match="merge needs an unmerged layer"):
        layer.merge()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name]), name  # a saved state is always the unmerged one
    with pytest.raises(ValueError, match="load_state_dict needs an unmerged layer"):
        layer.load_state_dict(state)
    layer.unmerge()
    assert torch.equal(layer.weight, before) and torch.equal(layer(x), unmerged)
    with pytest.raises(ValueError, match="unmerge needs a merged layer"):
        layer.unmerge()
    layer.load_state_dict(state)


def test_dropout_is_of_training_and_of_the_update_alone(device):
    layer = LoRALinear(64, 8, 4, dropout=0.5, device=device)
    x = torch.randn(128, 64, device=device)
    truth = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert_close(layer(x), truth, F.linear(x, layer.weight, layer.bias))  # B is zero: the base sees all of x
    with torch.no_grad():
        layer.lora_B.normal_()
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append([layer(x), layer(x)])
    assert torch.equal(draws[0][0], draws[1][0]) and not torch.equal(draws[0][0], draws[0][1])
    mean = torch.stack([layer(x) for _ in range(200)]).mean(0)
    layer.eval()
    spread = (mean - layer(x)).square().mean().sqrt() / (layer(x) - F.linear(x, layer.weight, layer.bias)).std()
    assert 0.02 < spread < 0.14  # one draw differs by about the update's own size; 200 of them by a 14th of it


def test_spectral_start_keeps_the_layer_and_takes_its_principal_part(device):
    base = torch.nn.Linear(30, 20, device=device)
    given = base.weight.detach().clone()
    layer = LoRALinear.from_linear(base, 4, alpha=2, init="spectral")
    assert torch.equal(base.weight, given)
    x = torch.randn(8, 30, device=device)
    torch.testing.assert_close(layer(x), base(x))
    values = torch.linalg.svdvals(given.double())
    residual = torch.linalg.svdvals(layer.weight.detach().double())
    torch.testing.assert_close(residual[:16], values[4:], rtol=1e-5, atol=1e-6)
    assert float(layer.lora_A.detach().norm()) == pytest.approx(float(layer.lora_B.detach().norm()), rel=1e-4)


def test_lora_plus_groups_and_first_step(device):
    model = torch.nn.ModuleDict(
        {
            "embedding": LoRAEmbedding(11, 6, 2),
            "linear": LoRALinear(6, 5, 2, dora=True),
            "norm": torch.nn.LayerNorm(5),
            "head": torch.nn.Linear(5, 3),
        }
    ).to(device)
    groups = lora_plus_groups(model, 1e-3, ratio=16, weight_decay=0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    members = {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}
    assert members == {
        "lora_A": {"linear.lora_A", "head.weight"},
        "embedding": {"embedding.lora_embedding_A", "embedding.lora_embedding_B"},
        "lora_B": {"linear.lora_B", "linear.lora_magnitude"},
        "lora_B_no_decay": {"norm.weight", "norm.bias", "head.bias"},
    }
    assert [g["weight_decay"] for g in groups] == [0.1, 0.1, 0.1, 0.0]
    optimizer = torch.optim.AdamW(lora_plus_groups(model["linear"], 1e-3, ratio=16))
    before = {n: p.detach().clone() for n, p in model["linear"].named_parameters()}
    with torch.no_grad():
        model["linear"].lora_B.normal_()
        before["lora_B"] = model["linear"].lora_B.clone()
    model["linear"](torch.randn(4, 6, device=device)).square().sum().backward()
    optimizer.step()
    # The first step of Adam has the size of the rate.
    moved = {n: (p - before[n]).abs() for n, p in model["linear"].named_parameters()}
    torch.testing.assert_close(moved["lora_A"], torch.full_like(moved["lora_A"], 1e-3), rtol=1e-2, atol=0)
    torch.testing.assert_close(moved["lora_B"], torch.full_like(moved["lora_B"], 16e-3), rtol=1e-2, atol=0)
    assert not moved["weight"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dora", [False, True])
def test_embedding_against_float64(dtype, dora, device):
    layer = LoRAEmbedding(19, 13, 3, alpha=5, dora=dora, padding_idx=4, device=device, dtype=dtype)
    # Ids that repeat, and the padding id.
    ids = torch.tensor([[0, 4, 18, 7, 7], [7, 1, 4, 0, 2]], device=device)
    _, inputs = held(layer, x=ids)
    del inputs["x"]

    def reference(weight, lora_embedding_A, lora_embedding_B, lora_magnitude=None):
        y = F.embedding(ids, weight, 4) + 5 / 3 * F.embedding(ids, lora_embedding_A, 4) @ lora_embedding_B.T
        if lora_magnitude is None:
            return y
        table = weight.detach() + 5 / 3 * lora_embedding_A.detach() @ lora_embedding_B.detach().T
        return y * (lora_magnitude / torch.linalg.vector_norm(table, dim=0))

    found = helpers.check(lambda **t: functional_call(layer, t, (ids,)), reference, inputs)
    assert not found["lora_embedding_A"][4].any()


@pytest.mark.parametrize("dora", [False, True])
def test_embedding_starts_as_its_base_and_merges(dora, device):
    base = torch.nn.Embedding(23, 8, device=device)
    layer = LoRAEmbedding.from_embedding(base, 4, dora=dora)
    ids = torch.randint(23, (9,), device=device)
    torch.testing.assert_close(layer(ids), base(ids))
    with torch.no_grad():
        layer.lora_embedding_A.normal_()
    unmerged, before = layer(ids), layer.weight.clone()
    layer.merge()
    torch.testing.assert_close(layer(ids), unmerged)
    with pytest.raises(ValueError, match="merge needs an unmerged layer"):
        layer.merge()
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    spectral = LoRAEmbedding.from_embedding(base, 4, init="spectral", dora=dora)
    torch.testing.assert_close(spectral(ids), base(ids))
    values = torch.linalg.svdvals(base.weight.detach())
    torch.testing.assert_close(torch.linalg.svdvals(spectral.weight)[:4], values[4:], rtol=1e-4, atol=1e-5)


def test_flat_expert_layout_by_hand():
    flat_a, flat_b = torch.arange(12.0).view(4, 3), torch.arange(8.0).view(2, 4)
    a, b = expert_factors(flat_a, flat_b, 2)
    # Experts are the slow index of A's rows and the fast one of B's columns.
    assert b.tolist() == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]
    assert (b @ a).tolist() == [[[6, 8, 10], [18, 28, 38]], [[33, 37, 41], [93, 105, 117]]]
    again = flat_expert_factors(a, b)
    assert torch.equal(again[0], flat_a) and torch.equal(again[1], flat_b)
    with pytest.raises(ValueError, match=r"flat_a and flat_b must have shapes"):
        expert_factors(flat_a, flat_b[:, :3], 2)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("activation", "transposed"), [("swiglu", False), ("swiglu", True), ("relu", True)])
def test_experts_against_their_merged_weights(activation, transposed, dora, device):
    form = {"activation": activation, "transposed": transposed, "bias": True}
    layer = LoRAExperts(5, 16, 12, 3, alpha=6, dora=dora, device=device, dtype=torch.float64, **form)
    up = "gate_up_proj" if activation == "swiglu" else "up_proj"
    kinds = ("A", "B", "magnitude") if dora else ("A", "B")
    trained = {f"{name}_lora_{x}" for name in (up, "down_proj") for x in kinds}
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == trained
    with torch.no_grad():
        for name in sorted(trained):
            getattr(layer, name).normal_().div_(4)
    # Expert 4 meets no token: its factors get zero. Some slots meet no expert.
    ids = random_expert_ids(61, 4, 2).to(device)
    ids[3, 1] = ids[8, 0] = 5
    x, weights = torch.randn(61, 16, device=device), torch.rand(61, 2, device=device)
    flat = dict(layer.named_parameters())

    def merged(x, **factors):
        """The layer with ``W + ΔW`` in place of W."""
        dense = {n: p.to(x.dtype) for n, p in flat.items() if "_lora_" not in n}
        for name in (up, "down_proj"):
            a, b = expert_factors(factors[f"{name}_lora_A"], factors[f"{name}_lora_B"], 5)
            weight = (dense[name].mT if transposed else dense[name]) + 2 * (b @ a)
            if dora:
                norms = torch.linalg.vector_norm(weight.detach(), dim=2)
                # The norm is a constant, so the factors' gradient goes through the scaled sum alone.
                weight = weight * (factors[f"{name}_lora_magnitude"] / norms).unsqueeze(2)
            dense[name] = weight.mT if transposed else weight
        plain = Experts(5, 16, 12, device=device, dtype=x.dtype, **form)
        return functional_call(plain, dense, (x, ids, weights.to(x.dtype)))

    def function(x, **factors):
        dense = {n: p.to(x.dtype) for n, p in flat.items() if "_lora_" not in n}
        return functional_call(layer, dense | factors, (x, ids, weights.to(x.dtype)))

    inputs = {"x": x} | {n: p.detach().float() for n, p in flat.items() if "_lora_" in n}
    found = helpers.check(function, merged, inputs)
    assert not found["down_proj_lora_A"].view(5, 3, -1)[4].any()
    y = layer(x.double(), ids, weights.double())
    layer.merge()
    torch.testing.assert_close(layer(x.double(), ids, weights.double()), y)
    with pytest.raises(ValueError, match="merge needs an unmerged layer"):
        layer.merge()
    state = layer.state_dict()
    layer.unmerge()
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_experts_over_given_ones_and_spectral(device):
    experts = Experts(3, 12, 10, device=device)
    ids, weights = random_expert_ids(9, 3, 2).to(device), torch.rand(9, 2, device=device)
    x = torch.randn(9, 12, device=device)
    layer = LoRAExperts.from_experts(experts, 2, targets=("down_proj",))
    assert layer.gate_up_proj is experts.gate_up_proj and "gate_up_proj_lora_A" not in layer.state_dict()
    assert layer.down_proj_lora_A.shape == (6, 10) and layer.down_proj_lora_B.shape == (12, 6)
    torch.testing.assert_close(layer(x, ids, weights), experts(x, ids, weights))
    spectral = LoRAExperts.from_experts(experts, 2, init="spectral", alpha=1)
    torch.testing.assert_close(spectral(x, ids, weights), experts(x, ids, weights))
    values = torch.linalg.svdvals(experts.down_proj.detach())
    torch.testing.assert_close(torch.linalg.svdvals(spectral.down_proj)[:, :8], values[:, 2:], rtol=1e-4, atol=1e-5)


def test_factorised_by_hand_and_nearest():
    dense = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        dense.weight.copy_(torch.diag(torch.tensor([3.0, 1.0])))
    layer = LowRankLinear.from_linear(dense, 1)
    torch.testing.assert_close(layer.to_linear().weight, torch.diag(torch.tensor([3.0, 0.0])))
    assert float(layer.u.detach().norm()) == pytest.approx(math.sqrt(3))
    wide = torch.nn.Linear(17, 23)
    layer = LowRankLinear.from_linear(wide, 6)
    lost = torch.linalg.svdvals(wide.weight.detach().double())[6:].square().sum()
    error = (layer.to_linear().weight - wide.weight).detach().double().square().sum()
    assert float(error) == pytest.approx(float(lost), rel=1e-5)
    assert torch.equal(layer.bias, wide.bias) and layer.bias is not wide.bias
    ones = LowRankLinear.from_linear(wide, 6, init="spectral_ones")
    torch.testing.assert_close(torch.linalg.svdvals(ones.to_linear().weight)[:6], torch.ones(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_factorised_against_float64(dtype, device):
    layer = LowRankLinear(33, 21, 7, device=device, dtype=dtype)
    function, inputs = held(layer, x=torch.randn(2, 5, 33, device=device, dtype=dtype))
    helpers.check(function, lambda x, u, v, bias: x @ v.T @ u.T + bias, inputs)


def test_frobenius_decay_is_the_gradient_of_the_norm():
    layer = LowRankLinear(2, 2, 1, bias=False)
    with torch.no_grad():
        layer.u.copy_(torch.tensor([[1.0], [2.0]]))
        layer.v.copy_(torch.tensor([[3.0, 0.0]]))
    layer.u.grad, layer.v.grad = torch.zeros_like(layer.u), torch.ones_like(layer.v)
    frobenius_decay_(torch.nn.Sequential(layer), 2.0)
    assert layer.u.grad.tolist() == [[18], [36]] and layer.v.grad.tolist() == [[31, 1]]
    assert layer.frobenius_norm_squared().item() == 45
    big = LowRankLinear(9, 7, 3, dtype=torch.float64)
    (0.5 * 0.3 * big.frobenius_norm_squared()).backward()
    wanted = big.u.grad.clone(), big.v.grad.clone()
    big.u.grad.zero_(), big.v.grad.zero_()
    frobenius_decay_(big, 0.3)
    torch.testing.assert_close((big.u.grad, big.v.grad), wanted)


@pytest.mark.parametrize("dora", [False, True])
def test_compiles_whole(dora, device):
    layer = LoRALinear(16, 12, 4, dora=dora, device=device)
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(6, 16, device=device)
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        y = function(x)
        y.square().sum().backward()
        results.append((y.detach(), layer.lora_A.grad.clone(), layer.lora_B.grad.clone()))
    torch.testing.assert_close(results[0], results[1])


BAD = [
    (lambda: LoRALinear(8, 4, 0), ValueError, r"rank must be in \[1, 4\] for a 4 x 8 matrix, got 0"),
    (lambda: LoRALinear(8, 4, 5), ValueError, r"rank must be in \[1, 4\]"),
    (lambda: LoRALinear(8, 4, 2.0), TypeError, "rank must be an int, got float"),
    (lambda: LoRALinear(0, 4, 2), ValueError, "in_features must be at least 1"),
    (lambda: LoRALinear(8, 4, 2, dropout=1.0), ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    (lambda: LoRALinear(8, 4, 2, init="zeros"), ValueError, "init must be one of"),
    (lambda: LoRALinear(8, 8, 2, alpha=float("nan")), ValueError, "alpha must be finite, got nan"),
    (lambda: LoRALinear(8, 8, 2, alpha=0, init="spectral"), ValueError, "alpha must be above 0 for init='spectral'"),
    (
        lambda: LoRALinear.from_linear(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 8)), 2),
        ValueError,
        "got one with parametrizations of weight",
    ),
    (
        lambda: LoRALinear.from_linear(torch.nn.Linear(8, 8).to(torch.float8_e4m3fn), 2),
        TypeError,
        "linear must have a float64, float32, bfloat16 or float16 weight",
    ),
    (lambda: LoRALinear.from_linear(torch.nn.Conv1d(3, 3, 1), 2), TypeError, "got Conv1d"),
    (lambda: LoRALinear.from_linear(torch.nn.Linear(8, 4), 2, rslora=True), TypeError, r"got \['rslora'\]"),
    (lambda: LoRAEmbedding(8, 4, 5), ValueError, r"rank must be in \[1, 4\]"),
    (lambda: LoRAEmbedding(8, 4, 2, init="kaiming"), ValueError, "init must be 'zero' or 'spectral'"),
    (lambda: LoRAEmbedding.from_embedding(torch.nn.Embedding(8, 4, max_norm=1.0), 2), ValueError, "max_norm"),
    (lambda: LoRAExperts(2, 8, 4, 5), ValueError, r"rank must be in \[1, 4\]"),
    (lambda: LoRAExperts(2, 8, 4, 2, targets=("up_proj",)), ValueError, r"targets must be one or both of"),
    (lambda: LoRAExperts(2, 8, 4, 2, targets=1), TypeError, r"targets must be a sequence, got int"),
    (lambda: LoRAExperts.from_experts(torch.nn.Linear(2, 2), 1), TypeError, "got Linear"),
    (lambda: LowRankLinear(8, 4, 9), ValueError, r"rank must be in \[1, 4\]"),
    (lambda: LowRankLinear(8, 4, 2, init="ones"), ValueError, "init must be 'spectral' or 'spectral_ones'"),
    (lambda: frobenius_decay_(torch.nn.Linear(2, 2), 0.1), ValueError, "module must hold a LowRankLinear"),
    (lambda: frobenius_decay_(LowRankLinear(4, 4, 2), -1.0), ValueError, "decay must be at least 0"),
    (lambda: lora_plus_groups(LoRALinear(4, 4, 2), 0.1, ratio=0.5), ValueError, "ratio must be at least 1"),
    (lambda: lora_plus_groups(LoRALinear(4, 4, 2).requires_grad_(False), 0.1), ValueError, "got none"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("init", ["kaiming", "spectral"])
def test_merging_under_autocast_sums_as_it_does_without(init):
    """Either way, merging adds in float32 and rounds once."""
    torch.manual_seed(0)
    layer = LoRALinear(24, 16, 4, init=init)
    torch.nn.init.normal_(layer.lora_B)
    other = copy.deepcopy(layer)
    layer.merge()
    with torch.autocast("cpu", torch.bfloat16):
        other.merge()
    assert torch.equal(layer.weight, other.weight)
