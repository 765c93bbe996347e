"""Quantised expert weights as part of a module: buffers that keep their dtypes."""

from __future__ import annotations

import threading

import torch
from torch import nn
from torch.compiler import is_compiling

from gossamer._panels import PANELS, ROWS, gain_from_panels
from gossamer.ops.quantized_expert_weight import QuantizedExpertWeight

# The buffer that holds the codes in each layout; the other is None.
_BUFFERS = {ROWS: "data", PANELS: "panels"}
# Held while codes go from one buffer to the other.
_MOVING = threading.RLock()


class QuantizedExpertStack(nn.Module):
    """Holds a :class:`gossamer.QuantizedExpertWeight` instead of an expert layer's parameter.

    Codes and scales are buffers, saved with the state; they move with the module and keep their dtypes when it is cast.

    On the CPU, the first product without gradients moves the codes into panels, which products of few rows read
    fastest (:meth:`gossamer.QuantizedExpertWeight.to_layout`). The stack then has a buffer ``panels`` instead of
    ``data``, of the same size; it holds both only during the copy. Reading ``data`` or the state, copying, pickling,
    moving to another device or dtype, and :meth:`weight` move the codes back first, until the next product. Codes that
    other objects refer to, or that are in shared memory, stay in ``data``.

    Args:
        weight: what to hold.

    Attributes:
        data: the codes.
        scale: the scales.
        format: how they are read.
        activations: how products take their other operand; it may be set, and is not part of the state.
    """

    def __init__(self, weight: QuantizedExpertWeight) -> None:
        super().__init__()
        self.format, self.activations = weight.format, weight.activations
        self.register_buffer("data", weight.to_layout(ROWS).data)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("panels", None, persistent=False)

    def weight(self) -> QuantizedExpertWeight:
        """The weight ``(E, N, C)``, over the buffers themselves, its codes row after row."""
        self._arrange(ROWS)
        return self._held()

    def for_products(self) -> QuantizedExpertWeight:
        """The weight in the layout that products read fastest."""
        in_rows = self._buffers.get("panels") is None
        if in_rows and not torch.is_grad_enabled() and gain_from_panels(self._buffers, "data"):
            self._arrange(PANELS)
        return self._held() if is_compiling() else self._checked()

    def _held(self) -> QuantizedExpertWeight:
        # Another thread may move the codes between the two reads, but one of the buffers holds them at any time.
        while True:
            for layout, name in _BUFFERS.items():
                codes = self._buffers.get(name)
                if codes is not None:
                    return QuantizedExpertWeight(codes, self._buffers["scale"], self.format, self.activations, layout)

    def _checked(self) -> QuantizedExpertWeight:
        """What :meth:`_held` returns, made and checked once while the codes lie in panels."""
        codes, scale, held = self._buffers.get("panels"), self._buffers["scale"], self.__dict__.get("_in_panels")
        if held is not None and held.data is codes and held.scale is scale and self._buffers.get("data") is None:
            if held.activations == self.activations and held.format == self.format:
                return held
        held = self._held()
        if held.layout == PANELS:
            self.__dict__["_in_panels"] = held
        return held

    def _arrange(self, layout: str) -> None:
        """Move the codes into a layout's buffer."""
        name, other = _BUFFERS[layout], _BUFFERS[ROWS if layout == PANELS else PANELS]
        buffers = self.__dict__.get("_buffers", {})
        # Both buffers are set while torch.func.functional_call substitutes other codes.
        if buffers.get(other) is None or buffers.get(name) is not None:
            return
        # Buffers made in inference mode could not be used in training later.
        with _MOVING, torch.inference_mode(False), torch.no_grad():
            if buffers.get(name) is None:
                buffers[name] = self._held().to_layout(layout).data
                buffers[other] = None
                self.__dict__.pop("_in_panels", None)

    def __getattr__(self, name: str):
        if name == "data":
            self._arrange(ROWS)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "data":
            self._arrange(ROWS)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict:
        self._arrange(ROWS)
        return {name: value for name, value in self.__dict__.items() if name != "_in_panels"}

    def _apply(self, fn, recurse=True):
        self._arrange(ROWS)
        for name, buffer in self._buffers.items():
            if buffer is None:
                continue
            moved = fn(buffer)
            self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self._arrange(ROWS)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        self._arrange(ROWS)
        # Copying into a buffer converts dtypes, which would reinterpret codes of another format as numbers.
        for name, buffer in self._buffers.items():
            given = state_dict.get(prefix + name)
            if isinstance(given, torch.Tensor) and buffer is not None and given.dtype != buffer.dtype:
                error_msgs.append(
                    f"{prefix}{name} must be {buffer.dtype}, as {self.format} is held here, got {given.dtype}; "
                    "gossamer.load_quantized_experts takes any format"
                )
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        """Format and sizes."""
        e, n, c = self._held().shape
        sizes = f"{self.format}, num_experts={e}, out={n}, in={c}"
        return sizes if self.activations == "float" else f"{sizes}, activations={self.activations}"


def expert_weight(held: torch.Tensor | QuantizedExpertStack, transposed: bool) -> torch.Tensor | QuantizedExpertWeight:
    """An expert layer's weight in the layout that products take, ``(E, N, C)``; a view of ``(E, C, N)`` storage if
    transposed.
    """
    if isinstance(held, QuantizedExpertStack):
        return held.for_products()
    return held.transpose(1, 2) if transposed else held
