"""The dense network that every token meets, by a layer's options."""

from __future__ import annotations

from gossamer.integrations.megablocks.layers.arguments import Arguments, check_arguments
from gossamer.integrations.megablocks.layers.glu import SharedGLU
from gossamer.integrations.megablocks.layers.mlp import SharedMLP


def get(args: Arguments) -> SharedMLP:
    """A shared expert of the class that ``args.mlp_type`` names.

    Raises:
        ValueError: an option is not supported; the message names it.
    """
    check_arguments(args)
    return (SharedGLU if args.mlp_type == "glu" else SharedMLP)(args)
