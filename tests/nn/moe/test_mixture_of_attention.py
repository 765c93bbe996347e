"""MixtureOfAttention against a loop over experts, causality, padding, decoding."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from contracts import assert_gradients, assert_near, functional, hidden_states, parameters, random_routing

import gossamer
from gossamer.nn import KeyValueCache, MixtureOfAttention, Routing, TopPRouter, load_balance_loss
from gossamer.testing import assert_close

B, S, H, E, K, HEADS, D = 2, 7, 20, 5, 2, 3, 4


def make(**options):
    torch.manual_seed(3)
    options = {"num_experts": E, "top_k": K, "num_heads": HEADS, "head_dim": D} | options
    return MixtureOfAttention(H, **options)


def states(device, dtype=torch.float64, batch=B, length=S):
    return hidden_states(batch, length, H, device=device, dtype=dtype)


def rotate(x, positions, theta):
    """Pairs (i, i + d/2) of ``x (S, h, d)`` turned by position · theta^(−2i/d)."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-torch.arange(half, dtype=x.dtype, device=x.device) * 2 / x.shape[-1])
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)


def by_loop(layer, x, ids, weights, padding=None):
    """Experts one by one over whole sequences, as dense attentions in float64, of which each token keeps its slots'."""
    width = layer.num_heads * layer.head_dim
    y = torch.zeros_like(x)
    ids, weights = ids.view(*x.shape[:2], -1), weights.view(*x.shape[:2], -1)
    positions = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
    seen = positions[None, :] <= positions[:, None] if layer.causal else torch.ones(x.shape[1], x.shape[1]).bool()
    for b in range(x.shape[0]):
        keys, values = (x[b] @ layer.kv_proj.weight.T).view(x.shape[1], 2, layer.num_heads, -1).unbind(1)
        allowed = seen if padding is None else (seen & padding[b]) | torch.eye(x.shape[1]).bool().to(x.device)
        for expert in range(layer.num_experts):
            q = (x[b] @ layer.query_proj[expert].T).view(x.shape[1], layer.num_heads, -1)
            k = keys
            if layer.rope_theta:
                q, k = rotate(q, positions, layer.rope_theta), rotate(keys, positions, layer.rope_theta)
            scores = torch.einsum("shd,thd->hst", q, k) / layer.head_dim**0.5
            attended = torch.einsum("hst,thd->shd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), values)
            out = attended.reshape(x.shape[1], width) @ layer.output_proj[expert].T
            y[b] += out * (weights[b] * (ids[b] == expert)).sum(-1, keepdim=True)
    return y if layer.bias is None else y + layer.bias


@pytest.mark.parametrize("rope_theta", [None, 100.0])
@pytest.mark.parametrize("causal", [True, False])
def test_formula(device, rope_theta, causal):
    layer = make(rope_theta=rope_theta, causal=causal, bias=True, device=device, dtype=torch.float64)
    torch.nn.init.normal_(layer.bias)
    x = states(device)
    y, routing = layer(x, return_routing=True)
    assert y.shape == x.shape and routing.expert_ids.shape == (B * S, K)
    assert_near(y, by_loop(layer, x, routing.expert_ids, routing.weights))
    assert bool(load_balance_loss(routing).isfinite())


def test_any_routing(device):
    """Slots without an expert, and tokens without any, by a routing from outside and by a ragged router."""
    layer = make(
        router=TopPRouter(H, E, 0.5, device=device, dtype=torch.float64), top_k=None, device=device, dtype=torch.float64
    )
    x = states(device)
    ids, weights = random_routing(B * S, E, 3, device, torch.float64)
    y = layer(x, routing=Routing(ids, weights, E, max_rows=int((ids < E).sum())))
    assert_near(y, by_loop(layer, x, ids, weights))
    assert not y[-1, -1].any()
    y, routing = layer(x, return_routing=True)
    assert 0 < int((routing.expert_ids < E).sum()) < routing.expert_ids.numel()
    assert_near(y, by_loop(layer, x, routing.expert_ids, routing.weights))


@pytest.mark.parametrize("top_k", [1, 3, E])
def test_equal_experts_are_ordinary_attention(device, top_k):
    """Experts that are all alike, with weights that add up to one, are one attention with h heads."""
    layer = make(top_k=top_k, rope_theta=None, device=device, dtype=torch.float64)
    with torch.no_grad():
        layer.query_proj.copy_(layer.query_proj[:1].expand_as(layer.query_proj))
        layer.output_proj.copy_(layer.output_proj[:1].expand_as(layer.output_proj))
    x = states(device)
    q, k, v = (
        (x @ w.T).view(B, S, HEADS, D).transpose(1, 2) for w in (layer.query_proj[0], *layer.kv_proj.weight.chunk(2))
    )
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, S, HEADS * D)
    assert_near(layer(x), plain @ layer.output_proj[0].T)


