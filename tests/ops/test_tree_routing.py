"""Gates by soft trees and binary codes as one operator, against plain torch in float64."""

import math

import pytest
import torch
from helpers import OperatorLog, check, flat, randn

import gossamer
from gossamer.nn import DSelectKRouter, TreeRouter, selector_gates, tree_gates
from gossamer.ops.tree_routing import (
    PartGates,
    TreeRouting,
    TreeRoutingBackward,
    reach_sums,
    tree_routing,
    tree_routing_reference,
)

INF, NAN = math.inf, math.nan
# Whether codes, parts and experts: one split, no complete tree, more leaves than a vector, one part, one expert.
FORMS = [
    (False, 2, 2),
    (False, 1, 3),
    (False, 3, 11),
    (False, 2, 64),
    (False, 1, 37),
    (True, 3, 1),
    (True, 2, 2),
    (True, 1, 5),
    (True, 19, 8),
    (True, 3, 37),
]


def columns(coded, parts, experts):
    return parts * ((experts - 1).bit_length() + 1 if coded else 2 * experts - 1)


def make(form, num_tokens=7, device="cpu", dtype=torch.float32, seed=1, width=0.6):
    """Scores of which some splits are saturated at γ = 1."""
    return randn(num_tokens, columns(*form), seed=seed, device=device, dtype=dtype) * width


def record(scores, form, top_k=0, kept=True, gamma=1.0):
    coded, parts, experts = form
    return TreeRouting(scores, parts, experts, gamma, coded, top_k, kept, kept)


def plain(scores, form):
    """Gates, reach and its sums by plain torch."""
    gates, reach = tree_routing_reference(record(scores, form))
    return PartGates(gates, reach, reach_sums(reach))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("result", ["gates", "reach", "sums"])
def test_against_plain_torch(kernel_backend, device, form, result):
    """Each result and the gradient that comes through it alone, as near to float64 as plain float32's."""

    def ours(scores):
        with gossamer.backend(kernel_backend), OperatorLog() as log:
            found = getattr(tree_routing(record(scores, form)), result)
        assert log.named("tree_routing")
        return found

    # What reaches the only expert of a code without bits depends on nothing.
    needs = [] if result != "gates" and form[2] == 1 else ["scores"]
    check(ours, lambda scores: getattr(plain(scores, form), result), {"scores": make(form, device=device)}, needs)


