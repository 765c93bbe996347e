"""The case of tests/parallel/test_dying_ranks.py: of four processes one after another dies, and the others go on.

The last process records the findings.
"""

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from dynamic_table_cases import content, everywhere
from table_checkpoint_cases import model, step, whole_state
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh

from gossamer.nn import EmbeddingFolder
from gossamer.parallel import ShardedEmbeddingFolder, load_checkpoint, save_checkpoint, shard_tables, shutdown

FOLDER, RANK = Path(sys.argv[1]), int(os.environ["RANK"])
PLAN = {"bag": "row", "rows": "table", "many": "row", "plain": "table", "dynamic": "row"}
TIMEOUT = 60


def meet(ranks):
    """Start again with the ranks that are left."""
    if dist.is_initialized():
        dist.destroy_process_group()
    where = {"init_method": f"file://{FOLDER}/meeting-of-{ranks}", "timeout": timedelta(seconds=TIMEOUT)}
    dist.init_process_group("gloo", rank=RANK, world_size=ranks, **where)
    tables = shard_tables(model(), init_device_mesh("cpu", (ranks,)), PLAN, gradients="sum")
    return tables, ShardedEmbeddingFolder(FOLDER / "folder", {"dynamic": tables["dynamic"]})


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def fails_in_time(call, *args):
    begin = time.monotonic()
    try:
        call(*args)
    except RuntimeError:
        assert time.monotonic() - begin < TIMEOUT + 10
        return
    raise AssertionError("a rank has died, and nobody was told")


def found_again(tables, folder, steps):
    """Check that both hold the state committed after this many steps."""
    expected = shard_tables(model(), tables["bag"].mesh, PLAN, gradients="sum")
    for number in range(steps):
        step(expected, number)
    state, wanted = whole_state(tables), whole_state(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
    rows = content(everywhere(expected["dynamic"].local))
    assert content(everywhere(tables["dynamic"].local)) == rows
    tables["dynamic"].erase(torch.tensor([key for key in rows if key != "removed"]))
    assert folder.load().info == {"steps": steps}
    assert content(everywhere(tables["dynamic"].local)) == rows


def main():
    torch.set_num_threads(1)
    tables, folder = meet(4)
    step(tables, 0)
    save_checkpoint({"tables": tables}, FOLDER / "all", info={"steps": 1})
    folder.save(info={"steps": 1})
    # The last rank dies before the others look up.
    if RANK == 3:
        die()
    fails_in_time(step, tables, 1)

    tables, folder = meet(3)
    assert load_checkpoint({"tables": tables}, FOLDER / "all") == {"steps": 1}
    found_again(tables, folder, 1)
    folder.save(info={"steps": 1})
    step(tables, 1)
    # The last rank dies while the second checkpoint is written.
    if RANK == 2:
        FileSystemWriter.write_data = die
    fails_in_time(save_checkpoint, {"tables": tables}, FOLDER / "all")

    tables, folder = meet(2)
    assert load_checkpoint({"tables": tables}, FOLDER / "all") == {"steps": 1}
    found_again(tables, folder, 1)
    folder.save(info={"steps": 1})
    step(tables, 1)
    save_checkpoint({"tables": tables}, FOLDER / "all", info={"steps": 2})
    folder.save(info={"steps": 2})
    step(tables, 2)
    # The last rank dies after it has written its part of a folder and before anyone commits the folder.
    if RANK == 1:
        write = EmbeddingFolder.save
        EmbeddingFolder.save = lambda *args: (write(*args), die())
    fails_in_time(folder.save, None, {"steps": 3})

    tables, folder = meet(1)
    assert load_checkpoint({"tables": tables}, FOLDER / "all") == {"steps": 2}
    found_again(tables, folder, 2)
    (FOLDER / "0.json").write_text(json.dumps({"steps": 2}))
    shutdown()


if __name__ == "__main__":
    main()
