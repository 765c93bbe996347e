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
    """Where the time and memory of a layer go: its operators and their kernels, beside a reference's.

    Runs ``module(*inputs, **kwargs)``, and the backward pass from random output gradients, under torch.profiler. Each
    operator is given with its time, share, calls, least bytes, FLOPs, and how near that is to what the machine reached
    in the same run. Gossamer's own operators are broken into their stages (on the CPU) or kernels (on CUDA). Parameters
    and their ``.grad`` are left alone; what a forward pass changes otherwise, such as running statistics, changes.

    >>> print(gossamer.profile(layer, x, reference=eager_layer, trace="layer.json"))

    Args:
        module: an ``nn.Module``, or any callable.
        inputs: its positional arguments; gradients are taken for those that require one, and for all parameters.
        reference: another module or callable to hold beside it, on the same arguments.
        kwargs: keyword arguments.
        backward: whether to run the backward pass too.
        memory: whether to draw up the memory of a training step: forward, backward, and a step of AdamW on copies of
            the parameters. Only with ``backward``.
        trace: file for all profiled calls, ``.json`` or ``.json.gz``, to open in Perfetto or ``chrome://tracing``.
        plot: file for a picture of the memory, ``.png`` or ``.svg``.
        budget: seconds of profiled calls for each of the two, 20 calls at most.

    Returns:
        A :class:`gossamer.bench.harness.profile.ProfileResult`: ``print`` it, read its ``rows``, or take ``to_json()``.

    Raises:
        ImportError: the extra ``bench`` is not installed.
        TypeError: ``module`` or ``reference`` cannot be called.
        ValueError: a file cannot be written, the budget is not positive, or ``backward`` with nothing that requires a
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
    """A layer and its replacement side by side: are results and gradients right, and is it faster.

    Both run on the same inputs, and backwards from the same random output gradients. Truth is a copy of ``module`` in
    float64. The replacement is right where each result, and each gradient of an input or parameter, is as near to the
    truth as the original in its own dtype is, by the rule of :func:`gossamer.testing.assert_close`; where one draw does
    not settle it, the largest of the original's errors over several inputs and output gradients counts. Integer results
    must be equal. Parameters are matched by name. A replacement that is wrong is not timed.

    >>> report = gossamer.check(model, None, token_ids)
    >>> assert report.ok, report

    Args:
        module: the original. It is left as it is, but for what a forward pass changes, such as running statistics.
        replacement: another module, with its weights; a function of one argument that makes one of a copy of
            ``module``; a function that needs no argument and builds one, which is then given the weights of
            ``module``; or None for what :func:`gossamer.replace` makes of a copy.
        inputs: positional arguments of both. Gradients are taken for all floating-point tensors among them.
        kwargs: keyword arguments of both.
        backward: whether to compare gradients too.
        speed: whether to time both when all is right.
        seed: of the output gradients, and set before each run, so that dropout can be the same.

    Returns:
        A :class:`gossamer.bench.harness.check.CheckReport`: ``print`` it, test ``ok``, read ``rows``, or take
        ``to_json()``.

    Raises:
        ImportError: the extra ``bench`` is not installed.
        TypeError: ``module`` or ``replacement`` is not a module.
        ValueError: without ``replacement``, :func:`gossamer.replace` finds nothing in ``module`` that it can switch;
            or what ``replacement`` builds does not take the weights of ``module``.
    """
    return _bench("check").check(module, replacement, *inputs, kwargs=kwargs, backward=backward, speed=speed, seed=seed)
