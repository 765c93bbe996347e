"""gossamer.low_rank_linear: the product and its gradients against float64, its dropout mask bit by bit."""

import itertools

import pytest
import torch
from helpers import OperatorLog, assert_same_bits, check, huge_storage, run, saved_tensors

import gossamer
from gossamer.ops._philox import drop, keep_mask
from gossamer.ops._records import Layout
from gossamer.ops._weights import Weight
from gossamer.ops.low_rank import GRADIENTS, LowRank, LowRankBackward, low_rank_linear_reference

# Odd, so that no block divides them, and more rows and columns than one tile of the interpreted kernels.
M, N, C, R = 37, 135, 43, 5
NAMES = ("x", "weight", "a", "b", "bias")


def make_inputs(device, dtype=torch.float32, *, m=M, n=N, c=C, r=R, factor_dtype=None, bias=True):
    inputs = {
        "x": torch.randn(m, c, device=device).to(dtype),
        "weight": (torch.randn(n, c, device=device) / c**0.5).to(dtype),
        "a": (torch.randn(r, c, device=device) / c**0.5).to(factor_dtype or dtype),
        "b": torch.randn(n, r, device=device).to(factor_dtype or dtype),
    }
    return inputs | ({"bias": torch.randn(n, device=device).to(dtype)} if bias else {})


def functions(backend, weight=None, **options):
    """The function under test and its reference, of the inputs; ``weight`` where it is none of them."""
    options = {"scale": 0.7} | options

    def function(x, a, b, bias=None, **given):
        with gossamer.backend(backend):
            return gossamer.low_rank_linear(x, given.get("weight", weight), a, b, bias=bias, **options)

    def reference(x, a, b, bias=None, **given):
        seed = options.get("seed")
        seed = None if seed is None else torch.tensor([seed], device=x.device)
        return low_rank_linear_reference(x, given.get("weight", weight), a, b, bias=bias, **{**options, "seed": seed})

    return function, reference


def test_by_hand(any_backend, device):
    """A small example worked out on paper, forward and backward."""
    x, w = [[1.0, 2], [3, -1]], [[1.0, 0], [0, 1], [1, 1]]
    inputs = {"x": x, "weight": w, "a": [[1.0, -1]], "b": [[1.0], [0], [2]]}
    inputs = {name: torch.tensor(value, device=device) for name, value in inputs.items()}
    function, _ = functions(any_backend, scale=2.0)
    dy = torch.tensor([[1.0, 0, -1], [0, 1, 1]], device=device)
    found = run(function, inputs, ["x", "a", "b"], dy)
    assert found["out"].tolist() == [[-1, 2, -1], [11, -1, 18]]
    assert found["x"].tolist() == [[-2, 1], [5, -2]]
    assert found["a"].tolist() == [[10, -8]]
    assert found["b"].tolist() == [[-2], [8], [10]]


def test_scales_of_more_than_64_bits(any_backend, device):
    """They are floats to torch, in both directions."""
    inputs, found = make_inputs(device, m=3, n=5, c=7, r=2), []
    for scale in (2**63, float(2**63)):
        function, _ = functions(any_backend, scale=scale)
        found.append(run(function, inputs, ["x", "a", "b"], torch.ones(3, 5, device=device)))
    assert_same_bits(*found)
    with pytest.raises(ValueError, match="scale must fit a float, got an int of 2001 bits"):
        gossamer.low_rank_linear(**inputs, scale=2**2000)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_against_float64(kernel_backend, dtype, device, dropout):
    """The product and all gradients, with and without dropout."""
    options = {"dropout": dropout, "seed": 2**40 + 3} if dropout else {}
    check(*functions(kernel_backend, **options), make_inputs(device, dtype))


@pytest.mark.parametrize(
    ("m", "n", "c", "r"),
    [
        (1, 1, 1, 1),
        (1, 9, 7, 1),
        (0, 9, 7, 3),
        (20, 40, 600, 17),
        (33, 21, 30, 21),
        (20, 160, 150, 70),
        (3, 9, 2049, 3),
        (3, 3424, 9, 2),
        (600, 24, 40, 17),
    ],
    ids=["ones", "rank_1", "no_rows", "deep", "full_rank", "rank_over_a_block", "odd_width", "3424", "many_rows"],
)
def test_sizes(kernel_backend, device, m, n, c, r):
    """Ranks from one to the whole of the smaller side, widths that nothing divides, sums in several splits, no rows."""
    options = {"dropout": 0.2, "seed": 1} if n + c < 2000 else {}
    check(*functions(kernel_backend, **options), make_inputs(device, m=m, n=n, c=c, r=r))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ranks_and_columns_in_several_blocks(isa, dtype):
    """Columns of several groups, a sum over rows in several parts, a rank of several tiles."""
    check(*functions("native"), make_inputs("cpu", dtype, m=130, n=1030, c=1030, r=49))


