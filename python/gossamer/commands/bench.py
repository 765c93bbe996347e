"""``gossamer bench``: measures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def bench(
    family: Annotated[str, typer.Argument(help="moe, expert_mlp, grouped_matmul, gather_reduce or dispatch.")] = "moe",
    shape: Annotated[str | None, typer.Option(help="A named shape, or its sizes, such as T,H,I,E,K.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One shape, about a minute on two cores.")] = False,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; fp32 and bf16 if not given.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    direction: Annotated[str, typer.Option(help="both, or forward.")] = "both",
    skew: Annotated[str, typer.Option(help="How ids are spread: uniform, zipf or one.")] = "uniform",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every sample to this file.")] = None,
) -> None:
    """Measure against a dense layer of as many FLOPs, references and peers, after checking each against float64."""
    from gossamer.bench import harness, report

    try:
        chosen = harness.family(family)
        where = harness.resolve_device(device)
        wanted = harness.requests(chosen, where, shape=shape, dtype=dtype, direction=direction, skew=skew, quick=quick)
    except ValueError as error:
        print(f"gossamer bench: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    console = report.make_console()
    with report.Progress(console) as progress:
        results = harness.run(
            chosen,
            wanted,
            budget=harness.BUDGET["quick" if quick else "full"],
            progress=progress,
            finished=lambda result, ceilings: report.print_case(console, result, ceilings),
        )
    report.print_summary(console, results)
    if json_file is not None:
        json_file.write_text(json.dumps(results.as_json(), indent=1) + "\n")
    if not results.correct:
        raise typer.Exit(1)
