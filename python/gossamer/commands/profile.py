"""``gossamer profile``: shows where a layer's time and memory go."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def profile(
    layer: Annotated[str, typer.Argument(help="A family of gossamer bench, such as moe or grouped_matmul.")] = "moe",
    shape: Annotated[str | None, typer.Option(help="A named shape, or its sizes, such as T,H,I,E,K.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; by default fp32 on the CPU, else bf16.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    direction: Annotated[str, typer.Option(help="both, or forward.")] = "both",
    skew: Annotated[str, typer.Option(help="Distribution of ids: uniform, zipf or one.")] = "uniform",
    against: Annotated[
        str | None, typer.Option(help="The variant to compare with, as gossamer bench names it.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a trace for Perfetto: .json or .json.gz.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the training step's memory: .png or .svg.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    ncu: Annotated[str | None, typer.Option(help="Print Nsight Compute's command line for this kernel.")] = None,
    calls: Annotated[
        int | None, typer.Option(min=1, help="Only run the layer this many times, for an outside profiler.")
    ] = None,
) -> None:
    """Break a layer down into kernels, beside a reference: time, bytes, FLOPs, and memory of a training step."""
    from gossamer.bench.harness import profile as profiling
    from gossamer.bench.harness import report, runner
    from gossamer.bench.harness.nsight import command_line
    from gossamer.bench.harness.timing import keep_freed_memory

    try:
        chosen = runner.family(layer)
        if ncu is not None:
            print(command_line(chosen, ncu, shape=shape, dtype=dtype, direction=direction, skew=skew))
            print("run it on a machine with an NVIDIA GPU and Nsight Compute; nothing was run here", file=sys.stderr)
            return
        where = runner.resolve_device(device)
        keep_freed_memory(where)
        for option, path, suffixes in (
            ("--trace", trace, (".json", ".gz")),
            ("--plot", plot, (".png", ".svg")),
            ("--json", json_file, ()),
        ):
            if path is not None:
                profiling.check_writable(option, path, suffixes)
        request = profiling.single_request(chosen, where, shape=shape, dtype=dtype, direction=direction, skew=skew)
        if plot is not None and request.direction == "forward":
            raise ValueError("--plot needs a training step, and this is a forward pass alone")
        console = report.make_console()
        with report.Progress(console) as progress:
            progress(f"preparing {chosen.name} {request.shape} {request.dtype}")
            case = chosen.build(request)
            subjects = profiling.case_subjects(case, against)
            if calls is not None:
                profiling.run_bare(subjects[0], where, calls)
                return
            result = profiling.run(case.title, subjects, where, trace=trace, progress=progress)
    except ValueError as error:
        print(f"gossamer profile: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    console.print(result, width=min(console.width, 100))
    if json_file is not None:
        json_file.write_text(json.dumps(result.to_json(), indent=1) + "\n")
    if plot is not None:
        from gossamer.bench.harness import profile_report

        profile_report.plot_memory(result, plot)
