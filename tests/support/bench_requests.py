"""Small requests to the benchmark harness."""

from __future__ import annotations

import torch

from gossamer.bench.harness.case import Request

SMALL = {"T": 24, "H": 16, "I": 8, "E": 6, "K": 2}
# Large enough that all orders of rounding have similar errors: 384 routing weights instead of 48.
LARGER = {"T": 192, "H": 64, "I": 32, "E": 6, "K": 2}


def small_request(device, direction="both", dtype="fp32", skew="uniform", sizes=SMALL) -> Request:
    return Request("small", sizes, dtype, torch.device(device), direction, skew)
