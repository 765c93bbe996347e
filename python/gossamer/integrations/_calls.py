"""State that belongs to one running call of a model, separate from calls in other threads."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType

import torch
from torch.compiler import is_dynamo_compiling

_values: ContextVar[Mapping[Slot, object]] = ContextVar("gossamer_calls", default=MappingProxyType({}))
# Under this key torch passes the contextvars of the thread that called backward() to autograd's threads.
_BACKWARD_CONTEXT = "context"
# Before torch 2.13, torch.compile does not trace again when the value in a thread's local changes.
_GUARDS_LOCALS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


class _Local(threading.local):
    value: object = None


def _current(slot: Slot) -> object:
    """The slot's value in the running thread and task."""
    values = _values.get()
    if not values and torch._C._is_key_in_tls(_BACKWARD_CONTEXT):
        values = torch._C._get_obj_in_tls(_BACKWARD_CONTEXT).get(_values, values)
    return values.get(slot)


@functools.cache
def _between_graphs() -> Callable[[Slot], object]:
    """:func:`_current` outside graphs. Made only when it is needed, since it imports torch's compiler, with Triton."""
    return torch.compiler.disable(
        _current, reason="graphs guard values of threads only, which torch before 2.13 and asyncio tasks do not have"
    )


def _in_task() -> bool:
    """Whether asyncio runs this code, and may run other tasks of this thread before it ends."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class Slot:
    """Holds one value of the running call; None outside calls.

    Each thread and each asyncio task sees its own value. A backward pass sees the value of the thread that called it,
    even if autograd runs it in other threads. Code traced by ``torch.compile`` sees the value of its thread, and is
    traced again for another value. The graph breaks where it reads the value before torch 2.13, and once a value was
    assigned to a block of an asyncio task, in which other tasks may run. Copied and unpickled slots are new slots.
    """

    def __init__(self) -> None:
        self._local = _Local()
        # Reads the value for compiled code; None while a guard on the thread's value does.
        self._read = None if _GUARDS_LOCALS else _between_graphs()

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        return Slot, ()

    def get(self) -> object:
        """The value, or None."""
        if is_dynamo_compiling():
            return self._local.value if self._read is None else self._read(self)
        return _current(self)

    def assign(self, value: object, *, user_block: bool = False) -> None:
        """Set the value until the innermost :func:`scope` ends.

        Args:
            value: the value.
            user_block: whether the scope encloses code of the user, which in an asyncio task may await.
        """
        _values.get()[self] = value
        self._local.value = value
        if user_block and self._read is None and _in_task():
            self._read = _between_graphs()


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Values assigned to slots inside the block are dropped when it ends."""
    before = _values.get()
    values = dict(before)
    token = _values.set(values)
    try:
        yield
    finally:
        _values.reset(token)
        for slot in values:
            slot._local.value = before.get(slot)


def in_backward() -> bool:
    """Whether this code runs inside a backward pass, as when gradient checkpointing recomputes a layer."""
    return not is_dynamo_compiling() and torch._C._current_graph_task_id() != -1


class Running:
    """Counts running calls, so that a change can wait for them to end, or fail while they run."""

    def __init__(self) -> None:
        self._changed, self._changing = threading.Condition(), threading.Lock()
        self._calls: list[object] = []

    def __reduce__(self) -> tuple[type[Running], tuple[()]]:
        return Running, ()

    @contextlib.contextmanager
    def call(self, kind: object = None, refused_beside: str = "") -> Iterator[None]:
        """Run the block as one call of a kind.

        Args:
            kind: any comparable value.
            refused_beside: the error message if calls of another kind are running; empty to allow them.

        Raises:
            ValueError: with the message ``refused_beside``.
        """
        with self._changed:
            if refused_beside and any(other != kind for other in self._calls):
                raise ValueError(refused_beside)
            self._calls.append(kind)
        try:
            yield
        finally:
            with self._changed:
                self._calls.remove(kind)
                self._changed.notify_all()

    @contextlib.contextmanager
    def none(self) -> Iterator[None]:
        """Run the block when no call is running; calls that start in the meantime wait for it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._calls)
            yield

    def change(self) -> threading.Lock:
        """A lock for changes that may happen during calls: one change at a time."""
        return self._changing
