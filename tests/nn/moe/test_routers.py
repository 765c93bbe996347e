"""Routers as modules: their product, what they keep, compilation, casts, and constructor errors."""

import copy

import pytest
import torch

from gossamer.nn import (
    HashRouter,
    Router,
    SigmoidRouter,
    SoftmaxRouter,
    TopKSoftmaxRouter,
    given_experts,
    sigmoid_topk,
    softmax_topk,
)
from gossamer.testing import assert_close

ROUTER_CLASSES = [
    pytest.param(SoftmaxRouter, {"renormalize": True}, id="softmax"),
    pytest.param(TopKSoftmaxRouter, {"bias": True}, id="topk"),
    pytest.param(SigmoidRouter, {"n_group": 4, "topk_group": 2}, id="sigmoid"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_product(device, dtype):
    """Wide logits from narrow hidden states, with right gradients, under autocast too, and no wide copy kept."""
    generator = torch.Generator().manual_seed(7)
    router = TopKSoftmaxRouter(48, 6, 2, bias=True, device=device, dtype=dtype)
    x = torch.randn(3, 11, 48, generator=generator).to(device, dtype).requires_grad_()
    dlogits = torch.randn(33, 6, generator=generator).to(device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t.shape, t.dtype)) or t, lambda t: t):
        logits = router.logits(x)
    logits.backward(dlogits)
    assert logits.dtype == torch.float32
    if dtype == torch.bfloat16:
        assert not [s for s in saved if s[1] == torch.float32]
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(router.logits(x), logits)

    wide = [(t.detach().double(), t.detach().float()) for t in (x.view(33, 48), router.weight, router.bias)]
    (x64, x32), (w64, w32), (b64, b32) = wide
    assert_close(logits, x64 @ w64.T + b64, x32 @ w32.T + b32, "logits")
    d64 = dlogits.double()
    assert_close(x.grad.view(33, 48), d64 @ w64, (dlogits @ w32).to(dtype), "dx")
    assert_close(router.weight.grad, d64.T @ x64, (dlogits.T @ x32).to(dtype), "dweight")
    assert_close(router.bias.grad, d64.sum(0), dlogits.sum(0).to(dtype), "dbias")


@pytest.mark.parametrize(("cls", "options"), ROUTER_CLASSES)
def test_leading_sizes_and_empty_batches(device, cls, options):
    router = cls(16, 8, 3, device=device, **options)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(8)).to(device)
    routed, flat = router(x), router(x.reshape(10, 16))
    for name in ("expert_ids", "weights", "logits", "counts"):
        assert torch.equal(getattr(routed, name), getattr(flat, name))
    assert int(routed.counts.sum()) == 30
    empty = router(x[:0])
    assert (empty.num_tokens, empty.top_k, empty.counts.tolist()) == (0, 3, [0] * 8)
    empty.weights.sum().backward()
    assert not router.weight.grad.any()


@pytest.mark.parametrize(("cls", "options"), ROUTER_CLASSES)
def test_compiles_without_a_graph_break(device, cls, options):
    router = cls(16, 8, 3, device=device, **options)
    x = torch.randn(10, 16, generator=torch.Generator().manual_seed(9)).to(device)
    compiled = torch.compile(lambda t: router(t).dispatched(), fullgraph=True, backend="aot_eager")
    routed, eager = compiled(x), router(x)
    for name in ("expert_ids", "weights", "logits", "counts"):
        assert torch.equal(getattr(routed, name), getattr(eager, name))
    gradients = []
    for r in (routed, eager):
        router.weight.grad = None
        (r.weights * r.expert_ids).sum().backward()
        gradients.append(router.weight.grad)
    assert torch.equal(*gradients)
    if device == "cpu":
        with pytest.raises(ValueError, match="logits must hold neither NaN"):
            compiled(torch.full_like(x, float("nan")))


def test_selection_operators(device):
    """What torch asks of operators: their fake kernels agree with the real ones, and they write to no input."""
    logits = torch.randn(10, 8, generator=torch.Generator().manual_seed(9)).to(device)
    operators = torch.ops.gossamer
    torch.library.opcheck(operators.select_experts.default, (logits, logits + 1, 3))
    torch.library.opcheck(operators.choose_tokens.default, (logits, logits.softmax(1), 3))
    torch.library.opcheck(operators.live_experts.default, (logits, logits.softmax(1), logits[0].sigmoid()))


@pytest.mark.parametrize(("cls", "options"), ROUTER_CLASSES)
def test_meta_tensors(cls, options):
    routed = cls(16, 8, 3, device="meta", dtype=torch.bfloat16, **options)(torch.empty(2, 5, 16, device="meta"))
    assert routed.expert_ids.shape == routed.weights.shape == (10, 3)
    assert (routed.logits.shape, routed.logits.dtype, routed.logits.device.type) == ((10, 8), torch.float32, "meta")


