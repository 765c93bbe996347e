"""Products with block-sparse matrices: sampled at blocks (SDD), and with one sparse operand (DSD, DDS)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gossamer import _backend
from gossamer._activation import Activation, activate_reference, as_activation
from gossamer._autocast import autocast
from gossamer._checks import (
    check_device,
    check_dtype,
    check_float,
    check_index,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
)
from gossamer._layout import side_by_side
from gossamer.ops._block_sparse_operators import (
    BlockProduct,
    SampledProduct,
    dsd_operator,
    sdd_operator,
    topology_lists,
)
from gossamer.ops._registration import check_strided
from gossamer.ops.activate import activate
from gossamer.ops.block_topology import BlockTopology, check_parts, check_topology, check_whole_blocks
from gossamer.ops.gather_reduce import gather_reduce


@dataclass(frozen=True)
class BlockSparseTensor:
    """A matrix that stores only some of its blocks.

    Gradients flow through ``values``, which may be a parameter. All methods return new tensors or views.

    Attributes:
        values: ``(nnz, bm, bn)`` float, in the order of the topology; entries after its last block are zero.
        topology: where the blocks are.
    """

    values: torch.Tensor
    topology: BlockTopology

    def __post_init__(self) -> None:
        check_parts(self.topology)
        check_shape("values", self.values, (self.topology.nnz_blocks, *self.topology.block), "(nnz, bm, bn)")
        check_same_device(values=self.values, topology=self.topology.row_offsets)

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, cols)`` in elements."""
        return self.topology.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """The device of values and topology."""
        return self.values.device

    def t(self) -> BlockSparseTensor:
        """The transposed matrix, as a view."""
        return BlockSparseTensor(self.values.transpose(1, 2), self.topology.transposed())

    def detach(self) -> BlockSparseTensor:
        """The same values without their history."""
        return BlockSparseTensor(self.values.detach(), self.topology)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> BlockSparseTensor:
        """The matrix on another device or in another dtype."""
        check_device("device", device)
        check_dtype("dtype", dtype)
        device = self.device if device is None else torch.device(device)
        return BlockSparseTensor(self.values.to(device, dtype or self.dtype), self.topology.to(device))

    def to_dense(self) -> torch.Tensor:
        """``(rows, cols)``, zero where there is no block; differentiable."""
        (rows, cols), (bm, bn) = self.topology.grid, self.topology.block
        # Entries past the last block go to an extra block, which is cut off.
        blocks = self.values.new_zeros(rows * cols + 1, bm, bn)
        blocks = blocks.index_copy(0, self.topology.flat_places(), _in_list_order(self))
        return blocks[: rows * cols].view(rows, cols, bm, bn).transpose(1, 2).reshape(self.shape)

    @staticmethod
    def from_dense(dense: torch.Tensor, topology: BlockTopology) -> BlockSparseTensor:
        """The blocks of ``dense (rows, cols)`` that the topology has; differentiable.

        Raises:
            TypeError: an argument is not a tensor or not a topology.
            ValueError: the shape or device differs from the topology's.
        """
        check_topology(topology)
        check_shape("dense", dense, topology.shape, "(rows, cols)")
        check_same_device(dense=dense, topology=topology.row_offsets)
        if topology.order is not None:
            stored = BlockSparseTensor.from_dense(dense.t(), topology.transposed())
            return BlockSparseTensor(stored.values.transpose(1, 2), topology)
        (rows, cols), (bm, bn) = topology.grid, topology.block
        blocks = dense.reshape(rows, bm, cols, bn).transpose(1, 2).reshape(rows * cols, bm, bn)
        blocks = torch.cat([blocks, blocks.new_zeros(1, bm, bn)])
        return BlockSparseTensor(blocks.index_select(0, topology.flat_places()), topology)

    def to_sparse_bsr(self) -> torch.Tensor:
        """The matrix in torch's BSR layout. Counting the blocks makes the host wait for the device."""
        topology = self.topology
        count = int(topology.row_offsets[-1])
        return torch.sparse_bsr_tensor(
            topology.row_offsets,
            topology.column_indices[:count],
            _in_list_order(self)[:count],
            topology.shape,
            check_invariants=False,
        )

    @staticmethod
    def from_sparse_bsr(tensor: torch.Tensor) -> BlockSparseTensor:
        """A block-sparse matrix from torch's BSR layout; blocks are copied only if a row has them out of order.

        Raises:
            TypeError: ``tensor`` is not in that layout.
            ValueError: it is not 2-D, or its blocks are of other sizes than 16, 32, 64 and 128.
        """
        check_tensor("tensor", tensor)
        if tensor.layout != torch.sparse_bsr:
            raise TypeError(f"tensor must have the layout torch.sparse_bsr, got {tensor.layout}")
        if tensor.dim() != 2:
            raise ValueError(f"tensor must have two dimensions, got {tuple(tensor.shape)}")
        values, offsets, cols = tensor.values(), tensor.crow_indices(), tensor.col_indices()
        rows = torch.repeat_interleave(torch.arange(offsets.shape[0] - 1, device=offsets.device), offsets.diff())
        topology = BlockTopology.from_indices(rows, cols, tuple(tensor.shape), tuple(values.shape[1:]), sort=True)
        places = rows * topology.grid[1] + cols
        if (places.diff() < 0).any():
            values = values.index_select(0, places.argsort())
        return BlockSparseTensor(values, topology)


