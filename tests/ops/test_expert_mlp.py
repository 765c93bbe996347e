"""gossamer.expert_mlp: the expert layer and its gradients against float64, in every activation and routing."""

import itertools

import pytest
import torch
from expert_mlp_inputs import (
    GRADIENT_OF,
    NAMES,
    SMALL,
    E,
    H,
    I,
    K,
    T,
    functions,
    make_inputs,
    small_dispatch,
    transposed,
)
from helpers import OperatorLog, assert_same_bits, check, check_capture, flat, make_dispatch, run, saved_tensors

import gossamer
from gossamer._activation import ACTIVATIONS, activate_reference
from gossamer.ops._weights import Weight
from gossamer.ops.expert_mlp import GRADIENTS, ExpertMlp, ExpertMlpBackward
from gossamer.testing import random_expert_ids


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_reference_is_the_formula(device, activation, interleaved):
    """The reference itself, against every token through every expert and a dense sum over experts."""
    activation = gossamer.Activation(activation, alpha=1.3, limit=0.8)
    ids = random_expert_ids(T, E, K, dropped=0.2)
    inputs = {k: v.double() for k, v in make_inputs(device, halves=activation.halves).items()}
    x, gate_up, down, weights, gate_up_bias, down_bias = inputs.values()
    hidden = torch.einsum("th,ewh->tew", x, gate_up) + gate_up_bias
    every = torch.einsum("tei,ehi->teh", activate_reference(hidden, activation, interleaved), down) + down_bias
    one_hot = torch.nn.functional.one_hot(ids, E + 1)[..., :E].to(every)
    expected = torch.einsum("teh,tke,tk->th", every, one_hot, weights)
    d = make_dispatch(T, E, K, device, ids=ids)
    _, reference = functions(d, backend="reference", activation=activation, interleaved=interleaved)
    torch.testing.assert_close(reference(**inputs), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_against_float64(kernel_backend, dtype, device, bias):
    """SwiGLU with dropped slots, with and without biases: the result and all gradients."""
    d = make_dispatch(T, E, K, device, dropped=0.2)
    check(*functions(d, backend=kernel_backend), make_inputs(device, dtype, bias=bias))


@pytest.mark.parametrize(
    ("activation", "interleaved"),
    [
        (name, interleaved)
        for name, (_, gated) in sorted(ACTIVATIONS.items())
        for interleaved in (False, True)[: 1 + gated]
    ],
)
def test_activations(kernel_backend, device, activation, interleaved):
    """Every activation, gate and up concatenated and interleaved; constants that clamp many values."""
    activation = gossamer.Activation(activation, alpha=1.3, limit=0.8)
    d = small_dispatch(device)
    pair = functions(d, backend=kernel_backend, activation=activation, interleaved=interleaved)
    check(*pair, make_inputs(device, **SMALL, halves=activation.halves))


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "clamped_swiglu", "relu2"])
def test_activations_in_16_bits(kernel_backend, device, activation):
    """Each kind of activation in float16, interleaved where it is gated."""
    gated = gossamer.Activation(activation).gated
    d = make_dispatch(T, E, K, device)
    pair = functions(d, backend=kernel_backend, activation=activation, interleaved=gated)
    check(*pair, make_inputs(device, torch.float16, halves=2 if gated else 1))


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "geglu_tanh", "clamped_swiglu"])
def test_large_preactivations(kernel_backend, device, activation):
    """Saturated activations keep finite and exact values and gradients."""
    inputs = make_inputs(device, **SMALL)
    inputs["gate_up"] = inputs["gate_up"] * 12
    # Few bits make the pre-activations exact: a steep activation would turn their rounding errors into a lottery.
    for name in ("x", "gate_up", "gate_up_bias"):
        inputs[name] = (inputs[name] * 8).round() / 8
    check(*functions(small_dispatch(device), backend=kernel_backend, activation=activation), inputs)


@pytest.mark.parametrize(
    "routing",
    [
        {"skew": "zipf"},
        {"skew": "one"},
        {"skew": "few"},
        # Few rows: the interpreter sums a long bias gradient one row after another, which a GPU does not.
        {"ids": torch.full((5, K), 4)},
        {"ids": torch.tensor([[1, 1, 0]]).expand(T, K)},
        {"ids": torch.full((T, K), E)},
    ],
    ids=["zipf", "one", "few", "all_on_one", "duplicates", "all_dropped"],
)
def test_routings(kernel_backend, device, routing):
    """Skewed groups, empty experts, everything on the last expert, one expert twice in a token, no live row."""
    d = make_dispatch(T, E, K, device, **routing)
    check(*functions(d, backend=kernel_backend), make_inputs(device, t=d.num_tokens))


