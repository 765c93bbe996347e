"""Products that round their rows to 8 bits beside quantised weights: the formula, its error, and its bits."""

import dataclasses

import pytest
import torch
from helpers import check, make_dispatch, run
from quantized_stacks import C, E, N, stack

import gossamer
from gossamer import QuantizedExpertWeight
from gossamer.nn import QuantizedLinear
from gossamer.ops._weights import WHOLE_FORMATS, round_rows
from gossamer.ops.expert_mlp import expert_mlp_reference
from gossamer.ops.grouped_matmul import grouped_matmul_reference

PRIMITIVE = "grouped_matmul"
K = 2


def rounded_by_hand(row, size):
    """The formula, a value at a time."""
    found = []
    for group in torch.tensor(row, dtype=torch.float32).split(size):
        largest = max(abs(float(v)) for v in group)
        inverse = torch.tensor(127.0) / torch.tensor(largest) if largest else torch.tensor(0.0)
        scale = torch.tensor(largest) * torch.tensor(1.0 / 127)
        found += [float(torch.round(v * inverse)) * float(scale) for v in group]
    return found


@pytest.mark.parametrize(("weight_format", "c", "size"), [("int4", 64, 32), ("mxfp4", 96, 32), ("int8", 150, 128)])
def test_rounded_rows_follow_the_formula(weight_format, c, size):
    """Groups of the weight, or of 128 columns and what is left of them; zero, tiny and boundless groups."""
    weight = stack(weight_format, "cpu", n=3, c=c).operand()
    x = torch.randn(4, c, generator=torch.Generator().manual_seed(3), dtype=torch.float32).double()
    x[1, :size], x[2, :size], x[2, 1], x[3, 1] = 0, 2.0**-110, -(2.0**-110), torch.inf
    found = round_rows(x, weight)
    assert found.dtype == torch.float64
    assert torch.equal(found[:2], torch.tensor([rounded_by_hand(r, size) for r in x[:2].tolist()], dtype=torch.float64))
    assert not found[2, :size].any() and found[3, :size].isnan().all() and found[3, size:].isfinite().all()
    step = x[0].float().split(size)[0].abs().amax().double() / 127
    assert (found[0, :size] - x[0, :size]).abs().max() <= step / 2 * (1 + 1e-5)


def product(backend, weight, dispatch, **form):
    def function(x, bias=None):
        with gossamer.backend(backend):
            return gossamer.grouped_matmul(x, weight, dispatch, bias=bias, **form)

    def reference(x, bias=None):
        return grouped_matmul_reference(x, weight, dispatch, bias=bias, **form)

    return function, reference


@pytest.mark.parametrize("weight_format", WHOLE_FORMATS)
def test_products(kernel_backend, dtype, weight_format, device):
    """Against float64 of the same codes, few rows an expert and many, with a bias and dropped slots."""
    weight = stack(weight_format, device, activations="int8")
    for t in (1, 9, 90) if kernel_backend == "native" else (9,):
        d = make_dispatch(t, E, K, device, dropped=0.2)
        inputs = {"x": torch.randn(t, C, device=device).to(dtype), "bias": torch.randn(E, N, device=device).to(dtype)}
        check(*product(kernel_backend, weight, d), inputs, needs=("x",))


@pytest.mark.parametrize(
    ("weight_format", "c", "options"), [("int8", 77, {}), ("int4", 256, {"group_size": 128}), ("mxfp4", 96, {})]
)
def test_instruction_sets_sum_whole_numbers_exactly(isa, weight_format, c, options, device):
    """Where scales are one every instruction set gives the whole numbers themselves, the extremes too."""
    weight = stack(weight_format, device, c=c, **options)
    codes = weight.data.view(torch.uint8)
    codes.random_(0, 256, generator=torch.Generator().manual_seed(5))
    codes[0, 0], codes[0, 1] = (0x80, 0x7F) if weight_format == "int8" else (0x00, 0xFF)
    one = torch.full_like(weight.scale, 127 if weight_format == "mxfp4" else 1)
    weight = QuantizedExpertWeight(weight.data, one, weight_format, "int8")
    for t in (1, 3, 5, 16, 17, 50):
        x = torch.randint(-127, 128, (t, c), generator=torch.Generator().manual_seed(t)).float()
        x[:, ::32] = 127  # the largest of each group, so that its scale is one
        ids = torch.zeros(t, 1, dtype=torch.int64)
        with gossamer.backend("native"):
            found = gossamer.grouped_matmul(x, weight, make_dispatch(t, E, 1, device, ids=ids))
        assert torch.equal(found[:, 0].double(), x.double() @ weight.dequantize(torch.float64)[0].T)


@pytest.mark.parametrize("weight_format", WHOLE_FORMATS)
def test_error_is_within_the_rounding_step(weight_format, device):
    """|y − exact| <= Σ |w|·s / 2, the bound that the documentation states."""
    weight = stack(weight_format, device)
    d = make_dispatch(40, E, 1, device)
    x = torch.randn(40, C, device=device) * torch.logspace(-3, 3, C, device=device)
    rounded = gossamer.grouped_matmul(x, dataclasses.replace(weight, activations="int8"), d).double()
    wide, exact = weight.dequantize(torch.float64), x.double()
    size = min(weight.group_size, 128)
    groups = torch.nn.functional.pad(x.double(), (0, -C % size)).unflatten(1, (-1, size))
    step = (groups.abs().amax(2) / 127).repeat_interleave(size, 1)[:, :C]
    offsets, rows = d.offsets.tolist(), d.slots.long()
    moved = 0.0
    for e in range(E):
        mine = rows[offsets[e] : offsets[e + 1]]
        error = (rounded[mine, 0] - exact[mine] @ wide[e].T).abs()
        bound = step[mine] @ wide[e].T.abs() / 2
        assert (error <= bound * (1 + 1e-4)).all()
        moved = max(moved, float((error / bound).max()) if mine.numel() else 0.0)
    assert moved > 0.01


