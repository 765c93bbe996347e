"""Sorting token-to-expert assignments by expert, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gossamer import _backend
from gossamer._checks import check_index, check_shape
from gossamer.ops._registration import register

MAX_ROWS = 2**31 - 1


@dataclass(frozen=True)
class Dispatch:
    """Assignments sorted by expert: R = T·K rows, stable within an expert.

    Attributes:
        slots: ``(R,)`` int32; ``slots[r] = t·K + k`` is the flat slot of sorted row ``r``.
        rows: ``(R,)`` int32, the inverse; ``rows[slots[r]] = r``.
        offsets: ``(E+1,)`` int32; rows of expert ``e`` are ``offsets[e]:offsets[e+1]``, and rows from ``offsets[E]`` on
            are dropped ones (``expert_id >= E``), in slot order.
        num_tokens: T.
        top_k: K.
        num_experts: E.
    """

    slots: torch.Tensor
    rows: torch.Tensor
    offsets: torch.Tensor
    num_tokens: int
    top_k: int
    num_experts: int

    @property
    def num_rows(self) -> int:
        """R = T·K, dropped rows included."""
        return self.num_tokens * self.top_k

    @property
    def counts(self) -> torch.Tensor:
        """``(E,)`` int32: rows of each expert."""
        return self.offsets.diff()


def check_dispatch(dispatch: object) -> None:
    """``dispatch`` must be a :class:`Dispatch`."""
    if not isinstance(dispatch, Dispatch):
        raise TypeError(f"dispatch must be a gossamer.Dispatch, got {type(dispatch).__name__}")


def dispatch_reference(expert_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``slots, rows, offsets`` of :func:`dispatch` by a stable sort in plain torch."""
    flat = expert_ids.reshape(-1).long()
    bad = (flat < 0) | (flat > num_experts)
    flat = torch.where(bad, num_experts, flat)
    slots = torch.argsort(flat, stable=True)
    rows = torch.empty_like(slots)
    rows[slots] = torch.arange(slots.numel(), device=slots.device)
    experts = torch.arange(num_experts + 1, device=flat.device)
    offsets = torch.searchsorted(flat[slots], experts)
    return slots.int(), rows.int(), offsets.int()


def _raise_negative(expert_ids: torch.Tensor) -> None:
    flat = expert_ids.reshape(-1)
    slot = int((flat < 0).nonzero()[0])
    top_k = expert_ids.shape[1]
    raise ValueError(
        f"expert_ids must not be negative, got {int(flat[slot])} at token {slot // top_k}, slot {slot % top_k}; "
        "ids >= num_experts mean no expert"
    )


def _kernel(expert_ids, num_experts, backend):
    # The check reads values, so it can only stand inside the operator, where a traced call has them too.
    # The native kernel finds negative ids on its way.
    if backend != "native" and expert_ids.device.type == "cpu" and expert_ids.numel() and int(expert_ids.min()) < 0:
        _raise_negative(expert_ids)
    if backend == "reference":
        return dispatch_reference(expert_ids, num_experts)
    return _backend.kernels(backend, "dispatch").dispatch(expert_ids, num_experts)


def _fake(expert_ids, num_experts, backend):
    slots = expert_ids.new_empty(expert_ids.numel(), dtype=torch.int32)
    return slots, torch.empty_like(slots), expert_ids.new_empty(num_experts + 1, dtype=torch.int32)


_dispatch = register(
    "dispatch(Tensor expert_ids, int num_experts, str backend) -> (Tensor slots, Tensor rows, Tensor offsets)",
    _kernel,
    _fake,
)


def dispatch(expert_ids: torch.Tensor, num_experts: int) -> Dispatch:
    """Sort (token, expert) assignments by expert with a counting sort on the device; nothing is read on the host.

    Args:
        expert_ids: ``(T, K)`` int32 or int64, the experts of each token. An id ``>= num_experts`` means "no expert":
            that slot is dropped. A negative id is an error on the CPU; on CUDA, where finding it would stop the stream,
            its slot is dropped.
        num_experts: E, at least 1.

    Returns:
        The :class:`Dispatch` that :func:`grouped_matmul` and :func:`expert_mlp` take.

    Raises:
        TypeError: ``expert_ids`` is no int32 or int64 tensor, or ``num_experts`` no int.
        ValueError: wrong rank, K > E, ``num_experts < 1``, 2³¹ slots or more, or (on the CPU) a negative id.
    """
    check_index("expert_ids", expert_ids)
    check_shape("expert_ids", expert_ids, (None, None), "(T, K)")
    if not isinstance(num_experts, (int, torch.SymInt)) or isinstance(num_experts, bool):
        raise TypeError(f"num_experts must be an int, got {type(num_experts).__name__}")
    num_tokens, top_k = expert_ids.shape
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"expert_ids must have 1 <= K <= num_experts columns, got K={top_k}, num_experts={num_experts}"
        )
    if num_tokens * top_k > MAX_ROWS:
        raise ValueError(f"expert_ids must have at most {MAX_ROWS} slots, got T*K = {num_tokens * top_k}")
    backend = _backend.resolve("dispatch", expert_ids)
    slots, rows, offsets = _dispatch(expert_ids, num_experts, backend)
    return Dispatch(slots, rows, offsets, num_tokens, top_k, num_experts)
