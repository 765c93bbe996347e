"""Expert layers as block-sparse products: rows sorted by expert and padded to whole blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gossamer._activation import Activation
from gossamer._autocast import autocast
from gossamer.ops.activate import activate
from gossamer.ops.block_sparse import BlockSparseTensor, dsd, sdd
from gossamer.ops.block_topology import BLOCK_SIZES, BlockTopology
from gossamer.ops.dispatch import Dispatch
from gossamer.ops.gather_reduce import gather_reduce


def best_block(name: str, size: int) -> int:
    """The largest block that divides ``size``.

    Raises:
        ValueError: no block divides it.
    """
    for block in reversed(BLOCK_SIZES):
        if size % block == 0:
            return block
    raise ValueError(f"{name} must be a multiple of {BLOCK_SIZES[0]} for block-sparse products, got {size}")


def _row_block(num_rows: int, num_experts: int, device: torch.device) -> int:
    """Rows of a block: at most half of an expert's mean rows, which bounds the padding; on the CPU the smallest size.

    The CPU computes an expert's blocks, which form a rectangle, as one matrix, so their height does not matter.
    """
    if device.type == "cpu":
        return BLOCK_SIZES[0]
    mean = num_rows / num_experts
    return max([block for block in BLOCK_SIZES if 2 * block <= mean], default=BLOCK_SIZES[0])


@dataclass(frozen=True)
class PaddedExperts:
    """The topology of an expert layer's hidden activation, and the gather and scatter of its rows.

    Attributes:
        dispatch: the assignments.
        topology: ``(padded rows, E·ffn)``.
        slots: the slot in each padded row, as in :meth:`BlockTopology.padded_slots`.
        rows: the padded row of each slot, as in :meth:`BlockTopology.padded_rows`.
    """

    dispatch: Dispatch
    topology: BlockTopology
    slots: torch.Tensor
    rows: torch.Tensor

    @staticmethod
    def of(dispatch: Dispatch, ffn_size: int, block: tuple[int, int] | None = None) -> PaddedExperts:
        """The topology for hidden activations of ``ffn_size`` columns per expert, with blocks chosen by the sizes."""
        if block is None:
            rows = _row_block(dispatch.buffer_rows, dispatch.num_experts, dispatch.slots.device)
            block = (rows, best_block("ffn_size", ffn_size))
        topology = BlockTopology.from_dispatch(dispatch, ffn_size, block, skip_padding=True)
        return PaddedExperts(dispatch, topology, *topology.padded_places(dispatch))

    def widened(self, columns: int) -> BlockTopology:
        """The topology with the same rows and ``columns`` columns per expert."""
        return BlockTopology.from_dispatch(self.dispatch, columns, self.topology.block, skip_padding=True)

    def tokens(self) -> torch.Tensor:
        """The token of each padded row; T for padding."""
        top_k = self.dispatch.top_k
        # A shift takes a tenth of the time of a division.
        shift = top_k.bit_length() - 1
        whole = top_k == 1 << shift
        return self.slots >> shift if whole else torch.div(self.slots, top_k, rounding_mode="floor")

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens ``(T, H)`` as padded rows, those of padding zero."""
        return gather_reduce(x, self.tokens(), bounds="drop")

    def add_bias(self, rows: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Padded rows ``(rows, H)`` plus the bias ``(E, H)`` of their experts."""
        height = self.topology.block[0]
        # A block row belongs to one expert: summing its rows first leaves fewer values to sort.
        blocks = torch.arange(self.topology.grid[0], device=rows.device) * height
        experts = torch.searchsorted(self.topology.padded_offsets[1:], blocks, right=True)
        biases = gather_reduce(bias, experts, bounds="drop")
        return (rows.view(-1, height, rows.shape[1]) + biases.unsqueeze(1)).view(rows.shape)

    def matrix(self, values: torch.Tensor) -> BlockSparseTensor:
        """The hidden activation with these values."""
        return BlockSparseTensor(values, self.topology)

    def collect(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Padded rows summed back to tokens, each slot weighted: ``(T, ·)``."""
        return gather_reduce(rows, self.rows.view(weights.shape), weights=weights, bounds="drop")


def _activate_blocks(values: torch.Tensor, activation: Activation, interleaved: bool, wide: int) -> torch.Tensor:
    """Turn blocks ``(nnz, bm, bn)`` of pre-activations, ``wide`` per block row, into blocks of activations."""
    if not activation.gated:
        return activate(values, activation)
    nnz, bm, bn = values.shape
    if interleaved:
        # Two neighbouring blocks hold the left and the right half of the gate and up of one output block.
        halves = activate(values, activation, interleaved=True)
        return halves.view(nnz // 2, 2, bm, bn // 2).transpose(1, 2).reshape(nnz // 2, bm, bn)
    # The gates of a block row come before its ups, as in one long row.
    return activate(values.view(nnz // wide, wide * bm * bn), activation).view(nnz // 2, bm, bn)


def block_sparse_mlp(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    dispatch: Dispatch,
    weights: torch.Tensor,
    *,
    activation: Activation,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    interleaved: bool = False,
    block: tuple[int, int] | None = None,
) -> torch.Tensor:
    """:func:`gossamer.expert_mlp` computed by block-sparse products, with the same arguments.

    The pre-activation of all experts is one block-sparse matrix ``(padded rows, E·2I)``, after MegaBlocks (Gale et al.,
    2023): SDD, the activation on its blocks, DSD.
    """
    x, gate_up, down, gate_up_bias, down_bias = autocast(x, gate_up, down, gate_up_bias, down_bias)
    inner = down.shape[2]
    padded = PaddedExperts.of(dispatch, inner, block)
    wide, bn = gate_up.shape[1], padded.topology.block[1]
    topology = padded.topology if wide == inner else padded.widened(wide)
    bias = None if gate_up_bias is None else gate_up_bias.flatten()
    preact = sdd(x, gate_up.mT, topology, bias=bias, rows=padded.tokens()).values
    hidden = padded.matrix(_activate_blocks(preact, activation, interleaved, wide // bn))
    rows = dsd(hidden, down.mT)
    if down_bias is not None:
        rows = padded.add_bias(rows, down_bias)
    return padded.collect(rows, weights)