@pytest.mark.parametrize(
    ("t", "e", "k", "h", "i"), [(1, 5, 3, 97, 47), (0, 5, 3, 97, 47), (13, 1, 1, 16, 32), (1, 1, 1, 1, 1)]
)
def test_sizes(kernel_backend, device, t, e, k, h, i):
    """One token, no token, one expert, one element."""
    d = make_dispatch(t, e, k, device)
    check(*functions(d, backend=kernel_backend), make_inputs(device, t=t, e=e, k=k, h=h, i=i))


@pytest.mark.parametrize(("h", "i"), [(1, 24), (24, 1)])
def test_sides_of_one(kernel_backend, dtype, device, h, i):
    """Weights with a side of one, whose rows and columns are both contiguous."""
    d = make_dispatch(40, 2, 2, device)
    inputs = make_inputs(device, dtype, t=40, e=2, k=2, h=h, i=i)
    # Signs make exact products: where H is 1, plain torch rounds one of them for a gradient of which kernels round I.
    inputs["down"] = inputs["down"].sign()
    check(*functions(d, backend=kernel_backend), inputs)


@pytest.mark.parametrize(("h", "i"), [(64, 128), (200, 40)])
def test_blocks(kernel_backend, dtype, device, h, i):
    """Sizes that blocks divide and more than one block of them, with groups longer than a tile."""
    d = make_dispatch(90, 2, 2, device, dropped=0.3)
    check(*functions(d, backend=kernel_backend), make_inputs(device, dtype, t=90, e=2, k=2, h=h, i=i, bias=False))


@pytest.mark.parametrize(("h", "o", "i"), [(97, 40, 47), (33, 130, 19)])
def test_results_of_another_width(kernel_backend, dtype, device, h, o, i):
    """W2 with fewer and with more rows than x has columns, over several chunks of an expert's rows."""
    d = make_dispatch(150, 2, 2, device, dropped=0.2)
    check(*functions(d, backend=kernel_backend), make_inputs(device, dtype, t=150, e=2, k=2, h=h, o=o, i=i))


def test_results_of_another_width_compile(kernel_backend, device):
    d = small_dispatch(device)
    f, _ = functions(d, backend=kernel_backend)
    inputs = make_inputs(device, **SMALL, o=21)
    dout = torch.randn(SMALL["t"], 21, device=device)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, inputs, inputs, dout), run(f, inputs, inputs, dout))


@pytest.mark.parametrize(("h", "o"), [(0, 5), (5, 0)])
def test_no_columns(kernel_backend, device, h, o):
    """Rows of nothing have the biases as their pre-activation; results without columns give zero gradients."""
    d = small_dispatch(device)
    inputs = make_inputs(device, **SMALL | {"h": max(h, 1)}, o=o)
    inputs |= {"x": inputs["x"][:, :h], "gate_up": inputs["gate_up"][..., :h]}
    check(*functions(d, backend=kernel_backend), inputs)


def test_float32_weights_of_16_bit_tokens(kernel_backend, dtype, device):
    """Routing weights may stay in float32, and so does their gradient."""
    inputs = make_inputs(device, dtype) | {"weights": torch.rand(T, K, device=device)}
    results = check(*functions(make_dispatch(T, E, K, device), backend=kernel_backend), inputs)
    assert results["weights"].dtype == torch.float32 and results["out"].dtype == dtype


def test_dropped_slots_are_neither_read_nor_counted(kernel_backend, dtype, device):
    """NaN in all that only dropped slots or idle experts touch leaves every result finite, theirs zero."""
    ids = random_expert_ids(T, 3, K, dropped=0.3)
    ids[ids == 3] = E
    ids[4] = E
    dead = (ids == E).to(device)
    inputs = make_inputs(device, dtype)
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        inputs[name][3:] = float("nan")
    inputs["x"][4] = float("nan")
    inputs["weights"][dead] = float("nan")
    dout = torch.randn(T, H, device=device)
    dout[4] = float("nan")
    function, _ = functions(make_dispatch(T, E, K, device, ids=ids), backend=kernel_backend)
    results = run(function, inputs, inputs, dout)
    for name, value in results.items():
        assert torch.isfinite(value).all(), name
        if name not in ("out", "x", "weights"):
            assert not value[3:].any(), name
    assert not results["out"][4].any() and not results["x"][4].any() and not results["weights"][dead].any()


