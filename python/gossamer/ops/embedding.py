"""Row lookup as in ``torch.nn.functional.embedding``, and helpers of the embedding layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from gossamer import _backend
from gossamer._checks import check_float, check_index, check_padding_idx, check_same_device, check_shape
from gossamer._numerics import accumulation_dtype
from gossamer.ops._bags import Bags
from gossamer.ops._records import define
from gossamer.ops.gather_reduce import GatherReduce, forward, table_gradient


def _occurrences(index: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Number of times that ``index`` lists each row, at least 1; ids outside the table are not counted."""
    inside = (index >= 0) & (index < num_rows)
    counts = torch.zeros(num_rows + 1, dtype=torch.int64, device=index.device)
    rows = torch.where(inside, index, num_rows).reshape(-1).long()
    counts.scatter_add_(0, rows, torch.ones_like(rows))
    return counts[:num_rows].clamp_(min=1)


def inverse_frequency(index: torch.Tensor, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    """For each id the inverse of its number of occurrences in ``index``, shaped like ``index``; 1 for ids outside the
    table.
    """
    if num_rows == 0:
        return torch.ones(index.shape, dtype=dtype, device=index.device)
    inside = (index >= 0) & (index < num_rows)
    counts = _occurrences(index, num_rows)[torch.where(inside, index, 0).long()]
    return 1 / torch.where(inside, counts, 1).to(dtype)


class Embedding(NamedTuple):
    """Arguments of a lookup of rows.

    Attributes:
        table: ``(N, D)`` float.
        index: int32 or int64 of any shape.
        padding_idx: a row that is read, but gets no gradient; −1 for none.
        scale_grad_by_freq: whether a row's gradient is divided by how often it is listed.
        sparse_grad: whether the table's gradient is sparse.
    """

    table: torch.Tensor
    index: torch.Tensor
    padding_idx: int
    scale_grad_by_freq: bool
    sparse_grad: bool


def _forward(args: Embedding, backend: str) -> torch.Tensor:
    table, index = args.table, args.index
    rows = forward(GatherReduce(table, Bags(index.reshape(-1).unsqueeze(1)), table.dtype), backend)
    return rows.view(*index.shape, table.shape[1])


def _forward_fake(args: Embedding) -> torch.Tensor:
    return args.table.new_empty(*args.index.shape, args.table.shape[1])


_embedding = define("embedding", Embedding, kernel=_forward, fake=_forward_fake, returns="Tensor")


def _save(ctx, args: Embedding, output: torch.Tensor):
    ctx.shape, ctx.dtype = args.table.shape, args.table.dtype
    return (args._replace(table=None),)


def _differentiate(ctx, args: Embedding, tensors, dout: torch.Tensor):
    index, weights = args.index.reshape(-1).unsqueeze(1), None
    if args.scale_grad_by_freq:
        weights = inverse_frequency(index, ctx.shape[0], accumulation_dtype(ctx.dtype))
    rows = dout.reshape(index.shape[0], ctx.shape[1])
    bags = Bags(index, weights=weights, padding_idx=args.padding_idx)
    return {"table": table_gradient(bags, rows, ctx.shape, ctx.dtype, ctx.backend, args.sparse_grad)}


_embedding.differentiate(_save, _differentiate)


def embedding(
    table: torch.Tensor,
    index: torch.Tensor,
    *,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    sparse_grad: bool = False,
) -> torch.Tensor:
    """Rows of a table: ``y[...] = table[index[...]]``, as ``torch.nn.functional.embedding``.

    Args:
        table: ``(N, D)`` float.
        index: int32 or int64 of any shape.
        padding_idx: a row that is read but gets no gradient; a negative value counts from the end.
        scale_grad_by_freq: divide a row's gradient by how often ``index`` lists the row.
        sparse_grad: give the table's gradient as a coalesced sparse COO tensor; see :func:`gossamer.gather_reduce`.

    Returns:
        ``(*index.shape, D)`` in the table's dtype. Differentiable in ``table``, duplicates summed in position order.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: shapes or devices do not fit.
        IndexError: on the CPU, an id outside ``[0, N)``; on CUDA such an id gives a row of zeros.
    """
    backend = _backend.resolve("gather_reduce", table)
    check_float("table", table, backend)
    check_shape("table", table, (None, None), "(N, D)")
    check_index("index", index)
    check_same_device(table=table, index=index)
    n = table.shape[0]
    check_padding_idx(padding_idx, n)
    if _backend.transformed():
        # torch.func follows plain torch.
        return F.embedding(index, table, padding_idx, None, 2.0, scale_grad_by_freq, sparse_grad)
    padding = -1 if padding_idx is None else padding_idx % n
    return _embedding(Embedding(table, index, padding, scale_grad_by_freq, sparse_grad), backend)


def advise_huge_pages(table: torch.Tensor) -> None:
    """Request huge pages for a table before its memory is first touched, which speeds up scattered reads.

    Does nothing off the CPU or without native kernels.
    """
    if table.device.type == "cpu" and type(table.data) is torch.Tensor and _backend.native_unavailable() is None:
        from gossamer.cpu_kernels import hash_table

        hash_table.advise_huge_pages(table)


def renorm_(table: torch.Tensor, index: torch.Tensor, max_norm: float, norm_type: float) -> None:
    """Scale rows of ``table`` listed in ``index`` whose p-norm exceeds ``max_norm`` down to it, in place.

    ``row ← row · max_norm / (‖row‖_p + 10⁻⁷)``, as ``torch.embedding_renorm_``, which is called on the CPU; on other
    devices this function does not wait for the device. Not recorded by autograd.

    Args:
        table: ``(N, D)`` float.
        index: int32 or int64 of any shape.
        max_norm: the norm allowed.
        norm_type: p.
    """
    with torch.no_grad():
        flat = index.reshape(-1)
        if table.device.type == "cpu":
            torch.embedding_renorm_(table, flat, max_norm, norm_type)
            return
        inside = (flat >= 0) & (flat < table.shape[0])
        flat = torch.where(inside, flat, 0).long()
        rows = table[flat].float()
        norm = torch.linalg.vector_norm(rows, norm_type, dim=1, keepdim=True)
        scaled = (rows * (max_norm / (norm + 1e-7))).to(table.dtype)
        # Duplicates write the same bits, so their order does not matter.
        table[flat] = torch.where(norm > max_norm, scaled, table[flat])


class _FrequencyScaled(torch.autograd.Function):
    """The table itself; the gradient of each row is divided by the row's number of occurrences."""

    @staticmethod
    def forward(table, index):
        return table.view_as(table)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, dtable):
        (index,) = ctx.saved_tensors
        counts = _occurrences(index, dtable.shape[0])
        if not dtable.is_sparse:
            return (dtable / counts.unsqueeze(1)).to(dtable.dtype), None
        rows = dtable.coalesce().indices()
        values = (dtable.coalesce().values() / counts[rows[0]].unsqueeze(1)).to(dtable.dtype)
        return torch.sparse_coo_tensor(rows, values, dtable.shape, is_coalesced=True, check_invariants=False), None


def scale_gradient_by_frequency(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``table``, with the gradient of row k divided by the number of times ``index`` lists k."""
    return _FrequencyScaled.apply(table, index)


class _Graft(torch.autograd.Function):
    """Returns the first of two tensors of equal shape; the gradient goes to both."""

    @staticmethod
    def forward(shown, hidden):
        return shown.view_as(shown)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient


def graft(shown: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """``shown``; its gradient is passed to ``hidden`` too."""
    return _Graft.apply(shown, hidden)


class _WithLoss(torch.autograd.Function):
    """A tensor whose backward pass also differentiates a scalar, as if that had been added to the loss."""

    @staticmethod
    def forward(x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (loss,) = ctx.saved_tensors
        return gradient, torch.ones_like(loss)


def with_loss(x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """``x``, whose backward pass also differentiates the scalar ``loss``, as if that had been added to the loss."""
    return _WithLoss.apply(x, loss)
