"""Delta-rule layers against their formulas, token by token."""

import copy

import pytest
import torch
import torch.nn.functional as F

import gossamer
from gossamer.nn import DeltaNet, GatedDeltaNet, KimiDeltaAttention
from gossamer.testing import assert_close

HIDDEN, HEADS, KEYS, VALUES = 24, 4, 8, 6
LAYERS = [
    (DeltaNet, {}),
    (DeltaNet, {"negative_eigenvalues": True, "conv_size": 2}),
    (GatedDeltaNet, {"num_key_heads": 2}),
    (KimiDeltaAttention, {}),
]
IDS = ["plain", "reflecting", "gated", "kimi"]


@pytest.fixture(params=LAYERS, ids=IDS)
def layer(request, device):
    cls, options = request.param
    torch.manual_seed(3)
    made = cls(HIDDEN, HEADS, KEYS, value_head_dim=VALUES, device=device, **options)
    # Large gates and norms that differ by channel: ones would hide a norm that is left out.
    with torch.no_grad():
        made.norm_weight.uniform_(0.5, 2)
    return made


def by_token(layer, x):
    """The layer in float64, one token after the other, from its docstring."""
    layer, x = copy.deepcopy(layer).double(), x.double()
    outputs = []
    for sequence in x:
        inputs = F.linear(sequence, layer.qkv_proj.weight)
        padded = F.pad(inputs, (0, 0, layer.conv_size - 1, 0))
        state = inputs.new_zeros(layer.num_heads, layer.head_dim, layer.value_head_dim)
        rows = []
        for t in range(len(sequence)):
            window = padded[t : t + layer.conv_size]
            mixed = F.silu((window * layer.conv_weight.T).sum(0))
            sizes = [layer.num_key_heads * layer.head_dim] * 2 + [layer.num_heads * layer.value_head_dim]
            q, k, v = mixed.split(sizes)
            q, k = (
                part.view(layer.num_key_heads, -1).repeat_interleave(HEADS // layer.num_key_heads, 0) for part in (q, k)
            )
            q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
            v = v.view(HEADS, -1)
            beta = torch.sigmoid(layer.beta_proj.weight @ sequence[t])
            beta = 2 * beta if layer.negative_eigenvalues else beta
            if isinstance(layer, GatedDeltaNet):
                raw = layer.decay_proj.weight @ sequence[t] + layer.dt_bias
                state = state * torch.exp(-layer.A_log.exp() * F.softplus(raw))[:, None, None]
            elif isinstance(layer, KimiDeltaAttention):
                raw = layer.decay_up.weight @ (layer.decay_down.weight @ sequence[t]) + layer.dt_bias
                rate = -layer.A_log.exp()[:, None] * F.softplus(raw.view(HEADS, -1))
                state = state * rate.exp()[:, :, None]
            error = v - torch.einsum("hkv,hk->hv", state, k)
            state = state + torch.einsum("h,hk,hv->hkv", beta, k, error)
            o = torch.einsum("hkv,hk->hv", state, q) / layer.head_dim**0.5
            o = o / (o.square().mean(-1, keepdim=True) + layer.norm_eps).sqrt() * layer.norm_weight
            if isinstance(layer, GatedDeltaNet):
                o = o * F.silu(layer.gate_proj.weight @ sequence[t]).view_as(o)
            elif isinstance(layer, KimiDeltaAttention):
                o = o * torch.sigmoid(layer.gate_up.weight @ (layer.gate_down.weight @ sequence[t])).view_as(o)
            rows.append(layer.out_proj.weight @ o.reshape(-1))
        outputs.append(torch.stack(rows) if rows else sequence.new_zeros(0, HIDDEN))
    return torch.stack(outputs)


@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_formula(layer, device, tokens):
    """The definition in float64, more tokens than a chunk included; the same bits twice."""
    x = torch.randn(2, tokens, HIDDEN, device=device)
    truth = by_token(layer, x)
    y = layer.double()(x.double())
    torch.testing.assert_close(y, truth, rtol=1e-9, atol=1e-11)
    assert torch.equal(layer(x.double()), y)


def test_gradients(layer, device):
    """Finite differences of the inputs and of every parameter."""
    layer = layer.double()
    x = torch.randn(1, 4, HIDDEN, device=device, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    torch.autograd.gradcheck(call, (x, *(p.detach().requires_grad_() for p in layer.parameters())), fast_mode=True)


@torch.no_grad()
def test_decoding_goes_on_where_the_prefill_ended(layer, device):
    """A prefill and single tokens, or two pieces, give what the whole sequence gives."""
    x = torch.randn(3, 9, HIDDEN, device=device)
    whole, truth = layer(x), by_token(layer, x)
    state = layer.initial_state(3)
    parts = [layer(x[:, :5], state=state)] + [layer(x[:, t : t + 1], state=state) for t in range(5, 9)]
    assert_close(torch.cat(parts, 1), truth, baseline=whole)
    state = layer.initial_state(3)
    assert_close(torch.cat([layer(x[:, :2], state=state), layer(x[:, 2:], state=state)], 1), truth, baseline=whole)


def test_packed_sequences_do_not_meet(layer, device):
    """A pack gives each sequence's own outputs and gradients, an empty one among them."""
    lengths = [3, 0, 6, 1]
    x = torch.randn(1, sum(lengths), HIDDEN, device=device, dtype=torch.float64)
    layer = layer.double()
    ends = torch.tensor([0, *lengths], device=device).cumsum(0)
    y = layer(x, cu_seqlens=ends)
    alone = [layer(part) for part in x.split(lengths, dim=1) if part.shape[1]]
    torch.testing.assert_close(y, torch.cat(alone, 1), rtol=1e-10, atol=1e-12)


def test_left_padding_is_nothing(layer, device):
    """Masked inputs before a sequence change nothing in it."""
    x = torch.randn(2, 7, HIDDEN, device=device, dtype=torch.float64)
    layer = layer.double()
    mask = torch.ones(2, 7, dtype=torch.bool, device=device)
    mask[1, :3] = False
    y = layer(x, mask=mask)
    torch.testing.assert_close(y[1:, 3:], layer(x[1:, 3:]), rtol=1e-10, atol=1e-12)


def test_compiled_and_saved(layer, device):
    """Compiled whole, forward and backward, with the same numbers; another layer takes the state dict."""
    x = torch.randn(2, 6, HIDDEN, device=device)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    other = copy.deepcopy(layer)
    for p in other.parameters():
        torch.nn.init.normal_(p)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_bad_arguments():
    """Errors name the argument, the rule and the values."""
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_key_heads, got num_heads=4"):
        GatedDeltaNet(HIDDEN, 4, 8, num_key_heads=3)
    with pytest.raises(ValueError, match=r"conv_size must be in \[2, 8\], got 9"):
        DeltaNet(HIDDEN, 4, 8, conv_size=9)
    with pytest.raises(TypeError, match="head_dim must be an int"):
        DeltaNet(HIDDEN, 4, 8.0)
    layer = DeltaNet(HIDDEN, 4, 8)
    x = torch.randn(1, 3, HIDDEN)
    with pytest.raises(ValueError, match="state and cu_seqlens exclude each other"):
        layer(x, state=layer.initial_state(1), cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"mask must have shape \(B, T\)"):
        layer(x, mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"x must have shape \(B, T, hidden\)"):
        layer(torch.randn(3, HIDDEN))


def test_names():
    """The layers are public."""
    assert gossamer.nn.DeltaRuleState._fields == ("conv", "recurrent")
