"""Code written against MegaBlocks: its layers against a loop in float64, its losses and its options."""

import copy
import functools
import gc
import types

import pytest
import torch
import torch.nn.functional as F
from eager_draws import compare
from helpers import OperatorLog, randn
from torch import nn

from gossamer.integrations import megablocks
from gossamer.integrations.megablocks import (
    Arguments,
    MoE,
    batched_load_balancing_loss,
    batched_router_zloss,
    clear_load_balancing_loss,
    clear_router_zloss,
    dMoE,
    get_load_balancing_loss,
    ops,
    save_load_balancing_loss,
)

# f is one block of 32 and half of another; 30 tokens of 5 experts are less than a block of rows each.
H, FFN, E, K = 24, 48, 5, 2
T = 30


@pytest.fixture(autouse=True)
def _clean():
    yield
    clear_load_balancing_loss()
    clear_router_zloss()


def arguments(device, **options):
    defaults = {
        "hidden_size": H,
        "ffn_hidden_size": FFN,
        "moe_num_experts": E,
        "moe_top_k": K,
        "fp16": False,
        "device": device,
        "init_method": functools.partial(nn.init.normal_, std=H**-0.5),
        "output_layer_init_method": functools.partial(nn.init.normal_, std=FFN**-0.5),
    }
    return Arguments(**(defaults | options))


def expert_loop(x, p, ids, weights, act, *, gated=False, capacity=None):
    """Slots served in turn, then every expert on every token; w1, v1, w2 are ``(E, f, d)``."""
    served, kept = [0] * E, []
    for e in ids.flatten().tolist():
        served[e] += 1
        kept.append(not capacity or served[e] <= capacity)
    kept = torch.tensor(kept, device=ids.device).view(ids.shape)
    y = torch.zeros_like(x)
    for e in range(E):
        hidden = act(x @ p["w1"][e].T)
        if gated:
            hidden = hidden * (x @ p["v1"][e].T)
        y = y + ((kept & (ids == e)) * weights).sum(1, keepdim=True) * (hidden @ p["w2"][e])
    return y


GELU = functools.partial(F.gelu, approximate="tanh")


def layer_loop(x, p, args, ids, act=GELU, capacity=None):
    """The whole layer on ``(T, d)`` for the experts chosen, with router, p-norm and bias."""
    scores = torch.softmax(x @ p["router.layer.weight"].T, 1)
    weights = scores.topk(K, dim=1).values if args.uniform_expert_assignment else scores.gather(1, ids)
    if power := args.moe_normalize_expert_weights:
        weights = weights / (weights.abs() ** power).sum(1, keepdim=True) ** (1 / power)
    experts = {name.split(".")[-1]: w for name, w in p.items() if name.startswith("experts.mlp")}
    if experts["w1"].dim() == 3:
        experts["w1"] = experts["w1"].transpose(1, 2)
    experts = {name: w.reshape(E, FFN, H) for name, w in experts.items()}
    y = expert_loop(x, experts, ids, weights, act, gated="v1" in experts, capacity=capacity)
    return y if "experts.bias" not in p else y + p["experts.bias"]


def checked(layer, args, device, act=GELU, capacity=None):
    """Hold a layer with all its gradients against the loop."""
    parameters = dict(layer.named_parameters())

    def inputs(draw):
        x = randn(T, H, seed=2 * draw, device=device).requires_grad_()
        return x, randn(T, H, seed=2 * draw + 1, device=device)

    def named(y, x, leaves, dy):
        return dict(zip(["y", "x", *leaves], [y, *torch.autograd.grad(y, [x, *leaves.values()], dy)], strict=True))

    def ours(draw):
        x, dy = inputs(draw)
        out = layer(x.view(5, 6, H))
        y = (out[0] + out[1] if isinstance(out, tuple) else out).view(T, H)
        return named(y, x, parameters, dy)

    def plain(draw, cast):
        x, dy = (t.detach().to(cast) for t in inputs(draw))
        leaves = {name: p.detach().to(cast).requires_grad_() for name, p in parameters.items()}
        y = layer_loop(x.requires_grad_(), leaves, args, layer.router(inputs(draw)[0])[2], act, capacity)
        return named(y, x, leaves, dy)

    compare(ours, lambda draw: plain(draw, torch.float32), lambda draw: plain(draw, torch.float64))


DROPLESS = [
    pytest.param({"mlp_impl": impl, "mlp_type": kind}, id=f"{impl} {kind}")
    for impl in ("grouped", "sparse")
    for kind in ("mlp", "glu")
]


