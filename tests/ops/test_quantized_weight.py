"""Frozen weights in few bits: their values against bitsandbytes and against hand-made ones, and what decodes them."""

import importlib
import math

import pytest
import torch

import gossamer


def on_device(weight, device):
    tensors = {k: v.to(device) for k, v in vars(weight).items() if isinstance(v, torch.Tensor)}
    return type(weight)(**{**vars(weight), **tensors})


def test_nf4_by_hand():
    """A block worked out on paper: codes, bytes and values."""
    block = torch.tensor([[0.5, -1.0, 0.02, 2.0, -0.3, 1.4]])
    weight = gossamer.NF4Weight.quantize(block, double=False)
    assert weight.absmax.tolist() == [2.0]
    assert weight.packed.tolist() == [0xA2, 0x7F, 0x5E]
    expected = torch.tensor([[0.492225, -1.050146, 0, 2, -0.369547, 1.445914]])
    torch.testing.assert_close(weight.dequantize(), expected, rtol=1e-6, atol=1e-6)


def test_zeros_and_odd_counts():
    """A block of zeros stays zero, and an odd number of elements has a half-used byte."""
    for shape in ((2, 64), (3, 7)):
        for double in (False, True):
            weight = gossamer.NF4Weight.quantize(torch.zeros(shape), double=double)
            assert not weight.dequantize().any()
            assert weight.packed.numel() == (shape[0] * shape[1] + 1) // 2
        assert not gossamer.Int8Weight.quantize(torch.zeros(shape)).dequantize().any()
        assert not gossamer.Float8Weight.quantize(torch.zeros(shape)).dequantize().any()


@pytest.mark.parametrize("double", [False, True])
# Its dequantiser for the CPU (0.50.2) is wrong for even widths that are not a multiple of the block.
@pytest.mark.parametrize("shape", [(48, 128), (33, 45), (5, 320)])
def test_nf4_is_that_of_bitsandbytes(double, shape):
    """The same codes and scales from its quantiser, and the same values, to the bit, from its dequantiser."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape)
    data, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    theirs = functional.dequantize_4bit(data, state)
    nested = {}
    if double:
        two = state.state2
        nested = {"nested_absmax": two.absmax, "nested_code": two.code, "offset": state.offset.reshape(1)}
    read = gossamer.NF4Weight(data, state.absmax, shape, state.code, 64, **nested)
    assert torch.equal(read.dequantize(), theirs)
    ours = gossamer.NF4Weight.quantize(weight, double=double)
    assert torch.equal(ours.packed, data.reshape(-1))
    torch.testing.assert_close(ours.dequantize(), theirs, rtol=1e-6, atol=1e-7)


def test_error_of_each_format():
    """The relative RMS error on normal weights is what the format's spacing makes it."""
    weight = torch.randn(256, 512)
    kinds = {
        "nf4": (gossamer.NF4Weight.quantize(weight), 0.085, 0.1),
        "int8": (gossamer.Int8Weight.quantize(weight), 0.005, 0.01),
        "fp8": (gossamer.Float8Weight.quantize(weight), 0.02, 0.03),
    }
    for name, (quantized, low, high) in kinds.items():
        error = float((quantized.dequantize() - weight).norm() / weight.norm())
        assert low < error < high, f"{name}: {error}"


