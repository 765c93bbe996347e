"""Routers: selection and weights against hand-worked values, float64 formulas and transformers' own routers."""

import pytest
import torch

import gossamer
from gossamer.nn import (
    SigmoidRouter,
    SoftmaxRouter,
    TopKSoftmaxRouter,
    given_experts,
    sigmoid_topk,
    softmax_topk,
    topk_softmax,
)
from gossamer.ops import topk_routing
from gossamer.testing import assert_close

INF, NAN = float("inf"), float("nan")
# Every row is a permutation of (2, 1, 0, -1): softmax (0.643914, 0.236883, 0.087144, 0.032059) in descending order.
EXAMPLE = [[2.0, 1.0, 0.0, -1.0], [0.0, 2.0, 1.0, -1.0], [1.0, 0.0, 2.0, -1.0], [2.0, 0.0, -1.0, 1.0]]


def example(device, dtype=torch.float64):
    return torch.tensor(EXAMPLE, device=device, dtype=dtype)


def rounded(values, decimals=6):
    return [round(v, decimals) for v in values.double().flatten().tolist()]


def plain_weights(kind, logits, ids, options):
    """The weights of given ids, written without the code under test."""
    scale = options.get("scale", 1.0)
    if kind == "sigmoid":
        weights = torch.sigmoid(logits).gather(1, ids)
        if options.get("renormalize", True):
            weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    else:
        weights = torch.softmax(logits, 1).gather(1, ids)
        if options.get("renormalize", False):
            weights = weights / weights.sum(1, keepdim=True)
    return weights * scale


def plain_ids(kind, logits, top_k, options):
    """The selection by a loop over tokens and Python's sort."""
    bias = options.get("correction_bias", torch.zeros(logits.shape[1], dtype=logits.dtype, device=logits.device))
    scores = torch.sigmoid(logits) + bias if kind == "sigmoid" else logits
    n_group, topk_group = options.get("n_group", 1), options.get("topk_group", 1)
    size, best = logits.shape[1] // n_group, 2 if kind == "sigmoid" else 1
    chosen = []
    for row in scores.tolist():
        groups = [range(g * size, (g + 1) * size) for g in range(n_group)]
        groups.sort(key=lambda group, row=row: -sum(sorted((row[e] for e in group), reverse=True)[:best]))
        allowed = [e for group in groups[:topk_group] for e in group]
        chosen.append(sorted(allowed, key=lambda e, row=row: -row[e])[:top_k])
    return torch.tensor(chosen, device=logits.device)


FUNCTIONS = {"softmax": softmax_topk, "sigmoid": sigmoid_topk}
FORMS = [
    pytest.param("softmax", {}, id="olmoe"),
    pytest.param("softmax", {"renormalize": True}, id="mixtral"),
    pytest.param("softmax", {"n_group": 4, "topk_group": 2, "scale": 16.0}, id="deepseek-v2"),
    pytest.param("softmax", {"renormalize": True, "n_group": 3, "topk_group": 1}, id="groups-renormalised"),
    pytest.param("sigmoid", {}, id="sigmoid"),
    pytest.param("sigmoid", {"renormalize": False, "scale": 0.5}, id="raw-sigmoid"),
    pytest.param("sigmoid", {"n_group": 4, "topk_group": 2, "scale": 2.5, "correction_bias": True}, id="deepseek-v3"),
    pytest.param("sigmoid", {"n_group": 12, "topk_group": 5, "correction_bias": True}, id="groups-of-one"),
]


def resolve(options, num_experts, device, dtype):
    """``options`` with a correction bias that changes choices and turns some biased scores negative."""
    if not options.get("correction_bias"):
        return options
    generator = torch.Generator().manual_seed(5)
    bias = torch.randn(num_experts, generator=generator, dtype=torch.float64) * 0.5
    return {**options, "correction_bias": bias.to(device, dtype)}


def test_running_example(device):
    raw = softmax_topk(example(device), 2)
    assert raw.expert_ids.tolist() == [[0, 1], [1, 2], [2, 0], [0, 3]]
    assert rounded(raw.weights) == [0.643914, 0.236883] * 4
    assert raw.counts.tolist() == [3, 2, 2, 1]
    assert rounded(raw.probabilities.mean(0)) == [0.402964, 0.263771, 0.25, 0.083265]
    for renormalised in (softmax_topk(example(device), 2, renormalize=True), topk_softmax(example(device), 2)):
        assert torch.equal(renormalised.expert_ids, raw.expert_ids)
        assert rounded(renormalised.weights) == [0.731059, 0.268941] * 4


