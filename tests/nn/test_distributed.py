"""Layers in several processes: copied by DistributedDataParallel, sharded by fully_shard, and split by transformers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORLD = 2
SCRIPT = Path(__file__).resolve().parents[1] / "support" / "distributed_cases.py"
CASES = re.findall(r"^    (\w+),$", SCRIPT.read_text().partition("CASES = (")[2].partition(")")[0], re.MULTILINE)

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this torch has no gloo"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every process found, by case."""
    folder = tmp_path_factory.mktemp("distributed")
    processes = []
    for rank in range(WORLD):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "HF_HUB_OFFLINE": "1"}
        output = (folder / f"{rank}.txt").open("w")
        processes.append(
            subprocess.Popen(
                [sys.executable, SCRIPT, folder],
                env=os.environ | place | {"CUDA_VISIBLE_DEVICES": ""},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = "\n".join((folder / f"{rank}.txt").read_text()[-2000:] for rank in range(WORLD))
    assert codes == [0] * WORLD, said
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_in_two_processes(results, case):
    failures = [found[case] for found in results if found[case]]
    assert not failures, "\n".join(failures)
