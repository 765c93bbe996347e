"""The activation by itself: every form against float64, its gradients, rows of any layout, and what it keeps."""

import pytest
import torch
from helpers import OperatorLog, assert_same_bits, check, huge_storage, run, saved_tensors

import gossamer
from gossamer import Activation
from gossamer._activation import ACTIVATIONS, activate_reference, as_activation


def function(backend, activation, interleaved):
    def activate(preact):
        with gossamer.backend(backend):
            return gossamer.activate(preact, activation, interleaved=interleaved)

    return activate


def reference(activation, interleaved):
    return lambda preact: activate_reference(preact, as_activation(activation), interleaved)


def draw(rows, inner, activation, device, dtype=torch.float32):
    return (torch.randn(rows, as_activation(activation).halves * inner, device=device) * 3).to(dtype)


@pytest.mark.parametrize(
    ("activation", "interleaved"),
    [(name, interleaved) for name, (_, gated) in ACTIVATIONS.items() for interleaved in (False, True)[: 1 + gated]],
)
def test_against_float64(kernel_backend, dtype, device, activation, interleaved):
    """Values and gradients, in rows that are shorter than a vector, end within one, and are many."""
    for rows, inner in ((3, 5), (7, 47), (130, 33)):
        inputs = {"preact": draw(rows, inner, activation, device, dtype)}
        check(function(kernel_backend, activation, interleaved), reference(activation, interleaved), inputs)


@pytest.mark.parametrize("activation", ["swiglu", "clamped_swiglu", "gelu_tanh"])
def test_float64(device, activation):
    """As exact as float64 is, on the CPU; a GPU's kernels refuse it."""
    preact = draw(5, 6, activation, device).double()
    if device == "cuda":
        with pytest.raises(TypeError, match="preact must be float32, float16, bfloat16"):
            gossamer.activate(preact, activation)
        return
    torch.testing.assert_close(gossamer.activate(preact, activation), reference(activation, False)(preact))
    torch.autograd.gradcheck(lambda p: gossamer.activate(p, activation), preact.requires_grad_())


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "geglu_tanh", "clamped_swiglu", "silu", "gelu"])
def test_large_gates(kernel_backend, device, activation):
    """Gates and ups for which exponentials overflow: their limits, with no NaN, and gradients likewise."""
    gates = [-1e38, -1e12, -1e4, -100.0, -88.0, 88.0, 100.0, 1e4, 1e12]
    preact = torch.tensor([gates, [1.0] * len(gates)], device=device).T.contiguous()
    preact = preact if as_activation(activation).gated else preact[:, :1]
    if activation == "geglu_tanh":
        preact = preact[1:-1]
    for need in ((), ("preact",)):
        ours = run(
            function(kernel_backend, activation, False), {"preact": preact}, need, torch.ones_like(preact[:, :1])
        )
        truth = run(reference(activation, False), {"preact": preact.double()}, need, torch.ones_like(preact[:, :1]))
        for name, value in ours.items():
            torch.testing.assert_close(value.double(), truth[name], rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_nan(kernel_backend, device, activation):
    """A gate or an up of NaN makes its value NaN; the values beside it are as without it."""
    preact = draw(4, 9, activation, device)
    clean = function(kernel_backend, activation, False)(preact)
    for half in range(as_activation(activation).halves):
        broken = preact.clone()
        broken[1, 9 * half + 3] = float("nan")
        out = function(kernel_backend, activation, False)(broken)
        assert out.isnan().nonzero().tolist() == [[1, 3]]
        assert torch.equal(out[~out.isnan()], clean[~out.isnan()])


def test_clamped_constants(kernel_backend, device):
    """The two constants reach the kernels, and what lies beyond the limit has no gradient."""
    activation = Activation("clamped_swiglu", alpha=0.7, limit=1.5)
    preact = draw(9, 20, activation, device)
    results = check(function(kernel_backend, activation, True), reference(activation, True), {"preact": preact})
    assert not results["preact"][:, 0::2][preact[:, 0::2] > 1.5].any()
    assert not results["preact"][:, 1::2][preact[:, 1::2].abs() > 1.5].any()


@pytest.mark.parametrize("interleaved", [False, True])
def test_any_layout_and_shape(kernel_backend, device, interleaved):
    """Transposed, expanded and cut rows, more dimensions and none, and no rows: as contiguous ones."""
    activate = function(kernel_backend, "swiglu", interleaved)
    whole = torch.randn(6, 40, device=device)
    for view in (whole[:, 3:37], whole.T, whole[::2], whole[:1].expand(4, 40), whole[2], whole.view(3, 2, 40)):
        assert torch.equal(activate(view), activate(view.contiguous()))
    for shape in ((0, 40), (6, 0), (2, 0, 8)):
        empty = torch.empty(shape, device=device, requires_grad=True)
        out = activate(empty)
        assert out.shape == (*shape[:-1], shape[-1] // 2)
        out.sum().backward()
        assert empty.grad.shape == shape
    # The gradient of a sum, all of whose strides are 0, is not a matrix of rows.
    leaves = [whole.clone().requires_grad_() for _ in range(2)]
    activate(leaves[0]).sum().backward()
    activate(leaves[1]).backward(torch.ones(6, 20, device=device))
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_second_derivative_and_two_backwards(any_backend, device):
    """What plain torch gives; and the same bits each time."""
    preact, direction = draw(4, 5, "swiglu", device), torch.randn(4, 10, device=device)

    def penalty(function):
        leaf = preact.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), leaf)
        return second

    torch.testing.assert_close(penalty(function(any_backend, "swiglu", False)), penalty(reference("swiglu", False)))
    leaf = preact.clone().requires_grad_()
    out = function(any_backend, "swiglu", False)(leaf)
    once = torch.autograd.grad(out.sum(), leaf, retain_graph=True)
    assert torch.equal(once[0], torch.autograd.grad(out.sum(), leaf)[0])


