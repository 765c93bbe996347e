"""Writes the tables of measured numbers into documents, from the JSON files that the documents name.

A table stands between two comments; everything between them is replaced::

    <!-- measured: bench/results/FILE.json KIND -->
    <!-- end -->

``python -m gossamer.bench.harness.readme [--check] [DOCUMENT ...]`` rewrites them in a checkout, or with ``--check``
says which are out of date. ``KIND`` is ``layer``, milliseconds of the variants of one shape in a file of ``gossamer
bench --json``; ``sweep``, milliseconds and peak memory as one size grows; ``compressed``, compressed tables beside
plain torch and a dense table; ``kernels``, TFLOP/s of single kernels in the file of kernel variants; ``study``, the
table of a study and the notes needed to read it; ``budgets``, its cases at each budget; ``exchanges``, predicted and
measured exchanges; or ``parallel``, the results of several processes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from gossamer.bench.harness import exchange_report, parallel, study, study_points
from gossamer.bench.harness.markdown import markdown_table

DOCUMENTS = (
    "README.md",
    "docs/benchmarks.md",
    "docs/h100-kernels.md",
    "docs/choosing-a-router.md",
    "docs/compressed-embeddings.md",
    "docs/expert-layers-beyond-mlps.md",
    "docs/linear-attention.md",
    "docs/parallel.md",
    "docs/quantized-experts.md",
)
MARKED = re.compile(r"(<!-- measured: (\S+) (\S+) -->\n)(.*?)(<!-- end -->)", re.S)
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DIRECTIONS = {"forward": "forward", "both": "forward+backward"}
SHAPES = {"fine": "fine-grained", "olmoe": "OLMoE", "qwen3": "Qwen3-30B-A3B", "mixtral": "Mixtral"}
# Kernel -> its name in the table, and its multiply-adds divided by R·H·I.
KERNELS = {
    "up": ("up-projection, gathered, GLU, pre-activation stored", 2),
    "down": ("down-projection", 1),
    "dA": ("backward of down-projection and GLU, fused", 1),
    "dX": ("input gradient", 2),
    "dW2": ("down-projection weight gradient", 1),
    "dW1": ("up-projection weight gradient", 2),
}


def _table(head: list[str], rows: list[list[str]]) -> str:
    return markdown_table(head, rows, labels=len(head)).replace("| --- ", "|---").replace("--- |", "---|")


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 9.995 else f"{value:#.3g}"


def layer(results: dict) -> str:
    """Median milliseconds: one row per case, one column per variant that was timed in all of them."""
    cases = results["cases"]
    if len({(case["family"], case["shape"]) for case in cases}) != 1:
        raise ValueError("a layer's table is of one family at one shape")
    medians = [{v["name"]: v["median"] for v in case["variants"] if v["status"] == "ok"} for case in cases]
    names = [name for name in medians[0] if all(name in found for found in medians)]
    rows = [
        [f"{DTYPES[case['dtype']]} {DIRECTIONS[case['direction']]}", *(_digits(1e3 * found[name]) for name in names)]
        for case, found in zip(cases, medians, strict=True)
    ]
    return _table(["ms", *names], rows)


def sweep(results: dict) -> str:
    """Median milliseconds per direction, and peak MiB in the last one, of the variants of one dtype at each size."""
    swept, cases = results["sweep"], results["cases"]
    if len({case["dtype"] for case in cases}) != 1:
        raise ValueError("a sweep's table is of one dtype")
    directions = list(dict.fromkeys(case["direction"] for case in cases))
    found = {
        (case["sizes"][swept["symbol"]], case["direction"], v["name"]): v
        for case in cases
        for v in case["variants"]
        if v["status"] == "ok"
    }
    names = list(dict.fromkeys(name for *_, name in found))
    head = [f"{name}, {DIRECTIONS[each]}, ms" for each in directions for name in names]
    rows = [
        [
            f"{size:,}",
            *(_digits(1e3 * found[size, each, name]["median"]) for each in directions for name in names),
            *(_digits(found[size, directions[-1], name]["peak_bytes"] / 2**20) for name in names),
        ]
        for size in swept["values"]
    ]
    return _table([swept["dimension"], *head, *(f"{name}, MiB" for name in names)], rows)


def compressed(results: dict) -> str:
    """One row per compressed table: median milliseconds, speedup over plain torch, and ratio to a dense table."""
    columns, names = [], []
    for case in results["cases"]:
        medians = {v["name"]: v["median"] for v in case["variants"] if v["status"] == "ok"}
        names = [v["name"] for v in case["variants"] if v["role"] == "ours"]
        (dense,) = (medians[v["name"]] for v in case["variants"] if v["role"] == "dense")
        way = "forward" if case["direction"] == "forward" else "step"
        columns.append((f"{way}, ms", lambda name, m=medians: _digits(1e3 * m[name])))
        columns.append((f"{way}, times as fast", lambda name, m=medians: _digits(m[f"{name}, plain torch"] / m[name])))
        columns.append((f"{way}, ratio to dense", lambda name, m=medians, d=dense: f"{m[name] / d:.2f}"))
    return _table(["table", *(head for head, _ in columns)], [[n, *(cell(n) for _, cell in columns)] for n in names])


def kernels(results: dict) -> str:
    """TFLOP/s of the variant of each kernel that the results quote, from the better of its two medians."""
    head = ["TFLOP/s", *(SHAPES[shape] for shape in results["shapes_T_H_I_E_K"])]
    rows = []
    for kernel, quoted in results["quoted"].items():
        words, products = KERNELS[kernel]
        cells = []
        for shape, (t, h, i, _, k) in results["shapes_T_H_I_E_K"].items():
            run = next(run for run in results["runs"] if run["run"] == quoted[shape]["run"])
            milliseconds = min(run["ms"][shape][quoted[shape]["variant"]])
            cells.append(f"{2 * products * t * k * h * i / milliseconds / 1e9:.0f}")
        rows.append([words, *cells])
    return _table(head, rows)


KINDS: dict[str, Callable[[dict], str]] = {
    "layer": layer,
    "sweep": sweep,
    "compressed": compressed,
    "kernels": kernels,
    "study": study.markdown,
    "budgets": study_points.markdown,
    "exchanges": exchange_report.markdown,
    "parallel": parallel.markdown,
}


def rendered(text: str, root: Path) -> str:
    """``text`` with each marked table rebuilt from its file under ``root``.

    Raises:
        ValueError: an unknown kind, a marker without an end, or a file that holds no such results.
        OSError: a file is missing.
    """

    def replace(found: re.Match) -> str:
        opening, name, kind, _, closing = found.groups()
        if kind not in KINDS:
            raise ValueError(f"the kind of table must be one of {', '.join(KINDS)}, got {kind!r}")
        try:
            return opening + KINDS[kind](json.loads((root / name).read_text())) + closing
        except (KeyError, StopIteration) as error:
            raise ValueError(f"{name} holds no results of kind {kind}: {error!r}") from None

    if len(MARKED.findall(text)) != text.count("<!-- measured: "):
        raise ValueError("a marked table has no <!-- end -->, or no file and kind")
    return MARKED.sub(replace, text)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m gossamer.bench.harness.readme", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("documents", nargs="*", default=DOCUMENTS, help="from the checkout's root; default: all")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table is out of date")
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout; default: the current folder")
    chosen = parser.parse_args(arguments)
    stale = []
    for name in chosen.documents:
        path = chosen.root / name
        try:
            text = path.read_text()
            new = rendered(text, chosen.root)
            if new != text:
                stale.append(name)
                if not chosen.check:
                    path.write_text(new)
        except (OSError, ValueError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 2
    for name in stale:
        print(f"{name}: {'out of date' if chosen.check else 'written'}")
    return 1 if stale and chosen.check else 0


if __name__ == "__main__":
    sys.exit(main())
