"""Modules of other people's models that are given a subclass of their own class, and get their class back.

Adapters that switch modules so derive the mixin of their subclasses from :class:`Swapped`, and take
:func:`undo_obstacle` and :func:`undo` as theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from gossamer.integrations import surgery


class Swapped:
    """The mixin that marks a subclass as gossamer's; it stands right before the class that the module had.

    Instances are pickled by that class, since the subclass is made when it is needed.
    """

    @staticmethod
    def class_of(theirs: type) -> type | None:
        """The subclass by which gossamer computes a class, or None where there is none."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: int) -> tuple:
        ours = type(self)
        return _make, (ours.__mro__[ours.__mro__.index(Swapped) - 1], original(ours)), self.__dict__


def _make(mixin: type[Swapped], theirs: type) -> nn.Module:
    ours = mixin.class_of(theirs)
    return ours.__new__(ours)


def original(cls: type) -> type:
    """The class below one that gossamer made; any other class itself."""
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
    """Give the module the subclass of its class, and note that ``adapter`` did."""
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
