"""Block-sparse weights in place of the dense ones of any model."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from gossamer.integrations import surgery
from gossamer.integrations._report import SkippedModule
from gossamer.nn.linear.block_sparse import (
    BlockSparseLinear,
    block_scores,
    blocks_at,
    check_density,
    chosen_blocks,
    erk_densities,
    grid_of,
    highest,
)
from gossamer.ops.block_topology import check_block

ADAPTER = "sparsify"
DISTRIBUTIONS = ("uniform", "erk", "global")


@dataclass(frozen=True)
class SparsifiedModule:
    """One linear layer that became block-sparse.

    Attributes:
        name: its path in the model.
        shape: ``(O, I)``.
        block: ``(bm, bn)``.
        blocks: number of stored blocks.
        places: number of blocks of the dense weight.
        parameters: of the layer, before and after.
        flops: of one row through the product, before and after.
    """

    name: str
    shape: tuple[int, int]
    block: tuple[int, int]
    blocks: int
    places: int
    parameters: tuple[int, int]
    flops: tuple[int, int]


@dataclass(frozen=True)
class Sparsification:
    """What :func:`gossamer.sparsify` did; ``print`` it.

    Attributes:
        layers: the layers that are now block-sparse.
        skipped: linear layers left dense, and why.
        model_parameters: of the whole model, before and after.
    """

    layers: tuple[SparsifiedModule, ...]
    skipped: tuple[SkippedModule, ...]
    model_parameters: tuple[int, int]

    @property
    def parameters(self) -> tuple[int, int]:
        """Parameters of the layers that became block-sparse, before and after."""
        return tuple(sum(layer.parameters[i] for layer in self.layers) for i in (0, 1))

    @property
    def flops(self) -> tuple[int, int]:
        """FLOPs of one row through each of these layers, before and after."""
        return tuple(sum(layer.flops[i] for layer in self.layers) for i in (0, 1))

    def __str__(self) -> str:
        def change(before: int, after: int) -> str:
            return f"{before:,} to {after:,} ({after / before:.1%})" if before else "none"

        lines = [
            f"gossamer made {len(self.layers)} of {len(self.layers) + len(self.skipped)} linear modules block-sparse",
            f"  parameters of these: {change(*self.parameters)}; of the model: {change(*self.model_parameters)}",
            f"  FLOPs of a row through these: {change(*self.flops)}",
        ]
        lines += [
            f"  {m.name}: {m.shape[0]} x {m.shape[1]}, {m.blocks} of {m.places} blocks of {m.block[0]} x {m.block[1]} "
            f"({m.blocks / m.places:.1%})"
            for m in self.layers
        ]
        lines += [f"  {m.name}: {m.class_name}, left alone: {m.reason}" for m in self.skipped]
        return "\n".join(lines)


def _obstacle(name: str, module: nn.Module, owners: dict[int, list[str]]) -> str | None:
    """Why this linear layer cannot become block-sparse, or None when it can."""
    if not name:
        return "the model itself is a linear layer: use gossamer.nn.BlockSparseLinear.from_linear"
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} may compute something else than Linear"
    if "forward" in module.__dict__:
        return "its forward is overridden on the instance"
    if surgery.hooked(module):
        return "its calls are watched by hooks, which a new module would not have"
    if reason := surgery.tensor_obstacle("its weight", module.weight, ("cpu", "cuda")):
        return reason
    for what, parameter in (("weight", module.weight), ("bias", module.bias)):
        others = [] if parameter is None else [owner for owner in owners[id(parameter)] if owner != name]
        if others:
            return f"its {what} is tied with that of {', '.join(others)}"
    return None


def _patterns(argument: str, given: str | Iterable[str] | None) -> list[str] | None:
    if given is None:
        return None
    if not isinstance(given, Iterable) or isinstance(given, torch.Tensor):
        raise TypeError(f"{argument} must be names or patterns of names, got {given!r}")
    patterns = [given] if isinstance(given, str) else list(given)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{argument} must be names or patterns of names, got {patterns}")
    return patterns


def _targets(
    model: nn.Module, include: list[str] | None, exclude: list[str]
) -> tuple[dict[str, nn.Module], list[SkippedModule]]:
    """The selected linear layers, and the others; raises an error for a pattern that matches none."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for argument, patterns in (("include", include or []), ("exclude", exclude)):
        for pattern in patterns:
            if not fnmatch.filter(linear, pattern):
                raise ValueError(f"{argument} must name linear layers of the model, got {pattern!r}, which names none")
    targets, skipped = {}, []
    for name, module in linear.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
            skipped.append(SkippedModule(name, type(module).__name__, "excluded"))
        elif include is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
            targets[name] = module
        else:
            skipped.append(SkippedModule(name, type(module).__name__, "not included"))
    return targets, skipped


def _masks(
    targets: dict[str, nn.Linear],
    density: float,
    block: tuple[int, int],
    criterion: str,
    distribution: str,
    generator: torch.Generator | None,
) -> dict[str, torch.Tensor]:
    """Which blocks each layer keeps."""
    grids = {name: grid_of(*module.weight.shape, block) for name, module in targets.items()}
    if distribution == "global":
        scores = torch.cat([block_scores(m.weight, block, criterion).cpu().flatten() for m in targets.values()])
        kept = highest(scores, max(1, round(density * scores.numel())))
        parts = kept.split([math.prod(grid) for grid in grids.values()])
        masks = {name: part.view(grids[name]) for name, part in zip(grids, parts, strict=True)}
        empty = [name for name, mask in masks.items() if not mask.any()]
        if empty:
            raise ValueError(
                f"distribution 'global' must leave every layer a block, but at density {density} these have none: "
                f"{', '.join(empty)}; exclude them, or take 'uniform' or 'erk'"
            )
        return masks
    densities = [density] * len(targets)
    if distribution == "erk":
        densities = erk_densities([tuple(module.weight.shape) for module in targets.values()], density)
    return {
        name: chosen_blocks(module.weight, blocks_at(share, grids[name]), block, criterion, generator)
        for (name, module), share in zip(targets.items(), densities, strict=True)
    }


