"""What the tests add to Triton's interpreter finds what it is there to find."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here", allow_module_level=True)


@triton.jit
def _shifted_kernel(x_ptr, y_ptr, count, SHIFT: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    inside = (i + SHIFT >= 0) & (i + SHIFT < count) if MASKED else i < BLOCK
    tl.store(y_ptr + i, tl.load(x_ptr + i + SHIFT, inside, other=0.0))


@pytest.mark.parametrize("shift", [1, -1, 1000, 0])
@pytest.mark.parametrize("masked", [False, True])
def test_addresses_outside_tensors_are_refused(shift, masked):
    """Before, right behind and far behind a tensor, unless masked."""
    x, y = torch.randn(16), torch.empty(16)
    if masked or shift == 0:
        _shifted_kernel[(1,)](x, y, 16, shift, masked, 16)
        assert y.count_nonzero() == max(0, 16 - abs(shift))
    else:
        with pytest.raises(Exception, match="addresses lie outside the launch's tensors"):
            _shifted_kernel[(1,)](x, y, 16, shift, masked, 16)


@triton.jit
def _running_sum_kernel(x_ptr, y_ptr):
    # Counts on the program before this one, as no kernel may.
    i = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    before = tl.load(y_ptr + i - 1, i > 0, other=0)
    tl.store(y_ptr + i, before + tl.load(x_ptr + i))


def test_programs_run_in_any_order():
    """Each once, and not from the first to the last."""
    x, y = torch.ones(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    _running_sum_kernel[(8, 8)](x, y)
    assert (y >= 1).all() and not torch.equal(y, torch.arange(1, 65, dtype=torch.int32))


def test_types_that_are_kept_are_told_apart():
    kinds = [tl.float32, tl.float16, *(tl.pointer_type(tl.float32, const=const) for const in (False, True))]
    made = {(i, *shape): tl.block_type(kind, shape) for i, kind in enumerate(kinds) for shape in ([4, 8], [8, 4], [8])}
    for (i, *shape), one in made.items():
        assert (one.element_ty, list(one.shape), one.numel) == (kinds[i], shape, 32 if len(shape) == 2 else 8)
        assert [key for key, other in made.items() if one == other] == [(i, *shape)]
        assert tl.block_type(kinds[i], shape) == one
    for _ in range(2):
        with pytest.raises(ValueError, match="power of 2"):
            tl.block_type(tl.float32, [3])