@pytest.mark.parametrize("shape", [(C,), (2, 3, C)])
def test_leading_dimensions(kernel_backend, device, shape):
    """``x`` of one dimension and of three."""
    inputs = make_inputs(device) | {"x": torch.randn(shape, device=device)}
    assert check(*functions(kernel_backend), inputs)["out"].shape == (*shape[:-1], N)


def test_strides(kernel_backend, device):
    """Transposed, sliced and broadcast arguments, as GPT-2 stores its weights, and such output gradients."""
    inputs = make_inputs(device)
    function, reference = functions(kernel_backend)
    dy = torch.randn(M, N, device=device)
    strided = {
        "x": torch.randn(C, M, device=device).T,
        "weight": torch.randn(C, N, device=device).T / C**0.5,
        "a": torch.randn(C, R, device=device).T / C**0.5,
        "b": torch.randn(N, 2 * R, device=device)[:, ::2],
        "bias": torch.randn(2 * N, device=device)[::2],
    }
    check(function, reference, strided)
    check(function, reference, strided | {"x": torch.randn(M, 2 * C + 1, device=device)[:, 1::2]})
    for dout in (
        dy.T.contiguous().T,
        torch.randn(M, 2 * N, device=device)[:, ::2],
        dy[:1].expand(M, N),
        dy[:, :1].expand(M, N),
    ):
        plain = run(function, inputs, NAMES, dout.contiguous())
        assert_same_bits(run(function, inputs, NAMES, dout), plain)


@pytest.mark.parametrize("needs", [s for k in range(6) for s in itertools.combinations(NAMES, k)], ids="-".join)
def test_frozen_subsets(kernel_backend, device, needs):
    """Each set of wanted gradients gives the same bits as all do, and the work for the others is not done."""
    inputs = make_inputs(device, m=9, n=20, c=12, r=3)
    function, _ = functions(kernel_backend, dropout=0.2, seed=5)
    dy = torch.randn(9, 20, device=device)
    everything = run(function, inputs, NAMES, dy)
    with OperatorLog() as log:
        found = run(function, inputs, needs, dy)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found, {name: everything[name] for name in found}, **tolerance)
    calls = log.named("low_rank_linear_backward")
    assert len(calls) == bool(needs)
    for _, given, results in calls:
        assert [r.numel() > 0 for r in results] == [name in needs for name in NAMES]
        assert (given["s"] is not None) == ("b" in needs)
        assert (given["forward_weight_data"] is not None) == ("x" in needs)
        assert (given["forward_x"] is not None) == bool({"weight", "a"} & set(needs))


def test_saves_no_more_than_x_and_s(kernel_backend, device):
    """With W and bias frozen the graph keeps x, which is there anyway, and (M, r) values."""
    inputs = make_inputs(device)
    for name in ("x", "a", "b"):
        inputs[name].requires_grad_()
    function, _ = functions(kernel_backend, dropout=0.1, seed=3)
    saved = saved_tensors(lambda: function(**inputs), inputs.values())
    assert sorted(t.numel() for t in saved) == [1, M * R]
    assert saved_tensors(lambda: function(**{k: v.detach() for k, v in inputs.items()}), inputs.values()) == []


def test_same_bits_twice(kernel_backend, device):
    """Runs repeat bit by bit, and so does a second backward pass through one graph."""
    inputs = make_inputs(device, m=70, n=40)
    function, _ = functions(kernel_backend, dropout=0.2, seed=7)
    dy = torch.randn(70, 40, device=device)
    assert_same_bits(run(function, inputs, NAMES, dy), run(function, inputs, NAMES, dy))
    leaves = [inputs[name].detach().requires_grad_() for name in NAMES]
    y = function(**dict(zip(NAMES, leaves, strict=True)))
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, dy)
    assert all(map(torch.equal, first, second))


