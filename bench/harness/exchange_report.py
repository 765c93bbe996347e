"""Measured and predicted exchanges: the tables of ``gossamer plan measure``."""

from __future__ import annotations

import rich.console

from gossamer.bench.harness.markdown import markdown_table
from gossamer.bench.harness.report import say
from gossamer.bench.harness.text import digits, named_table

HEAD = ("exchange", "bytes", "measured ms", "20th to 80th", "predicted ms", "predicted / measured")


def size(nbytes: int) -> str:
    """Bytes in the largest unit that divides them."""
    for unit, name in ((2**20, "MiB"), (2**10, "KiB")):
        if nbytes % unit == 0:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} B"


def rows(run: dict) -> list[list[str]]:
    """A line for each exchange."""
    return [
        [
            sample["collective"] + (" *" if sample["fitted"] else ""),
            size(sample["nbytes"]),
            digits(1e3 * sample["seconds"]),
            f"{digits(1e3 * sample['p20'])} to {digits(1e3 * sample['p80'])}",
            digits(1e3 * sample["predicted"]),
            f"{sample['ratio']:.2f}",
        ]
        for sample in run["samples"]
    ]


def sentence(run: dict) -> str:
    """The fitted link, and how far predictions are from measurements."""
    link, held = run["link"], [s for s in run["samples"] if not s["fitted"]]
    same = [s["ratio"] for s in held if s["collective"].startswith("all-to-all")]
    others = [s["ratio"] for s in held if not s["collective"].startswith("all-to-all")]
    threads = f"{run['threads']} thread{'s' if run['threads'] > 1 else ''}"
    return (
        f"{run['processes']} processes, {run['backend']}, {threads} each: latency "
        f"{digits(1e6 * link['latency'])} us, bandwidth {digits(link['bandwidth'] / 1e9)} GB/s, fitted to the sizes "
        f"marked *. Predicted over measured: {min(same):.2f} to {max(same):.2f} for other all-to-alls, "
        f"{min(others):.2f} to {max(others):.2f} for the other collectives."
    )


def print_exchanges(console: rich.console.Console, record: dict) -> None:
    """A table and a sentence for each number of processes."""
    for run in record["runs"]:
        table = named_table(*HEAD, most=24)
        for line in rows(run):
            table.add_row(*line)
        console.print(table)
        say(console, sentence(run))


def markdown(record: dict) -> str:
    """The same for a document."""
    parts = []
    for run in record["runs"]:
        parts.append(markdown_table(HEAD, rows(run)) + "\n" + sentence(run) + "\n")
    return "\n".join(parts)
