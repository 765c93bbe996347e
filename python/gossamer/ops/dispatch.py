"""Sorting token-to-expert assignments by expert, on the device."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from gossamer import _backend
from gossamer._checks import check_index, check_no_negative, check_positive, check_shape
from gossamer._trusted import in_inference_mode, is_readable, mark, state_without_mark
from gossamer.ops._groups import MAX_ROWS, Groups, check_groups
from gossamer.ops._records import define


@dataclass(frozen=True)
class Dispatch:
    """Assignments sorted by expert: R = T·K rows, stable within an expert.

    Attributes:
        slots: ``(R,)`` int32; ``slots[r] = t·K + k`` is the flat slot of sorted row ``r``.
        rows: ``(R,)`` int32, the inverse; ``rows[slots[r]] = r``.
        offsets: ``(E+1,)`` int32; rows of expert ``e`` are ``offsets[e]:offsets[e+1]``, and rows from ``offsets[E]`` on
            are dropped (``expert_id >= E``), in slot order.
        num_tokens: T.
        top_k: K.
        num_experts: E.
        max_rows: number of rows of expert-sorted buffers, at least ``offsets[E]``; None for R.
    """

    slots: torch.Tensor
    rows: torch.Tensor
    offsets: torch.Tensor
    num_tokens: int
    top_k: int
    num_experts: int
    max_rows: int | None = None

    # Versions of the tensors at the last check, see gossamer._trusted; None before the first check.
    _checked_version: ClassVar[int | None] = None

    def __getstate__(self) -> dict[str, object]:
        return state_without_mark(self)

    @property
    def num_rows(self) -> int:
        """R = T·K, dropped rows included."""
        return self.num_tokens * self.top_k

    @property
    def buffer_rows(self) -> int:
        """Number of rows of expert-sorted buffers: R, or the number that :func:`dispatch` chose from ``max_rows``."""
        return self.num_rows if self.max_rows is None else self.max_rows

    @property
    def row_slots(self) -> torch.Tensor:
        """``(buffer_rows,)`` int32: the slot of each buffer row."""
        return self.slots if self.max_rows is None else self.slots[: self.max_rows]

    @property
    def groups(self) -> Groups:
        """Its tensors as the record for operators on expert-sorted rows."""
        return Groups(self.row_slots, self.rows, self.offsets)

    @property
    def counts(self) -> torch.Tensor:
        """``(E,)`` int32: rows of each expert."""
        return self.offsets.diff()


def _check_sizes(dispatch: Dispatch) -> None:
    check_positive(**{"dispatch.num_experts": dispatch.num_experts, "dispatch.top_k": dispatch.top_k})
    num_tokens = dispatch.num_tokens
    if not isinstance(num_tokens, (int, torch.SymInt)) or isinstance(num_tokens, bool):
        raise TypeError(f"dispatch.num_tokens must be an int, got {type(num_tokens).__name__}")
    if num_tokens < 0:
        raise ValueError(f"dispatch.num_tokens must be at least 0, got {num_tokens}")
    check_max_rows(dispatch.max_rows)


def check_is_dispatch(dispatch: object) -> None:
    """Check that ``dispatch`` is a :class:`Dispatch` with tensors of the right shapes; the caller checks their
    contents.
    """
    if not isinstance(dispatch, Dispatch):
        raise TypeError(f"dispatch must be a gossamer.Dispatch, got {type(dispatch).__name__}")
    _check_sizes(dispatch)
    check_shape("dispatch.slots", dispatch.slots, (dispatch.num_rows,), "(T·K,)")
    check_shape("dispatch.offsets", dispatch.offsets, (dispatch.num_experts + 1,), "(E+1,)")
    if dispatch.offsets.device != dispatch.slots.device:
        at, found = dispatch.slots.device, dispatch.offsets.device
        raise ValueError(f"dispatch.offsets must be on the device of dispatch.slots, {at}, got {found}")


def check_dispatch(dispatch: object) -> None:
    """``dispatch`` must be a :class:`Dispatch` with consistent tensors: see :func:`check_groups`.

    Contents are checked once, and again after a tensor was changed in place.
    """
    # Small products take 20 microseconds and run this check each time, so the stored result is compared first, inline.
    if not is_dynamo_compiling():
        try:
            if (checked := dispatch._checked_version) is not None:
                if checked == dispatch.slots._version + dispatch.rows._version + dispatch.offsets._version:
                    return
        except AttributeError:
            pass  # not a dispatch
    if not isinstance(dispatch, Dispatch):
        raise TypeError(f"dispatch must be a gossamer.Dispatch, got {type(dispatch).__name__}")
    _check_sizes(dispatch)
    num_slots = dispatch.num_tokens * dispatch.top_k
    if dispatch.buffer_rows > num_slots:
        raise ValueError(f"dispatch.max_rows must be at most T·K={num_slots}, got {dispatch.max_rows}")
    groups = Groups(dispatch.slots, dispatch.rows, dispatch.offsets)
    check_groups(groups, dispatch.buffer_rows, num_slots, dispatch.num_experts)
    mark(dispatch, groups)


def check_max_rows(max_rows: int | None) -> None:
    """A bound on rows must be an int of at least 0, or None."""
    if max_rows is None:
        return
    if not isinstance(max_rows, (int, torch.SymInt)) or isinstance(max_rows, bool):
        raise TypeError(f"max_rows must be an int or None, got {type(max_rows).__name__}")
    if max_rows < 0:
        raise ValueError(f"max_rows must be at least 0, got {max_rows}")


def dx_rows(slots: torch.Tensor, rows: torch.Tensor, x_shape: torch.Size, x_div: int) -> tuple[torch.Tensor, bool]:
    """The slots for the product that gives dX, and whether its sorted rows must then be summed into rows of x."""
    if x_div == 0:
        return slots[: x_shape[0]], False
    # A product in slot order writes a row for every slot, so it needs all slots.
    return slots, x_div > 1 or slots.shape[0] < rows.shape[0]


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


def _raise_overflow(live: int, max_rows: int) -> None:
    raise ValueError(f"max_rows must be at least the number of slots with an expert, {live}, got {max_rows}")


class ExpertSort(NamedTuple):
    """Arguments of the sort of assignments by expert.

    Attributes:
        expert_ids: ``(T, K)`` int32 or int64; an id of E or more has no expert.
        num_experts: E.
        max_rows: bound on the slots that have an expert, or None.
    """

    expert_ids: torch.Tensor
    num_experts: int
    max_rows: torch.SymInt | None


@functools.cache
def _kernels(backend: str) -> ModuleType:
    if backend == "native":
        from gossamer.cpu_kernels import dispatch
    elif backend == "triton":
        from gossamer.triton_kernels import dispatch
    else:
        from gossamer.cuda_kernels import dispatch
    return dispatch


def _sort(args: ExpertSort, backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    expert_ids, num_experts, max_rows = args
    # The check reads values, so it runs inside the operator, where values exist in traced calls too. The native kernel
    # finds negative ids itself.
    if backend != "native":
        check_no_negative("expert_ids", expert_ids)
    if backend == "reference":
        slots, rows, offsets = dispatch_reference(expert_ids, num_experts)
    else:
        slots, rows, offsets = _kernels(backend).dispatch(expert_ids, num_experts)
    if max_rows is not None and max_rows < slots.shape[0]:
        if offsets.device.type == "cpu" and (live := int(offsets[-1])) > max_rows:
            _raise_overflow(live, max_rows)
        offsets.clamp_(max=max_rows)
    return slots, rows, offsets


def _sort_fake(args: ExpertSort) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = args.expert_ids
    slots = ids.new_empty(ids.numel(), dtype=torch.int32)
    return slots, torch.empty_like(slots), ids.new_empty(args.num_experts + 1, dtype=torch.int32)


_dispatch = define(
    "dispatch", ExpertSort, kernel=_sort, fake=_sort_fake, returns="(Tensor slots, Tensor rows, Tensor offsets)"
)


def sort_ids(ids: torch.Tensor, bound: int, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat positions of nonnegative ``ids (B, J)`` in a stable counting sort, and the start of each id's positions.

    Returns:
        ``(B·J,)`` and ``(bound + 1,)`` int32: positions of id ``i`` are ``[offsets[i]:offsets[i + 1]]`` of the first;
        those of ids from ``bound`` on come last.
    """
    slots, _, offsets = _dispatch(ExpertSort(ids, bound, None), backend)
    return slots, offsets


