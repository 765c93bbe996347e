"""Drop-in replacement of sparse layers in other people's models; each adapter is imported when it is first used."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from gossamer.integrations.quantized import load_quantized_experts, quantize_experts
from gossamer.integrations.serving import serve_adapters
from gossamer.integrations.sparsify import sparsify

if TYPE_CHECKING:
    from gossamer.integrations._report import Replacement

__all__ = ["load_quantized_experts", "quantize_experts", "replace", "restore", "serve_adapters", "sparsify"]


def _holds_adapters(model: object) -> bool:
    """Whether PEFT's layers are inside: only then, and only where PEFT is imported already, is it looked at."""
    if "peft" not in sys.modules or not isinstance(model, torch.nn.Module):
        return False
    from gossamer.integrations import peft

    return peft.holds_adapters(model)


def _holds_experts(model: torch.nn.Module) -> bool:
    """Whether experts modules of transformers are inside, which only is looked at where transformers is imported."""
    if "transformers" not in sys.modules:
        return False
    from gossamer.integrations import transformers

    return transformers.holds_experts(model)


def replace(model: torch.nn.Module, *, embeddings: bool = False, strict: bool = True) -> Replacement:
    """Switch the expert layers of a Hugging Face transformers 5 model, and a PEFT model's LoRA layers, to gossamer.

    Weights, their names and the ``state_dict`` stay as they are: only the function that computes a layer changes.
    Expert layers change as with ``model.set_experts_implementation("gossamer")``, which also works once
    ``gossamer.integrations.transformers`` has been imported; LoRA layers as :mod:`gossamer.integrations.peft` says;
    embedding layers as :mod:`gossamer.integrations.embeddings` says. :func:`restore` undoes all.

    Args:
        model: a ``PreTrainedModel``, a ``PeftModel``, or any module with such models or their modules inside.
        embeddings: whether to switch every ``torch.nn.Embedding`` and ``torch.nn.EmbeddingBag`` too. There need then be
            no other layer to switch.
        strict: whether a module that cannot be switched is an error (nothing is changed then); otherwise it is left
            alone and named in the report. An embedding layer of a derived class, whose ``forward`` may be its own, is
            always left alone and named.

    Returns:
        What was switched and how each layer will be computed; ``print`` it.

    Raises:
        ImportError: transformers is not installed or older than 5.
        TypeError: ``model`` is no ``torch.nn.Module``.
        ValueError: an adapter with an option that gossamer does not compute; under ``strict``, a module that cannot be
            switched (quantised experts, a LoRA layer over a convolution, a device or dtype without kernels), or
            nothing to switch at all.
    """
    if not embeddings:
        return _replace_layers(model, strict=strict)
    from gossamer.integrations import embeddings as tables

    switched = tables.replace(model, strict=strict)
    if not _holds_adapters(model) and not _holds_experts(model):
        return switched
    try:
        return switched + _replace_layers(model, strict=strict)
    except ValueError:
        tables.restore(model)
        raise


def _replace_layers(model: torch.nn.Module, *, strict: bool) -> Replacement:
    """Switch expert layers and LoRA layers."""
    from gossamer.integrations import transformers

    if not _holds_adapters(model):
        return transformers.replace(model, strict=strict)
    from gossamer.integrations import peft

    adapters = peft.replace(model, strict=strict)
    if not transformers.holds_experts(model):
        return adapters
    try:
        return adapters + transformers.replace(model, strict=strict)
    except ValueError:
        peft.restore(model)
        raise


def restore(model: torch.nn.Module) -> None:
    """Undo :func:`replace`: every layer is computed again by the implementation it had before.

    Raises:
        ImportError: transformers is not installed or older than 5.
        ValueError: ``model`` was not switched by :func:`replace`, or is restored already.
    """
    undone = False
    if isinstance(model, torch.nn.Module):
        from gossamer.integrations import embeddings

        undone = embeddings.restore(model)
        if "gossamer.integrations.peft" in sys.modules:
            from gossamer.integrations import peft

            undone = peft.restore(model) or undone
    if undone and "gossamer.integrations.transformers" not in sys.modules:
        return
    from gossamer.integrations import transformers

    if not undone or transformers.is_switched(model):
        transformers.restore(model)
