"""Shared by adapters that change other people's models: find modules, explain refusals, swap, mark, undo.

The adapters ``compress``, ``embeddings``, ``peft``, ``quantized``, ``sparsify`` and ``transformers`` use it. An adapter
marks each module it changes with its own name and what is needed to undo the change. Marks lie in the module, so
copies, parts of a model and models around it are restored too. To be undone, an adapter module offers

* ``undo_obstacle(module, before) -> str | None``: why a marked module cannot be undone now;
* ``undo(module, before) -> nn.Module``: the module that replaces it, or the module itself if changed in place.

Adapters that :func:`gossamer.replace` calls also offer ``survey(model, strict) -> Survey``, which changes nothing and
raises an error for what it refuses, ``swap(model, survey) -> Replacement``, and, if they are called without being
named, ``holds_layers(model) -> bool``. All surveys run before the first swap.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gossamer._checks import FLOAT_DTYPES
from gossamer.integrations._report import SkippedModule

# In a marked module's __dict__: what there was before, by the name of the adapter that changed it.
_MARK = "_gossamer_before"


@dataclass(frozen=True)
class Survey:
    """What an adapter found in a model.

    Attributes:
        chosen: paths and modules that it will switch.
        skipped: those it leaves alone, and why.
    """

    chosen: tuple[tuple[str, nn.Module], ...]
    skipped: tuple[SkippedModule, ...]


def loaded_adapter(library: str, name: str | None = None) -> ModuleType | None:
    """The adapter for a library's modules, the library's namesake by default; None until the library is imported."""
    return importlib.import_module(f"gossamer.integrations.{name or library}") if library in sys.modules else None


def check_model(model: object) -> None:
    """Raise a TypeError unless ``model`` is a ``torch.nn.Module``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def survey(found: Iterable[tuple[str, nn.Module]], obstacle: Callable[[str, nn.Module], str | None]) -> Survey:
    """Divide modules into those without an obstacle and those with one."""
    chosen, skipped = [], []
    for name, module in found:
        reason = obstacle(name, module)
        if reason:
            skipped.append(SkippedModule(name, type(module).__name__, reason))
        else:
            chosen.append((name, module))
    return Survey(tuple(chosen), tuple(skipped))


def reasons(skipped: Iterable[SkippedModule], form: str = "{name} ({class_name}): {reason}") -> str:
    """The skipped modules and why, as one line of an error message."""
    return "; ".join(
        form.format(name=m.name or "(the model itself)", class_name=m.class_name, reason=m.reason) for m in skipped
    )


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return "forward" in module.__dict__ or bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_divided(tensor: torch.Tensor | None) -> bool:
    """Whether a tensor is a DTensor; by its class's name, as importing the class takes long."""
    return type(tensor).__name__ == "DTensor"


def tensor_obstacle(
    what: str, tensor: torch.Tensor, devices: tuple[str, ...] = ("cpu", "cuda", "meta"), wrappers: tuple[str, ...] = ()
) -> str | None:
    """Why the kernels cannot read a float tensor, or None when they can.

    Args:
        what: names the tensor in the reason.
        tensor: a weight of some module.
        devices: types of device that are accepted.
        wrappers: names of tensor subclasses that are accepted.
    """
    if is_traceable_wrapper_subclass(tensor) and type(tensor).__name__ not in wrappers:
        return f"{what} is a {type(tensor).__name__}"
    if tensor.device.type not in devices:
        return f"{what} is on {tensor.device}; there are kernels for cpu and cuda"
    allowed = FLOAT_DTYPES if tensor.device.type == "cuda" else (*FLOAT_DTYPES, torch.float64)
    if tensor.dtype not in allowed:
        return f"{what} is {tensor.dtype} on {tensor.device}; there are kernels for {', '.join(map(str, allowed))}"
    return None


def mark(module: nn.Module, adapter: str, before: object = None) -> None:
    """Note that ``adapter`` changed the module; the first note of an adapter stays.

    Args:
        module: as it is after the change.
        adapter: the name of a module of :mod:`gossamer.integrations`.
        before: what ``undo`` needs. It is copied and pickled with the module.
    """
    # A new mapping each time, as shallow copies of the module share the old one.
    module.__dict__[_MARK] = {adapter: before} | module.__dict__.get(_MARK, {})


def marked(model: nn.Module, *adapters: str) -> list[tuple[str, nn.Module, str]]:
    """Path, module and adapter of every mark that these adapters made; of all marks if no adapter is named."""
    return [
        (name, module, adapter)
        for name, module in model.named_modules()
        for adapter in module.__dict__.get(_MARK, ())
        if not adapters or adapter in adapters
    ]


def substitute(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put ``new[module]`` in place of each module, wherever the model holds it."""
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module in new:
                setattr(parent, child, new[module])


def undo(model: nn.Module, *adapters: str) -> bool:
    """Undo the changes marked by these adapters, or by all; returns whether there were any.

    Raises:
        ValueError: a module cannot be undone; nothing is changed then.
    """
    marks = marked(model, *adapters)
    code = {adapter: importlib.import_module(f"gossamer.integrations.{adapter}") for _, _, adapter in marks}
    stuck = []
    for name, module, adapter in marks:
        if reason := code[adapter].undo_obstacle(module, module.__dict__[_MARK][adapter]):
            stuck.append(f"{name or '(the model itself)'} {reason}")
    if stuck:
        raise ValueError("; ".join(dict.fromkeys(stuck)))
    new = {}
    for _, module, adapter in marks:
        befores = module.__dict__.pop(_MARK)
        before = befores[adapter]
        if rest := {other: value for other, value in befores.items() if other != adapter}:
            module.__dict__[_MARK] = rest
        if (restored := code[adapter].undo(module, before)) is not module:
            new[module] = restored
    substitute(model, new)
    return bool(marks)