def test_gradients(device):
    layer = make(bias=True, device=device, dtype=torch.float64)
    factors = states(device) * 0.3 + 1
    x = hidden_states(B, S, H, device=device, dtype=torch.float64, seed=4)
    assert_gradients(functional(layer, lambda forward, x: (forward(x) * factors).sum()), {"x": x} | parameters(layer))


def test_is_causal(device):
    layer = make(device=device, dtype=torch.float64)
    x = states(device)
    changed = x.clone()
    changed[:, 4:] += 1
    left, right = layer(x), layer(changed)
    assert_near(left[:, :4], right[:, :4])
    assert not torch.isclose(left[:, 4:], right[:, 4:]).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(device, side):
    """Nothing sees padding, and padding is finite; a padded sequence is as one alone."""
    layer = make(device=device, dtype=torch.float64)
    x = states(device)
    mask = torch.ones(B, S, dtype=torch.bool, device=device)
    kept = slice(3, None) if side == "left" else slice(0, S - 3)
    mask[1] = False
    mask[1, kept] = True
    for given in (mask, mask.long()):
        y, routing = layer(x, attention_mask=given, return_routing=True)
        assert bool(y.isfinite().all())
        assert_near(y[1:, kept], layer(x[1:, kept]))
        assert_near(y[:1], layer(x[:1]))
        assert_near(y, by_loop(layer, x, routing.expert_ids, routing.weights, mask))
    x.requires_grad_()
    layer(x, attention_mask=mask)[1, kept].sum().backward()
    assert not x.grad[1][~mask[1]].any() and bool(x.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [[7], [1] * 7, [3, 1, 1, 2]])
def test_decoding(device, dtype, steps):
    """Tokens one by one, or in pieces, give what the whole gives; so do padded prompts."""
    layer = make(device=device, dtype=dtype)
    x = states(device, dtype)
    mask = torch.ones(B, S, dtype=torch.bool, device=device)
    mask[0, :2] = False
    for padding in (None, mask):
        cache, parts, at = KeyValueCache(), [], 0
        with torch.no_grad():
            for step in steps:
                seen = None if padding is None else padding[:, : at + step]
                parts.append(layer(x[:, at : at + step], attention_mask=seen, cache=cache))
                at += step
            whole = layer(x, attention_mask=padding)
        assert cache.length == S
        found = torch.cat(parts, 1)
        assert found.dtype == dtype
        kept = slice(None) if padding is None else padding
        assert_near(found[kept], whole[kept], slack=16)


def test_masks_of_four_dimensions(device):
    """A mask as scaled_dot_product_attention takes it, for all heads or one by one, also at one token."""
    layer = make(device=device, dtype=torch.float64)
    x = states(device)
    band = torch.ones(S, S, dtype=torch.bool, device=device).tril()
    assert_near(layer(x, attention_mask=band[None, None]), layer(x))
    by_head = band[None, None].expand(B, K * HEADS, S, S).clone()
    by_head[:, :, 5, :4] = False
    y = layer(x, attention_mask=by_head)
    assert_near(y[:, :5], layer(x)[:, :5])
    caches = []
    for mask in (by_head[:, :1, 5:6, :6], by_head[:, :, 5:6, :6]):
        cache = KeyValueCache()
        layer(x[:, :5], cache=cache)
        caches.append(layer(x[:, 5:6], attention_mask=mask, cache=cache))
    for found in caches:
        assert_near(found, y[:, 5:6])