@pytest.mark.parametrize(
    ("bias0", "ids", "weights"), [(0.0, [0, 2], [1.5, 1.0]), (-0.5, [7, 2], [1.346154, 1.153846])], ids=["none", "bias"]
)
def test_group_limited_example(device, bias0, ids, weights):
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.5, 0.4, 0.3, 0.2, 0.7]], dtype=torch.float64, device=device)
    bias = torch.tensor([bias0] + [0.0] * 7, dtype=torch.float64, device=device)
    routed = sigmoid_topk(scores.logit(), 2, correction_bias=bias, n_group=4, topk_group=2, scale=2.5)
    assert routed.expert_ids.tolist() == [ids]
    assert rounded(routed.weights) == weights


def test_negative_biased_scores_stay_inside_their_groups(device):
    """A mask by zero instead of −inf would let other groups in when all biased scores are negative."""
    logits = torch.tensor([[1.0, 0.5, 0.0, -0.5]], device=device)
    bias = torch.full((4,), -2.0, device=device)
    routed = sigmoid_topk(logits, 2, correction_bias=bias, n_group=2, topk_group=1)
    assert routed.expert_ids.tolist() == [[0, 1]]


def test_gradient_example(device):
    """The renormalised pair (0.731059, 0.268941) under an upstream gradient (1, 0)."""
    logits = example(device).requires_grad_()
    topk_softmax(logits, 2).weights[:, 0].sum().backward()
    assert rounded(logits.grad[0]) == [0.196612, -0.196612, 0.0, 0.0]
    assert torch.equal(logits.grad[0, 2:], torch.zeros(2, dtype=torch.float64, device=device))


