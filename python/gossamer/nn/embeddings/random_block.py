"""Random block-offset embedding: all vectors are cut from one array of weights."""

from __future__ import annotations

import torch

from gossamer._checks import check_flag, check_positive
from gossamer.nn.embeddings.seeded import SeededMaps
from gossamer.nn.embeddings.shared_rows import SharedRowsTable
from gossamer.ops.composed_rows import Parts
from gossamer.ops.map_ids import IdMaps

#: A prime below 2³¹; hashed positions are taken modulo it first.
_PRIME = 2_147_483_647


class RandomBlockEmbedding(SeededMaps, SharedRowsTable):
    """ROBE: blocks of an id's vector are at hashed positions of one array of M weights, and may overlap other blocks.

    ``e(x)_i = weight[a(x, i div Z) + i mod Z]`` with blocks of Z weights and, in the two published forms,

    - ``wrap=False``: ``a(x, k) = ((r1 + r2·k + r3·x) mod p) mod (M − Z + 1)``: no block crosses the end of the array;
    - ``wrap=True``: ``e(x)_i = weight[((r1 + r2·(i div Z) + r3·x + i mod Z) mod p) mod M]``: blocks continue at the
      start of the array.

    p is 2³¹−1. Weights that occur several times, in different ids or within one, get the sum of their gradients.

    Args:
        num_embeddings: N. Ids below p are distinct; larger ones are taken modulo p.
        embedding_dim: D.
        num_weights: M.
        block_size: Z, at most M.
        wrap: which form.
        seed: seed of r1, r2 and r3; part of the state.
        **options: ``mode``, ``include_last_offset``, ``device``, ``dtype`` and ``optimizer``, as for any table.

    Attributes:
        weight: ``(M, 1)``, the parameter. It starts uniform in ``±1/√N``.

    Raises:
        TypeError: as for the options.
        ValueError: a size is below 1, ``block_size`` is above M, or an option does not fit.

    Source: Desai et al., "Random Offset Block Embedding Array (ROBE) for CriteoTB Benchmark MLPerf DLRM Model", MLSys
    2022.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_weights: int,
        *,
        block_size: int = 16,
        wrap: bool = False,
        seed: int = 0,
        **options: object,
    ) -> None:
        check_positive(embedding_dim=embedding_dim, num_weights=num_weights, block_size=block_size)
        check_flag("wrap", wrap)
        if block_size > num_weights:
            raise ValueError(f"block_size must be at most the number of weights, {num_weights}, got {block_size}")
        self.block_size, self.wrap = block_size, wrap
        super().__init__(num_embeddings, embedding_dim, num_weights, embedding_dim, operation="concat", **options)
        self._keep_seed(seed, self.weight.device)

    def _draw_maps(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        constants = torch.randint(1, _PRIME, (3,), generator=generator, device="cpu").tolist()
        self._parts = block_parts(self.num_rows, self.embedding_dim, self.block_size, self.wrap, constants)

    def parts(self) -> Parts:
        """The blocks of an id."""
        return self._parts

    @classmethod
    def from_budget(
        cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object
    ) -> RandomBlockEmbedding:
        """The array with the most weights, at most N·D, that fits ``nbytes`` bytes; raises the errors of
        :meth:`Table.from_budget`.
        """
        options = {"block_size": 16} | options

        def make(weights: int, **more: object) -> RandomBlockEmbedding:
            return cls(num_embeddings, embedding_dim, weights, **options | more)

        least = options["block_size"]
        largest = max(num_embeddings * embedding_dim, least)
        return cls._fit((num_embeddings, embedding_dim), nbytes, (least, largest), make)


def block_parts(num_weights: int, embedding_dim: int, block_size: int, wrap: bool, constants: list[int]) -> Parts:
    """The blocks of a vector, for the constants ``[r1, r2, r3]``."""
    r1, r2, r3 = constants
    count = -(-embedding_dim // block_size)
    starts = ((r1 + r2 * torch.arange(count, device="cpu")) % _PRIME).tolist()
    # Wrapping blocks have positions below the prime, and their elements are taken modulo M.
    moduli = [_PRIME if wrap else num_weights - block_size + 1] * count
    maps = IdMaps.of(moduli, multipliers=[r3] * count, addends=starts, prime=_PRIME)
    return Parts.of(embedding_dim, "concat", maps, block=block_size, wrap=wrap)
