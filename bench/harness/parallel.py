"""Runs the benchmarks that need several processes, and shows their results."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import rich.console

from gossamer._environment import environment
from gossamer.bench.harness import processes
from gossamer.bench.harness.case import DIRECTIONS, DTYPES
from gossamer.bench.harness.markdown import markdown_table
from gossamer.bench.harness.report import say
from gossamer.bench.harness.text import digits, named_table

EXPERTS = "experts"
MODULES = {EXPERTS: "gossamer.bench.distributed.experts"}
# Tokens per process, hidden size, intermediate size, experts, and experts per token.
SYMBOLS = ("T", "H", "I", "E", "K")
SHAPES = {"cpu-small": (1024, 1024, 512, 32, 4), "cpu-fine": (1024, 512, 256, 64, 8)}
SECONDS = {True: 6.0, False: 15.0}
WORDS = {"forward": "forward", "both": "forward+backward"}
HEAD = ("ms", "20th to 80th", "over ours", "MiB sent", "collectives")


@dataclass(frozen=True)
class Request:
    """The choices for one run.

    Attributes:
        name: a key of :data:`MODULES`.
        shape: name of the shape, or its sizes.
        sizes: the size of each of :data:`SYMBOLS`.
        dtypes: keys of :data:`DTYPES`.
        directions: of :data:`DIRECTIONS`.
        processes: number of processes.
        seconds: approximate time to spend on each dtype.
    """

    name: str
    shape: str
    sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    directions: tuple[str, ...]
    processes: int
    seconds: float


def request(name: str | None, shape: str | None, dtype: str | None, direction: str, count: int, quick: bool) -> Request:
    """Check the choices.

    Raises:
        ValueError: a name, size or dtype is unknown, or transformers, which the run compares with, is missing.
    """
    if name not in MODULES:
        raise ValueError(f"parallel needs a name, one of {', '.join(MODULES)}, got {name!r}")
    shape = shape or "cpu-small"
    sizes = SHAPES.get(shape)
    if sizes is None:
        numbers = shape.split(",")
        if len(numbers) != len(SYMBOLS) or not all(n.strip().isdecimal() and int(n) > 0 for n in numbers):
            known, symbols = ", ".join(SHAPES), ",".join(SYMBOLS)
            raise ValueError(f"--shape must be one of {known}, or {symbols} as positive integers, got {shape!r}")
        sizes = tuple(map(int, numbers))
    if not 2 <= count <= 64:
        raise ValueError(f"--processes must be from 2 to 64, got {count}")
    experts, top_k = sizes[3:]
    if top_k > experts or experts % count:
        raise ValueError(f"--shape {shape}: E must be at least K and a multiple of {count} processes, got {experts}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if direction not in DIRECTIONS:
        raise ValueError(f"--direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("parallel experts needs transformers to compare with; pip install 'gossamer[transformers]'")
    dtypes = (dtype,) if dtype else ("fp32",) if quick else ("fp32", "bf16")
    directions = ("forward",) if direction == "forward" else ("forward", "both")
    return Request(name, shape, sizes, dtypes, directions, count, SECONDS[quick])


def run(wanted: Request, so_far: Callable[[dict], None] = lambda record: None) -> dict:
    """Start the processes for each dtype and return the record that is stored; ``so_far`` gets it after each dtype.

    Raises:
        RuntimeError: a process failed, for example because a variant is wrong.
    """
    runs: list[dict] = []
    record = {"parallel": wanted.name, "shape": wanted.shape, "environment": environment(), "runs": runs}
    for dtype in wanted.dtypes:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "found.json")
            arguments = [str(output), "--sizes", ",".join(map(str, wanted.sizes)), "--dtype", dtype]
            arguments += ["--directions", ",".join(wanted.directions), "--seconds", str(wanted.seconds)]
            processes.run(MODULES[wanted.name], arguments, wanted.processes, timeout=600)
            runs.append(json.loads(output.read_text()))
        so_far(record)
    return record


def rows(case: dict) -> list[list[str]]:
    """A line for each variant of a case; the first is ours."""
    return [
        [
            variant["name"],
            digits(1e3 * variant["median"]),
            f"{digits(1e3 * variant['p20'])} to {digits(1e3 * variant['p80'])}",
            f"{variant['ratio']:.2f}",
            digits(variant["sent_bytes"] / 2**20),
            str(variant["collectives"]),
        ]
        for variant in case["variants"]
    ]


def title(run: dict, case: dict) -> str:
    """One line that names a case."""
    sizes = " ".join(f"{symbol}={size}" for symbol, size in run["sizes"].items())
    return (
        f"{run['processes']} processes of {run['threads']} thread, {sizes}, {run['dtype']} {WORDS[case['direction']]}"
    )


def sentence(run: dict) -> str:
    """The bytes of one row for each pair of a token and another process."""
    size = digits(run["one_row_a_rank_bytes"] / 2**20)
    return (
        f"One row for each (token, other process) pair takes {size} MiB one way. Bytes are those of the process that "
        "sends most. Each variant was checked against float64 before it was timed."
    )


def print_record(console: rich.console.Console, record: dict) -> None:
    """A table for each case, and the sentence."""
    for run in record["runs"]:
        for case in run["cases"]:
            say(console, title(run, case))
            table = named_table("", *HEAD, most=40)
            for line in rows(case):
                table.add_row(*line)
            console.print(table)
        say(console, sentence(run))


def markdown(record: dict) -> str:
    """The same for a document."""
    parts = []
    for run in record["runs"]:
        for case in run["cases"]:
            parts.append(f"{title(run, case)}:\n\n{markdown_table(['', *HEAD], rows(case))}")
        parts.append(sentence(run) + "\n")
    return "\n".join(parts)
