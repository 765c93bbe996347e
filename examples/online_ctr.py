"""Learn clicks online with tables that have no vocabulary, stop at any moment, and serve from a second process.

    python examples/online_ctr.py --out runs/ctr                   # train; continues a stopped run
    python examples/online_ctr.py --out runs/ctr --with-server     # and start the process below beside it
    python examples/online_ctr.py --serve runs/ctr/dynamic         # follow a trainer's deltas, and score
    python examples/online_ctr.py --out runs/ctr --compare         # also fixed tables of as many bytes, ids modulo size
    torchrun --nproc-per-node 2 examples/online_ctr.py --out runs/ctr-2 --shard    # ids over two processes

A DLRM predicts the clicks of a synthetic stream, batch after batch, and learns from each batch after predicting it. Ids
are born and die (click_stream.py), so the tables are gossamer.nn.DynamicEmbedding: an id gets a row once it was seen a
few times, and loses it when it is no longer used. Nothing is downloaded. The default is one run of some 2 minutes on 2
CPU cores. With --shard, each process holds a part of the ids and trains on a part of every batch; a run can continue
with another number of processes than it was stopped with. It writes to the folder ``--out``:

- ``dynamic/`` (with ``--tables``, that name): checkpoints and deltas in a gossamer.nn.EmbeddingFolder. A trainer that
  was killed, even by SIGKILL, continues from there when it is started again, and ends with the same bits;
- ``auc.png``: AUC of every run over time, and of served predictions by age of the model;
- ``tables.png``: sizes of the tables, and the numbers of ids that came and went;
- ``metrics.json``: settings, results and curves.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from ctr_model import TABLES, Settings, Trainer, newest, open_folder
from ctr_server import Server
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gossamer.nn import EmbeddingFolder
from gossamer.parallel import ShardedEmbeddingFolder, shutdown

try:
    import safetensors  # noqa: F401
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text
except ImportError as error:
    sys.exit(f"this example needs {error.name}: pip install 'gossamer[bench,embedding]'")

SIZES = {
    "steps": (2500, 300), "batch": (2048, 1024), "dim": (16, 16), "capacity": (36_000, 9_000), "threshold": (3, 3),
    "expire-after": (50, 30), "delta-every": (25, 10), "checkpoint-every": (250, 50), "threads": (1, 1),
    "seed": (0, 0),
}  # fmt: skip
RATES = {"size": (1.0, 0.25), "pace": (1.0, 2.0), "lr": (5e-3, 5e-3), "embedding-lr": (0.4, 0.4)}
SERVED = "serving.json"
Folder = EmbeddingFolder | ShardedEmbeddingFolder


class CannotResume(ValueError):
    """The folder holds a run with other settings, or no checkpoint that can be read."""


def resume(trainer: Trainer, folder: Folder) -> bool:
    """Continue from the folder's checkpoint, if there is one."""
    try:
        manifest = newest(folder.path)
        if manifest is None:
            return False
        sharded = isinstance(folder, ShardedEmbeddingFolder)
        if (trainer.group is not None) != sharded or sharded == hasattr(manifest, "checkpoints"):
            raise CannotResume(f"{folder.path} holds a run with{'out' if trainer.ranks > 1 else ''} --shard")
        mine, theirs = asdict(trainer.settings), manifest.info.get("settings", {})
        for name in mine:
            if mine[name] != theirs.get(name):
                raise CannotResume(
                    f"{folder.path} holds a run with --{name.replace('_', '-')} {theirs.get(name)}, not {mine[name]}: "
                    "continue with that, or give another --out"
                )
        contents = folder.load()
    except ValueError as error:
        raise CannotResume(str(error)) from error
    trainer.take(contents.tensors, contents.info["step"])
    trainer.seconds = contents.info["seconds"]
    return True


def short(count: float) -> str:
    """A count in at most five characters."""
    return f"{count:.0f}" if count < 10_000 else f"{count / 1000:.0f}k"


