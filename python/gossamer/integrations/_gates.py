"""Recognising which fused activation an experts module of transformers computes between its two products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import activations

from gossamer._activation import Activation, activate_reference
from gossamer.integrations._activations import activation_name, hooked

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


@dataclass(frozen=True)
class Gate:
    """The formula of a class's ``_apply_gate``, in terms of the attributes it reads.

    Attributes:
        function: the ``_apply_gate`` that was probed.
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


class _Stand:
    """Stands in for the module while its gate is probed: records what is read and serves the values given."""

    def __init__(self, act_fn: nn.Module, numbers: dict[str, float]) -> None:
        self.__dict__.update(_act_fn=act_fn, _numbers=numbers, _reads=[])

    def __getattr__(self, name: str) -> object:
        if name not in self._reads:
            self._reads.append(name)
        return self._act_fn if name == "act_fn" else self._numbers.get(name, 1.5)


def _grid() -> tuple[torch.Tensor, torch.Tensor]:
    """Every pair of gate and up values on a signed logarithmic scale up to the largest float16."""
    positive = torch.logspace(-3, 4.8, 40, dtype=torch.float32, device="cpu")
    line = torch.cat([-positive.flip(0), torch.zeros(1, device="cpu", dtype=torch.float32), positive])
    gate, up = torch.meshgrid(line, line, indexing="ij")
    return gate.reshape(-1), up.reshape(-1)


def _same(function: Callable, stand: _Stand, activation: Activation, interleaved: bool) -> bool:
    """Whether ``function`` equals ``activation`` on the whole grid, to float32 rounding."""
    gate, up = _grid()
    # Two rows, so that a split along the wrong dimension cannot pass.
    gate, up = torch.stack([gate, gate.roll(7)]), torch.stack([up, up.roll(11)])
    preact = torch.stack([gate, up], -1).flatten(1) if interleaved else torch.cat([gate, up], -1)
    out = function(stand, preact)
    if not isinstance(out, torch.Tensor) or out.shape != gate.shape:
        return False
    wanted = activate_reference(preact.double(), activation, interleaved)
    # 1 + tanh and the like cancel while the gate is small and negative; from -8 on they are zero.
    up_limit = activation.limit if activation.name == "clamped_swiglu" else None
    scale = gate.abs().clamp(max=8.0) * (up.abs().clamp(max=up_limit) + 1 if up_limit else up.abs() + 1)
    return bool(((out.double() - wanted).abs() <= 1e-5 * wanted.abs() + 1e-6 * scale).all())


def _classify(function: Callable) -> Gate:
    stand = _Stand(nn.SiLU(), {})
    function(stand, torch.zeros(1, 4, device="cpu", dtype=torch.float32))
    reads = [name for name in stand._reads if name != "act_fn"]
    for interleaved in (False, True):
        if not reads and "act_fn" in stand._reads:
            pairs = ((nn.SiLU(), "swiglu"), (nn.ReLU(), "reglu"))
            if all(_same(function, _Stand(act, {}), Activation(name), interleaved) for act, name in pairs):
                return Gate(function, "act_fn", interleaved)
        elif not reads:
            for name in _GATED.values():
                if _same(function, stand, Activation(name), interleaved):
                    return Gate(function, name, interleaved)
        elif len(reads) == 2:
            for alpha, limit in (reads, reads[::-1]):
                # Two sets of constants, so that the attributes are proven to be alpha and limit.
                trials = ((1.25, 3.0), (0.5, 11.0))
                if all(
                    _same(
                        function,
                        _Stand(nn.Tanh(), {alpha: a, limit: b}),
                        Activation("clamped_swiglu", a, b),
                        interleaved,
                    )
                    for a, b in trials
                ):
                    return Gate(function, "clamped_swiglu", interleaved, alpha, limit)
    return Gate(function, "custom")


_gates: dict[type, Gate] = {}


@torch.compiler.assume_constant_result
def gate_of(cls: type) -> Gate:
    """What ``cls._apply_gate`` computes, found once a class by running it on a stand-in with constants of our choice.

    A function that reads anything but ``act_fn`` and plain numbers, or that differs from every fused activation
    anywhere on the grid, is ``"custom"``.
    """
    function = cls._apply_gate
    gate = _gates.get(cls)
    if gate is None or gate.function is not function:
        # Under torch.export the caller's modes would hand the probe fake tensors, which have no values.
        with _disable_current_modes(), torch.no_grad():
            try:
                gate = _classify(function)
            except Exception:  # the gate is foreign code: whatever it raises on the stand-in, it is not recognised
                gate = Gate(function, "custom")
        _gates[cls] = gate
    return gate


def _act_name(act_fn: object) -> str | None:
    """Name of the ungated activation that ``act_fn`` is, or None."""
    name = activation_name(act_fn)
    # A hook must see the activation, which a fused kernel never writes.
    if name is not None or not isinstance(act_fn, nn.Module) or hooked(act_fn):
        return name
    return _ACT_CLASSES.get(type(act_fn))


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def fused_activation(experts: nn.Module) -> tuple[Activation | None, bool, str]:
    """The fused activation an experts module computes now.

    Args:
        experts: an instance of a class decorated with ``use_experts_implementation``.

    Returns:
        ``(activation, interleaved, reason)``; ``activation`` is None where no fused one fits, and ``reason`` says why.
    """
    if getattr(experts, "has_post_expert_norm", False):
        return None, False, "a norm follows each expert"
    if not getattr(experts, "has_gate", True):
        name = _act_name(experts.act_fn)
        if name is None:
            return None, False, "no fused kernel for its act_fn"
        return Activation(name), False, ""
    if "_apply_gate" in experts.__dict__:
        return None, False, "its _apply_gate was replaced on the instance"
    gate = gate_of(type(experts))
    if gate.kind == "custom":
        return None, False, "no fused kernel for its _apply_gate"
    if gate.kind == "act_fn":
        name = _GATED.get(_act_name(experts.act_fn))
        if name is None:
            return None, False, "no fused kernel for its act_fn"
        return Activation(name), gate.interleaved, ""
    if gate.kind != "clamped_swiglu":
        return Activation(gate.kind), gate.interleaved, ""
    alpha, limit = getattr(experts, gate.alpha), getattr(experts, gate.limit)
    if not (_number(alpha) and _number(limit) and limit > 0):
        return (
            None,
            False,
            f"{gate.alpha} and {gate.limit} must be numbers, and the limit positive, for the fused kernel",
        )
    return Activation("clamped_swiglu", float(alpha), float(limit)), gate.interleaved, ""
