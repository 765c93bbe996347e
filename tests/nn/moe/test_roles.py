"""nn.MoE over routers and expert layers of a user's own: numbers of experts that vary, token ids, other experts."""

import pytest
import torch
from contracts import ExpertsContract, RouterContract, assert_near
from torch import nn

import gossamer
from gossamer.nn import (
    ExpertLayer,
    Experts,
    HashRouter,
    MoE,
    Router,
    RouterAround,
    Routing,
    SoftmaxRouter,
    load_balance_loss,
    router_losses,
    softmax_probabilities,
    step_routers,
)

T, H, I, E = 23, 16, 8, 6


class TopPRouter(Router):
    """The fewest experts whose probabilities add up to p, as a user would write it."""

    def __init__(self, hidden_size, num_experts, top_p):
        super().__init__()
        self.num_experts = self.top_k = num_experts
        self.top_p = top_p
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)

    def forward(self, x, *, token_ids=None):
        logits = self.gate(x).flatten(0, -2)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        ordered, ids = logits.softmax(-1).sort(descending=True)
        absent = ordered.cumsum(-1) - ordered >= self.top_p
        return Routing(
            ids.masked_fill(absent, self.num_experts),
            ordered.masked_fill(absent, 0),
            self.num_experts,
            logits,
            probabilities=softmax_probabilities,
        )


class Scaled(ExpertLayer):
    """Experts that scale their input by one number each."""

    def __init__(self, num_experts, hidden_size):
        super().__init__()
        self.num_experts, self.hidden_size = num_experts, hidden_size
        self.scale = nn.Parameter(torch.linspace(1, 2, num_experts))

    def compute(self, tokens, routing):
        scale = torch.cat([self.scale, self.scale.new_zeros(1)])[routing.expert_ids.clamp(max=self.num_experts)]
        return tokens * (routing.weights * scale).sum(1, keepdim=True).to(tokens.dtype)


