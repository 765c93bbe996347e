"""Hugging Face transformers 5: gossamer as an expert-parallel implementation.

Importing :mod:`gossamer.integrations.transformers` registers it if transformers supports such implementations, as 5.24
does. Then ``DistributedConfig(ep_size=..., ep_implementation="gossamer")`` exchanges one row per (token, rank) instead
of one per (token, expert). It works with gossamer's experts (``experts_implementation="gossamer"``) and transformers'
own. PEFT's adapters of such experts are divided with them by :func:`gossamer.replace`, called after ``get_peft_model``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from gossamer.integrations._calls import Slot, scope
from gossamer.ops.gather_reduce import gather_reduce
from gossamer.parallel.gradients import share
from gossamer.parallel.token_exchange import Level, exchange_tokens

NAME = "gossamer"


class _SpreadSlots(torch.autograd.Function):
    """Repeats rows ``(M, H)`` once per slot, in row order; the gradients of a row's slots are summed."""

    @staticmethod
    def forward(ctx, rows, of_slot, offsets):
        ctx.save_for_backward(offsets)
        return rows.index_select(0, of_slot)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (offsets,) = ctx.saved_tensors
        return gather_reduce(gradient, torch.arange(gradient.shape[0], device=gradient.device), offsets), None, None


class GossamerEP(EPImplementation):
    """Sends each token once to each rank that holds its experts, and returns weighted sums; see ``gossamer.parallel``.

    The ranks of a tensor-parallel group share a batch: each sends its part of it, and the results are gathered.
    """

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.config = experts.config
        group = ep_mesh.get_group()
        self.level = Level(group, dist.get_world_size(group), dist.get_rank(group), "expert")
        self._substitute = Slot()
        self._copies: tuple[dist.ProcessGroup, ...] | None = None
        # transformers keeps the implementation in a closure only; LoRA layers around the experts look here.
        experts.gossamer_exchange = self

    def __deepcopy__(self, memo: dict) -> GossamerEP:
        # Not copied: a copy of the module also shares the forward of the original.
        return self

    @contextlib.contextmanager
    def computing(self, compute: Callable[..., torch.Tensor]) -> Iterator[None]:
        """Compute the local rows of calls inside the block by ``compute(rows, ids, weights)``, not by the experts."""
        with scope():
            self._substitute.assign(compute)
            yield

    def copies(self, parameter: DTensor) -> tuple[dist.ProcessGroup, ...]:
        """The groups over which FSDP2 shards or copies these experts, found by one of their parameters as sharded."""
        if self._copies is None:
            mesh, experts = parameter.device_mesh, self.ep_mesh.mesh_dim_names[0]
            groups = [mesh.get_group(name) for name in mesh.mesh_dim_names if name != experts]
            self._copies = tuple(group for group in groups if dist.get_world_size(group) > 1)
        return self._copies

    def own_part(self, stack: DTensor) -> torch.Tensor:
        """The part of this process of a stack by expert; its gradient is the mean over all batches, as under FSDP2."""
        copies = self._copies or ()
        batches = self.ep_mesh.size() // self.tp_mesh.size() * math.prod(map(dist.get_world_size, copies))
        return share(stack.to_local(), 1 / batches, copies)

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """``Σ_k top_k_weights[t,k]·expert_{top_k_index[t,k]}(hidden_states[t])`` of the local batch."""
        shared, whole = self.tp_mesh.size() > 1, hidden_states.shape
        if shared:
            hidden_states, top_k_index, top_k_weights = (
                self._own(tensor) for tensor in (hidden_states, top_k_index, top_k_weights)
            )
        y, _ = exchange_tokens(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.num_local_experts * self.level.size,
            (self.level,),
            self._compute,
        )
        if not shared:
            return y
        # Each rank has the gradient of the whole result and keeps the part of its own rows.
        stride = (whole[1], 1)
        return DTensor.from_local(
            y.contiguous(), self.tp_mesh, [Shard(0)], run_check=False, shape=whole, stride=stride
        ).full_tensor()

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        """The local rows of the batch that the tensor-parallel group shares; gradients are gathered again."""
        replicated = DTensor.from_local(tensor, self.tp_mesh, [Replicate()], run_check=False)
        return replicated.redistribute(self.tp_mesh, [Shard(0)]).to_local()

    def _compute(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, max_rows: int) -> torch.Tensor:
        if (substitute := self._substitute.get()) is not None:
            return substitute(rows, ids, weights).to(rows.dtype)
        if getattr(self.config, "_experts_implementation", None) == NAME:
            return self.experts_forward(rows, ids, weights).to(rows.dtype)
        # Other implementations also compute slots without an expert, so they are given only slots with an expert.
        present = ids < self.num_local_experts
        offsets = torch.nn.functional.pad(present.sum(1).cumsum(0), (1, 0))
        of_slot, slot = present.nonzero(as_tuple=True)
        if of_slot.numel() == 0:
            # Their kernels do not accept an empty batch, and the backward pass must reach this process's parameters.
            one = rows.sum(0, keepdim=True)
            own = self.experts_forward(one, ids.new_zeros(1, 1, dtype=torch.int64), weights.new_ones(1, 1))
            return rows + 0 * own.to(rows.dtype) + 0 * weights.sum().to(rows.dtype)
        spread = _SpreadSlots.apply(rows, of_slot, offsets)
        ones = weights.new_ones((of_slot.numel(), 1))
        own = self.experts_forward(spread, ids[of_slot, slot].long().unsqueeze(1), ones)
        every = torch.arange(of_slot.numel(), device=rows.device)
        return gather_reduce(own.to(rows.dtype), every, offsets, weights[of_slot, slot])


EPImplementationInterface.register(NAME, GossamerEP)
