"""The fused router: ids and weights of one kernel against plain torch, with gradients, masks and broken logits."""

import pytest
import torch
from helpers import OperatorLog, check, flat

import gossamer
from gossamer.nn import sigmoid_topk, softmax_threshold, softmax_top_p, softmax_topk
from gossamer.ops import topk_routing as ops
from gossamer.ops.topk_routing import MOST_CHOSEN

INF, NAN = float("inf"), float("nan")
# E and K, with no power of two, one expert a token, all experts, and groups.
SIZES = [(12, 4, 1, 1), (5, 1, 1, 1), (8, 8, 1, 1), (64, 8, 8, 4), (16, 3, 4, 2), (8, 2, 8, 3)]


def route(sigmoid, logits, top_k, bias, **options):
    if sigmoid:
        return sigmoid_topk(logits, top_k, correction_bias=bias, **options)
    return softmax_topk(logits, top_k, **options)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize(("experts", "top_k", "n_group", "topk_group"), SIZES)
def test_against_plain_torch(kernel_backend, device, experts, top_k, n_group, topk_group, sigmoid, renormalize):
    """The ids of plain torch in its order, weights and gradients as near to float64 as plain float32's."""
    logits = torch.randn(19, experts, device=device) * 2
    logits[3, : experts - 1] = -INF
    logits[4] = -INF
    bias = torch.randn(experts, device=device) / 2 if sigmoid else None
    options = {"renormalize": renormalize, "n_group": n_group, "topk_group": topk_group, "scale": 1.5}
    with gossamer.backend(kernel_backend), OperatorLog() as log:
        ours = route(sigmoid, logits, top_k, bias, **options)
    assert [call[0] for call in log.calls] == ["topk_routing"]
    with gossamer.backend("reference"):
        plain = route(sigmoid, logits, top_k, bias, **options)
    used = plain.weights > 0
    assert torch.equal(ours.expert_ids[used], plain.expert_ids[used]) and not ours.weights[~used].any()
    assert (ours.expert_ids.sort(1).values.diff(dim=1) > 0).all()
    assert ours.expert_ids.min() >= 0 and ours.expert_ids.max() < experts

    def weights(backend):
        def function(logits):
            with gossamer.backend(backend):
                return route(sigmoid, logits, top_k, None if bias is None else bias.to(logits.dtype), **options).weights

        return function

    finite = torch.cat([logits[:3], logits[5:]])
    check(weights(kernel_backend), weights("reference"), {"logits": finite})
    masked = logits.clone().requires_grad_()
    weights(kernel_backend)(masked).sum().backward()
    assert masked.grad.isfinite().all() and not masked.grad[4].any() and not masked.grad[3, : experts - 1].any()


@pytest.mark.parametrize("sigmoid", [False, True])
def test_broken_logits_never_give_bad_ids(kernel_backend, device, sigmoid):
    """NaN and +inf leave ids distinct and in range and other tokens untouched; on the CPU they are errors."""
    topk_routing = ops._kernels(kernel_backend).topk_routing
    logits = torch.randn(7, 16, device=device)
    args = ops.TopkRouting(logits, None, 4, sigmoid, True, 4, 2, 1.0)
    clean = topk_routing(args)
    logits[1], logits[2, 3], logits[3, :9], logits[4, 1] = NAN, NAN, NAN, INF
    weights, ids = topk_routing(args)
    assert (ids.sort(1).values.diff(dim=1) > 0).all() and 0 <= ids.min() and ids.max() < 16
    assert weights.isfinite().all() and not weights[1].any()
    rest = [0, 5, 6]
    assert torch.equal(weights[rest], clean[0][rest]) and torch.equal(ids[rest], clean[1][rest])
    if device == "cpu":
        with gossamer.backend(kernel_backend), pytest.raises(ValueError, match="logits must hold neither NaN nor"):
            route(sigmoid, logits, 4, None)


def test_ties_go_to_the_lowest_expert_and_no_token_is_fine(any_backend, device):
    """Ties among groups go to the first one, on every backend."""
    with gossamer.backend(any_backend):
        for num_experts in (6, 40):
            routed = softmax_topk(torch.zeros(2, num_experts, device=device), 3)
            assert routed.expert_ids.tolist() == [[0, 1, 2]] * 2
        routed = softmax_topk(torch.zeros(2, 40, device=device), 3, n_group=20, topk_group=2)
        assert routed.expert_ids.tolist() == [[0, 1, 2]] * 2
        assert softmax_topk(torch.zeros(0, 6, device=device), 3).weights.shape == (0, 3)


def test_operator_is_well_formed(kernel_backend, device):
    logits, bias = torch.randn(3, 8, device=device).requires_grad_(), torch.randn(8, device=device)
    args = ops.TopkRouting(logits, bias, 2, True, True, 4, 2, 2.5)
    torch.library.opcheck(torch.ops.gossamer.topk_routing.default, flat(args, kernel_backend))
    weights, ids = torch.ops.gossamer.topk_routing.default(*flat(args, kernel_backend))
    saved = (weights.detach(), ids, args._replace(logits=logits.detach()))
    backward = ops.TopkRoutingBackward(torch.randn(3, 2, device=device), *saved)
    torch.library.opcheck(torch.ops.gossamer.topk_routing_backward.default, flat(backward, kernel_backend))


