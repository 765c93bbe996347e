"""Memory that gossamer keeps for reuse on the CPU."""

from __future__ import annotations

from gossamer._backend import native_unavailable


def empty_cache() -> int:
    """Return the memory that native CPU kernels keep for reuse to the system.

    Large results (gradients of weights and factors, pre-activations, sums of table rows, of 2 MiB and more) and the
    scratch memory of a call (of 1 MiB and more) are allocated from blocks that earlier ones left, because the system
    clears fresh pages one by one in every training step. What is kept is at most what was in use at one time, half as
    much again where steps ask for sizes that were returned, and at most an eighth of the machine's memory. Memory on
    CUDA devices is torch's own, see ``torch.cuda.empty_cache``.

    Returns:
        The bytes that were returned.
    """
    if native_unavailable():
        return 0
    from gossamer import _C

    return _C.trim_pages()
