"""Shared by the tests of primitives: running a function with its gradients, and comparing with float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gossamer
from gossamer.ops._records import Layout
from gossamer.testing import MAX_EPS, MAX_FACTOR, RMS_EPS, RMS_FACTOR, errors, random_expert_ids


def make_dispatch(num_tokens, num_experts, top_k, device, *, ids=None, **routing) -> gossamer.Dispatch:
    """A dispatch of random ids, sorted by the device's default backend, or of the given ids."""
    if ids is None:
        ids = random_expert_ids(num_tokens, num_experts, top_k, **routing)
    return gossamer.dispatch(ids.to(device), num_experts)


def randn(*shape, seed=0, device="cpu", dtype=torch.float32):
    """Normal numbers that are the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def run(
    function: Callable, inputs: dict[str, torch.Tensor], needs: Iterable[str] = (), dout: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Call ``function(**inputs)``; returns its ``out`` and the gradients of the inputs in ``needs`` by name.

    Inputs keep their strides. ``dout`` is cast to the result's dtype.
    """
    leaves = {k: v.detach() for k, v in inputs.items()}
    for name in needs:
        leaves[name].requires_grad_()
    out = function(**leaves)
    results = {"out": out.detach()}
    if needs:
        out.backward(dout.to(out.dtype))
        results |= {name: leaves[name].grad for name in needs}
        for name, leaf in leaves.items():
            assert name in needs or leaf.grad is None, f"{name} got a gradient it does not need"
    return results


# Number of draws of the baseline's error: a single draw of a few rounding errors is a matter of chance.
DRAWS = 16
# A draw whose error is this many times the baseline's largest is not chance.
WILD = 3


def violations(actual, truth, bounds):
    """Violations of the rule of gossamer.testing.assert_close, given the baseline's errors by name."""
    found = []
    for name, value in actual.items():
        rms, worst = errors(value, truth[name])
        base_rms, base_worst = bounds[name]
        eps = torch.finfo(value.dtype).eps
        if rms > RMS_FACTOR * base_rms + RMS_EPS * eps or worst > MAX_FACTOR * base_worst + MAX_EPS * eps:
            found.append(
                f"{name}: relative RMS error {rms:.3e} against the baseline's {base_rms:.3e}, "
                f"maximum {worst:.3e} against {base_worst:.3e}"
            )
    return found