def undo_obstacle(layer: nn.Module, before: None) -> str | None:
    """Why the layer cannot become dense again."""
    if type(layer) is BlockSparseLinear:
        return None
    return f"must be the BlockSparseLinear that sparsify made to be restored, got {type(layer).__name__}"


def undo(layer: BlockSparseLinear, before: None) -> nn.Module:
    """The dense layer with the current blocks, and zeros elsewhere."""
    linear = layer.to_linear()
    linear.weight.requires_grad_(layer.values.requires_grad)
    if linear.bias is not None:
        linear.bias.requires_grad_(layer.bias.requires_grad)
    return linear


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def sparsify(
    model: nn.Module,
    density: float,
    block: int | tuple[int, int] = 32,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    criterion: str = "magnitude",
    distribution: str = "uniform",
    generator: torch.Generator | None = None,
) -> Sparsification:
    """Turn the linear layers of a model into :class:`gossamer.nn.BlockSparseLinear`, in place.

    Each layer keeps its best blocks with their values, and its bias; the parameter ``weight`` becomes ``values``, so
    create the optimizer afterwards. :meth:`gossamer.nn.BlockSparseLinear.to_linear` converts back to a dense layer with
    zeros for missing blocks, and :func:`gossamer.restore` does so for the whole model. A layer whose blocks would hold
    more values than its weight, because they reach over its edges, stays dense and is listed in the report.

    Args:
        model: any module; it is changed in place, unless an error is raised.
        density: share of the blocks that stay, in (0, 1].
        block: ``(bm, bn)``, each 16, 32, 64 or 128, or one size for both.
        include: names of layers, or patterns such as ``"layers.*.mlp.*"``; None for all linear layers.
        exclude: names or patterns of layers that stay dense.
        criterion: ``"magnitude"``, ``"magnitude_l1"`` or ``"random"``; see
            :meth:`gossamer.nn.BlockSparseLinear.from_linear`.
        distribution: ``"uniform"``, each layer at ``density``; ``"erk"``, small layers denser and all together at
            ``density`` (see :func:`gossamer.nn.erk_densities`; layers that would be full stay unchanged); or
            ``"global"``, the best blocks of all layers together.
        generator: a CPU generator for ``"random"``.

    Returns:
        What was done, with parameters and FLOPs before and after; ``print`` it.

    Raises:
        TypeError: ``model`` is not a module, a pattern no str, or ``density`` is not a number.
        ValueError: a density outside (0, 1], a wrong block, an unknown name, a pattern that names no linear layer, no
            layer at all, or layers that cannot become block-sparse: of classes derived from Linear, with tied weights,
            hooks, or a dtype or device without kernels. The message says how to exclude them.
    """
    surgery.check_model(model)
    check_density(density)
    block = check_block(block)
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {DISTRIBUTIONS}, got {distribution!r}")
    if distribution == "global" and criterion == "random":
        raise ValueError("criterion must score blocks for distribution 'global', got 'random'")
    if exclude is None:
        raise TypeError("exclude must be names or patterns of names, got None")
    targets, skipped = _targets(model, _patterns("include", include), _patterns("exclude", exclude))
    if not targets:
        raise ValueError(f"model must hold linear layers to make block-sparse, got none in {type(model).__name__}")
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    found = surgery.survey(targets.items(), lambda name, module: _obstacle(name, module, owners))
    if found.skipped:
        why = surgery.reasons(found.skipped, "{name}: {reason}")
        raise ValueError(f"model must hold linear layers that can become block-sparse, or exclude them: {why}")

    before = _count(model)
    masks = _masks(targets, density, block, criterion, distribution, generator)
    layers, replaced = [], {}
    for name, module in targets.items():
        mask = masks[name]
        blocks, places = int(mask.sum()), mask.numel()
        if distribution == "erk" and blocks == places:
            skipped.append(SkippedModule(name, "Linear", "its share of the budget is all its blocks"))
            continue
        stored, dense = blocks * math.prod(block), module.weight.numel()
        if stored > dense:
            reason = f"its blocks would hold {stored:,} values, more than its {dense:,}"
            skipped.append(SkippedModule(name, "Linear", reason))
            continue
        layer = BlockSparseLinear.from_linear(module, density, block, mask)
        layer.requires_grad_(module.weight.requires_grad)
        if layer.bias is not None:
            layer.bias.requires_grad_(module.bias.requires_grad)
        surgery.mark(layer, ADAPTER)
        replaced[module] = layer
        flops = (2 * module.weight.numel(), 2 * layer.values.numel())
        shape = (module.out_features, module.in_features)
        layers.append(SparsifiedModule(name, shape, block, blocks, places, (_count(module), _count(layer)), flops))
    surgery.substitute(model, replaced)
    return Sparsification(tuple(layers), tuple(skipped), (before, _count(model)))
