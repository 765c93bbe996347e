"""Recognise the fused activation that a transformers experts module computes between its two products."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import activations

from gossamer._activation import Activation, as_activation
from gossamer.integrations._activations import activation_name
from gossamer.integrations.surgery import hooked

# Only functions equal to the fused ones in exact arithmetic: gelu_fast and quick_gelu round their constants.
_ACT_CLASSES: dict[type, str] = {
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.AccurateGELUActivation: "gelu_tanh",
    activations.ReLUSquaredActivation: "relu2",
}
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}

# Formulas of gate and up that an ``_apply_gate`` may compute, and the fused activation for each.
_FORMULAS: tuple[tuple[str, Callable], ...] = (
    ("act_fn", lambda self, gate, up: self.act_fn(gate) * up),
    ("swiglu", lambda self, gate, up: F.silu(gate) * up),
    ("swiglu", lambda self, gate, up: gate * torch.sigmoid(gate) * up),
    ("geglu", lambda self, gate, up: F.gelu(gate) * up),
    ("geglu_tanh", lambda self, gate, up: F.gelu(gate, approximate="tanh") * up),
    ("reglu", lambda self, gate, up: F.relu(gate) * up),
    (
        "clamped_swiglu",
        lambda self, gate, up: (
            (up.clamp(-self.limit, self.limit) + 1)
            * gate.clamp(max=self.limit)
            * torch.sigmoid(gate.clamp(max=self.limit) * self.alpha)
        ),
    ),
)
_UNARY = {torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", F.silu: "silu", F.gelu: "gelu", F.relu: "relu"}
_ATTRIBUTE = re.compile(r"self\.(\w+)")


@dataclass(frozen=True)
class Gate:
    """The formula of a class's ``_apply_gate``, in terms of the attributes it reads.

    Attributes:
        function: the ``_apply_gate`` that was read.
        kind: ``"act_fn"`` for ``act_fn(gate)·up``; the name of a gated activation that reads nothing;
            ``"clamped_swiglu"``; or ``"custom"`` for anything else.
        interleaved: whether gate and up alternate along the last dimension.
        alpha: for ``"clamped_swiglu"``, the attribute that holds alpha.
        limit: for ``"clamped_swiglu"``, the attribute that holds the limit.
    """

    function: Callable
    kind: str
    interleaved: bool = False
    alpha: str = ""
    limit: str = ""


class _Term:
    """A symbolic value that records how it is computed. Operations that no formula of the table needs raise an error.

    Factors and summands are sorted, ignoring attribute names, so that each formula has a unique text.
    """

    __hash__ = None

    def __init__(self, text: str, factors: list[str] | None = None) -> None:
        self.text, self._factors = text, factors or [text]

    def __bool__(self) -> bool:
        raise TypeError("a formula has no conditions")

    def __eq__(self, other: object) -> bool:
        raise TypeError("a formula has no conditions")

    def clamp(self, min: object = None, max: object = None) -> _Term:
        return _Term(f"clamp({self.text}, {_text(min)}, {_text(max)})")

    def float(self) -> _Term:
        # The fused kernels compute the activation in float32 in any case.
        return self

    @property
    def dtype(self) -> type:
        return _Term

    def to(self, dtype: object) -> _Term:
        if dtype is not _Term:
            raise TypeError("a formula has no dtype but that of its values")
        return self

    def __neg__(self) -> _Term:
        return _Term(f"-{self.text}")

    def __add__(self, other: object) -> _Term:
        return _Term(f"({' + '.join(_ordered([self.text, _text(other)]))})")

    def __mul__(self, other: object) -> _Term:
        factors = _ordered(self._factors + (other._factors if isinstance(other, _Term) else [_text(other)]))
        return _Term(" * ".join(factors), factors)

    __radd__, __rmul__, add, mul = __add__, __mul__, __add__, __mul__

    def sigmoid(self) -> _Term:
        return torch.sigmoid(self)

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: object, args: tuple = (), kwargs: dict[str, object] | None = None
    ) -> _Term:
        kwargs = kwargs or {}
        if function in (torch.clamp, torch.mul, torch.add):
            first, *rest = args if isinstance(args[0], _Term) else args[::-1]
            return getattr(first, function.__name__)(*rest, **kwargs)
        if len(args) != 1 or any(value for key, value in kwargs.items() if key != "approximate"):
            raise TypeError("a formula calls functions of one value")
        approximate = kwargs.get("approximate", "none")
        name = _UNARY[function] + ("" if approximate == "none" else f"_{approximate}")
        return _Term(f"{name}({args[0].text})")


class _GateUp:
    """The argument of an ``_apply_gate``, which takes it apart in one of two ways."""

    def __init__(self) -> None:
        self.layouts: set[str] = set()

    def chunk(self, chunks: int, dim: int = 0) -> tuple[_Term, _Term]:
        if (chunks, dim) != (2, -1):
            raise TypeError("gate and up are the halves of the last dimension")
        self.layouts.add("halves")
        return _Term("gate"), _Term("up")

    def __getitem__(self, index: object) -> _Term:
        ellipsis, columns = index
        if ellipsis is not Ellipsis or columns.stop is not None or columns.step != 2:
            raise TypeError("gate and up are every other column")
        self.layouts.add("interleaved")
        return _Term({None: "gate", 0: "gate", 1: "up"}[columns.start])


class _Self:
    """Replaces the experts module: provides its activation function, and a term for every attribute."""

    __slots__ = ()

    def __getattr__(self, name: str) -> object:
        if name == "act_fn":
            return lambda value: _Term(f"act_fn({value.text})")
        return _Term(f"self.{name}")


def _text(value: object) -> str:
    if isinstance(value, _Term):
        return value.text
    return "None" if value is None else repr(float(value))


def _ordered(texts: list[str]) -> list[str]:
    return sorted(texts, key=lambda text: _ATTRIBUTE.sub("self", text))


def _normal_form(term: _Term) -> tuple[str, list[str]]:
    """The text with attributes numbered as they first appear, and their names in that order."""
    names = list(dict.fromkeys(_ATTRIBUTE.findall(term.text)))
    return _ATTRIBUTE.sub(lambda match: f"self.{names.index(match[1])}", term.text), names


@functools.cache
def _known() -> dict[str, tuple[str, list[str]]]:
    """Kind and attributes of each formula of the table, by its normal form."""
    forms = {}
    for kind, formula in _FORMULAS:
        text, names = _normal_form(formula(_Self(), _Term("gate"), _Term("up")))
        forms[text] = kind, names
    return forms


def _read(function: Callable) -> Gate:
    argument = _GateUp()
    text, names = _normal_form(function(_Self(), argument))
    if text not in _known() or len(argument.layouts) != 1:
        return Gate(function, "custom")
    kind, roles = _known()[text]
    return Gate(function, kind, "interleaved" in argument.layouts, **dict(zip(roles, names, strict=True)))


_gates: dict[type, Gate] = {}


@torch.compiler.assume_constant_result
def gate_of(cls: type) -> Gate:
    """The formula of ``cls._apply_gate``, found once per class by calling it with symbolic terms instead of tensors.

    The formula is looked up in the table. If it is missing there, or the function does anything except arithmetic on
    gate, up, ``act_fn`` and attributes, the kind is ``"custom"``.
    """
    function = cls._apply_gate
    gate = _gates.get(cls)
    if gate is None or gate.function is not function:
        try:
            gate = _read(function)
        except Exception:  # The gate is foreign code; an error of any kind means that it is not recognised.
            gate = Gate(function, "custom")
        _gates[cls] = gate
    return gate


def _act_name(act_fn: object) -> str | None:
    """Name of the ungated activation equal to ``act_fn``, or None."""
    name = activation_name(act_fn)
    # A hook must see the activation, which a fused kernel never writes.
    if name is not None or not isinstance(act_fn, nn.Module) or hooked(act_fn):
        return name
    return _ACT_CLASSES.get(type(act_fn))


def gated_activation(act_fn: object) -> Activation | None:
    """The fused activation equal to ``act_fn(gate)·up``, or None."""
    name = _GATED.get(_act_name(act_fn))
    return None if name is None else as_activation(name)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def fused_activation(experts: nn.Module) -> tuple[Activation | None, bool, str]:
    """The fused activation that an experts module currently computes.

    Args:
        experts: an instance of a class decorated with ``use_experts_implementation``.

    Returns:
        ``(activation, interleaved, reason)``; ``activation`` is None if no fused activation matches, and ``reason``
        says why.
    """
    if getattr(experts, "has_post_expert_norm", False):
        return None, False, "a norm follows each expert"
    if not getattr(experts, "has_gate", True):
        name = _act_name(experts.act_fn)
        if name is None:
            return None, False, "no fused kernel for its act_fn"
        return as_activation(name), False, ""
    if "_apply_gate" in experts.__dict__:
        return None, False, "its _apply_gate was replaced on the instance"
    gate = gate_of(type(experts))
    if gate.kind == "custom":
        return None, False, "no fused kernel for its _apply_gate"
    if gate.kind == "act_fn":
        activation = gated_activation(experts.act_fn)
        if activation is None:
            return None, False, "no fused kernel for its act_fn"
        return activation, gate.interleaved, ""
    if gate.kind != "clamped_swiglu":
        return as_activation(gate.kind), gate.interleaved, ""
    alpha, limit = getattr(experts, gate.alpha), getattr(experts, gate.limit)
    if not (_number(alpha) and _number(limit) and limit > 0):
        return (
            None,
            False,
            f"{gate.alpha} and {gate.limit} must be numbers, and the limit positive, for the fused kernel",
        )
    return Activation("clamped_swiglu", float(alpha), float(limit)), gate.interleaved, ""
