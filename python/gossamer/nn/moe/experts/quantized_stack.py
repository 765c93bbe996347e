"""Quantised expert weights as part of a module: buffers that keep their dtypes."""

from __future__ import annotations

import torch
from torch import nn

from gossamer.ops.quantized_expert_weight import FORMATS, QuantizedExpertWeight


class QuantizedExpertStack(nn.Module):
    """Holds a :class:`gossamer.QuantizedExpertWeight` instead of an expert layer's parameter.

    Codes and scales are buffers, saved with the state; they move with the module and keep their dtypes when it is cast.

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
        self.register_buffer("data", weight.data)
        self.register_buffer("scale", weight.scale)

    def weight(self) -> QuantizedExpertWeight:
        """The weight ``(E, N, C)``, over the buffers themselves."""
        return QuantizedExpertWeight(self.data, self.scale, self.format, self.activations)

    def _apply(self, fn, recurse=True):
        for name, buffer in self._buffers.items():
            moved = fn(buffer)
            self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        # Copying into a buffer converts dtypes, which would reinterpret codes of another format as numbers.
        for name, buffer in self._buffers.items():
            given = state_dict.get(prefix + name)
            if isinstance(given, torch.Tensor) and given.dtype != buffer.dtype:
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
        e, n, stored = self.data.shape
        sizes = f"{self.format}, num_experts={e}, out={n}, in={stored * FORMATS[self.format][1]}"
        return sizes if self.activations == "float" else f"{sizes}, activations={self.activations}"


def expert_weight(held: torch.Tensor | QuantizedExpertStack, transposed: bool) -> torch.Tensor | QuantizedExpertWeight:
    """An expert layer's weight in the layout that products take, ``(E, N, C)``; a view of ``(E, C, N)`` storage if
    transposed.
    """
    if isinstance(held, QuantizedExpertStack):
        return held.weight()
    return held.transpose(1, 2) if transposed else held
