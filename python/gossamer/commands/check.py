"""``gossamer check``: compares a layer with its replacement."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def check(
    module: Annotated[
        str, typer.Argument(help="package.module:attribute, or a model class, config or type of transformers.")
    ],
    replacement: Annotated[
        str | None,
        typer.Option(help="package.module:attribute; by default gossamer.replace is applied to a copy of MODULE."),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="A random input, such as 4,128,512:bf16 or 2,32:int64:1000; repeatable."),
    ] = None,
    inputs_file: Annotated[
        Path | None,
        typer.Option("--inputs", help="A safetensors file of inputs: 0, 1, ... are positional, others go by name."),
    ] = None,
    config: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of a transformers config, KEY=VALUE; repeatable.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; by default the module's own.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    direction: Annotated[str, typer.Option(help="both, or forward.")] = "both",
    train: Annotated[
        bool, typer.Option("--train", help="Leave dropout on; by default modules are in eval mode.")
    ] = False,
    speed: Annotated[bool, typer.Option(help="Whether to time the replacement if it is right.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
) -> None:
    """Check a layer's replacement against it: errors by float64, gradients, determinism, and speed if all is right."""
    from gossamer.bench.harness import check as checking
    from gossamer.bench.harness import check_target, report, runner
    from gossamer.bench.harness.case import DIRECTIONS, DTYPES
    from gossamer.bench.harness.profile import check_writable
    from gossamer.bench.harness.timing import keep_freed_memory

    try:
        where = runner.resolve_device(device)
        keep_freed_memory(where)
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if direction not in DIRECTIONS:
            raise ValueError(f"--direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
        if json_file is not None:
            check_writable("--json", json_file)
        if inputs and inputs_file is not None:
            raise ValueError("--input and --inputs exclude each other")
        found = check_target.gather(
            module,
            replacement,
            inputs or (),
            inputs_file,
            config or (),
            None if dtype is None else DTYPES[dtype],
            where,
            train=train,
        )
    except ValueError as error:
        _fail(str(error))
    console = report.make_console()
    try:
        with report.Progress(console) as progress:
            result = checking.check(
                found.module,
                found.replacement,
                *found.inputs,
                kwargs=found.kwargs,
                backward=direction == "both",
                speed=speed,
                progress=progress,
            )
    except Exception as error:
        # The user's layers may raise anything, which is an answer and not a fault of this program.
        notes = "".join(f"{note}: " for note in getattr(error, "__notes__", ()))
        _fail(f"{notes}{type(error).__name__}: {error}")
    console.print(result, width=min(console.width, 100))
    if json_file is not None:
        json_file.write_text(json.dumps(result.to_json(), indent=1) + "\n")
    if not result.ok:
        raise typer.Exit(1)


def _fail(message: str) -> None:
    print(f"gossamer check: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(2) from None
