"""gossamer.expert_mlp with low-rank factors: results, gradients, and what the updates cost in memory."""

import pytest
import torch
from expert_mlp_inputs import GRADIENT_OF as GRADIENTS_OF_PLAIN
from helpers import OperatorLog, assert_same_bits, check, check_capture, flat, make_dispatch, run, saved_tensors

import gossamer
from gossamer._activation import ACTIVATIONS
from gossamer.ops._weights import Weight
from gossamer.ops.expert_mlp import GRADIENTS, ExpertMlp, ExpertMlpBackward, expert_mlp_reference
from gossamer.testing import random_expert_ids

# Odd, so that no block divides them.
T, E, K, H, I = 13, 5, 3, 97, 47
# Ranks of the two products.
RANKS = 5, 3
# Where the kernels' edges are not the point; rows enough that no single sum decides an error.
SMALL = {"t": 24, "e": 2, "k": 2, "h": 33, "i": 19, "ranks": (8, 6)}
FACTORS = ("a1", "b1", "a2", "b2")
GRADIENT_OF = GRADIENTS_OF_PLAIN | {"a1": "gate_up.a", "b1": "gate_up.b", "a2": "down.a", "b2": "down.b"}
SCALE = 0.5


def functions(dispatch, *, backend, **form):
    """The function under test and its reference, closed over the dispatch and the form, of all float inputs."""

    def pairs(a1=None, b1=None, a2=None, b2=None):
        return {
            "gate_up_lora": None if a1 is None else (a1, b1),
            "down_lora": None if a2 is None else (a2, b2),
            "lora_scale": SCALE,
        }

    def split(inputs):
        return {k: v for k, v in inputs.items() if k not in FACTORS}, pairs(
            **{k: v for k, v in inputs.items() if k in FACTORS}
        )

    def function(**inputs):
        plain, lora = split(inputs)
        with gossamer.backend(backend):
            return gossamer.expert_mlp(dispatch=dispatch, **plain, **lora, **form)

    def reference(**inputs):
        plain, lora = split(inputs)
        return expert_mlp_reference(dispatch=dispatch, **plain, **lora, **form)

    return function, reference


def make_inputs(
    device, dtype=torch.float32, *, t=T, e=E, k=K, h=H, o=None, i=I, ranks=RANKS, halves=2, bias=True, which=FACTORS
):
    """Inputs by name, each product of unit size and, times the scale, each update of half that."""
    wide, (r1, r2), o = halves * i, ranks, h if o is None else o
    inputs = {
        "x": torch.randn(t, h, device=device),
        "gate_up": torch.randn(e, wide, h, device=device) / h**0.5,
        "down": torch.randn(e, o, i, device=device) / i**0.5,
        "weights": torch.rand(t, k, device=device) * 2 / k,
        "gate_up_bias": torch.randn(e, wide, device=device),
        "down_bias": torch.randn(e, o, device=device),
        "a1": torch.randn(e, r1, h, device=device) / h**0.5,
        "b1": torch.randn(e, wide, r1, device=device) / r1**0.5,
        "a2": torch.randn(e, r2, i, device=device) / i**0.5,
        "b2": torch.randn(e, o, r2, device=device) / r2**0.5,
    }
    kept = (n for n in inputs if (bias or not n.endswith("bias")) and (n not in FACTORS or n in which))
    return {n: inputs[n].to(dtype) for n in kept}


def small_dispatch(device, **routing):
    return make_dispatch(SMALL["t"], SMALL["e"], SMALL["k"], device, **routing)


def test_reference_is_the_merged_layer(device):
    """The reference itself against the plain layer with W + scale·B·A for its weights, in float64."""
    d = make_dispatch(T, E, K, device, dropped=0.2)
    inputs = {k: v.double() for k, v in make_inputs(device).items()}
    merged = {k: v for k, v in inputs.items() if k not in FACTORS}
    merged["gate_up"] = merged["gate_up"] + SCALE * inputs["b1"] @ inputs["a1"]
    merged["down"] = merged["down"] + SCALE * inputs["b2"] @ inputs["a2"]
    _, reference = functions(d, backend="reference")
    torch.testing.assert_close(reference(**inputs), expert_mlp_reference(dispatch=d, **merged))


@pytest.mark.parametrize("bias", [False, True])
def test_against_float64(kernel_backend, dtype, device, bias):
    """Both updates with dropped slots, with and without biases: the result and all ten gradients."""
    d = make_dispatch(T, E, K, device, dropped=0.2)
    check(*functions(d, backend=kernel_backend), make_inputs(device, dtype, bias=bias))