def test_float32_factors(kernel_backend, dtype, device):
    """Float32 factors on a 16-bit base: the product is of rounded ones, their gradients keep float32."""
    if dtype == torch.float32:
        pytest.skip("the base is of the factors' dtype")
    inputs = make_inputs(device, dtype, factor_dtype=torch.float32)
    found = check(*functions(kernel_backend), inputs)
    assert found["a"].dtype == found["b"].dtype == torch.float32
    assert not torch.equal(found["a"], found["a"].to(dtype).float())
    rounded = {k: v.to(dtype) for k, v in inputs.items()}
    function, _ = functions(kernel_backend)
    assert torch.equal(run(function, rounded)["out"], found["out"])


def test_float32_factors_of_float64(device):
    """The CPU takes them beside float64 activations, too; their gradients are float64 sums, rounded once."""
    if device != "cpu":
        pytest.skip("float64 is computed on the CPU alone")
    inputs = make_inputs(device, torch.float64, factor_dtype=torch.float32)
    function, _ = functions("native")
    dout = torch.randn(M, N, dtype=torch.float64)
    found = run(function, inputs, inputs, dout)
    wide = run(function, {k: v.double() for k, v in inputs.items()}, inputs, dout)
    for name, value in found.items():
        assert value.dtype == (torch.float32 if name in ("a", "b") else torch.float64)
        assert torch.equal(value, wide[name].to(value.dtype)), name


def test_rows_far_apart(kernel_backend, device):
    """Rows that lie more than 2³¹ elements apart."""
    stride = 2**31 + 8
    storage = huge_storage(stride + C, torch.float16, device)
    x = storage.as_strided((2, C), (stride, 1))
    x.copy_(torch.randn(2, C, device=device))
    check(*functions(kernel_backend), make_inputs(device, torch.float16) | {"x": x})


def test_philox_known_answers():
    """The words of the generator's authors for a counter and key of zeros, and of ones and zeros."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    seed = torch.tensor([0])
    for column, word in enumerate(words):
        assert keep_mask(seed, 1, 4, word / 2**32)[0, column]
        assert not keep_mask(seed, 1, 4, (word + 1) / 2**32)[0, column]


@pytest.mark.parametrize("seed", [0, -1, 2**62 + 12345])
def test_mask_is_one_on_every_backend(kernel_backend, device, seed):
    """Through identity factors the mask itself comes out, forward and backward, as the reference draws it."""
    rows, columns = 150, 21
    mask = torch.tensor([seed], device=device)
    expected = drop(torch.ones(rows, columns, device=device), 0.4, mask)
    eye = torch.eye(columns, device=device)
    x = torch.ones(rows, columns, device=device, requires_grad=True)
    a = eye.clone().requires_grad_()
    with gossamer.backend(kernel_backend):
        y = gossamer.low_rank_linear(x, torch.zeros_like(eye), a, eye, scale=1.0, dropout=0.4, seed=seed)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)
    dx, da = torch.autograd.grad(y.sum(), [x, a])
    torch.testing.assert_close(dx, expected, rtol=1e-6, atol=0)
    assert torch.equal(dx == 0, expected == 0)
    torch.testing.assert_close(da, expected.sum(0).expand(columns, columns), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.9])
def test_rate_of_dropout(dropout, device):
    """Elements are dropped at the rate asked for, within five deviations, and rows and columns independently."""
    keep = keep_mask(torch.tensor([99], device=device), 512, 1024, dropout).double()
    assert abs(float(keep.mean()) - (1 - dropout)) < 5 * (dropout * (1 - dropout) / keep.numel()) ** 0.5
    noise = (keep - (1 - dropout)) / (dropout * (1 - dropout)) ** 0.5
    for shifted in (noise.roll(1, 0), noise.roll(1, 1), noise.roll(4, 1)):
        assert abs(float((noise * shifted).mean())) < 5 / keep.numel() ** 0.5


def test_seeds(any_backend, device):
    """A seed repeats its mask, as int or tensor; torch's generator gives one; without dropout none is used."""
    inputs = make_inputs(device, bias=False)

    def call(**options):
        with gossamer.backend(any_backend):
            return gossamer.low_rank_linear(*inputs.values(), scale=1.0, **options)

    one = call(dropout=0.5, seed=4)
    assert torch.equal(one, call(dropout=0.5, seed=torch.tensor([4], device=device)))
    assert not torch.equal(one, call(dropout=0.5, seed=5))
    torch.manual_seed(1)
    drawn = [call(dropout=0.5), call(dropout=0.5)]
    torch.manual_seed(1)
    assert torch.equal(drawn[0], call(dropout=0.5)) and not torch.equal(*drawn)
    assert torch.equal(call(), call(seed=8))


