"""Tables as products of three small tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from gossamer._checks import check_index, check_positive, check_sequence
from gossamer._parameters import factory_of, new_parameter
from gossamer.nn.embeddings.fused_step import FusedTable
from gossamer.nn.embeddings.table import check_budget, check_lists, item_nbytes
from gossamer.ops.composed_rows import Parts
from gossamer.ops.gather_matmul import gather_matmul, pairs_of
from gossamer.ops.map_ids import IdMaps, map_ids
from gossamer.optim import Optimizer

# A budget that is used to this share counts as full.
_FULL = 0.99


class TensorTrainEmbedding(FusedTable):
    """TT-Rec: the vector of an id as a product of three matrices, which the digits of the id choose.

    With ``N ≤ n_1·n_2·n_3``, ``D = d_1·d_2·d_3`` and the digits ``x = (i_1·n_2 + i_2)·n_3 + i_3``,
    ``e(x) = G_1[i_1]·G_2[i_2]·G_3[i_3]``, where ``G_1[i]`` is ``(d_1, r_1)``, ``G_2[i]`` is ``(r_1, d_2·r_2)`` and
    ``G_3[i]`` is ``(r_2, d_3)``; the entry ``(a, b, c)`` of the product is entry ``(a·d_2 + b)·d_3 + c`` of ``e(x)``.

    If a batch has more ids than there are pairs ``(i_1, i_2)``, the first product is computed once per pair. The second
    product is summed over a bag as it is computed.

    Args:
        num_embeddings: N.
        embedding_dim: D.
        ranks: ``(r_1, r_2)``.
        row_factors: ``(n_1, n_2, n_3)``; by default about equal.
        dim_factors: ``(d_1, d_2, d_3)``; by default as equal as the factors of D allow, the largest last.
        mode: how bags are pooled: ``"sum"``, ``"mean"`` or ``"max"``.
        include_last_offset: whether offsets hold the end of the last bag too.
        device: of the cores.
        dtype: of the cores.
        optimizer: one of :mod:`gossamer.optim`, to fuse its step into the backward pass.

    Attributes:
        core1: ``(n_1, d_1·r_1)``, a parameter. Cores start normal, with one variance, such that the entries of ``e(x)``
            have variance 1/(3N).
        core2: ``(n_2, r_1·d_2·r_2)``.
        core3: ``(n_3, r_2·d_3)``.

    Raises:
        TypeError: a size is not an int, or ``optimizer`` is not one of :mod:`gossamer.optim`.
        ValueError: a size is below 1, there are not three factors or two ranks, the product of ``row_factors`` is below
            N or that of ``dim_factors`` is not D, or the mode is unknown.

    Source: Yin et al., "TT-Rec: Tensor Train Compression for Deep Learning Recommendation Models", MLSys 2021.
    """

    tables = ("core1", "core2", "core3")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        ranks: Sequence[int],
        *,
        row_factors: Sequence[int] | None = None,
        dim_factors: Sequence[int] | None = None,
        mode: str = "sum",
        include_last_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        super().__init__()
        self._set_up(num_embeddings, embedding_dim, mode, include_last_offset)
        for name, values in (("ranks", ranks), ("row_factors", row_factors), ("dim_factors", dim_factors)):
            if values is not None or name == "ranks":
                check_sequence(name, values)
        n = _three_rows(num_embeddings) if row_factors is None else tuple(row_factors)
        if dim_factors is None and embedding_dim > 2**31:
            raise ValueError(f"embedding_dim must be at most 2**31 to be factorised, got {embedding_dim}")
        d = _three_factors(embedding_dim) if dim_factors is None else tuple(dim_factors)
        ranks = tuple(ranks)
        for name, values, count in (("row_factors", n, 3), ("dim_factors", d, 3), ("ranks", ranks, 2)):
            if len(values) != count:
                raise ValueError(f"{name} must be {count} numbers, got {values}")
            check_positive(**{f"{name}[{i}]": value for i, value in enumerate(values)})
        if math.prod(n) < num_embeddings:
            raise ValueError(f"row_factors must have a product of at least {num_embeddings}, got {n}")
        if math.prod(d) != embedding_dim:
            raise ValueError(f"dim_factors must have the product {embedding_dim}, got {d}")
        self.ranks, self.row_factors, self.dim_factors = ranks, n, d
        columns = (d[0] * ranks[0], ranks[0] * d[1] * ranks[1], ranks[1] * d[2])
        factory = factory_of(device, dtype)
        for name, rows, width in zip(self.tables, n, columns, strict=True):
            setattr(self, name, new_parameter(rows, width, **factory))
        self._maps = IdMaps.of(n, divisors=[n[1] * n[2], n[2], 1], limit=num_embeddings)
        self.reset_parameters()
        self.attach(optimizer)

    def reset_parameters(self) -> None:
        """Redraw the cores and reset the optimizer."""
        std = (1 / (3 * self.num_embeddings * math.prod(self.ranks))) ** (1 / 6)
        with torch.no_grad():
            for name in self.tables:
                core = getattr(self, name)
                if not core.is_meta:
                    core.normal_(std=std)
        self._reset_state()

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors ``(..., D)`` of ``ids (...)``.

        Raises:
            TypeError: ``ids`` is not int32 or int64.
            IndexError: on the CPU, an id outside ``[0, N)``.
        """
        check_index("ids", ids)
        return self._multiplied(ids.reshape(-1, 1)).view(*ids.shape, self.embedding_dim)

    def _pool(self, ids: torch.Tensor, *lists: torch.Tensor | None, **how: object) -> torch.Tensor:
        """Multiply and pool as ids are read, without storing vectors; only maxima store them."""
        check_lists(ids, *lists)
        return super()._pool(ids, *lists, **how) if self.mode == "max" else self._multiplied(ids, *lists, **how)

    def _multiplied(self, ids: torch.Tensor, *lists: torch.Tensor | None, **how: object) -> torch.Tensor:
        """Bags of products of cores."""
        (n1, n2, n3), (d1, d2, _), (r1, r2) = self.row_factors, self.dim_factors, self.ranks
        core1, core2, core3 = self._cores(ids)
        count, columns = ids.numel(), d1 * d2 * r2
        if count > n1 * n2:
            everyone = torch.arange(n1 * n2, device=ids.device)
            pairs = gather_matmul(core1, core2, everyone, _two(columns, (n1, n2), (n2, 1), n1 * n2), r1)
            last = _two(self.embedding_dim, (n1 * n2, n3), (n3, 1), self.num_embeddings)
        else:
            both = _two(columns, (n1, n2), (n2 * n3, n3), self.num_embeddings)
            pairs = gather_matmul(core1, core2, ids.reshape(-1), both, r1)
            # A pair per id, in the ids' order.
            places = torch.arange(count, device=ids.device)
            third = map_ids(ids.reshape(-1), self._maps)[:, 2]
            last = pairs_of(torch.stack([places, third], 1), self.embedding_dim)
            ids = places.view(ids.shape)
        return gather_matmul(pairs, core3, ids, last, r2, *lists, **how)

    def _cores(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """The cores; with an optimizer, copies of the rows that ids choose, which the backward pass steps."""
        if self.optimizer is None:
            return [getattr(self, name) for name in self.tables]
        found = []
        for name, touched in zip(self.tables, self._touched(ids.reshape(-1)), strict=True):
            chosen = torch.where(touched, torch.arange(len(touched), device=ids.device), -1)
            found.append(self.bags(name, chosen.unsqueeze(1), bounds="drop"))
        return found

    def _touched(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """Which rows of each core ``ids (L,)`` choose, bool."""
        n1, n2, n3 = self.row_factors
        if len(ids) > n1 * n2:
            # Marks of pairs of the first two digits, of which there are fewer than ids.
            sizes = n1 * n2, n3
            maps = IdMaps.of(sizes, divisors=[n3, 1], limit=self.num_embeddings)
            both, third = _marks(map_ids(ids, maps), sizes)
            return [both.view(n1, n2).any(1), both.view(n1, n2).any(0), third]
        return _marks(map_ids(ids, self._maps), self.row_factors)

    def extra_repr(self) -> str:
        """Sizes, ranks and mode, and the optimizer, if any."""
        return self._repr(f"ranks={self.ranks}", f"rows={self.row_factors}")

    @classmethod
    def from_budget(
        cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object
    ) -> TensorTrainEmbedding:
        """The table of the highest ranks that fits ``nbytes`` bytes; raises the errors of :meth:`Table.from_budget`.

        Ranks are equal, or the first is one above the second. If that leaves more than a hundredth of the budget
        unused, ranks up to two and a half lower are tried with less equal ``row_factors``, unless these are given; if
        that does not fill it either, ranks of which one is up to twice the other.
        """
        check_budget(nbytes)
        sizes, itemsize = (num_embeddings, embedding_dim), item_nbytes(options)
        # A table of the lowest ranks checks the options.
        smallest = cls(*sizes, (1, 1), **options | {"device": "meta"})
        n, d = smallest.row_factors, smallest.dim_factors

        def size_of(n: tuple[int, ...], ranks: tuple[int, int]) -> int:
            return itemsize * (n[0] * d[0] * ranks[0] + n[1] * ranks[0] * d[1] * ranks[1] + n[2] * ranks[1] * d[2])

        # A rank above the product of the sizes on either side of it adds nothing.
        most = n[0] * d[0], n[2] * d[2]

        def equal(knob: int) -> tuple[int, int]:
            return min((knob + 1) // 2, most[0]), min(knob // 2, most[1])

        knob = cls._largest(sizes, nbytes, (2, 2 * max(most)), lambda knob: size_of(n, equal(knob)))
        choices = [(n, equal(knob))]
        if size_of(*choices[0]) < _FULL * nbytes and options.get("row_factors") is None:
            rows = [_three_rows(num_embeddings, second) for second in range(max(1, n[1] // 2), 2 * n[1])]
            choices += itertools.product(rows, [equal(lower) for lower in range(max(2, knob - 5), knob + 1)])
        if max(size for choice in choices if (size := size_of(*choice)) <= nbytes) < _FULL * nbytes:
            for first in range(max(1, knob // 3), min(knob, most[0]) + 1):
                second = (nbytes // itemsize - n[0] * d[0] * first) // (n[1] * first * d[1] + n[2] * d[2])
                second = min(second, most[1], 2 * first)
                if second >= max(1, first // 2):
                    choices.append((n, (first, second)))

        def fullest(choice: tuple[tuple[int, ...], tuple[int, int]]) -> tuple[float, ...]:
            """Fuller budgets first; of those full to a hundredth, equal ranks, then high ranks."""
            (rows, ranks), size = choice, size_of(*choice)
            return min(size, _FULL * nbytes), ranks[0] - ranks[1] in (0, 1), sum(ranks), -max(rows), size

        rows, ranks = max((choice for choice in choices if size_of(*choice) <= nbytes), key=fullest)
        return cls(*sizes, ranks, **options | {"row_factors": rows})


def _marks(digits: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """For each column of ``digits (L, H)``, which numbers below its size are in it, bool."""
    found = []
    for digit, size in zip(digits.unbind(1), sizes, strict=True):
        if not digits.is_cpu:
            # Invalid ids, which raise no error on CUDA, have no digits and get a mark of their own.
            digit = torch.where(digit < 0, size, digit)
        marks = torch.zeros(size + 1, dtype=torch.bool, device=digits.device)
        found.append(marks.index_fill(0, digit.long(), True)[:size])
    return found


def _two(dim: int, moduli: tuple[int, int], divisors: tuple[int, int], limit: int) -> Parts:
    """The two matrices chosen by quotients of an id."""
    return Parts.of(dim, "matmul", IdMaps.of(moduli, divisors=divisors, limit=limit))


def _three_rows(num_embeddings: int, second: int | None = None) -> tuple[int, int, int]:
    """Three about equal sizes whose product is at least N, or two beside a given second one."""
    if second is None:
        first = math.ceil(round(num_embeddings ** (1 / 3), 9))
        second = math.ceil(math.sqrt(-(-num_embeddings // first)))
    else:
        first = math.ceil(math.sqrt(-(-num_embeddings // second)))
    return first, second, -(-num_embeddings // (first * second))


def _three_factors(value: int) -> tuple[int, int, int]:
    """Three factors of a number whose sum is least, in ascending order."""
    best = (1, 1, value)
    for a in range(1, round(value ** (1 / 3)) + 1):
        if value % a == 0:
            for b in range(a, math.isqrt(value // a) + 1):
                if value // a % b == 0 and a + b + value // a // b < sum(best):
                    best = (a, b, value // a // b)
    return best
