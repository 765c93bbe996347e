"""Counts the bytes that collectives of torch.distributed send, whoever calls them."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

SENDS_NOTHING = ("wait_tensor", "barrier", "monitored_barrier", "_wrap_tensor_autograd", "check_for_nan")


class SentBytes(TorchDispatchMode):
    """Counts the collectives inside the ``with`` block, and the bytes that this process sends to others in them.

    An all-to-all sends everything but this process's own share; an all-gather sends its input to each other process; a
    reduce-scatter sends the parts of the others; an all-reduce counts as both of these. Only collectives on the calling
    thread are seen; on a CPU these are all of them.

    Attributes:
        nbytes: bytes sent to other processes.
        collectives: number of collectives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = self.collectives = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operator, and count it if it is a collective."""
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional"):
            nbytes = _sent(namespace, name.rstrip("_"), args, dict(kwargs or {}), func)
            if nbytes is not None:
                self.nbytes += nbytes
                self.collectives += 1
        return func(*args, **(kwargs or {}))


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _sent(namespace: str, name: str, args: tuple, kwargs: dict, func) -> int | None:
    """Bytes that a collective sends; None for an operator that sends none, such as a wait or a barrier."""
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    if name in SENDS_NOTHING:
        return None
    if namespace == "c10d":
        group = dist.ProcessGroup.unbox(given["process_group"])
        sent = _tensors(given.get("input", given.get("input_tensor", given.get("input_tensors", given.get("tensors")))))
    else:
        group = given["group_name"]
        if isinstance(group, str):
            group = dist.distributed_c10d._resolve_process_group(group)
        sent = _tensors(given.get("input", given.get("inputs")))
    size, total = group.size(), sum(tensor.nbytes for tensor in sent)
    if name.startswith(("alltoall", "all_to_all")):
        splits = given.get("input_split_sizes") or ()
        own = total // size
        if splits:
            row = sent[0].element_size() * math.prod(sent[0].shape[1:])
            own = int(splits[group.rank()]) * row
        return total - own
    if name.startswith(("_allgather", "allgather", "all_gather")):
        return total * (size - 1)
    if name.startswith(("_reduce_scatter", "reduce_scatter")):
        return total * (size - 1) // size
    if name.startswith(("allreduce", "all_reduce")):
        return 2 * total * (size - 1) // size
    raise NotImplementedError(f"how much {namespace}::{name} sends is not known")
