"""Residual quantisation: codes of vectors, where each level encodes the residual of the previous levels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from gossamer import _backend
from gossamer._checks import (
    check_flag,
    check_floating,
    check_has_numbers,
    check_id_range,
    check_index,
    check_input,
    check_number,
    check_positive,
    check_same_device,
    check_seed,
    check_shape,
    check_widths,
)
from gossamer._parameters import factory_of, new_parameter
from gossamer.ops.product_key_topk import product_key_search

# Distances held at a time.
_DISTANCES = 1 << 18
# k-means++ draws this many vectors one by one and at most so many in each later round; k-means is fitted to at most
# 50,000 rows of a table.
_SINGLY, _ROUND, _SAMPLE = 64, 512, 50_000
# Integers as wide as a float, by its bytes; and an odd number whose powers weigh them.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_HASH_BASE = 0x9E3779B97F4A7C15
# torch.multinomial takes at most this many weights.
_MULTINOMIAL_WEIGHTS = 1 << 24


class ResidualQuantization(NamedTuple):
    """The result of :class:`ResidualQuantizer` for vectors.

    Attributes:
        values: ``(..., d)``, the sum of the codewords; its gradient is passed unchanged to the vectors.
        codes: ``(..., L)`` int64.
        loss: ``Σ_l mean‖sg(r_l) − C^l‖² + β·mean‖r_l − sg(C^l)‖²`` over levels, sg being stop-gradient.
    """

    values: torch.Tensor
    codes: torch.Tensor
    loss: torch.Tensor


class ResidualQuantizer(nn.Module):
    """Semantic ids: L codes of K codewords each, ``c_l = argmin_k ‖r_l − C^l_k‖²`` and ``r_{l+1} = r_l − C^l_{c_l}``.

    ``r_0`` is the vector. :meth:`fit` initialises the codebooks by k-means, level by level; the loss of :meth:`forward`
    trains them further, and :meth:`reseed_dead_codes` moves codewords that no vector chooses onto residuals.

    Args:
        dim: d.
        num_levels: L.
        num_codes: K.
        commitment: β, the weight of the term that pulls vectors towards their codewords.
        device: of the codebooks.
        dtype: of the codebooks.

    Attributes:
        codebooks: ``(L, K, d)``, a parameter.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1, or ``commitment`` is negative.

    Source: Rajput et al., "Recommender Systems with Generative Retrieval", NeurIPS 2023; balanced codes: Deng et al.,
    "OneRec", 2025.
    """

    def __init__(
        self,
        dim: int,
        num_levels: int = 3,
        num_codes: int = 256,
        *,
        commitment: float = 0.25,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_widths(dim=dim, num_levels=num_levels, num_codes=num_codes)
        check_number("commitment", commitment, least=0)
        self.dim, self.num_levels, self.num_codes, self.commitment = dim, num_levels, num_codes, commitment
        factory = factory_of(device, dtype)
        self.codebooks = new_parameter(num_levels, num_codes, dim, **factory)
        nn.init.normal_(self.codebooks, std=dim**-0.5)

    def forward(self, x: torch.Tensor) -> ResidualQuantization:
        """Codes of ``x (..., d)``, their sum, and the loss that trains codebooks and encoder.

        Raises:
            TypeError: ``x`` does not have the dtype of the codebooks.
            ValueError: the last size of ``x`` is not d, or it is on another device.
        """
        check_input(x, self.dim, self.codebooks)
        left, total, loss, codes = x, torch.zeros_like(x), x.new_zeros(()), []
        for book in self.codebooks:
            chosen = nearest(left.detach(), book.detach())
            words = book[chosen]
            loss = loss + (left.detach() - words).square().sum(-1).mean()
            loss = loss + self.commitment * (left - words.detach()).square().sum(-1).mean()
            left, total = left - words.detach(), total + words
            codes.append(chosen)
        # x − x.detach() is zero, so the value is the codewords' sum bit for bit.
        return ResidualQuantization(total.detach() + (x - x.detach()), torch.stack(codes, -1), loss)

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes ``(..., L)`` int64 of ``x (..., d)``."""
        return self(x).codes

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The sums ``(..., d)`` of the codewords selected by ``codes (..., L)``.

        Raises:
            TypeError: ``codes`` is not int32 or int64.
            ValueError: its last size is not L, or it is on another device than the codebooks.
            IndexError: on the CPU, a code is not in ``[0, K)``.
        """
        check_index("codes", codes)
        check_shape("codes", codes, (*codes.shape[:-1], self.num_levels), "(..., L)")
        check_same_device(codebooks=self.codebooks, codes=codes)
        check_id_range("codes", codes, self.num_codes, "K")
        return sum(book[code] for book, code in zip(self.codebooks, codes.unbind(-1), strict=True))

    @torch.no_grad()
    def fit(self, x: torch.Tensor, *, steps: int = 20, seed: int = 0, balanced: bool = False) -> torch.Tensor:
        """Fit codebooks by k-means on ``x (n, d)``, each level on the residuals of the previous levels.

        Args:
            x: at least one vector.
            steps: maximum number of k-means steps; it stops when no assignment changes.
            seed: seed of the initial centroids, which are drawn far apart (k-means++).
            balanced: whether the cluster sizes of a level differ by at most one: see :func:`balanced_kmeans`.

        Returns:
            The codes ``(n, L)`` int64 at the end of fitting. :meth:`encode` always uses the nearest codeword, also
            after balanced clustering.

        Raises:
            ValueError: ``x`` has another shape, or no vector.
        """
        check_shape("x", x, (None, self.dim), "(n, d)")
        check_seed(seed)
        check_flag("balanced", balanced)
        if not len(x):
            raise ValueError("x must hold at least one vector, got 0")
        left, codes = x.to(self.codebooks.dtype), []
        for level in range(self.num_levels):
            cluster = balanced_kmeans if balanced else kmeans
            centroids, chosen = cluster(left, self.num_codes, steps=steps, seed=seed + level)
            self.codebooks[level] = centroids
            left = left - centroids[chosen]
            codes.append(chosen)
        return torch.stack(codes, 1)

    @torch.no_grad()
    def reseed_dead_codes(self, x: torch.Tensor, *, seed: int = 0) -> int:
        """Move codewords that no vector of ``x (n, d)`` chooses onto residuals drawn from it; return their number."""
        check_floating("x", x)
        check_shape("x", x, (None, self.dim), "(n, d)")
        check_has_numbers("x", x)
        check_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        left, dead = x.to(self.codebooks.dtype), 0
        for book in self.codebooks:
            chosen = nearest(left, book)
            unused = (chosen.bincount(minlength=self.num_codes) == 0).nonzero().flatten()
            if len(unused) and len(left):
                drawn = torch.randint(len(left), (len(unused),), generator=generator).to(left.device)
                book[unused] = left[drawn]
                dead += len(unused)
                chosen = nearest(left, book)
            left = left - book[chosen]
        return dead


def nearest(x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """The nearest of ``words (K, d)`` to each of ``x (..., d)``, among equal ones the first."""
    flat = x.reshape(-1, x.shape[-1])
    if x.shape[-1] == 1 and not torch.compiler.is_compiling():
        return _nearest_number(flat[:, 0], words[:, 0]).view(x.shape[:-1])
    if _searches(flat, words):
        return _searched(flat, words).view(x.shape[:-1])
    # ‖x‖² is the same for all words.
    lengths = words.square().sum(-1)
    size = max(1, _DISTANCES // len(words))
    parts = [flat] if torch.compiler.is_compiling() or len(flat) <= size else flat.split(size)
    found = torch.cat([torch.addmm(lengths, part, words.T, alpha=-2).argmin(-1) for part in parts])
    return _first_of_equals(words)[found].view(x.shape[:-1])


def _first_of_equals(words: torch.Tensor) -> torch.Tensor:
    """``(K,)`` the first word equal to each: a product may round the columns of equal words differently.

    Words are sorted by a hash of their bits. A word whose hash an unequal one before it shares stands for itself.
    """
    # Adding zero makes negative zeros positive.
    bits = (words.detach() + 0.0).view(_BITS[words.element_size()]).long()
    factors = [pow(_HASH_BASE, power, 2**63) for power in range(1, words.shape[1] + 1)]
    hashes, order = (bits * torch.tensor(factors, device=words.device)).sum(1).sort(stable=True)
    first = order[torch.searchsorted(hashes, hashes)]
    first = torch.where((words[first] == words[order]).all(1), first, order)
    return order.scatter(0, order, first)


def _nearest_number(x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """:func:`nearest` of numbers ``(n,)`` among ``(K,)``, by comparing the two neighbours among the sorted words."""
    ascending, order = words.sort(stable=True)
    above = torch.searchsorted(ascending, x.contiguous()).clamp(max=len(words) - 1)
    # searchsorted finds the first of equal words.
    below = torch.searchsorted(ascending, ascending[(above - 1).clamp(min=0)])
    to_above, to_below = (ascending[above] - x).abs(), (x - ascending[below]).abs()
    above, below = order[above], order[below]
    return torch.where(
        to_above == to_below, torch.minimum(above, below), torch.where(to_above < to_below, above, below)
    )


def _searches(x: torch.Tensor, words: torch.Tensor) -> bool:
    """Whether a native kernel searches for the nearest words, which it does among finite scores only."""
    if torch.compiler.is_compiling() or x.dtype != torch.float32 or words.dtype != x.dtype or not x.numel():
        return False
    if x.is_meta or _backend.resolve("product_key_topk", x) != "native":
        return False
    of_x, of_words = (max(abs(float(bound)) for bound in tensor.aminmax()) for tensor in (x, words))
    # No sum of two scores is larger; comparisons with NaN are false.
    return 2 * x.shape[1] * of_words * (of_x + of_words / 2) <= torch.finfo(x.dtype).max


@torch.no_grad()
def _searched(x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """:func:`nearest` of ``x (n, d)`` by a search for the best of two halves of the vectors, which stores no scores."""
    # ⟨x, w⟩ − ‖w‖²/2, as products of one more column.
    keys = torch.cat([words, words.square().sum(-1, keepdim=True) / -2], 1)
    queries = torch.nn.functional.pad(x, (0, 1), value=1.0)
    half = (len(x) + 1) // 2
    pairs = torch.cat([queries[:half], queries[len(x) - half :]], 1)
    found = product_key_search(pairs, keys.expand(1, 2, -1, -1).contiguous(), 1)[1].squeeze(1)
    first, second = found // len(words), found % len(words)
    return torch.cat([first, second[2 * half - len(x) :]])


def _check_clusters(x: torch.Tensor, num_codes: int, steps: int, seed: int) -> None:
    check_floating("x", x)
    check_shape("x", x, (None, None), "(n, d)")
    check_positive(num_codes=num_codes, steps=steps)
    check_seed(seed)
    if not len(x) or x.is_meta:
        raise ValueError(f"x must have at least one vector, whose numbers are here, got {tuple(x.shape)} on {x.device}")
    # Twice the longest vector is the largest distance; NaN and infinity are above the bound, too.
    longest = float(torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).max())
    if not 4 * longest**2 <= torch.finfo(x.dtype).max:
        raise ValueError(
            f"x must be finite, and its squared distances in {x.dtype}, got vectors as long as {longest:g}"
        )


def _spread(x: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Draw ``count`` vectors with probabilities proportional to their squared distance to those drawn before.

    The first are drawn one by one. Later rounds draw several at once, by the distances before the round, and correct
    these by rejection: a vector is kept with a probability of its distance to all kept so far over its distance before
    the round. A round passes over all vectors once.
    """
    words = x.new_empty(count, x.shape[1])  # allocated first, so that too many fail at once
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(x), (1,), generator=generator)
    distance = (x - x[int(chosen)]).square().sum(-1)
    while len(chosen) < count:
        weights = distance.double().cpu()
        if float(weights.sum()) > 0:
            draws = 1 if len(chosen) < _SINGLY else min(len(chosen) // 4, _ROUND, count - len(chosen))
            picks = _drawn(weights, draws, generator)
            if draws > 1:
                picks = picks[_kept(x[picks.to(x.device)].double().cpu(), weights[picks], generator)]
        else:
            picks = torch.randint(len(x), (1,), generator=generator)
        chosen = torch.cat([chosen, picks])
        drawn = x[picks.to(x.device)]
        near = drawn if len(picks) == 1 else drawn[nearest(x, drawn)]
        distance = torch.minimum(distance, (x - near).square().sum(-1))
    return words.copy_(x[chosen.to(x.device)])


def _drawn(weights: torch.Tensor, draws: int, generator: torch.Generator) -> torch.Tensor:
    """Draw ``draws`` indices with replacement, with probabilities proportional to ``weights (n,)`` float64.

    More weights than ``torch.multinomial`` takes are drawn from by inverting their cumulative sums.
    """
    if len(weights) <= _MULTINOMIAL_WEIGHTS:
        return torch.multinomial(weights, draws, replacement=draws > 1, generator=generator)
    sums = weights.cumsum(0)
    bounds = torch.rand(draws, dtype=torch.float64, generator=generator) * sums[-1]
    # A product that rounds up to the total would be past the last weight. The first sum above a bound is above the sum
    # before it, so its weight is not zero.
    return torch.searchsorted(sums, torch.minimum(bounds, sums[-1].nextafter(sums.new_zeros(()))), right=True)


def _kept(drawn: torch.Tensor, weights: torch.Tensor, generator: torch.Generator) -> list[int]:
    """The indices of the vectors that a round keeps of ``drawn (m, d)``, given their squared distances before it."""
    between = torch.cdist(drawn, drawn, compute_mode="donot_use_mm_for_euclid_dist").square_()
    bounds = (torch.rand(len(drawn), dtype=torch.float64, generator=generator) * weights).tolist()
    kept, left = [], weights
    for place, bound in enumerate(bounds):
        if bound < float(left[place]):
            kept.append(place)
            left = torch.minimum(left, between[place])
    return kept


def sampled(count: int, num_codes: int, rows: int, seed: int) -> torch.Tensor:
    """Indices, out of ``count``, of the vectors that k-means is fitted to: at most ``rows`` per code, and 50,000."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: min(rows * num_codes, _SAMPLE)]


def _means(x: torch.Tensor, chosen: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The means of all clusters; an empty cluster keeps its centroid in ``before``."""
    counts = chosen.bincount(minlength=len(before)).to(x.dtype).unsqueeze(1)
    sums = torch.zeros_like(before).index_add(0, chosen, x)
    return torch.where(counts > 0, sums / counts.clamp(min=1), before)


def kmeans(x: torch.Tensor, num_codes: int, *, steps: int = 20, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Centroids ``(K, d)`` and clusters ``(n,)`` of ``x (n, d)`` by Lloyd's algorithm from k-means++."""
    _check_clusters(x, num_codes, steps, seed)
    centroids = _spread(x, num_codes, seed)
    chosen = nearest(x, centroids)
    for _ in range(steps):
        centroids = _means(x, chosen, centroids)
        before, chosen = chosen, nearest(x, centroids)
        if torch.equal(before, chosen):
            break
    return centroids, chosen


def balanced_kmeans(
    x: torch.Tensor, num_codes: int, *, steps: int = 20, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`kmeans`, with clusters of equal size: ``⌈n/K⌉`` vectors, or one less in the last ones if K does not
    divide n.

    Clusters choose in turn: each takes the nearest vectors that no earlier cluster took. This repeats until no
    assignment changes.

    Source: Deng et al., "OneRec: Unifying Retrieve and Rank with Generative Recommender and Iterative Preference
    Alignment", 2025.

    Raises:
        TypeError: ``x`` is not a floating tensor, or a number is not an int.
        ValueError: ``x`` is not 2-D or has no vectors, or a number is too small.
    """
    _check_clusters(x, num_codes, steps, seed)
    centroids = _spread(x, num_codes, seed)
    n = len(x)
    sizes = [n // num_codes + (k < n % num_codes) for k in range(num_codes)]
    chosen = None
    for _ in range(steps):
        free = torch.ones(n, dtype=torch.bool, device=x.device)
        before, chosen = chosen, torch.empty(n, dtype=torch.int64, device=x.device)
        for k, size in enumerate(sizes):
            nearest_first = (x - centroids[k]).square().sum(-1).argsort(stable=True)
            taken = nearest_first[free[nearest_first]][:size]
            chosen[taken], free[taken] = k, False
            if size:
                centroids[k] = x[taken].mean(0)
        if before is not None and torch.equal(before, chosen):
            break
    return centroids, chosen


def unique_codes(codes: torch.Tensor) -> torch.Tensor:
    """Codes ``(n, L+1)`` from codes ``(n, L)``, with a last code that numbers vectors with equal codes, so that all
    differ.
    """
    check_index("codes", codes)
    check_shape("codes", codes, (None, None), "(n, L)")
    check_has_numbers("codes", codes)
    if not codes.numel():
        return torch.cat([codes, torch.arange(len(codes), device=codes.device, dtype=codes.dtype).unsqueeze(1)], 1)
    _, group = codes.unique(dim=0, return_inverse=True)
    order = group.argsort(stable=True)
    starts = torch.searchsorted(group[order], group[order])
    number = torch.empty_like(group)
    number[order] = torch.arange(len(codes), device=codes.device) - starts
    return torch.cat([codes, number.unsqueeze(1).to(codes.dtype)], 1)