@pytest.mark.parametrize("options", DROPLESS)
def test_dmoe(device, options):
    args = arguments(device, **options, moe_normalize_expert_weights=2)
    checked(dMoE(args), args, device)


@pytest.mark.parametrize("impl", ["grouped", "sparse"])
def test_dmoe_with_an_activation_of_ones_own(device, impl):
    def act(x):
        return torch.tanh(x) + 0.5

    args = arguments(device, mlp_impl=impl, activation_fn=act, bias=False)
    layer = dMoE(args)
    assert layer.experts.bias is None
    checked(layer, args, device, act)


def test_recognised_activations_are_fused(device):
    args = arguments(device, mlp_impl="grouped", activation_fn=F.silu, return_bias=False)
    layer = dMoE(args)
    checked(layer, args, device, F.silu)
    with OperatorLog() as log:
        layer(randn(T, H, device=device))
    assert log.named("expert_mlp") and not log.named("grouped_matmul")


@pytest.mark.parametrize(("factor", "capacity"), [(1, 12), (0.5, 6), (0, None), (0.05, None)])
def test_capacity(device, factor, capacity):
    """int(factor·2·30/5) slots an expert; 0, whether asked for or rounded to, is no limit."""
    args = arguments(device, moe_capacity_factor=factor)
    layer = MoE(args)
    assert layer.experts.expert_capacity(T) == (capacity or 0)
    checked(layer, args, device, capacity=capacity)


@pytest.mark.parametrize("impl", ["grouped", "sparse"])
def test_both_layers_agree(device, impl):
    """Weights of one in the layout of the other; without a limit they are the same layer."""
    args = arguments(device, moe_capacity_factor=0, mlp_impl=impl)
    dropless, limited = dMoE(args), MoE(args)
    state = dropless.state_dict()
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    assert shapes == {
        "router.layer.weight": (E, H),
        "experts.bias": (H,),
        "experts.mlp.w1": (E * FFN, H),
        "experts.mlp.w2": (E * FFN, H),
    }
    state["experts.mlp.w1"] = state["experts.mlp.w1"].view(E, FFN, H).transpose(1, 2)
    state["experts.mlp.w2"] = state["experts.mlp.w2"].view(E, FFN, H)
    limited.load_state_dict(state)
    x = randn(5, 6, H, device=device)
    torch.testing.assert_close(dropless(x)[0], limited(x)[0], rtol=1e-5, atol=1e-6)


def test_two_implementations_share_checkpoints(device):
    grouped, sparse = (dMoE(arguments(device, mlp_impl=impl, mlp_type="glu")) for impl in ("grouped", "sparse"))
    sparse.load_state_dict(grouped.state_dict())
    x = randn(T, H, device=device)
    torch.testing.assert_close(grouped(x)[0], sparse(x)[0], rtol=1e-5, atol=1e-6)
    assert "v1" in dict(grouped.experts.mlp.named_parameters())


def test_dtypes_of_options():
    assert {p.dtype for p in dMoE(arguments("cpu", fp16=True)).parameters()} == {torch.float16}
    assert {p.dtype for p in MoE(arguments("cpu", bf16=True)).parameters()} == {torch.bfloat16}
    y, bias = dMoE(arguments("cpu", bf16=True, mlp_impl="sparse"))(randn(T, H, dtype=torch.bfloat16))
    assert y.dtype == bias.dtype == torch.bfloat16


def test_uniform_assignment_and_jitter(device):
    args = arguments(device, uniform_expert_assignment=True, mlp_impl="grouped")
    layer = dMoE(args)
    turns = (torch.arange(T * K, device=device) % E).view(T, K)
    assert torch.equal(layer.router(randn(T, H, device=device))[2], turns)
    checked(layer, args, device)
    args = arguments(device, moe_jitter_eps=0.5, moe_loss_weight=0)
    layer, x = dMoE(args), randn(T, H, device=device)
    factors = layer.router.jitter(torch.empty(1000, device=device))
    assert 0.5 <= float(factors.min()) < 0.52 and 1.48 < float(factors.max()) <= 1.5
    first, second = layer.router(x)[0], layer.router(x)[0]
    assert not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer.router(x)[0], layer.router(x)[0])


