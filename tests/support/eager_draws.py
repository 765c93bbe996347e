"""Compares a function with a baseline by their errors against float64 truth, averaged over several draws."""

import torch

from gossamer.testing import MAX_EPS, MAX_FACTOR, RMS_EPS, RMS_FACTOR, errors

DRAWS = 8


def compare(actual, baseline, truth):
    """Apply the rule of gossamer.testing.assert_close to every result, with errors averaged over draws.

    The largest of a few rounding errors is a matter of chance for any implementation, so one draw proves little on
    small shapes.

    Args:
        actual: a function from the number of a draw to a dict of tensors.
        baseline: the same in plain torch, and the same dtype.
        truth: the same in float64.
    """
    sums = {}
    for draw in range(DRAWS):
        exact, ours, plain = truth(draw), actual(draw), baseline(draw)
        assert ours.keys() == plain.keys() == exact.keys()
        for name, value in ours.items():
            assert value.dtype == plain[name].dtype, name
            eps = torch.finfo(value.dtype).eps
            found = torch.tensor([errors(value, exact[name]), errors(plain[name], exact[name])]) / DRAWS
            # Rounding can flip a choice of experts, which is a different computation and would widen the bounds.
            assert found[1, 0] < 1000 * eps, f"the baseline of {name} is off by {float(found[1, 0]):.1e}"
            sums[name] = (sums[name][0] + found, eps) if name in sums else (found, eps)
    for name, (found, eps) in sums.items():
        (rms, worst), (base_rms, base_worst) = found.tolist()
        message = f"{name}: RMS {rms:.3e} against {base_rms:.3e}, maximum {worst:.3e} against {base_worst:.3e}"
        assert rms <= RMS_FACTOR * base_rms + RMS_EPS * eps, message
        assert worst <= MAX_FACTOR * base_worst + MAX_EPS * eps, message
