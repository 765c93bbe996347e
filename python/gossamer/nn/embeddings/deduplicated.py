"""Tables that store nearly equal blocks of rows only once."""

from __future__ import annotations

import torch

from gossamer._checks import (
    check_has_numbers,
    check_index,
    check_number,
    check_positive,
    check_seed,
    check_shape,
    check_tensor,
)
from gossamer.nn.embeddings.shared_rows import SharedRowsTable
from gossamer.nn.embeddings.table import check_budget, check_finite


class DeduplicatedEmbedding(SharedRowsTable):
    """A table that stores similar blocks of ρ rows once: id x reads row ``stored[x div ρ]·ρ + x mod ρ``.

    :meth:`from_table` finds similar blocks of a trained table. In further training, a stored block gets the gradients
    of all blocks that it represents.

    Args:
        num_embeddings: N.
        embedding_dim: D.
        stored: ``(⌈N/ρ⌉,)`` int32 or int64, the stored block of each block of ids.
        block_rows: ρ.
        **options: ``mode``, ``include_last_offset``, ``device``, ``dtype`` and ``optimizer``, as for any table.

    Attributes:
        weight: ``(K·ρ, D)``, the parameter: K stored blocks.
        stored: as given, int32, a buffer.

    Raises:
        TypeError: ``stored`` is not an integer tensor; as for the options.
        ValueError: a size is below 1, or ``stored`` has another shape or negative numbers.

    Source: the deduplication method of Zhang et al., "Experimental Analysis of Large-scale Learnable Vector Storage
    Compression", VLDB 2024.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, stored: torch.Tensor, *, block_rows: int, **options: object
    ) -> None:
        check_positive(num_embeddings=num_embeddings, block_rows=block_rows)
        check_shape("stored", stored, (-(-num_embeddings // block_rows),), "(ceil(N / block_rows),)")
        check_index("stored", stored)
        check_has_numbers("stored", stored)
        lowest, highest = (int(number) for number in stored.aminmax())
        if lowest < 0:
            raise ValueError(f"stored must be at least 0, got {lowest}")
        super().__init__(num_embeddings, embedding_dim, (highest + 1) * block_rows, **options)
        self.block_rows = block_rows
        self.register_buffer("stored", stored.int().to(self.weight.device))

    def addresses(self, ids: torch.Tensor) -> torch.Tensor:
        """The stored rows of ``ids``; −1, which no table has, for those outside ``[0, N)``."""
        outside = (ids < 0) | (ids >= self.num_embeddings)
        inside = ids.masked_fill(outside, 0)
        blocks = self.stored.index_select(0, (inside // self.block_rows).reshape(-1)).view(ids.shape)
        return (blocks.to(ids.dtype) * self.block_rows + inside % self.block_rows).masked_fill(outside, -1)

    @classmethod
    def from_table(
        cls,
        weight: torch.Tensor,
        *,
        nbytes: int | None = None,
        block_rows: int = 8,
        tolerance: float | None = 0.01,
        share: float = 0.7,
        bands: int = 90,
        seed: int = 0,
        **options: object,
    ) -> DeduplicatedEmbedding:
        """A trained table ``(N, D)`` with similar blocks stored once.

        Blocks are visited by ascending third quartile of their magnitudes, so that those of rarely trained rows come
        first. A block replaces an earlier one if at least ``share`` of their entries differ by ``tolerance`` or less.
        Two blocks are compared if they share one of ``bands`` hashes, ``⌈(a·v + b)/(9·tolerance)⌉`` with a normal and b
        uniform. With ``nbytes``, merging stops once the table fits.

        Args:
            weight: ``(N, D)``.
            nbytes: the budget, or None to merge all similar blocks.
            block_rows: ρ. A block costs 4 bytes; larger blocks have fewer similar ones.
            tolerance: the largest difference at which two entries count as equal; None for the least of 0.01, 0.02,
                0.04 and so on with which the table fits ``nbytes``.
            share: required share of equal entries, in ``(0, 1]``.
            bands: number of hashes.
            seed: of the hashes.
            **options: of the class.

        Raises:
            ValueError: ``share`` or ``tolerance`` does not fit, or the table is larger than ``nbytes`` with all similar
                blocks merged; the message gives its size.
        """
        check_tensor("weight", weight)
        check_shape("weight", weight, (None, None), "(N, D)")
        check_finite("weight", weight)
        check_positive(block_rows=block_rows, bands=bands)
        check_number("share", share, above=0, most=1)
        if tolerance is not None:
            check_number("tolerance", tolerance, above=0, finite=True)
        check_seed(seed)
        if nbytes is not None:
            check_budget(nbytes)
        elif tolerance is None:
            raise ValueError("tolerance must be given without nbytes, got None")
        n, d = weight.shape
        count = -(-n // block_rows)
        flat = weight.new_zeros(count * block_rows, d, dtype=torch.float32)
        flat[:n] = weight.detach()
        flat = flat.view(count, block_rows * d).cpu()

        def size(kept: int) -> int:
            return kept * block_rows * d * weight.element_size() + 4 * count

        def enough(kept: int) -> bool:
            return nbytes is not None and size(kept) <= nbytes

        step = 0.01 if tolerance is None else tolerance
        stored, kept = _merge(flat, step, share, bands, seed, enough)
        # With the whole range of values as the tolerance all blocks are similar.
        widest = 2 * float(flat.abs().max()) if tolerance is None else 0.0
        while step < widest and not enough(len(kept)):
            step *= 2
            stored, kept = _merge(flat, step, share, bands, seed, enough)
        if nbytes is not None and size(len(kept)) > nbytes:
            raise ValueError(
                f"nbytes must be at least {size(len(kept))} for {cls.__name__} with all similar blocks merged, "
                f"got {nbytes}"
            )
        options = {"device": weight.device, "dtype": weight.dtype} | options
        made = cls(n, d, stored, block_rows=block_rows, **options)
        padded = weight.new_zeros(count * block_rows, d)
        padded[:n] = weight.detach()
        with torch.no_grad():
            made.weight.copy_(padded.view(count, block_rows, d)[kept.to(weight.device)].flatten(0, 1))
        return made

    @classmethod
    def from_budget(
        cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object
    ) -> DeduplicatedEmbedding:
        """The table of the given ``stored`` blocks, whose size is fixed: it fits or raises an error."""
        return super(SharedRowsTable, cls).from_budget(num_embeddings, embedding_dim, nbytes, **options)


def _merge(blocks: torch.Tensor, tolerance: float, share: float, bands: int, seed: int, enough):
    """The number of the stored block for each of ``blocks``, and the list of stored blocks."""
    generator = torch.Generator().manual_seed(seed)
    width = 9 * tolerance
    directions = torch.randn(blocks.shape[1], bands, generator=generator, dtype=blocks.dtype)
    shifts = torch.rand(bands, generator=generator, dtype=blocks.dtype) * width
    keys = ((blocks @ directions + shifts) / width).ceil().long()
    order = blocks.abs().quantile(0.75, dim=1).argsort(stable=True).tolist()
    stored = torch.arange(len(blocks))
    found: dict[tuple[int, int], list[int]] = {}
    left = len(blocks)
    for block in order:
        own = list(enumerate(keys[block].tolist()))
        match = None
        if not enough(left):
            candidates = sorted({other for key in own for other in found.get(key, ())})
            if candidates:
                alike = ((blocks[candidates] - blocks[block]).abs() <= tolerance).float().mean(1)
                match = next((c for c, part in zip(candidates, alike.tolist(), strict=True) if part >= share), None)
        if match is not None:
            stored[block] = match
            left -= 1
            continue
        for key in own:
            found.setdefault(key, []).append(block)
    kept = (stored == torch.arange(len(blocks))).nonzero().flatten()
    return torch.searchsorted(kept, stored), kept
