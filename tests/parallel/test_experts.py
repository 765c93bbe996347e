"""Experts divided among two and four processes, against one process with all of them."""

import re
from pathlib import Path

import processes
import pytest

SUPPORT = Path(__file__).resolve().parents[1] / "support"
SCRIPT, LOST = SUPPORT / "expert_parallel_cases.py", SUPPORT / "lost_rank_cases.py"
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


def test_a_rank_that_is_lost(tmp_path):
    """A rank that never calls is an error after the timeout of 2 s, and one that ended at once, not after 60."""
    waited = processes.run(LOST, 2, tmp_path)[0]
    assert set(waited) == {"late", "ended in a backward pass", "ended"}
    for what, seconds in waited.items():
        assert seconds is not None and seconds < 30, (what, seconds)
