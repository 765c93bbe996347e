"""gossamer.multi_low_rank_linear: the layer's own product beside the updates of many adapters."""

import pytest
import torch
import torch.nn.functional as F
from helpers import check
from multi_low_rank_inputs import C, M, N, make_ids, make_inputs

import gossamer
from gossamer.ops._records import Layout
from gossamer.ops._weights import Weight
from gossamer.ops.low_rank import BaseLinear, base_linear
from gossamer.ops.multi_low_rank import multi_low_rank_reference

PRIMITIVE = "multi_low_rank"


@pytest.mark.parametrize(("shape", "bias"), [((M,), False), ((1, M), True), ((17, 16), True)])
def test_linear_layer(kernel_backend, dtype, device, shape, bias):
    """The layer's own product included, few rows and many, with the gradients of a trained weight and bias."""
    m = int(torch.Size(shape).numel())
    inputs = make_inputs(device, dtype, m=m, out=False)
    inputs["x"] = inputs["x"].view(*shape, C)
    inputs["weight"] = (torch.randn(N, C, device=device) / C**0.5).to(dtype)
    if bias:
        inputs["bias"] = torch.randn(N, device=device).to(dtype)
    ids = make_ids(m, device=device).view(shape)

    def function(x, weight, a, b, bias=None):
        with gossamer.backend(kernel_backend):
            return gossamer.multi_low_rank_linear(x, weight, a, b, ids, scale=1.5, bias=bias)

    def reference(x, weight, a, b, bias=None):
        return multi_low_rank_reference(x, a, b, ids, scale=1.5, out=F.linear(x, weight, bias))

    check(function, reference, inputs)
    inputs["weight"] = inputs["weight"].T.contiguous().T
    check(function, reference, inputs, ["x", "a", "b"])


def test_linear_layer_names_what_does_not_fit(device):
    """Weights and biases of another size or dtype; under autocast its dtype is the layer's."""
    inputs, ids = make_inputs(device, out=False), make_ids(device=device)
    weight, bias = torch.randn(N, C, device=device), torch.zeros(N, device=device)

    def call(weight=weight, bias=bias):
        return gossamer.multi_low_rank_linear(inputs["x"], weight, inputs["a"], inputs["b"], ids, scale=1.0, bias=bias)

    with pytest.raises(ValueError, match=r"weight must have shape \(N, C\)"):
        call(weight[:, 1:])
    with pytest.raises(ValueError, match=r"bias must have shape \(N,\)"):
        call(bias=bias[1:])
    with pytest.raises(ValueError, match=r"b must have shape \(A, N, r\)"):
        call(weight[1:], bias[1:])
    for change in ({"weight": weight.bfloat16()}, {"bias": bias.double()}):
        with pytest.raises(TypeError, match="dtype"):
            call(**change)
    with torch.autocast(device, torch.bfloat16):
        y = call()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), call(), rtol=0.05, atol=0.3)


@pytest.mark.parametrize("bias", [False, True])
def test_the_layers_product_is_sound(device, bias):
    """Schema, fake kernel and autograd registration of the product that the layer's update is added to."""
    if device == "cuda":
        pytest.skip("it is torch's on CUDA")
    x, weight = torch.randn(M, C, requires_grad=True), torch.randn(N, C, requires_grad=True)
    args = BaseLinear(x, Weight(weight), torch.randn(N, requires_grad=True) if bias else None)
    torch.library.opcheck(torch.ops.gossamer.base_linear.default, (*Layout(BaseLinear).flatten(args), "native"))


@pytest.mark.parametrize("stacked", [False, True])
def test_adapters_over_codes(kernel_backend, dtype, device, stacked):
    """A batch of adapters over a layer that is held quantised, against float64, with the gradients of all else."""
    inputs = make_inputs(device, dtype, out=False)
    dense = torch.randn(N, C) / C**0.5
    if stacked:
        made = gossamer.QuantizedExpertWeight.quantize(dense.unsqueeze(0), "int8")
        weight = gossamer.QuantizedExpertWeight(made.data.to(device), made.scale.to(device), "int8")
        values = weight.dequantize(torch.float64)[0]
    else:
        weight = gossamer.Int8Weight.quantize(dense.to(device))
        values = weight.dequantize(torch.float64)
    ids = make_ids(M, device=device)

    def function(x, a, b):
        with gossamer.backend(kernel_backend):
            return gossamer.multi_low_rank_linear(x, weight, a, b, ids, scale=1.5)

    def reference(x, a, b):
        return F.linear(x, values.to(x.dtype)) + multi_low_rank_reference(x, a, b, ids, scale=1.5)

    check(function, reference, {k: inputs[k] for k in ("x", "a", "b")})


def test_the_layers_product_of_nothing(kernel_backend, device, dtype):
    """Without rows the gradients are zero; without columns the result is the bias."""
    bias = torch.randn(N, device=device).to(dtype)
    x, weight = (torch.randn(*s, device=device).to(dtype).requires_grad_() for s in ((0, C), (N, C)))
    with gossamer.backend(kernel_backend):
        gradients = torch.autograd.grad(base_linear(x, weight, bias).sum(), [x, weight])
        assert [t.shape for t in gradients] == [x.shape, weight.shape]
        assert not gradients[1].any()
        assert torch.equal(base_linear(x.new_ones(3, 0), weight.new_ones(N, 0), bias), bias.expand(3, N))
