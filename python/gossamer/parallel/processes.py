"""The end of a program that runs in several processes."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import torch.distributed as dist

from gossamer._checks import check_number

# Seconds between two observations. A thread that waits for the interpreter lock asks for it again every 5 ms, so it
# wakes at least once in between.
_INTERVAL = 0.01
_TASKS = Path("/proc/self/task")


def shutdown(timeout: float = 30.0) -> None:
    """End all process groups; call it last in a program of several processes, on every one of them.

    It waits for the other processes of the default group (``torch.distributed.barrier``), then until gloo's threads
    rest, and calls ``torch.distributed.destroy_process_group``.

    A thread of gloo holds the tensors of a collective for a moment after the result has arrived. If Python shuts down
    within that moment, the thread cannot release them, and the process is aborted with ``terminate called without an
    active exception``. ``destroy_process_group`` alone does not prevent this: a group that is still referred to, for
    example by ``DistributedDataParallel`` or a mesh, keeps its threads.

    Args:
        timeout: the most seconds to wait for gloo's threads, above 0; after that a warning is given. The wait for the
            other processes has the timeout of the process group.

    Raises:
        ValueError: ``timeout`` is not a number above 0.
        RuntimeError: no process group was started, or another process has ended.
    """
    check_number("timeout", timeout, above=0, finite=True)
    if not dist.is_initialized():
        raise RuntimeError("there is no process group to end: torch.distributed.init_process_group was not called")
    dist.barrier()
    if not _threads_rest(timeout):
        message = f"threads of gloo still work after {timeout:g} s, perhaps on a collective that nothing waited for"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    dist.destroy_process_group()


def _threads_rest(timeout: float) -> bool:
    """Whether all gloo threads of this process came to rest within ``timeout`` seconds."""
    if not _TASKS.is_dir():  # only Linux shows what threads do; elsewhere, give them time to finish
        time.sleep(10 * _INTERVAL)
        return True
    end = time.monotonic() + timeout
    before = None
    while (now := _sleeping_threads()) is None or now != before:
        if time.monotonic() > end:
            return False
        before = now
        time.sleep(_INTERVAL)  # releases the interpreter, which gloo's threads need to free a tensor
    return True


def _sleeping_threads() -> dict[str, str] | None:
    """How often each gloo thread has gone to sleep; None if any of them is awake."""
    found = {}
    for task in _TASKS.iterdir():
        try:
            if (task / "comm").read_text().strip() != "pt_gloo_runloop":
                continue
            status = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
        except (FileNotFoundError, ProcessLookupError):  # the thread has ended
            continue
        if not status["State"].strip().startswith("S"):
            return None
        found[task.name] = status["voluntary_ctxt_switches"].strip()
    return found
