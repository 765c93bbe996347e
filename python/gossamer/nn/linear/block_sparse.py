"""A linear layer that stores only some blocks of its weight."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from gossamer._checks import (
    check_flag,
    check_input,
    check_number,
    check_sequence,
    check_shape,
    check_sizes,
    check_widths,
)
from gossamer._parameters import factory_of, new_parameter
from gossamer.nn.replicas import evaluated_when_compiled
from gossamer.ops.block_sparse import BlockSparseTensor, dds
from gossamer.ops.block_topology import BlockTopology, check_block, check_topology

CRITERIA = ("magnitude", "magnitude_l1", "random")
# Number of rows of the dense gradient held at a time while its blocks are scored.
_TILE_ROWS = 256


def grid_of(out_features: int, in_features: int, block: tuple[int, int]) -> tuple[int, int]:
    """Block rows and block columns of a weight ``(O, I)``, the last ones padded."""
    return -(-out_features // block[0]), -(-in_features // block[1])


def blocks_at(density: float, grid: tuple[int, int]) -> int:
    """The number of blocks for a density, at least one."""
    return max(1, round(density * grid[0] * grid[1]))


def check_density(density: float) -> None:
    """A density must be a number in (0, 1]."""
    check_number("density", density, above=0, most=1)


def padded_to_blocks(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """``(O, I)`` with zeros up to whole blocks."""
    rows, cols = grid_of(*weight.shape, block)
    return F.pad(weight, (0, cols * block[1] - weight.shape[1], 0, rows * block[0] - weight.shape[0]))


def block_scores(weight: torch.Tensor, block: tuple[int, int], criterion: str = "magnitude") -> torch.Tensor:
    """Score each block of a dense ``weight (O, I)``: block magnitude pruning.

    Args:
        weight: ``(O, I)``; the last blocks of a row or column may be cut.
        block: ``(bm, bn)``.
        criterion: ``"magnitude"``, the Frobenius norm ``‖W_b‖`` over ``√(bm·bn)``; or ``"magnitude_l1"``, the mean of
            ``|w|``. The two can disagree: a single large weight counts more in the first.

    Returns:
        ``(O/bm, I/bn)`` float32, rounded up.
    """
    rows, cols = grid_of(*weight.shape, block)
    blocks = padded_to_blocks(weight.detach(), block).view(rows, block[0], cols, block[1]).float()
    if criterion == "magnitude":
        return blocks.square().mean(dim=(1, 3)).sqrt()
    return blocks.abs().mean(dim=(1, 3))


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """A mask of the ``count`` highest scores, in the shape of ``scores``; among equal scores the first."""
    order = scores.flatten().argsort(descending=True, stable=True)[:count]
    return (
        torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device).index_fill(0, order, True).view_as(scores)
    )


def _observe(observed: list[tuple[torch.Tensor, torch.Tensor]], inputs: torch.Tensor, y: torch.Tensor) -> None:
    """Append ``(x, dy)`` to ``observed`` when the backward pass reaches ``y``."""
    inputs = inputs.detach()
    y.register_hook(lambda dy: observed.append((inputs, dy.detach())))


class BlockSparseLinear(nn.Module):
    """``y = x·Wᵀ + b`` with a block-sparse weight, in place of ``nn.Linear``.

    Only the blocks are stored and multiplied, and only they have gradients and optimizer state. Their positions are
    fixed until :class:`PruneAndRegrow`, a loaded state or a new ``topology`` changes them. Sizes need not be multiples
    of the block size.

    >>> layer = gossamer.nn.BlockSparseLinear(1024, 1024, density=1 / 8, block=64)
    >>> layer = gossamer.nn.BlockSparseLinear.from_linear(linear, density=1 / 8, block=64)

    Args:
        in_features: I.
        out_features: O.
        bias: whether there is one.
        density: share of the blocks, in (0, 1], at random and spread evenly over the block rows; at least one block.
        block: ``(bm, bn)``, each 16, 32, 64 or 128, or one size for both.
        topology: the blocks, instead of a random choice; with the weight's shape in whole blocks. ``density`` and
            ``block`` are then ignored.
        generator: a CPU generator that the random choice is drawn from.
        device: of parameters.
        dtype: of parameters.

    Attributes:
        values: parameter ``(nnz, bm, bn)``, the blocks row by row. At first uniform in ``±1/√n``, n the mean number of
            inputs that an output has.
        bias: parameter ``(O,)`` or None.
        block_mask: buffer ``(O/bm, I/bn)`` bool, the positions of the blocks. Saved and loaded with the values.

    Raises:
        TypeError: a size is not an int, ``density`` is not a number, or ``topology`` is not a BlockTopology.
        ValueError: a size below 1, a density outside (0, 1], a wrong block, or a topology of another shape.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        density: float = 0.125,
        block: int | tuple[int, int] = 32,
        topology: BlockTopology | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_widths(in_features=in_features, out_features=out_features)
        check_flag("bias", bias)
        self.in_features, self.out_features = in_features, out_features
        if topology is None:
            check_density(density)
            block = check_block(block)
            grid = grid_of(out_features, in_features, block)
            shape = (grid[0] * block[0], grid[1] * block[1])
            count = blocks_at(density, grid)
        else:
            check_topology(topology)
            block, count = topology.block, topology.nnz_blocks
        device = torch.get_default_device() if device is None else device
        factory = factory_of(device, dtype)
        # Allocated before choosing blocks, so that a layer too large for the memory fails immediately.
        values = torch.empty(count, *block, **factory)
        if topology is None:
            share = count / (grid[0] * grid[1])
            topology = BlockTopology.random(shape, block, share, generator=generator, balanced=True)
        self._set_topology(topology, values.device)
        self.values = nn.Parameter(values)
        self.bias = new_parameter(out_features, **factory) if bias else None
        # Pairs of input and output gradient while gradients of missing blocks are tracked; else None.
        self.observe_gradient(False)
        self.reset_parameters()

    def _set_topology(self, topology: BlockTopology, device: torch.device) -> None:
        grid = grid_of(self.out_features, self.in_features, topology.block)
        if topology.order is not None or topology.grid != grid:
            wanted = (grid[0] * topology.block[0], grid[1] * topology.block[1])
            raise ValueError(
                f"topology must have shape (O, I) in whole blocks = {wanted} and not be a transposed view, got "
                f"{topology.shape}{' transposed' if topology.order is not None else ''}"
            )
        mask = topology.to_mask()
        if not topology.row_offsets.is_meta and (found := int(mask.sum())) != topology.nnz_blocks:
            raise ValueError(
                f"topology must have as many blocks as it has room for, {topology.nnz_blocks}, got {found}"
            )
        # Cloned: the mask is a view of a longer tensor, which safetensors does not store.
        self.register_buffer("block_mask", mask.to(device).clone())
        self._adopt(topology.to(device))

    def _adopt(self, topology: BlockTopology) -> None:
        """Rebuild the topology from ``block_mask``."""
        self._topology, self._mask = topology, self.block_mask
        self._mask_version = _version(self.block_mask)

    @property
    def topology(self) -> BlockTopology:
        """The positions of the blocks in the padded weight.

        It follows ``block_mask``, also when a checkpoint, averaged weights or another process's copy is written into
        the mask; all other state determines only the number of blocks. In compiled code it is the topology
        at compilation or, with torch older than 2.13, at the layer's last call before it.

        Raises:
            ValueError: on the CPU, ``block_mask`` and ``values`` have different numbers of blocks.
        """
        _follow_mask(self)
        return self._topology

    @property
    def block(self) -> tuple[int, int]:
        """``(bm, bn)``."""
        return self._topology.block

    @property
    def density(self) -> float:
        """The share of blocks that are stored."""
        return self._topology.density

    @property
    def weight(self) -> BlockSparseTensor:
        """The weight in whole blocks; a differentiable view of ``values``."""
        return BlockSparseTensor(self.values, self.topology)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the stored blocks and the bias again."""
        bound = max(1.0, self.density * self.in_features) ** -0.5
        nn.init.uniform_(self.values, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        # Parameters may be on the meta device while buffers are not.
        (bm, bn), device = self.block, self.values.device
        topology = self.topology.to(device)
        rows = topology.row_indices.unsqueeze(1) * bm + torch.arange(bm, device=device) < self.out_features
        cols = topology.column_indices.unsqueeze(1) * bn + torch.arange(bn, device=device) < self.in_features
        # Padding past the edge is zero and gets no gradient, so it stays zero.
        self.values.mul_(rows.unsqueeze(2) & cols.unsqueeze(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output.

        Args:
            x: ``(..., I)``, the dtype of the parameters.

        Returns:
            ``(..., O)``; under autocast in its dtype.

        Raises:
            TypeError: dtypes do not fit.
            ValueError: the shape or device does not fit.
        """
        check_input(x, self.in_features, self.values)
        rows, cols = self._topology.shape
        inputs = F.pad(x.reshape(-1, self.in_features), (0, cols - self.in_features))
        bias = None if self.bias is None else F.pad(self.bias, (0, rows - self.out_features))
        y = dds(inputs, self.weight.t(), bias=bias)
        if self._observed is not None and y.requires_grad:
            self._observe(self._observed, inputs, y)
        return y[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)

    def observe_gradient(self, on: bool = True) -> None:
        """Start or stop recording data for :meth:`gradient_norms`; stopping discards it."""
        self._observed: list[tuple[torch.Tensor, torch.Tensor]] | None = [] if on else None
        # Decorated on first use, because decorating loads the compiler, which an import must not do.
        self._observe = torch.compiler.disable(_observe) if on else None

    @torch.no_grad()
    def gradient_norms(self) -> torch.Tensor | None:
        """``‖G_b‖``, the Frobenius norm of each block of the dense gradient ``G = Σ dyᵀ·x``, stored or not.

        It covers the backward passes since :meth:`observe_gradient`. A band of at most 256 rows of ``G`` exists at a
        time; ``G`` as a whole never does.

        Returns:
            ``(O/bm, I/bn)`` float32, or None where no backward pass has reached the layer.

        Raises:
            ValueError: the gradient is not observed.
        """
        if self._observed is None:
            raise ValueError("gradient_norms needs observe_gradient() before the forward pass")
        if not self._observed:
            return None
        (rows, cols), (bm, bn) = self._topology.grid, self.block
        wide = torch.promote_types(self.values.dtype, torch.float32)
        pairs = [(x.to(wide), dy) for x, dy in self._observed]
        step, norms = max(1, _TILE_ROWS // bm), []
        for first in range(0, rows, step):
            last = min(first + step, rows)
            band = sum(dy[:, first * bm : last * bm].to(wide).t() @ x for x, dy in pairs)
            norms.append(band.view(last - first, bm, cols, bn).square().sum(dim=(1, 3)).sqrt())
        return torch.cat(norms).float()

    @torch.no_grad()
    def change_topology(self, mask: torch.Tensor) -> torch.Tensor:
        """Change the positions of the blocks, not their number: kept blocks keep their values, new ones are zero.

        Gradients, which belong to the old positions, are dropped. On CUDA nothing is read on the host.

        Args:
            mask: ``(O/bm, I/bn)`` bool with as many blocks as now.

        Returns:
            ``(nnz,)`` int64: for each block its old position in ``values``, or −1 for a new one. Use
            :func:`move_blocks_` to move other data stored by block, such as optimizer state.

        Raises:
            TypeError: ``mask`` is not a bool tensor.
            ValueError: another shape or, on the CPU, another number of blocks.
        """
        check_shape("mask", mask, self._topology.grid, "(O/bm, I/bn)")
        nnz = self._topology.nnz_blocks
        if mask.device.type == "cpu" and (found := int(mask.sum())) != nnz:
            raise ValueError(f"mask must have as many blocks as the layer, {nnz}, got {found}")
        topology = BlockTopology.from_mask(mask, self.block, nnz=nnz)
        places = mask.numel()
        old = torch.full((places,), -1, dtype=torch.int64, device=mask.device)
        old = old.scatter(0, self.topology.flat_places(), torch.arange(nnz, device=mask.device))
        source = old[topology.flat_places()]
        self.block_mask.copy_(mask)
        self._adopt(topology)
        move_blocks_(self.values, source)
        self.values.grad = None
        return source

    def _apply(self, fn, recurse=True):
        topology, unknown = self.topology, self.block_mask.is_meta
        super()._apply(fn, recurse)
        if unknown and not self.block_mask.is_meta:
            # The memory is uninitialised, so arbitrary blocks are used, as in the constructor, until a state is loaded.
            topology = BlockTopology.random(topology.shape, topology.block, topology.density, balanced=True)
            self.block_mask.copy_(topology.to_mask())
        self._adopt(topology.to(self.block_mask.device))
        return self

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        mask, values = (state_dict.get(f"{prefix}{name}") for name in ("block_mask", "values"))
        if mask is not None and values is not None and not mask.is_meta and int(mask.sum()) != values.shape[0]:
            errors.append(f"{prefix}block_mask has {int(mask.sum())} blocks, {prefix}values {values.shape[0]} of them")
            return
        before = len(errors)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if mask is None or self.block_mask.is_meta:
            return
        if len(errors) == before:
            _follow_mask(self)
        else:
            self.block_mask.copy_(self._topology.to_mask())
            self._adopt(self._topology)

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        density: float,
        block: int | tuple[int, int] = 32,
        criterion: str | torch.Tensor = "magnitude",
        *,
        generator: torch.Generator | None = None,
    ) -> BlockSparseLinear:
        """A layer with some blocks of a dense layer; values and bias are copied.

        Args:
            linear: ``nn.Linear``.
            density: share of the blocks that stay, in (0, 1]; not read with a mask.
            block: ``(bm, bn)``, each 16, 32, 64 or 128, or one size for both.
            criterion: ``"magnitude"`` or ``"magnitude_l1"`` keep the blocks of highest :func:`block_scores`;
                ``"random"`` any; or a mask ``(O/bm, I/bn)`` bool says which.
            generator: a CPU generator for ``"random"``.

        Raises:
            TypeError: ``linear`` is not an ``nn.Linear``, or a density is not a number.
            ValueError: a density outside (0, 1], a wrong block, an unknown criterion, or a mask of another shape.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        block = check_block(block)
        weight = linear.weight
        grid = grid_of(*weight.shape, block)
        if isinstance(criterion, torch.Tensor):
            check_shape("criterion", criterion, grid, "(O/bm, I/bn)")
            mask = criterion.to(weight.device)
        else:
            check_density(density)
            mask = chosen_blocks(weight, blocks_at(density, grid), block, criterion, generator)
        topology = BlockTopology.from_mask(mask, block)
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            topology=topology,
            device=weight.device,
            dtype=weight.dtype,
        )
        layer.values.copy_(BlockSparseTensor.from_dense(padded_to_blocks(weight, block), topology).values)
        if linear.bias is not None:
            layer.bias.copy_(linear.bias)
        return layer.train(linear.training)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A dense ``nn.Linear`` with the same output: zeros for missing blocks, values and bias copied."""
        form = {"device": self.values.device, "dtype": self.values.dtype}
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, **form)
        linear.weight.copy_(self.weight.to_dense()[: self.out_features, : self.in_features])
        if self.bias is not None:
            linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Sizes."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"density={self.density:.3g}, block={self.block}"
        )


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; constant for tensors that do not count it."""
    return 0 if tensor.is_inference() else tensor._version


@evaluated_when_compiled
def _follow_mask(layer: BlockSparseLinear) -> None:
    """Rebuild a layer's topology if its mask was replaced or written to."""
    if torch.compiler.is_exporting():
        # Exports keep the current topology; their mask is a stand-in without values.
        return
    mask, values = layer.block_mask, layer.values
    if (mask is layer._mask and _version(mask) == layer._mask_version) or mask.is_meta:
        return
    if mask.device.type == "cpu" and (found := int(mask.sum())) != values.shape[0]:
        raise ValueError(f"block_mask must have as many blocks as values, {values.shape[0]}, got {found}")
    layer._adopt(BlockTopology.from_mask(mask, layer.block, nnz=values.shape[0]))


