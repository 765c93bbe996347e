"""Checks for layers with a step in their backward pass, under wrappers that replicate or shard a model."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
from torch import nn


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a shard, a ``DTensor``."""
    # Imported only for sharded models, because the import is slow.
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


# Whether torch.compile passes modules to functions that it evaluates while tracing; earlier releases do not.
EVALUATES_MODULES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


def evaluated_when_compiled(function: Callable) -> Callable:
    """Make compilers call a function of modules while tracing, and treat its result as a constant.

    Applies ``torch.compiler.assume_constant_result`` on first use, because that loads the compiler, which an import
    must not do. If the compiler does not support it, compiled code skips the function, as if it returned None.
    """
    if EVALUATES_MODULES:
        function._dynamo_marked_constant = True
        return function

    @functools.wraps(function)
    def outside(*modules: nn.Module) -> object:
        return None if torch.compiler.is_compiling() else function(*modules)

    return outside


def check_alone(layer: nn.Module) -> None:
    """Raise an error for a step in the backward pass of a replica, which would diverge from the other copies.

    ``DistributedDataParallel`` averages gradients, but such a step leaves none to average. A layer is exempt if the
    model lists its parameter, its buffers or the layer itself in ``_ddp_params_and_buffers_to_ignore``.

    Raises:
        ValueError: the layer is called in the forward pass of ``DistributedDataParallel`` over several processes.
    """
    if not (torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if problem := _drift(layer):
        raise ValueError(problem)


@evaluated_when_compiled
def _drift(layer: nn.Module) -> str:
    copies = nn.parallel.DistributedDataParallel._get_active_ddp_module()
    if copies is None or copies.process_group.size() == 1:
        return ""
    name = next((name for name, module in copies.module.named_modules() if module is layer), None)
    if name is None or any(each == name or each.startswith(name + ".") for each in copies.parameters_to_ignore):
        return ""
    return (
        f"optimizer must be None under DistributedDataParallel over {copies.process_group.size()} processes: "
        f"{name or type(layer).__name__} would step by the gradients of this process alone, and copies would drift "
        "apart. A table of this process alone is named in the model's _ddp_params_and_buffers_to_ignore"
    )
