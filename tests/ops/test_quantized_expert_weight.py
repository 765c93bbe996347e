"""Quantised expert weights bit by bit: codes, scales, rounding, layouts of checkpoints, sizes and errors."""

import pytest
import torch
from quantized_stacks import C, E, N, stack

from gossamer import QuantizedExpertWeight
from gossamer.ops.quantized_expert_weight import FORMATS, concatenate

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_every_code_of_e2m1_and_the_order_of_nibbles(device):
    """Sixteen values by hand: the low four bits hold the even column."""
    codes = torch.arange(32, dtype=torch.uint8, device=device) % 16
    packed = (codes[0::2] | codes[1::2] << 4).view(1, 1, 16)
    scale = torch.full((1, 1, 1), 127, dtype=torch.uint8, device=device)
    values = QuantizedExpertWeight(packed, scale, "mxfp4").dequantize().flatten().tolist()
    assert values == ([*E2M1, *(-v for v in E2M1)]) * 2
    zeros = torch.tensor(values)[[0, 8]]
    assert torch.signbit(zeros).tolist() == [False, True]


@pytest.mark.parametrize(
    ("byte", "power"), [(0, 2.0**-127), (1, 2.0**-126), (127, 1.0), (130, 8.0), (254, 2.0**127), (255, float("nan"))]
)
def test_e8m0_ends(byte, power, device):
    """Scale 0 is 2⁻¹²⁷, which float32 holds below its normal numbers; 255 makes the whole group NaN."""
    packed = torch.full((1, 1, 16), 0x21, dtype=torch.uint8, device=device)  # 0.5, 1.0, and so on
    weight = QuantizedExpertWeight(packed, torch.full((1, 1, 1), byte, dtype=torch.uint8, device=device), "mxfp4")
    expected = torch.tensor([0.5 * power, power] * 16, dtype=torch.float64)
    torch.testing.assert_close(weight.dequantize().double().cpu().flatten(), expected, rtol=0, atol=0, equal_nan=True)


def test_int4_and_int8_by_hand(device):
    """Code 8 is zero, −8 the least value; a byte of int8 is its value."""
    packed = torch.tensor([0x80, 0xF1] * 8, dtype=torch.uint8, device=device).view(1, 1, 16)
    weight = QuantizedExpertWeight(packed, torch.full((1, 1, 1), 0.5, device=device), "int4")
    assert weight.dequantize().flatten().tolist() == [-4.0, 0.0, -3.5, 3.5] * 8
    values = torch.tensor([-128, -1, 0, 127], dtype=torch.int8, device=device).view(1, 2, 2)
    weight = QuantizedExpertWeight(values, torch.tensor([[0.5, 2.0]], device=device), "int8")
    assert weight.dequantize().flatten().tolist() == [-64.0, -0.5, 0.0, 254.0]