@pytest.mark.parametrize("router", ["softmax_topk", "topk_softmax", "sigmoid_topk"])
def test_the_layer_is_three_operators_of_gossamer(kernel_backend, device, router):
    """A layer's forward is the router's product, one routing operator, one dispatch and one layer, and no more."""
    moe = gossamer.nn.MoE(32, 16, 8, 2, router=router).to(device)
    with gossamer.backend(kernel_backend), torch.no_grad(), OperatorLog() as log:
        moe(torch.randn(5, 32, device=device))
    assert [call[0] for call in log.calls] == ["topk_routing", "dispatch", "expert_mlp"]


@pytest.mark.parametrize("sigmoid", [False, True])
def test_many_tokens_and_strided_logits(kernel_backend, device, sigmoid):
    """Several threads' or programs' shares, rows with a stride, ascending and descending ones, and the same bits."""
    # Natively more than two threads' least work, which is 16384 logits.
    whole = torch.randn(1000 if kernel_backend == "native" else 100, 3, 37, device=device)
    whole[0], whole[1] = torch.arange(37.0, device=device) / 9, -torch.arange(37.0, device=device) / 9
    logits = whole[:, 1]
    with gossamer.backend(kernel_backend):
        ours, again = (route(sigmoid, x, 5, None, renormalize=False) for x in (logits, logits.contiguous()))
    with gossamer.backend("reference"):
        plain = route(sigmoid, logits, 5, None, renormalize=False)
    assert torch.equal(ours.expert_ids, plain.expert_ids)
    torch.testing.assert_close(ours.weights, plain.weights)
    assert torch.equal(ours.expert_ids, again.expert_ids) and torch.equal(ours.weights, again.weights)


def test_more_experts_a_token_than_the_native_kernel_finds(any_backend, device):
    """As many as it finds, and one more, which plain torch serves."""
    logits = torch.randn(3, MOST_CHOSEN + 6, device=device)
    for top_k in (MOST_CHOSEN, MOST_CHOSEN + 1):
        with gossamer.backend(any_backend):
            routing = softmax_topk(logits, top_k, renormalize=True)
        values, ids = logits.topk(top_k, dim=1)
        assert torch.equal(routing.expert_ids, ids)
        torch.testing.assert_close(routing.weights, values.softmax(1))


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_gradients_where_slots_are_dead(kernel_backend, device, sigmoid, renormalize):
    """Masked, infinite and underflowing logits, an expanded gradient, NaN as gradient of a slot without expert."""
    logits = torch.randn(6, 9, device=device) * 2
    logits[0, 2:], logits[1], logits[2, 4], logits[3, 1:] = -INF, -INF, -INF, -300.0
    weights = {}
    for backend in (kernel_backend, "reference"):
        leaf = logits.clone().requires_grad_()
        with gossamer.backend(backend):
            weights[backend] = route(sigmoid, leaf, 4, None, renormalize=renormalize, scale=2.5)
        out = weights[backend].weights
        for dweights in (torch.ones((), device=device).expand(6, 4), torch.where(out > 0, out.detach() + 1, NAN)):
            (grad,) = torch.autograd.grad(out, leaf, dweights, retain_graph=True)
            weights.setdefault(f"{backend} grads", []).append(grad)
    ours, plain = weights[f"{kernel_backend} grads"], weights["reference grads"]
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-5, atol=1e-6)
    assert all(g.isfinite().all() and not g[~logits.isfinite()].any() for g in ours)


def test_second_derivative(kernel_backend, device):
    """What plain torch gives, of weights renormalised or not."""
    logits = torch.randn(4, 7, device=device)
    for renormalize in (False, True):
        found = []
        for backend in (kernel_backend, "reference"):
            leaf = logits.clone().requires_grad_()
            with gossamer.backend(backend):
                weights = softmax_topk(leaf, 3, renormalize=renormalize).weights
            (first,) = torch.autograd.grad(weights.square().sum(), leaf, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), leaf)[0])
        torch.testing.assert_close(*found)


def test_a_bias_in_float64_counts_in_float64(any_backend, device):
    """The least difference decides, which float32 would not hold."""
    logits, bias = torch.tensor([[1.0, 1.0, 0.0]], device=device), torch.tensor([0, 1e-10, 0], device=device).double()
    with gossamer.backend(any_backend):
        assert sigmoid_topk(logits, 1, correction_bias=bias).expert_ids.tolist() == [[1]]


# E, null experts, most ranks, whether the sum must pass the mass, the mass.
MASSES = [
    (12, 0, None, True, 0.3),
    (5, 3, 4, False, 0.9),
    (1, 0, None, True, 0.5),
    (64, 0, 9, False, 0.9),
    (70, 0, None, True, 1.0),
]


