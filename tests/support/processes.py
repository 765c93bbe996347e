"""Runs tests in several processes: each runs a script of cases, and failures are returned by case.

The script ends with ``processes.main(CASES)``; a test module has ``processes.cases_of(SCRIPT)`` and
``processes.run(SCRIPT, world, folder)``, or ``each, results = processes.fixtures(SCRIPT)``.
"""

import ast
import contextlib
import importlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gossamer.parallel import shutdown

needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")


def cases_of(script):
    """The names in the tuple ``CASES`` of a script, read from its text, since importing it needs a process group."""
    listed = script.read_text().partition("CASES = (")[2].partition(")")[0]
    return re.findall(r"^    (\w+),$", listed, re.MULTILINE)


def run(script, world, folder, timeout=300, killed=()):
    """The findings of every process by case: a failure, or an empty string. Ranks in ``killed`` return none."""
    return _run(script, {world: folder}, timeout, killed)[world]


def run_each(script, worlds, folder, timeout=600):
    """The findings of :func:`run` for several numbers of processes, which share the script's imports."""
    folders = {world: folder / str(world) for world in worlds}
    for place in folders.values():
        place.mkdir()
    return _run(script, folders, timeout)


def fixtures(script, worlds=(2, 4)):
    """The fixtures ``each`` and ``results`` of a test module: a script's findings in several numbers of processes."""

    @pytest.fixture(scope="module")
    def each(tmp_path_factory):
        """What every process found, by their number and by case."""
        return run_each(script, worlds, tmp_path_factory.mktemp(script.stem))

    @pytest.fixture(params=worlds)
    def results(request, each):
        """What every process found, by case."""
        return each[request.param]

    return each, results


def _run(script, folders, timeout, killed=()):
    place = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, script, *(f"{world}={folder}" for world, folder in folders.items())]
    parent = subprocess.Popen(
        command, env=os.environ | place, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        said = parent.communicate(timeout=timeout)[0]
    finally:
        # The parent and its children.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
    assert parent.returncode == 0, "the script's imports failed"
    codes, found = json.loads(said.splitlines()[-1]), {}
    for world, folder in folders.items():
        expected = [-signal.SIGKILL if rank in killed else 0 for rank in range(world)]
        written = "\n".join((folder / f"{rank}.txt").read_text()[-2000:] for rank in range(world))
        assert codes[str(world)] == expected, written
        left = [rank for rank in range(world) if rank not in killed]
        found[world] = [json.loads((folder / f"{rank}.json").read_text()) for rank in left]
    return found


def divide(script, folders):
    """Import what a script imports, then fork one process per rank: importing torch in each would take seconds.

    Each process runs the script, for one number of processes after another. The parent prints their exit codes.
    """
    for statement in ast.parse(script.read_text()).body:
        if isinstance(statement, ast.Import):
            for module in statement.names:
                importlib.import_module(module.name)
        elif isinstance(statement, ast.ImportFrom):
            importlib.import_module(statement.module)
    codes = {}
    for world, folder in folders.items():
        children = []
        for rank in range(world):
            if child := os.fork():
                children.append(child)
                continue
            os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (folder / f"{rank}.txt").open("w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            sys.argv = [str(script), str(folder)]
            runpy.run_path(str(script), run_name="__main__")
            return
        codes[world] = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(codes))


def main(cases, timeout=120):
    """Run all cases in this process, in the same order as the others, and record failures."""
    folder, rank, world = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    meeting = {"init_method": f"file://{folder}/meeting", "timeout": timedelta(seconds=timeout)}
    dist.init_process_group("gloo", rank=rank, world_size=world, **meeting)
    found = {}
    for case in cases:
        try:
            case()
            found[case.__name__] = ""
        except Exception:
            found[case.__name__] = f"rank {rank}: " + traceback.format_exc()
            # Written at once, so that it is seen even if the others wait for a collective that this process left out.
            print(case.__name__, found[case.__name__], flush=True)
        dist.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    shutdown()


def all_ranks_raise(kind, words, function, *args, **keywords):
    """Check that every rank raises this kind of error, with the same message, and that it contains these words."""
    try:
        function(*args, **keywords)
    except kind as error:
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, str(error))
        assert words in str(error), str(error)
        assert len(set(found)) == 1, found
        return
    raise AssertionError(f"{words!r} was not raised")


if __name__ == "__main__":
    given = (argument.partition("=") for argument in sys.argv[2:])
    divide(Path(sys.argv[1]), {int(world): Path(folder) for world, _, folder in given})
