"""The CUDA kernels for Hopper compile with no GPU, without spills or warnings, to the instructions they are made of."""

import pytest

from gossamer import _backend

if reason := _backend.native_unavailable():
    pytest.skip(reason, allow_module_level=True)

import cuda_resources


@pytest.fixture(scope="module")
def rows():
    """Rows of the script's table."""
    if reason := cuda_resources.unavailable():
        pytest.skip(reason)
    return cuda_resources.report()


def test_kernels_compile_within_limits(rows):
    """No kernel spills, warns, passes a limit or misses its instructions."""
    failures = [f"{r['kernel']} {r['dtype']} {r['tile']}: {r['error']}" for r in rows if r["error"]]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("kernel", ["PlainFinish", "GluFinish", "GluBackwardFinish", "WeightGradient"])
@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
def test_every_product_is_compiled(rows, kernel, dtype):
    """Each product has a kernel in each dtype, so that an empty table does not pass."""
    assert any(r["kernel"] == kernel and r["dtype"] == dtype for r in rows)


def test_use_of_unfinished_accumulators_is_found():
    """An instruction that names an accumulator before the wait for all products counts, others do not."""
    lines = (
        "HGMMA.64x128x16.F32 R24, gdesc[UR8], R24, gsb0 ",
        "IADD3 R4, R23, R88, RZ ",
        "WARPGROUP.DEPBAR.LE gsb0, 0x1 ",
        "MOV R90, R87 ",
        "WARPGROUP.DEPBAR.LE gsb0, 0x0 ",
        "STS.64 [R2], R24 ",
    )
    code = "\n".join(f"        /*{16 * i:04x}*/                   {line};   /* 0x00 */" for i, line in enumerate(lines))
    assert cuda_resources.touched_in_flight(code) == 1
