"""The products for Hopper GPUs against float64, in shapes that use every tile, load and epilogue.

On such a GPU they run there. Elsewhere the same sources run on the host, against a model of the hardware, in the
smaller shapes.
"""

import pytest
import torch
from helpers import assert_same_bits, check, make_dispatch, run

import gossamer
from gossamer import _backend
from gossamer._activation import ACTIVATIONS, Activation
from gossamer.ops._groups import Groups
from gossamer.ops._weights import Weight
from gossamer.ops.expert_mlp import ExpertMlp, ExpertMlpBackward, expert_mlp_reference
from gossamer.ops.grouped_matmul import grouped_matmul_reference

if reason := _backend.native_unavailable() or _backend.triton_unavailable():
    pytest.skip(reason, allow_module_level=True)

import cuda_model

from gossamer.cuda_kernels.expert_mlp import expert_mlp, expert_mlp_backward
from gossamer.cuda_kernels.grouped_matmul import rows_times_weight, weight_gradient

BF16, FP16 = torch.bfloat16, torch.float16
ON_GPU = torch.cuda.is_available() and not (
    _backend.cuda_kernels_unavailable() or _backend.hopper_refuses(torch.empty(0, dtype=BF16, device="cuda"))
)
DEVICE = "cuda" if ON_GPU else "cpu"
# Triton's interpreter, which has the sums over a token's and an expert's rows on the host, rounds bfloat16 wrongly.
HALF = BF16 if ON_GPU else FP16
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU")


@pytest.fixture(scope="module")
def model():
    """The kernels on the host, where there is no Hopper GPU."""
    return None if ON_GPU else cuda_model.build()


@pytest.fixture(autouse=True)
def kernels(model, monkeypatch):
    """Makes ``gossamer.backend("cuda")`` serve this device."""
    if model is not None:
        cuda_model.install(model, monkeypatch)


@pytest.fixture(params=[False, True], ids=["alone", "paired"])
def paired(request, model):
    """Whether blocks share the weights' tiles in pairs, here whatever the number of rows."""
    module = model or gossamer._C
    before = module.hopper_paired_from()
    module.set_hopper_paired_from(0 if request.param else 2**62)
    yield request.param
    module.set_hopper_paired_from(before)


def product(dispatch, **form):
    """The product by CUDA kernels, and its reference."""

    def function(x, weight, bias=None):
        with gossamer.backend("cuda"):
            return gossamer.grouped_matmul(x, weight, dispatch, bias=bias, **form)

    def reference(x, weight, bias=None):
        return grouped_matmul_reference(x, weight, dispatch, bias=bias, **form)

    return function, reference


def layer(dispatch, **form):
    """The expert layer by CUDA kernels, and its reference."""

    def function(x, gate_up, down, weights, **biases):
        with gossamer.backend("cuda"):
            return gossamer.expert_mlp(x, gate_up, down, dispatch, weights, **biases, **form)

    def reference(x, gate_up, down, weights, **biases):
        return expert_mlp_reference(x, gate_up, down, dispatch, weights, **biases, **form)

    return function, reference


def product_inputs(rows, e, n, c, dtype, *, transposed=False, bias=True):
    weight = torch.randn(e, n, c, device=DEVICE) / c**0.5
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    inputs = {"x": torch.randn(rows, c, device=DEVICE), "weight": weight}
    if bias:
        inputs["bias"] = torch.randn(e, n, device=DEVICE)
    return {name: value.to(dtype) for name, value in inputs.items()}


def layer_inputs(t, e, k, h, i, dtype, *, halves=2, transposed=False, bias=True):
    inputs = {
        "x": torch.randn(t, h, device=DEVICE),
        "gate_up": torch.randn(e, halves * i, h, device=DEVICE) / h**0.5,
        "down": torch.randn(e, h, i, device=DEVICE) / i**0.5,
        "weights": torch.rand(t, k, device=DEVICE) * 2 / k,
    }
    if bias:
        inputs["gate_up_bias"] = torch.randn(e, halves * i, device=DEVICE)
        inputs["down_bias"] = torch.randn(e, h, device=DEVICE)
    if transposed:
        for name in ("gate_up", "down"):
            inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    return {name: value.to(dtype) for name, value in inputs.items()}


