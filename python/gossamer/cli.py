"""The command ``gossamer``: ``bench`` measures, ``info`` describes this installation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

try:
    import rich  # noqa: F401, the tables need it
    import typer
except ImportError as error:
    raise SystemExit(f"gossamer: the command line needs {error.name}; pip install 'gossamer[bench]'") from None

app = typer.Typer(
    help="Sparse compute for PyTorch at the speed of dense.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions, devices and which backend serves each primitive, to paste into a bug report."""
    from gossamer._environment import environment, served_by

    found = environment() | {"primitives": served_by()}
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for key, value in found["versions"].items():
        print(f"{key}: {value or 'not installed'}")
    print(f"system: {found['system']}")
    print(f"cpu: {found['cpu']}, {found['cores']} cores, {found['threads']} threads")
    print(f"instructions: {' '.join(found['isa']) or 'unknown'}")
    for gpu in found["gpus"]:
        print(f"gpu: {gpu['name']}, capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.1f} GiB")
    print(f"cuda: torch built for {found['cuda'] or 'none'}, {len(found['gpus'])} devices")
    for device, primitives in found["primitives"].items():
        for primitive, backends in primitives.items():
            print(f"{primitive} on {device}: {backends['serves']}")
    for line in dict.fromkeys(
        f"{name} on {device}: no, {reason}"
        for device, primitives in found["primitives"].items()
        for backends in primitives.values()
        for name, reason in backends["unavailable"].items()
    ):
        print(line)


@app.command()
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


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
