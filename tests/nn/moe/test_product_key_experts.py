"""ProductKeyExperts: its formula by a loop over all experts, its retrieval by brute force, and fused training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from contracts import ExpertsContract, assert_gradients, assert_near, functional, hidden_states, parameters

from gossamer import optim
from gossamer.nn import MoE, ProductKeyExperts, SoftmaxRouter
from gossamer.testing import assert_close

H, N, T = 24, 49, 11


def make(num_experts=N, hidden_size=H, *, num_heads=3, top_k=4, key_dim=8, **options):
    torch.manual_seed(5)
    return ProductKeyExperts(hidden_size, num_experts, num_heads=num_heads, top_k=top_k, key_dim=key_dim, **options)


def without_queries(**options):
    layer = make(num_heads=1, top_k=1, **options)
    layer.query.requires_grad_(False)
    layer.query_norm.requires_grad_(False)
    layer.keys.requires_grad_(False)
    return layer


class TestExperts(
    ExpertsContract.over(gelu=without_queries, silu=lambda **options: without_queries(activation="silu", **options))
):
    """As any expert layer by a given routing, over a square of experts; queries take no part in that."""

    E = 4


def by_brute_force(layer, x):
    """The formula over all N experts in float64: every score, its K highest, and one neuron each."""
    layer = copy.deepcopy(layer).double()
    x = x.double()
    queries = layer.query(x)
    if layer.query_norm is not None:
        norm = layer.query_norm
        mean, var = (
            (queries.mean(0), queries.var(0, correction=0)) if layer.training else (norm.running_mean, norm.running_var)
        )
        queries = (queries - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias
    queries = queries.view(x.shape[0], layer.num_heads, 2, -1)
    side = layer.keys.shape[2]
    y = torch.zeros_like(x)
    for head in range(layer.num_heads):
        keys = layer.keys[head % layer.keys.shape[0]]
        pairs = (queries[:, head, 0] @ keys[0].T).unsqueeze(2) + (queries[:, head, 1] @ keys[1].T).unsqueeze(1)
        scores, ids = pairs.view(x.shape[0], side * side).topk(layer.top_k)
        weights = scores.softmax(1)
        hidden = F.gelu(torch.einsum("td,tkd->tk", x, layer.input_weight[ids]))
        y = y + torch.einsum("tk,tkd->td", weights * hidden, layer.output_weight[ids])
    return y


@pytest.mark.parametrize("shared_keys", [True, False])
@pytest.mark.parametrize("query_norm", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_formula(device, shared_keys, query_norm, training):
    layer = make(device=device, dtype=torch.float64, shared_keys=shared_keys, query_norm=query_norm).train(training)
    if query_norm:
        layer.query_norm.running_mean.uniform_(-1, 1)
        layer.query_norm.running_var.uniform_(0.5, 2)
    x = hidden_states(T, H, device=device, dtype=torch.float64)
    expected = by_brute_force(layer, x)
    assert_near(layer(x), expected)
    assert_near(layer(x.view(1, T, H)), layer(x).view(1, T, H))


def test_worked_value(device):
    """Nine experts, one head of two: the scores (1, 3, 2) and (.5, 0, 2) choose experts 5 and 8."""
    layer = make(9, 3, num_heads=1, top_k=2, key_dim=2, query_norm=False, activation="relu", device=device)
    with torch.no_grad():
        layer.query.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
        layer.keys.copy_(torch.tensor([[[[1.0], [3], [2]], [[0.5], [0], [2]]]]))
        layer.input_weight.zero_()[:, 2] = torch.arange(9.0, device=device)
        layer.output_weight.zero_()[:, 0] = 1
    x = torch.tensor([[1.0, 1, 2]], device=device)
    routing = layer.route(x)
    assert routing.expert_ids.tolist() == [[5, 8]]
    torch.testing.assert_close(routing.weights.cpu(), torch.tensor([[0.731059, 0.268941]]), rtol=1e-5, atol=0)
    # ⟨u, x⟩ is 10 and 16.
    torch.testing.assert_close(layer(x)[0, 0].item(), 10 * 0.731059 + 16 * 0.268941, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shared_keys", [True, False])
def test_gradients(device, shared_keys):
    """Hidden states, queries, norm, keys and both tables, by finite differences."""
    layer = make(device=device, dtype=torch.float64, shared_keys=shared_keys)
    factors = hidden_states(T, H, device=device, dtype=torch.float64, seed=8)
    layer.query_norm.momentum = 0.0

    def call(forward, x):
        return (forward(x) * factors).sum()

    x = hidden_states(T, H, device=device, dtype=torch.float64)
    assert_gradients(functional(layer, call), {"x": x} | parameters(layer))


def test_heads_that_agree(device):
    """An expert that two heads choose counts twice, and its gradients add up."""
    layer = make(num_heads=2, query_norm=False, device=device, dtype=torch.float64)
    with torch.no_grad():
        layer.query.weight[8:] = layer.query.weight[:8]
    x = hidden_states(T, H, device=device, dtype=torch.float64)
    one = make(num_heads=1, query_norm=False, device=device, dtype=torch.float64)
    with torch.no_grad():
        for name in ("keys", "input_weight", "output_weight"):
            getattr(one, name).copy_(getattr(layer, name))
        one.query.weight.copy_(layer.query.weight[:8])
    ids = layer.route(x).expert_ids
    assert torch.equal(ids[:, :4], ids[:, 4:])
    y = layer(x)
    assert_near(y, 2 * one(x))
    y.sum().backward()
    (2 * one(x)).sum().backward()
    assert_near(layer.input_weight.grad, one.input_weight.grad)
    assert_near(layer.output_weight.grad, one.output_weight.grad)


def test_fused_step(device):
    """Both tables move by the step of the dense gradients, which the layer with an optimizer never has."""
    plain = make(device=device)
    fused = make(device=device, optimizer=optim.SGD(0.5))
    x = hidden_states(T, H, device=device)
    for layer in (plain, fused):
        leaf = x.clone().requires_grad_()
        (layer(leaf) * hidden_states(T, H, device=device, seed=8)).sum().backward()
        layer.dx = leaf.grad
    assert_near(fused.dx, plain.dx)
    for name in ("keys", "query.weight", "query_norm.weight"):
        assert_near(fused.get_parameter(name).grad, plain.get_parameter(name).grad)
    for name in fused.tables:
        table, other = getattr(fused, name), getattr(plain, name)
        assert table.grad is None and not table.requires_grad
        touched = other.grad.abs().sum(1) > 0
        assert 0 < int(touched.sum()) < N
        assert_near(table[touched], (other - 0.5 * other.grad)[touched])
        assert torch.equal(table[~touched], other[~touched])
    assert fused.optimizer_input_weight_step.item() == fused.optimizer_output_weight_step.item() == 1


def test_trains(device):
    """A teacher of the same kind is learnt with fused Adam on the tables and AdamW on the rest."""
    torch.manual_seed(0)
    layer = make(256, 16, num_heads=2, top_k=8, optimizer=optim.Adam(0.03), device=device)
    rest = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=3e-3)
    x = hidden_states(256, 16, device=device)
    target = (x @ hidden_states(16, 16, device=device, seed=4) / 4).tanh()
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        rest.zero_grad()
        loss.backward()
        rest.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_state_dict(device):
    """Tables, optimizer state and running statistics: training goes on from a copy with the same bits."""
    layers = [make(device=device, optimizer=optim.Adam(0.1)) for _ in range(2)]
    x = hidden_states(T, H, device=device)
    layers[0](x).square().sum().backward()
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        layer(x).square().sum().backward()
    for (name, left), right in zip(layers[0].state_dict().items(), layers[1].state_dict().values(), strict=True):
        assert torch.equal(left, right), name
    assert torch.equal(layers[0].eval()(x), layers[1].eval()(x))


@pytest.mark.parametrize("fused", [False, True])
def test_compiles(device, fused):
    torch._dynamo.reset()
    optimizer = optim.SGD(0.1) if fused else None
    layers = [make(device=device, optimizer=optimizer) for _ in range(2)]
    x = hidden_states(T, H, device=device)
    for layer, function in zip(
        layers, (layers[0], torch.compile(layers[1], fullgraph=True, backend="aot_eager")), strict=True
    ):
        layer.y = function(x)
        layer.y.square().sum().backward()
    assert_near(layers[1].y, layers[0].y)
    for left, right in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        assert_near(right, left)
        if left.grad is not None:
            assert_near(right.grad, left.grad)
    assert_near(layers[1].query_norm.running_var, layers[0].query_norm.running_var)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(device, dtype):
    """Retrieval in float32; the result as near to float64 as plain torch in that dtype comes, by one routing."""
    layer = make(device=device, dtype=dtype).eval()
    x = hidden_states(T, H, device=device, dtype=dtype)
    y, routing = layer(x), layer.route(x)
    assert y.dtype == dtype and routing.weights.dtype == torch.float32
    wide = copy.deepcopy(layer).double()
    truth = wide(x.double(), routing.expert_ids, routing.weights.double())
    ids = routing.expert_ids
    hidden = F.gelu(torch.einsum("td,tkd->tk", x, layer.input_weight[ids]))
    plain = torch.einsum("tk,tkd->td", routing.weights.to(dtype) * hidden, layer.output_weight[ids])
    assert_close(y, truth, plain, "y")


def test_autocast(device):
    """Under autocast queries are products in its dtype, and the tables stay as they are."""
    layer = make(device=device)
    x = hidden_states(T, H, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = layer(x)
        y.sum().backward()
    assert y.dtype == torch.float32 and layer.input_weight.grad.dtype == torch.float32
    assert bool(layer.query.weight.grad.isfinite().all())


def test_in_a_layer(device):
    """Beside another router it is the experts of nn.MoE."""
    layer = make(16, device=device, dtype=torch.float64)
    moe = MoE(H, None, router=SoftmaxRouter(H, 16, 3, device=device, dtype=torch.float64), experts=layer)
    x = hidden_states(T, H, device=device, dtype=torch.float64)
    y, routing = moe(x, return_routing=True)
    hidden = F.gelu(torch.einsum("td,tkd->tk", x, layer.input_weight[routing.expert_ids]))
    assert_near(y, torch.einsum("tk,tkd->td", routing.weights * hidden, layer.output_weight[routing.expert_ids]))


def test_frozen(device):
    """Served without optimizer and norm, with the answers of evaluation."""
    layer = make(device=device, dtype=torch.float64, optimizer=optim.Adam(0.1))
    x = hidden_states(T, H, device=device, dtype=torch.float64)
    for _ in range(3):
        layer(x).square().sum().backward()
    expected, before = layer.eval()(x), layer.nbytes()
    promised = layer.inference_nbytes()
    assert layer.freeze() is layer
    assert_near(layer(x), expected)
    assert layer.query_norm is None and not any(p.requires_grad for p in layer.parameters())
    assert layer.nbytes() <= promised < before / 2


def test_few_tokens(device):
    layer = make(device=device)
    empty = hidden_states(0, H, device=device).requires_grad_()
    y = layer(empty)
    y.sum().backward()
    assert y.shape == (0, H) and empty.grad.shape == (0, H)
    one = hidden_states(1, H, device=device)
    with pytest.raises(ValueError, match=r"x must hold at least two tokens, .* in training, got 1"):
        layer(one)
    both = hidden_states(2, H, device=device)
    assert_near(layer.eval()(both[:1]), layer(both)[:1])


def test_one_expert(device):
    layer = make(1, num_heads=2, top_k=1, device=device, dtype=torch.float64)
    x = hidden_states(T, H, device=device, dtype=torch.float64)
    expected = 2 * F.gelu(x @ layer.input_weight[0]).unsqueeze(1) * layer.output_weight[0]
    assert_near(layer(x), expected)


def test_same_bits_twice(device):
    layer = make(device=device)
    results = []
    for _ in range(2):
        x = hidden_states(T, H, device=device).requires_grad_()
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_meta_and_reset(device):
    layer = make(device="meta", optimizer=optim.Adam(0.1)).to_empty(device=device)
    layer.query.reset_parameters()
    layer.query_norm.reset_parameters()
    layer.reset_parameters()
    y = layer(hidden_states(T, H, device=device))
    assert bool(y.isfinite().all()) and layer.optimizer_input_weight_step.item() == 0


def test_errors():
    for options, error, message in [
        ({"num_experts": 50}, ValueError, "num_experts must be a square, got 50"),
        ({"top_k": 8}, ValueError, "top_k must be at most the square root of num_experts, 7, got 8"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"num_heads": 1.0}, TypeError, "num_heads must be an int, got float"),
        ({"query_norm": 1}, TypeError, "query_norm must be a bool, got int"),
        ({"key_dim": 7}, ValueError, "key_dim must be even, for two halves, got 7"),
        ({"activation": "swiglu"}, ValueError, "activation must be ungated for single neurons, got 'swiglu'"),
        ({"optimizer": "adam"}, TypeError, "optimizer must be one of gossamer.optim, got str"),
    ]:
        with pytest.raises(error, match=message):
            make(**options)
    layer = make()
    x = torch.zeros(T, H)
    for call, error, message in [
        (lambda: layer(x[:, 1:]), ValueError, r"x must have shape \(..., H\)"),
        (lambda: layer(x, weights=torch.ones(T, 1)), TypeError, "weights must be None without expert ids to weigh"),
        (lambda: layer(x, torch.zeros(T, 1, dtype=torch.int64)), TypeError, "expert ids with weights"),
        (lambda: layer(torch.full((T, H), torch.nan)), ValueError, "scores1 must hold neither NaN nor"),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert "num_experts=49, num_heads=3, top_k=4" in repr(layer)
