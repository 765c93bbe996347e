"""The experts that a dropless layer has, by its options."""

from __future__ import annotations

from gossamer.integrations.megablocks.layers.arguments import Arguments, check_arguments
from gossamer.integrations.megablocks.layers.glu import GroupedGLU, SparseGLU
from gossamer.integrations.megablocks.layers.mlp import GroupedMLP, SparseMLP

_REGISTRY = {
    "mlp": {"grouped": GroupedMLP, "sparse": SparseMLP},
    "glu": {"grouped": GroupedGLU, "sparse": SparseGLU},
}


def get(args: Arguments) -> GroupedMLP:
    """Experts of the class that ``args.mlp_type`` and ``args.mlp_impl`` name.

    Raises:
        ValueError: an option is not supported; the message names it.
    """
    check_arguments(args)
    return _REGISTRY[args.mlp_type][args.mlp_impl](args)