def quantized_weights(n, c):
    weight = torch.randn(n, c) / c**0.5
    return {
        "nf4": gossamer.NF4Weight.quantize(weight),
        "nf4_single": gossamer.NF4Weight.quantize(weight, block_size=32, double=False),
        "int8": gossamer.Int8Weight.quantize(weight),
        "fp8_rows": gossamer.Float8Weight.quantize(weight),
        "fp8": gossamer.Float8Weight.quantize(weight, per_row=False),
    }


def on_device(weight, device):
    tensors = {k: v.to(device) for k, v in vars(weight).items() if isinstance(v, torch.Tensor)}
    return type(weight)(**{**vars(weight), **tensors})


# Few rows over whole blocks; rows of half a block, rows that end inside one, and more than are decoded in the product.
@pytest.mark.parametrize(("m", "n", "c"), [(3, 47, 192), (20, 40, 96), (20, 33, 45), (260, 16, 64)])
@pytest.mark.parametrize("kind", ["nf4", "nf4_single", "int8", "fp8_rows", "fp8"])
def test_quantized(kernel_backend, dtype, device, kind, m, n, c):
    """Over each kind of frozen weight: the product and the gradients of all else."""
    weight = on_device(quantized_weights(n, c)[kind], device)
    inputs = make_inputs(device, dtype, m=m, n=n, c=c)
    del inputs["weight"]
    function, _ = functions(kernel_backend, weight)

    def reference(x, a, b, bias):
        return low_rank_linear_reference(x, weight.dequantize().to(x.dtype), a, b, scale=0.7, bias=bias)

    check(function, reference, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["nf4", "nf4_single", "int8", "fp8_rows", "fp8"])
def test_quantized_rows_do_not_depend_on_their_neighbours(isa, dtype, kind):
    """A row over codes has the same bits alone, among few rows and among many, with any number of threads."""
    if isa == "generic":
        pytest.skip("torch multiplies there, over a dense weight")
    weight, inputs = quantized_weights(70, 320)[kind], make_inputs("cpu", dtype, m=40, n=70, c=320)
    del inputs["weight"]
    function, _ = functions("native", weight)
    with torch.no_grad():
        whole = function(**inputs)
        for rows in (1, 2, 3, 8, 16, 17):
            assert torch.equal(function(**inputs | {"x": inputs["x"][:rows]}), whole[:rows])
        threads = torch.get_num_threads()
        torch.set_num_threads(3)
        assert torch.equal(function(**inputs), whole)
        assert torch.equal(function(**inputs | {"x": inputs["x"][:2]}), whole[:2])
        torch.set_num_threads(threads)


def test_quantized_in_float64(device):
    """The CPU takes quantised weights beside float64 activations, too."""
    weight = quantized_weights(6, 10)["nf4"]
    inputs = {k: v.double() for k, v in make_inputs("cpu", n=6, c=10, r=2).items() if k != "weight"}
    function, reference = functions("native", weight)
    torch.testing.assert_close(function(**inputs), reference(**inputs))


def test_quantized_layouts(kernel_backend, device):
    """Bytes of any strides, and NF4 in the shape of bitsandbytes."""
    inputs = make_inputs(device, n=12, c=20, bias=False)
    del inputs["weight"]
    kinds = {k: on_device(w, device) for k, w in quantized_weights(12, 20).items()}
    nf4, int8, fp8 = kinds["nf4"], kinds["int8"], kinds["fp8_rows"]
    for plain, other in (
        (nf4, type(nf4)(**{**vars(nf4), "packed": nf4.packed.view(-1, 1)})),
        (int8, type(int8)(int8.values.T.contiguous().T, int8.absmax)),
        (fp8, type(fp8)(fp8.values.T.contiguous().T, fp8.scale)),
    ):
        results = [run(functions(kernel_backend, w)[0], inputs, ["x"], torch.ones(M, 12)) for w in (plain, other)]
        assert_same_bits(*results)