def test_cache_follows_its_sequences(device):
    """A cache whose sequences are copied, dropped and swapped goes on as if it had read them so."""
    layer = make(device=device, dtype=torch.float64)
    x = states(device, batch=3)
    order = torch.tensor([2, 0, 2, 2], device=device)
    cache, fresh = KeyValueCache(), KeyValueCache()
    cache.reorder(order)
    layer(x[:, :4], cache=cache)
    layer(x[:, 4:5], cache=cache)  # room for tokens to come
    cache.reorder(order.int())
    layer(x[order, :5], cache=fresh)
    following = x[:1, 5:].expand(4, -1, -1) * torch.arange(1, 5, device=device).view(4, 1, 1)
    assert_near(layer(following, cache=cache), layer(following, cache=fresh))
    assert cache.length == fresh.length == S


def test_positions(device):
    """Positions count on from the cache; only their differences matter; others may be given."""
    layer = make(device=device, dtype=torch.float64)
    x = states(device)
    shifted = layer(x, position_ids=torch.arange(11, 11 + S, device=device).unsqueeze(0))
    assert_near(layer(x), shifted)
    doubled = layer(x, position_ids=2 * torch.arange(S, device=device).expand(B, S))
    assert not torch.isclose(doubled, shifted).all()


def test_any_attention_function(device):
    """A function of the user's own, and one of torch with arguments bound."""
    x = states(device)
    calls = []

    def plain(q, k, v, *, is_causal=False):
        calls.append((q.shape, k.shape, v.shape, is_causal))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        hidden = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v

    expected = make(device=device, dtype=torch.float64)(x)
    assert_near(make(attention=plain, device=device, dtype=torch.float64)(x), expected)
    heads = (B, K * HEADS, S, D)
    assert calls == [(heads, heads, heads, True)]
    bound = functools.partial(F.scaled_dot_product_attention, scale=0.0)
    uniform = make(attention=bound, causal=False, device=device, dtype=torch.float64)
    y, routing = uniform(x, return_routing=True)
    values = uniform.kv_proj(x)[..., HEADS * D :].mean(1, keepdim=True).expand(B, S, -1)
    outputs = torch.einsum("bsc,enc->bsen", values, uniform.output_proj)
    chosen = F.one_hot(routing.expert_ids.view(B, S, K), E).double() * routing.weights.view(B, S, K, 1)
    assert_near(y, torch.einsum("bske,bsen->bsn", chosen, outputs))


def test_compiles(device):
    torch._dynamo.reset()
    layer = make(bias=True, device=device)
    mask = torch.ones(B, S, dtype=torch.bool, device=device)
    mask[0, :2] = False
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        x = states(device, torch.float32).requires_grad_()
        y = function(x, attention_mask=mask)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for found, expected in zip(*results, strict=True):
        assert_near(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(device, dtype):
    """As near to float64 as the reference backend in that dtype comes, by one routing."""
    layer = make(device=device, dtype=dtype)
    x = states(device, dtype)
    ids, weights = random_routing(B * S, E, K, device)
    routing = Routing(ids, weights, E)
    with torch.no_grad():
        y = layer(x, routing=routing)
        with gossamer.backend("reference"):
            plain = layer(x, routing=routing)
        truth = copy.deepcopy(layer).double()(x.double(), routing=Routing(ids, weights.double(), E))
    assert y.dtype == dtype
    assert_close(y, truth, plain, "y")


def test_autocast(device):
    layer = make(device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = layer(states(device, torch.float32))
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.query_proj.grad.dtype == torch.float32


def test_state_dict_and_bits(device):
    first, second = make(device=device), make(device=device)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    second.load_state_dict(first.state_dict())
    results = []
    for layer in (first, second):
        x = states(device, torch.float32).requires_grad_()
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_quantised(device):
    """Both projections decoded inside the products: what the layer over the decoded weights computes."""
    layer = make(head_dim=32, device=device)
    decoded = copy.deepcopy(layer)
    quantised = gossamer.quantize_experts(layer, "int8")
    assert [m.name for m in quantised.modules] == [""] and quantised.after < 0.4 * quantised.before
    with torch.no_grad():
        for name in layer.weight_stacks:
            getattr(decoded, name).copy_(getattr(layer, name).weight().dequantize())
    x, found = states(device, torch.float32).requires_grad_(), []
    for each in (layer, decoded):
        y = each(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, each.kv_proj.weight])])
    for a, b in zip(*found, strict=True):
        assert_near(a, b)