def _in_list_order(s: BlockSparseTensor) -> torch.Tensor:
    order = s.topology.order
    return s.values if order is None else s.values.index_select(0, order)


def sdd_reference(
    a: torch.Tensor,
    b: torch.Tensor,
    topology: BlockTopology,
    *,
    bias: torch.Tensor | None = None,
    activation: Activation | None = None,
) -> BlockSparseTensor:
    """:func:`sdd` by a dense product in plain torch, differentiable, in any floating dtype."""
    return BlockSparseTensor.from_dense(_finish(a @ _whole(b, 1), bias, activation), topology)


def dsd_reference(
    s: BlockSparseTensor,
    b: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    activation: Activation | None = None,
) -> torch.Tensor:
    """:func:`dsd` by a dense product in plain torch, differentiable, in any floating dtype."""
    return _finish(s.to_dense() @ _whole(b, 0), bias, activation)


def dds_reference(
    a: torch.Tensor,
    s: BlockSparseTensor,
    *,
    bias: torch.Tensor | None = None,
    activation: Activation | None = None,
) -> torch.Tensor:
    """:func:`dds` by a dense product in plain torch, differentiable, in any floating dtype."""
    return _finish(_whole(a, 1) @ s.to_dense(), bias, activation)


def _whole(operand: torch.Tensor, dim: int) -> torch.Tensor:
    return side_by_side(operand, dim) if operand.dim() == 3 else operand


def _finish(y: torch.Tensor, bias: torch.Tensor | None, activation: Activation | None) -> torch.Tensor:
    y = y if bias is None else y + bias
    return y if activation is None else activate_reference(y, activation)


