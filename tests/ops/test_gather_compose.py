"""gossamer.gather_compose: sums of composed vectors and their gradients against float64, however rows are found."""

import pytest
import torch
from composed_rows import CASES, PRIME, N, functions
from helpers import assert_same_bits, check, flat, ragged, run

import gossamer
from gossamer.ops import gather_compose_gradient
from gossamer.ops.composed_rows import Parts
from gossamer.ops.gather_compose import GatherCompose, checked_compose
from gossamer.ops.gather_compose_gradient import ComposeGradient, RowSums
from gossamer.ops.map_ids import IdMaps

CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def spelt_out(table, ids, parts):
    """The vector of each id by the formula, in Python's integers."""
    maps, rows = parts.maps, []
    for x in ids.tolist():
        found = []
        for part, (m, q, base, a, b) in enumerate(maps.numbers()):
            if part < parts.coded:
                stored, bits, at = parts.codes, parts.bits[0], x
                if x >= parts.codes.shape[0]:
                    stored, bits, at = parts.rare, parts.bits[1], x - parts.codes.shape[0]
                row = stored[at].tolist()
                number = row[part] if bits == 32 else sum(byte << 8 * i for i, byte in enumerate(row)) >> part * bits
                found.append(base + number % 2**bits)
                continue
            value = x % 2**64
            if maps.mixed:
                value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
                value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
                value = value ^ (value >> 31)
            value = (a * value + b) % maps.prime if maps.prime else value
            found.append(value // q % m + base)
        if parts.block:
            places = [found[i // parts.block] + i % parts.block for i in range(parts.dim)]
            found = [place % maps.prime % len(table) if parts.wrap else place for place in places]
        chosen = table[torch.tensor(found, device=table.device)]
        how = {"add": lambda rows: rows.sum(0), "mul": lambda rows: rows.prod(0), "concat": torch.flatten}
        rows.append(how[parts.operation](chosen))
    return torch.stack(rows)


@CASE
def test_formula(any_backend, device, case):
    """Single ids, against Python's integers."""
    parts, shape = case(device)
    table, ids = torch.randn(shape, device=device), torch.arange(N, device=device)
    with gossamer.backend(any_backend):
        found = gossamer.gather_compose(table, ids, parts)
    torch.testing.assert_close(found, spelt_out(table, ids, parts), rtol=1e-6, atol=1e-7)


def test_parts_whose_codes_nobody_reads(any_backend, device):
    """Codes of three parts, of which two follow their maps."""
    codes = torch.randint(3, (N, 3), device=device, dtype=torch.int32)
    maps = IdMaps.of([3, 3, 3], bases=[0, 3, 6], limit=N)
    parts, table = Parts.of(2, "add", maps, coded=1, codes=codes, bits=[32]), torch.randn(9, 2, device=device)
    ids = torch.arange(N, device=device)
    with gossamer.backend(any_backend):
        found = gossamer.gather_compose(table, ids, parts)
    torch.testing.assert_close(found, spelt_out(table, ids, parts), rtol=1e-6, atol=1e-7)


@CASE
def test_fixed_width(kernel_backend, device, case):
    """Bags of J ids: the sum and the gradients of table and weights."""
    parts, shape = case(device)
    ids = torch.randint(N, (13, 5), device=device)
    inputs = {"table": torch.randn(shape, device=device), "weights": torch.randn(13, 5, device=device)}
    check(*functions(ids, parts, backend=kernel_backend), inputs)


@CASE
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_ragged(kernel_backend, device, case, mode):
    """Empty bags, one longer than the blocks of ids that are decoded, and ids outside all bags, which are not read."""
    parts, shape = case(device)
    longest = 600 if kernel_backend == "native" else 6
    ids, offsets = ragged([0, 3, 1, 0, longest, 9, 0], N, device, torch.int32)
    ids, offsets = torch.cat([ids[:4], ids, ids[:3]]), offsets + 4
    inputs = {"table": torch.randn(shape, device=device)}
    if mode == "sum":
        inputs["weights"] = torch.randn(ids.shape[0], device=device)
    check(*functions(ids, parts, offsets, backend=kernel_backend, mode=mode), inputs)


@pytest.mark.parametrize("case", ["multiplied digits", "bytes", "blocks that wrap", "added digits"])
def test_dtypes(kernel_backend, dtype, device, case):
    """Rows of 16 bits are widened as they are read; sums are rounded once."""
    parts, shape = CASES[case](device)
    inputs = {"table": torch.randn(shape, device=device, dtype=dtype)}
    check(*functions(torch.randint(N, (7, 3), device=device), parts, backend=kernel_backend), inputs)


@pytest.mark.parametrize("case", ["three multiplied", "joined digits", "blocks"])
def test_finite_differences(device, case):
    """Both gradients, and theirs, in float64."""
    parts, shape = CASES[case](device)
    ids, offsets = ragged([2, 0, 3], N, device)
    table = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.randn(5, dtype=torch.float64, device=device, requires_grad=True)

    def function(table, weights):
        return gossamer.gather_compose(table, ids, parts, offsets, weights)

    assert torch.autograd.gradcheck(function, (table, weights))
    assert torch.autograd.gradgradcheck(function, (table, weights))


@CASE
def test_same_bits(device, case):
    """The same bits for any number of threads, whatever else is in the batch, forward and backward."""
    parts, shape = case(device)
    ids, offsets = ragged([700, 0, 5, 1300, 90], N, device)
    table = torch.randn(shape, device=device)
    dout = torch.randn(5, parts.dim, device=device)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        function = functions(ids, parts, offsets, backend="native" if device == "cpu" else "triton")[0]
        results.append(run(function, {"table": table}, ["table"], dout))
        alone = gossamer.gather_compose(table, ids[705:2005].unsqueeze(0), parts)
        assert torch.equal(alone[0], results[-1]["out"][3])
    torch.set_num_threads(threads)
    for more in results[1:]:
        assert_same_bits(results[0], more)


def test_large_tables(device):
    """Tables beyond the second-level cache, whose rows are fetched ahead."""
    maps = IdMaps.of([70_000, 3], bases=[0, 70_000], limit=10**6)
    parts, ids = Parts.of(8, "mul", maps), torch.randint(10**6, (50, 20), device=device)
    inputs = {"table": torch.randn(70_003, 8, device=device)}
    check(*functions(ids, parts, backend="native" if device == "cpu" else "triton"), inputs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="native kernels")
@pytest.mark.parametrize("case", ["one row", "multiplied digits", "joined digits", "bytes"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_gradients_by_sorted_rows(monkeypatch, device, case, mode):
    """Gradients of tables that are too large to be summed as a whole, which the others here are not."""
    monkeypatch.setattr(gather_compose_gradient, "SMALL_TABLE", 0)
    parts, shape = CASES[case](device)
    ids, offsets = ragged([0, 3, 1, 300, 9, 0], N, device)
    inputs = {"table": torch.randn(shape, device=device)}
    if mode == "sum":
        inputs["weights"] = torch.randn(ids.shape[0], device=device)
    check(*functions(ids, parts, offsets, backend="native", mode=mode), inputs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="native kernels")
@pytest.mark.parametrize("case", ["added digits", "multiplied digits", "joined halves"])
def test_gradients_in_pieces(device, case):
    """Lists so long that several pieces of them are summed apart, the same bits for any number of threads."""
    parts, shape = CASES[case](device)
    ids = torch.randint(N, (1700, 20), device=device)
    inputs = {"table": torch.randn(shape, device=device)}
    check(*functions(ids, parts, backend="native"), inputs)
    function, dout = functions(ids, parts, backend="native")[0], torch.randn(1700, parts.dim)
    threads, found = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(run(function, inputs, ["table"], dout)["table"])
    torch.set_num_threads(threads)
    assert torch.equal(*found)


@CASE
@pytest.mark.parametrize("listed", [False, True])
def test_no_bags(device, case, listed):
    """Results and gradients of no bags, and of no ids."""
    parts, shape = case(device)
    table = torch.randn(shape, device=device, requires_grad=True)
    ids = torch.empty(0 if listed else (0, 3), dtype=torch.int64, device=device)
    for offsets in (torch.zeros(1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)) if listed else (None,):
        offsets = None if offsets is None else offsets.to(device)
        y = gossamer.gather_compose(table, ids, parts, offsets)
        assert y.shape == (0 if offsets is None else offsets.shape[0] - 1, parts.dim) and not y.any()
        y.sum().backward()
    assert not table.grad.any()


@pytest.mark.parametrize("bad", [-1, N, 2**40])
def test_ids_outside(any_backend, device, bad):
    parts, shape = CASES["multiplied digits"](device)
    table, ids = torch.randn(shape, device=device), torch.tensor([[3, bad, 4]], device=device)
    with gossamer.backend(any_backend):
        if device == "cpu" and any_backend != "triton":
            with pytest.raises(IndexError, match=rf"must be in \[0, N\) with N=30, got {bad} at (flat )?position 1"):
                gossamer.gather_compose(table, ids, parts)
        else:
            good = gossamer.gather_compose(table, ids[:, ::2], parts)
            assert torch.equal(gossamer.gather_compose(table, ids, parts), good)


def test_codes_outside(device):
    """A code above its part, as a damaged file may hold, reads nothing beyond the table."""
    parts, shape = CASES["bytes"](device)
    table = torch.randn(shape, device=device)
    parts.codes[7, 3] = 255
    if device == "cpu":
        with pytest.raises(IndexError, match="codes must be below the number of rows of their part"):
            gossamer.gather_compose(table, torch.arange(N), parts)
    else:
        assert gossamer.gather_compose(table, torch.arange(N, device=device), parts).isfinite().all()


def test_bad_arguments(device):
    parts, shape = CASES["multiplied digits"](device)
    table, ids = torch.randn(shape, device=device), torch.zeros(2, 3, dtype=torch.int64, device=device)
    for wrong, message in (
        ({"mode": "max"}, "mode must be 'sum' or 'mean' for composed rows, got 'max'"),
        ({"parts": parts._replace(dim=9)}, r"parts must have the dim 37 of 2 rows of 37, got 9"),
        ({"table": table[:-1]}, r"table must have at least 12 rows, which the maps reach, got 11"),
        ({"parts": parts._replace(operation="max")}, r"operation must be one of \('add', 'mul', 'concat'\), got 'max'"),
        ({"parts": parts._replace(block=37)}, r"table must have shape \(M, 1\) for blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            gossamer.gather_compose(**{"table": table, "ids": ids, "parts": parts} | wrong)
    with pytest.raises(TypeError, match="must be int32 or int64"):
        gossamer.gather_compose(table, ids.float(), parts)
    with pytest.raises(TypeError, match=r"parts must be gossamer\.Parts with maps, got int"):
        gossamer.gather_compose(table, ids, 3)


def test_bad_codes(device):
    """Codes that do not hold what they should would be read beyond their end."""
    parts, shape = CASES["bytes"](device)
    table, ids = torch.randn(shape, device=device), torch.zeros(2, 3, dtype=torch.int64, device=device)
    for wrong, error, message in (
        ({"codes": parts.codes[:, :3]}, ValueError, r"parts\.codes must hold 4 codes of 8 bits, got \(30, 3\)"),
        ({"codes": parts.codes[:0]}, ValueError, r"parts\.codes must have codes of at least one id"),
        ({"codes": None}, ValueError, r"parts\.codes must be given for coded parts"),
        ({"codes": parts.codes.int()}, TypeError, r"parts\.codes must be uint8 .*, got torch\.int32 with 8"),
        ({"coded": 5}, ValueError, r"parts\.coded must be in \[0, 4\], the number of maps, got 5"),
    ):
        with pytest.raises(error, match=message):
            gossamer.gather_compose(table, ids, parts._replace(**wrong))
    wrapped, shape = CASES["blocks that wrap"](device)
    maps = IdMaps.of([PRIME] * 6, bases=[1] * 6, prime=PRIME)
    with pytest.raises(ValueError, match="parts that wrap must be blocks placed below their prime"):
        gossamer.gather_compose(torch.randn(shape, device=device), ids, wrapped._replace(maps=maps))


def test_operators(any_backend, device):
    parts, shape = CASES["five bits, three for rare ids" if any_backend == "native" else "multiplied digits"](device)
    ids, offsets = ragged([2, 0, 3], N, device)
    table = torch.randn(shape, device=device, requires_grad=True)
    bags = checked_compose(table, ids, parts, offsets, None, "mean", True, any_backend)
    dout = torch.randn(3, parts.dim, device=device)
    compose = GatherCompose(table, bags, parts, table.dtype)
    torch.library.opcheck(torch.ops.gossamer.gather_compose.default, flat(compose, any_backend))
    gradient = ComposeGradient(dout, table.detach(), bags, parts, parts.operation == "mul", False)
    torch.library.opcheck(torch.ops.gossamer.compose_gradient.default, flat(gradient, any_backend))
    sums = RowSums(dout, table.detach(), bags, parts)
    torch.library.opcheck(torch.ops.gossamer.compose_row_sums.default, flat(sums, any_backend))