@pytest.mark.parametrize("weighted", [False, True])
def test_shared_expert(device, weighted):
    args = arguments(device, mlp_type="glu", shared_expert=True, shared_expert_hidden_size=8)
    args.shared_expert_weighted_sum = weighted
    layer = dMoE(args)
    x = randn(T, H, device=device)
    y, bias = layer(x)
    routed = layer.experts(x, *layer.router(x))[0]
    shared = layer.shared_expert
    gate = F.gelu(shared.gate_proj(x), approximate="tanh")
    dense = shared.down_proj(gate * shared.up_proj(x))
    expected = dense / 3 + routed * 2 / 3 if weighted else dense + routed
    torch.testing.assert_close(y, expected)
    assert bias is layer.experts.bias and shared.up_proj.weight.shape == (8, H)


class TestLosses:
    def test_balance_loss(self, device):
        """Two layers against the formula, by a loop over experts; its gradient reaches the routers alone."""
        args = arguments(device, num_layers=2, mlp_impl="grouped", return_bias=False)
        model = nn.Sequential(dMoE(args), dMoE(args))
        x = randn(T, H, device=device)
        first = model[0](x)
        model[1](first)
        loss = batched_load_balancing_loss(args)
        expected = 0.0
        for layer, given in ((model[0], x), (model[1], first)):
            scores, _, ids = layer.router(given)
            for e in range(E):
                expected = expected + int((ids == e).sum()) * scores[:, e].mean()
        torch.testing.assert_close(loss, 0.1 * E / (2 * T * K) * expected)
        loss.backward()
        assert model[0].router.layer.weight.grad.any() and model[1].experts.mlp.w1.grad is None

    def test_balance_has_the_value_of_its_weight(self, device):
        args = arguments(device, uniform_expert_assignment=True, moe_lbl_in_fp32=True, bf16=True)
        layer = MoE(args)
        nn.init.zeros_(layer.router.layer.weight)
        layer(randn(T, H, device=device, dtype=torch.bfloat16))
        loss = batched_load_balancing_loss(args)
        assert loss.dtype == torch.float32 and abs(float(loss.detach()) - 0.1) < 1e-4
        assert batched_load_balancing_loss(arguments(device, moe_loss_weight=0)) == 0.0

    def test_notes_are_of_the_last_step(self, device):
        """A second call replaces the first; clearing, evaluation, no weight and the layer's end leave nothing."""
        args = arguments(device)
        layer = MoE(args)
        layer(randn(T, H, device=device))
        layer(randn(7, H, seed=1, device=device))
        ((counts, scores),) = get_load_balancing_loss()
        assert scores.shape == (7, E) and int(counts.sum()) == 7 * K
        save_load_balancing_loss((counts, scores))
        assert len(get_load_balancing_loss()) == 2 and len(get_load_balancing_loss(layer)) == 1
        clear_load_balancing_loss()
        assert get_load_balancing_loss() == []
        with pytest.raises(
            ValueError, match=r"needs the records of 1 layers .* got 0: layers record theirs in training"
        ):
            batched_load_balancing_loss(args)
        layer.eval()(randn(T, H, device=device))
        assert get_load_balancing_loss() == []
        layer.train()(randn(T, H, device=device))
        assert len(get_load_balancing_loss()) == 1
        del layer, counts, scores
        gc.collect()
        assert get_load_balancing_loss() == []

    def test_notes_of_one_model_among_several(self, device):
        args = arguments(device)
        layer = dMoE(args)
        other = copy.deepcopy(layer)
        layer(randn(T, H, device=device))
        other(randn(9, H, device=device))
        assert [len(scores) for _, scores in get_load_balancing_loss()] == [T, 9]
        assert [len(scores) for _, scores in get_load_balancing_loss(other)] == [9]
        batched_load_balancing_loss(args, layer).backward()
        clear_load_balancing_loss(layer)
        assert get_load_balancing_loss(layer) == [] and len(get_load_balancing_loss(copy.deepcopy(other))) == 0
        assert len(get_load_balancing_loss()) == 1

    def test_counts_are_those_before_dropping(self, device):
        args = arguments(device, moe_capacity_factor=0.5)
        MoE(args)(randn(T, H, device=device))
        layer = MoE(args)
        layer(randn(T, H, device=device))
        assert int(get_load_balancing_loss(layer)[0][0].sum()) == T * K

    def test_router_z_loss(self, device):
        args = arguments(device, moe_zloss_weight=1e-3, moe_zloss_in_fp32=True)
        layer, x = dMoE(args), randn(T, H, device=device)
        layer(x)
        logits = x @ layer.router.layer.weight.T
        loss = batched_router_zloss(args)
        torch.testing.assert_close(loss, 1e-3 * torch.logsumexp(logits, 1).square().mean().view(1))
        clear_router_zloss()
        with pytest.raises(ValueError, match="needs routers that were called"):
            batched_router_zloss(args)
        with pytest.raises(ValueError, match="moe_zloss_weight must not be 0"):
            batched_router_zloss(arguments(device))


