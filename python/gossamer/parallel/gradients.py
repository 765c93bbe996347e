"""Gradients of values that several processes share, and the norm of gradients that are divided among processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from gossamer._checks import check_number, check_tensor


class _Share(torch.autograd.Function):
    """The local part of a stack; its gradient is summed over replicas and scaled."""

    @staticmethod
    def forward(ctx, part, scale, replicas):
        ctx.scale, ctx.replicas = scale, replicas
        return part.view_as(part)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        gradient = gradient * ctx.scale
        for group in ctx.replicas:
            gradient = gradient.contiguous()
            dist.all_reduce(gradient, group=group)
        return gradient, None, None


def share(part: torch.Tensor, scale: float, replicas: Sequence[dist.ProcessGroup]) -> torch.Tensor:
    """``part``, whose gradient is multiplied by ``scale`` and then summed over each group of replicas."""
    return _Share.apply(part, scale, replicas) if part.requires_grad and (scale != 1.0 or replicas) else part


class _Copied(torch.autograd.Function):
    """A value that all ranks of a group share; every rank contributes to its gradient."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Summed(torch.autograd.Function):
    """The sum over the ranks of a group, which all ranks then use in the same way."""

    @staticmethod
    def forward(ctx, part, group):
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient, None


def copied(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """A value that all ranks of a group share; its gradient is the sum of the gradients on all ranks."""
    return _Copied.apply(tensor, group)


def summed(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over the ranks of a group, which all ranks then use in the same way."""
    return _Summed.apply(part, group)


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[torch.Tensor] | torch.Tensor, max_norm: float) -> torch.Tensor:
    """``torch.nn.utils.clip_grad_norm_`` with the 2-norm, for parameters that include divided experts.

    The norm is over all gradients, counting each expert once: ``‖g‖² = ‖dense‖² + Σ_ranks ‖own experts‖²``. Dense
    gradients must be the same on every rank, as after ``DistributedDataParallel``. Not for FSDP2, which has its own.

    Args:
        parameters: of the model.
        max_norm: the maximum norm, to which larger norms are scaled down.

    Returns:
        The norm before, a scalar, the same on every rank.

    Raises:
        TypeError: ``parameters`` holds something else than tensors, or ``max_norm`` is not a number.
        ValueError: ``max_norm`` is negative.
    """
    if not isinstance(parameters, Iterable):
        raise TypeError(f"parameters must be a tensor or an iterable of tensors, got {type(parameters).__name__}")
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    for parameter in parameters:
        check_tensor("parameters", parameter)
    check_number("max_norm", max_norm, least=0)
    dense: list[torch.Tensor] = []
    divided: dict[tuple[DeviceMesh, tuple[int, ...]], list[torch.Tensor]] = {}
    for gradient in (parameter.grad for parameter in parameters):
        if isinstance(gradient, DTensor):
            axes = tuple(axis for axis, placement in enumerate(gradient.placements) if placement.is_shard())
            divided.setdefault((gradient.device_mesh, axes), []).append(gradient.to_local())
        elif gradient is not None:
            dense.append(gradient)
    every = [*dense, *(gradient for own in divided.values() for gradient in own)]
    if not every:
        return torch.zeros(())
    total = _squares(dense, every[0])
    for (mesh, axes), own in divided.items():
        squares = _squares(own, every[0])
        for axis in axes:
            dist.all_reduce(squares, group=mesh.get_group(axis))
        total = total + squares
    norm = total.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in every:
        gradient.mul_(factor.to(gradient.dtype))
    return norm


def _squares(gradients: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """The sum of squares, in float32 or wider."""
    wide = [gradient.to(torch.promote_types(gradient.dtype, torch.float32)) for gradient in gradients]
    zero = torch.zeros((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    return sum((gradient.square().sum() for gradient in wide), zero)
