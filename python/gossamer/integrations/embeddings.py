"""Embedding layers of any model, computed by gossamer: ``torch.nn`` modules get gossamer's classes in place."""

from __future__ import annotations

import torch
from torch import nn

from gossamer.integrations import surgery
from gossamer.integrations._report import Replacement, SwitchedModule
from gossamer.nn import Embedding, EmbeddingBag

ADAPTER = "embeddings"
_OURS = {nn.Embedding: Embedding, nn.EmbeddingBag: EmbeddingBag}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def _obstacle(name: str, module: nn.Module) -> str | None:
    """Why gossamer cannot compute this module, or None when it can."""
    if type(module) not in _OURS:
        return f"{type(module).__name__} may compute something else than {type(module).__mro__[1].__name__}"
    if "forward" in module.__dict__:
        return "its forward is overridden on the instance"
    return surgery.tensor_obstacle("its weight", module.weight)


def survey(model: nn.Module, strict: bool) -> surgery.Survey:
    """The embedding layers of torch inside ``model``; raises a ValueError when ``strict`` and there are none."""
    surgery.check_model(model)
    found = surgery.survey(
        (
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, tuple(_OURS)) and not isinstance(module, tuple(_THEIRS))
        ),
        _obstacle,
    )
    if strict and not found.chosen:
        why = surgery.reasons(found.skipped)
        raise ValueError(
            f"model must hold torch.nn.Embedding or torch.nn.EmbeddingBag modules to switch, got none in "
            f"{type(model).__name__}{': ' + why if why else ''}"
        )
    return found


def swap(model: nn.Module, found: surgery.Survey) -> Replacement:
    """Give the chosen modules gossamer's classes."""
    switched = []
    for name, module in found.chosen:
        class_name = type(module).__name__
        bag = "" if type(module) is nn.Embedding else f" of mode {module.mode!r}"
        detail = f"{module.num_embeddings} rows of {module.embedding_dim}{bag}, {module.weight.dtype}"
        module.__class__ = _OURS[type(module)]
        surgery.mark(module, ADAPTER)
        switched.append(SwitchedModule(name, class_name, True, detail))
    return Replacement(tuple(switched), found.skipped, "embedding modules")


def undo_obstacle(module: nn.Module, before: None) -> str | None:
    """Why the module cannot get torch's class back, as when a parametrization changed its class again."""
    if type(module) in _THEIRS:
        return None
    return f"must have the class that replace gave it to be restored, got {type(module).__name__}"


def undo(module: nn.Module, before: None) -> nn.Module:
    """Give the module torch's class back."""
    module.__class__ = _THEIRS[type(module)]
    return module


def replace(model: torch.nn.Module, *, strict: bool = True) -> Replacement:
    """Turn every ``torch.nn.Embedding`` and ``EmbeddingBag`` inside ``model`` into gossamer's, in place.

    The module objects stay, with their parameters, ties, hooks and names: only their class changes, to a subclass with
    another ``forward``. Instances of other classes derived from torch's are left unchanged and listed.

    Args:
        model: any module.
        strict: raise an error if no layer can be switched.

    Returns:
        What was switched.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        ValueError: under ``strict``, no layer can be switched.
    """
    return swap(model, survey(model, strict))


def restore(model: torch.nn.Module) -> bool:
    """Undo :func:`replace`; return whether there was something to undo.

    Raises:
        ValueError: the class of a module was changed since, as by a parametrization; nothing is undone.
    """
    return surgery.undo(model, ADAPTER)
