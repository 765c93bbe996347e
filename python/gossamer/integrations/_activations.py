"""Recognise torch's activation functions that expert layers can fuse."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from gossamer.integrations.surgery import hooked

_MODULES: dict[type, str] = {nn.SiLU: "silu", nn.ReLU: "relu"}
_FUNCTIONS: dict[Callable, str] = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu", torch.relu: "relu"}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}


def activation_name(function: object) -> str | None:
    """Name of the ungated :class:`gossamer.Activation` equal to ``function``, or None.

    Args:
        function: a function of torch, a ``functools.partial`` of ``F.gelu`` with its approximation, or a module.
    """
    if isinstance(function, functools.partial):
        if function.func is F.gelu and not function.args and set(function.keywords) == {"approximate"}:
            return _GELUS.get(function.keywords["approximate"])
        return None
    if not isinstance(function, nn.Module):
        return _FUNCTIONS.get(function)
    if hooked(function):
        return None
    if type(function) is nn.GELU:
        return _GELUS[function.approximate]
    return _MODULES.get(type(function))
