"""Operators over records: a primitive's arguments are declared once and passed as one object.

A record is a ``NamedTuple`` whose annotations are types that torch's dispatcher knows: ``torch.Tensor``, ``int``,
``float``, ``bool``, ``str``, ``torch.dtype``, ``torch.SymInt`` for an int that a compiler may keep symbolic, lists of
these, any of them ``| None``, or another record or frozen dataclass. :func:`define` writes the flat schema from it, so
that the fake kernel, autograd and the kernel families all take the record itself, and gradients are identified by field
name.

A primitive's file has, in this order (``ops/gather_max.py`` is an example with nested records, ``ops/activate.py``
one without):

1. the record, whose docstring gives shapes and dtypes; arguments that several primitives share, such as the lists of
   ids of :class:`gossamer.ops._bags.Bags`, are a nested record;
2. ``_kernels(backend)``, which imports a family's module by its name;
3. the kernel ``(args, backend)`` and the fake ``(args)``, handed to :func:`define`, and those of a backward pass with
   a kernel of its own to :func:`define_gradients`;
4. ``save`` and ``backward`` for :meth:`Operator.differentiate`;
5. the public function: its checks, the record, one call.

A field called ``forward`` is the record of a forward pass as saved for its backward pass: its tensors may be None.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import is_grad_enabled
from torch._C import _any_requires_grad
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from gossamer.ops._registration import check_strided, is_plain, on_its_device, register, register_autograd

_SCHEMA_TYPES = {
    torch.Tensor: "Tensor",
    int: "int",
    torch.SymInt: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
    list[torch.Tensor]: "Tensor[]",
    list[int]: "int[]",
    list[float]: "float[]",
    list[bool]: "bool[]",
    list[str]: "str[]",
}


def _field_types(record: type) -> dict[str, Any]:
    """A record's fields in order, and their annotations."""
    hints = typing.get_type_hints(record)
    if dataclasses.is_dataclass(record):
        return {field.name: hints[field.name] for field in dataclasses.fields(record)}
    return {name: hints[name] for name in record._fields}


def _schema_type(hint: Any) -> str | None:
    """The name of a type in a schema, or None if it has none."""
    suffix = ""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        if len(options) != 1:
            return None
        hint, suffix = options[0], "?"
    return _SCHEMA_TYPES[hint] + suffix if hint in _SCHEMA_TYPES else None


def _tuple_getter(getter: type, keys: Sequence) -> Callable[[Any], tuple]:
    """``operator.attrgetter`` or ``itemgetter`` for any number of keys, always returning a tuple."""
    if len(keys) > 1:
        return getter(*keys)
    if not keys:
        return lambda _: ()
    one = getter(keys[0])
    return lambda value: (one(value),)


def _maker(record: type) -> Callable[[tuple], Any]:
    """A function from the tuple of a record's fields to the record."""
    if dataclasses.is_dataclass(record):
        return lambda fields: record(*fields)
    return functools.partial(tuple.__new__, record)


class Layout:
    """Converts a record to the flat arguments of an operator and back.

    Args:
        record: a ``NamedTuple`` class, or a frozen dataclass.

    Attributes:
        paths: the flat arguments' names, a nested record's fields as ``"outer.inner"``.
        schema_types: their types.
        flatten: from a record to the tuple of its flat arguments.
        restore: from a tuple of flat arguments to the record.

    Raises:
        TypeError: a field has a type that schemas do not support.
    """

    def __init__(self, record: type) -> None:
        self.paths: list[str] = []
        self.schema_types: list[str] = []
        self._record = record
        self._parts: list[Layout | None] = []  # of the fields; None where a field is one flat argument
        for name, hint in _field_types(record).items():
            schema_type = _schema_type(hint)
            if schema_type is not None:
                self._parts.append(None)
                self.paths.append(name)
                self.schema_types.append(schema_type)
                continue
            if not isinstance(hint, type) or not (hasattr(hint, "_fields") or dataclasses.is_dataclass(hint)):
                raise TypeError(f"{record.__name__}.{name} has a type that no operator takes: {hint}")
            inner = Layout(hint)
            if name == "forward":
                inner.schema_types = [kind + "?" if kind == "Tensor" else kind for kind in inner.schema_types]
            self._parts.append(inner)
            self.paths += [f"{name}.{path}" for path in inner.paths]
            self.schema_types += inner.schema_types
        self.flatten = _tuple_getter(attrgetter, self.paths)
        self.restore = self.restorer(range(len(self.paths)))

    def restorer(self, places: Sequence[int]) -> Callable[[tuple], Any]:
        """A function that makes the record from a tuple whose item ``places[i]`` is the flat argument ``i``."""
        steps: list[tuple[Callable, Callable]] = []
        self._add_steps(steps, list(places), len(places))

        def restore(values: tuple) -> Any:
            for fields, make in steps:
                values += (make(fields(values)),)
            return values[-1]

        return restore

    def _add_steps(self, steps: list, places: list[int], size: int) -> int:
        """Add the steps that make this record; each reads the tuple, to which earlier steps have appended records.

        Takes the positions of its flat arguments from the front of ``places``; returns the position of the record.
        """
        fields = [places.pop(0) if inner is None else inner._add_steps(steps, places, size) for inner in self._parts]
        steps.append((_tuple_getter(itemgetter, fields), _maker(self._record)))
        return size + len(steps) - 1

    def schema(self, mutates: Iterable[str]) -> str:
        """The flat arguments in schema syntax, with those of ``mutates`` marked as written to."""
        aliases = {path: chr(ord("a") + i) for i, path in enumerate(mutates)}
        if unknown := set(aliases) - set(self.paths):
            raise TypeError(f"mutates names no fields: {sorted(unknown)}")
        arguments = []
        for path, schema_type in zip(self.paths, self.schema_types, strict=True):
            if path in aliases:
                schema_type = schema_type.replace("Tensor", f"Tensor({aliases[path]}!)", 1)
            arguments.append(f"{schema_type} {path.replace('.', '_')}")
        return ", ".join(arguments)


