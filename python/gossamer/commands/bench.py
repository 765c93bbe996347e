"""``gossamer bench``: measures speed and memory against a dense layer, references and peers."""

from __future__ import annotations

import contextlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from gossamer.bench.harness.record import Results

WRONG, REFUSED, SLOW, INTERRUPTED = 1, 2, 3, 130


def bench(
    family: Annotated[
        str,
        typer.Argument(
            help="What to measure: a family such as moe, expert_mlp, grouped_matmul, gather_reduce or dispatch; "
            "decode, a whole model; study NAME, a comparison of methods; parallel NAME, a layer on several processes."
        ),
    ] = "moe",
    study: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="After study: routers, expert_compression, embedding_budget, movielens_budget, decode. "
            "After parallel: experts.",
        ),
    ] = None,
    shape: Annotated[str | None, typer.Option(help="A named shape, or its sizes, such as T,H,I,E,K.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One shape, one to two minutes on two cores.")] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="fp32, bf16 or fp16; by default fp32 and bf16, unless torch is too slow in one."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    direction: Annotated[str, typer.Option(help="both, or forward.")] = "both",
    skew: Annotated[
        str, typer.Option(help="Distribution of ids: uniform, zipf or one; for experts also trained.")
    ] = "uniform",
    peers: Annotated[str, typer.Option(help="all that are installed, none, or names between commas.")] = "all",
    sweep: Annotated[
        str | None, typer.Option(metavar="DIM[=V1,V2,...]", help="Vary one size, such as tokens, or skew.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every sample to this file.")
    ] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write one line per variant to this file.")
    ] = None,
    plot_folder: Annotated[
        Path | None, typer.Option("--plot", metavar="DIR", help="Write figures into this folder.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a self-contained report to this file.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Show changes since a run stored by --json.")
    ] = None,
    fail_below: Annotated[
        float | None, typer.Option(metavar="RATIO", help="Exit with 3 if a case runs below RATIO x the dense speed.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="For study: number of seeds per case.")] = None,
    cases: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="For study: run only these cases and the baseline.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="For study movielens_budget: folder of the ratings.")
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="For studies of budgets: shares of the dense bytes; the first decides."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="For parallel: number of local gloo processes; 2 by default.")
    ] = None,
) -> None:
    """Measure against a dense layer of equal FLOPs, references and peers, after checking each against float64.

    Exit status: 0 on success; 1 if a variant is wrong or ours failed; 2 if the request cannot be met (found before
    anything is measured) or nothing could be measured; 3 if a case's speed over dense's is below --fail-below, or the
    case was left out; 130 if it was interrupted.
    """
    from gossamer.bench.harness import compare as compare_
    from gossamer.bench.harness import files, report, runner
    from gossamer.bench.harness import sweep as sweep_

    if family == "decode" and study is None:
        family, study = "study", "decode"
    if family == "study":
        given = {
            "--shape": shape, "--dtype": dtype, "--sweep": sweep, "--csv": csv_file, "--html": html_file,
            "--compare": compare, "--fail-below": fail_below,
        }  # fmt: skip
        others = [option for option, value in given.items() if value is not None]
        if processes is not None:
            others.append("--processes")
        return _study(study, quick, seeds, cases, budgets, data, json_file, plot_folder, others)
    if family == "parallel":
        given = {
            "--sweep": sweep, "--csv": csv_file, "--plot": plot_folder, "--html": html_file, "--compare": compare,
            "--fail-below": fail_below, "--seeds": seeds, "--cases": cases, "--budgets": budgets, "--data": data,
        }  # fmt: skip
        others = [option for option, value in given.items() if value is not None]
        return _parallel(study, shape, quick, dtype, direction, processes, json_file, others)
    try:
        given = {"a second name": study, "--seeds": seeds, "--cases": cases, "--budgets": budgets, "--data": data}
        for option, value in given.items():
            if value is not None:
                raise ValueError(f"{option} is for studies, as in gossamer bench study routers")
        if processes is not None:
            raise ValueError("--processes is for several processes, as in gossamer bench parallel experts")
        if fail_below is not None and not fail_below > 0:
            raise ValueError(f"--fail-below must be above 0, got {fail_below:g}")
        if (plot_folder or html_file) is not None:
            _need_matplotlib("--plot" if plot_folder else "--html")
        chosen = runner.family(family)
        where = runner.resolve_device(device)
        options = dict(dtype=dtype, direction=direction, skew=skew, peers=peers)
        quick_shape = chosen.quick[where.type] if sweep and shape is None else shape
        wanted = runner.requests(chosen, where, shape=quick_shape, quick=quick, **options)
        varied = sweep_.parse(chosen, sweep, wanted[0]) if sweep is not None else None
        earlier = compare_.load(compare) if compare is not None else None
        for option, path in (("--json", json_file), ("--csv", csv_file), ("--html", html_file)):
            if path is not None:
                files.check_file(option, path)
        if plot_folder is not None:
            files.check_folder("--plot", plot_folder)
    except ValueError as error:
        print(f"gossamer bench: {error}", file=sys.stderr)
        raise typer.Exit(REFUSED) from None
    console = report.make_console()

    def keep(found: Results) -> None:
        # If it cannot be written, the end of the run says so.
        with contextlib.suppress(OSError):
            if json_file is not None:
                files.write_json(found.as_json(), json_file)

    effort = "quick" if quick else "full"
    with report.Progress(console) as progress:
        results = runner.run(
            chosen,
            sweep_.expand(varied, wanted) if varied else wanted,
            budget=runner.BUDGET[effort],
            patience=runner.PATIENCE[effort] if dtype is None else math.inf,
            stage=progress.stage,
            progress=progress,
            finished=lambda result, ceilings: report.print_case(console, result, ceilings),
            so_far=keep,
            sweep=varied and vars(varied),
        )
    record = results.as_json()
    # Files first, since the terminal may be gone.
    try:
        if json_file is not None:
            files.write_json(record, json_file)
        if csv_file is not None:
            files.write_csv(record, csv_file)
    except OSError as error:
        print(f"gossamer bench: {error.filename or json_file or csv_file}: {error.strerror or error}", file=sys.stderr)
        raise typer.Exit(REFUSED) from None
    if varied:
        report.print_sweep(console, record)
    changes, differences = None, []
    if earlier is not None:
        changes, differences = compare_.changes(earlier, record), compare_.differences(earlier, record)
        report.print_changes(console, changes, differences, str(compare))
    sentence = report.summary(results)
    if plot_folder is not None:
        from gossamer.bench.harness import plot

        plot.save(record, plot_folder)
    if html_file is not None:
        from gossamer.bench.harness import page

        text = page.render(record, sentence, changes=changes, differences=differences, earlier=str(compare))
        html_file.write_text(text, encoding="utf-8")
    report.say(console, sentence)
    _exit(console, results, fail_below)