def test_quantized_saves_its_bytes_alone(kernel_backend, device):
    """The backward pass decodes anew: no dense weight is kept."""
    weight = on_device(quantized_weights(40, 96)["nf4"], device)
    inputs = make_inputs(device, n=40, c=96)
    del inputs["weight"]
    inputs = {k: v.requires_grad_(k != "bias") for k, v in inputs.items()}
    own = [weight.data, *weight.state]
    saved = saved_tensors(lambda: functions(kernel_backend, weight)[0](**inputs), [*inputs.values(), *own])
    assert [tuple(t.shape) for t in saved] == [(M, R)]


@pytest.mark.parametrize("quantized", [False, True])
def test_opcheck(kernel_backend, device, quantized):
    """Torch's own checks of the operators, over float and quantised weights."""
    m, n, c, r = 6, 10, 8, 2
    inputs = make_inputs(device, m=m, n=n, c=c, r=r)
    x, weight, a, b, bias = inputs.values()
    operand = Weight(weight)
    if quantized:
        operand = on_device(gossamer.NF4Weight.quantize(weight.cpu()), device).operand()
    operand = operand._replace(a=a, b=b, factor=0.5)
    args = LowRank(x, operand, bias, torch.tensor([3], device=device), 0.2)
    operator, arguments = torch.ops.gossamer.low_rank_linear.default, (*Layout(LowRank).flatten(args), kernel_backend)
    torch.library.opcheck(operator, arguments)
    dy, s = torch.randn(m, n, device=device), torch.randn(m, r, device=device)
    wanted = [name for name in GRADIENTS if name != "bias" and not (quantized and name == "weight.data")]
    backward = LowRankBackward(dy, s, args, wanted, a.dtype)
    torch.library.opcheck(
        torch.ops.gossamer.low_rank_linear_backward.default,
        (*Layout(LowRankBackward).flatten(backward), kernel_backend),
        test_utils=("test_schema", "test_faketensor"),
    )
    x.requires_grad_(), a.requires_grad_()
    torch.library.opcheck(operator, arguments)


def test_compile(kernel_backend, device):
    """One graph, forward and backward, with the same bits; another number of rows needs no new one after the second."""
    function, _ = functions(kernel_backend, dropout=0.1, seed=2)
    graphs = []

    def counted(graph, example):
        graphs.append(graph)
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=counted))
    for rows in (M, M + 4, M + 9):
        inputs = make_inputs(device, m=rows)
        dy = torch.randn(rows, N, device=device)
        assert_same_bits(run(compiled, inputs, NAMES, dy), run(function, inputs, NAMES, dy))
    assert len(graphs) <= 4  # forward and backward, for one size and for any