@pytest.mark.parametrize("weight_format", WHOLE_FORMATS)
def test_same_bits(weight_format, device):
    """A row alone, among a few and among many has the same bits, whatever the number of threads."""
    if device != "cpu":
        pytest.skip("threads are the CPU's")
    weight = stack(weight_format, device, e=1, activations="int8")
    x = torch.randn(70, C, device=device)

    def rows(count):
        d = make_dispatch(count, 1, 1, device, ids=torch.zeros(count, 1, dtype=torch.int64))
        with gossamer.backend("native"):
            return gossamer.grouped_matmul(x[:count], weight, d)[:, 0]

    many, threads = rows(70), torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(rows(70), many)
    finally:
        torch.set_num_threads(threads)
    for count in (1, 2, 5, 16, 17, 40):
        assert torch.equal(rows(count), many[:count])


def test_gradients_are_those_of_the_weight_itself(kernel_backend, device):
    """The gradient of x is dy·W, as if x had not been rounded."""
    weight, d = stack("int4", device), make_dispatch(20, E, K, device, dropped=0.2)
    rounding = dataclasses.replace(weight, activations="int8")
    inputs = {"x": torch.randn(20, C, device=device), "bias": torch.randn(E, N, device=device)}
    dout = torch.randn(20, K, N, device=device)
    exact = run(product(kernel_backend, weight, d)[0], inputs, inputs, dout)
    found = run(product(kernel_backend, rounding, d)[0], inputs, inputs, dout)
    assert not torch.equal(found.pop("out"), exact.pop("out"))
    assert all(torch.equal(found[name], exact[name]) for name in inputs)


@pytest.mark.parametrize("formats", [("int4", "int4"), ("mxfp4", "int8"), ("int8", "fp8")], ids="-".join)
@pytest.mark.parametrize("t", [2, 90])
def test_layer(kernel_backend, formats, t, device):
    """The whole layer within the rounding of its inner activations, in both ways that it is computed."""
    h, i = 96, 64
    rounds = [{"activations": "int8"} if f in WHOLE_FORMATS else {} for f in formats]
    gate_up = stack(formats[0], device, n=2 * i, c=h, **rounds[0])
    down = stack(formats[1], device, n=h, c=i, **rounds[1])
    d = make_dispatch(t, E, K, device, dropped=0.2)
    x, weights = torch.randn(t, h, device=device), torch.rand(t, K, device=device)
    plain = (dataclasses.replace(w, activations="float") for w in (gate_up, down))
    exact = expert_mlp_reference(x.double(), *plain, d, weights)
    truth = expert_mlp_reference(x.double(), gate_up, down, d, weights)
    for wanted in (False, True):
        with gossamer.backend(kernel_backend):
            found = gossamer.expert_mlp(x.requires_grad_(wanted), gate_up, down, d, weights).detach().double()
        # An activation on the edge of two codes falls to either side: a few codes differ, each by one step of 127.
        assert (found - truth).norm() <= 2e-3 * truth.norm()
        assert 1e-3 * exact.norm() < (found - exact).norm() < 2e-2 * exact.norm()


@pytest.mark.parametrize("t", [1, 20, 300])
def test_linear(dtype_of_rows, t, device):
    """QuantizedLinear rounds its rows, in any number of them."""
    linear = torch.nn.Linear(C, N, device=device)
    layer = QuantizedLinear.from_linear(linear, "int4", activations="int8")
    layer.bias = torch.nn.Parameter(layer.bias.detach().to(dtype_of_rows))
    weight = layer.weight.weight().operand()

    def reference(x):
        return torch.nn.functional.linear(
            round_rows(x, weight),
            weight.dequantize(torch.float64)[0].to(torch.promote_types(x.dtype, torch.float32)),
            layer.bias.to(torch.promote_types(x.dtype, torch.float32)),
        ).to(x.dtype)

    check(layer, reference, {"x": torch.randn(t, C, device=device).to(dtype_of_rows)})


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64], ids=str)
def dtype_of_rows(request):
    return request.param


def test_compiles(device):
    """In one graph, with gradients, and the same as eager."""
    weight, d = stack("int8", device, activations="int8"), make_dispatch(20, E, K, device)
    x = torch.randn(20, C, device=device, requires_grad=True)
    call = lambda x: gossamer.grouped_matmul(x, weight, d)  # noqa: E731
    eager, compiled = call(x), torch.compile(call, fullgraph=True)(x)
    assert torch.equal(eager, compiled)
    (dx,) = torch.autograd.grad(compiled.sum(), x)
    assert torch.equal(dx, torch.autograd.grad(eager.sum(), x)[0])


def test_what_is_refused():
    """Another word, and formats whose codes are not whole numbers, by name."""
    weight = stack("fp8", "cpu")
    for make in (lambda a: dataclasses.replace(weight, activations=a), lambda a: stack("fp8", "cpu", activations=a)):
        with pytest.raises(ValueError, match=r"activations can be 'int8' for the formats .* got format 'fp8'"):
            make("int8")
        with pytest.raises(ValueError, match=r"activations must be one of .*, got 'int4'"):
            make("int4")
