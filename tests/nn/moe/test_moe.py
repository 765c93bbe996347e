"""Expert and mixture-of-experts layers: against a dense loop in float64, and with torch's machinery."""

import copy

import pytest
import torch
import torch.nn.functional as F
from eager_draws import compare
from helpers import randn
from torch.utils.checkpoint import checkpoint

from gossamer.nn import Experts, HashRouter, MoE, SharedExpert, SoftmaxRouter, given_experts, load_balance_loss
from gossamer.testing import assert_close, random_expert_ids

# H and I are multiples of nothing; T is not a multiple of E or of a tile; K = 3 of 7 leaves experts with few tokens.
H, I, E, K, T = 40, 24, 7, 3, 45


def dense_loop(x, p, ids, weights, *, activation="swiglu", interleaved=False, transposed=False):
    """Every expert on every token in plain torch, then the routed ones picked out."""
    gated = "experts.gate_up_proj" in p
    up_name = "gate_up_proj" if gated else "up_proj"
    y = torch.zeros_like(x)
    for e in range(p["experts.down_proj"].shape[0]):
        up, down = p[f"experts.{up_name}"][e], p["experts.down_proj"][e]
        if transposed:
            up, down = up.T, down.T
        hidden = x @ up.T
        if f"experts.{up_name}_bias" in p:
            hidden = hidden + p[f"experts.{up_name}_bias"][e]
        if gated:
            gate, value = (hidden[:, 0::2], hidden[:, 1::2]) if interleaved else hidden.chunk(2, dim=1)
            if activation == "clamped_swiglu":
                gate, value = gate.clamp(max=7.0), value.clamp(-7.0, 7.0)
                hidden = gate * torch.sigmoid(1.702 * gate) * (value + 1)
            else:
                hidden = F.silu(gate) * value
        else:
            hidden = F.relu(hidden).square()
        out = hidden @ down.T
        if "experts.down_proj_bias" in p:
            out = out + p["experts.down_proj_bias"][e]
        y = y + ((ids == e) * weights).sum(1, keepdim=True).to(x.dtype) * out
    return y