def _operands(backend: str, **named: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors, in autocast's dtype if it is on; checked for one supported dtype and one device."""
    named = dict(zip(named, autocast(*named.values()), strict=True))
    check_float(*next(iter(named.items())), backend)
    check_same_dtype(**named)
    check_same_device(**named)
    check_strided(named, named.values())
    return list(named.values())


def _check_epilogue(
    bias: torch.Tensor | None, columns: int, symbols: str, activation: str | Activation | None
) -> Activation | None:
    if bias is not None:
        check_shape("bias", bias, (columns,), symbols)
    if activation is None:
        return None
    activation = as_activation(activation)
    if activation.gated:
        raise ValueError(f"activation must not be gated, got {activation.name!r}")
    return activation


def _check_operand(
    name: str, operand: torch.Tensor, dim: int, symbols: str, topology: BlockTopology, topology_dim: int
) -> None:
    """Check a dense operand that is blocked along ``dim``: a matrix, or parts of whole blocks ``(G, ·, ·)`` that form
    one.
    """
    size, block = topology.shape[topology_dim], topology.block[topology_dim]
    what = f"{('rows', 'columns')[dim]} of {name}"
    if isinstance(operand, torch.Tensor) and operand.dim() == 3:
        parts, part = operand.shape[0], operand.shape[dim + 1]
        if parts == 0 or part % block:
            raise ValueError(
                f"{name} must come in one or more parts of whole blocks of {block}: {what} are {parts} times {part}"
            )
        size_of = parts * part
    else:
        check_shape(name, operand, (None, None), symbols)
        size_of = operand.shape[dim]
    check_whole_blocks(what, size_of, size, block)


def _needs_gradient(*operands: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)


def _with_activation(
    product: Callable[[str | None], torch.Tensor], activation: Activation | None, operands: tuple
) -> torch.Tensor:
    """The product with its activation: in the kernel, or after it if a gradient needs the pre-activation."""
    if activation is None:
        return product(None)
    if _needs_gradient(*operands):
        return activate(product(None), activation)
    return product(activation.name)


def _stored(topology: BlockTopology) -> BlockTopology:
    """The topology whose list of blocks is in the order of the values."""
    return topology if topology.order is None else topology.transposed()


def sdd(
    a: torch.Tensor,
    b: torch.Tensor,
    topology: BlockTopology,
    *,
    bias: torch.Tensor | None = None,
    activation: str | Activation | None = None,
    rows: torch.Tensor | None = None,
) -> BlockSparseTensor:
    """Dense by dense, computed only at the blocks of a topology: ``S = act(a·b + bias)`` there.

    Args:
        a: ``(rows, K)`` float, of any strides: a transposed operand is given as ``a.t()``. ``rows`` and ``cols`` are
            the topology's, K is any size. ``(T, K)`` if ``rows`` selects its rows.
        b: ``(K, cols)``, dtype and device of ``a``; or G parts of whole blocks, ``(G, K, cols/G)`` of any strides,
            placed side by side, such as the weights of G experts. A product with a transposed view copies them.
        topology: which blocks.
        bias: ``(cols,)``, added to the blocks, or None.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"``, ``"relu"`` or ``"relu2"``, applied to the blocks; None for
            none. It is applied inside the kernel unless a gradient is needed, because the gradient needs the
            pre-activation.
        rows: ``(rows,)`` int32 or int64: the row of ``a`` that is multiplied for each row of the topology, zeros if it
            is outside ``[0, T)``; None to use ``a`` unchanged. Native kernels gather the rows if no gradient is needed.

    Returns:
        The blocks, in the layout of the topology's values. Accumulated in float32 (float64 for float64). Differentiable
        in ``a``, ``b`` and ``bias``. Under ``torch.autocast`` in its dtype.

    Raises:
        TypeError: an argument is not a tensor or a topology, a dtype is not supported, or dtypes differ.
        ValueError: shapes or devices do not fit (for a size that is not in whole blocks, the message gives the padded
            size), or the activation is gated or unknown.
    """
    check_topology(topology)
    check_shape("a", a, (None, None), "(rows, K)" if rows is None else "(T, K)")
    if rows is None:
        check_whole_blocks("rows of a", a.shape[0], topology.shape[0], topology.block[0])
    else:
        check_index("rows", rows)
        check_shape("rows", rows, (topology.shape[0],), "(rows,)")
        check_same_device(a=a, rows=rows)
    _check_operand("b", b, 1, "(K, cols)", topology, 1)
    if b.shape[-2] != a.shape[1]:
        raise ValueError(f"b must have shape (K, cols) = ({a.shape[1]}, any), got {tuple(b.shape)}")
    activation = _check_epilogue(bias, topology.shape[1], "(cols,)", activation)
    backend = _backend.resolve("block_sparse", a)
    a, b, bias = _operands(backend, a=a, b=b, bias=bias)
    if a.device != topology.row_offsets.device:
        check_same_device(a=a, topology=topology.row_offsets)
    transposed = topology.order is not None
    most = torch.iinfo(torch.int32).max
    apart = backend != "native" or transposed or a.shape[0] > most or _needs_gradient(a, b, bias)
    if rows is not None and apart:
        a, rows = gather_reduce(a, rows, bounds="drop"), None
    if backend == "reference":
        return sdd_reference(a, b, topology, bias=bias, activation=activation)
    if rows is not None and rows.dtype == torch.int64:
        rows = rows.clamp(-1, most)
    a_rows = None if rows is None else rows.to(torch.int32)
    # For a transposed view, the values come from the transposed product, in which the bias runs along rows.
    operands = (_whole(b, 1).t(), a.t()) if transposed else (a, b)
    stored = _stored(topology)

    def product(name: str | None) -> torch.Tensor:
        args = SampledProduct(*operands, bias, topology_lists(stored), *stored.block, transposed, name, a_rows)
        return sdd_operator(args, backend)

    values = _with_activation(product, activation, (a, b, bias))
    return BlockSparseTensor(values.transpose(1, 2) if transposed else values, topology)


def dsd(
    s: BlockSparseTensor,
    b: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    activation: str | Activation | None = None,
) -> torch.Tensor:
    """Block-sparse by dense: ``y = act(s·b + bias)``.

    Args:
        s: ``(rows, cols)``; ``s.t()`` for a transposed one.
        b: ``(cols, N)``, any strides and any N; dtype and device of ``s``. Or in G parts of whole blocks,
            ``(G, cols/G, N)``, one below the other.
        bias: ``(N,)`` or None.
        activation: as for :func:`sdd`.

    Returns:
        ``(rows, N)``; rows without blocks are ``act(bias)``. Accumulated in float32 (float64 for float64).
        Differentiable in ``s.values``, ``b`` and ``bias``. Under ``torch.autocast`` in its dtype.

    Raises:
        TypeError: an argument is not a tensor or a :class:`BlockSparseTensor`, or dtypes are unsupported or differ.
        ValueError: as for :func:`sdd`.
    """
    _check_sparse("s", s)
    _check_operand("b", b, 0, "(cols, N)", s.topology, 1)
    activation = _check_epilogue(bias, b.shape[-1], "(N,)", activation)
    backend = _backend.resolve("block_sparse", b)
    values, b, bias = _operands(backend, s=s.values, b=b, bias=bias)
    if backend == "reference":
        return dsd_reference(BlockSparseTensor(values, s.topology), b, bias=bias, activation=activation)
    return _sparse_product(values, s.topology, b, bias, activation, False, backend)


def dds(
    a: torch.Tensor,
    s: BlockSparseTensor,
    *,
    bias: torch.Tensor | None = None,
    activation: str | Activation | None = None,
) -> torch.Tensor:
    """Dense by block-sparse: ``y = act(a·s + bias)``. A linear layer is ``dds(x, weight.t())``.

    Args:
        a: ``(M, rows)``, any strides and any M; dtype and device of ``s``. Or in G parts of whole blocks,
            ``(G, M, rows/G)``, side by side.
        s: ``(rows, cols)``; ``s.t()`` for a transposed one.
        bias: ``(cols,)`` or None.
        activation: as for :func:`sdd`.

    Returns:
        ``(M, cols)``; columns without blocks are ``act(bias)``. Accumulated in float32 (float64 for float64).
        Differentiable in ``a``, ``s.values`` and ``bias``. Under ``torch.autocast`` in its dtype.

    Raises:
        TypeError: an argument is not a tensor or a :class:`BlockSparseTensor`, or dtypes are unsupported or differ.
        ValueError: as for :func:`sdd`.
    """
    _check_sparse("s", s)
    _check_operand("a", a, 1, "(M, rows)", s.topology, 0)
    activation = _check_epilogue(bias, s.shape[1], "(cols,)", activation)
    backend = _backend.resolve("block_sparse", a)
    a, values, bias = _operands(backend, a=a, s=s.values, bias=bias)
    if backend == "reference":
        return dds_reference(a, BlockSparseTensor(values, s.topology), bias=bias, activation=activation)
    return _sparse_product(values, s.topology, a.mT, bias, activation, True, backend).t()


def _check_sparse(name: str, value: object) -> None:
    if not isinstance(value, BlockSparseTensor):
        raise TypeError(f"{name} must be a gossamer.BlockSparseTensor, got {type(value).__name__}")
    check_topology(value.topology)


def _sparse_product(
    values: torch.Tensor,
    topology: BlockTopology,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Activation | None,
    flipped: bool,
    backend: str,
) -> torch.Tensor:
    """``act(s·b + bias)``, stored row by row; with ``flipped``, uses sᵀ instead of s and stores column by column."""
    if topology.order is not None:
        # The values are laid out for the matrix of which this one is a transposed view.
        topology, values, transposed = topology.transposed(), values.transpose(1, 2), not flipped
    else:
        transposed = flipped
    lists = topology_lists(topology)

    def product(name: str | None) -> torch.Tensor:
        args = BlockProduct(values, b, bias, lists, transposed, flipped, activation=name)
        return dsd_operator(args, backend)

    return _with_activation(product, activation, (values, b, bias))
