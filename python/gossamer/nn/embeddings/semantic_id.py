"""Tables looked up by the codes of an item instead of its number."""

from __future__ import annotations

import torch

from gossamer._checks import check_flag, check_has_numbers, check_index, check_positive, check_shape
from gossamer.nn.embeddings.codes import CodedRowsTable


class SemanticIdEmbedding(CodedRowsTable):
    """The vector of an item as the sum of a row for each of its codes: ``e(x) = Σ_l T_l[c_l(x)]``.

    Items with common codes share a part of their vectors. With ``prefixes`` the row of level l is chosen by all codes
    up to l, so that the meaning of a code depends on the codes before it: ``e(x) = Σ_l T_l[c_1(x) .. c_l(x)]``, with
    one row for every prefix that occurs. :class:`gossamer.nn.ResidualQuantizer` computes codes from item vectors.

    Args:
        num_embeddings: N, the number of items.
        embedding_dim: D.
        codes: ``(N, L)`` int32 or int64, at least 0.
        num_codes: number of codes per level, the same for all levels; by default one more than the largest code of each
            level. Not with ``prefixes``.
        prefixes: whether rows are chosen by prefixes.
        **options: ``mode``, ``include_last_offset``, ``device``, ``dtype`` and ``optimizer``, as for any table.

    Attributes:
        weight: ``(M, D)``, the parameter: the stacked tables of the levels.
        codes: the codes, or with ``prefixes`` the numbers of the prefixes, a buffer, in as few bits as the largest
            level needs; int32 above 16 bits.
        sizes: rows of each level.

    Raises:
        TypeError: ``codes`` is not an integer tensor; as for the options.
        ValueError: a size is below 1, or ``codes`` has another shape, negative numbers, or some not below
            ``num_codes``.

    Source: Rajput et al., "Recommender Systems with Generative Retrieval", NeurIPS 2023; prefixes: Zheng et al.,
    "Enhancing Embedding Representation Stability in Recommendation Systems with Semantic ID", RecSys 2025.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        codes: torch.Tensor,
        *,
        num_codes: int | None = None,
        prefixes: bool = False,
        **options: object,
    ) -> None:
        check_positive(num_embeddings=num_embeddings)
        check_shape("codes", codes, (num_embeddings, None), "(N, L)")
        check_index("codes", codes)
        check_has_numbers("codes", codes)
        check_flag("prefixes", prefixes)
        levels = codes.shape[1]
        check_positive(**{"the number of levels of codes": levels})
        if int(codes.min()) < 0:
            raise ValueError(f"codes must be at least 0, got {int(codes.min())}")
        if prefixes:
            if num_codes is not None:
                raise ValueError(f"num_codes must be None with prefixes=True, got {num_codes}")
            codes = torch.stack(
                [codes[:, : level + 1].unique(dim=0, return_inverse=True)[1] for level in range(levels)], 1
            )
        sizes = [int(level.max()) + 1 for level in codes.unbind(1)]
        if num_codes is not None:
            check_positive(num_codes=num_codes)
            if max(sizes) > num_codes:
                raise ValueError(f"codes must be below num_codes={num_codes}, got {max(sizes) - 1}")
            sizes = [num_codes] * levels
        super().__init__(num_embeddings, embedding_dim, codes, sizes, **options)
