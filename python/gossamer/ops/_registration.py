"""Registration of primitives with torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable

import torch


def register(schema: str, kernel: Callable, fake: Callable) -> Callable:
    """Define the operator ``gossamer::NAME(...)`` with one kernel for CPU and CUDA and its fake kernel.

    The kernel is registered below autograd with the dispatcher itself rather than through ``torch.library.custom_op``,
    whose per-call aliasing checks cost tens of microseconds.

    Args:
        schema: name and signature, such as ``"dispatch(Tensor expert_ids) -> Tensor"``.
        kernel: the implementation, tensors in and tensors out.
        fake: the shape-only implementation for meta and fake tensors.

    Returns:
        The operator's overload, ready to call.
    """
    name = schema.split("(", 1)[0]
    torch.library.define(f"gossamer::{name}", schema[len(name) :], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"gossamer::{name}", ("CPU", "CUDA"), kernel)
    torch.library.register_fake(f"gossamer::{name}", fake)
    return getattr(torch.ops.gossamer, name).default