def plain_moe(x, p, ids, kind, inner=None, **form):
    """The whole layer on given choices; all but the router in the dtype ``inner`` if there is one."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(wide) @ p["router.weight"].to(wide).T
    if "router.bias" in p:
        logits = logits + p["router.bias"].to(wide)
    if kind == "sigmoid_topk":
        weights = torch.sigmoid(logits).gather(1, ids)
        weights = 2.5 * weights / weights.sum(1, keepdim=True)
    elif kind == "softmax_topk":
        weights = torch.softmax(logits, 1).gather(1, ids)
    else:
        weights = torch.softmax(logits.gather(1, ids), 1)
    if inner is not None:
        x, p = x.to(inner), {name: v.to(inner) for name, v in p.items()}
    y = dense_loop(x, p, ids, weights, **form)
    if "shared_expert.down_proj.weight" in p:
        gate, up = (x @ p["shared_expert.gate_up_proj.weight"].T).chunk(2, dim=1)
        shared = (F.silu(gate) * up) @ p["shared_expert.down_proj.weight"].T
        if "shared_expert_gate.weight" in p:
            shared = torch.sigmoid(x @ p["shared_expert_gate.weight"].T) * shared
        y = y + shared
    return y


def gradients(y, dy, x, parameters):
    return torch.autograd.grad(y, [x, *parameters.values()], dy.to(y.dtype))


LAYERS = [
    pytest.param("softmax_topk", {}, id="olmoe"),
    pytest.param("softmax_topk", {"shared_intermediate_size": 33, "shared_gate": True}, id="qwen2"),
    pytest.param("topk_softmax", {"shared_intermediate_size": 33}, id="shared"),
    pytest.param(
        "topk_softmax",
        {"router_bias": True, "bias": True, "interleaved": True, "transposed": True, "activation": "clamped_swiglu"},
        id="gpt-oss",
    ),
    pytest.param("sigmoid_topk", {"scale": 2.5, "shared_intermediate_size": 33}, id="deepseek-v3"),
]
FORM = ("activation", "interleaved", "transposed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("router", "options"), LAYERS)
def test_against_a_dense_loop(device, router, options, dtype):
    moe = MoE(H, I, E, K, router=router, device=device, dtype=dtype, **options)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    parameters = dict(moe.named_parameters())
    form = {name: options[name] for name in FORM if name in options}

    def inputs(draw):
        x = randn(3, T // 3, H, seed=2 * draw, device=device, dtype=dtype)
        return x.requires_grad_(), randn(T, H, seed=2 * draw + 1, device=device, dtype=dtype)

    def named(y, grads):
        return {"y": y.reshape(T, H), "x": grads[0].reshape(T, H), **dict(zip(parameters, grads[1:], strict=True))}

    def ours(draw):
        x, dy = inputs(draw)
        y = moe(x)
        assert y.shape == x.shape
        return named(y, gradients(y, dy.view(x.shape), x, parameters))

    def plain(draw, cast):
        x, dy = inputs(draw)
        ids = moe(x, return_routing=True)[1].expert_ids
        leaf = x.detach().to(cast).reshape(T, H).requires_grad_()
        p = {name: v.detach().to(cast).requires_grad_() for name, v in parameters.items()}
        out = plain_moe(leaf, p, ids, router, **form)
        return named(out, gradients(out, dy, leaf, p))

    compare(ours, lambda draw: plain(draw, dtype), lambda draw: plain(draw, torch.float64))


def test_ungated_experts_and_dropped_slots(device):
    """relu² experts with ids and weights given; a slot of no expert adds nothing and gets no gradient."""
    experts = Experts(E, H, I, activation="relu2", device=device)
    assert [name for name, _ in experts.named_parameters()] == ["up_proj", "down_proj"]
    ids = random_expert_ids(T, E, K, skew="zipf", dropped=0.2, seed=3, device=device)
    weights = torch.rand(T, K, generator=torch.Generator().manual_seed(4)).to(device).requires_grad_()
    x, dy = randn(T, H, device=device).requires_grad_(), randn(T, H, seed=1, device=device)
    y = experts(x, ids, weights)
    grads = torch.autograd.grad(y, [x, weights], dy)

    def plain(cast):
        leaves = [x.detach().to(cast).requires_grad_(), weights.detach().to(cast).requires_grad_()]
        p = {f"experts.{name}": v.detach().to(cast) for name, v in experts.named_parameters()}
        out = dense_loop(leaves[0], p, ids, leaves[1])
        return [out, *torch.autograd.grad(out, leaves, dy.to(cast))]

    for name, *values in zip(
        ("y", "dx", "dweights"), [y, *grads], plain(torch.float64), plain(torch.float32), strict=True
    ):
        assert_close(*values, name)
    assert not grads[1][ids == E].any()
    assert torch.equal(experts(x, given_experts(ids, E, weights)), y)


def test_state_and_repr():
    moe = MoE(H, I, E, K, router="sigmoid_topk", bias=True, shared_intermediate_size=8, shared_gate=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in moe.state_dict().items()}
    assert shapes == {
        "router.weight": (E, H),
        "router.e_score_correction_bias": (E,),
        "experts.gate_up_proj": (E, 2 * I, H),
        "experts.gate_up_proj_bias": (E, 2 * I),
        "experts.down_proj": (E, H, I),
        "experts.down_proj_bias": (E, H),
        "shared_expert.gate_up_proj.weight": (16, H),
        "shared_expert.gate_up_proj.bias": (16,),
        "shared_expert.down_proj.weight": (H, 8),
        "shared_expert.down_proj.bias": (H,),
        "shared_expert_gate.weight": (1, H),
    }
    assert "num_experts=7, hidden_size=40, intermediate_size=24, activation='swiglu', bias=True)" in repr(moe)
    stored = dict(Experts(E, H, I, transposed=True).named_parameters())
    assert {name: tuple(p.shape) for name, p in stored.items()} == {
        "gate_up_proj": (E, H, 2 * I),
        "down_proj": (E, I, H),
    }


def test_initial_values_are_those_of_linear_layers():
    """Uniform in ±1/√(inputs), every expert anew, whatever the storage; nothing is left uninitialised."""
    for transposed in (False, True):
        experts = Experts(4, 100, 25, bias=True, transposed=transposed)
        for name, inputs in (("gate_up_proj", 100), ("down_proj", 25)):
            for parameter in (getattr(experts, name), getattr(experts, f"{name}_bias")):
                bound = inputs**-0.5
                assert float(parameter.detach().abs().max()) <= bound
                assert float(parameter.detach().abs().max()) > 0.9 * bound
                assert abs(float(parameter.detach().std()) / (bound / 3**0.5) - 1) < 0.15
        before = experts.down_proj.detach().clone()
        experts.reset_parameters()
        assert not torch.equal(before, experts.down_proj)
    meta = MoE(H, I, E, K, shared_intermediate_size=8, device="meta")
    assert all(p.is_meta for p in meta.parameters())


def test_nothing_is_kept_from_a_call(device):
    moe = MoE(H, I, E, K, device=device)
    before = {module: set(vars(module)) for module in moe.modules()}
    moe(randn(T, H, device=device), return_routing=True)
    assert before == {module: set(vars(module)) for module in moe.modules()}
    assert torch.equal(moe(randn(T, H, device=device)), moe(randn(T, H, device=device)))


def test_copies_and_moves(device):
    moe = MoE(H, I, E, K, router="sigmoid_topk", shared_intermediate_size=8)
    x = randn(T, H, device=device)
    moved = copy.deepcopy(moe).to(device)
    loaded = MoE(H, I, E, K, router="sigmoid_topk", shared_intermediate_size=8, device=device)
    loaded.load_state_dict(moe.state_dict())
    assert torch.equal(moved(x), loaded(x))
    narrow = moved.to(torch.bfloat16)
    assert narrow(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="gate_up must have the dtype of x"):
        narrow(x)


def test_no_tokens(device):
    moe = MoE(H, I, E, K, shared_intermediate_size=8, shared_gate=True, device=device)
    x = torch.zeros(2, 0, H, device=device, requires_grad=True)
    y, routing = moe(x, return_routing=True)
    assert y.shape == (2, 0, H) and routing.counts.tolist() == [0] * E
    (y.sum() + load_balance_loss(routing)).backward()
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_one_token_without_leading_sizes(device):
    moe = MoE(H, I, E, K, device=device)
    x = randn(H, device=device)
    assert torch.equal(moe(x), moe(x.view(1, H))[0])


def test_non_contiguous_input(device):
    moe = MoE(H, I, E, K, shared_intermediate_size=8, device=device)
    x = randn(5, 2 * H, 9, device=device)[:, ::2].transpose(1, 2)
    assert torch.equal(moe(x), moe(x.contiguous()))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(device, use_reentrant):
    moe = MoE(H, I, E, K, router="topk_softmax", shared_intermediate_size=8, shared_gate=True, device=device)
    x, dy = randn(T, H, device=device).requires_grad_(), randn(T, H, seed=1, device=device)
    parameters = dict(moe.named_parameters())
    plain = gradients(moe(x), dy, x, parameters)
    y = checkpoint(moe, x, use_reentrant=use_reentrant)
    y.backward(dy)
    for mine, its in zip(plain, [x.grad, *(p.grad for p in parameters.values())], strict=True):
        assert torch.equal(mine, its)


def test_checkpointing_with_the_routing(device):
    """The routing of a checkpointed call still feeds a balance loss."""
    moe = MoE(H, I, E, K, device=device)
    x = randn(T, H, device=device).requires_grad_()
    results = []
    for call in (moe, lambda t, **options: checkpoint(moe, t, use_reentrant=False, **options)):
        y, routing = call(x, return_routing=True)
        loss = y.square().sum() + load_balance_loss(routing)
        results.append(torch.autograd.grad(loss, [x, *moe.parameters()]))
    for mine, its in zip(*results, strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize(
    ("router", "options"),
    [
        ("softmax_topk", {"shared_intermediate_size": 8, "shared_gate": True}),
        ("topk_softmax", {"router_bias": True, "bias": True, "transposed": True}),
        ("sigmoid_topk", {"n_group": 4, "topk_group": 2}),
    ],
)
def test_traces_without_a_graph_break(device, router, options):
    """Forward and backward give eager's bits, and another number of tokens compiles with sizes as symbols."""
    moe = MoE(H, I, 8, K, router=router, device=device, **options)

    def step(x):
        y, routing = moe(x, return_routing=True)
        return y, load_balance_loss(routing), routing.counts

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for tokens in (T, 31):
        x, dy = randn(tokens, H, device=device).requires_grad_(), randn(tokens, H, seed=1, device=device)
        results = []
        for function in (step, compiled):
            y, loss, counts = function(x)
            grads = torch.autograd.grad([y, loss], [x, *moe.parameters()], [dy, torch.ones_like(loss)])
            results.append([y, loss, counts, *grads])
        for eager, mine in zip(*results, strict=True):
            assert torch.equal(eager, mine)


