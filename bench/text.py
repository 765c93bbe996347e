"""Numbers as words for tables."""

from __future__ import annotations


def digits(value: float) -> str:
    """Three significant digits, and no exponent."""
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:#.3g}" if value >= 1e-3 else f"{value:.4f}"
