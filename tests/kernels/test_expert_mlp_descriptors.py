"""What a Hopper GPU runs and the interpreter would not choose: TMA descriptors, rows copied to padded groups."""

import importlib

import pytest
import torch
from helpers import check, make_dispatch

import gossamer
import gossamer.testing
from gossamer.ops.expert_mlp import expert_mlp_reference
from gossamer.triton_kernels import grouped_matmul_dweight
from gossamer.triton_kernels.common import dot_precision

MODULES = ("expert_mlp", "expert_mlp_backward", "grouped_matmul", "grouped_matmul_dweight")


@pytest.fixture(params=[False, True], ids=["direct", "padded"])
def hopper(request, monkeypatch):
    """Choices as on sm_90; with ``padded``, every gathered operand of a weight gradient is copied, in two parts."""
    for name in MODULES:
        module = importlib.import_module(f"gossamer.triton_kernels.{name}")
        monkeypatch.setattr(module, "arch_of", lambda tensor: 90)
    if request.param:
        monkeypatch.setattr(module, "PADDED_FROM", 0)
        monkeypatch.setattr(module, "PADDED_COLUMNS", 40)
    with gossamer.backend("triton"):
        yield


# Sizes whose rows are multiples of 16 bytes, as descriptors want, and of no block; groups end inside a block, rows are
# dropped, and one expert has none.
T, H, I, E, K = 77, 72, 40, 5, 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU makes its own choices, and other tests hold them")
@pytest.mark.parametrize(
    ("activation", "interleaved", "transposed", "bias"),
    [("swiglu", False, False, True), ("clamped_swiglu", True, True, True), ("gelu", False, False, False)],
)
def test_expert_mlp_by_descriptors(hopper, activation, interleaved, transposed, bias):
    """All gradients in float16, in the layouts of Mixtral, gpt-oss and an ungated layer."""
    wide = gossamer.Activation(activation).halves * I

    def randn(*shape):
        return (torch.randn(*shape) * shape[-1] ** -0.5).half()

    def weight(n, c):
        w = randn(E, n, c)
        return w.transpose(1, 2).contiguous().transpose(1, 2) if transposed else w

    ids = gossamer.testing.random_expert_ids(T, E - 1, K, dropped=0.15, seed=1)
    ids = torch.where(ids == E - 1, E, ids)
    dispatch = make_dispatch(T, E, K, "cpu", ids=ids)
    inputs = {"x": randn(T, H) * H**0.5, "gate_up": weight(wide, H), "down": weight(H, I)}
    inputs["weights"] = torch.rand(T, K).half()
    if bias:
        inputs |= {"gate_up_bias": randn(E, wide), "down_bias": randn(E, H)}

    def call(function):
        def layer(x, gate_up, down, weights, **biases):
            form = {"activation": activation, "interleaved": interleaved}
            return function(x, gate_up, down, dispatch, weights, **form, **biases)

        return layer

    check(call(gossamer.expert_mlp), call(expert_mlp_reference), inputs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU makes its own choices, and other tests hold them")
def test_no_garbage_reaches_a_weight_gradient_by_whole_blocks(hopper):
    """Blocks of rows run past a group into dropped rows, whose buffers are poisoned until the kernel zeroes them."""
    ids = torch.full((T, K), E)
    ids[:3] = torch.tensor([0, 2])
    dispatch = make_dispatch(T, E, K, "cpu", ids=ids)
    x, gate_up, down = torch.randn(T, H).half(), torch.randn(E, 2 * I, H).half(), torch.randn(E, H, I).half()
    gate_up.requires_grad_()
    down.requires_grad_()
    gossamer.expert_mlp(x, gate_up, down, dispatch, torch.rand(T, K).half()).sum().backward()
    for grad in (gate_up.grad, down.grad):
        assert torch.isfinite(grad).all()
        assert grad[0].any() and grad[2].any()
        assert not grad[[1, 3, 4]].any()


def test_rows_that_descriptors_cannot_copy_are_gathered(monkeypatch):
    """Columns of wider rows: aligned where they lie, and not as rows of their own."""
    monkeypatch.setattr(grouped_matmul_dweight, "arch_of", lambda tensor: 90)
    x = torch.zeros(64, grouped_matmul_dweight.PADDED_FROM, dtype=torch.bfloat16)
    for width, form in ((1008, "padded"), (1001, "gathered")):
        dy = torch.zeros(64, 1008, dtype=torch.bfloat16)[:, :width]
        assert grouped_matmul_dweight.operand_form(x, dy, 0, 2, True) == (True, form)


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_tf32_is_taken_where_torch_may_take_it(setting):
    """However it was allowed: reading torch's older flag raises after its newer one was set."""
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = setting
        assert dot_precision(torch.float32) == setting
        assert dot_precision(torch.float16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
