"""The products on a Hopper GPU against float64, in shapes that reach every tile, load and epilogue of theirs."""

import itertools

import pytest
import torch
from helpers import assert_same_bits, check, make_dispatch, run

import gossamer
from gossamer import _backend
from gossamer._activation import ACTIVATIONS
from gossamer.ops.expert_mlp import expert_mlp_reference
from gossamer.ops.grouped_matmul import grouped_matmul_reference

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
probe = torch.empty(0, dtype=torch.bfloat16, device="cuda")
if reason := _backend.cuda_kernels_unavailable() or _backend.hopper_refuses(probe):
    pytest.skip(reason, allow_module_level=True)

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


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
    weight = torch.randn(e, n, c, device="cuda") / c**0.5
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    inputs = {"x": torch.randn(rows, c, device="cuda"), "weight": weight}
    if bias:
        inputs["bias"] = torch.randn(e, n, device="cuda")
    return {name: value.to(dtype) for name, value in inputs.items()}


def layer_inputs(t, e, k, h, i, dtype, *, halves=2, transposed=False, bias=True):
    inputs = {
        "x": torch.randn(t, h, device="cuda"),
        "gate_up": torch.randn(e, halves * i, h, device="cuda") / h**0.5,
        "down": torch.randn(e, h, i, device="cuda") / i**0.5,
        "weights": torch.rand(t, k, device="cuda") * 2 / k,
    }
    if bias:
        inputs["gate_up_bias"] = torch.randn(e, halves * i, device="cuda")
        inputs["down_bias"] = torch.randn(e, h, device="cuda")
    if transposed:
        for name in ("gate_up", "down"):
            inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    return {name: value.to(dtype) for name, value in inputs.items()}


@DTYPES
@pytest.mark.parametrize(("x_grouped", "y_grouped"), itertools.product([False, True], repeat=2))
@pytest.mark.parametrize("transposed", [False, True])
def test_small_products(dtype, x_grouped, y_grouped, transposed):
    """Gathered and sorted rows, scattered and sorted results, both layouts of the weight; ragged ends everywhere."""
    t, e, k, n, c = 75, 4, 2, 200, 136
    d = make_dispatch(t, e, k, "cuda", dropped=0.1, skew="zipf")
    inputs = product_inputs(t * k if x_grouped else t, e, n, c, dtype, transposed=transposed)
    check(*product(d, x_grouped=x_grouped, y_grouped=y_grouped), inputs)


@DTYPES
@pytest.mark.parametrize(
    ("n", "c"),
    [(256, 64), (192, 64), (384, 1088), (512, 2048), (8, 8), (1, 1), (63, 65), (1000, 24), (96, 8192)],
)
@pytest.mark.parametrize("x_grouped", [False, True])
def test_product_sizes(dtype, n, c, x_grouped):
    """Every choice of tile, one step of K and many, single elements, and sizes whose rows have to be copied first."""
    t, e, k = 300, 3, 2
    d = make_dispatch(t, e, k, "cuda", dropped=0.1)
    check(*product(d, x_grouped=x_grouped), product_inputs(t * k if x_grouped else t, e, n, c, dtype))


@pytest.mark.parametrize("skew", ["uniform", "zipf", "one", "few"])
@pytest.mark.parametrize(("t", "e", "k"), [(1, 40, 8), (40, 70, 4), (5000, 33, 2), (20000, 2, 1)])
def test_product_routings(t, e, k, skew):
    """Fewer rows than experts and far more, empty experts, more tiles than multiprocessors: several turns of each."""
    d = make_dispatch(t, e, k, "cuda", skew=skew)
    for x_grouped in (False, True):
        inputs = product_inputs(t * k if x_grouped else t, e, 320, 128, torch.bfloat16)
        check(*product(d, x_grouped=x_grouped), inputs)


def test_no_live_row():
    """With every slot dropped all results are zero."""
    d = make_dispatch(100, 4, 2, "cuda", ids=torch.full((100, 2), 4))
    check(*product(d), product_inputs(100, 4, 64, 64, torch.bfloat16))
    check(*layer(d), layer_inputs(100, 4, 2, 64, 64, torch.bfloat16))


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_small_layers(dtype, interleaved, transposed):
    """The layer and all its gradients in both orders of gate and up and both layouts of the weights."""
    t, e, k, h, i = 60, 3, 2, 136, 72
    d = make_dispatch(t, e, k, "cuda", dropped=0.1, skew="zipf")
    check(*layer(d, interleaved=interleaved), layer_inputs(t, e, k, h, i, dtype, transposed=transposed))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_layer_activations(activation):
    """Every activation, in both orders of gate and up where it is gated."""
    form = gossamer.Activation(activation, alpha=1.3, limit=0.8)
    d = make_dispatch(50, 3, 2, "cuda")
    for interleaved in (False, True)[: form.halves]:
        inputs = layer_inputs(50, 3, 2, 64, 200, torch.float16, halves=form.halves)
        check(*layer(d, activation=form, interleaved=interleaved), inputs)


