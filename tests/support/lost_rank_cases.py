"""The cases of two processes of tests/parallel/test_experts.py: the second leaves; the first gets errors in time."""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gossamer.nn import Experts
from gossamer.parallel import shard_experts

FOLDER, RANK = Path(sys.argv[1]), int(os.environ["RANK"])


def seconds_until_error(function):
    begin = time.perf_counter()
    try:
        function()
    except RuntimeError:
        return time.perf_counter() - begin
    return None


def main():
    torch.set_num_threads(1)
    meeting = {"init_method": f"file://{FOLDER}/meeting", "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", rank=RANK, world_size=2, **meeting)
    x, ids, weights = torch.ones(4, 8), torch.tensor([[0, 1]]).expand(4, 2), torch.ones(4, 2)
    hasty = DeviceMesh.from_group(dist.new_group([0, 1], timeout=timedelta(seconds=2)), "cpu")
    waiting, ended = (shard_experts(Experts(2, 8, 8), m) for m in (hasty, init_device_mesh("cpu", (2,))))
    for layer in (waiting, ended):
        # Both ranks are there.
        layer(x, ids, weights).sum().backward()
    y = ended(x, ids, weights)
    found = {}
    if RANK == 0:
        found["late"] = seconds_until_error(lambda: waiting(x, ids, weights))
        (FOLDER / "seen").touch()
        found["ended in a backward pass"] = seconds_until_error(lambda: y.sum().backward())
        found["ended"] = seconds_until_error(lambda: ended(x, ids, weights))
    else:
        # It does not call the layer, and ends silently once the other one has given up.
        while not (FOLDER / "seen").exists():
            time.sleep(0.05)
    (FOLDER / f"{RANK}.json").write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    main()
