"""Starts several processes of one module that form a process group on this machine, and waits for them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path


def run(module: str, arguments: Sequence[str], count: int, *, timeout: float) -> None:
    """Run ``python -m module arguments`` in ``count`` processes, with the environment that torchrun would give each.

    Raises:
        RuntimeError: a process failed, or not all ended within ``timeout`` seconds; the message holds the end of the
            output of the first of them. The others are killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{rank}.txt") for rank in range(count)]
        processes = []
        try:
            for rank, log in enumerate(logs):
                place = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with log.open("w") as stream:
                    command = [sys.executable, "-m", module, *arguments]
                    processes.append(
                        subprocess.Popen(command, env=os.environ | place, stdout=stream, stderr=subprocess.STDOUT)
                    )
            end = time.monotonic() + timeout
            while any(process.poll() is None for process in processes):
                failed = [rank for rank, process in enumerate(processes) if process.poll()]
                if failed or time.monotonic() > end:
                    break
                time.sleep(0.02)
            failed = [rank for rank, process in enumerate(processes) if process.poll() != 0]
            if failed:
                first = next((rank for rank in failed if processes[rank].poll()), failed[0])
                code = processes[first].poll()
                how = f"did not end within {timeout:g} s" if code is None else f"ended with {code}"
                raise RuntimeError(f"process {first} of {count} {how}: {logs[first].read_text()[-2000:].strip()}")
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
