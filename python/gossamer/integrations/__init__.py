"""Drop-in replacement of sparse layers in other people's models; each adapter is imported when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gossamer.integrations.transformers import Replacement


def replace(model: torch.nn.Module, *, strict: bool = True) -> Replacement:
    """Switch every expert layer of a loaded Hugging Face transformers 5 model to gossamer.

    Weights, their names and the ``state_dict`` stay as they are: only the function that computes the layer changes, as
    with ``model.set_experts_implementation("gossamer")``, which also works once
    ``gossamer.integrations.transformers`` has been imported. :func:`restore` undoes it.

    Args:
        model: a ``PreTrainedModel``, or any module with such models or their experts modules inside.
        strict: whether an experts module that cannot be switched is an error (nothing is changed then); otherwise it is
            left alone and named in the report.

    Returns:
        What was switched and how each layer will be computed; ``print`` it.

    Raises:
        ImportError: transformers is not installed or older than 5.
        TypeError: ``model`` is no ``torch.nn.Module``.
        ValueError: under ``strict``, an experts module that cannot be switched (quantised, or on a device or in a dtype
            without kernels), or no experts module at all.
    """
    from gossamer.integrations import transformers

    return transformers.replace(model, strict=strict)


def restore(model: torch.nn.Module) -> None:
    """Undo :func:`replace`: every layer is computed again by the implementation it had before.

    Raises:
        ImportError: transformers is not installed or older than 5.
        ValueError: ``model`` was not switched by :func:`replace`, or is restored already.
    """
    from gossamer.integrations import transformers

    transformers.restore(model)
