"""Tables of documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], labels: int = 1) -> str:
    """A table whose first ``labels`` columns are text and the others numbers, aligned right."""
    rule = ["---"] * labels + ["--:"] * (len(head) - labels)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *rows))