def all_values():
    """Weights that have every byte, some of them with rows that end inside a block."""
    every = torch.arange(256, dtype=torch.uint8)
    finite = every[(every & 127) != 127]
    rows = torch.rand(2) + 0.5
    scale = torch.rand(45 * 33 // 64 + 1) + 0.5
    packed = torch.randint(256, (-(-45 * 33 // 2),), dtype=torch.uint8)
    code = gossamer.NF4Weight.quantize(torch.ones(1, 1), double=False).code
    return {
        "int8": gossamer.Int8Weight(every.view(torch.int8).view(2, 128), rows),
        "fp8": gossamer.Float8Weight(finite.view(torch.float8_e4m3fn).view(2, 127), rows),
        "fp8_one": gossamer.Float8Weight(finite.view(torch.float8_e4m3fn).view(2, 127), rows[:1]),
        "nf4_odd": gossamer.NF4Weight(packed, scale, (45, 33), code),
        "nf4": gossamer.NF4Weight.quantize(torch.randn(40, 96)),
        "nf4_large_blocks": gossamer.NF4Weight.quantize(torch.randn(24, 1600), block_size=128),
    }


@pytest.mark.parametrize("name", ["int8", "fp8", "fp8_one", "nf4_odd", "nf4", "nf4_large_blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernels_decode_every_value(name, dtype, device):
    """The kernels give the bits of plain torch; with double quantisation to an ulp, whose sum may be fused."""
    weight = all_values()[name]
    expected = weight.dequantize(dtype)
    families = ["cpu_kernels", "triton_kernels"] if device == "cpu" else ["triton_kernels"]
    if device == "cpu" and dtype == torch.bfloat16:
        families.remove("triton_kernels")  # the interpreter cuts bfloat16 off where hardware rounds
    for family in families:
        module = importlib.import_module(f"gossamer.{family}.quantized_weight")
        found = module.dequantize(on_device(weight, device).operand(), dtype).cpu()
        if weight.format == "nf4" and weight.nested_absmax is not None:
            torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
        else:
            assert torch.equal(found, expected), family


def test_nan_of_fp8(device):
    """The two bytes that fp8 has for NaN decode to NaN, and no others do."""
    every = torch.arange(256, dtype=torch.uint8).view(1, 256).to(device)
    weight = gossamer.Float8Weight(every.view(torch.float8_e4m3fn), torch.ones(1, device=device))
    x, a = torch.ones(1, 1, device=device), torch.zeros(1, 1, device=device)
    column = gossamer.Float8Weight(weight.values.view(256, 1), weight.scale)
    y = gossamer.low_rank_linear(x, column, a, torch.zeros(256, 1, device=device), scale=1.0)
    assert y.isnan().nonzero()[:, 1].tolist() == [0x7F, 0xFF]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: gossamer.NF4Weight.quantize(torch.ones(3)), ValueError, "weight must have shape"),
        (lambda: gossamer.NF4Weight.quantize(torch.ones(0, 3)), ValueError, "at least one element"),
        *(
            (
                lambda kind=kind: kind.quantize(torch.tensor([[1.0, math.nan, math.inf]])),
                ValueError,
                "got 2 of 3 that are",
            )
            for kind in (gossamer.NF4Weight, gossamer.Int8Weight, gossamer.Float8Weight)
        ),
        (
            lambda: gossamer.NF4Weight(torch.ones(3), torch.ones(1), (2, 3), torch.ones(16)),
            ValueError,
            "NF4Weight.packed",
        ),
        (
            lambda: gossamer.NF4Weight(torch.ones(3, dtype=torch.uint8), torch.ones(2), (2, 3), torch.ones(16)),
            ValueError,
            "NF4Weight.absmax must hold 1 values",
        ),
        (lambda: gossamer.Int8Weight(torch.ones(2, 3), torch.ones(2)), TypeError, "int8 values"),
        (lambda: gossamer.Int8Weight(torch.ones(2, 3).to(torch.int8), torch.ones(3)), ValueError, "Int8Weight.absmax"),
        (lambda: gossamer.Float8Weight(torch.ones(2, 3), torch.ones(2)), TypeError, "float8_e4m3fn"),
        (lambda: gossamer.Float8Weight(torch.ones(2, 3), torch.ones(3)), ValueError, "Float8Weight.scale"),
        (
            lambda: gossamer.Float8Weight(
                torch.ones(2, 3).to(torch.float8_e4m3fn), torch.ones(2, device="meta", dtype=torch.float32)
            ),
            ValueError,
            "Float8Weight.scale must be on the device of Float8Weight.values, cpu, got meta",
        ),
        (
            lambda: gossamer.Int8Weight(torch.ones(2, 3).to(torch.int8), torch.ones(2, device="meta")),
            ValueError,
            "Int8Weight.absmax must be on the device of Int8Weight.values, cpu, got meta",
        ),
        (
            lambda: gossamer.NF4Weight.quantize(torch.ones(2, 3), block_size=0),
            ValueError,
            "block_size must be at least 1",
        ),
        (
            lambda: gossamer.NF4Weight(torch.ones(3), torch.ones(1), (2, 3), torch.ones(16), block_size=0),
            ValueError,
            "NF4Weight.block_size must be at least 1, got 0",
        ),
    ],
)
def test_bad_parts(make, error, message):
    """Parts that do not fit are refused when the weight is made."""
    with pytest.raises(error, match=message):
        make()


def test_what_is_kept_of_formats_is_of_no_mode_or_default_device():
    """Tables that are made once may first be asked for under a default device or in inference mode."""
    from gossamer.ops import quantized_weight

    for make in (quantized_weight._nf4_code, quantized_weight.dynamic_code):
        kept = make()
        make.cache_clear()
        with torch.device("meta"), torch.inference_mode():
            made = make()
        assert torch.equal(made, kept) and not made.is_inference()


def test_weights_have_codes_of_their_own():
    """A write to the tables of one weight changes neither another weight nor the next one."""
    dense = torch.randn(8, 64)
    first, second = gossamer.NF4Weight.quantize(dense), gossamer.NF4Weight.quantize(dense)
    expected = second.dequantize()
    first.code.zero_()
    first.nested_code.zero_()
    assert torch.equal(second.dequantize(), expected)
    assert torch.equal(gossamer.NF4Weight.quantize(dense).dequantize(), expected)