def test_double(device):
    """float64 on the CPU keeps float64."""
    if device == "cuda":
        pytest.skip("float64 is computed on the CPU alone")
    function, reference = functions(make_dispatch(T, E, K, device), backend="native")
    inputs = {k: v.double() for k, v in make_inputs(device).items()}
    dout = torch.randn(T, H, dtype=torch.float64)
    actual, expected = run(function, inputs, inputs, dout), run(reference, inputs, inputs, dout)
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("which", [("a1", "b1"), ("a2", "b2")], ids=["gate_up", "down"])
def test_one_update_alone(kernel_backend, device, which):
    """Either product may have an update without the other."""
    d = small_dispatch(device, dropped=0.1)
    check(*functions(d, backend=kernel_backend), make_inputs(device, **SMALL, which=which))


@pytest.mark.parametrize(
    ("activation", "interleaved"),
    [("swiglu", True), ("clamped_swiglu", True), ("clamped_swiglu", False), ("gelu", False)],
)
def test_activations(kernel_backend, device, activation, interleaved):
    """Updates meet gate and up rows in every order of the pre-activation, and layers without a gate."""
    form = gossamer.Activation(activation, alpha=1.3, limit=0.8)
    pair = functions(small_dispatch(device), backend=kernel_backend, activation=form, interleaved=interleaved)
    check(*pair, make_inputs(device, **SMALL, halves=2 if ACTIVATIONS[activation][1] else 1))


@pytest.mark.parametrize(
    "routing",
    [{"skew": "few"}, {"ids": torch.full((5, K), 4)}, {"ids": torch.full((T, K), E)}],
    ids=["few", "one", "none"],
)
def test_routings(kernel_backend, device, routing):
    """Experts without rows, everything on one, no live row: factors of idle experts get zero gradients."""
    d = make_dispatch(T, E, K, device, **routing)
    actual = check(*functions(d, backend=kernel_backend), make_inputs(device, t=d.num_tokens))
    idle = d.counts == 0
    assert all(not actual[name][idle].any() for name in FACTORS)


@pytest.mark.parametrize(
    ("t", "e", "k", "h", "i", "ranks"),
    [
        (1, 5, 3, 97, 47, RANKS),
        (0, 5, 3, 97, 47, RANKS),
        (1, 1, 1, 1, 1, (1, 1)),
        (70, 2, 1, 64, 40, (16, 16)),
        (9, 2, 1, 80, 90, (70, 33)),
    ],
)
def test_sizes(kernel_backend, device, t, e, k, h, i, ranks):
    """One token, no token, one element; more rows than a tile or a chunk; ranks of several blocks."""
    inputs = make_inputs(device, t=t, e=e, k=k, h=h, i=i, ranks=ranks, bias=False)
    check(*functions(make_dispatch(t, e, k, device, dropped=0.1), backend=kernel_backend), inputs)


def test_results_of_another_width(kernel_backend, device):
    """W2 and its update with other rows than x has columns."""
    d = make_dispatch(SMALL["t"], SMALL["e"], SMALL["k"], device)
    check(*functions(d, backend=kernel_backend), make_inputs(device, **SMALL, o=58))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_chunks(dtype):
    """An expert whose rows come in several chunks of the native kernel, so that its gradients are summed over them."""
    inputs = make_inputs("cpu", dtype, t=700, e=1, k=1, h=40, i=24, bias=False)
    check(*functions(make_dispatch(700, 1, 1, "cpu"), backend="native"), inputs)


