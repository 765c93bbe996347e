"""Rules of precision that primitives and modules share."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of ``dtype`` numbers are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_dtype(num_rows: int) -> torch.dtype:
    """The integer dtype in which the indices of ``num_rows`` rows are stored."""
    return torch.int32 if num_rows < 2**31 else torch.int64