@pytest.mark.parametrize("seed", range(4))
def test_foreign_dispatches(paired, seed):
    """Arbitrary slots, rows and offsets cause no access outside the tensors: the memory around them is unchanged."""
    draw = torch.Generator().manual_seed(seed)
    t, k, e, n, c = 40, 2, 3, 24, 16
    numbers = torch.tensor([-(2**31), -1, 0, 7, 79, 80, 81, 2**31 - 1])

    def drawn(size):
        return numbers[torch.randint(len(numbers), (size,), generator=draw)].int().to(DEVICE)

    groups = Groups(drawn(t * k), drawn(t * k), drawn(e + 1))
    around = torch.full((t * k + 200, 128), 7.0, dtype=HALF, device=DEVICE)
    x, weight = around[100 : 100 + t, :c], torch.randn(e, n, c, device=DEVICE).to(HALF)
    for x_div, scatter in ((k, True), (k, False), (0, False)):
        rows = x if x_div else around[100 : 100 + t * k, :c]
        y = rows_times_weight(rows, weight, None, groups, x_div, scatter, True)
        assert y.shape == (t * k, n)
    dy = torch.ones(t * k, n, dtype=HALF, device=DEVICE)
    assert weight_gradient(x, dy, groups, k, 0, False).shape == (e, n, c)
    weights = torch.rand(t, k, device=DEVICE).to(HALF)
    gate_up, down = torch.randn(e, 2 * n, c, device=DEVICE).to(HALF), torch.randn(e, c, n, device=DEVICE).to(HALF)
    args = ExpertMlp(x, Weight(gate_up), Weight(down), groups, weights, Activation("swiglu"), False, True)
    y, preact, _, _ = expert_mlp(args)
    backward = ExpertMlpBackward(
        torch.ones_like(y), args, preact, None, None, ["x", "weights", "gate_up.data", "down.data"]
    )
    assert sum(g is not None for g in expert_mlp_backward(backward, True).values()) == 4
    assert (around == 7).all()


@pytest.mark.parametrize(
    ("dtype", "x_grouped", "y_grouped", "transposed", "e"),
    [
        (HALF, False, False, False, 4),
        (BF16, True, False, True, 4),
        (FP16, False, True, True, 2),
        (BF16, True, True, False, 2),
    ],
)
def test_small_products(paired, dtype, x_grouped, y_grouped, transposed, e):
    """Gathered and sorted rows, scattered and sorted results, both layouts of the weight; ragged ends everywhere.

    Of 4 experts most have fewer rows than a panel, of 2 more.
    """
    t, k, n, c = 75, 2, 200, 136
    d = make_dispatch(t, e, k, DEVICE, dropped=0.1, skew="zipf")
    bias = ON_GPU or dtype == FP16
    inputs = product_inputs(t * k if x_grouped else t, e, n, c, dtype, transposed=transposed, bias=bias)
    check(*product(d, x_grouped=x_grouped, y_grouped=y_grouped), inputs)


@pytest.mark.parametrize(
    ("n", "c", "x_grouped"),
    [
        (1, 1, False),
        (63, 65, True),
        (260, 80, False),
        # One step of K and many, every choice of tile.
        *(
            pytest.param(n, c, x_grouped, marks=needs_gpu)
            for n, c in ((256, 64), (192, 64), (384, 1088), (512, 2048), (8, 8), (1000, 24), (96, 8192))
            for x_grouped in (False, True)
        ),
    ],
)
def test_product_sizes(paired, n, c, x_grouped):
    """Single elements, columns beyond one tile, and sizes whose rows have to be copied first."""
    t, e, k = 80, 2, 2
    d = make_dispatch(t, e, k, DEVICE, dropped=0.1)
    check(*product(d, x_grouped=x_grouped), product_inputs(t * k if x_grouped else t, e, n, c, HALF))


@pytest.mark.parametrize(
    ("t", "e", "n", "c"),
    [(1100, 3, 192, 328), (600, 10, 192, 328), pytest.param(60000, 3, 576, 328, marks=needs_gpu)],
    ids=["a few", "of few rows", "many"],
)
def test_several_turns_of_each_warpgroup(paired, t, e, n, c):
    """Sorted rows and a short K, so that warpgroups take several tiles in turn and the ring of stages wraps around."""
    d = make_dispatch(t, e, 1, DEVICE, skew="zipf")
    inputs = product_inputs(t, e, n, c, BF16)
    with torch.no_grad():
        check(*product(d, x_grouped=True), inputs, [])


