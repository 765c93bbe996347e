"""Drop-in replacement of sparse layers in other people's models; each adapter is imported when it is first used."""

from __future__ import annotations

import functools
import importlib
import operator

import torch

from gossamer._checks import check_flags
from gossamer.integrations import surgery
from gossamer.integrations._report import Replacement
from gossamer.integrations.compress import compress_embeddings
from gossamer.integrations.freeze import freeze_embeddings
from gossamer.integrations.quantized import load_quantized_experts, quantize_experts
from gossamer.integrations.serving import serve_adapters
from gossamer.integrations.sparsify import sparsify

__all__ = [
    "compress_embeddings",
    "freeze_embeddings",
    "load_quantized_experts",
    "quantize_experts",
    "replace",
    "restore",
    "serve_adapters",
    "sparsify",
]

# The libraries whose layers are switched by default, and the adapters that do it.
_ADAPTERS = (
    ("peft", "peft"),
    ("transformers", "transformers"),
    ("transformers", "expert_classes"),
    ("transformers", "linear_attention"),
)


def replace(model: torch.nn.Module, *, embeddings: bool = False, strict: bool = True) -> Replacement:
    """Switch the expert layers of a Hugging Face transformers 5 model, and the LoRA layers of a PEFT model, to
    gossamer.

    Weights, their names and the ``state_dict`` stay unchanged: only the function that computes a layer changes. Expert
    layers change as with ``model.set_experts_implementation("gossamer")``, which also works once
    ``gossamer.integrations.transformers`` has been imported. LoRA layers change as described in
    :mod:`gossamer.integrations.peft`, embedding layers as in :mod:`gossamer.integrations.embeddings`. Expert layers
    without a setting for their implementation, such as JetMoE's experts and its mixture of attention, change as in
    :mod:`gossamer.integrations.expert_classes`, which names the layers it cannot change. :func:`restore` undoes all of
    this.

    Args:
        model: a ``PreTrainedModel``, a ``PeftModel``, or any module that contains such models or their modules.
        embeddings: whether to switch every ``torch.nn.Embedding`` and ``torch.nn.EmbeddingBag`` too. Then a
            model without other layers to switch is accepted.
        strict: whether a module that cannot be switched is an error (then nothing is changed); otherwise it is left
            unchanged and listed in the report. An embedding layer of a derived class, which may define its own
            ``forward``, is always left unchanged and listed.

    Returns:
        What was switched and how each layer will be computed; ``print`` it.

    Raises:
        ImportError: transformers is not installed or older than 5.
        TypeError: ``model`` is not a ``torch.nn.Module``, or a flag is no bool.
        ValueError: an adapter with an option that gossamer does not compute; under ``strict``, a module that cannot be
            switched (quantised experts, a LoRA layer over a convolution, a device or dtype without kernels), or
            nothing to switch at all.
    """
    check_flags(embeddings=embeddings, strict=strict)
    adapters = [importlib.import_module("gossamer.integrations.embeddings")] if embeddings else []
    if isinstance(model, torch.nn.Module):
        loaded = (surgery.loaded_adapter(library, name) for library, name in _ADAPTERS)
        adapters += [adapter for adapter in loaded if adapter and adapter.holds_layers(model)]
    if not adapters:
        # Its survey raises an error that names what is missing: transformers, a model, or experts in it.
        adapters = [importlib.import_module("gossamer.integrations.transformers")]
    surveys = [adapter.survey(model, strict) for adapter in adapters]
    reports = [adapter.swap(model, found) for adapter, found in zip(adapters, surveys, strict=True)]
    return functools.reduce(operator.add, reports)


def restore(model: torch.nn.Module) -> None:
    """Undo :func:`replace`, :func:`sparsify` and :func:`compress_embeddings`: every layer is computed again by the
    implementation it had before.

    A block-sparse layer becomes dense again, with its current blocks and zeros elsewhere. Compressed tables become
    layers again if they were made with ``keep_original=True``.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        ValueError: ``model`` was not changed, or is restored already; a module, such as quantised experts, cannot be
            restored; then nothing is changed.
    """
    surgery.check_model(model)
    if not surgery.undo(model):
        raise ValueError(
            "model must be one that gossamer.replace switched, or that sparsify or compress_embeddings changed, got "
            f"{type(model).__name__}"
        )