def _buffer_rows(offsets: torch.Tensor, bound: int) -> int:
    """Rows of buffers: the exact number, at least 1, where the host can read it, else ``bound``."""
    if not is_readable(offsets):
        return bound
    return max(offsets.tolist()[-1], 1)


def dispatch(expert_ids: torch.Tensor, num_experts: int, *, max_rows: int | None = None) -> Dispatch:
    """Sort (token, expert) assignments by expert with a counting sort on the device; nothing is read on the host.

    Expert layers compute and keep buffers of :attr:`Dispatch.buffer_rows` rows, T·K by default. If many slots have no
    expert, give ``max_rows``: buffers then have one row per slot with an expert on the CPU, and ``max_rows`` rows on
    CUDA and in compiled code. On CUDA, slots beyond ``max_rows``, which are the last ones in the order of experts, are
    dropped: ``offsets`` exclude them, they add nothing to any result and get zero gradient. ``(expert_ids <
    num_experts).sum() - offsets[E]`` counts them.

    Args:
        expert_ids: ``(T, K)`` int32 or int64, the experts of each token. An id ``>= num_experts`` means "no expert":
            that slot is dropped. A negative id is an error on the CPU; on CUDA, where finding it would stop the stream,
            its slot is dropped.
        num_experts: E, at least 1.
        max_rows: bound on the slots that have an expert; None for buffers of T·K rows.

    Returns:
        The :class:`Dispatch` that :func:`grouped_matmul` and :func:`expert_mlp` take.

    Raises:
        TypeError: ``expert_ids`` is not an int32 or int64 tensor, or ``num_experts`` or ``max_rows`` is not an int.
        ValueError: wrong rank, K > E, ``num_experts < 1``, ``max_rows < 0``, 2³¹ slots or more, or (on the CPU) a
            negative id or more than ``max_rows`` slots with an expert.
    """
    if in_inference_mode():
        # What torch.inference_mode(False) enters, without its Python, which takes a microsecond.
        with torch._C._InferenceMode(False):
            return dispatch(expert_ids, num_experts, max_rows=max_rows)
    check_index("expert_ids", expert_ids)
    check_shape("expert_ids", expert_ids, (None, None), "(T, K)")
    if not isinstance(num_experts, (int, torch.SymInt)) or isinstance(num_experts, bool):
        raise TypeError(f"num_experts must be an int, got {type(num_experts).__name__}")
    num_tokens, top_k = expert_ids.shape
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if num_experts > MAX_ROWS:
        raise ValueError(f"num_experts must be at most {MAX_ROWS}, got {num_experts}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"expert_ids must have 1 <= K <= num_experts columns, got K={top_k}, num_experts={num_experts}"
        )
    num_slots = num_tokens * top_k
    if num_slots > MAX_ROWS:
        raise ValueError(f"expert_ids must have at most {MAX_ROWS} slots, got T*K = {num_slots}")
    check_max_rows(max_rows)
    bound = num_slots if max_rows is None or max_rows >= num_slots else max(max_rows, 1)
    backend = _backend.resolve("dispatch", expert_ids)
    if max_rows is None or num_slots == 0:
        slots, rows, offsets = _dispatch(ExpertSort(expert_ids, num_experts, None), backend)
    else:
        slots, rows, offsets = _dispatch(ExpertSort(expert_ids, num_experts, bound), backend)
        bound = _buffer_rows(offsets, bound)
    made = Dispatch(slots, rows, offsets, num_tokens, top_k, num_experts, None if bound == num_slots else bound)
    mark(made, (slots, rows, offsets))
    return made
