"""Router, dispatch and experts in one native call: the bits of the modules, and only where nothing else may happen."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

import gossamer
from gossamer.nn import MoE, SoftmaxRouter
from gossamer.nn.moe import inference

pytestmark = pytest.mark.skipif(
    gossamer._backend.native_unavailable() is not None, reason="needs the compiled extension"
)
H, I, E, K = 64, 32, 8, 3


@pytest.fixture
def served(monkeypatch):
    """The calls that one native call has served, by number of tokens."""
    calls = []

    def counting(original):
        def run(*arguments):
            y = original(*arguments)
            if y is not None:
                calls.append(len(y))
            return y

        return run

    for name in ("run", "run_chosen"):
        monkeypatch.setattr(inference, name, counting(getattr(inference, name)))
    return calls


def make(dtype=torch.float32, quantized=None, **options):
    torch.manual_seed(0)
    activations = options.pop("activations", "float")
    moe = MoE(H, I, E, K, dtype=dtype, **options).eval()
    with torch.no_grad():
        for buffer in moe.router.buffers():
            buffer.normal_()
    if quantized is not None:
        gossamer.quantize_experts(moe, quantized, activations=activations)
    return moe


def inputs(tokens, dtype=torch.float32):
    """Hidden states ``(1, T, H)`` that are not contiguous."""
    x = torch.randn(1, H, tokens, generator=torch.Generator().manual_seed(tokens)).to(dtype).transpose(1, 2)
    assert tokens == 1 or not x.is_contiguous()
    return x


def by_modules(moe, x):
    """The layer's output when its routing is requested too, so that the modules compute it."""
    return moe(x, return_routing=True)[0]


def check(moe, served, dtype=torch.float32, tokens=(1, 2, 19)):
    with torch.no_grad():
        for count in tokens:
            x = inputs(count, dtype)
            found = moe(x)
            assert served.pop() == count and not served
            assert torch.equal(found, by_modules(moe, x))
            assert not served


@pytest.mark.parametrize(
    "options",
    [
        {"router": "softmax_topk"},
        {"router": "softmax_topk", "renormalize": True, "scale": 2.5, "router_bias": True},
        {"router": "softmax_topk", "n_group": 4, "topk_group": 2},
        {"router": "topk_softmax", "upcast": False},
        {"router": "sigmoid_topk", "n_group": 2, "topk_group": 1},
        {"router": "top_p", "top_p": 0.4},
    ],
    ids=["softmax", "renormalized", "groups", "topk_softmax", "sigmoid", "other"],
)
def test_routers(served, options):
    """Each rule, of one token and several; any other router's ids and weights, some slots without an expert."""
    check(make(**options), served)


@pytest.mark.parametrize(
    ("dtype", "quantized", "options"),
    [
        (torch.float32, None, {"bias": True, "interleaved": True, "transposed": True, "activation": "clamped_swiglu"}),
        (torch.bfloat16, None, {"shared_intermediate_size": 48, "shared_gate": True}),
        (torch.float16, None, {"activation": "relu2"}),
        (torch.bfloat16, "int4", {"bias": True}),
        (torch.float32, "fp8", {"shared_intermediate_size": 48}),
        (torch.bfloat16, "int8", {"activations": "int8"}),
    ],
    ids=["fp32", "bf16", "fp16", "int4", "fp8", "int8-rows"],
)
def test_experts(served, dtype, quantized, options):
    """Floats and codes, biases, layouts, activations and shared experts."""
    check(make(dtype, quantized, **options), served, dtype)


def test_codes_move_into_panels(served):
    """The first call brings codes into the layout that products of few rows read fastest."""
    moe = make(torch.bfloat16, "int4")
    stacks = [moe.experts.gate_up_proj, moe.experts.down_proj]
    gains = gossamer._backend.reads_panels(stacks[0].scale)
    with torch.no_grad():
        moe(inputs(1, torch.bfloat16))
    assert served == [1] and all((stack._buffers["panels"] is not None) == gains for stack in stacks)


