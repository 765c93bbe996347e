"""LoRA factors of experts that are divided among processes: each process holds those of its own experts.

PEFT keeps the factors of all experts of a layer in two ``nn.Linear``. Here their class changes, and their weight
becomes a DTensor by expert, divided like the experts themselves. State dicts keep PEFT's names and layout, with the
factors of all experts, so files are those of one process.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


class _ExpertFactor(nn.Linear):
    """One factor ``(E, ...)`` as a DTensor; ``state_dict`` gathers it, so that every process must call it.

    Attributes:
        num_experts: E, of all processes.
    """

    num_experts: int

    def stacked(self, flat: torch.Tensor) -> torch.Tensor:
        """PEFT's flat factor, by expert."""
        raise NotImplementedError

    def flat(self, stack: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`stacked`."""
        raise NotImplementedError

    def divided(self, flat: torch.Tensor, mesh: DeviceMesh) -> DTensor:
        """The part of this process of a flat factor of all experts."""
        stack = self.stacked(flat.detach())
        local = stack.chunk(mesh.size())[mesh.get_local_rank()].clone(memory_format=torch.contiguous_format)
        stride = torch.empty(stack.shape, device="meta").stride()
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=stack.shape, stride=stride)

    @torch.no_grad()
    def gathered(self) -> torch.Tensor:
        """The flat factor of all experts, on every process."""
        return self.flat(self.weight.full_tensor())

    def _save_to_state_dict(self, destination: dict[str, object], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.gathered()

    def _load_from_state_dict(self, state_dict: dict[str, object], prefix: str, *args: object) -> None:
        key = prefix + "weight"
        flat = state_dict.get(key)
        # A tensor of another shape is left to the base class, which reports it.
        if flat is not None and flat.shape == self.flat(torch.empty(self.weight.shape, device="meta")).shape:
            state_dict[key] = self.divided(flat, self.weight.device_mesh)
        super()._load_from_state_dict(state_dict, prefix, *args)


class ExpertFactorA(_ExpertFactor):
    """``lora_A``, flat ``(E·r, C)``, by expert ``(E, r, C)``."""

    def stacked(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.reshape(self.num_experts, -1, flat.shape[1])

    def flat(self, stack: torch.Tensor) -> torch.Tensor:
        return stack.flatten(0, 1)


class ExpertFactorB(_ExpertFactor):
    """``lora_B``, flat ``(N, r·E)``, by expert ``(E, N, r)``."""

    def stacked(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.reshape(flat.shape[0], -1, self.num_experts).permute(2, 0, 1)

    def flat(self, stack: torch.Tensor) -> torch.Tensor:
        return stack.permute(1, 2, 0).reshape(stack.shape[1], -1)


def divide_factor(
    linear: nn.Linear,
    cls: type[_ExpertFactor],
    num_experts: int,
    mesh: DeviceMesh,
    copies: Sequence[dist.ProcessGroup],
) -> None:
    """Keep this process's part of PEFT's factor, in place; a divided one is left as it is.

    Args:
        linear: PEFT's layer.
        cls: :class:`ExpertFactorA` or :class:`ExpertFactorB`.
        num_experts: E.
        mesh: over which experts are divided.
        copies: groups of processes with the same experts; all get the values of the group's first process.
    """
    if isinstance(linear, _ExpertFactor):
        return
    flat = linear.weight
    linear.__class__, linear.num_experts = cls, num_experts
    part = linear.divided(flat, mesh)
    if not part.is_meta:
        for group in copies:
            dist.broadcast(part.to_local(), group=group, group_src=0)
    # Not by attribute: while PEFT loads adapters with low_cpu_mem_usage it moves what is registered to the meta device.
    linear._parameters["weight"] = nn.Parameter(part, requires_grad=flat.requires_grad)


def gather_factor(linear: nn.Linear) -> None:
    """Undo :func:`divide_factor`; every process must call it."""
    if isinstance(linear, _ExpertFactor):
        linear.weight = nn.Parameter(linear.gathered(), requires_grad=linear.weight.requires_grad)
        linear.__class__ = nn.Linear
        del linear.num_experts


def whole_update(local: torch.Tensor, parameter: DTensor, mesh: DeviceMesh) -> DTensor:
    """The change of all experts' parameter, sharded as it is, from that of this process's experts.

    Args:
        local: the change of the experts of this process's rank in ``mesh``.
        parameter: sharded further by FSDP2 over other dimensions of its own mesh.
        mesh: over which experts are divided.
    """
    whole, own = parameter.device_mesh, mesh.mesh_dim_names[0]
    for axis, (name, placement) in enumerate(zip(whole.mesh_dim_names, parameter.placements, strict=True)):
        # FSDP2's strided placement is not an ordinary shard.
        if name != own and hasattr(placement, "dim"):
            parts = local.chunk(whole.size(axis), placement.dim)
            rank = whole.get_local_rank(axis)
            local = parts[rank] if rank < len(parts) else local.narrow(placement.dim, 0, 0)
    return DTensor.from_local(
        local, whole, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
