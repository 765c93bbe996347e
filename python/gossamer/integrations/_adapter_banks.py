"""The factors of many LoRA adapters side by side, and the rows of a call sorted by adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from gossamer.integrations._adapter_files import Factors
from gossamer.integrations._expert_updates import ExpertUpdate, adapter_slots
from gossamer.nn import expert_factors
from gossamer.ops.dispatch import Dispatch
from gossamer.ops.low_rank import base_linear
from gossamer.ops.multi_low_rank import adapter_dispatch, multi_low_rank

AdapterFactors = Mapping[tuple[str, str | None], Factors]


class Call:
    """The requests of one call: the adapter of each, sorted once for each number of rows.

    Attributes:
        ids: ids of the requests' adapters in the table, −1 for none.
        table: the adapters as they were when the call began.
    """

    def __init__(self, ids: torch.Tensor, table: Table) -> None:
        self.ids, self.table = ids, table
        self._counts = {ids.shape[0]}
        self._sorted: dict[tuple[int, torch.device], tuple[torch.Tensor, Dispatch]] = {}

    def note(self, shape: torch.Size) -> None:
        """Record the number of rows of a whole batch, from a tensor known to be ``(batch, length, ...)``."""
        if len(shape) > 1 and shape[0] % self.ids.shape[0] == 0:
            self._counts |= {shape[0], shape[:2].numel()}

    def rows(self, shape: torch.Size, device: torch.device) -> tuple[torch.Tensor, Dispatch]:
        """The adapter ``(M,)`` of each of M rows, where a request's rows are adjacent, and the rows sorted by adapter.

        Raises:
            ValueError: the rows do not consist of whole requests in order.
        """
        count, requests = shape.numel(), self.ids.shape[0]
        key = (count, device)
        if requests > 1 and len(shape) > 1:
            if shape[0] % requests:
                raise ValueError(
                    f"adapters cannot be assigned to rows in a layer whose rows {tuple(shape)} are not those of "
                    f"{requests} requests, such as a table of positions"
                )
            self._counts.add(count)
        elif requests > 1 and count not in self._counts:
            raise ValueError(
                f"adapters cannot be assigned to rows in a layer of {count} rows: of {requests} requests, "
                f"{sorted(self._counts)} were expected, not some tokens of a batch"
            )
        if key not in self._sorted:
            ids = self.ids.to(device).repeat_interleave(count // requests)
            self._sorted[key] = ids, adapter_dispatch(ids, len(self.table.names))
        return self._sorted[key]


def _dtype(module: nn.Module) -> torch.dtype:
    """The dtype in which the module computes; bitsandbytes' layers store it separately from their weight."""
    dtype = next(module.parameters(recurse=False)).dtype
    if dtype.is_floating_point and dtype.itemsize >= 2:
        return dtype
    return getattr(module, "compute_dtype", None) or torch.bfloat16


