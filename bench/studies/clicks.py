"""Clicks with a planted structure, and models that learn them: DLRM and DeepFM over any embedding layers."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from gossamer.nn import EmbeddingBag
from gossamer.optim import RowwiseAdagrad

TASTES = 4  # components of a hidden taste
GROUPS = 50  # groups of users, and of items, whose tastes are similar
TAGS, HISTORY = 3, 5  # tags of an item, and items in a user's history
FIELDS = ("user", "item", "tags", "history")


@dataclass(frozen=True)
class Population:
    """The numbers of ids.

    Attributes:
        users: rows of the table of users.
        items: rows of the tables of items and of items in histories.
        tags: rows of the table of tags.
        exponent: s of the power law ``p ∝ rank^(−s)`` by which users and items occur; must not be 1.
    """

    users: int
    items: int
    tags: int
    exponent: float = 0.8

    @property
    def rows(self) -> dict[str, int]:
        """Rows of the table of each field."""
        return {"user": self.users, "item": self.items, "tags": self.tags, "history": self.items}


@dataclass(frozen=True)
class Batch:
    """B impressions.

    Attributes:
        ids: ``(B, J)`` int64 for each field.
        clicks: ``(B,)`` float32, 0 or 1.
    """

    ids: dict[str, torch.Tensor]
    clicks: torch.Tensor


class Clicks:
    """Any number of impressions drawn from a seed.

    Users and items fall into groups; an id's taste is that of its group plus one of its own. A click is drawn with a
    probability that depends on the item, on the user, and on how well their tastes match. The tags of an item belong to
    its group, and a history holds items of the group that suits the user best.

    Args:
        population: the numbers of ids.
        seed: seed of everything.
    """

    def __init__(self, population: Population, seed: int) -> None:
        self.population = population
        self._seed = seed
        draw = torch.Generator().manual_seed(seed)
        centers = torch.randn(2, GROUPS, TASTES, generator=draw)
        self.groups, self.tastes, self.leanings = [], [], []
        for side, count in enumerate((population.users, population.items)):
            group = torch.randint(GROUPS, (count,), generator=draw)
            self.groups.append(group)
            self.tastes.append(0.8 * centers[side][group] + 0.6 * torch.randn(count, TASTES, generator=draw))
            self.leanings.append(torch.randn(count, generator=draw))
        # The id of each rank of popularity, in random order, so that neighbouring ids have nothing in common.
        self._by_rank = [torch.randperm(count, generator=draw) for count in (population.users, population.items)]
        self._favourite = (centers[0] @ centers[1].T).argmax(1)
        order = self.groups[1].argsort(stable=True)
        self._of_group = order, torch.searchsorted(self.groups[1][order], torch.arange(GROUPS + 1))

    def _popular(self, side: int, count: int, draw: torch.Generator) -> torch.Tensor:
        places, gamma = len(self._by_rank[side]), 1 - self.population.exponent
        chance = torch.rand(count, generator=draw, dtype=torch.float64)
        rank = (chance * ((places + 1) ** gamma - 1) + 1) ** (1 / gamma)
        return self._by_rank[side][rank.long().clamp(1, places) - 1]

    def batch(self, number: int, size: int) -> Batch:
        """The impressions of a batch, determined by its number and the seed."""
        draw = torch.Generator().manual_seed(hash((self._seed, number)) % 2**62)
        user, item = (self._popular(side, size, draw) for side in (0, 1))
        own = self.groups[1][item].unsqueeze(1) * 7 + torch.randint(14, (size, TAGS), generator=draw)
        order, starts = self._of_group
        favourite = self._favourite[self.groups[0][user]]
        first, last = starts[favourite].unsqueeze(1), starts[favourite + 1].unsqueeze(1)
        chance = torch.rand(size, HISTORY, generator=draw)
        history = order[(first + (chance * (last - first)).long()).clamp(max=len(order) - 1)]
        match = (self.tastes[0][user] * self.tastes[1][item]).sum(1)
        logits = -1.2 + 0.9 * self.leanings[1][item] + 0.6 * self.leanings[0][user] + 0.7 * match
        clicks = torch.rand(size, generator=draw) < logits.sigmoid()
        ids = {
            "user": user.unsqueeze(1),
            "item": item.unsqueeze(1),
            "tags": own % self.population.tags,
            "history": history,
        }
        return Batch(ids, clicks.float())

    def batches(self, first: int, count: int, size: int) -> Iterator[Batch]:
        """Some batches in order."""
        return (self.batch(number, size) for number in range(first, first + count))

    @property
    def rows(self) -> dict[str, int]:
        """Rows of the table of each field."""
        return self.population.rows

    @property
    def partners(self) -> dict[str, str]:
        """The field whose ids each field's ids are clustered by."""
        return {"user": "item", "item": "user", "tags": "item", "history": "user"}

    def training(self, seed: int, steps: int, size: int) -> Iterator[Batch]:
        """The impressions of a run; no two seeds share any."""
        return self.batches(seed * 10**7, steps, size)

    def validation(self, count: int, size: int) -> Iterator[Batch]:
        """Impressions that no run trains on, the same for all seeds."""
        return self.batches(-(10**6), count, size)

    def requests(self, count: int, size: int) -> Iterator[Batch]:
        """Impressions to time lookups with."""
        return self.batches(-2 * 10**6, count, size)