def _counting_changes(kernel: Callable, written: Callable[[Any], tuple]) -> Callable:
    """The kernel, followed by a count of the changes to what it wrote, which autograd checks in saved tensors."""

    @functools.wraps(kernel)
    def counted(args, backend):
        result = kernel(args, backend)
        increment_version([tensor for tensor in written(args) if tensor is not None])
        return result

    return counted


def _of_tensors(results: Any, values: tuple) -> Any:
    """The results with empty tensors instead of None, which the dispatcher cannot return."""
    if not isinstance(results, tuple) or all(result is not None for result in results):
        return results
    like = next(value for value in values if isinstance(value, torch.Tensor))
    return tuple(like.new_empty(0) if result is None else result for result in results)


def _walk(args: Any, steps: tuple[str, ...]) -> Any:
    for name in steps:
        args = getattr(args, name)
    return args


class Operator:
    """An operator whose arguments are one record; made by :func:`define`.

    Calling it with a record and the name of a backend runs it under autograd. If torch's dispatcher would only
    differentiate and call the kernel, the record is passed directly to the kernel.
    """

    def __init__(self, name: str, record: type, kernel: Callable, fake: Callable, returns: str, mutates: tuple) -> None:
        self.name = name
        self._layout = layout = Layout(record)
        restore = layout.restore
        if mutates:
            kernel = _counting_changes(kernel, _tuple_getter(attrgetter, mutates))

        def flat_kernel(*values):
            return _of_tensors(kernel(restore(values[:-1]), values[-1]), values)

        def flat_fake(*values):
            return _of_tensors(fake(restore(values[:-1])), values)

        schema = f"{name}({layout.schema(mutates)}, str backend) -> {returns}"
        self._dispatched = register(schema, flat_kernel, flat_fake)
        self._kernel, self._kernel_there = kernel, on_its_device(kernel)
        self._steps = tuple(tuple(path.split(".")) for path in layout.paths)
        self._tensor_places = [i for i, kind in enumerate(layout.schema_types) if kind in ("Tensor", "Tensor?")]
        self._tensor_paths = [layout.paths[i] for i in self._tensor_places]
        self._tensors = _tuple_getter(attrgetter, self._tensor_paths)
        self._apply: Callable | None = None
        self._direct = not any("Tensor[]" in kind for kind in (*layout.schema_types, returns))

    def __call__(self, args: Any, backend: str) -> Any:
        if is_compiling():
            # torch.compile traces getattr, but not operator.attrgetter.
            return self._dispatched(*[_walk(args, steps) for steps in self._steps], backend)
        tensors = self._tensors(args)
        given = [tensor for tensor in tensors if tensor is not None]
        if not self._direct or not is_plain(given):
            check_strided(self._tensor_paths, tensors)
            return self._dispatched(*self._layout.flatten(args), backend)
        kernel = self._kernel if given[0].is_cpu else self._kernel_there
        if not (is_grad_enabled() and _any_requires_grad(*given)):
            return kernel(args, backend)
        if self._apply is None:
            return self._dispatched(*self._layout.flatten(args), backend)
        flags = tuple([tensor is not None and tensor.requires_grad for tensor in tensors])
        return self._apply(*compress(tensors, flags), flags, kernel, tensors, args, backend)

    def differentiate(self, save: Callable, backward: Callable) -> None:
        """Give the operator a backward pass.

        Args:
            save: ``(ctx, args, output) -> (args, *tensors)``, called after the forward pass: the record for the
                backward pass, with None instead of tensors that it does not need, and additional tensors for it.
                ``ctx`` is autograd's context, with the attribute ``needs``: the names of the fields that need a
                gradient.
            backward: ``(ctx, args, tensors, *gradients of outputs) -> {name: gradient}`` for the names in
                ``ctx.needs``. Names that are missing or mapped to None get no gradient. ``ctx.backend`` is the backend
                of the forward pass.

        Names are fields of the record, or ``"outer.inner"`` for a field of a nested record.
        """
        layout, tensors_of, num_tensors = self._layout, self._tensors, len(self._tensor_places)
        tensor_paths = self._tensor_paths
        other_places = [i for i in range(len(layout.paths)) if i not in self._tensor_places]
        others_of = _tuple_getter(attrgetter, [layout.paths[i] for i in other_places])
        # The position of each argument in the list of tensors followed by other arguments.
        parted = self._tensor_places + other_places
        restore = layout.restorer([parted.index(i) for i in range(len(parted))])
        tensor_flags = _tuple_getter(itemgetter, self._tensor_places)

        @functools.cache
        def named(flags: tuple[bool, ...]) -> tuple[list[str], frozenset[str]]:
            names = list(compress(tensor_paths, flags))
            return names, frozenset(names)

        def keep(ctx, args, tensors, backend, output):
            ctx.backend = backend
            kept, *more = save(ctx, args, output)
            ctx.others = others_of(kept)
            ctx.save_for_backward(*(tensors if kept is args else tensors_of(kept)), *more)

        def found(ctx, gradients):
            saved = ctx.saved_tensors
            args = restore(saved[:num_tensors] + ctx.others)
            return backward(ctx, args, saved[num_tensors:], *gradients)

        def setup_context(ctx, inputs, output):
            args, backend = layout.restore(inputs[:-1]), inputs[-1]
            _, ctx.needs = named(tensor_flags(ctx.needs_input_grad))
            keep(ctx, args, tensors_of(args), backend, output)

        def differentiate(ctx, *gradients):
            by_name = found(ctx, gradients)
            return *map(by_name.get, layout.paths), None

        register_autograd(self.name, differentiate, setup_context)

        class Direct(torch.autograd.Function):
            """The same operator without the dispatcher. Its inputs are the tensors that require a gradient, then the
            five that ``forward`` unpacks.
            """

            @staticmethod
            def forward(ctx, *inputs):
                flags, kernel, tensors, args, backend = inputs[-5:]
                # Otherwise autograd would refuse in-place changes of results that are views of a kernel's buffers.
                with torch._C._AutoDispatchBelowADInplaceOrView():
                    output = kernel(args, backend)
                ctx.names, ctx.needs = named(flags)
                keep(ctx, args, tensors, backend, output)
                return output

            @staticmethod
            def backward(ctx, *gradients):
                by_name = found(ctx, gradients)
                return *map(by_name.get, ctx.names), None, None, None, None, None

        # torch.autograd.Function.apply without support for torch.func transformations, which the caller has excluded.
        self._apply = super(torch.autograd.Function, Direct).apply


