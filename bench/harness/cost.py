"""FLOPs and least bytes of operators, computed from the arguments of a call."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from gossamer.ops._records import Layout


@dataclass(frozen=True)
class Cost:
    """The least work of a call; None where unknown.

    Attributes:
        flops: floating-point operations.
        bytes: the fewest bytes that the call can move: everything read and everything written, counted once, in memory
            or in a cache.
        parts: key of a stage, or name of a kernel -> the cost of that part of the call.
        label: the name of a part in tables; its key if empty.
    """

    flops: float | None = None
    bytes: float | None = None
    parts: Mapping[str, Cost] = field(default_factory=dict)
    label: str = ""

    def __add__(self, other: Cost) -> Cost:
        parts = {
            name: self.parts[name] + other.parts[name] if name in self.parts and name in other.parts else part
            for name, part in {**self.parts, **other.parts}.items()
        }
        return Cost(_sum(self.flops, other.flops), _sum(self.bytes, other.bytes), parts, self.label or other.label)


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def nbytes(*tensors: object) -> float:
    """Bytes of the tensors among ``tensors``; elements that an expanded dimension repeats count once."""
    return float(sum(_elements(t) * t.element_size() for t in tensors if isinstance(t, torch.Tensor)))


def arguments(record: type, call: Mapping[str, object]) -> Any:
    """The record of arguments that an operator of gossamer was called with."""
    layout = Layout(record)
    return layout.restore(tuple(call.values())[: len(layout.paths)])


def _elements(tensor: torch.Tensor) -> int:
    if tensor.layout != torch.strided:
        return tensor.numel()
    count = min(tensor.numel(), 1)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= 1 if stride == 0 else size
    return count


CostFunction = Callable[[Mapping[str, object], object], Cost]


@functools.cache
def declared() -> dict[str, CostFunction]:
    """Name of an operator -> its cost function, as the benchmark of its primitive declares it in ``COSTS``.

    A cost function takes the call's arguments by the names of the operator's schema, and its result.
    """
    from gossamer.bench.harness.runner import FAMILIES

    modules = (importlib.import_module(f"gossamer.bench.families.{name}") for name in FAMILIES)
    return {op: function for module in modules for op, function in getattr(module, "COSTS", {}).items()}


# Operators that read only the rows requested: they move the ids, and the size of the result twice.
_GATHERS = {"aten::index", "aten::index_select", "aten::gather", "aten::embedding", "aten::take"}
# Operators that write only at the places to which the ids point.
_SCATTERS = {"aten::index_add_": "source", "aten::index_put_": "values", "aten::_index_put_impl_": "values"}
# Operators that read a table at places that depend on the data and cannot be seen in the arguments.
_OPAQUE = {"aten::_embedding_bag", "aten::_embedding_bag_forward_only", "aten::_embedding_bag_dense_backward"}
_FREE = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}


def _torch_bytes(name: str, func: torch._ops.OpOverload, named: Mapping[str, object], result: object) -> float | None:
    if name in _OPAQUE:
        return None
    if name in _FREE or func.is_view:
        return 0.0
    if name in _GATHERS:
        ids = [value for key, value in named.items() if key in ("index", "indices")]
        return nbytes(*tree_leaves(ids)) + 2 * nbytes(result)
    if name in _SCATTERS:
        ids = [value for key, value in named.items() if key in ("index", "indices")]
        return nbytes(*tree_leaves(ids)) + 3 * nbytes(named[_SCATTERS[name]])
    written = [named.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    read = {id(t): t for t in tree_leaves(dict(named)) if isinstance(t, torch.Tensor)}
    if name in ("aten::zero_", "aten::fill_", "aten::copy_"):
        read.pop(id(named["self"]), None)
    fresh = [] if written else tree_leaves(result)
    return nbytes(*read.values(), *tree_leaves(written), *fresh)


def _grouped_mm_flops(named: Mapping[str, object]) -> float | None:
    a, b, offsets = named["self"], named["mat2"], named.get("offs")
    rows = None if offsets is None else int(offsets[-1])
    if a.dim() == 2 and b.dim() == 3 and rows is not None:
        return 2.0 * rows * b.shape[1] * b.shape[2]
    if a.dim() == 2 and b.dim() == 2 and rows is not None:
        return 2.0 * rows * a.shape[0] * b.shape[1]
    return 2.0 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2] if a.dim() == 3 and b.dim() == 3 else None


def cost_of(func: torch._ops.OpOverload, args: tuple, kwargs: Mapping[str, object], result: object) -> Cost:
    """Return the cost of one call: declared for gossamer's operators, derived for torch's, unknown for others."""
    name = func._schema.name
    positional = (a.name for a in func._schema.arguments if not a.kwarg_only)
    named = dict(zip(positional, args, strict=False)) | dict(kwargs)
    if name in declared():
        return declared()[name](named, result)
    if not name.startswith("aten::"):
        return Cost()
    flops = None
    if name == "aten::_grouped_mm":
        flops = _grouped_mm_flops(named)
    elif func._overloadpacket in flop_registry:
        flops = float(flop_registry[func._overloadpacket](*args, **kwargs, out_val=result))
    return Cost(flops, _torch_bytes(name, func, named, result))


def _compute_dtype(values: object) -> torch.dtype | None:
    return next((t.dtype for t in tree_leaves(values) if isinstance(t, torch.Tensor) and t.is_floating_point()), None)


@dataclass
class Called:
    """The calls of one operator: their number, their total cost, and the dtype they compute in."""

    calls: int
    cost: Cost
    dtype: torch.dtype | None


class CostRecorder(TorchDispatchMode):
    """Sums the cost of every operator called inside the block, including a backward pass.

    Attributes:
        called: name of the operator -> its calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.called: dict[str, Called] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operator, and add its cost."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name, cost = func._schema.name, cost_of(func, args, kwargs, result)
        dtype = _compute_dtype((args, kwargs, result))
        if (before := self.called.get(name)) is None:
            self.called[name] = Called(1, cost, dtype)
        else:
            self.called[name] = Called(before.calls + 1, before.cost + cost, before.dtype or dtype)
        return result
