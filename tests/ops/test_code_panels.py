"""Codes in panels of rows, the layout of the CPU's products of few rows: where bytes go, and the bits of products."""

import dataclasses

import pytest
import torch
from helpers import assert_same_bits, make_dispatch, run
from quantized_stacks import stack

import gossamer
from gossamer import QuantizedExpertWeight
from gossamer.ops._weights import WHOLE_FORMATS
from gossamer.ops.low_rank import base_linear
from gossamer.ops.quantized_expert_weight import FORMATS, concatenate

# Two halves of three panels each, and columns that end within a step and within a block of 128.
E, N, C = 3, 96, 352
PRIMITIVE = "grouped_matmul"


def weights(weight_format, device="cpu", **options):
    """A weight in rows and the same in panels."""
    rows = stack(weight_format, device, E, N, C, **options)
    return rows, rows.to_layout("panels")


@pytest.mark.parametrize("weight_format", FORMATS)
def test_where_bytes_lie(weight_format, device):
    """The documented place of each byte; the way back, and the values."""
    rows, panels = weights(weight_format, device)
    before, after = (w.data.view(torch.uint8).cpu() for w in (rows, panels))
    e, n, row_bytes = before.shape
    r, b = torch.arange(n).view(-1, 1), torch.arange(row_bytes)
    place = 64 * (b // 4) + 4 * (r % 16) + b % 4 + r // 16 * 16 * row_bytes
    assert torch.equal(after.view(e, -1)[:, place.flatten()], before.view(e, -1))
    assert panels.layout == "panels" and panels.to_layout("panels") is panels and panels.shape == rows.shape
    assert torch.equal(panels.to_layout("rows").data.view(torch.uint8), rows.data.view(torch.uint8))
    assert torch.equal(panels.dequantize(), rows.dequantize())
    if weight_format != "fp8_block":  # whose blocks end within the first part
        assert torch.equal(concatenate([panels, rows]).dequantize(), concatenate([rows, rows]).dequantize())


def test_codes_that_begin_within_a_word():
    rows = stack("int8", "cpu", 1, 32, 8)
    data = torch.cat([torch.zeros(3, dtype=torch.int8), rows.data.flatten()])[3:].view(1, 32, 8)
    moved = dataclasses.replace(rows, data=data).to_layout("panels")
    assert torch.equal(moved.data, rows.to_layout("panels").data)


@pytest.mark.parametrize("rows", [4, 60, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_bits_of_products(isa, weight_format, dtype, rows):
    """A few rows an expert and many, and the gradient of x, which is a product with the transpose."""
    dispatch, inputs = make_dispatch(rows, E, 2, "cpu"), {"x": torch.randn(rows, C).to(dtype)}
    dout = torch.randn(rows, 2, N)
    one, other = (
        run(lambda x, weight=weight: gossamer.grouped_matmul(x, weight, dispatch), inputs, ["x"], dout)
        for weight in weights(weight_format)
    )
    assert_same_bits(one, other)


@pytest.mark.parametrize("m", [1, 2, 9, 16, 17, 70])
@pytest.mark.parametrize("weight_format", WHOLE_FORMATS)
def test_bits_of_products_with_rounded_rows(isa, weight_format, m):
    rows, panels = (dataclasses.replace(w, data=w.data[:1], scale=w.scale[:1]) for w in weights(weight_format))
    x = torch.randn(m, C).bfloat16()
    for activations in ("float", "int8"):
        one, other = (base_linear(x, dataclasses.replace(w, activations=activations)) for w in (rows, panels))
        assert torch.equal(one, other)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_bits_of_layers(isa, weight_format, tokens):
    """The fused layer, whose first weight has two halves, with one weight in each layout."""
    gate_up, down = stack(weight_format, "cpu", E, 2 * N, C), stack(weight_format, "cpu", E, C, N)
    dispatch, x = make_dispatch(tokens, E, 2, "cpu"), torch.randn(tokens, C).bfloat16()
    scores = torch.rand(tokens, 2)

    def layer(*layouts):
        pair = (w.to_layout(layout) for w, layout in zip((gate_up, down), layouts, strict=True))
        with torch.no_grad():
            return gossamer.expert_mlp(x, *pair, dispatch, scores)

    want = layer("rows", "rows")
    for layouts in (("panels", "panels"), ("rows", "panels")):
        assert torch.equal(layer(*layouts), want)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_other_kernels_read_rows(any_backend, weight_format, device):
    """Every backend gives what it gives for rows."""
    dispatch, x = make_dispatch(6, E, 2, device), torch.randn(6, C, device=device)
    with gossamer.backend(any_backend):
        one, other = (gossamer.grouped_matmul(x, w, dispatch) for w in weights(weight_format, device))
    assert torch.equal(one, other)


def test_errors():
    weight = stack("int8", "cpu", 2, 48, 64)
    with pytest.raises(ValueError, match=r"layout must be one of \('rows', 'panels'\), got 'tiles'"):
        weight.to_layout("tiles")
    with pytest.raises(ValueError, match=r"N a multiple of 32 and rows of a multiple of 4 bytes, got .*\(2, 48, 64\)"):
        weight.to_layout("panels")
    with pytest.raises(ValueError, match=r"rows of a multiple of 4 bytes, got .*\(2, 32, 6\)"):
        stack("int8", "cpu", 2, 32, 6).to_layout("panels")
    with pytest.raises(ValueError, match="layout must be one of"):
        QuantizedExpertWeight(weight.data, weight.scale, "int8", layout="columns")
    with pytest.raises(ValueError, match="N a multiple of 32"):
        QuantizedExpertWeight(weight.data, weight.scale, "int8", layout="panels")
