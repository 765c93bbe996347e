"""Products and layers with quantised expert weights, against float64 in every form."""

import copy
import itertools
import pickle

import pytest
import torch
from helpers import OperatorLog, assert_same_bits, check, check_capture, flat, make_dispatch, run
from quantized_stacks import C, E, N, stack

import gossamer
from gossamer import QuantizedExpertWeight
from gossamer.ops._weights import Weight
from gossamer.ops.expert_mlp import ExpertMlp, expert_mlp_reference
from gossamer.ops.grouped_matmul import GroupedMatmul, grouped_matmul_reference
from gossamer.ops.quantized_expert_weight import FORMATS
from gossamer.testing import random_expert_ids
from gossamer.triton_kernels import split_matmul
from gossamer.triton_kernels.split_tiles import MOST_SPLITS, choose_split, decodes
from gossamer.triton_kernels.tiles import shared_limit

T, K = 13, 2


def product(backend, weight, dispatch, **form):
    """The product under test and its reference with the dequantised weight, of x and bias."""
    wide = weight.dequantize(torch.float64)

    def function(x, bias=None):
        with gossamer.backend(backend):
            return gossamer.grouped_matmul(x, weight, dispatch, bias=bias, **form)

    def reference(x, bias=None):
        return grouped_matmul_reference(x, wide.to(x.dtype), dispatch, bias=bias, **form)

    return function, reference


