"""A few hundred hostile calls; ``python tests/fuzz/fuzzer.py --cases N`` runs more."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import fuzzer
import torch


def test_hostile_calls_end_in_a_named_error_or_the_right_result():
    """No signal, no result that plain torch contradicts, no error without the name of an argument."""
    assert fuzzer.fuzz(0, 300) == []


def test_a_process_that_dies_is_a_finding():
    """And so is an error of the fuzzer itself; the cases after it run."""
    cases = {1: lambda: None, 2: os.abort, 3: lambda: {"kind": "wrong result"}, 4: lambda: 1 / 0, 5: lambda: None}
    died = {"kind": "died", "what": "signal 6"}, {"kind": "died", "what": "an error in the fuzzer itself"}
    wanted = [None, {"seed": 2, **died[0]}, {"kind": "wrong result"}, {"seed": 4, **died[1]}, None]
    assert list(fuzzer.isolated(lambda seed: cases[seed](), cases)) == wanted


def test_copies_keep_strides_and_share_no_memory():
    """Kernels see the strides that a case chose, and what one call writes the other does not see."""
    for given in (torch.arange(12.0).view(3, 4)[:, ::2], torch.ones(1, 4).expand(3, 4), torch.randn(4, 3).mT):
        again = fuzzer.copied(given)
        assert again.stride() == given.stride() and torch.equal(again, given)
        assert again.untyped_storage().data_ptr() != given.untyped_storage().data_ptr()


def test_differences_are_found():
    """Of shapes, dtypes, numbers and infinities."""
    ones = torch.ones(3)
    assert fuzzer.different(ones, ones) is None
    for other in (torch.ones(2), ones.double(), ones * 1.01, ones / 0, (ones, ones)):
        assert fuzzer.different(other, ones) is not None
    assert fuzzer.different(torch.tensor([1, 2]), torch.tensor([1, 3])) is not None


def test_a_result_that_rounding_errors_decide_is_no_finding():
    """The sign of a sum that cancels is one; the sum itself is not."""
    args = {"x": torch.tensor([0.1, 0.2, -0.3])}
    calls = {True: lambda x: (x + 1 - 1).sum().sign(), False: lambda x: x.sum() + 1}
    for unstable, call in calls.items():
        assert fuzzer.unstable(call, args, call(**args)) is unstable
