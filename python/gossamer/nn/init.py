"""Initial values of tables."""

from __future__ import annotations

import torch

from gossamer._checks import (
    check_flag,
    check_floating,
    check_has_numbers,
    check_number,
    check_positive,
    check_seed,
    check_shape,
)

SELECTIONS = ("uniform", "random", "variance")


@torch.no_grad()
def from_text_embeddings(
    vectors: torch.Tensor,
    embedding_dim: int,
    *,
    select: str = "variance",
    standardize: bool = False,
    std: float | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """A table from wide text vectors of the items, by selecting D of their columns, without training.

    ``W = scale·Z[:, S]`` with D columns S, in ascending order, out of those that vary over the items:

    - ``"uniform"``: spread evenly, ``S_i = ⌊i·C/D⌋`` of the C columns that vary;
    - ``"random"``: drawn from a seed;
    - ``"variance"``: those with the largest variance over the items; among equal ones the first.

    Args:
        vectors: Z, ``(N, D')`` floating, one row per item.
        embedding_dim: D.
        select: how columns are selected.
        standardize: whether each column gets mean 0 and variance 1 first.
        std: standard deviation of all entries of the result; by default ``1/√(3N)``, that of entries uniform in
            ``±1/√N``. NaN entries are an error.
        seed: seed of ``"random"``.

    Returns:
        ``(N, D)`` in the dtype and on the device of ``vectors``, for ``weight.copy_`` or ``_weight=``.

    Raises:
        TypeError: ``vectors`` is not a floating tensor.
        ValueError: ``vectors`` has another shape or values that are not finite, fewer than D columns vary, ``select``
            is unknown, or ``std`` is not positive.

    Source: Zhang et al., "LLMInit: A Free Lunch from Large Language Models for Selective Initialization of
    Recommendation", EMNLP 2025.
    """
    check_shape("vectors", vectors, (None, None), "(N, D')")
    check_positive(embedding_dim=embedding_dim)
    check_seed(seed)
    check_number("std", std, above=0, optional=True)
    check_flag("standardize", standardize)
    if not len(vectors):
        raise ValueError("vectors must have at least one row, got 0")
    check_floating("vectors", vectors)
    check_has_numbers("vectors", vectors)
    if select not in SELECTIONS:
        raise ValueError(f"select must be one of {SELECTIONS}, got {select!r}")
    if not bool(vectors.isfinite().all()):
        raise ValueError("vectors must be finite, got NaN or infinity")
    wide = vectors.double()
    variance = wide.var(0, unbiased=False)
    varying = (variance > 0).nonzero().flatten()
    if len(varying) < embedding_dim:
        raise ValueError(
            f"vectors must have at least embedding_dim={embedding_dim} columns that vary over the items, got "
            f"{len(varying)} of {vectors.shape[1]}"
        )
    if select == "uniform":
        places = torch.arange(embedding_dim, device=vectors.device) * len(varying) // embedding_dim
    elif select == "random":
        order = torch.randperm(len(varying), generator=torch.Generator().manual_seed(seed), device="cpu")
        places = order[:embedding_dim].to(vectors.device)
    else:
        places = variance[varying].argsort(descending=True, stable=True)[:embedding_dim]
    columns = varying[places.sort().values]
    chosen = wide[:, columns]
    if standardize:
        chosen = (chosen - chosen.mean(0)) / variance[columns].sqrt()
    wanted = (3 * len(vectors)) ** -0.5 if std is None else std
    return (chosen * (wanted / chosen.std(unbiased=False))).to(vectors.dtype)
