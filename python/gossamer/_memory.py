"""Memory that gossamer keeps for reuse on the CPU."""

from __future__ import annotations

from gossamer._backend import native_unavailable


def empty_cache() -> int:
    """Give the memory that native CPU kernels keep for reuse back to the system.

    Large results (gradients of weights and factors, pre-activations, sums of table rows, of 2 MiB and more) and the
    scratch memory of a call (of 1 MiB and more) reuse blocks that earlier calls left, because the system would
    otherwise clear fresh pages one by one in every training step. The blocks kept amount to at most the memory that was
    in use at one time (half as much again if steps ask for sizes that were given back), and to at most an eighth of the
    machine's memory. Memory on CUDA devices is torch's own; see ``torch.cuda.empty_cache``.

    Returns:
        The number of bytes given back.
    """
    if native_unavailable():
        return 0
    from gossamer import _C

    return _C.trim_pages()
