"""Large results of native kernels: reused memory, with nobody's values changed under their feet."""

import pytest
import torch

import gossamer
from gossamer import _backend

native = pytest.mark.skipif(
    _backend.native_unavailable() is not None or torch.cuda.is_available(), reason="needs the native CPU kernels"
)
MEBIBYTE = 1 << 20


@pytest.fixture
def empty_huge():
    """The allocator of large results, with nothing kept before or after."""
    from gossamer.cpu_kernels._native import empty_huge

    gossamer.empty_cache()
    yield empty_huge
    gossamer.empty_cache()


@native
def test_freed_memory_is_reused_by_the_next_result_of_its_size(empty_huge):
    """A block comes back only when its last view is gone, and to the very size."""
    first = empty_huge((3, 16 * MEBIBYTE), torch.float32)
    pointer = first.data_ptr()
    view = first[1:]
    del first
    other = empty_huge((3, 16 * MEBIBYTE), torch.float32)
    assert other.data_ptr() != pointer
    del view
    smaller = empty_huge((2, 16 * MEBIBYTE), torch.float32)
    assert smaller.data_ptr() != pointer
    assert empty_huge((3, 16 * MEBIBYTE), torch.float32).data_ptr() == pointer


@native
def test_empty_cache_says_what_it_returned(empty_huge):
    """What is kept is what was freed, within the bound of what was in use at one time."""
    blocks = [empty_huge((16 * MEBIBYTE,), torch.float32) for _ in range(3)]
    assert gossamer.empty_cache() == 0
    del blocks
    assert gossamer.empty_cache() == 3 * 64 * MEBIBYTE
    assert gossamer.empty_cache() == 0


@native
def test_sizes_that_come_back_at_different_times_are_kept(empty_huge):
    """Of 32, 8 and 4 MiB one after the other the first makes room; when it comes back, it is held beside the others.

    Sizes of twice as much together are not: half as much again is the bound.
    """

    def kept(*sizes, steps):
        for _ in range(steps):
            for size in sizes:
                empty_huge((size, MEBIBYTE), torch.int8)
        return gossamer.empty_cache()

    assert kept(32, 8, 4, steps=1) == 12 * MEBIBYTE
    assert kept(32, 8, 4, steps=2) == 44 * MEBIBYTE
    assert kept(30, 24, 16, steps=4) <= 45 * MEBIBYTE


@native
def test_gradients_of_two_steps_do_not_share_memory(empty_huge):
    """A gradient that is still held keeps its values while later steps compute theirs."""
    x = torch.randn(4, 1024)
    weight = torch.randn(4, 2048, 1024, requires_grad=True)
    dispatch = gossamer.dispatch(torch.tensor([[0], [1], [2], [0]]), 4)

    def step(scale):
        (grad,) = torch.autograd.grad(gossamer.grouped_matmul(x * scale, weight, dispatch).sum(), weight)
        return grad

    first = step(1.0)
    assert first.nbytes >= 32 * MEBIBYTE
    copy = first.clone()
    second = step(2.0)
    assert torch.equal(first, copy)
    torch.testing.assert_close(second, 2 * copy)
    assert torch.equal(second[3], torch.zeros_like(second[3]))
    pointer = first.data_ptr()
    del first
    assert step(1.0).data_ptr() == pointer
