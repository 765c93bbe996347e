"""The device and stream that CUDA kernels are launched on."""

from __future__ import annotations

import torch


def where(device: torch.device) -> tuple[int, int]:
    """Index of the device, and its current stream."""
    return device.index or 0, torch.cuda.current_stream(device).cuda_stream