def _fitted(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with a rank no larger than the matrix: factors of a larger rank are replaced by their
    product.
    """
    rank, (n, c) = a.shape[0], (b.shape[0], a.shape[1])
    if rank <= min(n, c):
        return a, b
    product = b.float() @ a.float()
    return (product, torch.eye(n)) if n <= c else (torch.eye(c), product)


def _wide(parts: list[torch.Tensor | None], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensors stacked, each padded with zeros to ``shape``."""
    bank = torch.zeros(len(parts), *shape, dtype=dtype)
    for row, part in zip(bank, parts, strict=True):
        if part is not None:
            row[tuple(slice(size) for size in part.shape)] = part.to(dtype)
    return bank


class Bank(nn.Module):
    """The updates of one module by every adapter; the rank is 0 for an adapter that does not update it."""

    def __init__(self, factors: list[Factors | None], module: nn.Module) -> None:
        super().__init__()
        dtype = _dtype(module)
        device = next(module.parameters(recurse=False)).device
        self.table = isinstance(module, nn.Embedding)
        pairs = [None if f is None else _fitted(f.a, f.b) for f in factors]
        ranks = [0 if p is None else p[0].shape[0] for p in pairs]
        some, rank = next(p for p in pairs if p is not None), max(ranks)
        # For a table, A is stored row by row, so that an id reads adjacent elements.
        a = [None if p is None else p[0].T if self.table else p[0] for p in pairs]
        shape = (some[0].shape[1], rank) if self.table else (rank, some[0].shape[1])
        scales = [0.0 if f is None else f.scale for f in factors]
        factor = float(getattr(module, "embed_scale", 1.0)) if self.table else 1.0
        buffers = {
            "a": _wide(a, shape, dtype),
            "b": _wide([p and p[1] for p in pairs], (some[1].shape[0], rank), dtype),
            "scale": torch.tensor(scales, dtype=torch.float32) * factor,
            "ranks": torch.tensor(ranks),
            "bias": None,
        }
        if any(f is not None and f.bias is not None for f in factors):
            biases = [None if f is None or f.bias is None else f.bias.float() * f.scale for f in factors]
            # The last row is for the id -1.
            buffers["bias"] = _wide([*biases, None], (some[1].shape[0],), dtype)
        for name, buffer in buffers.items():
            self.register_buffer(name, None if buffer is None else buffer.to(device), persistent=False)

    def after(self, call: Call, module: nn.Module, args: tuple, kwargs: dict, y: torch.Tensor) -> torch.Tensor:
        """The module's output ``y`` with the updates added, as a forward hook returns it."""
        # Another hook may hold the output, and autograd may forbid changing it in place.
        y = y.clone() if torch.is_grad_enabled() or len(module._forward_hooks) > 1 else y
        return self._updated(call, args[0] if args else next(iter(kwargs.values())), y)

    def forward(self, call: Call, module: nn.Linear, input: torch.Tensor) -> torch.Tensor:
        """The forward of a plain linear layer, with the same argument name for callers that pass it by keyword."""
        rows = input.reshape(-1, input.shape[-1])
        y = base_linear(rows, module.weight, module.bias).view(*input.shape[:-1], module.out_features)
        return self._updated(call, input, y)

    def _updated(self, call: Call, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """``y`` with the updates added in place."""
        ids, routing = call.rows(x.shape if self.table else y.shape[:-1], y.device)
        if self.table:
            row = x.reshape(-1) + ids.clamp(min=0) * self.a.shape[1]
            x = F.embedding(row, self.a.flatten(0, 1)).view(*y.shape[:-1], -1)
            rank = x.shape[-1]
            a = torch.eye(rank, dtype=x.dtype, device=x.device).expand(self.a.shape[0], rank, rank)
        else:
            x, a = x.to(y.dtype), self.a
        a, b = a.to(y.dtype), self.b.to(y.dtype)
        y = multi_low_rank(x.to(y.dtype), a, b, routing, scale=self.scale, out=y, ranks=self.ranks)
        return y if self.bias is None else y + self.bias.to(y.dtype)[ids].view(y.shape)


class ExpertsBank(nn.Module):
    """The updates of one experts module by every adapter."""

    def __init__(self, factors: dict[str, list[Factors | None]], module: nn.Module) -> None:
        super().__init__()
        self.names = tuple(factors)
        for name, of_parameter in factors.items():
            weight = getattr(module, name)
            self.num_experts = weight.shape[0]
            pairs = [f and expert_factors(f.a, f.b.float() * f.scale, self.num_experts) for f in of_parameter]
            some = next(p for p in pairs if p is not None)
            rank = max(p[0].shape[1] for p in pairs if p is not None)
            shapes = (self.num_experts, rank, some[0].shape[2]), (self.num_experts, some[1].shape[1], rank)
            for letter, shape, part in zip("ab", shapes, (0, 1), strict=True):
                bank = _wide([p and p[part] for p in pairs], shape, weight.dtype).flatten(0, 1).to(weight.device)
                self.register_buffer(f"{name}_{letter}", bank, persistent=False)

    def forward(
        self,
        call: Call,
        module: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """The experts module's forward."""
        from gossamer.integrations.transformers import experts_forward

        ids, _ = call.rows(hidden_states.shape[:-1], hidden_states.device)
        slots = adapter_slots(ids, top_k_index, len(call.table.names), self.num_experts)
        updates = {n: ExpertUpdate(getattr(self, f"{n}_a"), getattr(self, f"{n}_b"), slots) for n in self.names}
        return experts_forward(module, hidden_states, top_k_index, top_k_weights, updates=updates)


def _check_experts(path: str, module: nn.Module) -> None:
    """Check that the module is an experts module of transformers in a form that gossamer supports."""
    from gossamer.integrations.transformers import experts_obstacle, is_experts

    reason = experts_obstacle(module) if is_experts(module) else "it is not an experts module of transformers"
    if reason is None and getattr(module, "_is_expert_parallel", False):
        reason = "its experts are divided among processes"
    if reason is not None:
        raise ValueError(f"adapters update parameters of {path}, a {type(module).__name__}: {reason}")


@dataclass(frozen=True)
class Table:
    """All adapters served at one time. A table never changes: later calls get a new one.

    Attributes:
        factors: the factors of each adapter, by name, as they were read.
        banks: the factors of all adapters side by side, by the path of the module they update.
    """

    factors: Mapping[str, AdapterFactors]
    banks: Mapping[str, Bank | ExpertsBank]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order of the banks."""
        return tuple(self.factors)


def make_table(modules: Mapping[str, nn.Module], factors: Mapping[str, AdapterFactors]) -> Table:
    """Arrange the factors of all adapters side by side, per module path."""
    updated: dict[str, set[str]] = {}
    for path, parameter in sorted({key for of_adapter in factors.values() for key in of_adapter}, key=str):
        updated.setdefault(path, set()).update([] if parameter is None else [parameter])
    for path, parameters in updated.items():
        if parameters:
            _check_experts(path, modules[path])
    banks = {}
    for path, parameters in updated.items():
        if parameters:
            given = {n: [f.get((path, n)) for f in factors.values()] for n in sorted(parameters)}
            banks[path] = ExpertsBank(given, modules[path])
        else:
            banks[path] = Bank([f.get((path, None)) for f in factors.values()], modules[path])
    return Table(factors, banks)
