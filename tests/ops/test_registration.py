"""The autograd of operators."""

import contextlib

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import gossamer
from gossamer.ops import _records, _registration
from gossamer.ops._registration import register_autograd
from gossamer.ops.embedding import embedding


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
def direct(monkeypatch):
    """For each call of an operator, whether it bypassed the dispatcher."""
    plain = []
    is_plain = _registration.is_plain
    for module in (_registration, _records):
        monkeypatch.setattr(module, "is_plain", lambda args: plain.append(is_plain(args)) or plain[-1])
    return plain


def test_kernels_are_called_without_the_dispatcher_where_it_does_nothing_else(direct, kernel_backend, device):
    """The same bits either way, forward and backward; a mode and a profiler see every operator."""
    x = torch.randn(5, 8, device=device, requires_grad=True)

    def step():
        direct.clear()
        with gossamer.backend(kernel_backend):
            y = gossamer.activate(x, "swiglu")
            return y.detach(), *torch.autograd.grad(y.square().sum(), x)

    found = step()
    assert direct == [True, True]
    with Operators() as operators:
        assert all(torch.equal(a, b) for a, b in zip(step(), found, strict=True))
    assert direct == [False, False] and operators.names == ["activate", "activate_backward"]
    with torch.profiler.profile() as profile:
        step()
    assert direct == [False, False]
    assert {"gossamer::activate", "gossamer::activate_backward"} <= {event.key for event in profile.key_averages()}


def test_other_tensors_go_through_the_dispatcher(direct):
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
    assert direct == [False] * 4


@pytest.mark.parametrize("mode", [contextlib.nullcontext, Operators], ids=["direct", "dispatched"])
def test_results_may_be_changed_in_place(kernel_backend, device, mode):
    """Even views of a kernel's own memory may be: native results of two MiB and more, and rows of a table."""
    x = torch.randn(1024 if kernel_backend == "native" else 4, 1024, device=device, requires_grad=True)
    index = torch.tensor([[1, 0], [3, 1]], device=device)
    with gossamer.backend(kernel_backend), mode():
        y = gossamer.activate(x, "swiglu")
        expected = y.detach() + 1
        assert torch.equal(y.add_(1), expected)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(dx, torch.autograd.grad(gossamer.activate(x, "swiglu").sum(), x)[0])
        rows = embedding(x, index)
        assert torch.equal(rows.mul_(2), 2 * x.detach()[index])
        (dx,) = torch.autograd.grad(rows.sum(), x)
        assert dx[1, 0] == 4 and dx[3, 0] == 2 and dx[2, 0] == 0


@pytest.mark.parametrize("make", [torch._neg_view, lambda x: torch._efficientzerotensor(x.shape)], ids=["neg", "zero"])
def test_tensors_whose_memory_does_not_hold_their_values(direct, make):
    x = torch.randn(5, 8)
    assert torch.equal(gossamer.activate(make(x), "swiglu"), gossamer.activate(make(x).clone() + 0.0, "swiglu"))
    assert direct == [False, True]


def test_a_second_derivative_that_there_is_not_is_refused(kernel_backend, device):
    """It is not dropped with a warning, as torch does, neither with nor without the dispatcher."""
    x, w, a, b = (torch.randn(4, 4, device=device, requires_grad=True) for _ in range(4))
    with gossamer.backend(kernel_backend):
        for mode in (contextlib.nullcontext, Operators):
            with mode():
                y = gossamer.low_rank_linear(x, w, a, b, scale=1.0)
                (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
                with pytest.raises(NotImplementedError, match="gossamer::low_rank_linear_backward has no derivative"):
                    torch.autograd.grad(dx.sum(), a)


class OnDevice(torch.Tensor):
    """A tensor that says it lies on the second GPU."""

    is_cuda = True

    def get_device(self):
        """The index of that GPU."""
        return 1


@pytest.mark.parametrize("current", [0, 1])
def test_kernels_run_with_their_tensors_device_as_the_current_one(monkeypatch, current):
    """Launches go to the current device; the first tensor says which that is to be, also from within a list."""
    devices = [current]

    @contextlib.contextmanager
    def change(index):
        devices.append(index)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: devices[-1])
    monkeypatch.setattr(torch.cuda, "device", change)
    seen = []
    kernel = _registration.on_its_device(lambda *args, **named: seen.append(devices[-1]))
    there = torch.zeros(2).as_subclass(OnDevice)
    for args in ((there,), (None, 3, there), ([None, there], torch.zeros(2)), (there, torch.zeros(2))):
        kernel(*args)
    assert seen == [1] * 4 and devices == [current]
    for args in ((torch.zeros(2), there), (3,), ([],)):
        kernel(*args)
    assert seen[4:] == [current] * 3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_on_a_gpu_that_is_not_the_current_one():
    """Each family forward and backward on the second GPU, the first being the current one."""
    torch.manual_seed(0)
    on_cpu = [gossamer.nn.MoE(32, 16, 4, 2), gossamer.nn.LoRALinear(32, 24, 4), gossamer.nn.Embedding(50, 32)]
    there = torch.device("cuda", 1)
    with torch.cuda.device(0):
        for layer in on_cpu:
            ids = torch.randint(50, (8, 3), device=there)
            x = ids if isinstance(layer, gossamer.nn.Embedding) else torch.randn(8, 32, device=there)
            y = layer.to(there)(x)
            y.square().sum().backward()
            expected = layer.cpu()(x.cpu())
            torch.testing.assert_close(y.cpu(), expected, rtol=1e-3, atol=1e-4)
        assert torch.cuda.current_device() == 0


def test_caches_of_compiled_code_know_the_operators(tmp_path, monkeypatch):
    """Compiled again the code comes from the cache, and with another version or schema it does not."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def cached(version):
        _registration.key_compiled_code(version)
        torch.compiler.reset()
        counters.clear()
        torch.compile(gossamer.activate)(torch.randn(4, 6))
        return counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]

    # Not by monkeypatch, which would delete the setting afterwards: it is no attribute of the module's own.
    with torch.compiler.config.patch(cache_key_tag="mine"):
        assert cached("1") == (0, 1)
        assert torch.compiler.config.cache_key_tag.startswith("mine;gossamer-")
        assert cached("1") == (1, 0)
        assert cached("2") == (0, 1)
        monkeypatch.setattr(_registration, "_SCHEMAS", [*_registration._SCHEMAS, "one_more(Tensor x) -> Tensor"])
        assert cached("2") == (0, 1)
