"""Give modules of other models a subclass of their class, and restore their class.

Adapters that work this way derive the mixin of their subclasses from :class:`Swapped`, and use :func:`undo_obstacle`
and :func:`undo`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from gossamer.integrations import surgery


class Swapped:
    """The mixin that marks a subclass as gossamer's; it comes directly before the module's original class.

    Instances are pickled with the original class, since the subclass is created on demand.
    """

    @staticmethod
    def class_of(theirs: type) -> type | None:
        """The subclass with which gossamer computes a class, or None."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: int) -> tuple:
        ours = type(self)
        return _make, (ours.__mro__[ours.__mro__.index(Swapped) - 1], original(ours)), self.__dict__


def _make(mixin: type[Swapped], theirs: type) -> nn.Module:
    ours = mixin.class_of(theirs)
    return ours.__new__(ours)


def original(cls: type) -> type:
    """The original class of a class that gossamer created; any other class itself."""
    return cls.__mro__[cls.__mro__.index(Swapped) + 1] if Swapped in cls.__mro__ else cls


def survey(
    found: Iterable[tuple[str, nn.Module]], obstacle: Callable[[str, nn.Module], str | None], strict: bool, kind: str
) -> surgery.Survey:
    """:func:`surgery.survey`; a ValueError that names ``kind`` when ``strict`` and a module cannot be switched."""
    made = surgery.survey(found, obstacle)
    if strict and made.skipped:
        raise ValueError(f"model has {kind} that cannot be switched: {surgery.reasons(made.skipped)}")
    return made


def switch(module: nn.Module, adapter: str, mixin: type[Swapped]) -> None:
    """Give the module the subclass of its class, and record ``adapter`` as the adapter that did."""
    surgery.mark(module, adapter)
    module.__class__ = mixin.class_of(type(module)) or type(module)


def undo_obstacle(module: nn.Module, before: None) -> str | None:
    """Why the module cannot get its class back, as when something else changed its class again."""
    if isinstance(module, Swapped):
        return None
    return f"must have the class that replace gave it to be restored, got {type(module).__name__}"


def undo(module: nn.Module, before: None) -> nn.Module:
    """Give the module its class back."""
    module.__class__ = original(type(module))
    return module
