"""The picture of a plan: time of a step and memory of a device against the number of devices."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from gossamer.bench.harness.plot import OTHERS, OURS_COLOR, style

GIB = 2**30


def draw(record: dict) -> Figure:
    """A line for each strategy; hollow points do not fit the devices' memory."""
    growth = record["growth"]
    strategies = list(dict.fromkeys(point["strategy"] for point in growth))
    colors = dict(zip(strategies, (OURS_COLOR, *OTHERS), strict=False))
    with style():
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        times, sizes = figure.subplots(1, 2)
        for name in strategies:
            points = [point for point in growth if point["strategy"] == name]
            for axis, key, scale in ((times, "step_seconds", 1e3), (sizes, "memory_bytes", 1 / GIB)):
                x, y = [p["devices"] for p in points], [scale * p[key] for p in points]
                axis.plot(x, y, color=colors[name], linewidth=1.4, label=name)
                for p, at, value in zip(points, x, y, strict=True):
                    face = colors[name] if p["fits"] else "none"
                    axis.plot(at, value, "o", color=colors[name], markerfacecolor=face, markersize=5)
        if (limit := record["cluster"]["memory"]) is not None:
            sizes.axhline(limit / GIB, color="#8b949e", linestyle=":", linewidth=1.2)
        for axis, label in ((times, "ms a step"), (sizes, "GiB a device")):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            for scale in (axis.xaxis, axis.yaxis):
                scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set(xlabel="devices, the same work on each", ylabel=label)
        times.legend()
        figure.suptitle(f"{subject(record)} on {record['device']}: the best layout of each kind; hollow: does not fit")
    return figure


def subject(record: dict) -> str:
    """The name of what is planned: that of its file, or of its folder if the file is called config.json."""
    path = Path(record["config"]).absolute()
    return path.parent.name if path.name == "config.json" else path.stem


def save(record: dict, folder: Path) -> Path:
    """Write the picture into a folder, named after the config."""
    path = folder / f"plan-{subject(record)}.svg"
    draw(record).savefig(path, metadata={"Date": None})
    return path
