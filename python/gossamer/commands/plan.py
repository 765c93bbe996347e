"""``gossamer plan``: the cost of layouts on many devices, before they are run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

plan = typer.Typer(
    help="Plan layouts of models and tables on many devices; measure the exchanges that plans rest on.",
    no_args_is_help=True,
)
MOST_DEVICES = 2**16


@plan.command()
def parallel(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A config.json of transformers, or a JSON description of tables.")
    ],
    gpus: Annotated[int, typer.Option(metavar="N", help="Devices in total.")],
    per_node: Annotated[
        int | None, typer.Option(metavar="M", help="Devices per node; by default all are on one.")
    ] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(metavar="INTRA[,INTER]", help="GB/s of a device in each direction: within a node, between nodes."),
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(metavar="INTRA[,INTER]", help="Microseconds of a message: within a node, between nodes."),
    ] = None,
    links: Annotated[
        str | None,
        typer.Option(
            metavar="FILE[,FILE]", help="Files of gossamer plan measure, in place of --bandwidth and --latency."
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="GiB of memory per device; by default that of a known --device."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="For a model: tokens per device in a step.")] = None,
    sequence: Annotated[
        int | None, typer.Option(help="For a model: tokens that attend to one another; by default --tokens.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="For tables: samples per device in a step.")] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:ISA]",
            help="Device whose measured rates count, such as H100; by default this machine's processor.",
        ),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of stored runs of gossamer bench --json; by default those of this package."
        ),
    ] = None,
    expert_rate: Annotated[float | None, typer.Option(help="TFLOP/s of expert layers.")] = None,
    dense_rate: Annotated[float | None, typer.Option(help="TFLOP/s of other products.")] = None,
    memory_rate: Annotated[float | None, typer.Option(help="GB/s of a copy in memory.")] = None,
    table_rate: Annotated[float | None, typer.Option(help="GB/s of rows looked up.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; by default bf16 for models and fp32 for tables.")
    ] = None,
    direction: Annotated[str, typer.Option(help="both, for a training step, or forward.")] = "both",
    optimizer: Annotated[
        str | None, typer.Option(help="adam, momentum or sgd; for tables rowwise_adagrad, sgd, adam, ...")
    ] = None,
    master: Annotated[bool, typer.Option("--master", help="Keep float32 copies of 16-bit weights.")] = False,
    checkpoint: Annotated[
        bool, typer.Option("--checkpoint", help="Recompute activations in the backward pass.")
    ] = False,
    imbalance: Annotated[float, typer.Option(help="Rows of the busiest device over the mean.")] = 1.0,
    top: Annotated[int, typer.Option(help="Layouts to show.")] = 8,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every layout and the growth to this file.")
    ] = None,
    plot_folder: Annotated[
        Path | None,
        typer.Option("--plot", metavar="DIR", help="Draw time and memory from 1 to 4096 devices into this folder."),
    ] = None,
) -> None:
    """Compare expert, tensor, data and table sharding on a cluster: time of a step and memory per device.

    Exit status: 0 on success; 1 if no layout fits the devices' memory; 2 if an argument is missing or wrong.
    """
    from gossamer.bench.harness import files, plan_report, report
    from gossamer.parallel.planning import rates as measured
    from gossamer.parallel.planning.files import read_object

    given = {
        measured.EXPERTS: expert_rate, measured.DENSE: dense_rate, measured.MEMORY: memory_rate,
        measured.TABLES: table_rate,
    }  # fmt: skip
    try:
        for option, value in (("--gpus", gpus), ("--per-node", per_node)):
            if value is not None and not 1 <= value <= MOST_DEVICES:
                raise ValueError(f"{option} must be from 1 to {MOST_DEVICES}, got {value}")
        if top < 1:
            raise ValueError(f"--top must be at least 1, got {top}")
        limit = memory
        if memory is None and device is not None:
            limit = measured.device_memory(device)
        cluster = _cluster(gpus, per_node, bandwidth, latency, links, limit)
        known = {name: value * measured.MEANING[name][2] for name, value in given.items() if value is not None}
        rates = measured.Rates(results or _stored_runs(), _device(device), known)
        values = read_object(config)
        if json_file is not None:
            files.check_file("--json", json_file)
        if plot_folder is not None:
            _need_matplotlib()
            files.check_folder("--plot", plot_folder)
        if "tables" in values:
            _refuse(
                "a description of tables",
                {
                    "--tokens": tokens, "--sequence": sequence, "--master": master or None,
                    "--checkpoint": checkpoint or None, "--imbalance": None if imbalance == 1.0 else imbalance,
                    "--expert-rate": expert_rate, "--dense-rate": dense_rate, "--memory-rate": memory_rate,
                },
            )  # fmt: skip
            record = plan_report.of_tables(
                str(config), values, cluster, rates,
                batch=_needed("--batch", batch, "a description of tables"), dtype=dtype or "fp32", direction=direction,
                optimizer=optimizer or "rowwise_adagrad",
            )  # fmt: skip
        else:
            _refuse("a model", {"--batch": batch, "--table-rate": table_rate})
            count = _needed("--tokens", tokens, "a model")
            record = plan_report.of_model(
                str(config), values, cluster, rates,
                tokens=count, sequence=sequence or count, dtype=dtype or "bf16", direction=direction,
                optimizer=optimizer or "adam", master=master, checkpoint=checkpoint, imbalance=imbalance,
            )  # fmt: skip
    except ValueError as error:
        print(f"gossamer plan: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    record["memory_source"] = "--memory" if memory is not None else "--device" if limit is not None else None
    if json_file is not None:
        files.write_json(record, json_file)
    if plot_folder is not None:
        from gossamer.bench.harness import plan_plot

        plan_plot.save(record, plot_folder)
    console = report.make_console()
    plan_report.print_plan(console, record, top)
    if not record["layouts"][0]["fits"]:
        raise typer.Exit(1)


def _cluster(
    gpus: int,
    per_node: int | None,
    bandwidth: str | None,
    latency: str | None,
    links: str | None,
    memory: float | None,
):
    from gossamer.parallel.planning.exchanges import Cluster, Link
    from gossamer.parallel.planning.measure import read_link

    if links is not None:
        if bandwidth is not None or latency is not None:
            raise ValueError("--links and --bandwidth or --latency exclude each other")
        paths = links.split(",")
        if len(paths) > 2:
            raise ValueError(f"--links takes one file or two between commas, got {links!r}")
        found = [read_link(Path(path)) for path in paths]
    else:
        for option, value in (("--bandwidth", bandwidth), ("--latency", latency)):
            if value is None:
                raise ValueError(f"{option} must be given, or --links with a file of gossamer plan measure")
        speeds, delays = _pair("--bandwidth", bandwidth), _pair("--latency", latency, zero=True)
        if len(speeds) != len(delays):
            raise ValueError(f"--bandwidth and --latency must have as many numbers, got {bandwidth!r} and {latency!r}")
        found = [Link(1e-6 * delay, 1e9 * speed) for speed, delay in zip(speeds, delays, strict=True)]
    size = per_node or gpus
    if gpus > size and len(found) < 2:
        raise ValueError(
            f"--bandwidth, --latency or --links must have a second value, between nodes, for --gpus {gpus} "
            f"and --per-node {size}"
        )
    if gpus > size and gpus % size:
        raise ValueError(f"--gpus must be a multiple of --per-node, got {gpus} and {size}")
    if memory is not None and not 0 < memory < float("inf"):
        raise ValueError(f"--memory must be finite and above 0, got {memory:g}")
    return Cluster(gpus, size, *found, memory=None if memory is None else memory * 2**30)


def _pair(option: str, text: str, zero: bool = False) -> list[float]:
    """Read one number, or two with a comma between them."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    least = "at least 0" if zero else "above 0"
    if not 1 <= len(numbers) <= 2 or not all((0 <= n if zero else 0 < n) and n < float("inf") for n in numbers):
        raise ValueError(f"{option} must be one number or two between commas, finite and {least}, got {text!r}")
    return numbers