def chosen_blocks(
    weight: torch.Tensor, count: int, block: tuple[int, int], criterion: str, generator: torch.Generator | None
) -> torch.Tensor:
    """A mask of ``count`` blocks of a dense weight by a criterion of :meth:`BlockSparseLinear.from_linear`."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {CRITERIA} or a mask, got {criterion!r}")
    if criterion == "random":
        # Drawn on the CPU, so that the choice is the same on every device.
        grid = grid_of(*weight.shape, block)
        scores = torch.rand(grid, generator=generator, device="cpu", dtype=torch.float32).to(weight.device)
    else:
        scores = block_scores(weight, block, criterion)
    return highest(scores, count)


def move_blocks_(stored: torch.Tensor, source: torch.Tensor) -> None:
    """Move values stored by block, ``(nnz, ...)``, to a changed topology; new blocks are zero."""
    new = (source < 0).view(-1, *[1] * (stored.dim() - 1))
    stored.copy_(stored.index_select(0, source.clamp(min=0)).masked_fill(new, 0))


def erk_densities(shapes: list[tuple[int, ...]], density: float) -> list[float]:
    """Densities of layers by the Erdős–Rényi-Kernel rule of RigL (Evci et al., 2020): small layers get more.

    ``density_l ∝ Σ(sizes) / Π(sizes)``, scaled so that all layers together have ``density``; layers that would pass 1
    are dense, and the rest is solved for again.

    Args:
        shapes: sizes of each weight.
        density: of all weights together, in (0, 1].

    Returns:
        One density per layer.

    Raises:
        TypeError: ``density`` is not a number, or ``shapes`` are not sequences of ints.
        ValueError: it is outside (0, 1], or a shape is empty.
    """
    check_density(density)
    check_sequence("shapes", shapes)
    for i, shape in enumerate(shapes):
        check_sequence(f"shapes[{i}]", shape)
        check_sizes(**{f"shapes[{i}][{dim}]": size for dim, size in enumerate(shape)})
    sizes = [math.prod(shape) for shape in shapes]
    if not all(sizes):
        raise ValueError(f"shapes must have elements, got {shapes}")
    dense: set[int] = set()
    while True:
        budget = density * sum(sizes) - sum(sizes[i] for i in dense)
        open_sums = sum(sum(shapes[i]) for i in range(len(shapes)) if i not in dense)
        scale = budget / open_sums if open_sums else 0.0
        found = [1.0 if i in dense else scale * sum(shape) / sizes[i] for i, shape in enumerate(shapes)]
        passed = {i for i, value in enumerate(found) if value > 1}
        if not passed:
            return found
        dense |= passed
