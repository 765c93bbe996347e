"""Shared by small trainings: text of the standard library, windows of it, a learning rate, smoothed curves."""

from __future__ import annotations

import math
from pathlib import Path

import torch

VALIDATION_EVERY = 20  # each 20th file of the corpus is held out


def python_files(root: Path) -> list[Path]:
    """All ``*.py`` below ``root``, ordered by path, without installed packages."""
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    paths = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py"))
    return [root / p for p in paths if not skipped & set(p.split("/"))]


def as_bytes(parts: list[bytes]) -> torch.Tensor:
    """The parts concatenated, as uint8; a single zero if there are none."""
    return torch.frombuffer(bytearray(b"".join(parts) or b"\0"), dtype=torch.uint8)


def load_corpus(root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation bytes of all Python files below ``root``."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, path in enumerate(python_files(root)):
        parts[number % VALIDATION_EVERY == VALIDATION_EVERY - 1].append(path.read_bytes() + b"\n")
    return as_bytes(parts[0]), as_bytes(parts[1])


def smooth(values: list[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for the bias of its start; ``keep`` is the weight of earlier values."""
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(average / weight)
    return out


def windows(data: torch.Tensor, starts: torch.Tensor, sequence: int) -> torch.Tensor:
    """``(B, sequence + 1)`` bytes from the given starts."""
    return data[starts[:, None] + torch.arange(sequence + 1)].long()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine to a tenth of the peak."""
    warm = max(steps // 10, 1)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1))))
