"""Shared by gossamer's classes for PEFT's layers: their base weights, and the adapters that a call uses."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft.tuners.lora.model import _adapter_names_pre_forward_hook
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from gossamer.integrations._calls import Slot
from gossamer.integrations._linear import LINEAR, plain
from gossamer.integrations._peft_config import check_config
from gossamer.integrations.surgery import hooked
from gossamer.ops.dispatch import Dispatch
from gossamer.ops.multi_low_rank import adapter_dispatch
from gossamer.ops.quantized_weight import NF4Weight

BASE = "__base__"  # PEFT's name for "no adapter"
# Layers with adapters of a larger rank keep PEFT's own forward pass.
MAX_RANK = 512


def nf4_weight(base: nn.Module) -> NF4Weight | None:
    """The weight of bitsandbytes' ``Linear4bit`` as stored, or None if it is stored in another layout."""
    weight = base.weight
    state = getattr(weight, "quant_state", None) or getattr(base, "quant_state", None)
    if state is None or state.quant_type != "nf4" or getattr(state, "packing_format_for_cpu", False):
        return None
    nested = state.state2 if state.nested else None
    return NF4Weight(
        weight.data,
        state.absmax,
        tuple(state.shape),
        state.code,
        state.blocksize,
        nested and nested.absmax,
        nested and nested.code,
        nested and state.offset.reshape(1),
        nested.blocksize if nested else 256,
    )


def base_obstacle(base: nn.Module) -> str | None:
    """Why this base layer's product cannot include the update, or None when it can."""
    name = type(base).__name__
    if hooked(base):
        return f"its {name} has hooks"
    if name == "Linear4bit":
        if nf4_weight(base) is None:
            return "its 4-bit weight is not NF4 in bitsandbytes' own order"
    elif type(base) not in (*LINEAR, Conv1D):
        return f"its base layer is a {name}"
    elif not plain(base.weight):
        return f"its weight is a {type(base.weight).__name__} of {base.weight.dtype} on {base.weight.device}"
    return None if plain(base.bias) else f"its bias is {base.bias.dtype} on {base.bias.device}"


@functools.lru_cache(maxsize=64)
def adapter_requests(
    names: tuple[str, ...], known: tuple[str, ...], repeats: int, device: torch.device, inference: bool
) -> tuple[torch.Tensor, Dispatch]:
    """The adapter of each row, with ``repeats`` rows per request, and the rows sorted by adapter.

    ``inference``: whether the tensors are created in inference mode, which autograd does not accept.
    """
    index = {name: position for position, name in enumerate(known)}
    ids = torch.tensor([index.get(name, -1) for name in names]).repeat_interleave(repeats).to(device)
    return ids, adapter_dispatch(ids, len(known))


def stack_factors(parts: list[torch.Tensor], rank: int, dim: int) -> torch.Tensor:
    """The stacked factors, each padded to the largest rank."""
    padding = [0, 0] * (-dim - 1)
    return torch.stack([F.pad(part, (*padding, 0, rank - part.shape[dim])) for part in parts])


def _refuse_alora(kwargs: dict[str, object]) -> None:
    if kwargs.pop("alora_offsets", None) is not None:
        raise ValueError("alora_offsets must be None: gossamer does not compute alora_invocation_tokens (aLoRA)")


class AdaptedLayer:
    """What the layers share: which adapters a call uses, and batches that mix them.

    Attributes:
        gossamer_names: the adapter of each request of the running call, if it mixes adapters.
    """

    gossamer_names = Slot()

    def register_forward_pre_hook(self, hook: Callable, **options: object) -> object:
        """Replace the hook with which PEFT passes adapter names, which all threads share, by names that belong to the
        call.
        """
        if isinstance(hook, functools.partial) and hook.func is _adapter_names_pre_forward_hook:
            self.gossamer_names.assign(hook.keywords["adapter_names"])
            return RemovableHandle(OrderedDict())
        return super().register_forward_pre_hook(hook, **options)

    def _replicate_for_data_parallel(self) -> nn.Module:
        if self.gossamer_names.get() is not None:
            raise ValueError(
                "torch.nn.DataParallel cannot divide a batch that mixes adapters, as names do not follow its rows: use "
                "one process for each device"
            )
        return super()._replicate_for_data_parallel()

    def update_layer(self, adapter_name: str, *args: object, **kwargs: object) -> None:
        """As in PEFT; raises an error for unsupported options before anything is added."""
        if (config := kwargs.get("config")) is not None:
            check_config(adapter_name, config)
        super().update_layer(adapter_name, *args, **kwargs)

    def _names(self, x: torch.Tensor, kwargs: dict[str, object]) -> list[str] | None:
        """The adapter of each request of a mixed batch, or None; takes PEFT's own arguments out of ``kwargs``."""
        _refuse_alora(kwargs)
        self._check_forward_args(x, adapter_names=kwargs.get("adapter_names"))
        names = kwargs.pop("adapter_names", None)
        if names is None and not self.disable_adapters and (names := self.gossamer_names.get()) is not None:
            self._check_forward_args(x, adapter_names=names)
        return names

    def _watched(self, name: str) -> bool:
        """Whether calling a factor of the adapter, or its dropout, does more than the forward of its class."""
        parts = [part[name] for part in (self.lora_A, self.lora_B, self.lora_dropout) if name in part]
        return any(isinstance(part, nn.Module) and hooked(part) for part in parts)

    def _mixed_bank(
        self, names: list[str], factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[tuple[str, ...], torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """The adapters of a batch in this layer, their stacked factors, scales and ranks; None if there are none."""
        known = tuple(sorted({name for name in names if name in factors}))
        if not known:
            return None
        if watched := [name for name in known if self._watched(name)]:
            raise ValueError(
                f"adapter {watched[0]!r} has hooks on its factors or dropout, which a mixed batch would leave out"
            )
        parts = [factors[name] for name in known]
        rank = max(a.shape[-2] for a, _ in parts)
        a, b = stack_factors([a for a, _ in parts], rank, -2), stack_factors([b for _, b in parts], rank, -1)
        wide = torch.float64 if a.dtype == torch.float64 else torch.float32
        mode = torch.is_inference_mode_enabled()
        scale = _numbers(tuple(float(self.scaling[name]) for name in known), wide, a.device, mode)
        return known, a, b, scale, _numbers(tuple(a.shape[-2] for a, _ in parts), torch.int64, a.device, mode)


@functools.lru_cache(maxsize=64)
def _numbers(values: tuple[float, ...], dtype: torch.dtype, device: torch.device, inference: bool) -> torch.Tensor:
    """The values as a tensor, cached because every copy to a GPU waits for the GPU."""
    return torch.tensor(values, dtype=dtype, device=device)


def factors_with(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors in a dtype that the operators accept with ``x``: its dtype or float32."""
    if a.dtype == b.dtype and a.dtype in (x.dtype, torch.float32) and x.dtype != torch.float64:
        return a, b
    return a.to(x.dtype), b.to(x.dtype)
