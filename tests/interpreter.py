"""Triton's interpreter, made to round the way its compiled kernels do."""

from __future__ import annotations

from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def multiply_row_by_row() -> None:
    """Have ``tl.dot`` round a row the same wherever it lies in its tile, as tensor cores do.

    The interpreter gives whole tiles to NumPy, whose BLAS adds up a row in an order that depends on the row's place in
    the tile, on some processors more than on others.
    """
    whole_tile = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *options):
        if min(a.dtype.primitive_bitwidth, b.dtype.primitive_bitwidth) == 8:
            return whole_tile(self, a, b, d, *options)
        rows, columns = (operand.data.astype(d.data.dtype, copy=False) for operand in (a, b))
        product = rows[..., :, None, :] @ columns[..., None, :, :]
        return TensorHandle(product[..., 0, :] + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot
