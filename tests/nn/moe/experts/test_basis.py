"""BasisExperts against the matrices formed one by one, the sheet's sizes, and fitting to trained experts."""

import pytest
import torch
from contracts import ExpertsContract, assert_near, random_routing

import gossamer
from gossamer._activation import ACTIVATIONS, activate_reference
from gossamer.nn import BasisExperts, Experts, MoE

T, H, I, M, R, E = 9, 12, 5, 3, 4, 6


def basis(**options):
    return lambda num_experts, hidden_size, **factory: BasisExperts(
        num_experts, hidden_size, 16, 3, **options, **factory
    )


TestBasisExperts = ExpertsContract.over(
    {
        "silu": basis(bias=True),
        "tanh": basis(nonlinearity="tanh", rank=7),
        "ungated": basis(activation="gelu", nonlinearity="identity"),
    }
)


def by_loop(layer, x, ids, weights):
    """Every token through each of its experts, whose matrices are written out."""
    psi = {"silu": torch.nn.functional.silu, "tanh": torch.tanh, "identity": lambda m: m}[layer.nonlinearity]
    y = torch.zeros_like(x)
    for t, (experts, shares) in enumerate(zip(ids.tolist(), weights, strict=True)):
        for e, share in zip(experts, shares, strict=True):
            if e >= layer.num_experts:
                continue
            rows = []
            for half in range(layer.activation.halves):
                alpha = layer.mix[e, half].exp() / layer.mix[e, half].exp().sum()
                mixed = sum(alpha[j] * layer.bases[half, j] for j in range(layer.num_bases))
                rows.append(layer.factor[e, half] @ (psi(mixed) @ x[t]))
            preact = torch.cat(rows)
            if layer.up_bias is not None:
                preact = preact + layer.up_bias[e]
            out = layer.down_proj[e] @ activate_reference(preact, layer.activation, False)
            y[t] += share * (out if layer.down_bias is None else out + layer.down_bias[e])
    return y


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("nonlinearity", ["silu", "tanh", "identity"])
def test_is_the_formula(device, nonlinearity, trains):
    """Both ways: by chains of products where no gradient is wanted, and by matrices that are multiplied out."""
    factory = {"device": device, "dtype": torch.float64}
    layer = BasisExperts(E, H, I, M, rank=R, nonlinearity=nonlinearity, bias=True, **factory)
    ids, weights = random_routing(T, E, 3, device, torch.float64)
    ids[0, :2] = 3
    x = torch.randn(T, H, **factory)
    with torch.set_grad_enabled(trains):
        assert_near(layer(x, ids, weights), by_loop(layer, x, ids, weights))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations(device, activation):
    factory = {"device": device, "dtype": torch.float64}
    layer = BasisExperts(E, H, I, M, activation=activation, **factory)
    ids, weights = random_routing(T, E, 2, device, torch.float64)
    x = torch.randn(T, H, **factory)
    for trains in (False, True):
        with torch.set_grad_enabled(trains):
            assert_near(layer(x, ids, weights), by_loop(layer, x, ids, weights))


def test_makes_the_matrices_of_busy_experts_alone(monkeypatch):
    """Two experts with tokens out of many: two matrices, and gradients of their own factors alone."""
    layer, made = BasisExperts(8, H, I, M), []
    original = BasisExperts.up_weight
    monkeypatch.setattr(
        BasisExperts, "up_weight", lambda self, experts=None: made.append(experts) or original(self, experts)
    )
    ids = torch.tensor([[5, 2], [2, 5], [5, 8]])
    layer(torch.randn(3, H), ids, torch.ones(3, 2)).sum().backward()
    assert [experts.tolist() for experts in made] == [[2, 5]]
    busy = layer.factor.grad.flatten(1).any(1)
    assert busy.nonzero().flatten().tolist() == [2, 5]


def test_expanded_layer_computes_the_same(device):
    """Plain experts, which may then be quantised."""
    factory = {"device": device, "dtype": torch.float64}
    layer = BasisExperts(E, H, I, M, bias=True, **factory)
    ids, weights = random_routing(T, E, 3, device, torch.float64)
    x = torch.randn(T, H, **factory)
    plain = layer.expand()
    assert type(plain) is Experts
    assert_near(plain(x, ids, weights), layer(x, ids, weights))


def test_a_new_layer_has_matrices_of_the_usual_size():
    """Their standard deviation is that of nn.Linear's, so that it starts as plain experts do."""
    torch.manual_seed(0)
    for nonlinearity in ("silu", "tanh"):
        layer = BasisExperts(8, 64, 32, 4, nonlinearity=nonlinearity)
        assert float(layer.up_weight().detach().std()) == pytest.approx((3 * 64) ** -0.5, rel=0.2)


