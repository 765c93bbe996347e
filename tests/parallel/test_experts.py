"""Experts divided among two and four processes, against one process with all of them."""

import re
from pathlib import Path

import processes
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "expert_parallel_cases.py"
CASES = re.findall(r"^    (\w+),$", SCRIPT.read_text().partition("CASES = (")[2].partition(")")[0], re.MULTILINE)

pytestmark = processes.needs_gloo


@pytest.fixture(scope="module", params=[2, 4])
def results(request, tmp_path_factory):
    """What every process found, by case."""
    return processes.run(SCRIPT, request.param, tmp_path_factory.mktemp("experts"))


@pytest.mark.parametrize("case", CASES)
def test_in_processes(results, case):
    failures = [found[case] for found in results if found[case]]
    assert not failures, "\n".join(failures)