class Display:
    """A bar and a line below it; without a terminal, an occasional line."""

    def __init__(self, console: Console) -> None:
        self.console, self.line = console, Text()
        columns = (TextColumn("{task.description:>10}"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console)

    @contextmanager
    def run(self, trainer: Trainer, steps: int):
        """Show a run; yield the function to call after each step."""
        bar = self.progress.add_task(trainer.settings.tables, total=steps, completed=trainer.step)
        started = time.perf_counter(), trainer.step

        def update() -> None:
            last, step = trainer.recent(50), trainer.step
            speed = trainer.settings.batch * (step - started[1]) / (time.perf_counter() - started[0])
            text = f"AUC {last['auc']:.4f}  loss {last['logloss']:.4f}"
            if trainer.dynamic:
                text += f"  {last['rows']:.0f} rows"
                text += "".join(f"  {short(last[name])} {name}" for name in ("expired", "rejected"))
            text += f"  {short(speed)} events/s"
            self.line.plain = text
            self.progress.update(bar, completed=step)
            if not self.console.is_terminal and step % max(steps // 10, 1) == 0:
                self.console.print(f"{trainer.settings.tables}, step {step}: {text}", soft_wrap=True)

        if self.console.is_terminal:
            with Live(Group(self.progress, self.line), console=self.console, refresh_per_second=5):
                yield update
        else:
            yield update
        self.progress.remove_task(bar)


def train(
    trainer: Trainer, folder: EmbeddingFolder | ShardedEmbeddingFolder, given: argparse.Namespace, display: Display
) -> None:
    """Train up to step ``given.steps``, and write deltas and checkpoints on the way."""
    facts = {"steps": given.steps, "delta_every": given.delta_every}

    def save() -> None:
        own = {"step": trainer.step, "settings": asdict(trainer.settings), "seconds": trainer.seconds}
        folder.save(trainer.tensors(), facts | own)

    if not resume(trainer, folder) or getattr(folder, "resharded", False):
        save()
    elif trainer.step < given.steps:
        display.console.print(f"{trainer.settings.tables}: goes on at step {trainer.step} of {folder.path}")
    if trainer.step >= given.steps:
        return
    with display.run(trainer, given.steps) as update:
        while trainer.step < given.steps:
            begin = time.perf_counter()
            trainer.train_step()
            last = trainer.step == given.steps
            if trainer.dynamic and (last or trainer.step % given.delta_every == 0):
                folder.export_delta(trainer.serving_tensors(), facts | {"step": trainer.step})
            trainer.seconds += time.perf_counter() - begin
            if last or trainer.step % given.checkpoint_every == 0:
                save()
            update()


@contextmanager
def server_beside(folder: Path, patience: float, console: Console):
    """Run a second process that serves from the folder while the block trains, and wait for it at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SERVED).unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(folder), "--patience", str(patience)]
    with open(folder.parent / "server.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield
        console.print("waiting for the server to apply the last delta")
        if process.wait(timeout=patience + 60):
            console.print(f"the server failed; see {folder.parent / 'server.log'}", style="red")
    except subprocess.TimeoutExpired:
        console.print(f"the server did not finish; see {folder.parent / 'server.log'}", style="red")
    finally:
        process.kill()
        process.wait()


def serve(path: Path, patience: float, console: Console) -> int:
    """Follow the folder of a trainer that runs or is about to start."""
    deadline = time.monotonic() + patience

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False)

    while newest(path) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    try:
        server = Server(path, say)
    except ValueError as error:
        console.print(str(error), style="red", soft_wrap=True)
        return 2
    server.answer()
    server.follow(patience)
    report = server.report()
    (path / SERVED).write_text(json.dumps(report) + "\n", encoding="utf-8")
    behind = report["median_seconds_behind"]
    say(
        f"{server.applied} deltas with {server.rows} rows applied, {server.refused} refused; a delta was served "
        + ("at once" if behind is None else f"{behind:.2f} s after it was written, in the median")
    )
    return 0


def parse_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, Settings | None]:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="DIR", help="folder for a new run, or of the run to continue")
    where.add_argument("--serve", type=Path, metavar="DIR", help="follow the trainer that writes to DIR")
    parser.add_argument("--tables", choices=TABLES, default="dynamic", help="default dynamic")
    parser.add_argument("--compare", action="store_true", help="one run with each kind of table, on the same stream")
    parser.add_argument("--with-server", action="store_true", help="start a process that serves the dynamic tables")
    plans = ("auto", "row", "table")
    text = "spread the tables over the processes of torchrun: auto (by bytes, the default), by rows or whole"
    parser.add_argument("--shard", choices=plans, nargs="?", const="auto", metavar="PLAN", help=text)
    parser.add_argument("--quick", action="store_true", help="a small run of about 20 s")
    parser.add_argument(
        "--patience", type=float, default=60.0, metavar="S", help="seconds that the server waits for the next delta"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    for names, kind, mark in ((SIZES, int, "N"), (RATES, float, "X")):
        for name, (default, quick) in names.items():
            text = f"default {default:g}, or {quick:g} with --quick"
            parser.add_argument(f"--{name}", type=kind, metavar=mark, help=text)
    given = parser.parse_args(arguments)
    for name, defaults in (SIZES | RATES).items():
        key = name.replace("-", "_")
        value = getattr(given, key)
        if value is None:
            value = defaults[given.quick]
        setattr(given, key, value)
        least = 0 if name == "seed" else 1
        if name in SIZES and value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
        if name in RATES and not 0 < value < math.inf:
            parser.error(f"--{name} must be above 0 and finite, got {value}")
    if not 0 <= given.patience < math.inf:
        parser.error(f"--patience must be at least 0 and finite, got {given.patience}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if given.device == "auto":
        given.device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.serve is not None:
        return given, None
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"--out must be a folder, got the file {given.out}")
    if given.with_server and given.tables == "hashing" and not given.compare:
        parser.error("--with-server needs dynamic tables: fixed ones have no deltas to follow")
    if given.shard is not None:
        ranks = int(os.environ.get("WORLD_SIZE", 0))
        if not ranks:
            parser.error("--shard needs the processes of torchrun --nproc-per-node N")
        if given.compare or given.tables == "hashing":
            parser.error("--shard needs dynamic tables, and no --compare")
        if given.batch % ranks:
            parser.error(f"--batch must be a multiple of the {ranks} processes, got {given.batch}")
    return given, Settings(**{name: getattr(given, name) for name in Settings.__dataclass_fields__})


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given, settings = parse_arguments(arguments)
    # One thread is as fast as two for such small steps, and leaves a core to the server.
    torch.set_num_threads(given.threads)
    if settings is None:
        return serve(given.serve, given.patience, Console())
    if given.shard is None:
        return run(given, settings, Console())
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if given.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # If a process ends, the others wait for it no longer than this.
    dist.init_process_group("nccl" if given.device == "cuda" else "gloo", timeout=timedelta(seconds=120))
    mesh = init_device_mesh(given.device, (ranks,), mesh_dim_names=("tables",))
    status = run(given, settings, Console(quiet=rank > 0), mesh)
    shutdown()
    return status


def run(given: argparse.Namespace, settings: Settings, console: Console, mesh: DeviceMesh | None = None) -> int:
    """Train and report; return the exit status."""
    # Imported late, so that a server or a run that is killed early does not wait for them.
    import ctr_report

    display, runs, served = Display(console), [], None
    for tables in TABLES if given.compare else (given.tables,):
        trainer = Trainer(replace(settings, tables=tables), mesh, given.shard)
        path = given.out / tables
        folder = open_folder(path, trainer.dynamic)
        serving = given.with_server and trainer.dynamic and not runs and trainer.rank == 0
        try:
            with server_beside(path, given.patience, console) if serving else nullcontext():
                train(trainer, folder, given, display)
        except CannotResume as error:
            console.print(str(error), style="red", soft_wrap=True)
            return 2
        if not runs and (path / SERVED).is_file():
            served = json.loads((path / SERVED).read_text(encoding="utf-8"))
        runs.append(trainer)
    if trainer.rank > 0:
        return 0
    tail = max(given.steps // 4, 1)
    ctr_report.plot_auc(runs, served, given.out / "auc.png")
    ctr_report.plot_tables(runs, given.out / "tables.png")
    ctr_report.write_metrics(runs, served, tail, given.out / "metrics.json")
    console.print(ctr_report.result_table(runs, tail))
    if trainer.ranks > 1:
        console.print(ctr_report.parts_table(trainer))
    if served:
        console.print(ctr_report.staleness_table(served))
    console.print(f"results in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