@pytest.mark.parametrize("bias", [False, True])
def test_each_gradient_alone(kernel_backend, device, bias):
    """With all others frozen one gradient is computed, with the same bits, and no memory made for others."""
    d = small_dispatch(device)
    inputs = make_inputs(device, **SMALL, bias=bias)
    function, _ = functions(d, backend=kernel_backend)
    dout = torch.randn(SMALL["t"], SMALL["h"], device=device)
    every = run(function, inputs, inputs, dout)
    for needed in inputs:
        with OperatorLog() as log:
            one = run(function, inputs, [needed], dout)
        assert torch.equal(one[needed], every[needed]), needed
        (_, arguments, results) = next(c for c in log.calls if c[0].startswith("expert_mlp_backward"))
        assert arguments["needs"] == [GRADIENT_OF[needed]]
        assert [bool(r.numel()) for r in results] == [name == GRADIENT_OF[needed] for name in GRADIENTS]


def test_same_bits_twice(kernel_backend, dtype, device):
    """Two runs agree bit by bit."""
    inputs = make_inputs(device, dtype)
    function, _ = functions(make_dispatch(T, E, K, device, skew="zipf"), backend=kernel_backend)
    dout = torch.randn(T, H, device=device)
    assert_same_bits(run(function, inputs, inputs, dout), run(function, inputs, inputs, dout))