def until(logits, mass, null, most, exceed):
    if exceed and not null:
        return softmax_top_p(logits, mass, max_experts=most)
    return softmax_threshold(logits, mass, max_experts=most, null_experts=null)


@pytest.mark.parametrize(("experts", "null", "most", "exceed", "mass"), MASSES)
def test_experts_until_a_mass(kernel_backend, device, experts, null, most, exceed, mass):
    """The ids of plain torch, and weights and gradients as near to float64 as plain float32's."""
    logits = torch.randn(19, experts + null, device=device) * 2
    logits[3, 1:] = -INF
    logits[4] = -INF
    found = {}
    for backend in (kernel_backend, "reference"):
        with gossamer.backend(backend), OperatorLog() as log:
            found[backend] = until(logits, mass, null, most, exceed)
        # Triton has no kernel for null experts.
        fused = backend != "reference" and not (null and backend == "triton")
        assert [call[0] for call in log.calls] == ["mass_routing" if fused else "select_experts"]
    ours, plain = found.values()
    assert torch.equal(ours.expert_ids, plain.expert_ids)
    assert not ours.weights[ours.expert_ids >= experts].any() and bool((ours.expert_ids[4] == experts).all())

    def weights(backend):
        def function(logits):
            with gossamer.backend(backend):
                return until(logits, mass, null, most, exceed).weights

        return function

    finite = torch.cat([logits[:3], logits[5:]])
    check(weights(kernel_backend), weights("reference"), {"logits": finite})
    masked = logits.clone().requires_grad_()
    out = weights(kernel_backend)(masked)
    # What flows back to a slot without an expert does not count, whatever it is.
    out.backward(torch.where(out > 0, 1.0, NAN))
    assert masked.grad.isfinite().all() and not masked.grad[4].any() and not masked.grad[3, 1:].any()


def test_experts_until_a_mass_in_hard_cases(kernel_backend, device):
    """Ties, both zeros among them; no token; strided rows on several threads; broken logits; second derivatives."""
    with gossamer.backend(kernel_backend):
        routed = softmax_threshold(torch.tensor([[0.0, -0.0, 0.0, -0.0, 0.0]], device=device), 0.5)
        assert routed.expert_ids.tolist() == [[0, 1, 2, 5, 5]]
        assert softmax_top_p(torch.zeros(0, 6, device=device), 0.5).num_tokens == 0
        whole = 2 * torch.randn(1000 if kernel_backend == "native" else 50, 3, 37, device=device)
        ours, again = (softmax_top_p(x, 0.7) for x in (whole[:, 1], whole[:, 1].contiguous()))
        assert torch.equal(ours.expert_ids, again.expert_ids) and torch.equal(ours.weights, again.weights)
    with gossamer.backend("reference"):
        assert torch.equal(ours.expert_ids, softmax_top_p(whole[:, 1], 0.7).expert_ids)

    kernel = ops._kernels(kernel_backend).mass_routing
    logits = torch.randn(7, 16, device=device)
    args = ops.MassRouting(logits, 0.8, True, 16, 16)
    clean = kernel(args)
    logits[1], logits[2, 3], logits[3, :9], logits[4, 1] = NAN, NAN, NAN, INF
    weights, ids = kernel(args)
    assert 0 <= ids.min() and ids.max() <= 16 and weights.isfinite().all() and not weights[1].any()
    rest = [0, 5, 6]
    assert torch.equal(weights[rest], clean[0][rest]) and torch.equal(ids[rest], clean[1][rest])
    if device == "cpu":
        with gossamer.backend(kernel_backend), pytest.raises(ValueError, match="logits must hold neither NaN nor"):
            softmax_top_p(logits, 0.8)

    logits, found = torch.randn(4, 7, device=device), []
    for backend in (kernel_backend, "reference"):
        leaf = logits.clone().requires_grad_()
        with gossamer.backend(backend):
            out = softmax_top_p(leaf, 0.8).weights
        (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    torch.testing.assert_close(*found)


def test_mass_operators_are_well_formed(kernel_backend, device):
    logits = torch.randn(3, 8, device=device).requires_grad_()
    args = ops.MassRouting(logits, 0.8, True, 8, 5)
    torch.library.opcheck(torch.ops.gossamer.mass_routing.default, flat(args, kernel_backend))
    weights, ids = torch.ops.gossamer.mass_routing.default(*flat(args, kernel_backend))
    saved = (weights.detach(), ids, args._replace(logits=logits.detach()))
    backward = ops.MassRoutingBackward(torch.randn(3, 5, device=device), *saved)
    torch.library.opcheck(torch.ops.gossamer.mass_routing_backward.default, flat(backward, kernel_backend))


def test_a_layer_of_varying_experts_is_three_operators(kernel_backend, device):
    moe = gossamer.nn.MoE(32, 16, 8, router="top_p", top_p=0.5).to(device)
    with gossamer.backend(kernel_backend), torch.no_grad(), OperatorLog() as log:
        moe(torch.randn(5, 32, device=device))
    assert [call[0] for call in log.calls] == ["mass_routing", "dispatch", "expert_mlp"]
