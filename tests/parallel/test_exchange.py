"""Rows exchanged by two and four processes: order, gradients, bytes, errors."""

from pathlib import Path

import processes
import pytest

from gossamer.parallel import RowExchange, count_traffic

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "exchange_cases.py"
CASES = processes.cases_of(SCRIPT)


each, results = processes.fixtures(SCRIPT)


@processes.needs_gloo
@pytest.mark.parametrize("case", CASES)
def test_in_processes(results, case):
    failures = [found[case] for found in results if found[case]]
    assert not failures, "\n".join(failures)


def test_needs_process_groups():
    with pytest.raises(RuntimeError, match="group must be a ProcessGroup before"):
        RowExchange.of([1], None)
    with pytest.raises(TypeError, match=r"group must be a .*ProcessGroup or None, got int"):
        RowExchange.static(1, 3)


def test_counters_are_apart():
    with count_traffic() as outer, count_traffic() as inner:
        pass
    assert outer is not inner
    assert (outer.collectives, outer.rows, outer.nbytes, str(outer)) == (0, 0, 0, "")
