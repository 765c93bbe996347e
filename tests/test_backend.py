"""Choosing kernel families: the default by device, forcing one, and what cannot be forced."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import OperatorLog

import gossamer
from gossamer import _backend


def used(device):
    """The backend that one call of dispatch went to."""
    with OperatorLog() as log:
        gossamer.dispatch(torch.zeros(2, 1, dtype=torch.int64, device=device), 2)
    return log.calls[0][1]["backend"]


def test_default_is_by_device(device):
    """Triton on a GPU; on the CPU the compiled extension, or plain torch without it."""
    on_cpu = "reference" if _backend.native_unavailable() else "native"
    assert used("cpu") == on_cpu
    if device == "cuda":
        assert used("cuda") == "triton"


def test_forcing_nests_and_ends(device):
    """The innermost block counts, and leaving it, also by an error, brings back what was before."""
    before = used(device)
    with gossamer.backend("triton"):
        assert used(device) == "triton"
        with gossamer.backend("reference"):
            assert used(device) == "reference"
        assert used(device) == "triton"
        with pytest.raises(KeyError), gossamer.backend("reference"):
            raise KeyError
        assert used(device) == "triton"
    assert used(device) == before


def test_unknown_name():
    """Only four names exist."""
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'cutlass'"), gossamer.backend("cutlass"):
        pass


def test_a_family_that_cannot_serve_says_why():
    """Forcing CUDA kernels on CPU tensors names the primitive, the device and the reason."""
    ids = torch.zeros(2, 1, dtype=torch.int64)
    with gossamer.backend("cuda"), pytest.raises(ValueError, match=r'"cuda".* cannot serve dispatch on cpu: '):
        gossamer.dispatch(ids, 2)


def test_compiled_triton_does_not_run_on_the_cpu(monkeypatch):
    """Outside its interpreter Triton is refused on the CPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with gossamer.backend("triton"), pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        gossamer.dispatch(torch.zeros(2, 1, dtype=torch.int64), 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_families_refuse_the_wrong_device():
    """Native kernels run on the CPU alone, and CUDA kernels exist for some primitives."""
    ids = torch.zeros(2, 1, dtype=torch.int64, device="cuda")
    with gossamer.backend("native"), pytest.raises(ValueError, match="native kernels run on the CPU"):
        gossamer.dispatch(ids, 2)
    dispatch = gossamer.dispatch(ids, 2)
    x, weight = torch.ones(2, 3, device="cuda"), torch.ones(2, 4, 3, device="cuda")
    with gossamer.backend("cuda"), pytest.raises(ValueError, match="cannot serve grouped_matmul"):
        gossamer.grouped_matmul(x, weight, dispatch)


@pytest.mark.parametrize("family", ["cpu_kernels", "triton_kernels", "cuda_kernels"])
def test_families_are_packages_of_gossamer(family):
    """Each family is importable as gossamer's own."""
    assert importlib.import_module(f"gossamer.{family}").__doc__


def test_every_operator_has_a_test():
    """The operators that the tests of the primitives put through opcheck are all there are."""
    names = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("gossamer::")
    }
    text = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    unchecked = {n for n in names if f".{n}.default" not in text and f'"{n}"' not in text}
    assert not unchecked


def test_kernels_do_not_shadow_another_distribution():
    """With the checkout's root on sys.path, a bare ``import triton_kernels`` fails and says what happened."""
    root = Path(__file__).parent.parent
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import triton_kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "imported as gossamer.triton_kernels, not as 'triton_kernels'" in done.stderr


def test_import_changes_nothing():
    """Importing gossamer sets no environment variable, imports no Triton and initialises no GPU."""
    code = (
        "import os, sys; before = dict(os.environ); import torch; import gossamer; "
        "assert dict(os.environ) == before; assert 'gossamer.triton_kernels' not in sys.modules; "
        "assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LAYERS = {
    "softmax_topk": lambda: lambda x: gossamer.nn.softmax_topk(x, 3, renormalize=True).weights,
    "SharedExpert": lambda: gossamer.nn.SharedExpert(9, 8).double(),
    "MoE": lambda: gossamer.nn.MoE(9, 8, 4, 2).double(),
}


@pytest.mark.parametrize("name", LAYERS)
def test_function_transforms_are_served_by_plain_torch(name):
    """Tangents by torch.func and by dual numbers are differences of values; torch.func.grad is backward."""
    layer = LAYERS[name]()
    x, v = torch.randn(5, 9).double(), torch.randn(5, 9).double()
    with torch.no_grad():
        expected = (layer(x + 1e-6 * v) - layer(x - 1e-6 * v)) / 2e-6
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (v,))[1], expected, rtol=1e-5, atol=1e-7)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        tangent = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
        torch.testing.assert_close(tangent, expected, rtol=1e-5, atol=1e-7)
    leaf = x.clone().requires_grad_()
    layer(leaf).square().sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda x: layer(x).square().sum())(x), leaf.grad)


def test_forced_kernels_are_refused_under_function_transforms():
    """The kernels would give zeros for tangents."""
    x = torch.randn(2, 4)
    with (
        gossamer.backend("native"),
        pytest.raises(ValueError, match=r"cannot serve activate under torch\.func"),
    ):
        torch.func.jvp(gossamer.activate, (x,), (x,))