@pytest.mark.parametrize(
    "skew", ["zipf", pytest.param("uniform", marks=needs_gpu), pytest.param("one", marks=needs_gpu)]
)
@pytest.mark.parametrize(
    ("t", "e", "k"),
    [(15, 34, 2), *(pytest.param(*sizes, marks=needs_gpu) for sizes in ((1, 40, 8), (5000, 33, 2), (20000, 2, 1)))],
)
def test_product_routings(paired, t, e, k, skew):
    """Fewer rows than experts and far more, empty experts, more experts than a warp has lanes."""
    d = make_dispatch(t, e, k, DEVICE, skew=skew)
    check(*product(d), product_inputs(t, e, 64, 64, HALF))


def test_no_live_row():
    """With every slot dropped all results are zero."""
    d = make_dispatch(20, 4, 2, DEVICE, ids=torch.full((20, 2), 4))
    check(*product(d), product_inputs(20, 4, 64, 64, HALF))
    check(*layer(d), layer_inputs(20, 4, 2, 64, 64, HALF))


@pytest.mark.parametrize("e", [3, 1])
@pytest.mark.parametrize(("dtype", "interleaved", "transposed"), [(HALF, False, False), (FP16, True, True)])
def test_small_layers(paired, dtype, interleaved, transposed, e):
    """The layer and all its gradients in both orders of gate and up and both layouts of the weights.

    Experts with fewer rows than a panel, and one with more.
    """
    t, k, h, i = 100 // min(e, 2), min(e, 2), 136, 72
    d = make_dispatch(t, e, k, DEVICE, dropped=0.1, skew="zipf")
    check(*layer(d, interleaved=interleaved), layer_inputs(t, e, k, h, i, dtype, transposed=transposed))


def forms():
    """Activations in each order of gate and up; on the host two of them, since test_hopper_logic has all."""
    for name in sorted(ACTIVATIONS):
        for interleaved in (False, True)[: gossamer.Activation(name).halves]:
            marks = () if (name, interleaved) in (("gelu", False), ("clamped_swiglu", True)) else needs_gpu
            yield pytest.param(name, interleaved, marks=marks)


@pytest.mark.parametrize(("activation", "interleaved"), list(forms()))
def test_layer_activations(activation, interleaved):
    """Every activation; columns that end within a vector."""
    form = gossamer.Activation(activation, alpha=1.3, limit=0.8)
    d = make_dispatch(20, 2, 2, DEVICE)
    inputs = layer_inputs(20, 2, 2, 64, 133, FP16, halves=form.halves)
    check(*layer(d, activation=form, interleaved=interleaved), inputs)


@needs_gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("t", "e", "k", "h", "i"),
    [
        (3000, 8, 2, 512, 384),
        (1000, 70, 4, 1024, 256),
        (4000, 512, 8, 256, 128),
        (2000, 4, 2, 320, 129),
        (500, 3, 1, 65, 63),
        (1, 5, 2, 64, 64),
    ],
)
def test_layer_sizes(paired, dtype, t, e, k, h, i):
    """Several turns of each warpgroup, columns that end within a tile, and rows that have to be copied first."""
    d = make_dispatch(t, e, k, DEVICE, dropped=0.05, skew="zipf")
    check(*layer(d), layer_inputs(t, e, k, h, i, dtype, bias=False))


def test_float32_routing_weights():
    """Routing weights may stay in float32."""
    d = make_dispatch(20, 3, 2, DEVICE)
    inputs = layer_inputs(20, 3, 2, 64, 64, HALF)
    check(*layer(d), inputs | {"weights": inputs["weights"].float()})