def test_blocks_of_128(device):
    """The scale of DeepSeek-V3's blocks: row and column halves of 128, the last blocks cut short."""
    values = torch.ones(1, 130, 200, device=device).to(torch.float8_e4m3fn)
    scale = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], device=device)
    dense = QuantizedExpertWeight.from_fp8(values, scale).dequantize()[0]
    expected = torch.ones(130, 200, device=device)
    expected[:128, 128:], expected[128:, :128], expected[128:, 128:] = 2.0, 3.0, 4.0
    assert torch.equal(dense, expected)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_quantising_is_nearest_and_idempotent(weight_format, device):
    """Every element goes to a code within half a step, and quantising what a stack holds changes nothing."""
    weight = torch.randn(3, 130, 256, device=device)
    weight[0, 0] = 0.0
    quantized = QuantizedExpertWeight.quantize(weight, weight_format)
    dense = quantized.dequantize()
    assert not dense[0, 0].any()
    error = (dense - weight).abs()
    if weight_format in ("fp8", "fp8_block"):
        group = weight.unflatten(2, (-1, 128)).abs().amax(3) if weight_format == "fp8_block" else weight.abs().amax(2)
        largest = float(group.max())
        # Three bits of mantissa; a step of 2⁻⁹ below the normal numbers.
        assert (error <= weight.abs() * 2**-4 + largest / 448 * 2**-10).all()
    elif weight_format == "mxfp4":
        groups = weight.unflatten(2, (-1, 32))
        power = torch.exp2((groups.abs().amax(3) / 6).log2().ceil()).repeat_interleave(32, 2)
        step = torch.where(weight.abs() > 4 * power, 2.0, torch.where(weight.abs() > 2 * power, 1.0, 0.5)) * power
        assert (error <= step / 2).all()
    else:
        steps = {"int8": 127, "int4": 7}[weight_format]
        width = 256 if weight_format == "int8" else 32
        scale = weight.unflatten(2, (-1, width)).abs().amax(3).repeat_interleave(width, 2) / steps
        assert (error <= scale * (0.5 if weight_format == "int8" else 0.5 + 7 * 2**-8)).all()
    again = QuantizedExpertWeight.quantize(dense, weight_format)
    torch.testing.assert_close(again.dequantize(), dense, rtol=2**-8 if weight_format == "int4" else 2e-7, atol=0)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_stack_on_meta_costs_no_more_than_its_shapes(weight_format):
    """As many experts as no loop could visit."""
    few = QuantizedExpertWeight.quantize(torch.randn(2, 3, 256), weight_format)
    many = QuantizedExpertWeight.quantize(torch.empty(1, 3, 256, device="meta").expand(2**40, 3, 256), weight_format)
    for one, other in ((few.data, many.data), (few.scale, many.scale)):
        assert other.is_meta and (other.dtype, other.shape) == (one.dtype, (2**40, *one.shape[1:]))


def test_mxfp4_rounds_ties_to_even(device):
    """Halfway between two codes the one with an even last bit is taken; the scale is the least that reaches."""
    row = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0] + [0.0] * 22, device=device)
    quantized = QuantizedExpertWeight.quantize(row.view(1, 1, 32), "mxfp4")
    assert quantized.scale.flatten().tolist() == [127]
    assert quantized.dequantize().flatten().tolist()[:10] == [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -0.0, -4.0]
    just_above = QuantizedExpertWeight.quantize(row.view(1, 1, 32) * 1.01, "mxfp4")
    assert just_above.scale.flatten().tolist() == [128]


def test_checkpoint_layouts_are_read_as_transformers_reads_them():
    """gpt-oss's blocks and scales, and DeepSeek's weight and weight_scale_inv, against transformers' own code."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    blocks = torch.randint(256, (2, 6, 4, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 6, 4), dtype=torch.uint8)
    ours = QuantizedExpertWeight.from_mxfp4(blocks, scales)
    theirs = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(ours.dequantize().transpose(1, 2), theirs)
    weight = torch.randn(256, 384).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3)
    dequantize = fp8.Fp8Dequantize(None)
    ours = QuantizedExpertWeight.from_fp8(weight[None], scale[None])
    assert ours.format == "fp8_block"
    assert torch.equal(ours.dequantize()[0], dequantize._dequantize_one(weight, scale, torch.float32))


def test_other_scales_of_fp8_and_packed_int32():
    """A scale a row, a scale a matrix, and compressed-tensors' eight values in a word."""
    values = torch.randn(2, 3, 40).to(torch.float8_e4m3fn)
    row, whole = torch.rand(2, 3, 1), torch.rand(2)
    assert torch.equal(QuantizedExpertWeight.from_fp8(values, row).dequantize(), values.float() * row)
    by_matrix = QuantizedExpertWeight.from_fp8(values, whole)
    assert torch.equal(by_matrix.dequantize(), values.float() * whole.view(2, 1, 1))
    with pytest.raises(ValueError, match="scale must have shape"):
        QuantizedExpertWeight.from_fp8(values, torch.rand(2, 5))
    codes = torch.randint(-8, 8, (2, 3, 64))
    words = ((codes + 8).view(2, 3, 8, 8) << (4 * torch.arange(8))).sum(3).to(torch.int32)
    scale = torch.rand(2, 3, 2)
    int4 = QuantizedExpertWeight.from_int4(words, scale)
    assert torch.equal(int4.dequantize(), codes.float() * scale.repeat_interleave(32, 2))


