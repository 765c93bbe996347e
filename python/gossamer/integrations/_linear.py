"""Which linear layers of a model gossamer's products support."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gossamer._checks import FLOAT_DTYPES
from gossamer.integrations.surgery import hooked

LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


def plain(tensor: torch.Tensor | None) -> bool:
    """Whether the tensor is None or readable by the kernels: a plain float tensor on a supported device."""
    return tensor is None or (
        not is_traceable_wrapper_subclass(tensor)
        and tensor.device.type in ("cpu", "cuda", "meta")
        and (tensor.dtype in FLOAT_DTYPES or (tensor.dtype == torch.float64 and tensor.device.type != "cuda"))
    )


def plain_linear(module: nn.Module) -> bool:
    """Whether calling the module computes the product with its weight and nothing else."""
    return type(module) in LINEAR and not hooked(module) and plain(module.weight) and plain(module.bias)