def test_batch_position(kernel_backend, dtype, device):
    """Permuting the tokens permutes the rows of the result and of the token gradients, bits kept."""
    t = 40
    ids = random_expert_ids(t, E, K, skew="zipf", dropped=0.1)
    inputs = make_inputs(device, dtype, t=t)
    dout = torch.randn(t, H, device=device)
    function, _ = functions(make_dispatch(t, E, K, device, ids=ids), backend=kernel_backend)
    first = run(function, inputs, ["x", "weights"], dout)
    order = torch.randperm(t)
    function, _ = functions(make_dispatch(t, E, K, device, ids=ids[order]), backend=kernel_backend)
    moved = run(function, inputs | {n: inputs[n][order] for n in ("x", "weights")}, ["x", "weights"], dout[order])
    assert_same_bits(moved, {name: value[order] for name, value in first.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_have_the_bits_of_many(dtype):
    """Native products read weights in place for few rows and from panels for many; a row's bits are the same."""
    h, i, many = 300, 150, 40  # sums of several segments, and columns that do not fill the last group
    inputs = make_inputs("cpu", dtype, t=many, e=2, k=1, h=h, i=i)
    dout = torch.randn(many, h)

    def first_rows(rows):
        ids = torch.ones(rows, 1, dtype=torch.long)
        function, _ = functions(make_dispatch(rows, 2, 1, "cpu", ids=ids), backend="native")
        few = inputs | {name: inputs[name][:rows] for name in ("x", "weights")}
        return run(function, few, ["x", "weights"], dout[:rows])

    all_rows = first_rows(many)
    for rows in (1, 4, 5, 8, 9, 12, 13, 17):
        assert_same_bits(first_rows(rows), {name: value[:rows] for name, value in all_rows.items()})


@pytest.mark.parametrize("h", [1024, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_gradients_beyond_the_caches(dtype, h):
    """Native kernels write them past the caches, whole lines and parts of lines, with the bits of smaller gradients."""
    tokens, used, e, i = 200, 4, 32, 264
    torch.manual_seed(0)
    x, dy = (torch.randn(tokens, h).to(dtype) for _ in range(2))
    gate_up, down = (torch.randn(used, n, c).to(dtype) / c**0.5 for n, c in ((2 * i, h), (h, i)))
    weights = torch.rand(tokens, 1).to(dtype)
    ids = torch.tensor([[0]] * 160 + [[1]] * 30 + [[2]] * 7 + [[3]] * 3)
    gradients = []
    for experts in (used, e):
        leaves = [torch.zeros(experts, *w.shape[1:], dtype=dtype) for w in (gate_up, down)]
        for leaf, w in zip(leaves, (gate_up, down), strict=True):
            leaf[:used] = w
            leaf.requires_grad_()
        with gossamer.backend("native"):
            gossamer.expert_mlp(x, *leaves, gossamer.dispatch(ids, experts), weights).backward(dy)
        gradients.append([leaf.grad for leaf in leaves])
    assert all(g.nbytes > 16 << 20 for g in gradients[1])
    for small, large in zip(*gradients, strict=True):
        assert torch.equal(large[:used], small) and not large[used:].any()


def test_backward_twice(kernel_backend, device):
    """A kept graph gives the same gradients again, though a graph that is freed may be overwritten."""
    leaves = {name: v.requires_grad_() for name, v in make_inputs(device, **SMALL).items()}
    function, _ = functions(small_dispatch(device), backend=kernel_backend)
    out = function(**leaves)
    dout = torch.randn_like(out)
    gradients = [torch.autograd.grad(out, leaves.values(), dout, retain_graph=True) for _ in range(2)]
    gradients.append(torch.autograd.grad(out, leaves.values(), dout))
    for later in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], later, strict=True))


def test_saves_only_x_and_preactivation(kernel_backend, dtype, device):
    """The graph keeps x, the (R, 2I) pre-activation and the small routing: no (R, H) and no (R, I) tensor."""
    inputs = {name: v.requires_grad_() for name, v in make_inputs(device, dtype).items()}
    function, _ = functions(make_dispatch(T, E, K, device), backend=kernel_backend)
    parameters = [v for name, v in inputs.items() if name not in ("x", "weights")]
    saved = saved_tensors(lambda: function(**inputs), parameters)
    shapes = sorted(tuple(t.shape) for t in saved if t.dtype.is_floating_point)
    assert shapes == sorted([(T, H), (T, K), (T * K, 2 * I)])
    routing = 4 * (2 * T * K + E + 1)
    assert sum(t.nbytes for t in saved) <= dtype.itemsize * (T * H + T * K + T * K * 2 * I) + routing


def test_saves_nothing_without_gradients(kernel_backend, device):
    """Under no_grad, and with everything frozen, no pre-activation is made and nothing kept."""
    inputs = {name: v.requires_grad_() for name, v in make_inputs(device, **SMALL).items()}
    function, _ = functions(small_dispatch(device), backend=kernel_backend)
    frozen = {name: v.detach() for name, v in inputs.items()}
    for call in (
        torch.no_grad()(lambda: function(**inputs)),
        torch.inference_mode()(lambda: function(**inputs)),
        lambda: function(**frozen),
    ):
        assert not saved_tensors(call, [])
        with OperatorLog() as log:
            call()
        (_, arguments, (_, preact, *_)) = log.named("expert_mlp")[0]
        assert arguments["save"] is False and preact.numel() == 0


@pytest.mark.parametrize(
    ("activation", "interleaved"), [("swiglu", False), ("swiglu", True), ("clamped_swiglu", True), ("gelu_tanh", False)]
)
def test_gradcheck(device, activation, interleaved):
    """Finite differences in float64, on the CPU's kernels."""
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    inputs = make_inputs(device, torch.float64, t=4, e=3, k=2, h=6, i=5, halves=gossamer.Activation(activation).halves)
    d = make_dispatch(4, 3, 2, device, dropped=0.2)
    function, _ = functions(d, backend="native", activation=activation, interleaved=interleaved)
    leaves = [v.requires_grad_() for v in inputs.values()]
    assert torch.autograd.gradcheck(lambda *v: function(**dict(zip(NAMES, v, strict=True))), leaves)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(kernel_backend, device, backend):
    """Routing, dispatch and layer traced whole, forward and backward, with a dynamic token count."""
    torch._dynamo.reset()
    e, k, h, i = 3, 2, 24, 17

    def f(ids, x, **rest):
        return gossamer.expert_mlp(x.sin(), dispatch=gossamer.dispatch(ids, e), **rest).cos()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    with gossamer.backend(kernel_backend):
        for count, t in enumerate((9, 14, 5) if backend == "aot_eager" else (9,)):
            ids = random_expert_ids(t, e, k, dropped=0.1).to(device)
            inputs = make_inputs(device, t=t, e=e, k=k, h=h, i=i)
            dout = torch.randn(t, h, device=device)
            with torch._dynamo.config.patch(error_on_recompile=count > 0):
                actual = run(lambda ids=ids, **v: compiled(ids, **v), inputs, inputs, dout)
            torch.testing.assert_close(actual, run(lambda ids=ids, **v: f(ids, **v), inputs, inputs, dout))


def test_compiles_without_gradients(kernel_backend, device):
    """The inference graph, traced whole under no_grad."""
    torch._dynamo.reset()
    inputs = make_inputs(device, **SMALL)
    ids = random_expert_ids(SMALL["t"], SMALL["e"], SMALL["k"]).to(device)

    @torch.no_grad()
    def f(**inputs):
        return gossamer.expert_mlp(dispatch=gossamer.dispatch(ids, SMALL["e"]), **inputs)

    with gossamer.backend(kernel_backend):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(**inputs), f(**inputs))


