"""gossamer.nn.QuantizedLinear: a linear layer over codes, for few rows and many."""

import pytest
import torch
import torch.nn.functional as F
from helpers import check, saved_tensors

import gossamer
from gossamer.nn import QuantizedLinear
from gossamer.ops._records import Layout
from gossamer.ops.low_rank import BaseLinear
from gossamer.ops.quantized_expert_weight import FORMATS

# Rows that end within a group of them, and columns within a step.
N, C = 45, 160


def layer(weight_format, device, dtype=torch.float32, bias=True):
    torch.manual_seed(1)
    linear = torch.nn.Linear(C, N, bias).to(device, dtype)
    return QuantizedLinear.from_linear(linear, weight_format)


@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_product(kernel_backend, dtype, device, weight_format, m):
    """Against float64 of the values that the codes stand for, with the gradients of x and the bias."""
    module = layer(weight_format, device, dtype)
    values = module.weight.weight().dequantize(torch.float64)[0]

    def function(x, bias):
        module.bias = None if bias is None else torch.nn.Parameter(bias.detach())
        with gossamer.backend(kernel_backend):
            y = gossamer.ops.low_rank.base_linear(x, module.weight.weight(), bias)
            assert torch.equal(y, module(x))
            return y

    inputs = {"x": torch.randn(m, C, device=device).to(dtype), "bias": torch.randn(N, device=device).to(dtype)}
    check(function, lambda x, bias: F.linear(x, values.to(x.dtype), bias), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_rows_do_not_depend_on_their_neighbours(isa, dtype, weight_format):
    """A row alone, among few and among many has the same bits."""
    module, x = layer(weight_format, "cpu", dtype), torch.randn(300, C).to(dtype)
    with torch.no_grad():
        whole = module(x)
        for rows in (1, 3, 16, 17):
            assert torch.equal(module(x[:rows]), whole[:rows])


def test_from_and_to_a_linear_layer(device):
    """The bias is the layer's own; what comes back has the codes' values; only codes are kept for backward."""
    linear = torch.nn.Linear(C, N, device=device)
    module = QuantizedLinear.from_linear(linear, "int4", group_size=32)
    assert module.bias is linear.bias and set(module.state_dict()) == {"weight.data", "weight.scale", "bias"}
    back = module.to_linear()
    assert torch.equal(back.weight, module.weight.weight().dequantize()[0]) and torch.equal(back.bias, linear.bias)
    x = torch.randn(2, 3, C, device=device, requires_grad=True)
    torch.testing.assert_close(module(x), back(x))
    kept = saved_tensors(lambda: module(x), [x, *module.buffers(), *module.parameters()])
    assert not kept
    assert "int4" in repr(module) and f"in_features={C}" in repr(module)


def test_sound_and_compiled(device):
    """Torch's own checks of the operator over codes, and one graph."""
    module, x = layer("mxfp4", device), torch.randn(4, C, device=device, requires_grad=True)
    if device == "cpu":
        args = BaseLinear(x, module.weight.weight().operand(), module.bias)
        torch.library.opcheck(torch.ops.gossamer.base_linear.default, (*Layout(BaseLinear).flatten(args), "native"))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))


def test_errors():
    weight = gossamer.QuantizedExpertWeight.quantize(torch.randn(2, N, C), "int8")
    with pytest.raises(ValueError, match=r"weight must have shape \(1, O, I\), got \(2, 45, 160\)"):
        QuantizedLinear(weight)
    module = layer("int8", "cpu", bias=False)
    with pytest.raises(ValueError, match=r"bias must have shape \(O,\) = \(45\), got \(3,\)"):
        QuantizedLinear(module.weight.weight(), torch.zeros(3))
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., I\) with I = 160, got \(2, 32\)"):
        module(torch.randn(2, 32))
