"""LatentExperts against a loop over tokens, the worked values of low-rank groups, and conversion of trained experts."""

import pytest
import torch
from contracts import ExpertsContract, assert_near, random_routing
from helpers import saved_tensors

import gossamer
from gossamer._activation import ACTIVATIONS, activate_reference
from gossamer.nn import Experts, LatentExperts, MoE, Routing
from gossamer.nn.moe.experts.latent import TokenGroups

T, H, I, L, E = 11, 10, 6, 4, 6


def latent(quantize=None, **options):
    def make(num_experts, hidden_size, **factory):
        # Groups of half the experts, or one where that does not divide them.
        size = options.get("group_size") or num_experts
        given = options | {"group_size": size if num_experts % size == 0 else num_experts}
        layer = LatentExperts(num_experts, hidden_size, 16, 8, **given, **factory)
        if quantize:
            gossamer.quantize_experts(layer, quantize)
        return layer

    return make


TestLatentExperts = ExpertsContract.over(
    {
        "one group": latent(bias=True),
        "groups": latent(group_size=1),
        "no shared output": latent(group_size=1, shared_output=False, bias=True),
        "separate latents": latent(separate_latents=True, bias=True),
        "ungated": latent(activation="gelu", group_size=1),
        "quantised": latent("int8", bias=True),
        "quantised separate latents": latent("int8", separate_latents=True, bias=True),
    }
)