def test_gate_and_up_below_each_other():
    """Stacks concatenated along N are the concatenated weights; a cut through a block is refused."""
    for weight_format in FORMATS:
        parts = [stack(weight_format, "cpu", n=128), stack(weight_format, "cpu", n=40)]
        whole = concatenate(parts)
        assert torch.equal(whole.dequantize(), torch.cat([p.dequantize() for p in parts], dim=1))
    with pytest.raises(ValueError, match="N must be a multiple of 128 to concatenate fp8_block"):
        concatenate([stack("fp8_block", "cpu", n=40)] * 2)


def test_it_is_smaller(device):
    """Bytes a weight: codes and scales as the formats promise."""
    weight = torch.randn(2, 128, 256, device=device)
    sizes = {f: QuantizedExpertWeight.quantize(weight, f).nbytes / weight.numel() for f in FORMATS}
    assert sizes["mxfp4"] == 0.5 + 1 / 32 and sizes["int4"] == 0.5 + 2 / 32
    assert sizes["int8"] == sizes["fp8"] == 1 + 4 / 256 and sizes["fp8_block"] == 1 + 4 / 128**2


U8 = torch.zeros(E, N, C // 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((U8, torch.zeros(E, N, 5), "int3"), ValueError, "format must be one of .* got 'int3'"),
        ((U8, torch.zeros(E, N, 5), "mxfp4"), TypeError, "scale must be torch.uint8 for mxfp4"),
        ((U8, torch.zeros(E, N, 5, dtype=torch.int32), "int4"), TypeError, "scale must be torch.float32"),
        ((U8, torch.zeros(E, N, 2), "int4"), ValueError, "g of 32, 64, 128 for int4, got 2 columns for C=160"),
        ((U8, torch.zeros(1, E, N, 5), "int4"), ValueError, r"scale must have shape \(E, N, C/g\)"),
        ((U8.view(torch.int8), torch.zeros(E, N, 5), "int4"), TypeError, "data must be torch.uint8 for int4"),
        ((U8.view(torch.int8), torch.zeros(E), "int8"), ValueError, r"scale must have shape \(E, N\)"),
        ((U8[:, :, ::2], torch.zeros(E, N, 1), "int4"), ValueError, "scale must have|must be contiguous"),
        ((U8[0], torch.zeros(E, N, 5), "int4"), ValueError, r"data must have shape \(E, N, C/2\)"),
        (([1], torch.zeros(E, N, 5), "int4"), TypeError, "data must be a torch.Tensor, got list"),
        ((U8, torch.zeros(E, N, 5, device="meta"), "int4"), ValueError, "scale must be on the device of data"),
    ],
)
def test_errors_of_a_stack(arguments, error, message):
    """Each documented error names the argument, the rule and the value."""
    with pytest.raises(error, match=message):
        QuantizedExpertWeight(*arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_what_is_not_finite_is_refused(weight_format, value, device):
    """Such a value would become the scale of every value beside it."""
    weight = torch.ones(2, 128, 256, device=device)
    weight[1, 0, :3] = value
    with pytest.raises(ValueError, match="weight must hold finite values, got 3 of 65,536 that are NaN or infinite"):
        QuantizedExpertWeight.quantize(weight, weight_format)


@pytest.mark.parametrize("shape", [(1, 2, 64), (1, 128, 2), (1, 1, 128), (128,), (1, 1, 1, 1), ()])
def test_scales_of_other_blocks_are_refused(shape):
    """As many scales as rows, in another shape, are not scales of rows."""
    codes = torch.randn(1, 128, 4096).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"scale must have shape \(E, ⌈N/128⌉, ⌈C/128⌉\) = \(1, 1, 32\)"):
        QuantizedExpertWeight.from_fp8(codes, torch.rand(shape) + 0.5)