def test_traces_without_a_graph_break(device):
    """A compiled layer notes what its loss needs, and gives eager's bits."""
    args = arguments(device, mlp_impl="sparse", mlp_type="glu", return_bias=False)
    layer = dMoE(args)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (T, 11):
        x = randn(tokens, H, device=device).requires_grad_()
        results = []
        for function in (layer, compiled):
            y = function(x)
            loss = y.square().sum() + batched_load_balancing_loss(args)
            results.append([y, *torch.autograd.grad(loss, [x, *layer.parameters()])])
        for name, one, other in zip(["y", "x", *dict(layer.named_parameters())], *results, strict=True):
            assert torch.equal(one, other), name


@pytest.mark.parametrize("impl", ["grouped", "sparse"])
def test_no_tokens(device, impl):
    args = arguments(device, mlp_impl=impl)
    layer = dMoE(args)
    x = torch.zeros(0, H, device=device, requires_grad=True)
    y, _ = layer(x)
    (y.sum() + batched_load_balancing_loss(args)).backward()
    assert y.shape == (0, H) and not layer.experts.mlp.w1.grad.any()


def test_autocast(device):
    layer = dMoE(arguments(device, mlp_impl="sparse"))
    with torch.autocast(device, dtype=torch.bfloat16):
        y, _ = layer(randn(T, H, device=device))
        wide = layer.experts(
            randn(T, H, device=device).bfloat16(), *layer.router(randn(T, H, device=device).bfloat16())
        )
    assert y.dtype == torch.bfloat16 and torch.equal(y, wide[0])


def test_imports_and_megatron():
    """MegaBlocks' module paths, and its options out of Megatron's."""
    from gossamer.integrations.megablocks.layers import arguments as module
    from gossamer.integrations.megablocks.layers import dmoe, moe, router

    assert dmoe.dMoE is dMoE and moe.MoE is MoE and module.Arguments is Arguments and megablocks.ops is ops
    assert moe.batched_load_balancing_loss is batched_load_balancing_loss and router.LearnedRouter
    args = megablocks.from_megatron(types.SimpleNamespace(hidden_size=64, bf16=True, fp16=False, tensor_size=3))
    assert args.hidden_size == 64 and args.bf16 and args.dtype == torch.bfloat16
    defaults = Arguments()
    assert (defaults.ffn_hidden_size, defaults.moe_loss_weight, defaults.mlp_impl) == (4096, 0.1, "sparse")
    assert defaults.shared_expert_hidden_size == 4096 and defaults.dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"moe_expert_model_parallelism": True}, ValueError, "moe_expert_model_parallelism must be False"),
        ({"remat_act_fn": "yes"}, TypeError, "remat_act_fn must be a bool, got str"),
        ({"expert_parallel_group": object()}, ValueError, "expert_parallel_group must be None"),
        ({"mlp_type": "moe"}, ValueError, "mlp_type must be one of .* got 'moe'"),
        ({"mlp_impl": "dense"}, ValueError, "mlp_impl must be one of .* got 'dense'"),
        ({"activation_fn": None}, TypeError, "activation_fn must be callable"),
        ({"moe_top_k": 6}, ValueError, "moe_top_k must be at most moe_num_experts"),
        ({"moe_capacity_factor": -1}, ValueError, "moe_capacity_factor must be positive"),
        ({"quantize_inputs_num_bits": 8}, TypeError, "quantize_inputs_num_bits"),
        ({"ffn_hidden_size": 40}, ValueError, "ffn_hidden_size must be a multiple of 16 for block-sparse products"),
        ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
    ],
)
def test_options_that_are_not_served(options, error, message):
    with pytest.raises(error, match=message):
        dMoE(arguments("cpu", **options))


def test_options_changed_after_their_check():
    args = arguments("cpu")
    args.moe_expert_model_parallelism = True
    with pytest.raises(ValueError, match="moe_expert_model_parallelism must be False"):
        MoE(args)
    with pytest.raises(ValueError, match="mlp_type must be 'mlp' for MoE"):
        MoE(arguments("cpu", mlp_type="glu"))