def test_inductor(device):
    moe = MoE(H, I, E, K, shared_intermediate_size=8, shared_gate=True, device=device)
    x, dy = randn(T, H, device=device).requires_grad_(), randn(T, H, seed=1, device=device)
    parameters = dict(moe.named_parameters())

    def step(x):
        y, routing = moe(x, return_routing=True)
        return y, load_balance_loss(routing), routing.expert_ids

    def results(y, loss, leaves):
        return [y, *torch.autograd.grad([y, loss], leaves, [dy.to(y.dtype), torch.ones_like(loss)])]

    y, loss, ids = torch.compile(step, fullgraph=True)(x)
    mine = results(y, loss, [x, *parameters.values()])

    def plain(cast):
        leaf = x.detach().to(cast).requires_grad_()
        p = {name: v.detach().to(cast).requires_grad_() for name, v in parameters.items()}
        counts = torch.stack([(ids == e).sum() for e in range(E)]).to(cast)
        balance = E * (counts / T * torch.softmax(leaf @ p["router.weight"].T, 1).mean(0)).sum()
        return results(plain_moe(leaf, p, ids, "softmax_topk"), balance, [leaf, *p.values()])

    for name, *values in zip(["y", "x", *parameters], mine, plain(torch.float64), plain(torch.float32), strict=True):
        assert_close(*values, name)


