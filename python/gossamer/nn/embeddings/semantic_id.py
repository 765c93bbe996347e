"""Tables looked up by the codes of an item instead of its number."""

from __future__ import annotations

import math

import torch

from gossamer._checks import (
    check_flag,
    check_has_numbers,
    check_index,
    check_positive,
    check_seed,
    check_shape,
    check_widths,
)
from gossamer.nn.embeddings.codes import CodedRowsTable, code_bits, coded_nbytes
from gossamer.nn.embeddings.residual_quantizer import ResidualQuantizer, sampled
from gossamer.nn.embeddings.table import check_budget, check_finite, item_nbytes

# The published number of levels, and the most levels and codes within a budget: k-means compares each row with all
# codes of a level.
_LEVELS, _MOST_LEVELS, _MOST_CODES = 3, 32, 1 << 12


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
            check_widths(num_codes=num_codes, levels=levels)
            if max(sizes) > num_codes:
                raise ValueError(f"codes must be below num_codes={num_codes}, got {max(sizes) - 1}")
            sizes = [num_codes] * levels
        super().__init__(num_embeddings, embedding_dim, codes, sizes, **options)

    @classmethod
    def from_budget(
        cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object
    ) -> SemanticIdEmbedding:
        """The table of the given ``codes``, whose size is fixed: it fits or raises an error.

        :meth:`from_table` makes codes. Raises the errors of :meth:`Table.from_budget`, and ``ValueError`` without
        ``codes``.
        """
        if options.get("codes") is None:
            raise ValueError(
                f"codes must be given to {cls.__name__}.from_budget, got None; from_table makes them from rows"
            )
        return super().from_budget(num_embeddings, embedding_dim, nbytes, **options)

    @classmethod
    def size_within(cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object) -> int:
        """As :meth:`Table.size_within`; without ``codes``, for the table of :meth:`from_table`."""
        sizes = num_embeddings, embedding_dim
        if options.get("codes") is not None:
            return super().size_within(*sizes, nbytes, **options)
        return coded_nbytes(*sizes, *cls._levels_within(sizes, nbytes, options), item_nbytes(options))

    @classmethod
    def from_table(
        cls, weight: torch.Tensor, *, nbytes: int, steps: int = 10, seed: int = 0, **options: object
    ) -> SemanticIdEmbedding:
        """The table that fills a budget, with codes and rows from the residual k-means of trained rows.

        The vector of an id starts as the sum of its codewords, close to its row. Out of the numbers of levels for which
        at most 4096 codes per level fill the budget, the one closest to the published three is taken. k-means uses at
        most 64 rows per codeword, and at most 50,000 in all.

        Args:
            weight: ``(N, D)``.
            nbytes: the budget.
            steps: of k-means.
            seed: of its first centroids.
            **options: of the class, and ``num_levels`` to fix L. With ``codes`` the rows start as in
                :meth:`from_budget`.

        Raises:
            ValueError: as :meth:`from_budget`.
        """
        check_shape("weight", weight, (None, None), "(N, D)")
        check_finite("weight", weight)
        check_positive(steps=steps)
        check_seed(seed)
        if options.get("codes") is not None:
            return cls._fit_weights(weight, nbytes, options)
        options = {"device": weight.device, "dtype": weight.dtype} | options
        levels, count = cls._levels_within(weight.shape, nbytes, options)
        rows = weight.detach().float()
        quantizer = ResidualQuantizer(rows.shape[1], levels, count, device=rows.device)
        sample = sampled(len(rows), count, 64, seed)
        quantizer.fit(rows[sample.to(rows.device)], steps=steps, seed=seed)
        codes = torch.cat([quantizer.encode(part) for part in rows.split(1 << 16)])
        rest = {name: value for name, value in options.items() if name not in ("num_codes", "num_levels", "prefixes")}
        made = cls(*weight.shape, codes, num_codes=count, **rest)
        with torch.no_grad():
            made.weight.copy_(quantizer.codebooks.detach().flatten(0, 1))
        return made

    @classmethod
    def _levels_within(cls, sizes: tuple[int, int], nbytes: int, options: dict[str, object]) -> tuple[int, int]:
        """The number of levels, and of codes of each, that fill a budget."""
        check_budget(nbytes)
        check_positive(num_embeddings=sizes[0], embedding_dim=sizes[1])
        if options.get("prefixes"):
            raise ValueError("prefixes must be False without codes, got True")
        fixed = {name: options[name] for name in ("num_levels", "num_codes") if options.get(name) is not None}
        check_positive(**fixed)
        most, word = max(2, min(sizes[0], _MOST_CODES)), sizes[1] * item_nbytes(options)
        best, smallest = None, math.inf
        for levels in [fixed["num_levels"]] if "num_levels" in fixed else range(1, _MOST_LEVELS + 1):
            for bits in range(1, code_bits(most) + 1):
                low, high = (2 ** (bits - 1) + 1, min(2**bits, most))
                if "num_codes" in fixed:
                    low = high = fixed["num_codes"]
                least = coded_nbytes(*sizes, levels, low, item_nbytes(options))
                if low <= high:
                    smallest = min(smallest, least)
                if least > nbytes or low > high:
                    continue
                codes = min(high, low + (nbytes - least) // (levels * word))
                served = least + (codes - low) * levels * word
                order = min(served, 0.995 * nbytes), -abs(levels - _LEVELS), served
                if best is None or order > best[0]:
                    best = order, levels, codes
        if best is None:
            cls._check_fits(sizes, nbytes, smallest)
        return best[1:]
