"""An endless synthetic stream of impressions and clicks: ids are born, become popular, fade and never return.

A batch depends only on the seed and its step, so a trainer that starts again at a step sees the same events.

Each kind of id (users, items, tags) has a fixed number of places, whose popularity follows a power law. A place belongs
to one id for a lifetime, then to the next one; in between, events move gradually from the old id to the new one. The
probability of a click depends on hidden numbers, which are hashes of the impression's ids: how clickable the item is,
how keen the user is, and how well their tastes match. Only the ids reveal these numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

TASTES = 4  # components of a hidden taste
TAGS = 3  # tags of an item
HISTORY = 6  # most items in a user's history
FADE = 0.3  # fraction of its lifetime in which an id appears, and in which it fades
DENSE = ("position", "freshness", "hour_sin", "hour_cos", "speed", "noise")
FEATURES = ("user", "item", "tags", "history")
TRAINING, HELD_OUT = 0, 1


@dataclass(frozen=True)
class Population:
    """One kind of id.

    Attributes:
        salt: distinguishes its hashes from those of other kinds.
        places: ids alive at a time.
        exponent: s of the power law ``p ∝ rank^(−s)``; must not be 1.
        lifetime: median of the steps that an id lives.
    """

    salt: int
    places: int
    exponent: float
    lifetime: float


@dataclass(frozen=True)
class Events:
    """A batch of B impressions.

    Attributes:
        dense: ``(B, 6)`` float32, the :data:`DENSE` features.
        ids: for each of :data:`FEATURES`, ``(ids (L,) int64, offsets (B+1,) int64)``.
        clicks: ``(B,)`` float32, 0 or 1.
        truth: ``(B,)`` float64, the logits that the clicks were drawn from; for comparison only.
    """

    dense: torch.Tensor
    ids: dict[str, tuple[torch.Tensor, torch.Tensor]]
    clicks: torch.Tensor
    truth: torch.Tensor

    def share(self, rank: int, ranks: int) -> Events:
        """The part of the impressions for one of several processes that share the batch."""
        each = len(self.clicks) // ranks
        own = slice(rank * each, (rank + 1) * each)
        ids = {}
        for name, (values, offsets) in self.ids.items():
            ends = offsets[own.start : own.stop + 1]
            ids[name] = values[ends[0] : ends[-1]], ends - ends[0]
        return Events(self.dense[own], ids, self.clicks[own], self.truth[own])


def mix(values: np.ndarray, salt: int = 0) -> np.ndarray:
    """A hash of uint64: a salted step, then the finalizer of SplitMix64."""
    start = (0x9E3779B97F4A7C15 * (2 * salt + 1)) % 2**64
    h = values + np.uint64(start)
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def uniform(values: np.ndarray, salt: int) -> np.ndarray:
    """Hashed numbers in [0, 1)."""
    return (mix(values, salt) >> np.uint64(11)) * 2.0**-53


def normal(values: np.ndarray, salt: int) -> np.ndarray:
    """Hashed numbers of mean 0 and variance 1, approximately normal: sums of four uniform ones."""
    fields = mix(values, salt)[..., None] >> np.array([0, 16, 32, 48], np.uint64) & np.uint64(0xFFFF)
    return (fields.sum(-1, dtype=np.float64) - 2 * 65535) / (65536 / math.sqrt(3))


def tastes(ids: np.ndarray, salt: int) -> np.ndarray:
    """Hidden tastes of ids: ``(…, 4)``."""
    return np.stack([normal(ids, salt + part) for part in range(TASTES)], -1)


class ClickStream:
    """The stream of a seed; ``size`` scales the number of ids alive, ``pace`` how fast they come and go.

    Args:
        seed: seed of everything.
        batch: B, impressions per step.
        size: scale of the number of ids alive; 1 means 20 000 users, 8 000 items and 1 500 tags.
        pace: divisor of their lifetimes, which are 1 500, 250 and 1 000 steps at 1.
    """

    def __init__(self, seed: int, batch: int, size: float = 1.0, pace: float = 1.0) -> None:
        self.seed, self.batch = seed, batch

        def population(salt: int, places: int, exponent: float, lifetime: float) -> Population:
            return Population(1000 * (salt + 10 * seed), max(int(places * size), 1), exponent, lifetime / pace)

        self.users = population(1, 20_000, 0.7, 1500)
        self.items = population(2, 8_000, 0.8, 250)
        self.tags = population(3, 1_500, 0.6, 1000)

    def place(self, of: Population, chance: np.ndarray) -> np.ndarray:
        """Map uniform numbers in [0, 1) by the power law to places in [0, places), the most popular first."""
        gamma = 1 - of.exponent
        rank = (chance * ((of.places + 1) ** gamma - 1) + 1) ** (1 / gamma)
        return np.minimum(rank.astype(np.int64), of.places).astype(np.uint64) - np.uint64(1)

    def living(self, of: Population, place: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The ids (uint64) that hold places at given times, when they were born, and how much of their life is over."""
        lifetime = of.lifetime * np.exp(0.5 * normal(place, of.salt))
        age = time / lifetime + uniform(place, of.salt + 1)
        generation = np.floor(age)
        born = time - (age - generation) * lifetime
        successor = mix(place, of.salt + 2) + generation.astype(np.int64).astype(np.uint64)
        return mix(successor, of.salt + 3), born, age - generation

    def draw(self, of: Population, rng: np.random.Generator, step: int, shape: tuple[int, ...]):
        """Ids for the events of a step, as from :meth:`living`; near the end of a life, some events get the next id."""
        place = self.place(of, rng.random(shape))
        lifetime = of.lifetime * np.exp(0.5 * normal(place, of.salt))
        return self.living(of, place, step + FADE * lifetime * (rng.random(shape) - 0.5))

    def item_tags(self, items: np.ndarray, born: np.ndarray) -> np.ndarray:
        """The tags that items were born with: ``(B, 3)`` ids."""
        chance = np.stack([uniform(items, self.items.salt + 10 + j) for j in range(TAGS)], -1)
        return self.living(self.tags, self.place(self.tags, chance), born[:, None])[0]

    def histories(
        self, rng: np.random.Generator, step: int, user_tastes: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """0 to 6 items that each user liked: of two drawn by popularity, the one nearer to the user's taste."""
        pairs = self.draw(self.items, rng, step, (self.batch, HISTORY, 2))[0]
        liking = (tastes(pairs, self.items.salt + 20) * user_tastes[:, None, None]).sum(-1)
        better = np.take_along_axis(pairs, liking.argmax(-1)[..., None], -1)[..., 0]
        lengths = rng.integers(0, HISTORY + 1, self.batch)
        kept = better[np.arange(HISTORY) < lengths[:, None]]
        return as_ids(kept), torch.from_numpy(np.concatenate([[0], lengths.cumsum()]))

    def events(self, step: int, part: int = TRAINING) -> Events:
        """The batch of a step; with :data:`HELD_OUT`, one that shares ids and times with it, but no event."""
        rng = np.random.default_rng([self.seed, step, part])
        users = self.draw(self.users, rng, step, (self.batch,))[0]
        items, born, life = self.draw(self.items, rng, step, (self.batch,))
        tags = self.item_tags(items, born)
        user_tastes = tastes(users, self.users.salt + 20)
        own = tastes(items, self.items.salt + 20)
        item_tastes = (own + tastes(tags, self.tags.salt + 20).sum(1) / math.sqrt(TAGS)) / math.sqrt(2)
        histories = self.histories(rng, step, user_tastes)
        position = rng.integers(0, 10, self.batch)
        hour = 2 * math.pi * (step % 240) / 240 + 0.1 * rng.standard_normal(self.batch)
        speed, noise = rng.standard_normal((2, self.batch))
        truth = (
            -1.6
            + 1.3 * normal(items, self.items.salt + 30)
            + 1.0 * normal(users, self.users.salt + 30)
            + 0.6 * (user_tastes * item_tastes).sum(-1)
            - 0.1 * position
            - 0.5 * life
            + 0.3 * np.sin(hour)
            + 0.2 * np.abs(speed)
        )
        clicks = rng.random(self.batch) < 1 / (1 + np.exp(-truth))
        dense = np.stack([position / 4.5 - 1, 1 - 2 * life, np.sin(hour), np.cos(hour), speed, noise], -1)
        one = torch.arange(self.batch + 1)
        ids = {
            "user": (as_ids(users), one),
            "item": (as_ids(items), one),
            "tags": (as_ids(tags.reshape(-1)), TAGS * one),
            "history": histories,
        }
        return Events(
            torch.from_numpy(dense.astype(np.float32)), ids, torch.from_numpy(clicks).float(), torch.from_numpy(truth)
        )


def as_ids(ids: np.ndarray) -> torch.Tensor:
    """uint64 as the int64 of the same bits; any of them is a legal id."""
    return torch.from_numpy(np.ascontiguousarray(ids).view(np.int64))