def _study(
    name: str | None,
    quick: bool,
    seeds: int | None,
    cases: str | None,
    budgets: str | None,
    data: Path | None,
    json_file: Path | None,
    plot_folder: Path | None,
    others: list[str],
) -> None:
    """Run a study; the exit status is as for :func:`bench`."""
    from gossamer.bench.harness import files, report, study_report
    from gossamer.bench.harness import study as studies

    try:
        if others:
            raise ValueError(f"{', '.join(others)} must not be given with a study")
        if name is None:
            raise ValueError(f"study needs a name, one of {', '.join(studies.names())}")
        chosen = studies.study(name)
        studies.check_seeds(seeds)
        wanted = studies.chosen_cases(chosen, cases.split(",") if cases is not None else None)
        effort = "quick" if quick else "full"
        chosen = studies.at_budgets(chosen, effort, budgets)
        settings = studies.loaded(chosen, effort, data)
        if json_file is not None:
            files.check_file("--json", json_file)
        if plot_folder is not None:
            _need_matplotlib("--plot")
            files.check_folder("--plot", plot_folder)
    except ValueError as error:
        print(f"gossamer bench: {error}", file=sys.stderr)
        raise typer.Exit(REFUSED) from None
    console = report.make_console()

    def keep(found: dict) -> None:
        if json_file is not None:
            files.write_json(found, json_file)

    with study_report.Bar(console) as bar:
        record = studies.run(chosen, wanted, effort=effort, seeds=seeds, settings=settings, report=bar, so_far=keep)
    keep(record)
    if plot_folder is not None:
        from gossamer.bench.harness import study_plot

        study_plot.save(record, plot_folder)
    study_report.print_study(console, record)
    if record["interrupted"]:
        raise typer.Exit(INTERRUPTED)
    if not record["cases"]:
        raise typer.Exit(REFUSED)


def _parallel(
    name: str | None,
    shape: str | None,
    quick: bool,
    dtype: str | None,
    direction: str,
    processes: int | None,
    json_file: Path | None,
    others: list[str],
) -> None:
    """Measure several processes; the exit status is as for :func:`bench`."""
    from gossamer.bench.harness import files, parallel, report

    try:
        if others:
            raise ValueError(f"{', '.join(others)} must not be given with parallel")
        request = parallel.request(name, shape, dtype, direction, 2 if processes is None else processes, quick)
        if json_file is not None:
            files.check_file("--json", json_file)
    except ValueError as error:
        print(f"gossamer bench: {error}", file=sys.stderr)
        raise typer.Exit(REFUSED) from None

    def keep(found: dict) -> None:
        if json_file is not None:
            files.write_json(found, json_file)

    try:
        record = parallel.run(request, keep)
    except RuntimeError as error:
        print(f"gossamer bench: {error}", file=sys.stderr)
        raise typer.Exit(WRONG) from None
    parallel.print_record(report.make_console(), record)


def _need_matplotlib(option: str) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(f"{option} needs matplotlib; pip install 'gossamer[bench]'") from None


def _exit(console: Console, results: Results, fail_below: float | None) -> None:
    from gossamer.bench.harness import compare, report

    if results.interrupted:
        raise typer.Exit(INTERRUPTED)
    if not results.correct:
        raise typer.Exit(WRONG)
    if not results.cases and fail_below is None:
        raise typer.Exit(REFUSED)
    slow = compare.too_slow(results, fail_below) if fail_below is not None else []
    for line in slow:
        report.say(console, f"below --fail-below {fail_below:g}: {line}")
    if slow:
        raise typer.Exit(SLOW)