def test_autocast(kernel_backend, device):
    """Under autocast the product is in its dtype and the gradients in the parameters'."""
    dtype = torch.float16 if kernel_backend == "triton" and device == "cpu" else torch.bfloat16
    inputs = {k: v.requires_grad_() for k, v in make_inputs(device).items()}
    function, _ = functions(kernel_backend)
    with torch.autocast(device, dtype):
        y = function(**inputs)
    assert y.dtype == dtype
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs.values())
    assert torch.equal(y, function(**{k: v.detach().to(dtype) for k, v in inputs.items()}))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_instruction_sets(isa, dropout):
    """The native kernels of every instruction set that this processor runs."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check(*functions("native", dropout=dropout, seed=6), make_inputs("cpu", dtype))
        # So many rows that threads share them, and not the weight's; then so many columns of it too, of odd sizes.
        check(*functions("native", dropout=dropout, seed=6), make_inputs("cpu", dtype, m=201, n=33, c=45))
        check(*functions("native", dropout=dropout, seed=6), make_inputs("cpu", dtype, m=99, n=35, c=211))
    # So many that on some processors the layer's own products are torch's.
    check(*functions("native", dropout=dropout, seed=6), make_inputs("cpu", m=260))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_update_of_torchs_product(monkeypatch, isa, dropout):
    """Where the layer's own product is torch's, the update is added to it by every instruction set.

    Rows that no unit or tile divides, columns that end within a block, at its end and within a vector, and ranks of one
    segment and of several.
    """
    from gossamer.cpu_kernels import low_rank

    monkeypatch.setattr(low_rank, "_by_torch", lambda dtype, rows, product: True)
    sizes = ((37, 135, 43, 5), (67, 96, 43, 7), (33, 112, 43, 16), (3, 20, 43, 1), (9, 301, 283, 280))
    for dtype, (m, n, c, r) in itertools.product((torch.float32, torch.float16, torch.bfloat16), sizes):
        check(*functions("native", dropout=dropout, seed=6), make_inputs("cpu", dtype, m=m, n=n, c=c, r=r))


BAD = {
    "x_type": ({"x": [1.0]}, TypeError, "x must be a torch.Tensor"),
    "x_scalar": ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape \(\.\.\., C\), got \(\)"),
    "x_int": ({"x": torch.ones(2, 4, dtype=torch.int64)}, TypeError, "x must be float32"),
    "weight_type": ({"weight": "w"}, TypeError, "weight must be a torch.Tensor, NF4Weight"),
    "weight_shape": ({"weight": torch.ones(3, 5)}, ValueError, r"weight must have shape \(N, C\) = \(any, 4\)"),
    "weight_dtype": ({"weight": torch.ones(3, 4).half()}, TypeError, "weight must have the dtype of x"),
    "a_shape": ({"a": torch.ones(2, 3)}, ValueError, r"a must have shape \(r, C\) = \(any, 4\)"),
    "b_shape": ({"b": torch.ones(3, 1)}, ValueError, r"b must have shape \(N, r\) = \(3, 2\)"),
    "rank_0": ({"a": torch.ones(0, 4), "b": torch.ones(3, 0)}, ValueError, r"rank of a and b must be in \[1, min"),
    "rank_4": ({"a": torch.ones(4, 4), "b": torch.ones(3, 4)}, ValueError, "got 4"),
    "factors": ({"a": torch.ones(2, 4).half()}, TypeError, "b must have the dtype of a"),
    "half": ({"a": torch.ones(2, 4).half(), "b": torch.ones(3, 2).half()}, TypeError, "a and b must have the dtype"),
    "bias_shape": ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(N,\) = \(3\)"),
    "bias_dtype": ({"bias": torch.ones(3).half()}, TypeError, "bias must have the dtype of x"),
    "scale_type": ({"scale": "2"}, TypeError, "scale must be a number, got '2'"),
    "scale_grad": ({"scale": torch.tensor(2.0, requires_grad=True)}, ValueError, "scale must be a number, .* requires"),
    "dropout": ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    "seed_type": ({"seed": "s"}, TypeError, "seed must be an int, a tensor or None"),
    "seed_size": ({"seed": 2**63}, ValueError, "seed must fit 64 bits"),
    "seed_tensor": ({"seed": torch.tensor([1, 2])}, ValueError, "seed must be an int, or one int64"),
}


def test_no_gradient_from_behind(kernel_backend, device):
    """If what follows passes no gradient back, the operator passes none on."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    inputs = {name: tensor.requires_grad_() for name, tensor in make_inputs(device).items()}
    function, _ = functions(kernel_backend)
    Nothing.apply(function(**inputs)).sum().backward()
    assert all(tensor.grad is None for tensor in inputs.values())


def test_a_scale_in_a_tensor_is_its_number(any_backend, device):
    """A scale may be a tensor on the CPU, as a model's settings may be."""
    x, weight, a, b = (torch.randn(shape, device=device) for shape in ((5, 6), (7, 6), (2, 6), (7, 2)))
    with gossamer.backend(any_backend):
        expected = gossamer.low_rank_linear(x, weight, a, b, scale=0.5)
        assert torch.equal(gossamer.low_rank_linear(x, weight, a, b, scale=torch.tensor(0.5)), expected)
        with pytest.raises(ValueError, match="scale must be a number or a tensor on the CPU, got one on meta"):
            gossamer.low_rank_linear(x, weight, a, b, scale=torch.tensor(0.5, device="meta"))


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(any_backend, device, name):
    """What is wrong is said before anything runs, with the argument, the rule and the values."""
    changed, error, message = BAD[name]
    good = {"x": torch.ones(2, 4), "weight": torch.ones(3, 4), "a": torch.ones(2, 4), "b": torch.ones(3, 2)}
    arguments = good | {"scale": 1.0} | changed
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with gossamer.backend(any_backend), pytest.raises(error, match=message):
        gossamer.low_rank_linear(**arguments)
