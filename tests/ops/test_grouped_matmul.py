"""gossamer.grouped_matmul: products and gradients against float64 in every form, layout and routing."""

import itertools

import pytest
import torch
from helpers import (
    OperatorLog,
    assert_same_bits,
    check,
    check_capture,
    flat,
    huge_storage,
    make_dispatch,
    run,
    saved_tensors,
)

import gossamer
from gossamer.ops._weights import Weight
from gossamer.ops.grouped_matmul import GroupedDweight, GroupedMatmul, grouped_matmul_reference
from gossamer.testing import random_expert_ids

# Odd, so that no block divides them.
T, E, K, C, N = 13, 5, 3, 97, 47
FORMS = list(itertools.product([False, True], repeat=2))


def functions(dispatch, *, backend, **form):
    """The function under test and its reference, closed over the dispatch, of x, weight and bias."""

    def function(x, weight, bias=None):
        with gossamer.backend(backend):
            return gossamer.grouped_matmul(x, weight, dispatch, bias=bias, **form)

    def reference(x, weight, bias=None):
        return grouped_matmul_reference(x, weight, dispatch, bias=bias, **form)

    return function, reference


def make_inputs(device, dtype=torch.float32, *, x_rows=T, e=E, n=N, c=C, bias=True):
    inputs = {
        "x": torch.randn(x_rows, c, device=device),
        "weight": torch.randn(e, n, c, device=device) / c**0.5,
        "bias": torch.randn(e, n, device=device),
    }
    return {k: v.to(dtype) for k, v in inputs.items() if bias or k != "bias"}


