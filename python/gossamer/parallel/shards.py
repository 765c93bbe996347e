"""The part of a table that one rank holds: lookups for all ranks, steps and checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from gossamer._numerics import accumulation_dtype
from gossamer.nn.embeddings.fused_step import FusedTable
from gossamer.nn.replicas import is_sharded
from gossamer.ops.embedding import inverse_frequency, renorm_
from gossamer.ops.gather_max import gather_maxima
from gossamer.ops.gather_reduce import gather_reduce
from gossamer.ops.sparse_update import step_bags_, step_rows_
from gossamer.optim import Optimizer
from gossamer.parallel.placement import Split


def factor_dtype(device: torch.device) -> torch.dtype:
    """The dtype of weights that include a mean's division: as exact as in the kernels."""
    return torch.float64 if device.type == "cpu" else torch.float32


def copy_beside(module: torch.nn.Module, memo: dict) -> torch.nn.Module:
    """A deep copy of a module over the same mesh, whose process groups cannot be copied."""
    memo[id(module.mesh)] = module.mesh
    copied = memo[id(module)] = object.__new__(type(module))
    copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in module.__dict__.items()})
    return copied


class TableShard(FusedTable):
    """A rank's rows or columns of one table, as a parameter ``weight`` and the optimizer's buffers.

    Attributes:
        split: distribution of the table over the ranks.
        rank: of this process.
        mesh: one-dimensional, over the ranks.
        bound: bound of the table's uniform initial values; None for normal ones.
        padding_idx: a row that starts at zero; None for none.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        state: Mapping[str, torch.Tensor],
        optimizer: Optimizer | None,
        split: Split,
        mesh: DeviceMesh,
        *,
        requires_grad: bool = True,
        options: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        self.split, self.mesh, self.rank = split, mesh, mesh.get_local_rank()
        self.num_embeddings, self.embedding_dim = split.rows, split.columns
        self.piece = split.piece(self.rank)
        self.max_norm = self.norm_type = self.padding_idx = self.bound = None
        self.scale_grad_by_freq = self.sparse = self.by_position = False
        for name, value in (options or {}).items():
            setattr(self, name, value)
        self.weight = torch.nn.Parameter(self.piece.of(weight.detach()).clone(), requires_grad=requires_grad)
        self.attach(optimizer)
        for name, whole in state.items():
            own = getattr(self, f"optimizer_{name}")
            own.copy_(whole if name == "step" else self.piece.of(whole))
        if optimizer is None:
            self._new_handle()

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group of the ranks."""
        return self.mesh.get_group()

    # Whether ids are added and removed.
    dynamic = False

    @property
    def device(self) -> torch.device:
        """The device of the table."""
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        return self.weight.dtype

    @property
    def id_dtype(self) -> torch.dtype:
        """The dtype of ids in messages."""
        return torch.int32 if self.split.rows < 2**31 else torch.int64

    @property
    def parameter(self) -> torch.nn.Parameter | None:
        """The weight, if lookups give it a gradient."""
        return self.weight if self.optimizer is None and self.weight.requires_grad else None

    def owner_of(self, ids: torch.Tensor) -> torch.Tensor | None:
        """The rank of each id's row; None if all holding ranks have a part of every row."""
        if self.split.kind != "row":
            return None
        return ids // self.split.piece(0).rows

    def local_ids(self, ids: torch.Tensor, rank: int) -> torch.Tensor:
        """Ids in the numbering of a rank's rows."""
        return (ids - self.split.piece(rank).row).to(self.id_dtype)

    def serve(self, ids: torch.Tensor, served: object, inserts: bool) -> list[torch.Tensor]:
        """The data to send for local ids: their rows."""
        return [self.rows_of(ids)]

    @property
    def trained(self) -> bool:
        """Whether lookups change the table or give it a gradient, in their backward pass."""
        return self.optimizer is not None or self.weight.requires_grad

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Redraw the table, as the layer that was sharded draws it, and reset the optimizer.

        Every rank must make the call. Values come from rank 0's generator, so replicas are equal and parts differ.
        """
        seed = [int(torch.randint(2**62, ()))]
        dist.broadcast_object_list(seed, src=dist.get_global_rank(self.group, 0), group=self.group)
        own = torch.Generator(self.weight.device).manual_seed(seed[0] + self.piece.row + self.piece.column)
        if self.bound is None:
            self.weight.normal_(generator=own)
        else:
            self.weight.uniform_(-self.bound, self.bound, generator=own)
        padding = self.padding_idx
        if padding is not None and self.piece.row <= padding < self.piece.row + self.piece.rows:
            self.weight[padding - self.piece.row] = 0
        self._reset_state()

    def __deepcopy__(self, memo: dict) -> TableShard:
        return copy_beside(self, memo)

    def extra_repr(self) -> str:
        """The whole table, its distribution, and the local part."""
        own = self.piece
        part = f"rows {own.row} to {own.row + own.rows}, columns {own.column} to {own.column + own.columns}"
        optimizer = f", optimizer={self.optimizer}" if self.optimizer else ""
        return f"{self.num_embeddings}, {self.embedding_dim}, by {self.split.kind}: {part}{optimizer}"

    def rows_of(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows ``(n, local columns)`` of local ids, first scaled down to the table's maximum norm."""
        if self.max_norm is not None:
            renorm_(self.weight, ids, self.max_norm, self.norm_type)
        return self.weight.detach().index_select(0, ids.long())

    def pool(
        self,
        ids: torch.Tensor,
        offsets: torch.Tensor,
        weights: torch.Tensor | None,
        mode: str,
        out_dtype: torch.dtype | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sums, means or maxima ``(B, local columns)`` of bags of local ids, and the positions of maxima."""
        if self.max_norm is not None:
            renorm_(self.weight, ids, self.max_norm, self.norm_type)
        table = self.weight.detach()
        if mode == "max":
            return gather_maxima(table, ids, offsets)
        return gather_reduce(table, ids, offsets, weights, mode=mode, out_dtype=out_dtype), None

    def learn(
        self,
        ids: torch.Tensor,
        offsets: torch.Tensor,
        dout: torch.Tensor,
        weights: torch.Tensor | None,
        argmax: torch.Tensor | None,
        mode: str,
        served: object = None,
    ) -> torch.Tensor | None:
        """Take the optimizer's step on the rows that bags list, or, without one, return the gradient of ``weight``.

        Args:
            ids: local ids, in the order in which a single process would read them.
            offsets: ``(B+1,)``.
            dout: ``(B, local columns)``.
            weights: like ``ids``, or None.
            argmax: for a maximum, its positions.
            mode: of the bags.
            served: saved data of the lookup; unused here.
        """
        if self.scale_grad_by_freq:
            scale = inverse_frequency(ids, self.weight.shape[0], accumulation_dtype(self.weight.dtype))
            weights = scale if weights is None else weights * scale
        if self.optimizer is None:
            return self._gradient(ids, offsets, dout, weights, argmax, mode)
        state = {name: getattr(self, f"optimizer_{name}") for name in ("step", *self.optimizer.state_kinds())}
        if self.split.kind == "column" and self.optimizer.reads_rows():
            self._step_columns(ids, offsets, dout, weights, argmax, mode, state)
        else:
            if weights is None and self.by_position:
                # The kernel for many tables multiplies by weights even where the kernel for one table adds plain rows.
                weights = torch.ones(ids.shape, dtype=torch.float32, device=ids.device)
            lists = (ids, dout, offsets, weights, argmax)
            step_bags_(self.weight.detach(), *lists, self.optimizer, state, mode)
        return None

    def learn_nothing(self) -> torch.Tensor | None:
        """Count the step of a lookup on a rank that holds no part of the table."""
        if self.optimizer is None:
            return torch.zeros_like(self.weight)
        self.optimizer_step += 1
        return None

    def _gradient(self, ids, offsets, dout, weights, argmax, mode) -> torch.Tensor:
        if argmax is not None:
            gradient = torch.zeros(self.weight.shape, dtype=accumulation_dtype(self.weight.dtype), device=ids.device)
            bag, column = (argmax >= 0).nonzero(as_tuple=True)
            rows = ids.long()[offsets[bag] + argmax[bag, column]]
            gradient.index_put_((rows, column), dout[bag, column].to(gradient.dtype), accumulate=True)
            return gradient.to(self.weight.dtype)
        leaf = self.weight.detach().requires_grad_()
        with torch.enable_grad():
            pooled = gather_reduce(leaf, ids, offsets, weights, mode=mode, sparse_grad=self.sparse)
            return torch.autograd.grad(pooled, leaf, dout.to(pooled.dtype))[0]

    def _step_columns(self, ids, offsets, dout, weights, argmax, mode, state) -> None:
        """A step that needs whole rows when each rank holds columns: sums over a row are added over the ranks."""
        wide = accumulation_dtype(self.weight.dtype)
        ids, order = ids.long().sort(stable=True)
        counts = offsets.diff()
        bag = torch.repeat_interleave(counts)
        values = dout.to(wide)[bag]
        if weights is not None:
            values = values * weights.to(wide).unsqueeze(1)
        if mode == "mean":
            values = values / counts[bag].unsqueeze(1)
        if argmax is not None:
            position = torch.arange(len(bag), device=bag.device) - offsets[:-1][bag]
            values = torch.where(argmax[bag] == position.unsqueeze(1), values, 0)
        rows, each = torch.unique_consecutive(ids, return_counts=True)
        ends = torch.cat([each.new_zeros(1), each.cumsum(0)])
        gradient = gather_reduce(values, order, ends) if len(order) else values.new_zeros(0, dout.shape[1])

        def over_ranks(sums: torch.Tensor) -> torch.Tensor:
            # Gathered and added in rank order, so that all ranks get the same bits.
            parts = [torch.empty_like(sums) for _ in range(self.split.world)]
            dist.all_gather(parts, sums.contiguous(), group=self.group)
            return torch.stack(parts).sum(0)

        first = self.piece.column
        how = {"columns": self.split.columns, "first_column": first, "sum_over": over_ranks}
        step_rows_(self.weight.detach(), rows, gradient, optimizer=self.optimizer, state=state, **how)

    # Checkpoints hold the whole table under the names of the original module.

    def _whole_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter or buffer for the whole table; () if it has no value per row."""
        kinds = {} if self.optimizer is None else self.optimizer.state_kinds()
        kind = "full" if name == "weight" else kinds.get(name.removeprefix("optimizer_"))
        return {"full": (self.split.rows, self.split.columns), "row": (self.split.rows,)}.get(kind, ())

    def _placed(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """A local tensor in checkpoint form: a DTensor, a plain tensor that is equal on all ranks, or nothing."""
        kind, shape = self.split.kind, self._whole_shape(name)
        if kind == "table":
            return tensor if self.rank == self.split.owner else None
        if kind == "replicate" or not shape or (kind == "column" and len(shape) == 1):
            return tensor
        from torch.distributed.tensor import DTensor, Shard

        placement = Shard(0 if kind == "row" else 1)
        stride = (shape[1], 1) if len(shape) == 2 else (1,)
        return DTensor.from_local(
            tensor, self.mesh, [placement], run_check=False, shape=torch.Size(shape), stride=stride
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in [*self._parameters, *self._buffers]:
            tensor = destination.pop(prefix + name, None)
            placed = None if tensor is None else self._placed(name, tensor.detach())
            if placed is not None:
                destination[prefix + name] = placed

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        own = {}
        for name in [*self._parameters, *self._buffers]:
            given = state_dict.get(prefix + name)
            if given is not None:
                own[prefix + name] = self._local(name, given)
            elif self.split.kind == "table" and self.rank != self.split.owner:
                # Another rank holds the table, so nothing is missing here.
                own[prefix + name] = getattr(self, name)
        others = {key: value for key, value in state_dict.items() if key not in own and key.startswith(prefix)}
        super()._load_from_state_dict(others | own, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _local(self, name: str, given: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a tensor of a checkpoint, whole or a DTensor."""
        own = getattr(self, name)
        if is_sharded(given):
            local = given.to_local()
            if given.device_mesh == self.mesh and local.shape == own.shape:
                return local
            given = given.full_tensor()
        shape = self._whole_shape(name)
        return self.piece.of(given) if shape and tuple(given.shape) == shape else given
