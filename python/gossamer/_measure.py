"""``gossamer.profile`` and ``gossamer.check``: the benchmark harness for a user's own layers, imported when called."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gossamer.bench.harness.check import CheckReport
    from gossamer.bench.harness.profile import ProfileResult


def _bench(module: str) -> ModuleType:
    try:
        importlib.import_module("rich")
    except ImportError as error:
        raise ImportError(f"gossamer.{module} needs {error.name}: pip install 'gossamer[bench]'") from None
    return importlib.import_module(f"gossamer.bench.harness.{module}")


def profile(
    module: Callable,
    *inputs: object,
    reference: Callable | None = None,
    kwargs: Mapping[str, object] | None = None,
    backward: bool = True,
    memory: bool = True,
    trace: str | os.PathLike | None = None,
    plot: str | os.PathLike | None = None,
    budget: float = 1.5,
) -> ProfileResult:
    """Show where the time and memory of a layer go, by operator and kernel, beside those of a reference.

    Runs ``module(*inputs, **kwargs)``, and the backward pass from random output gradients, under torch.profiler. The
    report gives each operator's time, its share of the call, its calls, its least bytes, its FLOPs, and how near these
    come to the rates that the machine reached in the same run. Gossamer's own operators are broken into their stages
    (on the CPU) or kernels (on CUDA). Parameters and their ``.grad`` stay as they are; other state that a forward pass
    changes, such as running statistics, changes.

    >>> print(gossamer.profile(layer, x, reference=eager_layer, trace="layer.json"))

    Args:
        module: an ``nn.Module``, or any callable.
        inputs: its positional arguments; gradients are taken for those that require one, and for all parameters.
        reference: another module or callable to compare with, called with the same arguments.
        kwargs: keyword arguments.
        backward: whether to run the backward pass too.
        memory: whether to record the memory of a training step as well: forward, backward, and a step of AdamW on
            copies of the parameters. Only with ``backward``.
        trace: file for the trace of all profiled calls, ``.json`` or ``.json.gz``, to open in Perfetto or
            ``chrome://tracing``.
        plot: file for a picture of the memory, ``.png`` or ``.svg``.
        budget: seconds of profiled calls for ``module`` and again for ``reference``, of at most 20 calls each.

    Returns:
        A :class:`gossamer.bench.harness.profile.ProfileResult`: ``print`` it, read its ``rows``, or take ``to_json()``.

    Raises:
        ImportError: the extra ``bench`` is not installed.
        TypeError: ``module`` or ``reference`` cannot be called.
        ValueError: a file cannot be written, the budget is not positive, or ``backward`` is set and nothing requires a
            gradient.
    """
    return _bench("profile").profile(
        module,
        *inputs,
        reference=reference,
        kwargs=kwargs,
        backward=backward,
        memory=memory,
        trace=trace,
        plot=plot,
        budget=budget,
    )


def check(
    module: torch.nn.Module,
    replacement: torch.nn.Module | Callable[[torch.nn.Module], torch.nn.Module] | None = None,
    *inputs: object,
    kwargs: Mapping[str, object] | None = None,
    backward: bool = True,
    speed: bool = True,
    seed: int = 0,
) -> CheckReport:
    """Compare a layer with its replacement: are results and gradients right, and is the replacement faster?

    Both run on the same inputs, and backwards from the same random output gradients. The truth is what a copy of
    ``module`` computes in float64. The replacement is right if each result, and each gradient of an input or parameter,
    is as near to the truth as the original in its own dtype is, by the rule of :func:`gossamer.testing.assert_close`.
    If one draw of inputs and output gradients does not settle that, the original's largest error over several draws
    counts. Integer results must be equal. Parameters are matched by name. A replacement that is wrong is not timed.

    >>> report = gossamer.check(model, None, token_ids)
    >>> assert report.ok, report

    Args:
        module: the original. It stays as it is, except for state that a forward pass changes, such as running
            statistics.
        replacement: one of four: another module, with its weights; a function of one argument that turns a copy of
            ``module`` into the replacement; a function without arguments that builds a module, which then gets the
            weights of ``module``; or None, to apply :func:`gossamer.replace` to a copy of ``module``.
        inputs: positional arguments of both. Gradients are taken for all floating-point tensors among them.
        kwargs: keyword arguments of both.
        backward: whether to compare gradients too.
        speed: whether to time both when all is right.
        seed: seed of the output gradients; also set before each run, so that both can draw the same dropout.

    Returns:
        A :class:`gossamer.bench.harness.check.CheckReport`: ``print`` it, test ``ok``, read ``rows``, or take
        ``to_json()``.

    Raises:
        ImportError: the extra ``bench`` is not installed.
        TypeError: ``module`` or ``replacement`` is not a module.
        ValueError: without ``replacement``, :func:`gossamer.replace` finds nothing in ``module`` that it can switch; or
            the module that ``replacement`` builds does not take the weights of ``module``.
    """
    return _bench("check").check(module, replacement, *inputs, kwargs=kwargs, backward=backward, speed=speed, seed=seed)
