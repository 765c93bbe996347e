"""Layers in several processes: copied by DistributedDataParallel, sharded by fully_shard, and split by transformers."""

from pathlib import Path

import processes
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "distributed_cases.py"

pytestmark = processes.needs_gloo


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every process found, by case."""
    return processes.run(SCRIPT, 2, tmp_path_factory.mktemp("distributed"))


@pytest.mark.parametrize("case", processes.cases_of(SCRIPT))
def test_in_two_processes(results, case):
    failures = [found[case] for found in results if found[case]]
    assert not failures, "\n".join(failures)