def test_autocast(device):
    """Under autocast the result is bfloat16's, near the plain computation under the same autocast."""
    moe = MoE(H, I, E, K, shared_intermediate_size=33, shared_gate=True, device=device)
    x, dy = randn(T, H, device=device).requires_grad_(), randn(T, H, seed=1, device=device)
    parameters = dict(moe.named_parameters())
    with torch.autocast(device, dtype=torch.bfloat16):
        y, routing = moe(x, return_routing=True)
    grads = gradients(y, dy, x, parameters)
    assert y.dtype == torch.bfloat16 and routing.logits.dtype == torch.float32

    def plain(cast):
        leaf = x.detach().to(cast).requires_grad_()
        p = {name: v.detach().to(cast).requires_grad_() for name, v in parameters.items()}
        out = plain_moe(leaf, p, routing.expert_ids, "softmax_topk", torch.bfloat16 if cast == torch.float32 else None)
        return out, gradients(out, dy, leaf, p)

    truth, truth_grads = plain(torch.float64)
    baseline, baseline_grads = plain(torch.float32)
    assert_close(y, truth, baseline, "y")
    for name, mine, exact, base in zip(["x", *parameters], grads, truth_grads, baseline_grads, strict=True):
        # The gradients of float32 parameters come out of bfloat16 products.
        assert_close(mine.bfloat16(), exact, base.bfloat16(), f"d{name}")


def test_frozen_experts(device):
    """With frozen experts the router still learns, and with a frozen layer the input still gets its gradient."""
    moe = MoE(H, I, E, K, device=device)
    x, dy = randn(T, H, device=device).requires_grad_(), randn(T, H, seed=1, device=device)
    full = gradients(moe(x), dy, x, dict(moe.named_parameters()))
    moe.experts.requires_grad_(False)
    moe(x).backward(dy)
    assert torch.equal(moe.router.weight.grad, full[1]) and moe.experts.down_proj.grad is None
    moe.requires_grad_(False)
    x.grad = None
    moe(x).backward(dy)
    assert torch.equal(x.grad, full[0])


def test_given_routing_and_router_modules(device):
    x = randn(T, H, device=device)
    tokens = torch.arange(T, device=device)
    hashed = HashRouter(torch.arange(T) % E, E).to(device)(tokens)
    moe = MoE(H, I, E, 1, router=None, device=device)
    y, routing = moe(x, routing=hashed, return_routing=True)
    assert torch.equal(y, moe.experts(x, hashed)) and torch.equal(routing.expert_ids[:, 0], tokens % E)
    with pytest.raises(ValueError, match="routing must be given to a layer without a router"):
        moe(x)
    own = SoftmaxRouter(H, E, 1, device=device)
    other = MoE(H, I, E, 1, router=own, device=device)
    assert other.router is own and "router.weight" in other.state_dict()
    assert torch.equal(other(x), other.experts(x, own(x)))
    assert torch.equal(other(x, routing=hashed), other.experts(x, hashed))


