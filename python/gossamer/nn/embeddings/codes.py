"""Codes: rows of small integers packed in few bits, and tables whose rows are chosen by them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from gossamer._checks import check_index, check_shape
from gossamer.nn.embeddings.shared_rows import SharedRowsTable
from gossamer.ops.composed_rows import PACKED_BITS, Parts
from gossamer.ops.map_ids import IdMaps

# Rows of codes packed at a time: packing takes eight bytes per bit.
_PACKED_AT_ONCE = 1 << 16


def code_bits(num_codes: int) -> int:
    """Bits of a code below ``num_codes``."""
    return max(1, (num_codes - 1).bit_length())


def packed_width(parts: int, bits: int) -> int:
    """Bytes of a row of ``parts`` codes."""
    return -(-parts * bits // 8)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes ``(N, P)`` below ``2**bits``, at most 16 bits each, as bytes ``(N, ceil(P·bits/8))``, lowest bit first."""
    return torch.cat([_packed(part, bits) for part in codes.split(_PACKED_AT_ONCE)])


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    places = torch.arange(bits, device=codes.device)
    stream = ((codes.long().unsqueeze(-1) >> places) & 1).flatten(1)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 8)).unflatten(1, (-1, 8))
    return (stream << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8)


class CodedRowsTable(SharedRowsTable):
    """A table whose rows are chosen by the codes of an id: the serving form of learnt codes and of semantic ids.

    Args:
        num_embeddings: N.
        embedding_dim: D.
        codes: ``(N, P)`` int32 or int64 at least 0.
        sizes: number of rows of each of the P parts of the table; larger than every code of the part.
        operation: how rows are composed: ``"add"``, ``"mul"`` or ``"concat"``.
        frequent: number of ids, from the first, whose codes use all bits; the codes of the other ids are below
            ``rare_codes`` and are packed in fewer bits. All by default.
        rare_codes: upper bound on the codes of the other ids.
        **options: as in :class:`SharedRowsTable`.

    Attributes:
        weight: ``(Σ sizes, D)``, or ``(Σ sizes, D/P)`` with ``"concat"``.
        codes: ``(frequent, ...)``, a buffer: codes packed into bytes, with as many bits as the largest part needs;
            int32 above 16 bits.
        rare: the codes of the other ids, a buffer, or None.

    Raises:
        TypeError: ``codes`` is not an integer tensor; as for the options.
        ValueError: a size is below 1, or ``codes`` has another shape, negative numbers or some above their part.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        codes: torch.Tensor,
        sizes: Sequence[int],
        *,
        frequent: int | None = None,
        rare_codes: int | None = None,
        **options: object,
    ) -> None:
        check_shape("codes", codes, (num_embeddings, len(sizes)), "(N, P)")
        check_index("codes", codes)
        frequent = num_embeddings if frequent is None else frequent
        super().__init__(num_embeddings, embedding_dim, sum(sizes), len(sizes), **options)
        self.sizes, self.frequent = tuple(sizes), frequent
        self._bits = [code_bits(max(sizes)), code_bits(rare_codes or 1)]
        device = self.weight.device
        for name, part, bits, limits in (
            ("codes", codes[:frequent], self._bits[0], sizes),
            ("rare", codes[frequent:], self._bits[1], [rare_codes or 1] * len(sizes)),
        ):
            if name == "rare" and frequent == num_embeddings:
                self.register_buffer(name, None)
                continue
            if not part.is_meta and part.numel():
                lowest, highest = part.amin(), (part - torch.tensor(limits, device=part.device)).amax()
                if int(lowest) < 0 or int(highest) >= 0:
                    raise ValueError(f"codes must be in [0, size) of their part with sizes {tuple(limits)}")
            stored = pack_codes(part, bits) if bits <= PACKED_BITS else part.int()
            self.register_buffer(name, stored.to(device))
        self._maps = IdMaps.of(sizes, bases=[0, *itertools.accumulate(sizes)][:-1])

    def parts(self) -> Parts:
        """A row for each of the P codes of an id."""
        bits = [b if b <= PACKED_BITS else 32 for b in self._bits]
        stored = {"coded": len(self.sizes), "codes": self.codes, "rare": self.rare, "bits": bits}
        return Parts.of(self.embedding_dim, self.operation, self._maps, **stored)

    @classmethod
    def from_budget(cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object) -> CodedRowsTable:
        """The table of the given ``codes``, whose size is fixed: it fits or raises an error."""
        return super(SharedRowsTable, cls).from_budget(num_embeddings, embedding_dim, nbytes, **options)


def coded_nbytes(num_embeddings: int, dim: int, parts: int, num_codes: int, itemsize: int) -> int:
    """Bytes of ``parts`` tables of ``num_codes`` rows of ``dim`` columns, and of the codes of N ids."""
    bits = code_bits(num_codes)
    width = packed_width(parts, bits) if bits <= PACKED_BITS else 4 * parts
    return num_embeddings * width + parts * num_codes * dim * itemsize
