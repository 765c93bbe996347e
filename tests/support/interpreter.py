"""Changes Triton's interpreter to round as compiled kernels do, and to reveal what kernels may not do."""

from __future__ import annotations

import random

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


def multiply_row_by_row() -> None:
    """Make ``tl.dot`` round a row in the same way wherever it is in its tile, as tensor cores do.

    The interpreter passes whole tiles to NumPy, whose BLAS adds up a row in an order that may depend on the row's place
    in the tile, on some processors more than on others.
    """
    whole_tile = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *options):
        if min(a.dtype.primitive_bitwidth, b.dtype.primitive_bitwidth) == 8:
            return whole_tile(self, a, b, d, *options)
        rows, columns = (operand.data.astype(d.data.dtype, copy=False) for operand in (a, b))
        product = rows[..., :, None, :] @ columns[..., None, :, :]
        return TensorHandle(product[..., 0, :] + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def run_programs_in_any_order() -> None:
    """Run the programs of a launch in a random order, since on a GPU none may rely on another to have run before it."""
    set_size, set_place = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx
    generator = random.Random(0)
    order: list[tuple[int, ...]] = []

    def set_grid_dim(self, *size):
        set_size(self, *size)
        order[:] = np.ndindex(*size)
        generator.shuffle(order)

    def set_grid_idx(self, *place):
        set_place(self, *order[np.ravel_multi_index(place, self.grid_dim)])

    InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx = set_grid_dim, set_grid_idx


def patch_language_once() -> None:
    """Make a launch patch each module of Triton's language only once, not again for every call of a device function.

    To do so, the interpreter looks at all names of the modules, which takes longer than most device functions.
    """
    patch, launch = interpreter._patch_lang, GridExecutor.__call__
    patched: set[str] = set()

    def patch_lang(fn):
        modules = {value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core}
        if modules <= patched:
            return None
        patched.update(modules)
        return patch(fn)

    def call(self, *args, **kwargs):
        patched.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.clear()

    interpreter._patch_lang, GridExecutor.__call__ = patch_lang, call


def leave_out_unread_checks() -> None:
    """Do not compute whether integers overflow: outside of Triton's debug mode nothing reads the result.

    The interpreter does so at each sum and product of integers, in seven operations on 64-bit blocks.
    """
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda self, lhs, rhs, binary_op: None


def make_types_once() -> None:
    """Keep the types and shapes of blocks, which the interpreter makes anew for each result of an operation."""
    init_block, init_tensor, numpy_dtype = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype
    types: dict[tuple, dict] = {}
    shapes: dict[tuple, tuple] = {}
    numpy_dtypes: dict[str, np.dtype] = {}

    def block_type(self, element_ty, shape):
        sizes = shape.values if isinstance(shape, tl.tuple) else shape
        # Pointers differ in more than their names.
        kind = element_ty.name, getattr(element_ty, "address_space", None), getattr(element_ty, "const", None)
        key = (kind, *(getattr(size, "value", size) for size in sizes))
        if key in types:
            self.__dict__.update(types[key])
        else:
            init_block(self, element_ty, shape)
            types[key] = dict(self.__dict__)

    def tensor(self, handle, type):
        key = tuple(type.shape) if type.is_block() else ()
        if key in shapes:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.numel, self.shape = shapes[key]
        else:
            init_tensor(self, handle, type)
            shapes[key] = self.numel, self.shape

    def get_np_dtype(of):
        of = of.element_ty if isinstance(of, tl.block_type) else of
        if isinstance(of, tl.pointer_type):
            return np.dtype(np.uint64)
        if of.name not in numpy_dtypes:
            numpy_dtypes[of.name] = numpy_dtype(of)
        return numpy_dtypes[of.name]

    tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype = block_type, tensor, get_np_dtype


def combine_whole_slices() -> None:
    """Have a reduction by any function combine slices along its axis, in the same order, not one element at a time."""

    def generic_reduce(self, input):
        parts, axis = self.unravel(input, self.axis)
        of_parts = [np.moveaxis(part.handle.data, axis, 0) for part in parts]

        def at(i):
            return tuple(self.to_tensor(data[i], part.dtype) for data, part in zip(of_parts, parts, strict=True))

        found = at(0)
        for i in range(1, len(of_parts[0])):
            found = self.combine_fn.fn(*found, *at(i))
            found = found if isinstance(found, tuple) else (found,)
        results = []
        for result, part in zip(found, parts, strict=True):
            data, shape = result.handle.data, input[0].handle.data.shape
            if self.keep_dims:
                data = data.reshape([1 if self.axis in (None, d) else size for d, size in enumerate(shape)])
            elif part.handle.data.ndim == 1:
                data = data.item()
            results.append(self.to_tensor(data, part.dtype))
        return results

    interpreter.ReduceOps.generic_reduce = generic_reduce


def refuse_foreign_addresses() -> None:
    """Make loads, stores and atomics raise if an unmasked lane leaves the tensors of the launch."""
    begins, ends = np.empty(0, np.uint64), np.empty(0, np.uint64)
    copied = GridExecutor._init_args_hst

    def tensors(values):
        for value in values:
            if isinstance(value, tuple):
                yield from tensors(value)
            elif isinstance(value, torch.Tensor):
                yield value
            elif isinstance(base := getattr(value, "base", None), torch.Tensor):
                yield base

    def init_args(self, args, kwargs):
        nonlocal begins, ends
        found = copied(self, args, kwargs)
        storages = {t.untyped_storage() for t in tensors([*found[0], *found[1].values()])}
        spans = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages})
        begins, ends = np.array(spans, np.uint64).reshape(-1, 2).T
        return found

    def checked(name, at, masked):
        really = getattr(InterpreterBuilder, name)

        def access(self, *args, **options):
            addresses = args[at].data
            # For accesses by descriptor Triton 3.6 passes the mask as it is.
            mask = None if masked is None else args[masked]
            mask = mask if mask is None or isinstance(mask, np.ndarray) else mask.data
            if mask is not None and not mask.all():
                addresses = addresses[np.broadcast_to(mask, addresses.shape)]
            if addresses.size:
                size = np.uint64(max(1, args[at].get_element_ty().primitive_bitwidth // 8))
                # Nearly always all lanes are in the memory of one tensor.
                span = np.searchsorted(begins, addresses.min(), "right") - 1
                if span < 0 or addresses.max() + size > ends[span]:
                    span = np.searchsorted(begins, addresses, "right") - 1
                    outside = np.count_nonzero((span < 0) | (addresses + size > ends[span]))
                    if outside:
                        of = f"{outside} of {addresses.size} addresses"
                        raise IndexError(f"{name}: {of} lie outside the launch's tensors")
            return really(self, *args, **options)

        setattr(InterpreterBuilder, name, access)

    GridExecutor._init_args_hst = init_args
    # The positions of the pointers and of the mask among the arguments.
    checked("create_masked_load", 0, 1)
    checked("create_masked_store", 0, 2)
    checked("create_atomic_rmw", 1, 3)
    checked("create_atomic_cas", 0, None)
