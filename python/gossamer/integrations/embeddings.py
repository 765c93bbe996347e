"""Embedding layers of any model, computed by gossamer: modules of ``torch.nn`` become ours where they stand."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gossamer._checks import FLOAT_DTYPES
from gossamer.integrations._report import Replacement, SkippedModule, SwitchedModule
from gossamer.nn.embeddings.embedding import Embedding, EmbeddingBag

_OURS = {torch.nn.Embedding: Embedding, torch.nn.EmbeddingBag: EmbeddingBag}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
# Set on modules that were switched, so that restore finds them in copies too, and leaves a user's own alone.
_MARK = "_was_torch_nn"


def _obstacle(module: torch.nn.Module) -> str | None:
    """Why gossamer cannot compute this module, or None when it can."""
    if type(module) not in _OURS:
        return f"{type(module).__name__} may compute something else than {type(module).__mro__[1].__name__}"
    if "forward" in module.__dict__:
        return "its forward is overridden on the instance"
    weight = module.weight
    if is_traceable_wrapper_subclass(weight):
        return f"its weight is a {type(weight).__name__}"
    if weight.device.type not in ("cpu", "cuda", "meta"):
        return f"its weight is on {weight.device}; there are kernels for cpu and cuda"
    allowed = FLOAT_DTYPES if weight.device.type == "cuda" else (*FLOAT_DTYPES, torch.float64)
    if weight.dtype not in allowed:
        return f"its weight is {weight.dtype}; there are kernels for {', '.join(map(str, allowed))}"
    return None


def replace(model: torch.nn.Module, *, strict: bool = True) -> Replacement:
    """Turn every ``torch.nn.Embedding`` and ``EmbeddingBag`` inside ``model`` into gossamer's, in place.

    The module objects stay, with their parameters, ties, hooks and names: only their class changes, to a subclass with
    another ``forward``. Instances of other classes derived from torch's are left alone and named.

    Args:
        model: any module.
        strict: whether finding none that can be switched is an error.

    Returns:
        What was switched.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
        ValueError: under ``strict``, there is none.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    switched, skipped = [], []
    for name, module in model.named_modules():
        if not isinstance(module, tuple(_OURS)) or isinstance(module, tuple(_THEIRS)):
            continue
        class_name = type(module).__name__
        if reason := _obstacle(module):
            skipped.append(SkippedModule(name, class_name, reason))
            continue
        bag = "" if type(module) is torch.nn.Embedding else f" of mode {module.mode!r}"
        detail = f"{module.num_embeddings} rows of {module.embedding_dim}{bag}, {module.weight.dtype}"
        module.__class__ = _OURS[type(module)]
        setattr(module, _MARK, True)
        switched.append(SwitchedModule(name, class_name, True, detail))
    if strict and not switched:
        reasons = "; ".join(f"{m.name} ({m.class_name}): {m.reason}" for m in skipped)
        raise ValueError(
            f"model must hold torch.nn.Embedding or torch.nn.EmbeddingBag modules to switch, got none in "
            f"{type(model).__name__}{': ' + reasons if reasons else ''}"
        )
    return Replacement(tuple(switched), tuple(skipped), "embedding modules")


def restore(model: torch.nn.Module) -> bool:
    """Undo :func:`replace`; whether there was something to undo.

    Raises:
        ValueError: a module has got another class since, as from a parametrization; nothing is undone.
    """
    marked = {name: module for name, module in model.named_modules() if _MARK in module.__dict__}
    for name, module in marked.items():
        if type(module) not in _THEIRS:
            raise ValueError(
                f"{name} must have the class that replace gave it to be restored, got {type(module).__name__}"
            )
    for module in marked.values():
        del module.__dict__[_MARK]
        module.__class__ = _THEIRS[type(module)]
    return bool(marked)
