"""Fixtures of all tests: the device, the kernel families to prove on it, poisoned memory, fixed seeds."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Workers share the cores: threads that spin while they wait would keep each other from running. Read when torch loads.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# Triton reads this once, when it is first imported; without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(Path(__file__).parent / "support"))  # shared helpers; pytest leaves sys.path alone

from gossamer import _backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _backends(primitive: str) -> list[str]:
    if DEVICE == "cpu":
        names = ["native", "triton"]
    else:
        found = importlib.util.find_spec("gossamer.cuda_kernels")
        names = ["triton"]
        if found and importlib.util.find_spec(f"gossamer.cuda_kernels.{primitive}"):
            names.append("cuda")
    known = primitive in _backend.primitives()
    return [
        name
        for name in names
        if _backend.unavailable(name, DEVICE) is None and (not known or primitive in _backend.FAMILIES[name].primitives)
    ]


if DEVICE == "cpu" and importlib.util.find_spec("triton"):
    import interpreter

    interpreter.multiply_row_by_row()
    interpreter.run_programs_in_any_order()
    interpreter.refuse_foreign_addresses()
    interpreter.patch_language_once()
    interpreter.combine_whole_slices()
    interpreter.leave_out_unread_checks()
    interpreter.make_types_once()


def _dtypes(backend: str) -> list[torch.dtype]:
    # The interpreter computes products of bfloat16 blocks wrongly.
    if backend == "triton" and DEVICE == "cpu":
        return [torch.float32, torch.float16]
    return [torch.float32, torch.float16, torch.bfloat16]


def _id(value: object) -> str:
    return str(value).removeprefix("torch.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give ``kernel_backend`` the kernel families of this device, and ``dtype`` beside it the dtypes they compute.

    ``any_backend`` has ``"reference"``, plain torch, too.
    The primitive is that of the file's name, or the module's ``PRIMITIVE``.
    """
    stem = Path(metafunc.module.__file__).stem.removeprefix("test_")
    backends = _backends(getattr(metafunc.module, "PRIMITIVE", stem))
    if "any_backend" in metafunc.fixturenames:
        metafunc.parametrize("any_backend", ["reference", *backends])
    elif "kernel_backend" in metafunc.fixturenames and "dtype" in metafunc.fixturenames:
        cases = [(backend, dtype) for backend in backends for dtype in _dtypes(backend)]
        metafunc.parametrize(("kernel_backend", "dtype"), cases, ids=_id)
    elif "kernel_backend" in metafunc.fixturenames:
        metafunc.parametrize("kernel_backend", backends)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """Give each worker one half of the tests, and what another has not begun when it is done with it.

    By default workers get small parts in turn, and each prepares again what the tests of a divided file share, such as
    processes that have run all cases.
    """
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


# Modules that are kept out of garbage collections.
_frozen_modules = 0


def pytest_collection_finish() -> None:
    """Keep what was imported and collected, a million objects, out of the garbage collections during tests."""
    global _frozen_modules
    gc.collect()
    gc.freeze()
    _frozen_modules = len(sys.modules)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Do so again after a file whose tests imported a compiler or a library."""
    if nextitem is not None and nextitem.path != item.path and len(sys.modules) > _frozen_modules + 200:
        pytest_collection_finish()


def pytest_sessionfinish() -> None:
    """Let modules be freed when the interpreter ends."""
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object:
    """Skip a test, with the error as reason, if forced CUDA kernels do not support this GPU or dtype."""
    try:
        return (yield)
    except Exception as error:
        forced = getattr(pyfuncitem, "callspec", None)
        refused = 'gossamer.backend("cuda") cannot serve' in str(error)
        if refused and forced is not None and forced.params.get("kernel_backend") == "cuda":
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="session")
def device() -> str:
    """The device under test: ``"cuda"`` where there is one, else ``"cpu"``."""
    return DEVICE


@pytest.fixture(params=["amx", "avx512_bf16", "avx512", "avx2", "generic"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native kernels of each instruction set that this processor runs."""
    extension = pytest.importorskip("gossamer._C")
    try:
        extension.choose_isa(request.param)
    except ValueError:
        pytest.skip(f"this processor does not run {request.param}")
    yield request.param
    extension.choose_isa("")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(0)


def _poisoned(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta or tensor.layout != torch.strided or tensor.numel() == 0:
        return tensor
    with torch.no_grad():
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            return tensor.fill_(float("nan"))
        return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max // 2)


def _poisoning(create):
    def created(*args, **kwargs):
        out = create(*args, **kwargs)
        return out if "out" in kwargs else _poisoned(out)

    return created


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch) -> None:
    """New uninitialised tensors hold NaN, or large numbers, so that an element nobody wrote shows in a result."""
    for name in ("empty", "empty_like", "empty_strided", "empty_permuted"):
        monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoning(getattr(torch.Tensor, name)))