def by_loop(layer, x, ids, weights):
    """Every token through each of its experts, formed out of the layer's parameters."""
    halves, kappa = layer.activation.halves, layer.group_size
    y = torch.zeros_like(x)
    for t, (experts, shares) in enumerate(zip(ids.tolist(), weights, strict=True)):
        for e, share in zip(experts, shares, strict=True):
            if e >= layer.num_experts:
                continue
            z = layer.in_proj[e // kappa] @ x[t]
            if layer.separate_latents:
                preact = torch.cat([layer.gate_proj[e] @ z[:L], layer.up_proj[e] @ z[L:]])
            else:
                preact = (layer.gate_up_proj if halves == 2 else layer.up_proj)[e] @ z
            if layer.up_bias is not None:
                preact = preact + layer.up_bias[e]
            out = layer.down_proj[e] @ activate_reference(preact, layer.activation, False)
            if layer.down_bias is not None:
                out = out + layer.down_bias[e]
            y[t] += share * (out if layer.out_proj is None else layer.out_proj[e // kappa] @ out)
    return y


@pytest.mark.parametrize("shared_output", [False, True])
@pytest.mark.parametrize(("group_size", "separate"), [(1, False), (2, True), (3, False), (6, True), (6, False)])
def test_is_the_formula(device, group_size, separate, shared_output):
    """Groups of one to all experts, by tokens with some absent slots and one expert twice."""
    factory = {"device": device, "dtype": torch.float64}
    layer = LatentExperts(
        E, H, I, L, group_size=group_size, shared_output=shared_output, separate_latents=separate, bias=True, **factory
    )
    ids, weights = random_routing(T, E, 4, device, torch.float64)
    ids[0, :2] = 3
    weights[0, :2] = 0.5
    x = torch.randn(T, H, **factory)
    assert_near(layer(x, ids, weights), by_loop(layer, x, ids, weights))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations(device, activation):
    factory = {"device": device, "dtype": torch.float64}
    layer = LatentExperts(E, H, I, L, group_size=3, activation=activation, **factory)
    ids, weights = random_routing(T, E, 3, device, torch.float64)
    x = torch.randn(T, H, **factory)
    assert_near(layer(x, ids, weights), by_loop(layer, x, ids, weights))


def test_projects_once_per_token_and_group(device):
    """A token with three experts of one group makes one row for that group, behind which all three lie."""
    ids = torch.tensor([[0, 2, 1, 5], [6, 6, 6, 6], [4, 0, 6, 3]], device=device)
    weights = torch.arange(12.0, device=device).view(3, 4)
    groups = TokenGroups.of(Routing(ids, weights, 6).dispatched(), 3)
    assert groups.pairs.offsets.tolist() == [0, 2, 4]
    assert groups.experts.offsets.tolist() == [0, 2, 3, 4, 5, 6, 7]
    # Rows: token 0 and 2 of the first group, 0 and 2 of the second.
    assert groups.weights[:4].sum(1).tolist() == [0 + 1 + 2, 9, 3, 8 + 11]


@pytest.mark.parametrize("separate", [False, True])
def test_keeps_the_input_and_the_pre_activation(device, separate):
    """The backward pass gets latents and pre-activations, and neither activations nor outputs of experts."""
    layer = LatentExperts(E, H, I, L, group_size=3, separate_latents=separate, device=device)
    x = torch.randn(T, H, device=device, requires_grad=True)
    routing = Routing(*random_routing(T, E, 3, device), E).dispatched()
    rows = int(routing.dispatch.offsets[-1])
    kept = [tuple(t.shape) for t in saved_tensors(lambda: layer(x, routing), layer.parameters())]
    assert (rows, 2 * I) in kept
    assert (rows, I) not in kept and (rows, L) not in kept and (rows, H) not in kept


def test_worked_values_of_a_group():
    """Matrices with a common kernel are exact in one dimension; else the error is the singular value left out."""
    experts = Experts(2, 2, 2, activation="relu")
    with torch.no_grad():
        experts.up_proj.copy_(torch.tensor([[[1.0, 0], [0, 0]], [[0, 0], [2, 0]]]))
    exact = LatentExperts.from_experts(experts, 1, shared_output=False)
    assert exact.in_proj.abs().squeeze().tolist() == pytest.approx([1, 0])
    torch.testing.assert_close(exact.to_experts().up_proj, experts.up_proj)
    with torch.no_grad():
        experts.up_proj[1] = torch.tensor([[0.0, 2], [0, 0]])
    near = LatentExperts.from_experts(experts, 1, shared_output=False).to_experts()
    assert float((near.up_proj - experts.up_proj).detach().square().sum()) == pytest.approx(1.0)


def test_worked_size():
    """The parameters of gate and up over those of plain experts."""
    sizes = (64, 2048, 1408)
    layer = LatentExperts(*sizes, 512, group_size=8, separate_latents=True, shared_output=False, device="meta")
    plain = Experts(*sizes, device="meta").gate_up_proj.numel()
    ours = sum(p.numel() for p in (layer.in_proj, layer.gate_proj, layer.up_proj))
    assert ours / plain == pytest.approx(0.295455, abs=1e-6)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(("shared_output", "bias"), [(True, False), (False, True)])
def test_conversion_at_full_rank_is_exact(separate, shared_output, bias):
    layout = {"interleaved": not separate, "transposed": separate}
    experts = Experts(4, H, I, bias=bias, dtype=torch.float64, **layout)
    layer = LatentExperts.from_experts(experts, H, group_size=2, shared_output=shared_output, separate_latents=separate)
    ids, weights = random_routing(T, 4, 2, "cpu", torch.float64)
    x = torch.randn(T, H, dtype=torch.float64)
    assert_near(layer(x, ids, weights), experts(x, ids, weights))
    assert_near(layer.to_experts()(x, ids, weights), experts(x, ids, weights))


def test_conversion_is_the_best_of_its_rank():
    """The error is that of the truncated singular values, group by group, and shared projections are orthonormal."""
    experts = Experts(4, H, I, dtype=torch.float64)
    layer = LatentExperts.from_experts(experts, L, group_size=2)
    error = (layer.to_experts().gate_up_proj - experts.gate_up_proj).square().sum()
    left_out = torch.linalg.svdvals(experts.gate_up_proj.reshape(2, 4 * I, H))[:, L:].square().sum()
    assert float(error.detach()) == pytest.approx(float(left_out.detach()))
    eye = torch.eye(L, dtype=torch.float64).expand(2, L, L)
    torch.testing.assert_close(layer.in_proj @ layer.in_proj.mT, eye)
    torch.testing.assert_close(layer.out_proj.mT @ layer.out_proj, eye)


def test_a_shared_output_multiplies_out(device):
    """Biases in the latent are biases behind its projection."""
    factory = {"device": device, "dtype": torch.float64}
    layer = LatentExperts(E, H, I, L, group_size=2, bias=True, **factory)
    ids, weights = random_routing(T, E, 3, device, torch.float64)
    x = torch.randn(T, H, **factory)
    assert_near(layer.to_experts()(x, ids, weights), layer(x, ids, weights))


def test_capacity(device):
    """Slots beyond an expert's capacity add nothing, as in other expert layers."""
    layer = LatentExperts(E, H, I, L, capacity_factor=1.0, device=device, dtype=torch.float64)
    x = torch.randn(12, H, device=device, dtype=torch.float64)
    ids, weights = torch.zeros(12, 1, dtype=torch.int64, device=device), torch.ones(12, 1, device=device)
    y = layer(x, ids, weights)
    assert bool(y[:2].any(1).all()) and not y[2:].any()


def test_state_of_a_quantised_layer(device):
    """Codes in the places of all four stacks, which a layer of the same kind loads."""
    moe = MoE(32, None, E, 2, experts=LatentExperts(E, 32, 16, 8, group_size=3, device=device), device=device)
    report = gossamer.quantize_experts(moe, "int8")
    assert report.after < report.before
    assert {f"experts.{n}.data" for n in ("in_proj", "gate_up_proj", "down_proj", "out_proj")} <= set(moe.state_dict())
    x = torch.randn(T, 32, device=device)
    other = MoE(32, None, E, 2, experts=LatentExperts(E, 32, 16, 8, group_size=3, device=device), device=device)
    gossamer.load_quantized_experts(other, moe.state_dict())
    other.router.load_state_dict(moe.router.state_dict())
    assert torch.equal(other(x), moe(x))
    with pytest.raises(ValueError, match="to_experts needs float weights, got quantised ones"):
        moe.experts.to_experts()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LatentExperts(6, 8, 4, 2, group_size=4), "group_size must divide num_experts, got group_size=4"),
        (lambda: LatentExperts(6, 8, 4, 0), "latent_size must be at least 1, got 0"),
        (lambda: LatentExperts(6, 8, 4, 2, group_size=0), "group_size must be at least 1, got 0"),
        (
            lambda: LatentExperts(6, 8, 4, 2, activation="relu", separate_latents=True),
            "separate_latents needs a gated activation, got 'relu'",
        ),
        (lambda: LatentExperts(6, 8, 4, 2, capacity_factor=0.0), "capacity_factor must be positive"),
        (
            lambda: LatentExperts.from_experts(Experts(6, 8, 4), 9),
            "latent_size must be at most 8 for groups of 6 experts, got 9",
        ),
        (
            lambda: LatentExperts.from_experts(Experts(6, 8, 4, bias=True), 2),
            "shared_output must be False for experts with biases",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_only_plain_experts_convert():
    with pytest.raises(TypeError, match=r"experts must be a gossamer\.nn\.Experts, got LatentExperts"):
        LatentExperts.from_experts(LatentExperts(4, 8, 4, 2), 2)