@pytest.mark.parametrize("form", [(False, 2, 5), (True, 2, 6)])
def test_differences(kernel_backend, device, form):
    """All gradients together: those of float64 by finite differences, and a kernel's in float32 beside them."""
    scores = make(form, device=device, width=0.3).double()
    shapes = (7, form[2]), (7, *form[1:]), (7, form[1], 2)
    factors = [randn(*shape, seed=i, device=device).double() for i, shape in enumerate(shapes)]

    def total(scores):
        results = tree_routing(record(scores, form))[:3]
        return sum((y * f.to(y.dtype)).flatten(1).sum(1) for y, f in zip(results, factors, strict=True))

    def gradient(scores):
        leaf = scores.clone().requires_grad_()
        return torch.autograd.grad(total(leaf).sum(), leaf)[0]

    step, slopes = 1e-6, []
    for place in range(scores.shape[1]):
        moved = torch.zeros_like(scores)
        moved[:, place] = step
        # Tokens do not meet, so that a column moves for all of them at once.
        slopes.append((total(scores + moved) - total(scores - moved)) / (2 * step))
    exact = gradient(scores)
    torch.testing.assert_close(exact, torch.stack(slopes, 1), rtol=1e-6, atol=1e-7)
    with gossamer.backend(kernel_backend):
        torch.testing.assert_close(gradient(scores.float()).double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_saturated_splits_are_exact(kernel_backend, device, form):
    """Where all splits are decided each part picks one expert, the others are exactly 0, and nothing flows back."""
    coded, parts, experts = form
    scores = make(form, device=device, width=2.0).requires_grad_()
    with torch.no_grad():
        if coded:
            scores[:, :-parts] = scores[:, :-parts].sign()
        else:
            splits = scores.view(7, parts, -1)[..., : experts - 1]
            splits.copy_(splits.sign())
    with gossamer.backend(kernel_backend):
        found = tree_routing(record(scores, form, top_k=experts))
        (found.gates * randn(7, experts, seed=2, device=device)).sum().backward()
    gates, reach = tree_routing_reference(record(scores.detach(), form))
    assert torch.equal(found.reach, reach) and bool(((reach == 0) | (reach == 1)).all())
    assert torch.equal(found.gates > 0, gates > 0) and int((gates > 0).sum(1).max()) <= parts
    ids = torch.where(gates > 0, torch.arange(experts, device=device), experts)
    assert torch.equal(found.expert_ids, ids)
    if coded:
        assert not scores.grad[:, :-parts].any()
    else:
        assert not scores.grad.view(7, parts, -1)[..., : experts - 1].any()


@pytest.mark.parametrize("form", [(False, 2, 6), (False, 2, 33), (True, 2, 6)])
def test_top_weights(kernel_backend, device, form):
    """The highest gates in descending order, with their gradients; slots of zero gates are empty and take none."""
    scores = make(form, device=device, width=1.6)
    dweights = randn(7, 4, seed=3, device=device)
    found = {}
    for name in (kernel_backend, "reference"):
        leaf = scores.clone().requires_grad_()
        with gossamer.backend(name):
            parts = tree_routing(record(leaf, form, top_k=4))
            ids, weights = parts.expert_ids, parts.weights
            if name == "reference":
                weights, ids = parts.gates.topk(4, dim=1)
                ids = ids.masked_fill(weights == 0, form[2])
            # Not a number where there is no expert: whatever flows back there is not read.
            flow = torch.where(ids < form[2], dweights, NAN if name == kernel_backend else 0.0)
            (gradient,) = torch.autograd.grad(weights, leaf, flow)
        found[name] = ids, weights.detach(), gradient
    ours, plain = found[kernel_backend], found["reference"]
    assert bool((ours[0] == form[2]).any()) and torch.equal(ours[0], plain[0])
    for a, b in zip(ours[1:], plain[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_ties_go_to_the_lowest_expert(kernel_backend, device):
    """Equal gates, and slots beyond the positive ones."""
    scores = torch.zeros(1, 2 * 8 - 1, device=device)
    scores[0, 2] = 1  # the left half of the right subtree alone
    with gossamer.backend(kernel_backend):
        found = tree_routing(record(scores, (False, 1, 8), top_k=7))
    assert found.expert_ids.tolist() == [[4, 5, 0, 1, 2, 3, 8]]
    assert found.weights[0].tolist() == pytest.approx([0.25, 0.25, *[0.125] * 4, 0])


@pytest.mark.parametrize("form", [(False, 2, 6), (True, 2, 6)])
def test_scores_that_are_no_numbers(kernel_backend, device, form):
    """A choice refuses NaN and +inf on the CPU; what refuses none counts them as softmax_topk does."""
    scores = make(form, device=device)
    last = scores.shape[1] - 1
    for place in (0, last):
        for bad in (NAN, INF):
            wrong = scores.clone()
            wrong[3, place] = bad
            message = rf"logits must hold neither NaN nor \+inf .*, got {bad} at token 3, expert {place}"
            if device == "cpu":
                with gossamer.backend(kernel_backend), pytest.raises(ValueError, match=message):
                    tree_routing(record(wrong, form, top_k=6))
            leaf = wrong.clone().requires_grad_()
            with gossamer.backend(kernel_backend):
                found = tree_routing(record(leaf, form))
                sum(y.square().sum() for y in found[:3]).backward()
            for ours, expected in zip(found[:3], plain(wrong, form)[:3], strict=True):
                torch.testing.assert_close(ours, expected)
            assert bool(leaf.grad.isfinite().all()) and leaf.grad[3, place] == 0
    masked = scores.clone()
    masked[1, last] = -INF
    masked[2] = -INF
    masked[4, 0] = -INF
    leaf = masked.clone().requires_grad_()
    with gossamer.backend(kernel_backend):
        found = tree_routing(record(leaf, form, top_k=6))
        found.gates.square().sum().backward()
    torch.testing.assert_close(found.gates, plain(masked, form).gates)
    assert not found.weights[2].any() and bool((found.expert_ids[2] == 6).all())
    assert bool(leaf.grad.isfinite().all()) and not leaf.grad[2].any() and leaf.grad[1, last] == 0


def test_far_apart_scores(kernel_backend, device):
    """The largest numbers, and a highest leaf that nothing reaches: the others' softmax stands."""
    most = torch.finfo(torch.float32).max
    scores = torch.zeros(2, 7, device=device)
    scores[0, 3:] = torch.tensor([most, -most, 0, most], device=device)
    scores[1, 0], scores[1, 1] = -5, 0.1
    scores[1, 3:] = torch.tensor([300.0, 200, -400, -401], device=device)
    with gossamer.backend(kernel_backend):
        found = tree_routing(record(scores, (False, 1, 4)))
    truth = tree_routing_reference(record(scores.double(), (False, 1, 4)))[0]
    assert found.gates[0].tolist() == [0.5, 0, 0, 0.5]
    torch.testing.assert_close(found.gates[1].double(), truth[1], rtol=1e-6, atol=0)
    assert not found.gates[1, :2].any() and float(found.gates[1, 2]) > 0.7


@pytest.mark.parametrize("gamma", [1e-300, 1e300])
def test_extreme_widths(any_backend, device, gamma):
    """A step as narrow as can be decides every split, the widest sends half each way, and gradients are numbers."""
    scores = make((False, 2, 5), device=device).requires_grad_()
    with gossamer.backend(any_backend):
        found = tree_routing(record(scores, (False, 2, 5), gamma=gamma))
        (found.gates.square().sum() + found.reach.square().sum()).backward()
    assert bool(scores.grad.isfinite().all())
    if gamma < 1:
        assert bool(((found.reach == 0) | (found.reach == 1)).all()) and bool((found.reach.sum(2) == 1).all())
    else:
        expected = torch.tensor([0.125, 0.125, 0.25, 0.25, 0.25], device=device)
        torch.testing.assert_close(found.reach, expected.expand(7, 2, 5))


@pytest.mark.parametrize("form", [(False, 2, 20), (True, 2, 20)])
def test_no_token_and_same_bits(kernel_backend, device, form):
    """Twice the same for any number of threads, a row does not depend on others, and rows may have a stride."""
    # Natively more than two threads' least work.
    many = 400 if kernel_backend == "native" else 20
    wide = make(form, 2 * many, device=device)
    scores, flow = wide[::2], randn(many, 20, seed=4, device=device)
    threads = torch.get_num_threads()

    def run(scores, flow):
        leaf = scores.detach().requires_grad_()
        parts = tree_routing(record(leaf, form, top_k=5))
        loss = (parts.gates * flow).sum() + (parts.weights * flow[:, :5]).sum() + parts.reach.square().sum()
        return [*parts, *torch.autograd.grad(loss + parts.sums.square().sum(), leaf)]

    try:
        with gossamer.backend(kernel_backend):
            whole = run(scores, flow)
            torch.set_num_threads(3)
            again, part = run(scores.contiguous(), flow), run(scores[5:9], flow[5:9])
            empty = run(scores[:0], flow[:0])
    finally:
        torch.set_num_threads(threads)
    for a, b, c, d in zip(whole, again, part, empty, strict=True):
        assert torch.equal(a, b) and torch.equal(a[5:9], c) and d.shape == (0, *a.shape[1:])


@pytest.mark.parametrize("form", [(False, 2, 5), (True, 2, 6)])
def test_second_derivative(kernel_backend, device, form):
    """What plain torch gives."""
    scores = make(form, 3, device=device, width=0.3).requires_grad_()
    results = []
    for name in (kernel_backend, "reference"):
        with gossamer.backend(name):
            found = tree_routing(record(scores, form))
            loss = found.gates.sin().sum() + found.reach.sin().sum() + found.sums.sin().sum()
            (first,) = torch.autograd.grad(loss, scores, create_graph=True)
            results.append(torch.autograd.grad(first.square().sum(), scores)[0])
    torch.testing.assert_close(*results)


def test_operators_are_well_formed(kernel_backend, device):
    """With all results but gates, and with none of them."""
    for form, top_k, kept in (((False, 2, 5), 3, True), ((True, 2, 6), 6, False)):
        scores = make(form, 3, device=device).requires_grad_()
        args = record(scores, form, top_k, kept)
        operator = torch.ops.gossamer.tree_routing.default
        torch.library.opcheck(operator, flat(args, kernel_backend))
        gates, norm, ids, *more = (x.detach() for x in operator(*flat(args, kernel_backend)))
        flows = [torch.randn_like(x) if x.numel() else None for x in (gates, *more)]
        backward = TreeRoutingBackward(*flows, gates, norm, ids, args._replace(scores=scores.detach()))
        torch.library.opcheck(torch.ops.gossamer.tree_routing_backward.default, flat(backward, kernel_backend))


@pytest.mark.parametrize("router", [TreeRouter(16, 6, 2, 1.0, 3), DSelectKRouter(16, 6, 2, 1.0)])
def test_routers_are_one_operator(kernel_backend, device, router):
    """A router's forward pass is its product and one operator; compiled, it gives the same with its gradients."""
    router = router.to(device).train()
    x = randn(9, 16, seed=5, device=device)
    with gossamer.backend(kernel_backend), torch.no_grad(), OperatorLog() as log:
        router(x)
    assert [call[0] for call in log.calls] == ["tree_routing"]

    def loss(x):
        routing = router(x)
        return routing.weights.square().sum() + sum(term.sum() for term in routing.losses.values())

    results = []
    with gossamer.backend(kernel_backend):
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            router.zero_grad()
            function(x).backward()
            results.append([function(x).detach(), router.weight.grad.clone(), router.bias.grad.clone()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_more_slots_than_kernels_choose(any_backend, device):
    """More of the highest gates than a kernel picks: the gates are its own, and plain torch chooses."""
    router = TreeRouter(8, 70, 2, 1.0, 66, device=device)
    x = randn(5, 8, seed=6, device=device)
    with gossamer.backend(any_backend):
        routing = router(x)
    gates = tree_routing_reference(record(router.logits(x), (False, 2, 70)))[0]
    torch.testing.assert_close(routing.weights, gates.topk(66, dim=1).values)


def test_functions_of_parts(any_backend, device):
    """The public functions are the operator, in the dtype of what they are given, and refuse no value."""
    splits, leaves = randn(4, 2, 4, seed=7, device=device), randn(4, 2, 5, seed=8, device=device)
    codes, mixture = randn(4, 2, 3, seed=9, device=device), randn(4, 2, seed=10, device=device)
    splits[0, 0, 0] = codes[0, 0, 0] = NAN
    for dtype in (torch.float32, torch.float64, torch.float16):
        with gossamer.backend(any_backend):
            trees = tree_gates(splits.to(dtype), leaves.to(dtype), 1.0)
            selectors = selector_gates(codes.to(dtype), mixture.to(dtype), 5, 1.0)
        for gates, reach in (trees, selectors):
            assert gates.dtype == reach.dtype == dtype and gates.shape == (4, 5) and reach.shape == (4, 2, 5)
            assert bool(gates.isfinite().all()) and bool(reach.isfinite().all())
    truth = tree_gates(splits.double(), leaves.double(), 1.0)[0]
    with gossamer.backend(any_backend):
        torch.testing.assert_close(tree_gates(splits, leaves, 1.0)[0].double(), truth, rtol=1e-5, atol=1e-7)


def test_instruction_sets(isa):
    """Each instruction set's kernels, whose vectors are of different lengths."""
    for form in ((False, 2, 11), (False, 1, 70), (True, 3, 37)):
        scores = make(form)
        leaf, wide = scores.clone().requires_grad_(), scores.double().requires_grad_()
        found, truth = tree_routing(record(leaf, form, top_k=5)), plain(wide, form)
        assert torch.equal(found.weights, found.gates.topk(5, dim=1).values)
        for ours, exact in zip(found[:3], truth[:3], strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-7)
            pairs = ((ours, leaf), (exact, wide))
            ours, exact = (torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y, x in pairs)
            torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-6)