def test_reference_is_the_formula(device):
    """The reference itself, against one dense product of every row with every expert, in all four forms."""
    ids = random_expert_ids(T, E, K, dropped=0.2)
    d = make_dispatch(T, E, K, device, ids=ids)
    inputs = {k: v.double() for k, v in make_inputs(device).items()}
    x, weight, bias = inputs.values()
    live = (ids < E).to(device)
    every = torch.einsum("tc,enc->ten", x, weight) + bias
    slots = every.gather(1, ids.clamp(max=E - 1).to(device)[..., None].expand(-1, -1, N)) * live[..., None]
    sorted_rows = slots.reshape(-1, N)[d.slots.long()]
    for x_grouped, y_grouped in FORMS:
        xs = x[d.slots.long() // K] if x_grouped else x
        y = grouped_matmul_reference(xs, weight, d, bias=bias, x_grouped=x_grouped, y_grouped=y_grouped)
        torch.testing.assert_close(y, sorted_rows if y_grouped else slots)


@pytest.mark.parametrize(("x_grouped", "y_grouped"), FORMS)
def test_forms(kernel_backend, dtype, device, x_grouped, y_grouped):
    """Token or sorted order on either side, with a bias and dropped slots: the product and all gradients."""
    d = make_dispatch(T, E, K, device, dropped=0.2)
    inputs = make_inputs(device, dtype, x_rows=T * K if x_grouped else T)
    check(*functions(d, backend=kernel_backend, x_grouped=x_grouped, y_grouped=y_grouped), inputs)


@pytest.mark.parametrize(
    "routing",
    [
        {"skew": "zipf"},
        {"skew": "one"},
        {"skew": "few"},
        {"ids": torch.full((T, K), 4)},
        {"ids": torch.tensor([[1, 1, 0]]).expand(T, K)},
        {"ids": torch.full((T, K), E)},
    ],
    ids=["zipf", "one", "few", "all_on_one", "duplicates", "all_dropped"],
)
def test_routings(kernel_backend, device, routing):
    """Skewed groups, empty experts, everything on the last expert, one expert twice in a token, no live row."""
    check(*functions(make_dispatch(T, E, K, device, **routing), backend=kernel_backend), make_inputs(device))


@pytest.mark.parametrize(
    ("t", "e", "k", "c", "n"), [(1, 5, 3, 97, 47), (0, 5, 3, 97, 47), (13, 1, 1, 16, 64), (1, 1, 1, 1, 1)]
)
def test_sizes(kernel_backend, device, t, e, k, c, n):
    """One token, no token, one expert, one element."""
    d = make_dispatch(t, e, k, device)
    check(*functions(d, backend=kernel_backend), make_inputs(device, x_rows=t, e=e, n=n, c=c))


@pytest.mark.parametrize(("c", "n"), [(64, 128), (200, 40), (8, 200)])
def test_blocks(kernel_backend, dtype, device, c, n):
    """Sizes that blocks divide and more than one block of them, with groups longer than a tile."""
    t = 90
    d = make_dispatch(t, 3, 2, device, skew="zipf")
    check(*functions(d, backend=kernel_backend), make_inputs(device, dtype, x_rows=t, e=3, n=n, c=c, bias=False))


def strided_weight(layout, device, dtype):
    if layout == "transposed":
        return (torch.randn(E, C, N, device=device) / C**0.5).to(dtype).transpose(1, 2)
    if layout == "sliced":
        return (torch.randn(E, 2 * N, C + 3, device=device) / C**0.5).to(dtype)[:, ::2, 1:-2]
    if layout == "expert_inside":
        return (torch.randn(N, E, C, device=device) / C**0.5).to(dtype).transpose(0, 1)
    if layout == "shared":
        return (torch.randn(1, N, C, device=device) / C**0.5).to(dtype).expand(E, N, C)
    return (torch.randn(E, N, 2 * C, device=device) / C**0.5).to(dtype)[..., ::2]


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expert_inside", "shared", "every_second"])
def test_weight_layouts(kernel_backend, dtype, device, layout):
    """Weights are read where they lie, whatever their strides."""
    inputs = make_inputs(device, dtype) | {"weight": strided_weight(layout, device, dtype)}
    results = check(*functions(make_dispatch(T, E, K, device), backend=kernel_backend), inputs)
    assert results["weight"].shape == (E, N, C)


def test_gradient_of_transposed_weight_is_not_copied(kernel_backend, device):
    """The gradient of transposed storage comes in that storage's layout."""
    weight = strided_weight("transposed", device, torch.float32)
    function, _ = functions(make_dispatch(T, E, K, device), backend=kernel_backend)
    with OperatorLog() as log:
        run(function, make_inputs(device) | {"weight": weight}, ["weight"], torch.randn(T, K, N, device=device))
    dweight = log.named("grouped_matmul_dweight")[0][2][0]
    assert dweight.stride() == weight.stride()


@pytest.mark.parametrize(("x_grouped", "y_grouped"), FORMS)
def test_strided_rows_and_gradients(kernel_backend, device, x_grouped, y_grouped):
    """Transposed, sliced and broadcast x, a sliced bias, and a broadcast output gradient."""
    d = make_dispatch(T, E, K, device, dropped=0.1)
    rows = T * K if x_grouped else T
    inputs = make_inputs(device)
    form = {"x_grouped": x_grouped, "y_grouped": y_grouped}
    function, reference = functions(d, backend=kernel_backend, **form)
    for x in (
        torch.randn(C, rows, device=device).t(),
        torch.randn(rows, 2 * C + 1, device=device)[:, 1::2],
        torch.randn(1, C, device=device).expand(rows, C),
    ):
        strided = inputs | {"x": x, "bias": torch.randn(E, 2 * N, device=device)[:, ::2]}
        check(function, reference, strided)
        shape = reference(**strided).shape
        dout = torch.randn(1, *shape[1:], device=device).expand(shape)
        torch.testing.assert_close(run(function, strided, strided, dout), run(reference, strided, strided, dout))


def test_dropped_rows_are_neither_read_nor_counted(kernel_backend, dtype, device):
    """NaN in everything that only dropped slots or idle experts touch leaves every result finite, theirs zero."""
    ids = random_expert_ids(T, 3, K, dropped=0.3)
    ids[ids == 3] = E
    ids[4] = E
    d = make_dispatch(T, E, K, device, ids=ids)
    dead = (ids == E).to(device)
    for x_grouped, y_grouped in FORMS:
        inputs = make_inputs(device, dtype, x_rows=T * K if x_grouped else T)
        inputs["weight"][3:] = float("nan")
        inputs["bias"][3:] = float("nan")
        unread = slice(int(d.offsets[-1]), None) if x_grouped else 4
        inputs["x"][unread] = float("nan")
        dout = torch.randn((T * K, N) if y_grouped else (T, K, N), device=device, dtype=dtype)
        dead_out = torch.arange(T * K, device=device) >= d.offsets[-1] if y_grouped else dead
        dout[dead_out] = float("nan")
        function, _ = functions(d, backend=kernel_backend, x_grouped=x_grouped, y_grouped=y_grouped)
        results = run(function, inputs, inputs, dout)
        for name, value in results.items():
            assert torch.isfinite(value).all(), name
        assert not results["out"][dead_out].any() and not results["x"][unread].any()
        assert not results["weight"][3:].any() and not results["bias"][3:].any()


@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
def test_one_gradient_alone(kernel_backend, device, needed):
    """With the others frozen only the needed gradient is computed, and it has the same bits."""
    d = make_dispatch(T, E, K, device)
    inputs = make_inputs(device)
    function, _ = functions(d, backend=kernel_backend)
    dout = torch.randn(T, K, N, device=device)
    every = run(function, inputs, inputs, dout)
    with OperatorLog() as log:
        one = run(function, inputs, [needed], dout)
    if needed == "bias":
        torch.testing.assert_close(one["bias"], every["bias"])
    else:
        assert torch.equal(one[needed], every[needed])
    backward = [name for name, _, _ in log.calls][1:]
    assert backward == {"x": ["grouped_matmul", "gather_reduce"]}.get(needed, ["grouped_matmul_dweight"])


def test_same_bits(kernel_backend, dtype, device):
    """Two runs agree bit by bit, and permuting the tokens permutes the result's and x gradient's rows, bits kept."""
    ids = random_expert_ids(40, E, K, skew="zipf", dropped=0.1)
    inputs = make_inputs(device, dtype, x_rows=40)
    dout = torch.randn(40, K, N, device=device)
    function, _ = functions(make_dispatch(40, E, K, device, ids=ids), backend=kernel_backend)
    first = run(function, inputs, inputs, dout)
    assert_same_bits(first, run(function, inputs, inputs, dout))
    order = torch.randperm(40)
    function, _ = functions(make_dispatch(40, E, K, device, ids=ids[order]), backend=kernel_backend)
    moved = run(function, inputs | {"x": inputs["x"][order]}, ["x"], dout[order])
    assert torch.equal(moved["out"], first["out"][order])
    assert torch.equal(moved["x"], first["x"][order])


def test_backward_twice(kernel_backend, device):
    """A kept graph gives the same gradients again."""
    leaves = [v.requires_grad_() for v in make_inputs(device).values()]
    function, _ = functions(make_dispatch(T, E, K, device), backend=kernel_backend)
    out = function(*leaves)
    dout = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    second = torch.autograd.grad(out, leaves, dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_saves_only_x_and_routing(kernel_backend, device):
    """The graph keeps x and integers, nothing of R rows by C or N columns; without gradients nothing."""
    d = make_dispatch(T, E, K, device)
    inputs = {k: v.requires_grad_() for k, v in make_inputs(device).items()}
    function, _ = functions(d, backend=kernel_backend)
    parameters = [inputs["weight"], inputs["bias"]]
    saved = saved_tensors(lambda: function(**inputs), parameters)
    assert [t.shape for t in saved if t.dtype.is_floating_point] == [(T, C)]
    assert sum(t.nbytes for t in saved if not t.dtype.is_floating_point) <= 4 * (2 * T * K + E + 1)
    with torch.no_grad():
        assert not saved_tensors(lambda: function(**inputs), parameters)
    frozen_weight = {"x": inputs["x"], "weight": inputs["weight"].detach()}
    assert all(not t.dtype.is_floating_point for t in saved_tensors(lambda: function(**frozen_weight), parameters))


@pytest.mark.parametrize(("x_grouped", "y_grouped"), FORMS)
def test_gradcheck(device, x_grouped, y_grouped):
    """Finite differences in float64, on the CPU's kernels."""
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    d = make_dispatch(4, 3, 2, device, dropped=0.2)
    inputs = make_inputs(device, torch.float64, x_rows=8 if x_grouped else 4, e=3, n=5, c=7)
    function, _ = functions(d, backend="native", x_grouped=x_grouped, y_grouped=y_grouped)
    assert torch.autograd.gradcheck(function, [v.requires_grad_() for v in inputs.values()])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(kernel_backend, device, backend):
    """Dispatch and product traced whole, forward and backward, with a dynamic token count."""
    torch._dynamo.reset()
    n, c = 17, 24

    def f(x, weight, bias, ids):
        d = gossamer.dispatch(ids, E)
        y = gossamer.grouped_matmul(x, weight, d, bias=bias, y_grouped=True)
        return gossamer.grouped_matmul(y, weight[:, :, :n], d, x_grouped=True).relu()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    with gossamer.backend(kernel_backend):
        for i, t in enumerate((13, 29, 6) if backend == "aot_eager" else (13,)):
            ids = random_expert_ids(t, E, K, dropped=0.1).to(device)
            inputs = make_inputs(device, x_rows=t, n=n, c=c)
            dout = torch.randn(t, K, n, device=device)
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                actual = run(lambda ids=ids, **v: compiled(**v, ids=ids), inputs, inputs, dout)
            torch.testing.assert_close(actual, run(lambda ids=ids, **v: f(**v, ids=ids), inputs, inputs, dout))


@pytest.mark.parametrize("x_div", [0, 1, 2])
def test_operators_are_well_formed(kernel_backend, device, x_div):
    """Schemas, fake kernels, autograd registration and traceability of both operators."""
    t, e, k, n, c = 3, 2, 2, 5, 7
    d = make_dispatch(t, e, k, device, dropped=0.1)
    x, weight, bias = (
        v.requires_grad_() for v in make_inputs(device, x_rows=t if x_div == k else t * k, e=e, n=n, c=c).values()
    )
    if x_div == 1:
        weight = torch.randn(e, c, n, device=device).transpose(1, 2).requires_grad_()
    args = GroupedMatmul(x, Weight(weight, bias=bias), d.groups, x_div, True, False)
    torch.library.opcheck(torch.ops.gossamer.grouped_matmul.default, flat(args, kernel_backend))
    dy = torch.randn(t * k, n, device=device)
    for transposed, dy_div in ((False, 1), (True, 0)):
        args = GroupedDweight(x.detach(), dy, d.groups, x_div, dy_div, transposed, not transposed)
        torch.library.opcheck(torch.ops.gossamer.grouped_matmul_dweight.default, flat(args, kernel_backend))


def test_addresses_beyond_32_bits(kernel_backend, device):
    """Weights whose experts lie more than 2³¹ elements apart."""
    if kernel_backend == "triton" and device == "cpu":
        pytest.skip("the interpreter copies its arguments whole")
    stride = 2**30 + 64
    inputs = make_inputs(device, torch.float16, e=3, n=8, c=16, bias=False)
    flat = huge_storage(2 * stride + 8 * 16, torch.float16, device)
    weight = flat.as_strided((3, 8, 16), (stride, 16, 1))
    weight.copy_(inputs["weight"])
    d = make_dispatch(T, 3, 2, device)
    function, _ = functions(d, backend=kernel_backend)
    dout = torch.randn(T, 2, 8, device=device)
    far = run(function, inputs | {"weight": weight}, ["x"], dout)
    assert_same_bits(far, run(function, inputs, ["x"], dout))


def test_autocast(kernel_backend, device):
    """Under autocast the product is that of the cast operands, and gradients come in the inputs' dtypes."""
    d = make_dispatch(T, E, K, device)
    inputs = make_inputs(device)
    function, _ = functions(d, backend=kernel_backend)
    dout = torch.randn(T, K, N, device=device)
    with torch.autocast(device, dtype=torch.float16):
        actual = run(function, inputs, inputs, dout)
    expected = run(function, {k: v.half() for k, v in inputs.items()}, inputs, dout)
    assert actual["out"].dtype == torch.float16
    assert_same_bits(actual, {k: v if k == "out" else v.float() for k, v in expected.items()})


def arguments(**change):
    return {"x": torch.randn(T, C), "weight": torch.randn(E, N, C), "dispatch": make_dispatch(T, E, K, "cpu")} | change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(T, C, 1)}, ValueError, r"x must have shape \(T, C\) = \(13, 97\), got \(13, 97, 1\)"),
        ({"x": torch.randn(T + 1, C)}, ValueError, r"x must have shape \(T, C\)"),
        ({"x": torch.randn(T, C), "x_grouped": True}, ValueError, r"x must have shape \(R, C\) = \(39, 97\)"),
        ({"x": torch.randn(T, C + 1)}, ValueError, r"x must have shape"),
        ({"x": torch.ones(T, C, dtype=torch.int64)}, TypeError, "x must be float32, float16, bfloat16"),
        ({"weight": torch.randn(E + 1, N, C)}, ValueError, r"weight must have shape \(E, N, C\)"),
        ({"weight": torch.randn(N, C)}, ValueError, "weight must have shape"),
        ({"weight": torch.randn(E, N, C).half()}, TypeError, "weight must have the dtype of x, torch.float32"),
        (
            {"weight": torch.randn(E, N, C, device="meta")},
            ValueError,
            "weight must be on the device of x, cpu, got meta",
        ),
        ({"bias": torch.randn(N)}, ValueError, r"bias must have shape \(E, N\) = \(5, 47\), got \(47,\)"),
        ({"bias": torch.randn(E, N).double()}, TypeError, "bias must have the dtype of x"),
        ({"bias": torch.randn(E, N, device="meta")}, ValueError, "bias must be on the device of x"),
        ({"weight": [1.0]}, TypeError, "weight must be a torch.Tensor, got list"),
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"dispatch": torch.zeros(T, K)}, TypeError, "dispatch must be a gossamer.Dispatch, got Tensor"),
    ],
)
def test_errors(change, error, message):
    """Each documented error names the argument, the rule and the value."""
    with pytest.raises(error, match=message):
        gossamer.grouped_matmul(**arguments(**change))