def test_few_tokens(device):
    layer = make(device=device, dtype=torch.float64)
    x = states(device)
    assert layer(x[:0]).shape == (0, S, H)
    assert_near(layer(x[:, :1]), layer(x)[:, :1])
    one = make(num_experts=1, top_k=1, device=device, dtype=torch.float64)
    y, routing = one(x, return_routing=True)
    assert_near(y, by_loop(one, x, routing.expert_ids, routing.weights))


def test_errors():
    for options, error, message in [
        ({"top_k": 6}, ValueError, "top_k must be at most num_experts, got top_k=6, num_experts=5"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
        ({"causal": 1}, TypeError, "causal must be a bool, got int"),
        ({"head_dim": 3}, ValueError, "head_dim must be even for rotary position embeddings, got 3"),
        ({"rope_theta": 0.0}, ValueError, "rope_theta must be positive and finite, got 0.0"),
        ({"rope_theta": "10"}, TypeError, "rope_theta must be a number or None, got str"),
        ({"router": "best"}, ValueError, "router must be one of"),
        ({"router": 3}, TypeError, "router must be a str or an nn.Module, got int"),
        ({"router": TopPRouter(H, 4, 0.5)}, ValueError, "router must have num_experts = 5, got 4"),
        ({"attention": None}, TypeError, "attention must be callable, got NoneType"),
    ]:
        with pytest.raises(error, match=message):
            make(**options)
    layer, x = make(), torch.zeros(B, S, H)
    for call, error, message in [
        (lambda: layer(x[0]), ValueError, r"x must have shape \(B, S, H\), got \(7, 20\)"),
        (lambda: layer(x, attention_mask=[1]), TypeError, "attention_mask must be a torch.Tensor, got list"),
        (lambda: layer(x, attention_mask=torch.ones(B, S - 1)), ValueError, r"attention_mask must have shape \(B, L\)"),
        (
            lambda: layer(x, position_ids=torch.zeros(S)),
            ValueError,
            r"position_ids must have shape \(B, S\) or \(1, S\)",
        ),
        (
            lambda: layer(x, routing=layer.router(x[:1])),
            ValueError,
            "routing must be of 14 tokens over 5 experts, got 7",
        ),
        (lambda: layer(x, routing=3), TypeError, "routing must be a gossamer.nn.Routing, got int"),
    ]:
        with pytest.raises(error, match=message):
            call()
    cache = KeyValueCache()
    layer(x, cache=cache)
    with pytest.raises(ValueError, match="keys must have shape those of the cache"):
        layer(x[:1], cache=cache)
    for order, error, message in [
        (torch.tensor([0, 2]), IndexError, "order must hold sequences of the cache, from 0 to 1, got 2"),
        (torch.tensor([-1, 0]), IndexError, "order must hold .* got -1"),
        (torch.tensor([[0]]), ValueError, r"order must have shape \(B',\) = .* got \(1, 1\)"),
        (torch.tensor([0.0]), TypeError, "order must be"),
    ]:
        with pytest.raises(error, match=message):
            cache.reorder(order)