@pytest.mark.parametrize(("activation", "bias", "layout"), [("swiglu", True, "plain"), ("relu", False, "transposed")])
def test_operators_are_well_formed(kernel_backend, device, activation, bias, layout):
    """Schemas, mutation, fake kernels, autograd registration and traceability of the three operators."""
    halves = gossamer.Activation(activation).halves
    t, e, k, h, i = 3, 2, 2, 7, 5
    inputs = make_inputs(device, t=t, e=e, k=k, h=h, i=i, halves=halves, bias=bias)
    if layout == "transposed":
        inputs |= {name: transposed(inputs[name]) for name in ("gate_up", "down")}
    d = make_dispatch(t, e, k, device)

    def forward(needs_grad):
        v = {name: inputs[name].detach().requires_grad_(needs_grad) if name in inputs else None for name in NAMES}
        gate_up = Weight(v["gate_up"], bias=v["gate_up_bias"])
        down = Weight(v["down"], bias=v["down_bias"])
        form = gossamer.Activation(activation)
        return ExpertMlp(v["x"], gate_up, down, d.groups, v["weights"], form, False, needs_grad)

    for save in (False, True):
        torch.library.opcheck(torch.ops.gossamer.expert_mlp.default, flat(forward(save), kernel_backend))
    dy = torch.randn(t, h, device=device)
    every = [GRADIENT_OF[name] for name in inputs]
    for operator, needs in (
        ("expert_mlp_backward", every),
        ("expert_mlp_backward_", every),
        ("expert_mlp_backward", ["gate_up.data", "weights", *(["down.bias"] if bias else [])]),
    ):
        preact = torch.randn(t * k, halves * i, device=device)
        args = ExpertMlpBackward(dy, forward(False), preact, None, None, needs)
        torch.library.opcheck(getattr(torch.ops.gossamer, operator).default, flat(args, kernel_backend))


def test_autocast(kernel_backend, device):
    """Under autocast all but the routing weights are taken in its dtype; gradients come in the inputs' dtypes."""
    inputs = make_inputs(device, **SMALL)
    function, _ = functions(small_dispatch(device), backend=kernel_backend)
    dout = torch.randn(SMALL["t"], SMALL["h"], device=device)
    with torch.autocast(device, dtype=torch.float16):
        actual = run(function, inputs, inputs, dout)
    cast = {name: v if name == "weights" else v.half() for name, v in inputs.items()}
    expected = run(function, cast, inputs, dout)
    assert actual["out"].dtype == torch.float16
    assert_same_bits(actual, {name: v if name == "out" else v.float() for name, v in expected.items()})


def arguments(**change):
    inputs = make_inputs("cpu")
    return inputs | {"dispatch": make_dispatch(T, E, K, "cpu")} | change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(T, H, 1)}, ValueError, r"x must have shape \(T, H\)"),
        ({"x": torch.randn(T + 1, H)}, ValueError, r"x must have shape \(T, H\) = \(13, any\), got \(14, 97\)"),
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.ones(T, H, dtype=torch.int64)}, TypeError, "x must be float32, float16, bfloat16"),
        ({"gate_up": torch.randn(E, I, H)}, ValueError, r"gate_up must have shape \(E, 2I, H\) = \(5, 94, 97\)"),
        (
            {"gate_up": torch.randn(E, 2 * I, H), "activation": "relu"},
            ValueError,
            r"gate_up must have shape \(E, I, H\)",
        ),
        ({"gate_up": torch.randn(E, 2 * I, H).half()}, TypeError, "gate_up must have the dtype of x"),
        ({"gate_up": torch.randn(E, 2 * I, H, device="meta")}, ValueError, "gate_up must be on the device of x"),
        (
            {"down": torch.randn(E, I, H)},
            ValueError,
            r"down must have shape \(E, O, I\) = \(5, any, 47\), got \(5, 47, 97\)",
        ),
        ({"down": torch.randn(E + 1, H, I)}, ValueError, r"down must have shape \(E, O, I\)"),
        ({"weights": torch.rand(T, K + 1)}, ValueError, r"weights must have shape \(T, K\) = \(13, 3\), got \(13, 4\)"),
        ({"weights": torch.rand(T * K)}, ValueError, "weights must have shape"),
        ({"weights": torch.rand(T, K).double()}, TypeError, "weights must have the dtype of x, torch.float32, or"),
        ({"weights": [1.0]}, TypeError, "weights must be a torch.Tensor, got list"),
        ({"gate_up_bias": torch.randn(E, I)}, ValueError, r"gate_up_bias must have shape \(E, 2I\)"),
        ({"down_bias": torch.randn(H)}, ValueError, r"down_bias must have shape \(E, O\)"),
        ({"down_bias": torch.randn(E, H).half()}, TypeError, "down_bias must have the dtype of x"),
        ({"activation": "swish"}, ValueError, "activation must be one of .* got 'swish'"),
        ({"activation": torch.nn.SiLU()}, TypeError, "activation must be a str or gossamer.Activation, got SiLU"),
        ({"dispatch": torch.zeros(T, K)}, TypeError, "dispatch must be a gossamer.Dispatch, got Tensor"),
    ],
)
def test_errors(change, error, message):
    """Each documented error names the argument, the rule and the value."""
    with pytest.raises(error, match=message):
        gossamer.expert_mlp(**arguments(**change))


