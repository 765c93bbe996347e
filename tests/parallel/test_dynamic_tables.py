"""Sharded dynamic embeddings in two processes against one on the joined batch."""

from pathlib import Path

import processes
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "dynamic_table_cases.py"
CASES = processes.cases_of(SCRIPT)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every process found, by case."""
    return processes.run(SCRIPT, 2, tmp_path_factory.mktemp("dynamic_tables"))


@processes.needs_gloo
@pytest.mark.parametrize("case", CASES)
def test_in_processes(results, case):
    failures = [found[case] for found in results if found[case]]
    assert not failures, "\n".join(failures)
