"""Checkpoints of sharded tables by four processes: other numbers of ranks, other plans, followed folders."""

from pathlib import Path

import processes
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "table_checkpoint_cases.py"
CASES = processes.cases_of(SCRIPT)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every process found, by case."""
    pytest.importorskip("safetensors")
    return processes.run(SCRIPT, 4, tmp_path_factory.mktemp("table_checkpoints"))


@processes.needs_gloo
@pytest.mark.parametrize("case", CASES)
def test_in_processes(results, case):
    failures = [found[case] for found in results if found[case]]
    assert not failures, "\n".join(failures)
