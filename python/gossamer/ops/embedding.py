"""Row lookup as ``torch.nn.functional.embedding`` has it, and what embedding layers need around it."""

from __future__ import annotations

import torch

from gossamer import _backend
from gossamer._checks import check_float, check_index, check_same_device, check_shape
from gossamer._numerics import accumulation_dtype
from gossamer.ops import gather_reduce as bags
from gossamer.ops._registration import register, register_autograd


def _occurrences(index: torch.Tensor, num_rows: int) -> torch.Tensor:
    """How often each row is listed in ``index``, at least 1; ids outside the table are not counted."""
    inside = (index >= 0) & (index < num_rows)
    counts = torch.zeros(num_rows + 1, dtype=torch.int64, device=index.device)
    rows = torch.where(inside, index, num_rows).reshape(-1).long()
    counts.scatter_add_(0, rows, torch.ones_like(rows))
    return counts[:num_rows].clamp_(min=1)


def inverse_frequency(index: torch.Tensor, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    """For each id one over how often it is listed in ``index``, shaped like it; 1 for ids outside the table."""
    if num_rows == 0:
        return torch.ones(index.shape, dtype=dtype, device=index.device)
    inside = (index >= 0) & (index < num_rows)
    counts = _occurrences(index, num_rows)[torch.where(inside, index, 0).long()]
    return 1 / torch.where(inside, counts, 1).to(dtype)


def _forward(table, index, padding_idx, scale_grad_by_freq, sparse_grad, backend):
    lists = (index.reshape(-1).unsqueeze(1), None, None, None, -1)
    return bags._forward(table, *lists, backend).view(*index.shape, table.shape[1])


def _forward_fake(table, index, padding_idx, scale_grad_by_freq, sparse_grad, backend):
    return table.new_empty(*index.shape, table.shape[1])


# Rows of a table; unlike in a bag, the padding row is read, and only its gradient is left out.
_embedding = register(
    "embedding(Tensor table, Tensor index, int padding_idx, bool scale_grad_by_freq, bool sparse_grad, str backend) "
    "-> Tensor",
    _forward,
    _forward_fake,
)


def _setup_context(ctx, inputs, output):
    table, index, ctx.padding_idx, ctx.scale_grad_by_freq, ctx.sparse_grad, ctx.backend = inputs
    (ctx.num_rows, ctx.dim), ctx.table_dtype, ctx.mean = table.shape, table.dtype, False
    ctx.save_for_backward(index)


def _backward(ctx, dout):
    (index,) = ctx.saved_tensors
    flat = index.reshape(-1).unsqueeze(1)
    weights = None
    if ctx.scale_grad_by_freq:
        weights = inverse_frequency(flat, ctx.num_rows, accumulation_dtype(ctx.table_dtype))
    dtable = bags._table_gradient(ctx, dout.reshape(flat.shape[0], ctx.dim), flat, None, weights, None)
    return dtable, None, None, None, None, None


register_autograd("embedding", _backward, _setup_context)


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
        padding_idx: a row that gets no gradient, though it is read as any other; negative counts from the end.
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
    if padding_idx is not None and not -n <= padding_idx < n:
        raise ValueError(f"padding_idx must be in [-N, N) with N={n}, got {padding_idx}")
    padding = -1 if padding_idx is None else padding_idx % n
    return _embedding(table, index, padding, scale_grad_by_freq, sparse_grad, backend)


def advise_huge_pages(table: torch.Tensor) -> None:
    """Ask the system for huge pages under a table whose memory nobody has touched yet; scattered rows then cost less.

    Nothing happens off the CPU, or where there are no native kernels.
    """
    if table.device.type == "cpu" and type(table.data) is torch.Tensor and _backend.native_unavailable() is None:
        _backend.kernels("native", "hash_table").advise_huge_pages(table)


def renorm_(table: torch.Tensor, index: torch.Tensor, max_norm: float, norm_type: float) -> None:
    """Scale rows of ``table`` listed in ``index`` whose p-norm exceeds ``max_norm`` down to it, in place.

    ``row ← row · max_norm / (‖row‖_p + 10⁻⁷)``, as ``torch.embedding_renorm_``, which this is on the CPU; on other
    devices it does not wait for the device. Not recorded by autograd.

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
    """The table itself, whose gradient is divided row by row by how often the row is listed."""

    @staticmethod
    def forward(ctx, table, index):
        ctx.save_for_backward(index)
        return table.view_as(table)

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
    """The first of two tensors of equal shape; its gradient goes to both."""

    @staticmethod
    def forward(ctx, shown, hidden):
        return shown.view_as(shown)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient


def graft(shown: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """``shown``, whose gradient reaches ``hidden`` too."""
    return _Graft.apply(shown, hidden)