def test_changes_are_seen(served):
    """Weights changed in place, replaced, cast, quantised and read as rows; options of router and experts."""
    moe = make(router="sigmoid_topk")
    check(moe, served)
    with torch.no_grad():
        moe.experts.down_proj.mul_(2)
        moe.router.e_score_correction_bias.neg_()
    check(moe, served)
    moe.experts.down_proj = torch.nn.Parameter(moe.experts.down_proj.detach().flip(0))
    check(moe, served)
    moe.experts.down_proj.data = moe.experts.down_proj.detach().flip(0)
    check(moe, served)
    moe.router.selection["scale"], moe.router.top_k = 0.5, 2
    check(moe, served)
    moe.bfloat16()
    check(moe, served, torch.bfloat16)
    old = weakref.ref(moe.experts.gate_up_proj)
    gossamer.quantize_experts(moe, "int8")
    gc.collect()
    assert old() is None
    check(moe, served, torch.bfloat16)
    assert moe.experts.gate_up_proj.data.dtype == torch.int8  # the codes in the order of rows again
    check(moe, served, torch.bfloat16)
    for same in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        check(same, served, torch.bfloat16, (1,))


def _hooked(moe):
    moe.experts.register_forward_hook(lambda module, arguments, y: y * 2)


def _own_forward(moe):
    forward = moe.router.forward
    moe.router.forward = lambda x, **named: forward(x * 2, **named)


def _own_rule(moe):
    class Other(SoftmaxRouter):
        def route(self, logits):
            return super().route(-logits)

    moe.router = Other(H, E, K)


def _capacity(moe):
    moe.experts.capacity_factor = 0.5


@pytest.mark.parametrize(("change", "calls"), [(_hooked, []), (_own_forward, [9]), (_own_rule, [9]), (_capacity, [])])
def test_modules_with_more_to_do(served, change, calls):
    """Hooks, methods of an instance, subclasses and capacities are not left out; experts may follow another router."""
    moe, x = make(), inputs(9)
    with torch.no_grad():
        plain = moe(x)
        assert served.pop() == 9
        change(moe)
        found = moe(x)
        assert torch.equal(found, by_modules(moe, x)) and not torch.equal(found, plain)
    assert served == calls


def test_calls_with_more_to_do(served):
    """Gradients, autocast, another backend and a wanted routing go through the modules."""
    moe, x = make(), inputs(2)
    assert moe(x).requires_grad
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert moe(x).dtype == torch.bfloat16
        with gossamer.backend("reference"):
            assert torch.allclose(moe(x), by_modules(moe, x))
        y, routing = moe(x, return_routing=True)
        assert torch.equal(y, moe(x, routing=routing))
        bounded = routing.replaced(dispatch=None, max_rows=K)
        with pytest.raises(ValueError, match="max_rows must be at least the number of slots with an expert"):
            moe(x, routing=bounded)
        assert not served
        assert torch.equal(y, moe(x, routing=routing.replaced(dispatch=None)))
    assert served == [2]


def test_errors_are_those_of_the_modules(served):
    """Logits that are NaN, dtypes that differ and a K beyond the layer's raise as with gradients."""
    moe = make()
    bad = inputs(2)
    bad[0, 1, 0] = torch.nan
    cases = [(bad, ValueError, "logits must hold neither NaN"), (inputs(2).bfloat16(), TypeError, "dtype of x")]
    for x, error, message in cases:
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled), pytest.raises(error, match=message):
                moe(x)
    flat = make()
    flat.experts.down_proj = torch.nn.Parameter(flat.experts.down_proj.detach().flatten(1))
    with torch.no_grad(), pytest.raises(ValueError, match="down must have shape"):
        flat(inputs(2))
    moe.top_k = K - 1
    with torch.no_grad(), pytest.raises(ValueError, match="at most K = 2 experts per token"):
        moe(inputs(2))
    with torch.no_grad():
        moe.top_k = K
        assert moe(inputs(2)[:, :0]).shape == (1, 0, H)
    assert not served