def tables(rows: dict[str, int], dim: int, lr: float) -> nn.ModuleDict:
    """One dense table per field, trained in the backward pass."""
    made = {}
    for name, count in rows.items():
        weight = torch.empty(count, dim).uniform_(-(count**-0.5), count**-0.5)
        made[name] = EmbeddingBag(count, dim, mode="mean", _weight=weight, optimizer=RowwiseAdagrad(lr=lr))
    return nn.ModuleDict(made)


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class DLRM(nn.Module):
    """Vectors of the fields and all products of two of them, through an MLP.

    Source: Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems", 2019.
    """

    def __init__(self, rows: dict[str, int], dim: int, lr: float) -> None:
        super().__init__()
        self.tables = tables(rows, dim, lr)
        fields = len(rows)
        self.top = mlp(fields * dim + fields * (fields - 1) // 2, 64, 1)
        self.pairs = torch.tril_indices(fields, fields, -1)

    def forward(self, ids: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits ``(B,)``."""
        vectors = torch.stack([self.tables[name](ids[name]) for name in self.tables], 1)
        products = torch.bmm(vectors, vectors.mT)[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([vectors.flatten(1), products], 1)).squeeze(1)


class DeepFM(nn.Module):
    """A factorisation machine and an MLP over the same vectors.

    Source: Guo et al., "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction", IJCAI 2017. The
    linear term is a function of the vectors instead of a number per id, so that tables hold everything known of an id.
    """

    def __init__(self, rows: dict[str, int], dim: int, lr: float) -> None:
        super().__init__()
        self.tables = tables(rows, dim, lr)
        self.linear, self.deep = nn.Linear(len(rows) * dim, 1), mlp(len(rows) * dim, 64, 1)

    def forward(self, ids: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits ``(B,)``."""
        vectors = torch.stack([self.tables[name](ids[name]) for name in self.tables], 1)
        pairs = (vectors.sum(1).square() - vectors.square().sum(1)).sum(1) / 2
        flat = vectors.flatten(1)
        return pairs + (self.linear(flat) + self.deep(flat)).squeeze(1)


MODELS = {"DLRM": DLRM, "DeepFM": DeepFM}


def auc(scores: torch.Tensor, clicks: torch.Tensor) -> float:
    """Area under the ROC curve: how often a clicked impression scores above an unclicked one; ties count half."""
    levels, place, counts = scores.double().unique(return_inverse=True, return_counts=True)
    clicked = torch.zeros_like(levels).index_add_(0, place, clicks.double())
    others = counts - clicked
    below = others.cumsum(0) - others
    pairs = clicked.sum() * others.sum()
    return float((clicked * (below + others / 2)).sum() / pairs) if pairs > 0 else math.nan


@functools.cache
def clicks(population: Population, seed: int) -> Clicks:
    """The impressions of a seed, made only once."""
    return Clicks(population, seed)
