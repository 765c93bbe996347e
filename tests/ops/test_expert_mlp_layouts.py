"""gossamer.expert_mlp in every memory layout: weights transposed, sliced, shared or far apart, strided activations."""

import pytest
import torch
from expert_mlp_inputs import SMALL, E, H, I, K, T, functions, make_inputs, small_dispatch, transposed
from helpers import OperatorLog, assert_same_bits, check, huge_storage, make_dispatch, run

from gossamer.ops.expert_mlp import GRADIENTS

PRIMITIVE = "expert_mlp"


@pytest.mark.parametrize(
    ("layout", "interleaved"),
    [
        ("transposed", False),
        ("transposed", True),
        ("sliced", False),
        ("sliced", True),
        ("mixed", False),
        ("shared", False),
    ],
)
def test_layouts(kernel_backend, device, layout, interleaved):
    """Weights are read where they lie: stored transposed as gpt-oss does, sliced out of larger ones, shared."""
    inputs = make_inputs(device)
    if layout == "transposed":
        change = {name: transposed(inputs[name]) for name in ("gate_up", "down")}
    elif layout == "mixed":
        change = {"down": transposed(inputs["down"])}
    elif layout == "sliced":
        change = {
            "gate_up": torch.randn(E, 4 * I, H + 3, device=device)[:, ::2, 1:-2] / H**0.5,
            "down": torch.randn(H, E, 2 * I, device=device).transpose(0, 1)[..., ::2] / I**0.5,
            "gate_up_bias": torch.randn(E, 4 * I, device=device)[:, ::2],
            "down_bias": torch.randn(H, E, device=device).t(),
        }
    else:
        change = {name: inputs[name][:1].expand_as(inputs[name]) for name in ("gate_up", "down", "down_bias")}
    d = make_dispatch(T, E, K, device)
    check(*functions(d, backend=kernel_backend, interleaved=interleaved), inputs | change)


def test_gradients_of_transposed_weights_are_not_copied(kernel_backend, device):
    """Weight gradients come in the layout of the weights' storage."""
    inputs = make_inputs(device, **SMALL)
    inputs |= {name: transposed(inputs[name]) for name in ("gate_up", "down")}
    function, _ = functions(small_dispatch(device), backend=kernel_backend)
    with OperatorLog() as log:
        run(function, inputs, inputs, torch.randn(SMALL["t"], SMALL["h"], device=device))
    results = dict(zip(GRADIENTS, next(c for c in log.calls if c[0].startswith("expert_mlp_backward"))[2], strict=True))
    assert results["gate_up.data"].stride() == inputs["gate_up"].stride()
    assert results["down.data"].stride() == inputs["down"].stride()


def test_strided_activations(kernel_backend, device):
    """Transposed, sliced and broadcast x and routing weights, and a broadcast output gradient."""
    t, k, h = SMALL["t"], SMALL["k"], SMALL["h"]
    inputs = make_inputs(device, **SMALL)
    d = small_dispatch(device, dropped=0.1)
    function, reference = functions(d, backend=kernel_backend)
    weights = torch.rand(k, 2 * t, device=device).t()[::2]
    for x in (
        torch.randn(h, t, device=device).t(),
        torch.randn(t, 2 * h + 1, device=device)[:, 1::2],
        torch.randn(1, h, device=device).expand(t, h),
    ):
        check(function, reference, inputs | {"x": x, "weights": weights})
    for dout in (torch.randn(1, h, device=device).expand(t, h), torch.randn(h, t, device=device).t()):
        torch.testing.assert_close(run(function, inputs, inputs, dout), run(reference, inputs, inputs, dout))


def test_addresses_beyond_32_bits(kernel_backend, device):
    """Weights whose experts lie more than 2³¹ elements apart."""
    if kernel_backend == "triton" and device == "cpu":
        pytest.skip("the interpreter copies its arguments whole")
    stride = 2**30 + 64
    inputs = make_inputs(device, torch.float16, e=3, k=2, h=16, i=8)
    flat = huge_storage(2 * stride + 2**10, torch.float16, device)
    far = dict(inputs)
    for start, name in ((0, "gate_up"), (512, "down")):
        shape = inputs[name].shape
        far[name] = flat[start:].as_strided(shape, (stride, shape[2], 1), flat[start:].storage_offset())
        far[name].copy_(inputs[name])
    function, _ = functions(make_dispatch(T, 3, 2, device), backend=kernel_backend)
    dout = torch.randn(T, 16, device=device)
    needs = ["x", "weights"]
    assert_same_bits(run(function, far, needs, dout), run(function, inputs, needs, dout))