@pytest.mark.parametrize(("kind", "options"), FORMS)
def test_selection_weights_and_gradient(device, kind, options):
    generator = torch.Generator().manual_seed(1)
    logits64 = (torch.randn(41, 12, generator=generator, dtype=torch.float64) * 2).to(device)
    logits = logits64.float().requires_grad_()
    logits64 = logits.detach().double().requires_grad_()
    routed = FUNCTIONS[kind](logits, 3, **resolve(options, 12, device, torch.float32))
    chosen = plain_ids(kind, logits64.detach(), 3, resolve(options, 12, device, torch.float64))
    assert torch.equal(routed.expert_ids, chosen)

    upstream = torch.randn(41, 3, generator=generator, dtype=torch.float64).to(device)
    plain = logits.detach().requires_grad_()
    truth = plain_weights(kind, logits64, chosen, options)
    if kind == "softmax" and options.get("renormalize"):
        # In float32 the softmax over the chosen logits, as gpt-oss takes it: dividing rounds its gradient differently.
        baseline = torch.softmax(plain.gather(1, chosen), 1)
    else:
        baseline = plain_weights(kind, plain, chosen, options)
    for weights in (routed.weights, truth, baseline):
        (weights * upstream.to(weights.dtype)).sum().backward()
    assert_close(routed.weights, truth, baseline, "weights")
    assert_close(logits.grad, logits64.grad, plain.grad, "dlogits")
    if options.get("renormalize", kind == "sigmoid"):
        unselected = torch.ones_like(logits, dtype=torch.bool).scatter(1, chosen, False)
        assert not logits.grad[unselected].any()


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_probabilities(device, kind):
    generator = torch.Generator().manual_seed(2)
    logits64 = torch.randn(9, 5, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    upstream = torch.randn(9, 5, generator=generator, dtype=torch.float64).to(device)

    def plain(logits):
        scores = torch.sigmoid(logits) if kind == "sigmoid" else logits.exp()
        return scores / scores.sum(1, keepdim=True)

    logits, same = (logits64.detach().float().requires_grad_() for _ in range(2))
    results = [FUNCTIONS[kind](logits, 2).probabilities, plain(logits.detach().double()), plain(same)]
    truth_logits = logits.detach().double().requires_grad_()
    results[1] = plain(truth_logits)
    for p in results:
        (p * upstream.to(p.dtype)).sum().backward()
    assert_close(*results, "probabilities")
    assert_close(logits.grad, truth_logits.grad, same.grad, "dlogits")


def hf_router(name, **config):
    """A router of transformers with random parameters."""
    transformers = pytest.importorskip("transformers", minversion="5")
    module = pytest.importorskip(f"transformers.models.{name[0]}.modeling_{name[0]}")
    router = getattr(module, name[1])(getattr(transformers, name[2])(hidden_size=24, **config))
    generator = torch.Generator().manual_seed(3)
    for tensor in router.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return router


FOUR = {"num_experts": 12, "num_experts_per_tok": 3}
LOCAL = {"num_local_experts": 12, "num_experts_per_tok": 3}
GROUPS = {"n_group": 4, "topk_group": 2}
V2 = {"n_routed_experts": 12, "num_experts_per_tok": 3, "topk_method": "group_limited_greedy", **GROUPS}
V3 = {"n_routed_experts": 12, "num_experts_per_tok": 3, "norm_topk_prob": True, "routed_scaling_factor": 2.5, **GROUPS}
HF = [
    (("mixtral", "MixtralTopKRouter", "MixtralConfig"), LOCAL, SoftmaxRouter, {"renormalize": True}),
    (("mixtral", "MixtralTopKRouter", "MixtralConfig"), LOCAL, TopKSoftmaxRouter, {}),
    (("qwen2_moe", "Qwen2MoeTopKRouter", "Qwen2MoeConfig"), FOUR, SoftmaxRouter, {}),
    (
        ("qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeConfig"),
        {**FOUR, "norm_topk_prob": True},
        SoftmaxRouter,
        {"renormalize": True},
    ),
    (("olmoe", "OlmoeTopKRouter", "OlmoeConfig"), FOUR, SoftmaxRouter, {}),
    (("gpt_oss", "GptOssTopKRouter", "GptOssConfig"), LOCAL, TopKSoftmaxRouter, {"bias": True}),
    (
        ("deepseek_v2", "DeepseekV2TopkRouter", "DeepseekV2Config"),
        {**V2, "routed_scaling_factor": 16.0, "num_attention_heads": 4},
        SoftmaxRouter,
        {**GROUPS, "scale": 16.0},
    ),
    (("deepseek_v3", "DeepseekV3TopkRouter", "DeepseekV3Config"), V3, SigmoidRouter, {**GROUPS, "scale": 2.5}),
]


@pytest.mark.parametrize(("name", "config", "ours", "options"), HF, ids=[f"{h[0][0]}-{h[2].__name__}" for h in HF])
def test_transformers_routers(device, name, config, ours, options):
    theirs = hf_router(name, **config).to(device)
    router = ours(24, 12, 3, **options).to(device)
    router.load_state_dict(theirs.state_dict())
    x = torch.randn(53, 24, generator=torch.Generator().manual_seed(4)).to(device)
    logits, weights, ids = theirs(x)
    routed = router(x)

    kind = "sigmoid" if ours is SigmoidRouter else "softmax"
    form = {"renormalize": True} if ours is TopKSoftmaxRouter else options
    bias = theirs.bias.double() if hasattr(theirs, "bias") else 0
    logits64 = x.double() @ theirs.weight.double().T + bias
    assert_close(routed.logits, logits64, logits, "logits")
    # Order within a token is theirs to choose: their sort is off for some models.
    order, hf_order = routed.expert_ids.argsort(1), ids.argsort(1)
    sorted_ids = routed.expert_ids.gather(1, order)
    assert torch.equal(sorted_ids, ids.gather(1, hf_order))
    truth = plain_weights(kind, logits64, sorted_ids, form)
    assert_close(routed.weights.gather(1, order), truth, weights.gather(1, hf_order), "weights")


def test_product_in_the_hidden_dtype_as_transformers_takes_it(device):
    """With ``upcast=False`` bfloat16 logits are theirs bit for bit, and so are the choices but for equal logits."""
    theirs = hf_router(HF[0][0], **LOCAL).to(device, torch.bfloat16)
    router = SoftmaxRouter(24, 12, 3, renormalize=True, upcast=False).to(device, torch.bfloat16)
    router.load_state_dict(theirs.state_dict())
    x = torch.randn(53, 24, generator=torch.Generator().manual_seed(4)).to(device, torch.bfloat16)
    routed = router(x)
    logits, _, ids = theirs(x)
    assert torch.equal(routed.logits, logits.float())
    chosen, chosen_there = (routed.logits.gather(1, i) for i in (routed.expert_ids, ids))
    assert torch.equal(chosen, chosen_there)
    assert torch.equal(routed.expert_ids.sort(1).values, ids.sort(1).values)


@pytest.fixture
def unchecked(monkeypatch):
    """What happens where values are not read: CUDA, or the CPU with its check off."""
    monkeypatch.setattr(topk_routing, "_raise_not_a_logit", lambda logits: None)


BIG = torch.finfo(torch.float32).max
# Row, and the weights of top 3 by softmax renormalised over what is left; None where a row is ordinary.
ADVERSARIAL = [
    ([NAN] * 6, [0, 0, 0]),
    ([-INF] * 6, [0, 0, 0]),
    ([INF] * 6, [1 / 3, 1 / 3, 1 / 3]),
    ([NAN, INF, -INF, NAN, INF, -INF], [0.5, 0.5, 0]),
    ([NAN, 1.0, 1.0, NAN, NAN, NAN], [0.5, 0.5, 0]),
    ([-INF, -INF, -INF, 7.0, -INF, -INF], [1, 0, 0]),
    ([INF, 1.0, 2.0, 3.0, 4.0, 5.0], [1, 0, 0]),
    ([NAN, 2.0, 2.0, 2.0, NAN, -INF], [1 / 3, 1 / 3, 1 / 3]),
    ([BIG, -BIG, 0.0, -BIG, -BIG, -BIG], [1, 0, 0]),
    ([0.0, -0.0, 0.0, -0.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]),
]
ORDINARY = [0.3, -1.0, 2.0, 0.7, -0.2, 1.1]

SAFE = [
    pytest.param(softmax_topk, {}, id="softmax"),
    pytest.param(softmax_topk, {"renormalize": True}, id="renormalised"),
    pytest.param(softmax_topk, {"n_group": 3, "topk_group": 2, "renormalize": True}, id="softmax-groups"),
    pytest.param(sigmoid_topk, {}, id="sigmoid"),
    pytest.param(sigmoid_topk, {"n_group": 3, "topk_group": 2}, id="sigmoid-groups"),
    pytest.param(sigmoid_topk, {"n_group": 2, "topk_group": 1, "scale": 2.5}, id="one-group"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("function", "options"), SAFE)
def test_non_finite_logits_select_safely(device, function, options):
    rows = [row for bad, _ in ADVERSARIAL for row in (bad, ORDINARY)]
    logits = torch.tensor(rows, device=device, requires_grad=True)
    routed = function(logits, 3, **options)
    ids = routed.expert_ids
    assert ((ids >= 0) & (ids < 6)).all()
    assert (ids.sort(1).values.diff(dim=1) > 0).all(), "an expert is chosen twice"
    assert torch.isfinite(routed.weights).all() and (routed.weights >= 0).all()
    assert torch.isfinite(routed.probabilities).all()

    alone_logits = torch.tensor([ORDINARY], device=device, requires_grad=True)
    alone = function(alone_logits, 3, **options)
    upstream = torch.tensor([1.0, -2.0, 0.5], device=device)
    (routed.weights * upstream + routed.probabilities[:, :3]).sum().backward()
    (alone.weights * upstream + alone.probabilities[:, :3]).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[~torch.isfinite(logits.detach())].any()
    for mine, its in ((ids, alone.expert_ids), (routed.weights, alone.weights), (logits.grad, alone_logits.grad)):
        assert torch.equal(mine[1::2], its.expand_as(mine[1::2])), "a bad row changed another token"


@pytest.mark.usefixtures("unchecked")
def test_weights_of_non_finite_logits(device):
    """NaN counts as masked, +inf as the largest number; what cannot be had weighs 0."""
    routed = softmax_topk(torch.tensor([row for row, _ in ADVERSARIAL], device=device), 3, renormalize=True)
    expected = torch.tensor([weights for _, weights in ADVERSARIAL])
    assert torch.equal(routed.weights.cpu(), expected)


@pytest.mark.parametrize(("function", "options"), SAFE[:5])
def test_masked_experts(device, function, options):
    """Minus infinity is a mask: never chosen while K others are left, and an ordinary routing over the rest."""
    generator = torch.Generator().manual_seed(6)
    # Groups of four, so that the chosen ones keep three experts or more.
    logits = torch.randn(20, 12, generator=generator).to(device)
    logits[:, 1] = -INF
    logits[:10, 4] = -INF
    routed = function(logits, 3, **options)
    assert not (routed.expert_ids == 1).any() and not (routed.expert_ids[:10] == 4).any()
    assert (routed.weights > 0).all()
    assert routed.counts[1] == 0
    if not options.get("n_group"):
        kept = torch.tensor([0, *range(2, 12)], device=device)
        rest = function(logits[10:, kept], 3, **options)
        assert torch.equal(routed.expert_ids[10:], kept[rest.expert_ids])
        # Sums of one zero more or less may round differently.
        exact = function(logits[10:, kept].double(), 3, **options).weights
        assert_close(routed.weights[10:], exact, rest.weights, "weights")


def test_fewer_than_k_unmasked(device):
    """The remaining slots weigh 0, in renormalised weights the rest adds up to one, and gradients stay finite."""
    logits = torch.tensor([[-INF, 1.0, -INF, 1.0], [-INF, -INF, 3.0, -INF]], device=device)
    for function, options in ((softmax_topk, {}), (softmax_topk, {"renormalize": True}), (sigmoid_topk, {})):
        leaf = logits.clone().requires_grad_()
        routed = function(leaf, 3, **options)
        assert routed.weights.tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]
        assert [set(row[:n]) for row, n in zip(routed.expert_ids.tolist(), (2, 1), strict=True)] == [{1, 3}, {2}]
        (routed.weights * torch.tensor([1.0, 2.0, 3.0], device=device)).sum().backward()
        assert torch.isfinite(leaf.grad).all()
        assert not leaf.grad[logits == -INF].any()


def test_minus_infinity_in_the_correction_bias_masks(device):
    bias = torch.tensor([0.0, -INF, 0.0, 0.0], device=device)
    routed = sigmoid_topk(example(device, torch.float32), 2, correction_bias=bias)
    assert not (routed.expert_ids == 1).any()
    routed = sigmoid_topk(example(device, torch.float32), 4, correction_bias=bias)
    assert not routed.weights[routed.expert_ids == 1].any()
    assert (routed.weights[routed.expert_ids != 1] > 0).all()


@pytest.mark.parametrize("value", [NAN, INF], ids=["nan", "inf"])
@pytest.mark.parametrize("function", [softmax_topk, topk_softmax, sigmoid_topk])
def test_bad_logits_are_an_error_on_the_cpu(function, value):
    logits = torch.zeros(3, 4)
    logits[1, 2] = logits[2, 0] = value
    with pytest.raises(
        ValueError, match=rf"logits must hold neither NaN nor \+inf.*got {value} at token 1, expert 2.* 2 "
    ):
        function(logits, 2)
    with pytest.raises(ValueError, match="correction_bias must not hold NaN"):
        sigmoid_topk(torch.zeros(3, 4), 2, correction_bias=torch.tensor([0.0, NAN, 0.0, 0.0]))


def test_given_experts(device):
    ids = torch.tensor([[0, 3], [3, 4], [1, 9]], device=device)
    routed = given_experts(ids, 4)
    assert routed.weights.tolist() == [[0.5, 0.5]] * 3
    assert routed.counts.tolist() == [1, 1, 0, 2], "ids of no expert must not be counted"
    assert routed.dispatched().dispatch.num_experts == 4
    with pytest.raises(ValueError, match="routing must have logits"):
        _ = routed.probabilities
    with pytest.raises(ValueError, match=r"weights must have shape \(T, K\) = \(3, 2\), got \(3, 1\)"):
        given_experts(ids, 4, torch.ones(3, 1, device=device))
    with pytest.raises(TypeError, match="weights must be floating point"):
        given_experts(ids, 4, ids)
    with pytest.raises(ValueError, match=rf"weights must be on the device of expert_ids, {ids.device}, got meta"):
        gossamer.nn.Routing(ids, torch.ones(3, 2, device="meta"), 4)
    with pytest.raises(ValueError, match="top_k must be at most num_experts, got top_k=2, num_experts=1"):
        given_experts(ids, 1)