def define(
    name: str, record: type, *, kernel: Callable, fake: Callable, returns: str, mutates: Iterable[str] = ()
) -> Operator:
    """Define the operator ``gossamer::NAME`` over a record of arguments.

    Args:
        name: of the operator.
        record: the ``NamedTuple`` of its arguments. The schema has them flat, then ``str backend``.
        kernel: ``(args, backend) -> tensors``, for CPU and CUDA; it runs with the first tensor's device as the current
            device. With several results, it may return None for one of them, which the dispatcher turns into an empty
            tensor.
        fake: ``args -> tensors``, the shape-only implementation.
        returns: the results as a schema lists them, such as ``"(Tensor y, Tensor preact)"``.
        mutates: names of the fields that the kernel writes to; their version counters are incremented for autograd.
            Such an operator has no derivative.

    Raises:
        TypeError: a field has a type that schemas do not support, or ``mutates`` names an unknown field.
    """
    return Operator(name, record, kernel, fake, returns, tuple(mutates))


def define_gradients(
    name: str,
    record: type,
    arguments: Sequence[str],
    *,
    kernel: Callable[[Any, str], dict[str, torch.Tensor]],
    fake: Callable[[Any], dict[str, torch.Tensor]],
    mutates: Iterable[str] = (),
) -> Callable[[Any, str], dict[str, torch.Tensor]]:
    """Define the operator of a backward pass, whose results are gradients by their arguments' names.

    Args:
        name: of the operator.
        record: of its arguments, as for :func:`define`; its field ``needs: list[str]`` names the gradients wanted.
        arguments: names of all differentiable arguments, in the order of the operator's results.
        kernel: ``(args, backend) -> gradients``, only those needed.
        fake: ``args -> gradients``, the shape-only implementation.
        mutates: as for :func:`define`.

    Returns:
        A function ``(args, backend) -> gradients``, those needed.
    """

    def listed(found: dict[str, torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        return tuple(map(found.get, arguments))

    results = ", ".join(f"Tensor d{argument.replace('.', '_')}" for argument in arguments)
    operator = define(
        name,
        record,
        kernel=lambda args, backend: listed(kernel(args, backend)),
        fake=lambda args: listed(fake(args)),
        returns=f"({results})",
        mutates=mutates,
    )

    def gradients(args: Any, backend: str) -> dict[str, torch.Tensor]:
        found = dict(zip(arguments, operator(args, backend), strict=True))
        return {argument: found[argument] for argument in args.needs}

    return gradients