def test_correction_bias_keeps_float32(device):
    """Steps of 1e-3 vanish in bfloat16, so casting the router leaves its bias alone; moving it does not."""
    router = SigmoidRouter(16, 8, 3)
    router.e_score_correction_bias.copy_(torch.arange(8) * 1e-3 + 1)
    bias = router.e_score_correction_bias.clone()
    state = router.state_dict()
    assert set(state) == {"weight", "e_score_correction_bias"}
    for cast in (
        copy.deepcopy(router).to(torch.bfloat16),
        copy.deepcopy(router).half(),
        copy.deepcopy(router).to(device, torch.bfloat16),
    ):
        assert cast.weight.dtype != torch.float32
        assert cast.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(cast.e_score_correction_bias.cpu(), bias)
    meta = SigmoidRouter(16, 8, 3, device="meta").to(torch.bfloat16).to_empty(device=device)
    meta.load_state_dict(state)
    assert torch.equal(meta.e_score_correction_bias.cpu(), bias)
    meta.reset_parameters()
    assert not meta.e_score_correction_bias.any()


def test_a_router_of_ones_own(device):
    class Best(Router):
        def route(self, logits):
            ids = logits.argmax(1, keepdim=True)
            return given_experts(ids, self.num_experts, logits.gather(1, ids))

    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(10)).to(device)
    router = Best(16, 4, 1, device=device)
    assert torch.equal(router(x).expert_ids[:, 0], (x @ router.weight.T).argmax(1))
    with pytest.raises(NotImplementedError, match="Router must define route"):
        Router(16, 4, 1, device=device)(x)


def test_hash_router(device):
    """A balanced table on uniform ids gives T/E each; one id, one expert, at every position."""
    table = torch.arange(20) % 5
    router = HashRouter(table, 5).to(device)
    routed = router(torch.arange(20, device=device).view(4, 5))
    assert routed.counts.tolist() == [4] * 5
    assert routed.weights.tolist() == [[1.0]] * 20
    same = router(torch.tensor([7, 3, 7, 7], device=device)).expert_ids[:, 0].tolist()
    assert same == [2, 3, 2, 2]
    assert torch.equal(router.state_dict()["table"].cpu(), table.view(20, 1))
    pairs = HashRouter(torch.tensor([[0, 1], [4, 4]]), 5).to(device)
    assert pairs(torch.tensor([1, 0], device=device)).weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    if device == "cpu":
        for ids in ([3, 20], [-1, 3]):
            with pytest.raises(
                IndexError, match=f"token_ids must be from 0 to V - 1 = 19, got {min(ids)} to {max(ids)}"
            ):
                router(torch.tensor(ids))
    with pytest.raises(ValueError, match="table must hold ids from 0 to num_experts - 1 = 4, got 0 to 9"):
        HashRouter(torch.arange(10), 5)
    with pytest.raises(TypeError, match="table must be int32 or int64"):
        HashRouter(torch.zeros(10), 5)
    with pytest.raises(ValueError, match=r"table must have shape \(V,\) or \(V, K\), got \(2, 2, 2\)"):
        HashRouter(torch.zeros(2, 2, 2, dtype=torch.int64), 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SoftmaxRouter(16, 4, 5), ValueError, "top_k must be at most num_experts, got top_k=5, num_experts=4"),
        (lambda: SoftmaxRouter(0, 4, 2), ValueError, "hidden_size must be at least 1, got 0"),
        (lambda: SoftmaxRouter(16, 4, 0), ValueError, "top_k must be at least 1, got 0"),
        (lambda: SoftmaxRouter(16, -4, 2), ValueError, "num_experts must be at least 1, got -4"),
        (lambda: SoftmaxRouter(16, 4.0, 2), TypeError, "num_experts must be an int, got float"),
        (lambda: SigmoidRouter(16, 8, 2, n_group=3), ValueError, "n_group must divide num_experts, got n_group=3"),
        (lambda: SigmoidRouter(16, 8, 2, n_group=2, topk_group=3), ValueError, "topk_group must be at most n_group"),
        (lambda: SigmoidRouter(16, 8, 3, n_group=4, topk_group=1), ValueError, r"n_group \* topk_group = 2,.* top_k=3"),
        (lambda: SigmoidRouter(16, 8, 3, n_group=4, topk_group=0), ValueError, "topk_group must be at least 1, got 0"),
        (
            lambda: SoftmaxRouter(16, 4, 2)(torch.zeros(3, 15)),
            ValueError,
            r"x must have shape .* H = 16, got \(3, 15\)",
        ),
        (lambda: softmax_topk(torch.zeros(2, 4, dtype=torch.int64), 2), TypeError, "logits must be floating point"),
        (lambda: softmax_topk(torch.tensor(1.0), 1), ValueError, r"logits must have shape \(..., E\)"),
        (lambda: softmax_topk(torch.zeros(2, 4), 2, scale=float("nan")), ValueError, "scale must be finite, got nan"),
        (lambda: SigmoidRouter(16, 8, 2, scale=float("inf")), ValueError, "scale must be finite, got inf"),
        (lambda: softmax_topk(torch.zeros(2, 4), 5), ValueError, "top_k=5, num_experts=4"),
        (
            lambda: sigmoid_topk(torch.zeros(2, 4), 2, correction_bias=torch.zeros(3)),
            ValueError,
            r"correction_bias must have shape \(E,\) = \(4\), got \(3,\)",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
