"""The autograd of operators."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import gossamer
from gossamer.ops import _registration
from gossamer.ops._registration import register_autograd


def test_backward_runs_again(kernel_backend, device):
    """A graph that is kept gives the same gradients more often than an operator has arguments."""
    x = torch.randn(5, 8, device=device, requires_grad=True)
    with gossamer.backend(kernel_backend):
        y = gossamer.activate(x, "swiglu")
    dy = torch.randn_like(y)
    (first,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    for _ in range(len(torch.ops.gossamer.activate.default._schema.arguments) + 2):
        (again,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        assert torch.equal(first, again)


def test_refuses_operators_that_change_arguments():
    """What torch serves alone is refused."""
    with pytest.raises(TypeError, match="multi_low_rank_ must have no lists of tensors or keyword-only arguments"):
        register_autograd("multi_low_rank_", None, None)


class Operators(TorchDispatchMode):
    """The names of gossamer's operators that pass through the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gossamer":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def dispatched(monkeypatch):
    """How often an operator's call went through the dispatcher, by a count of what called a kernel without it."""
    plain = []
    is_plain = _registration._is_plain
    monkeypatch.setattr(_registration, "_is_plain", lambda args: plain.append(is_plain(args)) or plain[-1])
    return plain


def test_kernels_are_called_without_the_dispatcher_where_it_does_nothing_else(dispatched, kernel_backend, device):
    """The same bits either way, forward and backward; a mode and a profiler see every operator."""
    x = torch.randn(5, 8, device=device, requires_grad=True)

    def step():
        dispatched.clear()
        with gossamer.backend(kernel_backend):
            y = gossamer.activate(x, "swiglu")
            return y.detach(), *torch.autograd.grad(y.square().sum(), x)

    direct = step()
    assert dispatched == [True, True]
    with Operators() as operators:
        assert all(torch.equal(a, b) for a, b in zip(step(), direct, strict=True))
    assert dispatched == [False, False] and operators.names == ["activate", "activate_backward"]
    with torch.profiler.profile() as profile:
        step()
    assert dispatched == [False, False]
    assert {"gossamer::activate", "gossamer::activate_backward"} <= {event.key for event in profile.key_averages()}


def test_other_tensors_go_through_the_dispatcher(dispatched):
    """Fake ones, those on meta, other classes, and calls under a mode of torch functions."""

    class Named(torch.Tensor):
        pass

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.randn(5, 8))
        assert gossamer.activate(fake, "swiglu").shape == (5, 4)
    assert gossamer.activate(torch.empty(5, 8, device="meta"), "swiglu").shape == (5, 4)
    assert isinstance(gossamer.activate(torch.randn(5, 8).as_subclass(Named), "swiglu"), Named)
    with torch.device("cpu"):
        gossamer.activate(torch.randn(5, 8), "swiglu")
    assert dispatched == [False] * 4


def test_a_second_derivative_that_there_is_not_is_refused(kernel_backend, device):
    """Not left out with a warning, as torch does."""
    x, w, a, b = (torch.randn(4, 4, device=device, requires_grad=True) for _ in range(4))
    with gossamer.backend(kernel_backend):
        y = gossamer.low_rank_linear(x, w, a, b, scale=1.0)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="gossamer::low_rank_linear_backward has no derivative"):
            torch.autograd.grad(dx.sum(), a)