@pytest.mark.parametrize("weight_format", FORMATS)
def test_kernels_read_every_code_right(kernel_backend, weight_format, device):
    """A product with unit rows gives the weight back exactly: all 256 codes, NaN where the format has it."""
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    dtype, per_byte = FORMATS[weight_format]
    data = codes.repeat(2).view(1, 2, 256)
    c = 256 * per_byte
    if weight_format in ("fp8", "int8"):
        scale = torch.tensor([[0.5, 3.0]])
    elif weight_format == "fp8_block":
        scale = torch.tensor([[[0.5, 3.0]]])
    elif weight_format == "int4":
        scale = torch.linspace(0.1, 2, 2 * c // 32).view(1, 2, -1).bfloat16()
    else:
        scale = (torch.arange(2 * c // 32) * 4 + 96).to(torch.uint8).view(1, 2, -1)
        scale[0, 0, :3] = torch.tensor([0, 255, 1])
    weight = QuantizedExpertWeight(data.view(dtype).to(device), scale.to(device), weight_format)
    dense = weight.dequantize()
    bad = dense.isnan().any(1)[0]
    eye = torch.eye(c, device=device)[~bad]
    function, _ = product(kernel_backend, weight, make_dispatch(eye.shape[0], 1, 1, device), x_grouped=True)
    if bad.any():
        # A NaN reaches every sum over it, whatever the other factor.
        assert function(torch.ones(eye.shape[0], c, device=device)).isnan()[:, 0, dense.isnan().any(2)[0]].all()
        keep = torch.where(dense.isnan(), 0, 1).bool()
        data = torch.where(keep.view(1, 2, -1, per_byte).all(-1), data.to(device), 0)
        scale = torch.where(scale == 255, 127, scale) if weight_format == "mxfp4" else scale
        weight = QuantizedExpertWeight(data.view(dtype), scale.to(device), weight_format)
        function, _ = product(kernel_backend, weight, make_dispatch(eye.shape[0], 1, 1, device), x_grouped=True)
    assert torch.equal(function(eye)[:, 0].T, weight.dequantize()[0][:, ~bad])


@pytest.mark.parametrize("weight_format", FORMATS)
def test_products(kernel_backend, dtype, weight_format, device):
    """Against float64 with a bias and dropped slots; gradients of x and bias."""
    d = make_dispatch(T, E, K, device, dropped=0.2)
    inputs = {"x": torch.randn(T, C, device=device).to(dtype), "bias": torch.randn(E, N, device=device).to(dtype)}
    check(*product(kernel_backend, stack(weight_format, device), d), inputs)


@pytest.mark.parametrize(("x_grouped", "y_grouped"), list(itertools.product([False, True], repeat=2)))
def test_forms(kernel_backend, device, x_grouped, y_grouped):
    """Token or sorted order on either side, with groups longer than a tile."""
    t = 70
    d = make_dispatch(t, E, K, device, dropped=0.2, skew="zipf")
    x = torch.randn(t * K if x_grouped else t, C, device=device)
    form = {"x_grouped": x_grouped, "y_grouped": y_grouped}
    check(*product(kernel_backend, stack("mxfp4", device), d, **form), {"x": x})


@pytest.mark.parametrize(("group", "c"), [(32, 32), (64, 192), (128, 256)])
def test_groups_of_int4(kernel_backend, device, group, c):
    """All three sizes of groups, with scales in each dtype that they may have."""
    d = make_dispatch(T, E, K, device)
    weight = stack("int4", device, c=c, group_size=group)
    assert weight.group_size == group
    for scale_dtype in (torch.float32, torch.bfloat16, torch.float16):
        other = QuantizedExpertWeight(weight.data, weight.scale.to(scale_dtype), "int4")
        check(*product(kernel_backend, other, d), {"x": torch.randn(T, c, device=device)})


def mlp(backend, gate_up, down, dispatch, **form):
    wide = [w.dequantize(torch.float64) for w in (gate_up, down)]

    def function(x, weights, **biases):
        with gossamer.backend(backend):
            return gossamer.expert_mlp(x, gate_up, down, dispatch, weights, **biases, **form)

    def reference(x, weights, **biases):
        dense = [w.to(x.dtype) for w in wide]
        return expert_mlp_reference(x, *dense, dispatch, weights, **biases, **form)

    return function, reference


@pytest.mark.parametrize("t", [1, T, 90])
@pytest.mark.parametrize(
    ("formats", "form"),
    [
        (("mxfp4", "mxfp4"), {"activation": "clamped_swiglu", "interleaved": True}),
        (("fp8_block", "int4"), {}),
        (("int8", "fp8"), {"activation": "relu2"}),
    ],
    ids=["gpt-oss", "mixed", "ungated"],
)
def test_layer(kernel_backend, dtype, t, formats, form, device):
    """The whole layer against float64 with biases and dropped slots, and by the composition that has gradients."""
    h, i = 96, 64
    wide = i if form.get("activation") == "relu2" else 2 * i
    gate_up, down = stack(formats[0], device, n=wide, c=h), stack(formats[1], device, n=h, c=i)
    d = make_dispatch(t, E, K, device, dropped=0.2)
    inputs = {
        "x": torch.randn(t, h, device=device),
        "weights": torch.rand(t, K, device=device),
        "gate_up_bias": torch.randn(E, wide, device=device),
        "down_bias": torch.randn(E, h, device=device),
    }
    inputs = {k: v.to(dtype) for k, v in inputs.items()}
    function, reference = mlp(kernel_backend, gate_up, down, d, **form)
    check(function, reference, inputs, needs=())
    if t == T:
        check(function, reference, inputs)


def test_one_quantised_weight_and_lora(kernel_backend, device):
    """A dense weight beside a quantised one, and low-rank factors over frozen codes, with their gradients."""
    h, i, r = 64, 32, 4
    gate_up, down = stack("fp8", device, n=2 * i, c=h), torch.randn(E, h, i, device=device) / i**0.5
    d = make_dispatch(T, E, K, device)
    inputs = {"x": torch.randn(T, h, device=device), "weights": torch.rand(T, K, device=device), "down": down}
    inputs |= {"a": torch.randn(E, r, h, device=device) / 8, "b": torch.randn(E, 2 * i, r, device=device)}
    dense = gate_up.dequantize(torch.float64)

    def function(x, weights, down, a, b):
        with gossamer.backend(kernel_backend):
            return gossamer.expert_mlp(x, gate_up, down, d, weights, gate_up_lora=(a, b), lora_scale=0.5)

    def reference(x, weights, down, a, b):
        return expert_mlp_reference(x, dense.to(x.dtype), down, d, weights, gate_up_lora=(a, b), lora_scale=0.5)

    check(function, reference, inputs)


def test_same_bits(kernel_backend, dtype, device):
    """Two runs agree bit by bit, and a token's row does not depend on its place in the batch."""
    weight = stack("mxfp4", device, n=96, c=64), stack("fp8_block", device, n=64, c=48)
    ids, x = random_expert_ids(20, E, K, skew="zipf"), torch.randn(20, 64, device=device).to(dtype)
    w, order = torch.rand(20, K, device=device), torch.randperm(20)
    with torch.no_grad():
        function, _ = mlp(kernel_backend, *weight, make_dispatch(20, E, K, device, ids=ids))
        first = function(x, w)
        assert torch.equal(first, function(x, w))
        function, _ = mlp(kernel_backend, *weight, make_dispatch(20, E, K, device, ids=ids[order]))
        assert torch.equal(function(x[order], w[order]), first[order])


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_the_cut_is_a_pure_choice_that_fits(bits, arch):
    """Few tokens are cut until two programs meet each multiprocessor; many are not; tiles fit the shared memory."""
    known = {t: choose_split("bf16", bits, t * 8, 64, 2048, 2048, arch, 132) for t in (1, 4, 64, 256, 16384)}
    assert known[1] == choose_split("bf16", bits, 8, 64, 2048, 2048, arch, 132)
    assert known[1].splits > 1 and known[16384].splits == 1
    for t, plan in known.items():
        programs = min(t * 8, 64) * -(-2048 // plan.tile.block_n)
        assert 1 <= plan.splits <= MOST_SPLITS
        assert plan.splits == 1 or programs * plan.splits <= 2 * 132 + programs
        shared = plan.tile.num_stages * (plan.tile.block_m + plan.tile.block_n) * plan.tile.block_k * 2
        assert shared <= shared_limit(arch)
    assert [known[t].tile.block_m for t in (1, 64, 256, 16384)] == [16, 16, 32, 128]
    assert choose_split("bf16", bits, 8, 64, 2048, 64, arch, 132).splits == 1
    assert decodes(256 * 8, 64) and not decodes(16384 * 8, 64) and decodes(1, 64)


@pytest.mark.parametrize(
    ("t", "dtype"), [(1, torch.float32), (1, torch.float16), (3, torch.float32), (24, torch.float16)]
)
def test_decoding_dense_weights_in_parts(dtype, device, monkeypatch, t):
    """Few tokens on plain weights take the cut products, and give what the whole ones give, to rounding."""
    h, i = 512, 48
    monkeypatch.setattr(split_matmul, "_multiprocessors", lambda x: 400)
    inputs = {"x": torch.randn(t, h, device=device), "weights": torch.rand(t, K, device=device)}
    inputs |= {"gate_up": torch.randn(E, 2 * i, h, device=device) / h**0.5}
    inputs |= {"down": (torch.randn(E, i, h, device=device) / i**0.5).transpose(1, 2)}
    inputs = {k: v.to(dtype) for k, v in inputs.items()}
    d = make_dispatch(t, E, K, device, dropped=0.2)
    gate_up, down = Weight(inputs["gate_up"]), Weight(inputs["down"])
    form = gossamer.Activation("swiglu")
    args = ExpertMlp(inputs["x"], gate_up, down, d.groups, inputs["weights"], form, False, False)
    plans = split_matmul.decode_plans(args)
    assert plans is not None and plans[0].splits > 1

    def function(x, weights, gate_up, down):
        with gossamer.backend("triton"), torch.no_grad():
            return gossamer.expert_mlp(x, gate_up, down, d, weights)

    def reference(x, weights, gate_up, down):
        return expert_mlp_reference(x, gate_up, down, d, weights)

    check(function, reference, inputs, needs=())
    assert_same_bits({"y": function(**inputs)}, {"y": function(**inputs)})


def test_operators_are_well_formed(kernel_backend, device):
    """Schemas, fake kernels, autograd registration and traceability of both operators."""
    d = make_dispatch(3, 2, 2, device, dropped=0.1)
    w, down = stack("mxfp4", device, e=2, n=64, c=32), stack("int8", device, e=2, n=32, c=32)
    x = torch.randn(3, 32, device=device).requires_grad_()
    args = GroupedMatmul(x, w.operand(), d.groups, 2, True, False)
    torch.library.opcheck(torch.ops.gossamer.grouped_matmul.default, flat(args, kernel_backend))
    weights, form = torch.rand(3, 2, device=device), gossamer.Activation("swiglu")
    args = ExpertMlp(x.detach(), w.operand(), down.operand(), d.groups, weights, form, False, False)
    torch.library.opcheck(torch.ops.gossamer.expert_mlp.default, flat(args, kernel_backend))


def test_compiles(kernel_backend, device):
    """Traced whole with a dynamic token count, the stacks as they are given."""
    torch._dynamo.reset()
    gate_up, down = stack("mxfp4", device, n=64, c=64), stack("fp8", device, n=64, c=32)

    def f(x, weights, ids):
        return gossamer.expert_mlp(x, gate_up, down, gossamer.dispatch(ids, E), weights).relu()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    with gossamer.backend(kernel_backend), torch.no_grad():
        for i, t in enumerate((13, 29, 6)):
            arguments = torch.randn(t, 64, device=device), torch.rand(t, K, device=device)
            ids = random_expert_ids(t, E, K).to(device)
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                actual = compiled(*arguments, ids)
            assert torch.equal(actual, f(*arguments, ids))


def test_autocast_and_no_gradient_of_codes(kernel_backend, device):
    """Autocast casts x alone; a scale that asks for a gradient is refused by name."""
    d, weight = make_dispatch(T, E, K, device), stack("int8", device)
    function, _ = product(kernel_backend, weight, d)
    x = torch.randn(T, C, device=device)
    with torch.autocast(device, dtype=torch.float16), OperatorLog() as log:
        y = function(x)
    assert y.dtype == torch.float16 and torch.equal(y, function(x.half()))
    assert log.named("grouped_matmul")[0][1]["weight_data"].data_ptr() == weight.data.data_ptr()
    asking = QuantizedExpertWeight(weight.data, weight.scale.clone().requires_grad_(), "int8")
    with pytest.raises(ValueError, match=r"weight is quantised and frozen, but weight\.scale requires a gradient"):
        gossamer.grouped_matmul(x, asking, d)
    with torch.no_grad():
        gossamer.grouped_matmul(x, asking, d)


@pytest.mark.parametrize("t", [0, 1])
def test_no_token_and_one(kernel_backend, device, t):
    d = make_dispatch(t, E, K, device)
    function, reference = product(kernel_backend, stack("int4", device), d)
    check(function, reference, {"x": torch.randn(t, C, device=device)})
    function, _ = mlp(kernel_backend, stack("mxfp4", device, n=64, c=64), stack("fp8", device, n=64, c=32), d)
    with torch.no_grad():
        assert function(torch.randn(t, 64, device=device), torch.rand(t, K, device=device)).shape == (t, 64)


def test_float64_on_the_cpu():
    """The native kernels decode into float64 sums."""
    d, weight = make_dispatch(T, E, K, "cpu"), stack("fp8_block", "cpu")
    x = torch.randn(T, C, dtype=torch.float64)
    function, reference = product("native", weight, d)
    torch.testing.assert_close(function(x), reference(x))


@pytest.mark.parametrize("weight_format", FORMATS)
def test_instruction_sets_decode_alike(isa, weight_format):
    """Each build of the native kernels decodes to the same values: unit rows give the weight back exactly."""
    weight = stack(weight_format, "cpu")
    for few in (C, 4):
        d = make_dispatch(few, E, 1, "cpu", ids=(torch.arange(few) % E).unsqueeze(1))
        with gossamer.backend("native"):
            y = gossamer.grouped_matmul(torch.eye(C)[:few], weight, d)[:, 0]
        dense = weight.dequantize()
        assert torch.equal(y, torch.stack([dense[i % E, :, i] for i in range(few)]))


def random_codes(weight_format, n, c):
    """A stack of one expert with codes of all kinds but NaN, and scales of different size."""
    weight = stack(weight_format, "cpu", 1, n, c)
    bits = torch.randint(256, weight.data.shape).to(torch.uint8)
    if weight_format.startswith("fp8"):
        bits[bits & 127 == 127] = 0
    return QuantizedExpertWeight(bits.view(weight.data.dtype), weight.scale, weight_format)


# Depths whose sums have segments of 128 and of 32 columns; the last of the former is short. Rows end within a vector.
@pytest.mark.parametrize("c", [736, 320])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_few_tokens_have_the_bits_of_many(isa, weight_format, c):
    """Few tokens' products decode with rows in the lanes: bit by bit what those tokens get among many, and dense."""
    n, many = 37, 40
    weight = random_codes(weight_format, n, c)
    x = torch.randn(many, c)
    of_all = []
    for value in (weight, weight.dequantize()):
        with gossamer.backend("native"):
            all_tokens = gossamer.grouped_matmul(x, value, make_dispatch(many, 1, 1, "cpu"))
            for few in (1, 2, 3, 4, 8, 16):
                y = gossamer.grouped_matmul(x[:few], value, make_dispatch(few, 1, 1, "cpu"))
                assert torch.equal(y, all_tokens[:few])
        of_all.append(all_tokens)
    assert torch.equal(*of_all)
    with gossamer.backend("native"):
        low = x.bfloat16()
        all_tokens = gossamer.grouped_matmul(low, weight, make_dispatch(many, 1, 1, "cpu"))
        for few in (1, 2, 3, 8, 16, 17):
            y = gossamer.grouped_matmul(low[:few], weight, make_dispatch(few, 1, 1, "cpu"))
            assert torch.equal(y, all_tokens[:few])
    if weight_format.startswith("fp8"):
        weight.data.view(torch.uint8)[0, 3, 5] = 255
        with gossamer.backend("native"):
            y = gossamer.grouped_matmul(x[:2], weight, make_dispatch(2, 1, 1, "cpu"))
            bits = gossamer.grouped_matmul(low[:2], weight, make_dispatch(2, 1, 1, "cpu"))
        for found in (y, bits):
            assert found.isnan().any(0).any(0).nonzero().flatten().tolist() == [3]


# Whole groups of rows and words of codes, and rows and words that end within one.
@pytest.mark.parametrize(("n", "c"), [(64, 256), (37, 160)])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_codes_are_exact_in_bfloat16(isa, weight_format, n, c):
    """Unit rows in bfloat16, few and many, give each weight as dequantised and rounded once: all codes but NaN."""
    weight = random_codes(weight_format, n, c)
    expected = weight.dequantize().bfloat16()[0].T
    for rows in (1, 4, 16, c):
        units = torch.eye(c, dtype=torch.bfloat16).split(rows)
        with gossamer.backend("native"):
            found = [gossamer.grouped_matmul(x, weight, make_dispatch(len(x), 1, 1, "cpu"))[:, 0] for x in units]
        assert torch.equal(torch.cat(found), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_threads_share_few_tokens(dtype):
    """A decoding step's layer has the same bits with one thread and with three."""
    gate_up, down = stack("int4", "cpu", n=256, c=128), stack("fp8", "cpu", n=128, c=128)
    d, x, w = make_dispatch(3, E, K, "cpu"), torch.randn(3, 128).to(dtype), torch.rand(3, K)
    function, _ = mlp("native", gate_up, down, d)
    threads, found = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(function(x, w))
    torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize("weight_format", ["float", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_few_rows_beside_many(dtype, weight_format):
    """Many experts of few rows around one of many: a token has the bits that it has alone, whatever the threads."""
    t, e, n, c = 45, 40, 72, 96
    ids = torch.stack([torch.full((t,), 20), torch.arange(t) * 7 % 20], 1)
    ids[40:, 0] = torch.arange(30, 35)
    if weight_format == "float":
        gate_up, down = torch.randn(e, 2 * n, c).to(dtype) / 8, torch.randn(e, c, n).to(dtype) / 8
    else:
        gate_up, down = (stack(weight_format, "cpu", e=e, n=rows, c=columns) for rows, columns in ((192, 96), (96, 96)))
        n = 96
    x, w = torch.randn(t, c).to(dtype), torch.rand(t, 2)
    bias = torch.randn(e, 2 * n).to(dtype)

    def layer(tokens):
        d = gossamer.dispatch(ids[tokens], e)
        with gossamer.backend("native"):
            return gossamer.expert_mlp(x[tokens], gate_up, down, d, w[tokens], gate_up_bias=bias)

    threads, found = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        found += [layer(slice(None)), torch.cat([layer(slice(i, i + 1)) for i in range(t)])]
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(other, found[0])


@pytest.mark.skipif(gossamer._backend.native_unavailable() is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_calls_without_gradients(activations):
    """They keep what does not change between them, with the bits of calls that do not, and notice all that changes."""
    stacks = [
        stack("int4", "cpu", n=rows, c=columns, activations=activations)
        for rows, columns in ((128, 96), (96, 64), (96, 64))
    ]
    gate_up, down, other = stacks[0], stacks[1], QuantizedExpertWeight(stacks[2].data.flip(1), stacks[2].scale, "int4")
    d, w = make_dispatch(T, E, K, "cpu", dropped=0.2), torch.rand(T, K)
    x = torch.randn(T, 192)[:, ::2].bfloat16()

    def layer(*weights, x=x, **form):
        with torch.no_grad():
            found = gossamer.expert_mlp(x, *weights, d, w, **form)
        assert torch.equal(found, gossamer.expert_mlp(x, *weights, d, w, **form))
        return found

    assert gate_up._prepared is None
    first, kept = layer(gate_up, down), gate_up._prepared
    assert torch.equal(layer(gate_up, down), first) and gate_up._prepared is kept is not None
    changed = [layer(gate_up, other)] + [
        layer(gate_up, down, **form) for form in ({"activation": "geglu"}, {"interleaved": True})
    ]
    assert not any(torch.equal(found, first) for found in changed)
    assert torch.equal(layer(gate_up, down), first)
    layer(gate_up, down, x=x.double())
    layer(gate_up.to_layout("panels"), down)
    assert copy.deepcopy(gate_up)._prepared is None and pickle.loads(pickle.dumps(gate_up))._prepared is None
    gate_up.data.set_(gate_up.data.flip(0))
    assert not torch.equal(layer(gate_up, down), first)
    with torch.no_grad(), pytest.raises(ValueError, match=r"weights must have shape \(T, K\) = \(13, 2\)"):
        gossamer.expert_mlp(x, gate_up, down, d, w[:, :1])
    with torch.no_grad(), pytest.raises(TypeError, match=r"weights must be a torch\.Tensor"):
        gossamer.expert_mlp(x, gate_up, down, d, None)


def test_errors_of_quantising_and_products():
    weight = torch.randn(E, N, C)
    for options, message in (
        (("mxfp8",), "format must be one of"),
        (("int4", 48), "group_size must be one of"),
        (("int4", 128), "C must be a multiple of group_size for int4, got C=160, group_size=128"),
    ):
        with pytest.raises(ValueError, match=message):
            QuantizedExpertWeight.quantize(weight, options[0], **({"group_size": options[1]} if options[1:] else {}))
    d, x = make_dispatch(T, E, K, "cpu"), torch.randn(T, C)
    with pytest.raises(ValueError, match=r"weight must have shape \(E, N, C\) = \(4, any, any\), got \(5, 47, 160\)"):
        gossamer.grouped_matmul(x, stack("int8", "cpu", e=5), d)
    with pytest.raises(ValueError, match=r"x must have shape \(T, C\) = \(13, 160\)"):
        gossamer.grouped_matmul(x[:, :32], stack("int8", "cpu"), d)
    with pytest.raises(ValueError, match=r"gate_up must have shape \(E, 2I, H\) = \(4, 64, 160\)"):
        gossamer.expert_mlp(x, stack("int8", "cpu"), stack("int8", "cpu", n=160, c=32), d, torch.rand(T, K))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_synchronisation_and_graph_capture(kernel_backend, device):
    """Clean under sync debugging, and right when replayed on another routing."""
    gate_up, down = stack("mxfp4", device, n=256, c=128), stack("fp8_block", device, n=128, c=128)
    ids = random_expert_ids(T, E, K).to(device)
    x, weights = torch.randn(T, 128, device=device).bfloat16(), torch.rand(T, K, device=device)

    def step():
        return gossamer.expert_mlp(x, gate_up, down, gossamer.dispatch(ids, E), weights)

    with gossamer.backend(kernel_backend), torch.no_grad():
        check_capture(step, lambda: ids.copy_(random_expert_ids(T, E, K, seed=5, dropped=0.3).to(device)))


def test_gradient_of_x_with_a_kept_graph(kernel_backend, device):
    """Backward twice gives the same bits, of a stack in blocks, whose rows are summed over."""
    function, _ = product(kernel_backend, stack("fp8_block", device, n=160), make_dispatch(T, E, K, device))
    x = torch.randn(T, C, device=device)
    dout = torch.randn(T, K, 160, device=device)
    assert_same_bits(run(function, {"x": x}, ["x"], dout), run(function, {"x": x}, ["x"], dout))
