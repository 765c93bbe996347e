"""Routing by token id."""

from __future__ import annotations

import heapq
import math
import random

import torch
import torch.nn.functional as F

from gossamer._checks import (
    check_has_numbers,
    check_index,
    check_positive,
    check_same_device,
    check_seed,
    check_shape,
    check_strided,
)
from gossamer._parameters import factory_of
from gossamer.nn.moe.routers.base import Router
from gossamer.nn.moe.routing import Routing, check_selection, given_experts


def checked_table(name: str, table: torch.Tensor, num_experts: int, symbol: str) -> torch.Tensor:
    """A copy of a table of experts by id, ``(N,)`` or ``(N, K)``, as ``(N, K)``."""
    check_index(name, table)
    if table.dim() not in (1, 2):
        raise ValueError(f"{name} must have shape ({symbol},) or ({symbol}, K), got {tuple(table.shape)}")
    table = table.detach().clone()
    table = table.unsqueeze(1) if table.dim() == 1 else table
    if table.shape[1] < 1:
        raise ValueError(f"{name} must have at least one column, got shape {tuple(table.shape)}")
    check_positive(num_experts=num_experts)
    if table.shape[1] > num_experts:
        raise ValueError(
            f"{name} must have at most num_experts = {num_experts} columns, got shape {tuple(table.shape)}"
        )
    if table.device.type != "meta" and table.numel() and not (0 <= int(table.min()) <= int(table.max()) < num_experts):
        raise ValueError(
            f"{name} must hold ids from 0 to num_experts - 1 = {num_experts - 1}, "
            f"got {int(table.min())} to {int(table.max())}"
        )
    return table


def check_ids(token_ids: torch.Tensor, low: int, high: int, symbol: str) -> None:
    """Ids must be from ``low`` to ``high - 1``, where they can be read."""
    check_index("token_ids", token_ids)
    if torch.compiler.is_compiling() or token_ids.device.type != "cpu" or not token_ids.numel():
        return
    least, most = (int(value) for value in token_ids.aminmax())
    if least < low or most >= high:
        raise IndexError(f"token_ids must be from {low} to {symbol} - 1 = {high - 1}, got {least} to {most}")


def frequency_table(frequencies: torch.Tensor, num_experts: int, top_k: int = 1, *, seed: int = 0) -> torch.Tensor:
    """Experts by token id, ``(V, K)`` int64, with balanced loads: ids in descending order of frequency each go to the K
    experts with the lowest load so far.

    Ties between ids and between experts are broken at random. Equal frequencies give each expert V·K/E ids, rounded up
    or down. No expert's load exceeds the mean by more than the frequency of one id.

    Args:
        frequencies: ``(V,)`` numbers of at least 0, such as counts of ids in a corpus.
        num_experts: E.
        top_k: K, at most E.
        seed: seed of the random order.

    Raises:
        TypeError: a size is not an int, or ``frequencies`` is not a tensor.
        ValueError: a size is out of range, or ``frequencies`` is not ``(V,)``, finite and at least 0.
    """
    check_shape("frequencies", frequencies, (None,), "(V,)")
    check_selection(num_experts, top_k)
    check_seed(seed)
    check_strided("frequencies", frequencies)
    check_has_numbers("frequencies", frequencies)
    values = frequencies.detach().double().cpu()
    if not bool(((values >= 0) & (values < math.inf)).all()):
        raise ValueError(
            f"frequencies must be finite and at least 0, got {float(values.min())} to {float(values.max())}"
        )
    generator = random.Random(seed)
    order = list(range(len(values)))
    generator.shuffle(order)
    values = values.tolist()
    order.sort(key=lambda i: -values[i])
    # More experts than slots stay without ids, whichever they are.
    slots = len(order) * top_k
    experts = range(num_experts) if num_experts <= slots else generator.sample(range(num_experts), slots)
    loads = [(0.0, generator.random(), expert) for expert in experts]
    heapq.heapify(loads)
    table = [[0] * top_k for _ in order]
    for i in order:
        taken = [heapq.heappop(loads) for _ in range(top_k)]
        for k, (load, _, expert) in enumerate(taken):
            table[i][k] = expert
            heapq.heappush(loads, (load + values[i], generator.random(), expert))
    return torch.tensor(table, dtype=torch.int64).reshape(len(values), top_k)


class HashRouter(Router):
    """Experts by token id, from a fixed table (hash layers, Roller et al., 2021); every slot weighs 1/K.

    :meth:`balanced` and :meth:`by_frequency` create the table.

    Args:
        table: ``(V,)`` or ``(V, K)`` int32 or int64, the experts of each of V token ids; saved with the state.
        num_experts: E.

    Raises:
        TypeError: ``table`` does not hold int32 or int64.
        ValueError: ``table`` has another rank, or ids outside ``0 ... E-1``, or K > E.
    """

    def __init__(self, table: torch.Tensor, num_experts: int) -> None:
        super().__init__()
        table = checked_table("table", table, num_experts, "V")
        self.num_experts = num_experts
        self.top_k = table.shape[1]
        self.register_buffer("table", table)

    @classmethod
    def balanced(cls, vocabulary: int, num_experts: int, top_k: int = 1, *, seed: int = 0) -> HashRouter:
        """With a random table in which every expert has V·K/E ids, rounded up or down; see :func:`frequency_table`."""
        check_positive(vocabulary=vocabulary)
        return cls.by_frequency(torch.ones(vocabulary), num_experts, top_k, seed=seed)

    @classmethod
    def by_frequency(cls, frequencies: torch.Tensor, num_experts: int, top_k: int = 1, *, seed: int = 0) -> HashRouter:
        """With a table that balances ``frequencies (V,)``; see :func:`frequency_table`."""
        return cls(frequency_table(frequencies, num_experts, top_k, seed=seed), num_experts)

    @classmethod
    def from_top_k(
        cls,
        hidden_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        vocabulary: int,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> HashRouter:
        """With a balanced table of ``vocabulary`` ids."""
        return cls.balanced(vocabulary, num_experts, top_k, seed=seed).to(factory_of(device, dtype)["device"])

    def forward(self, x: torch.Tensor | None = None, *, token_ids: torch.Tensor | None = None) -> Routing:
        """The routing of ``token_ids (...)``, each in ``0 ... V-1`` (checked on the CPU); T is their number.

        Args:
            x: hidden states, which are not read; or the token ids themselves, where ``token_ids`` is None.
            token_ids: int32 or int64.

        Raises:
            TypeError: no token ids are given, or they are not int32 or int64.
            IndexError: on the CPU, a token id outside ``0 ... V-1``.
        """
        if token_ids is None:
            if x is None or (isinstance(x, torch.Tensor) and x.is_floating_point()):
                raise TypeError("token_ids must be given to a router that goes by them, got None")
            token_ids = x
        check_index("token_ids", token_ids)
        check_same_device(table=self.table, token_ids=token_ids)
        check_ids(token_ids, 0, self.table.shape[0], "V")
        return given_experts(F.embedding(token_ids.reshape(-1), self.table), self.num_experts)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"vocabulary={self.table.shape[0]}, num_experts={self.num_experts}, top_k={self.top_k}"