def test_same_bits_whatever_the_threads(kernel_backend, device):
    """Run twice, and with one thread: a share may end within a vector and within a row."""
    # Natively more than two threads' least work, which is 32768 values.
    rows = 557 if kernel_backend == "native" else 27
    preact, dout = draw(rows, 131, "swiglu", device), torch.randn(rows, 131, device=device)

    def once():
        return run(function(kernel_backend, "swiglu", True), {"preact": preact}, ("preact",), dout)

    first, threads = once(), torch.get_num_threads()
    assert_same_bits(first, once())
    try:
        torch.set_num_threads(1)
        assert_same_bits(first, once())
    finally:
        torch.set_num_threads(threads)


def test_keeps_the_preactivation_alone(kernel_backend, device):
    preact = draw(8, 16, "swiglu", device).requires_grad_()
    kept = saved_tensors(lambda: function(kernel_backend, "swiglu", False)(preact), [])
    assert [t.data_ptr() for t in kept] == [preact.data_ptr()]


def test_offsets_past_32_bits(device):
    """Rows that begin beyond 2³¹ elements are read where they are."""
    stride = (1 << 31) + 16
    preact = torch.as_strided(huge_storage(stride + 40, torch.float16, device), (2, 40), (stride, 1))
    preact.copy_(torch.randn(2, 40))
    assert torch.equal(gossamer.activate(preact), gossamer.activate(preact.clone()))


def test_bad_input(device):
    with pytest.raises(TypeError, match=r"preact must be a torch.Tensor, got list"):
        gossamer.activate([1.0])
    with pytest.raises(TypeError, match=r"preact must be float32, float16, bfloat16.* got torch.int64"):
        gossamer.activate(torch.ones(2, 4, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match="activation must be one of"):
        gossamer.activate(torch.ones(2, 4, device=device), "swish")
    with pytest.raises(ValueError, match=r"preact must have shape \(..., 2I\) for 'swiglu', got \(2, 5\)"):
        gossamer.activate(torch.ones(2, 5, device=device))
    with pytest.raises(ValueError, match=r"preact must have shape \(..., I\) for 'relu', got \(\)"):
        gossamer.activate(torch.ones((), device=device), "relu")


@pytest.mark.parametrize("interleaved", [False, True])
def test_operators_are_well_formed(kernel_backend, device, interleaved):
    preact = draw(3, 4, "swiglu", device).requires_grad_()
    form = ("swiglu", 1.702, 7.0, interleaved, kernel_backend)
    torch.library.opcheck(torch.ops.gossamer.activate.default, (preact, *form))
    dact = torch.randn(3, 4, device=device)
    torch.library.opcheck(torch.ops.gossamer.activate_backward.default, (dact, preact.detach(), *form))


def test_compiled(device):
    """One graph, whatever the number of rows, with the eager result."""
    compiled = torch.compile(lambda p: gossamer.activate(p, "geglu") * 2, fullgraph=True, dynamic=True)
    for rows in (3, 6):
        preact = draw(rows, 8, "geglu", device).requires_grad_()
        torch.testing.assert_close(compiled(preact), gossamer.activate(preact, "geglu") * 2)
        compiled(preact).sum().backward()
        assert preact.grad.isfinite().all()


def test_the_layers_use_it(device):
    """A shared expert's activation is one operator."""
    shared = gossamer.nn.SharedExpert(16, 8).to(device)
    with OperatorLog() as log:
        shared(torch.randn(3, 16, device=device))
    assert [name for name, *_ in log.calls] == ["activate"]