def _needed(option: str, value: int | None, what: str) -> int:
    if value is None:
        raise ValueError(f"{option} must be given for {what}")
    return value


def _refuse(what: str, options: dict[str, object]) -> None:
    if others := [option for option, value in options.items() if value is not None]:
        raise ValueError(f"{', '.join(others)} must not be given with {what}")


def _device(name: str | None) -> str:
    """The device given, or this machine's processor with its instruction set."""
    if name is not None:
        if not name.partition(":")[0].strip():
            raise ValueError(f"--device must be part of a name, got {name!r}")
        return name
    from gossamer._environment import environment

    here = environment()
    return f"{here['cpu']}:{here['native_isa']}" if here["native_isa"] else here["cpu"]


def _stored_runs() -> Path:
    import gossamer.bench

    return Path(gossamer.bench.__file__).parent / "results"


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--plot needs matplotlib; pip install 'gossamer[bench]'") from None


@plan.command()
def measure(
    processes: Annotated[
        str, typer.Option(metavar="N[,N...]", help="Local gloo processes to start; ignored under torchrun.")
    ] = "2,4",
    seconds: Annotated[float, typer.Option(help="Approximate seconds for each number of processes.")] = 10.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads per process.")] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every sample to this file.")
    ] = None,
) -> None:
    """Fit latency and bandwidth to all-to-alls, and compare predicted with measured times of other exchanges.

    Under torchrun its processes are measured, over NCCL if each has a GPU, and the first one reports.
    """
    import os

    from gossamer._environment import environment
    from gossamer.bench.harness import exchange_report, files, report

    try:
        if not 0 < seconds < float("inf"):
            raise ValueError(f"--seconds must be finite and above 0, got {seconds:g}")
        counts = _counts(processes)
        if json_file is not None:
            files.check_file("--json", json_file)
        launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        runs = [_measure_here(seconds, threads)] if launched else [_start(n, seconds, threads) for n in counts]
    except (ValueError, RuntimeError) as error:
        print(f"gossamer plan: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if launched and os.environ["RANK"] != "0":
        return
    record = {"environment": environment(), "runs": runs}
    if json_file is not None:
        files.write_json(record, json_file)
    exchange_report.print_exchanges(report.make_console(), record)


def _counts(text: str) -> list[int]:
    numbers = text.split(",")
    if not all(n.strip().isdecimal() and 2 <= int(n) <= 64 for n in numbers):
        raise ValueError(f"--processes must be numbers from 2 to 64 between commas, got {text!r}")
    return [int(n) for n in numbers]


def _start(count: int, seconds: float, threads: int) -> dict:
    """Measure ``count`` local gloo processes."""
    import json
    import tempfile

    from gossamer.bench.harness import processes

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "found.json")
        arguments = [str(output), "--seconds", str(seconds), "--threads", str(threads)]
        processes.run("gossamer.parallel.planning.measure", arguments, count, timeout=60 + 10 * seconds)
        return json.loads(output.read_text())


def _measure_here(seconds: float, threads: int) -> dict:
    """Measure the process group that this process belongs to."""
    import os

    import torch
    import torch.distributed as dist

    from gossamer.parallel import shutdown
    from gossamer.parallel.planning.measure import measure

    cuda = torch.cuda.is_available() and torch.cuda.device_count() > int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.set_num_threads(threads)
    dist.init_process_group("nccl" if cuda else "gloo")
    measured = measure(seconds=seconds)
    shutdown()
    return measured
