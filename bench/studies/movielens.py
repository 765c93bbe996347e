"""MovieLens 100K as clicks: a rating of 4 or 5 is a click on the film."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch

from gossamer.bench.studies.clicks import Batch

HOW_TO_GET = (
    "MovieLens 100K is in the wheel of RecBole: 'pip download --no-deps recbole==1.2.1', 'unzip recbole-1.2.1-*.whl "
    '"recbole/dataset_example/ml-100k/*"\', and then --data recbole/dataset_example/ml-100k'
)
NAME = "ml-100k"
# The columns that each file must have, as written in its head: name and type.
COLUMNS = {
    "inter": ("user_id:token", "item_id:token", "rating:float"),
    "item": ("item_id:token", "class:token_seq"),
    "user": ("user_id:token", "zip_code:token"),
}
# Limits at several times the size of the real files.
MAX_BYTES, MAX_LINES = 32 << 20, 1_000_000
# Genres of an item per bag; an item with fewer repeats its own.
KINDS = 3
CLICK = 4.0
# One rating in five is kept for validation.
PARTS = 5


def read(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """The line number and the given columns of each line of a file with tabs and a header.

    Raises:
        ValueError: the file is missing, too large, not UTF-8, lacks a column, or has a line of another length.
    """
    if not path.is_file():
        raise ValueError(f"--data must hold {path.name}, got {path.parent} without it; {HOW_TO_GET}")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} must be at most {MAX_BYTES} bytes, got {size}")
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            head = next(lines, [])
            if missing := [name for name in columns if head.count(name) != 1]:
                raise ValueError(
                    f"{path} must have each of the columns {', '.join(columns)} once, got {head.count(missing[0])} "
                    f"of {missing[0]}"
                )
            places = [head.index(name) for name in columns]
            for number, line in enumerate(lines, 2):
                if number > MAX_LINES:
                    raise ValueError(f"{path} must have at most {MAX_LINES} lines")
                if len(line) != len(head):
                    raise ValueError(f"{path}, line {number}: must have {len(head)} columns, got {len(line)}")
                yield number, [line[place] for place in places]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} must be UTF-8: {error}") from None
        except csv.Error as error:
            raise ValueError(f"{path} must be lines of text with tabs: {error}") from None


def number(table: dict[str, int], token: str) -> int:
    """The row of a token; a token without a row gets a new one."""
    return table.setdefault(token, len(table))


class MovieLens:
    """The ratings in a folder. One in five is kept for validation, the same for all seeds.

    Fields are the user, the item, the user's postcode, and up to three kinds of the item.

    Args:
        folder: a folder with ``ml-100k.inter``, ``ml-100k.item`` and ``ml-100k.user``.

    Raises:
        ValueError: a file is missing or malformed; the message says where, and how to get the files.
    """

    partners: ClassVar[dict[str, str]] = {"user": "item", "item": "user", "zip": "item", "kinds": "item"}

    def __init__(self, folder: Path) -> None:
        items, users, kinds, zips = {}, {}, {}, {}
        item_kinds, user_zips = [], []
        path = folder / f"{NAME}.item"
        for line, (item, words) in read(path, COLUMNS["item"]):
            found = [number(kinds, word) for word in words.split()][:KINDS]
            if item in items or not found:
                raise ValueError(f"{path}, line {line}: must name a new item and its classes, got {item!r}, {words!r}")
            number(items, item)
            item_kinds.append([found[place % len(found)] for place in range(KINDS)])
        path = folder / f"{NAME}.user"
        for line, (user, code) in read(path, COLUMNS["user"]):
            if user in users:
                raise ValueError(f"{path}, line {line}: must name a new user, got {user!r} again")
            number(users, user)
            user_zips.append(number(zips, code))
        path = folder / f"{NAME}.inter"
        pairs, clicks = [], []
        for line, (user, item, rating) in read(path, COLUMNS["inter"]):
            if user not in users or item not in items:
                raise ValueError(f"{path}, line {line}: must name a known user and item, got {user!r} and {item!r}")
            try:
                stars = float(rating)
            except ValueError:
                stars = math.nan
            if not 1 <= stars <= 5:
                raise ValueError(f"{path}, line {line}: rating must be from 1 to 5, got {rating!r}")
            pairs.append((users[user], items[item]))
            clicks.append(float(stars >= CLICK))
        if len(pairs) < PARTS:
            raise ValueError(f"{path} must hold at least {PARTS} ratings, got {len(pairs)}")
        user, item = torch.tensor(pairs).unbind(1)
        ids = {"user": user.unsqueeze(1), "item": item.unsqueeze(1)}
        ids["zip"] = torch.tensor(user_zips)[user].unsqueeze(1)
        ids["kinds"] = torch.tensor(item_kinds)[item]
        self.rows = {"user": len(users), "item": len(items), "zip": len(zips), "kinds": len(kinds)}
        self._all = Batch(ids, torch.tensor(clicks))
        order = torch.randperm(len(clicks), generator=torch.Generator().manual_seed(0))
        kept = len(order) // PARTS
        self._kept, self._rest = order[:kept], order[kept:]

    def _batch(self, which: torch.Tensor) -> Batch:
        return Batch({name: ids[which] for name, ids in self._all.ids.items()}, self._all.clicks[which])

    def training(self, seed: int, steps: int, size: int) -> Iterator[Batch]:
        """Batches of the training ratings in an order that depends on the seed; repeated when all were seen."""
        draw = torch.Generator().manual_seed(seed + 1)
        left = self._rest[:0]
        for _ in range(steps):
            while len(left) < size:
                left = torch.cat([left, self._rest[torch.randperm(len(self._rest), generator=draw)]])
            chosen, left = left[:size], left[size:]
            yield self._batch(chosen)

    def validation(self, count: int, size: int) -> Iterator[Batch]:
        """The ratings kept for validation, at most ``count`` batches of them."""
        return (self._batch(which) for which in self._kept.split(size)[:count])

    def requests(self, count: int, size: int) -> Iterator[Batch]:
        """Random ratings, from training and validation."""
        draw = torch.Generator().manual_seed(0)
        everything = torch.cat([self._kept, self._rest])
        return (self._batch(everything[torch.randint(len(everything), (size,), generator=draw)]) for _ in range(count))