def test_layouts(kernel_backend, device):
    """Weights and factors are read where they lie, transposed or sliced; the output gradient may be broadcast."""
    inputs = make_inputs(device, **SMALL)
    for name in ("gate_up", "down", "a1", "b1"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    shape, (t, h) = inputs["a2"].shape, inputs["x"].shape
    inputs["a2"] = torch.randn(shape[0], 2 * shape[1], 2 * shape[2], device=device)[:, ::2, ::2] / shape[2] ** 0.5
    inputs["b2"] = inputs["b2"][:1].expand(inputs["b2"].shape)
    function, reference = functions(small_dispatch(device, dropped=0.1), backend=kernel_backend)
    check(function, reference, inputs)
    dout = torch.randn(1, h, device=device).expand(t, h)
    actual, expected = run(function, inputs, inputs, dout), run(reference, inputs, inputs, dout)
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needed", [[*FACTORS], ["a1"], ["x", "b2"], ["gate_up", "down"]], ids="-".join)
def test_frozen_subsets(kernel_backend, device, needed):
    """Only wanted gradients are computed, frozen weights' never, and they have the same bits as beside all others."""
    function, _ = functions(small_dispatch(device, dropped=0.1), backend=kernel_backend)
    inputs = make_inputs(device, **SMALL)
    dout = torch.randn(inputs["x"].shape, device=device)
    every = run(function, inputs, inputs, dout)
    with OperatorLog() as log:
        some = run(function, inputs, needed, dout)
    for name in needed:
        assert torch.equal(some[name], every[name]), name
    (_, call, results) = log.calls[-1]
    names = {GRADIENT_OF[name] for name in needed}
    assert set(call["needs"]) == names
    assert [r.numel() > 0 for r in results] == [name in names for name in GRADIENTS]


def test_mixed_dtypes(kernel_backend, device):
    """float32 factors beside float16 weights, one pair alone too: rounded for the products, their gradients not."""
    inputs = make_inputs(device, torch.float16, **SMALL)
    full = make_inputs(device, **SMALL)
    function, _ = functions(small_dispatch(device), backend=kernel_backend)
    dout = torch.randn(inputs["x"].shape, device=device).half()
    for wide in (FACTORS, ("a2", "b2")):
        mixed = inputs | {name: full[name] for name in wide}
        actual = run(function, mixed, mixed, dout)
        half = {name: value.half() for name, value in mixed.items()}
        expected = run(function, half, half, dout)
        for name, value in actual.items():
            assert value.dtype == (torch.float32 if name in wide else torch.float16)
            assert torch.equal(value.half(), expected[name]), name
        assert not torch.equal(actual["a2"], expected["a2"].float())


@pytest.mark.parametrize("quantized", [False, True])
def test_a_scale_beyond_the_dtype_overflows(device, quantized):
    """The update overflows to infinity in fused kernels and in separate products alike."""
    gate_up, down = torch.ones(2, 8, 32, device=device), torch.ones(2, 32, 4, device=device)
    stacks = [gossamer.QuantizedExpertWeight.quantize(w, "int8") if quantized else w.half() for w in (gate_up, down)]
    ids, x = torch.tensor([[0], [1], [0]], device=device), torch.ones(3, 32, device=device).half()
    factors = torch.ones(2, 1, 4, device=device).half(), torch.ones(2, 32, 1, device=device).half()
    weights = torch.ones(3, 1, device=device)
    y = gossamer.expert_mlp(x, *stacks, gossamer.dispatch(ids, 2), weights, down_lora=factors, lora_scale=1e6)
    assert y.dtype == torch.float16 and y.isposinf().all()


def test_float32_factors_of_float64(device):
    """The CPU takes them beside float64 weights, too; their gradients are float64 sums, rounded once."""
    if device != "cpu":
        pytest.skip("float64 is computed on the CPU alone")
    inputs = {k: v if k in FACTORS else v.double() for k, v in make_inputs(device, **SMALL).items()}
    function, _ = functions(small_dispatch(device), backend="native")
    dout = torch.randn(inputs["x"].shape, dtype=torch.float64)
    found = run(function, inputs, inputs, dout)
    wide = run(function, {k: v.double() for k, v in inputs.items()}, inputs, dout)
    for name, value in found.items():
        assert value.dtype == (torch.float32 if name in FACTORS else torch.float64)
        assert torch.equal(value, wide[name].to(value.dtype)), name


def test_zero_updates_keep_the_layers_bits(kernel_backend, dtype, device):
    """With B = 0 the result is that of the layer without updates, bit for bit."""
    d = small_dispatch(device, dropped=0.1)
    inputs = make_inputs(device, dtype, **SMALL)
    inputs["b1"].zero_()
    inputs["b2"].zero_()
    plain = {k: v for k, v in inputs.items() if k not in FACTORS}
    function, _ = functions(d, backend=kernel_backend)
    assert torch.equal(function(**inputs), function(**plain))


def test_same_bits(kernel_backend, dtype, device):
    """Two runs agree bit by bit, and permuting the tokens permutes the result's and x gradient's rows, bits kept."""
    ids = random_expert_ids(40, E, K, skew="zipf", dropped=0.1)
    inputs = make_inputs(device, dtype, t=40, h=33, i=19, ranks=(3, 2))
    dout = torch.randn(40, 33, device=device).to(dtype)
    function, _ = functions(make_dispatch(40, E, K, device, ids=ids), backend=kernel_backend)
    first = run(function, inputs, inputs, dout)
    assert_same_bits(first, run(function, inputs, inputs, dout))
    order = torch.randperm(40)
    function, _ = functions(make_dispatch(40, E, K, device, ids=ids[order]), backend=kernel_backend)
    moved = run(function, inputs | {k: inputs[k][order] for k in ("x", "weights")}, ["x"], dout[order])
    # A token's experts are summed in the order of its slots or of the experts, which no permutation changes.
    assert torch.equal(moved["out"], first["out"][order]) and torch.equal(moved["x"], first["x"][order])


def test_what_is_kept(kernel_backend, device):
    """Beyond the plain layer's x and pre-activation, the backward pass keeps two tensors of (R, r)."""
    inputs = {k: v.requires_grad_() for k, v in make_inputs(device).items()}
    d = make_dispatch(T, E, K, device)
    function, _ = functions(d, backend=kernel_backend)
    plain = {k: v for k, v in inputs.items() if k not in FACTORS}
    parameters = list(inputs.values())

    def shapes(given):
        saved = saved_tensors(lambda: function(**given), parameters)
        return sorted(tuple(t.shape) for t in saved if t.is_floating_point())

    assert shapes(plain) == [(T * K, 2 * I)]
    assert shapes(inputs) == sorted([(T * K, 2 * I), (T * K, RANKS[0]), (T * K, RANKS[1])])


def test_second_backward_is_right(kernel_backend, device):
    """A graph kept for a second backward pass gives the same gradients again."""
    inputs = {k: v.requires_grad_() for k, v in make_inputs(device, **SMALL).items()}
    function, _ = functions(small_dispatch(device), backend=kernel_backend)
    y = function(**inputs)
    dout = torch.randn_like(y)
    first = torch.autograd.grad(y, list(inputs.values()), dout, retain_graph=True)
    second = torch.autograd.grad(y, list(inputs.values()), dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_operators_are_sound(kernel_backend, device):
    """Schemas, fake kernels and autograd registrations hold, whole and with one update beside frozen weights."""
    d = small_dispatch(device)
    for which, bias, grad in ((FACTORS, True, True), (("a2", "b2"), False, False)):
        inputs = make_inputs(device, **SMALL, bias=bias, which=which)

        def layer(given, save=True):
            gate_up = Weight(given["gate_up"], a=given.get("a1"), b=given.get("b1"), factor=SCALE)
            down = Weight(given["down"], a=given.get("a2"), b=given.get("b2"), factor=SCALE)
            gate_up = gate_up._replace(bias=given.get("gate_up_bias"))
            down = down._replace(bias=given.get("down_bias"))
            form = gossamer.Activation("swiglu", 1.0, 1.0)
            return ExpertMlp(given["x"], gate_up, down, d.groups, given["weights"], form, False, save)

        given = {name: value.requires_grad_(grad) for name, value in inputs.items()}
        torch.library.opcheck(torch.ops.gossamer.expert_mlp.default, flat(layer(given), kernel_backend))
        low = [
            torch.randn((d.num_rows, r), device=device) if f in inputs else None
            for r, f in zip(SMALL["ranks"], ("a1", "a2"), strict=True)
        ]
        preact = torch.randn(d.num_rows, 2 * SMALL["i"], device=device)
        dy = torch.randn(inputs["x"].shape, device=device)
        needs = [GRADIENT_OF[name] for name in inputs if grad or name in FACTORS]
        forward = layer({name: value.detach() for name, value in given.items()})
        args = ExpertMlpBackward(dy, forward, preact, *low, needs)
        operators = torch.ops.gossamer.expert_mlp_backward, torch.ops.gossamer.expert_mlp_backward_
        torch.library.opcheck(operators[0 if grad else 1].default, flat(args, kernel_backend))


def test_compiles_whole(device):
    """Router to result compiles in one graph, forward and backward, with equal bits."""
    inputs = make_inputs(device)
    leaves = {k: v.requires_grad_(k in FACTORS) for k, v in inputs.items()}

    def step(ids, leaves):
        function, _ = functions(gossamer.dispatch(ids, E), backend="native" if device == "cpu" else "triton")
        return function(**leaves)

    def layer(ids, leaves):
        lora = {"gate_up_lora": (leaves["a1"], leaves["b1"]), "down_lora": (leaves["a2"], leaves["b2"])}
        plain = {k: v for k, v in leaves.items() if k not in FACTORS}
        return gossamer.expert_mlp(dispatch=gossamer.dispatch(ids, E), **plain, **lora, lora_scale=SCALE)

    ids, dout = random_expert_ids(T, E, K).to(device), torch.randn(T, H, device=device)
    results = []
    for f in (step, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = f(ids, leaves)
        results.append((y, *torch.autograd.grad(y, [leaves[k] for k in FACTORS], dout)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate_up_lora": torch.ones(3)}, TypeError, r"gate_up_lora must be a pair \(a, b\) of tensors, got Tensor"),
        (
            {"down_lora": (torch.ones(E, 2, H), torch.ones(E, H, 2))},
            ValueError,
            r"down_lora\[0\] must have shape \(E, r, C\) = \(5, any, 47\)",
        ),
        (
            {"gate_up_lora": (torch.ones(E, 2, H), torch.ones(E, 2 * I, 3))},
            ValueError,
            r"gate_up_lora\[1\] must have shape \(E, N, r\) = \(5, 94, 2\)",
        ),
        (
            {"down_lora": (torch.ones(E, 0, I), torch.ones(E, H, 0))},
            ValueError,
            r"in \[1, min\(N, C\)\] with N=97, C=47",
        ),
        ({"down_lora": (torch.ones(E, 48, I), torch.ones(E, H, 48))}, ValueError, "got 48"),
        ({"lora_scale": torch.ones(2)}, ValueError, r"lora_scale must be one number, got a tensor of shape \(2,\)"),
        (
            {"down_lora": (torch.ones(E, 2, I).half(), torch.ones(E, H, 2).half())},
            TypeError,
            "must have the dtype of x",
        ),
    ],
)
def test_errors(change, error, message):
    """Each documented error names the argument, the rule and the value."""
    plain = make_inputs("cpu", which=())
    with pytest.raises(error, match=message):
        gossamer.expert_mlp(dispatch=make_dispatch(T, E, K, "cpu"), **plain, **change)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("h", "i", "t", "r"), [(256, 192, 700, 16), (2880, 360, 64, 8), (130, 66, 300, 70)])
def test_gpu_tiles(kernel_backend, dtype, device, h, i, t, r):
    """Sizes that reach the large tiles, the descriptors and the split sums of a GPU."""
    for interleaved in (False, True):
        inputs = make_inputs(device, dtype, t=t, e=4, k=2, h=h, i=i, ranks=(r, r if r < i else 16))
        d = make_dispatch(t, 4, 2, device, skew="zipf", dropped=0.1)
        check(*functions(d, backend=kernel_backend, interleaved=interleaved), inputs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graph_capture(kernel_backend, device):
    """Right when captured and replayed on another routing."""
    ids = random_expert_ids(T, E, K).to(device)
    leaves = {name: v.requires_grad_() for name, v in make_inputs(device, torch.bfloat16).items()}
    dout = torch.randn(T, H, device=device, dtype=torch.bfloat16)

    def step():
        function, _ = functions(gossamer.dispatch(ids, E), backend=kernel_backend)
        y = function(**leaves)
        return y, *torch.autograd.grad(y, leaves.values(), dout)

    check_capture(step, lambda: ids.copy_(random_expert_ids(T, E, K, seed=5, dropped=0.3).to(device)))


@pytest.mark.parametrize("rank", [16, 17, 31])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_has_the_same_bits_beside_few_others_and_many(rank, dtype):
    """Eight rows of an expert lie in other lanes than nine; an update is added to the same sums in the same order."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    x, gate_up, down = normal(9, 32), normal(1, 32, 32, scale=0.2), normal(1, 32, 32, scale=0.2)
    loras = {n: (normal(1, rank, 32, scale=0.2), normal(1, 32, rank, scale=0.2)) for n in ("gate_up_lora", "down_lora")}

    def rows(count):
        ids = torch.zeros(count, 1, dtype=torch.int64)
        weights = torch.ones(count, 1, dtype=dtype)
        return gossamer.expert_mlp(
            x[:count], gate_up, down, gossamer.dispatch(ids, 1), weights, activation="silu", **loras
        )

    whole = rows(9)
    for count in (1, 2, 5, 8):
        assert torch.equal(rows(count), whole[:count])