def test_a_bad_token_does_not_touch_the_others(device, monkeypatch):
    """A hidden state of NaN is an error on the CPU; where values are not read, only its own output is lost."""
    moe = MoE(H, I, E, K, router="topk_softmax", device=device)
    x = randn(T, H, device=device)
    bad = x.clone()
    bad[4] = float("nan")
    if device == "cpu":
        with pytest.raises(ValueError, match=r"logits must hold neither NaN nor .* token 4, expert 0"):
            moe(bad)
    monkeypatch.setattr("gossamer.ops.topk_routing._raise_not_a_logit", lambda logits: None)
    others = torch.arange(T, device=device) != 4
    assert torch.equal(moe(bad)[others], moe(x)[others])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("router", ["softmax_topk", "topk_softmax", "sigmoid_topk"])
def test_cuda_graph_capture(router):
    moe = MoE(64, 32, E, K, router=router, shared_intermediate_size=32, device="cuda")
    x = randn(T, 64, device="cuda")

    def step():
        y, routing = moe(x, return_routing=True)
        return y, routing.counts, load_balance_loss(routing)

    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        x.copy_(randn(T, 64, seed=1, device="cuda"))
        graph.replay()
        for mine, eager in zip(captured, step(), strict=True):
            assert torch.equal(mine, eager)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MoE(H, I, 4, 5), ValueError, "top_k must be at most num_experts, got top_k=5, num_experts=4"),
        (lambda: MoE(H, 0, E, K), ValueError, "intermediate_size must be at least 1, got 0"),
        (lambda: MoE(-1, I, E, K), ValueError, "hidden_size must be at least 1, got -1"),
        (lambda: MoE(H, I, E, K, router="noisy"), ValueError, r"router must be one of .*'sigmoid_topk'.* got 'noisy'"),
        (lambda: MoE(H, I, E, K, router=3), TypeError, "router must be a str, an nn.Module or None, got int"),
        (lambda: MoE(H, I, 8, K, router="sigmoid_topk", n_group=3), ValueError, "n_group must divide num_experts"),
        (lambda: MoE(H, I, E, K, router="topk_softmax", n_group=3), TypeError, "argument 'n_group'"),
        (lambda: MoE(H, I, E, K, router=None, scale=2.0), ValueError, r"router options need .* got \['scale'\]"),
        (lambda: MoE(H, I, E, K, shared_gate=True), ValueError, "shared_gate needs a shared expert"),
        (lambda: MoE(H, I, E, K, shared_intermediate_size=0), ValueError, "intermediate_size must be at least 1"),
        (lambda: MoE(H, I, E, K, activation="tanh"), ValueError, "activation must be one of"),
        (lambda: Experts(E, H, I, activation="relu2", interleaved=True), ValueError, "interleaved needs a gated"),
        (lambda: Experts(E, H, True), TypeError, "intermediate_size must be an int, got bool"),
        (lambda: SharedExpert(H, 0), ValueError, "intermediate_size must be at least 1, got 0"),
        (lambda: MoE(H, I, E, K)(torch.zeros(2, 3)), ValueError, r"x must have shape .* H = 40, got \(2, 3\)"),
        (
            lambda: Experts(E, H, I)(torch.zeros(2, H), torch.zeros(2, 1, dtype=torch.int64)),
            TypeError,
            "ids with weights",
        ),
        (
            lambda: Experts(E, H, I)(torch.zeros(2, H), given_experts(torch.zeros(2, 1, dtype=torch.int64), E), 1),
            TypeError,
            "weights must be None beside a Routing",
        ),
        (
            lambda: Experts(E, H, I)(torch.zeros(2, H), given_experts(torch.zeros(3, 1, dtype=torch.int64), E)),
            ValueError,
            "routing must be of the 2 tokens of x, got 3",
        ),
        (
            lambda: Experts(E, H, I)(torch.zeros(2, H), given_experts(torch.zeros(2, 1, dtype=torch.int64), 9)),
            ValueError,
            "routing must be over 7 experts, got 9",
        ),
        (
            lambda: MoE(H, I, E, K)(torch.zeros(2, H), routing=given_experts(torch.zeros(2, 4, dtype=torch.int64), E)),
            ValueError,
            "routing must have at most K = 3 experts per token, got 4",
        ),
        (
            lambda: MoE(H, I, E, K, router=torch.nn.Linear(H, E))(torch.zeros(2, H)),
            TypeError,
            "routing must be a gossamer.nn.Routing, got Tensor",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