def run_on_one_thread(
    function: Callable, inputs: dict[str, torch.Tensor], needs: Iterable[str], dout: torch.Tensor
) -> dict[str, torch.Tensor]:
    """:func:`run` on one thread; several of torch's threads add up the gradient of an index in changing orders."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run(function, inputs, needs, dout)
    finally:
        torch.set_num_threads(threads)


def check(
    function: Callable, reference: Callable, inputs: dict[str, torch.Tensor], needs: Iterable[str] | None = None
) -> dict[str, torch.Tensor]:
    """Compare the result and gradients of ``function`` with those of ``reference`` in float64; return the former.

    The rule is that of gossamer.testing.assert_close. The baseline is ``reference`` on the same inputs in their own
    dtypes. If that does not settle it, the baseline also runs on inputs and gradients with rolled columns, which are
    other draws of the same problem. If these do not settle it either, ``function`` runs on them too, and the rule
    applies to the median draw of each, since the largest of a few rounding errors has a long tail on both sides.
    """
    needs = list(inputs) if needs is None else list(needs)
    first = next(iter(inputs))
    wide = {k: v.double() for k, v in inputs.items()}
    shape = reference(**wide).shape
    dout = torch.randn(shape, device=inputs[first].device).to(inputs[first].dtype)
    truth = run(reference, wide, needs, dout.double())
    baseline = run_on_one_thread(reference, inputs, needs, dout)
    actual = run(function, inputs, needs, dout)
    for name, value in actual.items():
        assert value.dtype == baseline[name].dtype and value.shape == truth[name].shape, name
    bounds = {name: errors(value, truth[name]) for name, value in baseline.items()}
    draws = [(lambda: actual, baseline, truth)]
    for draw in range(1, DRAWS):
        if not violations(actual, truth, bounds):
            break
        rolled = inputs | {first: inputs[first].roll(draw, -1)}
        rolled_dout = dout.roll(-draw, -1)
        rolled_truth = run(reference, {k: v.double() for k, v in rolled.items()}, needs, rolled_dout.double())
        rolled_baseline = run_on_one_thread(reference, rolled, needs, rolled_dout)
        draws.append((partial(run, function, rolled, needs, rolled_dout), rolled_baseline, rolled_truth))
        for name, value in rolled_baseline.items():
            bounds[name] = tuple(map(max, bounds[name], errors(value, rolled_truth[name])))
    found = violations(actual, truth, bounds)
    if found:
        drawn = [(compute(), *known) for compute, *known in draws]
        assert all(within_median(name, drawn) for name in actual), "\n".join(found)
    return actual


def within_median(name: str, draws: list) -> bool:
    """Whether a result keeps the rule in the median of ``(actual, baseline, truth)`` draws, without an outlier."""
    eps = torch.finfo(draws[0][0][name].dtype).eps
    ours = torch.tensor([errors(actual[name], truth[name]) for actual, _, truth in draws])
    base = torch.tensor([errors(baseline[name], truth[name]) for _, baseline, truth in draws])
    limit = base.median(0).values * torch.tensor([RMS_FACTOR, MAX_FACTOR]) + torch.tensor([RMS_EPS, MAX_EPS]) * eps
    return bool((ours.median(0).values <= limit).all() and (ours <= WILD * base.amax(0) + MAX_EPS * eps).all())


def check_draws(
    actual: dict[str, torch.Tensor],
    draw: Callable[[int], tuple[dict, dict]],
    compute: Callable[[int], dict[str, torch.Tensor]] | None = None,
) -> None:
    """Compare results with float64 by the rule of gossamer.testing.assert_close.

    ``draw(0)`` returns truth and baseline, as results by name; ``draw(i)`` returns those of other draws of the problem,
    which are made if one draw does not settle the size of the baseline's error. If these do not settle it either, and
    ``compute`` is given, the rule applies to the median draw; ``compute(i)`` returns the results of draw ``i``, as
    ``actual`` holds those of the first.
    """
    truth, baseline = draw(0)
    bounds = {name: errors(value, truth[name]) for name, value in baseline.items()}
    for name, value in actual.items():
        assert value.dtype == baseline[name].dtype and value.shape == truth[name].shape, name
    draws = [(actual, baseline, truth)]
    for i in range(1, DRAWS):
        if not violations(actual, truth, bounds):
            break
        other_truth, other = draw(i)
        draws.append((None, other, other_truth))
        for name, value in other.items():
            bounds[name] = tuple(map(max, bounds[name], errors(value, other_truth[name])))
    found = violations(actual, truth, bounds)
    if found and compute is not None:
        draws[1:] = [(compute(i), *known) for i, (_, *known) in enumerate(draws[1:], 1)]
        found = [] if all(within_median(name, draws) for name in actual) else found
    assert not found, "\n".join(found)


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Assert that all results are equal bit by bit."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs"


def ragged(lengths, num_rows, device, index_dtype=torch.int64):
    """Random ids and offsets of bags of the given lengths."""
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(device, index_dtype)
    index = torch.randint(num_rows, (int(offsets[-1]),)).to(device, index_dtype)
    return index, offsets


class OperatorLog(TorchDispatchMode):
    """Records the calls of gossamer's operators as ``(name, arguments by name, results)``."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Call the operator, and note it if it is one of ours."""
        out = func(*args, **(kwargs or {}))
        if func.namespace == "gossamer":
            names = [argument.name for argument in func._schema.arguments]
            results = out if isinstance(out, (tuple, list)) else (out,)
            self.calls.append((func._opname, dict(zip(names, args, strict=False)) | (kwargs or {}), results))
        return out

    def named(self, name: str) -> list:
        """The calls of one operator."""
        return [call for call in self.calls if call[0] == name]


def saved_tensors(function: Callable, parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors that the graph of ``function()`` keeps for its backward pass, without the parameters themselves."""
    known = {p.data_ptr() for p in parameters}
    saved = []

    def pack(tensor):
        if tensor.data_ptr() not in known:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    del result
    return saved


def huge_storage(num_elements: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """A flat tensor that takes memory page by page, as it is touched (on the CPU); uninitialised and not poisoned."""
    storage = torch.UntypedStorage(num_elements * dtype.itemsize, device=device)
    return torch.tensor([], dtype=dtype, device=device).set_(storage, 0, (num_elements,))


def flat(args: NamedTuple, backend: str) -> tuple:
    """The arguments of the operator over a record, in the order of its schema."""
    return (*Layout(type(args)).flatten(args), backend)


def check_capture(step: Callable[[], torch.Tensor | tuple[torch.Tensor, ...]], change: Callable[[], object]) -> None:
    """Check that ``step()`` on CUDA never waits, and that its graph, replayed after ``change()``, has a call's bits."""
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    change()
    graph.replay()
    expected = step()
    if isinstance(captured, torch.Tensor):
        captured, expected = (captured,), (expected,)
    for value, wanted in zip(captured, expected, strict=True):
        assert torch.equal(value, wanted)
