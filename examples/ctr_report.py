"""The report at the end of online_ctr.py: plots, a table, and the numbers as JSON."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path

import matplotlib
import torch
from ctr_model import MEASURES, Trainer
from rich.table import Table

import gossamer
from gossamer.bench.studies.text import smooth

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"dynamic": "#1f6f8b", "unfiltered": "#7a9a3a", "hashing": "#c2571a"}
NAMES = {
    "dynamic": "dynamic",
    "unfiltered": "dynamic, every id admitted, none expired",
    "hashing": "fixed, ids modulo rows",
}


def column(run: Trainer, name: str) -> list[float]:
    """A measure by step."""
    return [row[MEASURES.index(name)] for row in run.measured]


def finish(axes, path: Path, figure) -> None:
    """Apply the common style to a plot, and write its file."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_auc(runs: list[Trainer], served: dict | None, path: Path) -> None:
    """Plot the running AUC of every run, and beside it the AUC of served predictions by staleness."""
    stale = (served or {}).get("auc_by_events_of_staleness") or {}
    figure, axes = plt.subplots(
        1, 1 + bool(stale), squeeze=False, figsize=(10.5 if stale else 7.5, 4.6), width_ratios=[2, 1][: 1 + bool(stale)]
    )
    curve = axes[0, 0]
    ceiling = smooth(column(runs[0], "ceiling"), 0.98)
    curve.plot(range(1, len(ceiling) + 1), ceiling, color="0.5", linestyle=":", label="knowing the hidden numbers")
    for run in runs:
        values, name = smooth(column(run, "auc"), 0.98), run.settings.tables
        curve.plot(range(1, len(values) + 1), values, color=COLORS[name], label=f"{NAMES[name]}: {values[-1]:.3f}")
    curve.set(xlabel="step", ylabel="AUC, running mean", title="Clicks predicted before they are learned from")
    curve.legend(frameon=False, loc="lower right", fontsize=8)
    if stale:
        events, areas = [int(n) / 1000 for n in stale], list(stale.values())
        axes[0, 1].plot(events, areas, "o-", color=COLORS["dynamic"])
        axes[0, 1].set(xlabel="thousand events behind", ylabel="AUC of held-out events", title="Served model")
        axes[0, 1].margins(y=0.2)
    finish(axes[0], path, figure)


def plot_tables(runs: list[Trainer], path: Path) -> None:
    """Plot the rows of the dynamic tables, and the ids that came and went in each step."""
    runs = [run for run in runs if run.dynamic]
    events = ("inserted", "evicted", "expired", "rejected")
    figure, axes = plt.subplots(1, 1 + len(runs), squeeze=False, figsize=(4.2 * (1 + len(runs)), 4.2))
    for run in runs:
        rows, color = column(run, "rows"), COLORS[run.settings.tables]
        axes[0, 0].plot(range(1, len(rows) + 1), rows, color=color, label=run.settings.tables)
        axes[0, 0].axhline(sum(t.num_embeddings for t in run.dynamic.values()), color="0.6", linestyle=":", linewidth=1)
    axes[0, 0].set(xlabel="step", ylabel="rows in all tables", title="Table size (dotted: capacity)")
    axes[0, 0].set_ylim(0, None)
    axes[0, 0].legend(frameon=False, loc="lower right", fontsize=8)
    for axis, run in zip(axes[0, 1:], runs, strict=True):
        for name, color in zip(events, ("#1f6f8b", "#c2571a", "#7a9a3a", "0.45"), strict=True):
            total = torch.tensor([0.0, *column(run, name)], dtype=torch.float64)
            if total[-1] > 0:
                axis.plot(range(1, len(total)), smooth(total.diff().tolist(), 0.98), color=color, label=name)
        axis.set(xlabel="step", ylabel="ids a step", title=f"Coming and going: {run.settings.tables}", yscale="log")
        axis.legend(frameon=False, fontsize=8)
    finish(axes[0], path, figure)


def result_table(runs: list[Trainer], tail: int) -> Table:
    """AUC, log loss and memory of the runs over the last ``tail`` steps, between a lower and an upper reference."""
    table = Table(title=f"The last {tail * runs[0].settings.batch} events of {len(runs[0].measured)} steps")
    table.add_column("tables")
    for name in ("AUC", "log loss", "MB", "rows", "events/s"):
        table.add_column(name, justify="right")
    frame = runs[0].recent(tail)
    rate = torch.tensor(frame["clicks"], dtype=torch.float64)
    entropy = float(torch.special.entr(rate) + torch.special.entr(1 - rate))
    table.add_row("the click rate alone", "0.5000", f"{entropy:.4f}", "", "", "")
    for run in runs:
        last = run.recent(tail)
        rows = int(last["rows"]) if run.dynamic else sum(t.num_embeddings for t in run.model.tables.values())
        speed = f"{run.settings.batch * run.step / run.seconds:.0f}" if run.seconds else ""
        memory = f"{run.table_bytes / 1e6:.2f}"
        table.add_row(run.settings.tables, f"{last['auc']:.4f}", f"{last['logloss']:.4f}", memory, str(rows), speed)
    table.add_row("the hidden numbers", f"{frame['ceiling']:.4f}", "", "", "", "")
    return table


def parts_of_a_step(run: Trainer) -> dict[str, dict[str, float]]:
    """Mean milliseconds, bytes sent and collectives per step on the first process, by part of a step."""
    steps = max(run.step - run.started, 1)
    names = ("ms", "bytes", "collectives")
    scales = (1000 / steps, 1 / steps, 1 / steps)
    return {
        part: {name: amount * scale for name, amount, scale in zip(names, spent, scales, strict=True)}
        for part, spent in run.parts.items()
    }


def parts_table(run: Trainer) -> Table:
    """The cost of a step of several processes, by part."""
    table = Table(title=f"A step of process 0 of {run.ranks}")
    table.add_column("part")
    for name in ("ms", "bytes sent", "collectives"):
        table.add_column(name, justify="right")
    for part, spent in parts_of_a_step(run).items():
        table.add_row(part, f"{spent['ms']:.2f}", f"{spent['bytes']:.0f}", f"{spent['collectives']:.0f}")
    return table


def staleness_table(served: dict) -> Table:
    """The server's results, by how far it is behind."""
    table = Table(title=f"Served: {served['deltas_applied']} deltas, {served['deltas_refused']} refused")
    table.add_column("events behind", justify="right")
    table.add_column("AUC of held-out events", justify="right")
    for events, area in served["auc_by_events_of_staleness"].items():
        table.add_row(events, f"{area:.4f}")
    return table


def write_metrics(runs: list[Trainer], served: dict | None, tail: int, path: Path) -> None:
    """Settings, results and curves as JSON."""
    content = {
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "gossamer": gossamer.__version__},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "tail_steps": tail,
        "served": served,
        "runs": [
            {
                "settings": asdict(run.settings),
                "steps": run.step,
                "seconds": run.seconds,
                "processes": run.ranks,
                "parts_of_a_step": parts_of_a_step(run),
                "table_bytes": run.table_bytes,
                "tail": run.recent(tail),
                "by_step": {name: column(run, name) for name in MEASURES},
            }
            for run in runs
        ],
    }
    path.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
