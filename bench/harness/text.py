"""Formats numbers for tables, and makes tables."""

from __future__ import annotations

import rich.box
import rich.table


def named_table(*columns: str, least: int | None = None, most: int | None = None) -> rich.table.Table:
    """A table with names of at most a given width in its first column and numbers in the others.

    Long names are wrapped, so that a narrow terminal cuts no number.
    """
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(columns[0], overflow="fold", min_width=least, max_width=most)
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def digits(value: float) -> str:
    """The number with three significant digits and without an exponent."""
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:#.3g}" if value >= 1e-3 else f"{value:.4f}"