def by_loop(moe, x, routing):
    """The layer's output by a loop over tokens and their experts."""
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros_like(x[t])
        for expert, weight in zip(routing.expert_ids[t].tolist(), routing.weights[t], strict=True):
            if expert < routing.num_experts:
                gate, up = (moe.experts.gate_up_proj[expert] @ x[t]).chunk(2)
                y = y + weight * (moe.experts.down_proj[expert] @ (nn.functional.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows)


def test_a_variable_number_of_experts(device):
    """A router of one's own in the layer: output and gradients are those of a loop over each token's experts."""
    moe = MoE(H, I, E, router=TopPRouter(H, E, 0.6)).to(device)
    x = torch.randn(T, H, device=device)
    y, routing = moe(x, return_routing=True)
    live = routing.expert_ids < E
    assert live.sum(1).unique().numel() > 1 and bool(live[:, 0].all())
    assert int(routing.counts.sum()) == int(live.sum())
    if device == "cpu":
        assert routing.dispatch.buffer_rows == int(live.sum()) < T * E

    (y.square().sum() + load_balance_loss(routing)).backward()
    found = {name: p.grad.clone() for name, p in moe.named_parameters()}
    moe.zero_grad()
    expected = by_loop(moe, x, routing := moe.router(x))
    f = routing.counts / T
    balance = E * (f * routing.logits.softmax(-1).mean(0)).sum()
    (expected.square().sum() + balance).backward()
    assert_near(y, expected)
    for name, parameter in moe.named_parameters():
        assert_near(found[name], parameter.grad)


def test_compiles_with_a_variable_number_of_experts(device):
    moe = MoE(H, I, E, router=TopPRouter(H, E, 0.6)).to(device)
    x = torch.randn(T, H, device=device)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    y, routing = compiled(x, return_routing=True)
    assert torch.equal(y, moe(x)) and routing.probabilities.shape == (T, E)
    y.sum().backward()
    found = moe.router.gate.weight.grad.clone()
    moe.zero_grad()
    moe(x).sum().backward()
    assert torch.equal(found, moe.router.gate.weight.grad)


def test_token_ids_reach_the_router(device):
    """A hash router inside the layer, by the ids of its tokens in their batch's shape."""
    table = torch.randint(0, E, (50, 2))
    moe = MoE(H, I, router=HashRouter(table, E)).to(device)
    assert (moe.num_experts, moe.top_k) == (E, 2)
    token_ids = torch.randint(0, 50, (3, 5), device=device)
    x = torch.randn(3, 5, H, device=device)
    y, routing = moe(x, token_ids=token_ids, return_routing=True)
    assert torch.equal(routing.expert_ids, table.to(device)[token_ids.reshape(-1)])
    assert torch.equal(y, moe(x, routing=moe.router(token_ids=token_ids)))
    # A router that goes by hidden states leaves them alone.
    moe = MoE(H, I, E, 2).to(device)
    assert torch.equal(moe(x, token_ids=token_ids), moe(x))


def test_experts_of_ones_own(device):
    moe = MoE(H, None, E, 2, experts=Scaled(E, H), shared_intermediate_size=I).to(device)
    x = torch.randn(T, H, device=device)
    y, routing = moe(x, return_routing=True)
    scales = (routing.weights * moe.experts.scale[routing.expert_ids]).sum(1, keepdim=True)
    assert_near(y, x * scales + moe.shared_expert(x))
    bare = MoE(H, None, router=TopPRouter(H, E, 0.5), experts=Scaled(E, H)).to(device)
    assert bare.num_experts == E and bare(x).shape == x.shape


def test_experts_by_name(device):
    x = torch.randn(T, 32, device=device)
    torch.manual_seed(1)
    named = MoE(32, 16, E, 2, experts="block_sparse").to(device)
    torch.manual_seed(1)
    plain = MoE(32, 16, E, 2, form="block_sparse").to(device)
    assert isinstance(named.experts, Experts) and named.experts.form == "block_sparse"
    assert torch.equal(named(x), plain(x))


class Half(RouterAround):
    """Half of what another router gives, half of the token itself, and a term for each of its sequences' positions."""

    def __init__(self, router):
        super().__init__(router)
        self.steps = 0

    def step(self):
        self.steps += 1

    def forward(self, x, *, token_ids=None):
        routing = self.router(x, token_ids=token_ids)
        position = torch.arange(x.shape[-2], device=x.device).expand(x.shape[:-1]).reshape(-1)
        weights = routing.weights / 2
        losses = {"position": position.float(), "weights": weights.sum()}
        residual = torch.full_like(weights[:, 0], 0.5)
        return routing.with_experts(routing.expert_ids, weights, residual=residual, losses=losses)


def test_a_router_around_another(device):
    """Tokens that pass by themselves, terms of the router's own, sequences, and the steps of training."""
    moe = MoE(H, I, router=Half(SoftmaxRouter(H, E, 2)), shared_intermediate_size=I).to(device)
    assert (moe.num_experts, moe.top_k) == (E, 2)
    x = torch.randn(2, 5, H, device=device, requires_grad=True)
    y, routing = moe(x, return_routing=True)
    whole = moe.router.router(x)
    flat = x.view(10, H)
    experts = moe.experts(flat, whole.expert_ids, whole.weights)
    assert_near(y.view(10, H), experts / 2 + flat / 2 + moe.shared_expert(flat))
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    again, compiled_routing = compiled(x, return_routing=True)
    assert torch.equal(again, y) and set(compiled_routing.losses) == {"position", "weights"}

    losses = router_losses(routing)
    assert float(losses["position"]) == 2 and torch.equal(losses["weights"], routing.weights.sum())
    (gradient,) = torch.autograd.grad(losses["weights"], moe.router.router.weight)
    assert gradient.any()
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 1]], device=device)
    both = router_losses([routing, moe.router.router(x), routing], mask=mask)
    assert float(both["position"]) == 2 * (0 + 1 + 0 + 4) / 4
    assert_near(both["weights"], 2 * routing.weights.sum())
    assert float(router_losses(routing, mask=torch.zeros(10, device=device))["position"]) == 0
    assert router_losses([]) == router_losses(whole) == {}

    step_routers(moe)
    step_routers(moe)
    assert moe.router.steps == 2
    with pytest.raises(TypeError, match=r"router must be a gossamer\.nn\.Router, got Linear"):
        Half(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="routing must be a Routing or a sequence of them, got int"):
        router_losses([3])