@pytest.mark.parametrize(
    ("experts", "hidden", "inner", "bases", "of_matrices", "of_experts"),
    [(128, 4096, 1536, 32, 0.625005, 0.75), (256, 7168, 2048, 64, 0.535719, 0.6905)],
)
def test_worked_sizes(experts, hidden, inner, bases, of_matrices, of_experts):
    """The published configurations of Qwen3-235B and DeepSeek-V3, by the parameters of gate, up and all."""
    layer = BasisExperts(experts, hidden, inner, bases, device="meta")
    plain = Experts(experts, hidden, inner, device="meta")
    ours = sum(p.numel() for p in (layer.bases, layer.mix, layer.factor))
    assert ours / plain.gate_up_proj.numel() == pytest.approx(of_matrices, abs=1e-6)
    total = sum(p.numel() for p in layer.parameters()) / sum(p.numel() for p in plain.parameters())
    assert total == pytest.approx(of_experts, abs=1e-4)


def test_worked_start():
    """A logit of 1 beside zeros is a weak prior: 0.080617 for the own basis of 32."""
    alpha = torch.zeros(32).index_fill(0, torch.tensor(3), 1.0).softmax(0)
    assert alpha[3].item() == pytest.approx(0.080617, abs=1e-6)
    assert alpha[0].item() == pytest.approx(0.029658, abs=1e-6)
    layer = BasisExperts.from_experts(Experts(4, 8, 4), 2, steps=1, lr=1e-12)
    own = torch.tensor([0, 0, 1, 1]).view(4, 1, 1).expand(4, 2, 1)
    torch.testing.assert_close(layer.mix.softmax(-1).gather(2, own), torch.full((4, 2, 1), 0.731059))


def test_fitting_comes_near_experts_that_bases_make():
    """Experts drawn from three bases are found again to a small error, and the best look is kept."""
    torch.manual_seed(0)
    source = BasisExperts(6, 24, 8, 3, nonlinearity="tanh", bias=True)
    with torch.no_grad():
        source.mix.normal_(std=2.0)
    looks = []
    fitted = BasisExperts.from_experts(
        source.expand(),
        3,
        nonlinearity="tanh",
        steps=600,
        lr=0.02,
        check_every=100,
        progress=lambda step, error: looks.append((step, error)),
    )
    wanted = source.up_weight().detach()
    error = float((fitted.up_weight().detach() - wanted).square().mean() / wanted.square().mean())
    assert [step for step, _ in looks] == [0, 100, 200, 300, 400, 500, 600]
    assert error == pytest.approx(min(e for _, e in looks), rel=0.05)
    assert error < 0.05 < looks[0][1]
    torch.testing.assert_close(fitted.down_proj, source.down_proj)
    torch.testing.assert_close(fitted.up_bias, source.up_bias)


def test_as_many_identity_bases_as_experts_are_exact_in_reach():
    """With M = E and ψ the identity nothing is lost: the fit goes on to the rounding of its steps."""
    torch.manual_seed(0)
    experts = Experts(3, 10, 6)
    fitted = BasisExperts.from_experts(experts, 3, nonlinearity="identity", steps=400, lr=0.02)
    error = (fitted.up_weight() - experts.gate_up_proj).square().mean() / experts.gate_up_proj.square().mean()
    assert float(error.detach()) < 1e-3


def test_inside_the_layer_it_trains(device):
    """All three parts of a matrix get gradients through nn.MoE."""
    moe = MoE(H, None, E, 2, experts=BasisExperts(E, H, I, M, device=device), device=device)
    moe(torch.randn(40, H, device=device)).square().sum().backward()
    for name in ("bases", "mix", "factor", "down_proj"):
        assert bool(getattr(moe.experts, name).grad.any()), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BasisExperts(4, 8, 4, 0), "num_bases must be at least 1, got 0"),
        (lambda: BasisExperts(4, 8, 4, 2, rank=0), "rank must be at least 1, got 0"),
        (lambda: BasisExperts(4, 8, 4, 2, nonlinearity="relu"), "nonlinearity must be one of .* got 'relu'"),
        (lambda: BasisExperts.from_experts(Experts(4, 8, 4), 5), "num_bases must be at most E = 4, got 5"),
        (lambda: BasisExperts.from_experts(Experts(4, 8, 4), 2, rank=9), "rank must be at most 8, .* got 9"),
        (lambda: BasisExperts.from_experts(Experts(4, 8, 4), 2, lr=0.0), "lr must be positive and finite, got 0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_quantised_experts_are_not_fitted():
    experts = Experts(4, 32, 16)
    gossamer.quantize_experts(experts, "int8")
    with pytest.raises(ValueError, match="experts must hold floats, got quantised weights"):
        BasisExperts.from_experts(experts, 2)