def test_activation_limit_must_be_positive():
    """The clamped SwiGLU's limit is checked when it is made."""
    with pytest.raises(ValueError, match="activation limit must be positive, got 0"):
        gossamer.Activation("clamped_swiglu", limit=0)


def test_meta_tensors():
    """Shapes without data, on the meta device."""
    inputs = {name: v.to("meta") for name, v in make_inputs("cpu", torch.bfloat16).items()}
    d = gossamer.dispatch(torch.empty(T, K, dtype=torch.int64, device="meta"), E)
    out = gossamer.expert_mlp(dispatch=d, **inputs)
    assert out.is_meta and out.shape == (T, H) and out.dtype == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bias", [False, True])
def test_no_synchronisation_and_graph_capture(kernel_backend, device, bias):
    """Clean under sync debugging, forward and backward, and right when replayed on another routing."""
    ids = random_expert_ids(T, E, K).to(device)
    leaves = {name: v.requires_grad_() for name, v in make_inputs(device, torch.bfloat16, bias=bias).items()}
    dout = torch.randn(T, H, device=device, dtype=torch.bfloat16)

    def step():
        y = gossamer.expert_mlp(dispatch=gossamer.dispatch(ids, E), **leaves)
        return y, *torch.autograd.grad(y, leaves.values(), dout)

    with gossamer.backend(kernel_backend):
        check_capture(step, lambda: ids.copy_(random_expert_ids(T, E, K, seed=5, dropped=0.3).to(device)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("h", "i", "t"), [(256, 192, 700), (2880, 360, 64), (130, 66, 300)])
def test_gpu_tiles(kernel_backend, dtype, device, h, i, t):
    """Sizes that reach the large tiles and the descriptors of a GPU, and sizes that no descriptor may cover."""
    for interleaved, stored in itertools.product([False, True], [False, True]):
        inputs = make_inputs(device, dtype, t=t, e=4, k=2, h=h, i=i)
        if stored:
            inputs |= {name: transposed(inputs[name]) for name in ("gate_up", "down")}
        d = make_dispatch(t, 4, 2, device, skew="zipf", dropped=0.1)
        check(*functions(d, backend=kernel_backend, interleaved=interleaved), inputs)


@pytest.mark.parametrize("retain_graph", [None, False, True])
def test_a_recorded_backward_pass_says_that_it_has_no_derivative(device, retain_graph):
    """The error is the same if the graph is freed, so that saved tensors could be overwritten."""
    inputs = make_inputs(device)
    function, _ = functions(make_dispatch(T, E, K, device), backend="native" if device == "cpu" else "triton")
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    y = function(**leaves)
    (dx,) = torch.autograd.grad(y.sum(), leaves["x"], create_graph=True, retain_graph=retain_graph)
    with pytest.raises(NotImplementedError):
        dx.square().sum().backward()


@pytest.mark.parametrize(("interleaved", "error"), [(True, ValueError), ("no", TypeError)])
def test_interleaved_needs_a_gate(device, interleaved, error):
    with pytest.raises(error, match="interleaved"):
        gossamer.activate(torch.randn(3, 8, device=device), "silu", interleaved=interleaved)
    inputs = make_inputs(device, halves=1)
    function, _ = functions(
        make_dispatch(T, E, K, device), backend="reference", activation="silu", interleaved=interleaved
    )
    with pytest.raises(error, match="interleaved"):
        function(**inputs)