def test_float64_is_for_the_cpu(device):
    """Triton's kernels name the dtypes they take."""
    d = make_dispatch(T, E, K, device)
    inputs = make_inputs(device, torch.float64)
    with gossamer.backend("triton"), pytest.raises(TypeError, match="or float64 on the CPU"):
        gossamer.grouped_matmul(inputs["x"], inputs["weight"], d)


def test_meta_tensors():
    """Shapes without data, on the meta device."""
    d = gossamer.dispatch(torch.empty(T, K, dtype=torch.int64, device="meta"), E)
    x, weight = torch.empty(T, C, device="meta"), torch.empty(E, N, C, device="meta")
    assert gossamer.grouped_matmul(x, weight, d).shape == (T, K, N)
    assert gossamer.grouped_matmul(x, weight, d, y_grouped=True).shape == (T * K, N)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_synchronisation_and_graph_capture(kernel_backend, device):
    """Clean under sync debugging, forward and backward, and right when replayed on another routing."""
    ids = random_expert_ids(T, E, K).to(device)
    leaves = [v.requires_grad_() for v in make_inputs(device, torch.bfloat16).values()]
    dout = torch.randn(T, K, N, device=device, dtype=torch.bfloat16)

    def step():
        x, weight, bias = leaves
        y = gossamer.grouped_matmul(x, weight, gossamer.dispatch(ids, E), bias=bias)
        return y, *torch.autograd.grad(y, leaves, dout)

    with gossamer.backend(kernel_backend):
        check_capture(step, lambda: ids.copy_(random_expert_ids(T, E, K, seed=5, dropped=0.3).to(device)))
