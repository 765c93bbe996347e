"""Admission filters of dynamic embeddings: most ids of a stream occur once or twice and should not get a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from gossamer._checks import check_flag, check_number, check_positive, check_sizes
from gossamer._rounding import mix64, random_bits
from gossamer.ops import hash_table_state
from gossamer.ops.hash_table import HashTable

_SKETCH_MOST = 255
_SEED = 0x5BF0_3635


class Filter(Protocol):
    """Decides whether keys without a row get one; has its own state."""

    def judge(self, keys: torch.Tensor, counts: torch.Tensor, step: int) -> torch.Tensor:
        """``(n,)`` bool: which of the distinct ``keys (n,)``, with ``counts (n,)`` occurrences in a step, are
        admitted.
        """

    def note(self, keys: torch.Tensor, counts: torch.Tensor, admitted: torch.Tensor) -> None:
        """Record these occurrences, and that admitted keys now have a row."""

    def state(self) -> dict[str, torch.Tensor]:
        """The state, as tensors."""

    def check(self, tensors: Mapping[str, torch.Tensor], what: str) -> None:
        """Raise ValueError unless ``tensors`` is a valid state."""

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load a state that was checked."""

    def merge(self, parts: Sequence[Mapping[str, torch.Tensor]], keep: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Merge what several filters of this kind store about the keys that ``keep`` selects, as far as it can be
        separated.
        """


@dataclass(frozen=True)
class FrequencyAdmission:
    """Give a key a row once it has occurred ``threshold`` times, including occurrences within a batch.

    Counts are exact, in a table of ``capacity`` keys that evicts the least recently seen ones. With ``sketch`` they
    come from a count-min sketch (Cormode and Muthukrishnan, 2005) of 4 lines of ``capacity`` bytes, which needs no
    memory per key and never counts too low, but may count colliding keys together. Monolith (Liu et al., 2022) uses
    this filter.

    Args:
        threshold: occurrences; at most 255 with a sketch.
        capacity: number of keys that are counted exactly, or bytes per line of the sketch.
        sketch: whether to use the sketch.
    """

    threshold: int
    capacity: int = 1 << 20
    sketch: bool = False

    def __post_init__(self):
        """Check the numbers."""
        check_sizes(threshold=self.threshold)
        check_positive(capacity=self.capacity)
        check_flag("sketch", self.sketch)
        most = _SKETCH_MOST if self.sketch else 2**24
        if not 1 <= self.threshold <= most:
            raise ValueError(f"threshold must be in [1, {most}], got {self.threshold}")

    def build(self, device: torch.device, key_dtype: torch.dtype, seed: int) -> Filter:
        """The filter with its state."""
        if self.sketch:
            return _SketchFilter(self, device)
        return _CountFilter(self, device, key_dtype)


@dataclass(frozen=True)
class ProbabilisticAdmission:
    """Give a key a row with a fixed probability at each occurrence, without counting any.

    With ``p = 1 − 0.05^(1/threshold)`` a key is admitted at c occurrences with probability ``1 − (1−p)^c``: 95 % after
    ``threshold`` of them. The draw is a function of key, step and seed. Monolith (Liu et al., 2022) has this filter.

    Args:
        threshold: occurrences after which 95 % of keys have a row; at least 1.
    """

    threshold: float

    def __post_init__(self):
        """Check the number."""
        check_number("threshold", self.threshold, least=1)

    def build(self, device: torch.device, key_dtype: torch.dtype, seed: int) -> Filter:
        """The filter, which has no state."""
        return _ProbabilityFilter(self.threshold, seed)


class _CountFilter:
    def __init__(self, description: FrequencyAdmission, device: torch.device, key_dtype: torch.dtype) -> None:
        self.threshold = description.threshold
        self.seen = HashTable(1, description.capacity, key_dtype=key_dtype, device=device, evict="lru")

    def judge(self, keys: torch.Tensor, counts: torch.Tensor, step: int) -> torch.Tensor:
        return self.seen.find(keys)[0][:, 0] + counts >= self.threshold

    def note(self, keys: torch.Tensor, counts: torch.Tensor, admitted: torch.Tensor) -> None:
        self.seen.accum_or_assign(keys[~admitted], counts[~admitted, None].float())
        self.seen.erase(keys[admitted])

    def state(self) -> dict[str, torch.Tensor]:
        return hash_table_state.snapshot(self.seen)

    def check(self, tensors: Mapping[str, torch.Tensor], what: str) -> None:
        hash_table_state.check(self.seen, tensors, what)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        hash_table_state.restore(self.seen, tensors)

    def merge(self, parts: Sequence[Mapping[str, torch.Tensor]], keep: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.seen.clear()
        for part in parts:
            mine = keep(part["keys"])
            self.seen.import_(*(part[name][mine].to(self.seen.device) for name in ("keys", "values", "scores")))


class _SketchFilter:
    def __init__(self, description: FrequencyAdmission, device: torch.device) -> None:
        self.threshold = description.threshold
        self.lines = torch.zeros(4, description.capacity, dtype=torch.uint8, device=device)

    def _sums(self, keys: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The distinct cells of the keys, their counts after adding ``counts``, and the cells of each key."""
        width = self.lines.shape[1]
        lines = torch.arange(4, device=keys.device).unsqueeze(1)
        cells = mix64(keys.long() ^ mix64((lines + 1) * _SEED)).remainder(width) + lines * width
        touched, inverse = torch.unique(cells, return_inverse=True)
        sums = self.lines.view(-1)[touched].long().index_add(0, inverse.view(-1), counts.repeat(4))
        return touched, sums, inverse

    def judge(self, keys: torch.Tensor, counts: torch.Tensor, step: int) -> torch.Tensor:
        _, sums, inverse = self._sums(keys, counts)
        return sums[inverse].amin(0) >= self.threshold

    def note(self, keys: torch.Tensor, counts: torch.Tensor, admitted: torch.Tensor) -> None:
        touched, sums, _ = self._sums(keys, counts)
        self.lines.view(-1)[touched] = sums.clamp(max=_SKETCH_MOST).to(torch.uint8)

    def state(self) -> dict[str, torch.Tensor]:
        return {"lines": self.lines.clone()}

    def check(self, tensors: Mapping[str, torch.Tensor], what: str) -> None:
        hash_table_state.check_tensors(tensors, {"lines": (torch.uint8, tuple(self.lines.shape))}, what)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.lines.copy_(tensors["lines"])

    def merge(self, parts: Sequence[Mapping[str, torch.Tensor]], keep: Callable[[torch.Tensor], torch.Tensor]) -> None:
        # A cell does not record whose counts it holds, so counts of other filters cannot be separated.
        self.lines.zero_()


class _ProbabilityFilter:
    def __init__(self, threshold: float, seed: int) -> None:
        self.refusal, self.seed = 0.05 ** (1 / threshold), seed

    def judge(self, keys: torch.Tensor, counts: torch.Tensor, step: int) -> torch.Tensor:
        at = torch.tensor([step], device=keys.device)
        bits = random_bits(self.seed ^ _SEED, at, keys.long(), 1).squeeze(1)
        return bits.double() * 2.0**-32 < 1 - self.refusal ** counts.double()

    def note(self, keys: torch.Tensor, counts: torch.Tensor, admitted: torch.Tensor) -> None:
        pass

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def check(self, tensors: Mapping[str, torch.Tensor], what: str) -> None:
        pass

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        pass

    def merge(self, parts: Sequence[Mapping[str, torch.Tensor]], keep: Callable[[torch.Tensor], torch.Tensor]) -> None:
        pass