@pytest.mark.parametrize("bad", [float("nan"), pytest.param(float("inf"), marks=needs_gpu)])
def test_groups_do_not_touch_each_other(bad):
    """What is not finite in one expert's rows and weights stays there, forward and backward."""
    t, e, n, c = 200, 3, 64, 72
    ids = torch.arange(t)[:, None] * e // t
    d = make_dispatch(t, e, 1, DEVICE, ids=ids)
    inputs = product_inputs(t, e, n, c, HALF)
    spoilt = {name: value.clone() for name, value in inputs.items()}
    middle = (ids[:, 0] == 1).to(DEVICE)
    spoilt["x"][middle] = bad
    spoilt["weight"][1] = bad
    for y_grouped in (False, True):
        dout = torch.randn((t, n) if y_grouped else (t, 1, n), device=DEVICE, dtype=HALF)
        spoilt_dout = dout.clone()
        spoilt_dout[middle] = bad
        function, _ = product(d, x_grouped=True, y_grouped=y_grouped)
        clean, dirty = run(function, inputs, inputs, dout), run(function, spoilt, spoilt, spoilt_dout)
        for name, others in (("out", ~middle), ("x", ~middle), ("weight", [0, 2]), ("bias", [0, 2])):
            assert torch.equal(clean[name][others], dirty[name][others]), name


def test_overwriting_the_preactivation():
    """A backward pass that frees its graph overwrites what it saved, and gives the bits of one that keeps it."""
    d = make_dispatch(20, 2, 2, DEVICE)
    leaves = {name: v.requires_grad_() for name, v in layer_inputs(20, 2, 2, 64, 136, HALF).items()}
    function, _ = layer(d)
    out = function(**leaves)
    dout = torch.randn_like(out)
    kept = torch.autograd.grad(out, leaves.values(), dout, retain_graph=True)
    freed = torch.autograd.grad(out, leaves.values(), dout)
    assert all(torch.equal(a, b) for a, b in zip(kept, freed, strict=True))


@needs_gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_same_bits(paired, dtype):
    """Ten runs agree bit by bit, with more tiles than multiprocessors: a race would show."""
    t, e, k, h, i = 6000, 16, 2, 512, 384
    d = make_dispatch(t, e, k, DEVICE, skew="zipf")
    inputs = layer_inputs(t, e, k, h, i, dtype)
    function, _ = layer(d)
    dout = torch.randn(t, h, device=DEVICE)
    first = run(function, inputs, inputs, dout)
    for _ in range(9):
        assert_same_bits(first, run(function, inputs, inputs, dout))


@needs_gpu
def test_compiles_whole():
    """Traced whole, forward and backward, with a dynamic token count."""
    torch._dynamo.reset()

    def f(x, weight, ids):
        return gossamer.grouped_matmul(x.sin(), weight, gossamer.dispatch(ids, 4)).cos()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    with gossamer.backend("cuda"):
        for t in (40, 70):
            ids = torch.randint(4, (t, 2), device=DEVICE)
            inputs = product_inputs(t, 4, 64, 64, BF16, bias=False)
            dout = torch.randn(t, 2, 64, device=DEVICE)
            actual = run(lambda ids=ids, **v: compiled(**v, ids=ids), inputs, inputs, dout)
            torch.testing.assert_close(actual, run(lambda ids=ids, **v: f(**v, ids=ids), inputs, inputs, dout))


def test_quantised_weights_are_refused():
    """Quantised weights raise an error instead of falling back to other kernels."""
    d = make_dispatch(10, 3, 2, DEVICE)
    inputs = product_inputs(10, 3, 64, 64, HALF, bias=False)
    weight = gossamer.QuantizedExpertWeight.quantize(inputs["weight"], "int8")
    with gossamer.backend("cuda"), pytest.raises(ValueError, match="its kernels take no quantised weights"):
        gossamer.grouped_matmul(inputs["x"], weight, d)


def test_refusals_say_why(monkeypatch):
    """The public function refuses a dtype, a GPU or a build that the kernels do not support, and names it."""
    d = make_dispatch(10, 3, 2, DEVICE)
    inputs = product_inputs(10, 3, 64, 64, torch.float32)
    function, _ = product(d)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r'gossamer.backend\("cuda"\) cannot serve grouped_matmul on (cpu|cuda:0): '):
        function(**inputs)
    if ON_GPU:
        with pytest.raises(ValueError, match="its kernels multiply float16 and bfloat16, got "):
            function(**inputs)