@DTYPES
@pytest.mark.parametrize(
    ("t", "e", "k", "h", "i"),
    [(3000, 8, 2, 512, 384), (1000, 70, 4, 1024, 256), (2000, 4, 2, 320, 129), (500, 3, 1, 65, 63), (1, 5, 2, 64, 64)],
)
def test_layer_sizes(dtype, t, e, k, h, i):
    """Several turns of each warpgroup, columns that end within a tile, and rows that have to be copied first."""
    d = make_dispatch(t, e, k, "cuda", dropped=0.05, skew="zipf")
    check(*layer(d), layer_inputs(t, e, k, h, i, dtype, bias=False))


def test_float32_routing_weights():
    """Routing weights may stay in float32."""
    d = make_dispatch(200, 4, 2, "cuda")
    inputs = layer_inputs(200, 4, 2, 128, 128, torch.bfloat16)
    check(*layer(d), inputs | {"weights": inputs["weights"].float()})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_groups_do_not_touch_each_other(bad):
    """What is not finite in one expert's rows and weights stays there, forward and backward."""
    t, e, n, c = 700, 3, 320, 200
    ids = torch.arange(t)[:, None] * e // t
    d = make_dispatch(t, e, 1, "cuda", ids=ids)
    inputs = product_inputs(t, e, n, c, torch.bfloat16)
    spoilt = {name: value.clone() for name, value in inputs.items()}
    middle = (ids[:, 0] == 1).cuda()
    spoilt["x"][middle] = bad
    spoilt["weight"][1] = bad
    dout = torch.randn(t, 1, n, device="cuda", dtype=torch.bfloat16)
    spoilt_dout = dout.clone()
    spoilt_dout[middle] = bad
    function, _ = product(d)
    clean, dirty = run(function, inputs, inputs, dout), run(function, spoilt, spoilt, spoilt_dout)
    for name, others in (("out", ~middle), ("x", ~middle), ("weight", [0, 2]), ("bias", [0, 2])):
        assert torch.equal(clean[name][others], dirty[name][others]), name


@DTYPES
def test_same_bits(dtype):
    """Ten runs agree bit by bit, with more tiles than multiprocessors: a race would show."""
    t, e, k, h, i = 6000, 16, 2, 512, 384
    d = make_dispatch(t, e, k, "cuda", skew="zipf")
    inputs = layer_inputs(t, e, k, h, i, dtype)
    function, _ = layer(d)
    dout = torch.randn(t, h, device="cuda")
    first = run(function, inputs, inputs, dout)
    for _ in range(9):
        assert_same_bits(first, run(function, inputs, inputs, dout))


def test_overwriting_the_preactivation():
    """A backward pass that frees its graph writes over what it saved, with the same bits as one that does not."""
    d = make_dispatch(300, 4, 2, "cuda")
    leaves = {name: v.requires_grad_() for name, v in layer_inputs(300, 4, 2, 128, 200, torch.bfloat16).items()}
    function, _ = layer(d)
    out = function(**leaves)
    dout = torch.randn_like(out)
    kept = torch.autograd.grad(out, leaves.values(), dout, retain_graph=True)
    freed = torch.autograd.grad(out, leaves.values(), dout)
    assert all(torch.equal(a, b) for a, b in zip(kept, freed, strict=True))


def test_compiles_whole():
    """Traced whole, forward and backward, with a dynamic token count."""
    torch._dynamo.reset()

    def f(x, weight, ids):
        return gossamer.grouped_matmul(x.sin(), weight, gossamer.dispatch(ids, 4)).cos()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    with gossamer.backend("cuda"):
        for t in (40, 70):
            ids = torch.randint(4, (t, 2), device="cuda")
            inputs = product_inputs(t, 4, 64, 64, torch.bfloat16, bias=False)
            dout = torch.randn(t, 2, 64, device="cuda")
            actual = run(lambda ids=ids, **v: compiled(**v, ids=ids), inputs, inputs, dout)
            torch.testing.assert_close(actual, run(lambda ids=ids, **v: f(**v, ids=ids), inputs, inputs, dout))


def test_refusals_say_why():
    """Another dtype is refused in the public function, by name."""
    d = make_dispatch(10, 3, 2, "cuda")
    inputs = product_inputs(10, 3, 64, 64, torch.float32)
    function, _ = product(d)
    with pytest.raises(ValueError, match="cannot serve grouped_matmul on cuda:0: its kernels multiply float16"):
        function(**inputs)