def test_score_is_a_deprecated_way_to_probabilities():
    logits = torch.randn(5, E)
    ids, weights = torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1)
    with pytest.warns(DeprecationWarning, match="score is deprecated"):
        routing = Routing(ids, weights, E, logits, "sigmoid")
    scores = logits.sigmoid()
    assert_near(routing.probabilities, scores / scores.sum(1, keepdim=True))
    with pytest.warns(DeprecationWarning, match="read probabilities"):
        assert routing.dispatched().score == "sigmoid"
    given = Routing(ids, weights, E, probabilities=scores)
    assert given.dispatched().probabilities is scores and given.logits is None
    with pytest.raises(ValueError, match="router_z_loss needs the router's logits, which this routing does not have"):
        gossamer.nn.router_z_loss(given)


def test_losses_say_what_a_routing_lacks():
    """A tree has probabilities but no logits; given ids have neither."""
    tree = gossamer.nn.TreeRouter(8, 4, 2, 1.0)(torch.randn(5, 8))
    assert gossamer.nn.load_balance_loss(tree).isfinite()
    with pytest.raises(
        ValueError, match=r"^router_z_loss needs the router's logits, .* only routers that choose by logits"
    ):
        gossamer.nn.router_z_loss(tree)
    given = Routing(torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1), 4)
    for loss in (gossamer.nn.load_balance_loss, gossamer.nn.importance_loss, gossamer.nn.routing_entropy_loss):
        with pytest.raises(ValueError, match=f"^{loss.__name__} needs the router's probabilities, which this routing"):
            loss(given)


def test_a_linear_router_by_its_former_name():
    """What derived from Router and defined ``route(logits)`` keeps working as a linear router, and says so."""
    with pytest.warns(DeprecationWarning, match="LinearRouter"):

        class Best(Router):
            def route(self, logits):
                return gossamer.nn.softmax_topk(logits, 1)

    router = Best(H, E, 1)
    assert isinstance(router, gossamer.nn.LinearRouter) and router.weight.shape == (E, H)
    with pytest.raises(NotImplementedError, match="Router must define forward"):
        Router()(torch.zeros(1, H))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MoE(H, I, E + 1, router=TopPRouter(H, E, 0.5)), ValueError, "router must have num_experts = 7, got 6"),
        (lambda: MoE(H, None, E, 2, experts=Scaled(5, H)), ValueError, "experts must have num_experts = 6, got 5"),
        (lambda: MoE(H, None, E, 2, experts=Scaled(E, 9)), ValueError, "experts must have hidden_size = 16, got 9"),
        (lambda: MoE(H, I, E, 2, experts=Scaled(E, H)), ValueError, "intermediate_size must be None beside an experts"),
        (
            lambda: MoE(H, None, E, 2, experts=Scaled(E, H), transposed=True, capacity_factor=2.0),
            ValueError,
            "transposed, capacity_factor must not be given beside an experts module",
        ),
        (lambda: MoE(H, I, E, 2, experts=3), TypeError, "experts must be an nn.Module, a str or None, got int"),
        (lambda: MoE(H, I, E, 2, experts="dense"), ValueError, r"form must be one of .* got 'dense'"),
        (lambda: MoE(H, I), TypeError, "num_experts must be an int, got NoneType"),
        (lambda: MoE(H, I, E), TypeError, "top_k must be an int, got NoneType"),
        (lambda: MoE(H, I, E, 7, router=TopPRouter(H, E, 0.5)), ValueError, "top_k must be at most num_experts"),
        (
            lambda: MoE(H, I, E, 2, router=TopPRouter(H, E, 0.5))(torch.zeros(1, H)),
            ValueError,
            "routing must have at most K = 2 experts per token, got 6",
        ),
        (
            lambda: MoE(H, I, router=HashRouter(torch.zeros(4, dtype=torch.int64), E))(torch.zeros(1, H)),
            TypeError,
            "token_ids must be given to a router that goes by them",
        ),
        (
            lambda: MoE(H, I, E, 2)(torch.zeros(3, H), token_ids=torch.zeros(2, dtype=torch.int64)),
            ValueError,
            r"token_ids must have one id for each of T = 3 tokens, got shape \(2,\)",
        ),
        (lambda: Routing(None, None, 2, score="tanh"), ValueError, "score must be one of"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


TestVariableNumber = RouterContract.over(
    top_p=lambda num_experts, hidden_size, **factory: TopPRouter(hidden_size, num_experts, 0.6).to(**factory)
)
TestScaled = ExpertsContract.over(
    scaled=lambda num_experts, hidden_size, **factory: Scaled(num_experts, hidden_size).to(**factory)
)
