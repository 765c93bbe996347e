"""The dropout mask of the low-rank operators, a pure function of the seed and of an element's row and column.

Philox4x32-10 (Salmon et al., 2011) with the seed's low and high half as key. The counter is ``(column // 4, 0, row mod
2³², row // 2³²)``; word ``column % 4`` of its result decides: the element is kept if the word is at least
``floor(p·2³²)``. Every kernel computes the same bits, whatever its tiles, so no mask is ever stored.
"""

from __future__ import annotations

import torch

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def threshold(dropout: float) -> int:
    """The threshold below which a random word drops its element."""
    return int(dropout * 2**32)


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of the product; int64 wraps around, which keeps all 64 bits."""
    product = b * a
    return (product >> 32) & WORD, product & WORD


def keep_mask(seed: torch.Tensor, rows: int, columns: int, dropout: float) -> torch.Tensor:
    """``(rows, columns)`` bool, on the device of ``seed (1,)`` int64: which elements dropout keeps."""
    device = seed.device
    groups = torch.arange((columns + 3) // 4, device=device)
    row = torch.arange(rows, device=device).unsqueeze(1)
    zero = torch.zeros(rows, groups.shape[0], dtype=torch.int64, device=device)
    c0, c1, c2, c3 = zero + groups, zero, zero + (row & WORD), zero + (row >> 32)
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    words = torch.stack([c0, c1, c2, c3], dim=2).flatten(1)[:, :columns]
    return words >= threshold(dropout)


def drop(x: torch.Tensor, dropout: float, seed: torch.Tensor | None) -> torch.Tensor:
    """``x (M, C)`` with dropped elements zero and the others divided by ``1 − dropout``."""
    if dropout == 0.0:
        return x
    keep = keep_mask(seed, *x.shape, dropout)
    return torch.where(keep, x * (1.0 / (1.0 - dropout)), torch.zeros((), dtype=x.dtype, device=x.device))
