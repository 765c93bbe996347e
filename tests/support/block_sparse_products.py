"""Products with block-sparse matrices as functions of plain tensors, and their operands."""

import torch
from helpers import assert_same_bits, run

import gossamer
from gossamer import BlockSparseTensor, BlockTopology
from gossamer._activation import ACTIVATIONS

# One column more than a tile of 16, and an odd number.
N = 17
PRODUCTS = ("sdd", "dsd", "dds")
UNGATED = sorted(name for name, (_, gated) in ACTIVATIONS.items() if not gated)


def topology_of(device, block=(32, 16), grid=(3, 5), density=0.5, spare=1, seed=0, **options):
    """A random topology with room for ``spare`` blocks more than it has."""
    generator = torch.Generator().manual_seed(seed)
    shape = grid[0] * block[0], grid[1] * block[1]
    mask = BlockTopology.random(shape, block, density, generator=generator, **options).to_mask()
    return BlockTopology.from_mask(mask.to(device), block, nnz=int(mask.sum()) + spare)


def randn(*shape, device, dtype=torch.float32, by_columns=False):
    x = torch.randn(*(shape[::-1] if by_columns else shape), device=device).to(dtype)
    return x.t() if by_columns else x


def live_values(topology, dtype=torch.float32):
    """Values of the stored matrix, which are zero after its last block."""
    stored = topology if topology.order is None else topology.transposed()
    values = randn(stored.nnz_blocks, *stored.block, device=topology.device, dtype=dtype)
    return values.index_fill(0, torch.arange(int(stored.row_offsets[-1]), len(values), device=values.device), 0)


def functions(product, topology, *, backend, activation=None):
    """The product and its reference as functions of plain tensors; ``s`` and the result of sdd are stored values."""
    transposed = topology.order is not None

    def sparse(s):
        return BlockSparseTensor(s.transpose(1, 2) if transposed else s, topology)

    def function(bias=None, **operands):
        options = {"bias": bias, "activation": activation}
        if product == "sdd":
            values = gossamer.sdd(operands["a"], operands["b"], topology, **options).values
            return values.transpose(1, 2) if transposed else values
        if product == "dsd":
            return gossamer.dsd(sparse(operands["s"]), operands["b"], **options)
        return gossamer.dds(operands["a"], sparse(operands["s"]), **options)

    def under(name):
        def call(**operands):
            with gossamer.backend(name):
                return function(**operands)

        return call

    return under(backend), under("reference")


def make_inputs(product, topology, *, n=N, dtype=torch.float32, by_columns=(False, False), bias=True):
    """Operands by name; ``by_columns`` says for each of two dense operands, or for the only one, how it is stored."""
    (rows, cols), device = topology.shape, topology.device
    make = {"device": device, "dtype": dtype}
    if product == "sdd":
        # b comes first: other draws roll the columns of the first operand, and with n = 1 a has only one column.
        inputs = {"b": randn(n, cols, by_columns=by_columns[1], **make)}
        inputs["a"] = randn(rows, n, by_columns=by_columns[0], **make) / max(n, 1) ** 0.5
    elif product == "dsd":
        inputs = {"s": live_values(topology, dtype) / 8, "b": randn(cols, n, by_columns=by_columns[0], **make)}
    else:
        inputs = {"a": randn(n, rows, by_columns=by_columns[0], **make), "s": live_values(topology, dtype) / 8}
    if bias:
        inputs["bias"] = randn(n if product == "dsd" else cols, **make)
    return inputs


def in_parts(inputs, product, parts=2):
    """The operand that may come in parts, as views of its parts, each stored by rows or by columns like the operand."""
    name, dim = {"sdd": ("b", 1), "dsd": ("b", 0), "dds": ("a", 1)}[product]
    operand = inputs[name]
    by_columns = operand.stride(0) == 1 and operand.stride(1) != 1
    pieces = [p.t().contiguous() if by_columns else p.contiguous() for p in operand.chunk(parts, dim)]
    stack = torch.stack(pieces)
    return inputs | {name: stack.mT if by_columns else stack}


def check_by_differences(function, inputs):
    """Check first and second derivatives of all operands in float64 against finite differences."""
    names = list(inputs)

    def call(*values):
        return function(**dict(zip(names, values, strict=True)))

    leaves = [value.detach().requires_grad_() for value in inputs.values()]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def check_same_bits(function, inputs, dout, *, threads):
    """Check that two runs with all gradients agree bit by bit, and with ``threads`` also a run with one thread."""
    first = run(function, inputs, inputs, dout)
    assert_same_bits(first, run(function, inputs, inputs, dout))
    if threads:
        count = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            assert_same_bits(first, run(function, inputs, inputs, dout))
        finally:
            torch.set_num_threads(count)