def test_names_that_users_import():
    from gossamer.integrations.megablocks import layers
    from gossamer.integrations.megablocks.layers import MoE as same_moe
    from gossamer.integrations.megablocks.layers import dmlp_registry, sharedexpert_registry
    from gossamer.integrations.megablocks.layers import dMoE as same_dmoe

    assert same_moe is MoE and same_dmoe is dMoE and layers.dmoe.ParallelDroplessMLP is megablocks.ParallelDroplessMLP
    classes = {
        (kind, impl): type(dmlp_registry.get(arguments("cpu", mlp_type=kind, mlp_impl=impl)))
        for kind in ("mlp", "glu")
        for impl in ("grouped", "sparse")
    }
    assert classes == {
        ("mlp", "grouped"): megablocks.GroupedMLP,
        ("mlp", "sparse"): megablocks.SparseMLP,
        ("glu", "grouped"): megablocks.GroupedGLU,
        ("glu", "sparse"): megablocks.SparseGLU,
    }
    shared = sharedexpert_registry.get(arguments("cpu", mlp_type="glu", shared_expert=True))
    assert type(shared) is layers.glu.SharedGLU
    args = arguments("cpu")
    args.mlp_impl = "dense"
    with pytest.raises(ValueError, match="mlp_impl must be one of"):
        dmlp_registry.get(args)


@pytest.mark.parametrize("activation", [F.gelu, torch.tanh])
@pytest.mark.parametrize("name", ["GroupedMLP", "GroupedGLU"])
def test_grouped_experts_take_sorted_rows(name, activation, device):
    """By ``tokens_per_expert``, as MegaBlocks calls them: each expert on its own run of rows."""
    counts = torch.tensor([4, 0, 9, 1, 3], device=device)
    rows = int(counts.sum())
    x = randn(rows, H, device=device)
    dy = randn(rows, H, seed=5, device=device)

    def results(dtype, ours):
        torch.manual_seed(0)
        experts = getattr(megablocks, name)(arguments(device, activation_fn=activation)).to(dtype)
        rows_in = x.detach().to(dtype).requires_grad_()
        if ours:
            y = experts(rows_in, counts)
        else:
            parts = []
            for e, part in enumerate(rows_in.split(counts.tolist())):
                w = {n: p.view(E, FFN, H)[e] for n, p in experts.named_parameters()}
                hidden = activation(part @ w["w1"].t())
                parts.append((hidden * (part @ w["v1"].t()) if "v1" in w else hidden) @ w["w2"])
            y = torch.cat(parts)
        y.backward(dy.to(dtype))
        return {"y": y.detach(), "x": rows_in.grad} | {n: p.grad for n, p in experts.named_parameters()}

    compare(lambda draw: results(torch.float32, True), lambda draw: results(torch.float32, False),
            lambda draw: results(torch.float64, False))  # fmt: skip
    experts = getattr(megablocks, name)(arguments(device, activation_fn=activation))
    with pytest.raises(ValueError, match=r"tokens_per_expert must have shape \(E,\)"):
        experts(x, counts[:3])
    with pytest.raises(TypeError, match="tokens_per_expert must be"):
        experts(x, counts.float())


def test_experts_with_a_capacity_take_one_row_block_each(device):
    experts = megablocks.MLP(arguments(device, activation_fn=F.silu)).double()
    x = randn(E, 7, H, device=device, dtype=torch.float64)
    for e in range(E):
        torch.testing.assert_close(experts(x)[e], F.silu(x[e] @ experts.w1[e]) @ experts.w2[e])
    with pytest.raises(ValueError, match=r"x must have shape \(E, C, d\)"):
        experts(x[:2])


@pytest.mark.parametrize("cls", [MoE, dMoE])
def test_forward_once_is_what_forward_computes(cls, device):
    """It may be called by itself, with flat routings too, and a subclass's is what the layer calls."""
    torch.manual_seed(0)
    layer = cls(arguments(device, mlp_impl="grouped", return_bias=False, moe_capacity_factor=1)).train()
    experts = layer.experts
    x = randn(T // 2, 2, H, device=device)
    scores, weights, ids = layer.router(x)
    y, counts = experts.forward_once(x, weights, ids)
    flat, _ = experts.forward_once(x.view(T, H), weights.flatten(), ids.flatten())
    assert torch.equal(y, flat) and torch.equal(counts, ids.flatten().bincount(minlength=E).to(counts.dtype))
    assert torch.equal(y.view_as(x) + experts.bias, experts(x, scores, weights, ids))

    class Doubled(type(experts)):
        def forward_once(self, x, expert_weights, top_experts):
            y, counts = super().forward_once(x, expert_weights, top_experts)
            return 2 * y, counts

    experts.__class__ = Doubled
    assert torch.equal(2 * y.view_as(x) + experts.bias, experts(x, scores, weights, ids))
