"""PEFT's LoRA layers with a forward pass on gossamer's operators; parameters, names and methods remain PEFT's."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.model import _adapter_names_pre_forward_hook
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from gossamer.integrations._calls import Slot
from gossamer.integrations._expert_updates import ExpertUpdate, adapter_slots
from gossamer.integrations._linear import LINEAR, plain
from gossamer.integrations._peft_config import check_config
from gossamer.integrations.surgery import hooked
from gossamer.integrations.transformers import division_obstacle, experts_forward, experts_obstacle, is_experts
from gossamer.nn import expert_factors
from gossamer.nn.linear.lora_factors import row_norms
from gossamer.ops.dispatch import Dispatch
from gossamer.ops.low_rank import base_linear, low_rank_linear
from gossamer.ops.multi_low_rank import adapter_dispatch, multi_low_rank
from gossamer.ops.quantized_weight import NF4Weight

if TYPE_CHECKING:
    from gossamer.integrations.expert_parallel import GossamerEP

BASE = "__base__"  # PEFT's name for "no adapter"
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
def _requests(
    names: tuple[str, ...], known: tuple[str, ...], repeats: int, device: torch.device, inference: bool
) -> tuple[torch.Tensor, Dispatch]:
    """The adapter of each row, with ``repeats`` rows per request, and the rows sorted by adapter.

    ``inference``: whether the tensors are created in inference mode, which autograd does not accept.
    """
    index = {name: position for position, name in enumerate(known)}
    ids = torch.tensor([index.get(name, -1) for name in names]).repeat_interleave(repeats).to(device)
    return ids, adapter_dispatch(ids, len(known))


def _stack(parts: list[torch.Tensor], rank: int, dim: int) -> torch.Tensor:
    """The stacked factors, each padded to the largest rank."""
    padding = [0, 0] * (-dim - 1)
    return torch.stack([F.pad(part, (*padding, 0, rank - part.shape[dim])) for part in parts])


def _refuse_alora(kwargs: dict[str, object]) -> None:
    if kwargs.pop("alora_offsets", None) is not None:
        raise ValueError("alora_offsets must be None: gossamer does not compute alora_invocation_tokens (aLoRA)")


class _Tuner:
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
        a, b = _stack([a for a, _ in parts], rank, -2), _stack([b for _, b in parts], rank, -1)
        wide = torch.float64 if a.dtype == torch.float64 else torch.float32
        mode = torch.is_inference_mode_enabled()
        scale = _numbers(tuple(float(self.scaling[name]) for name in known), wide, a.device, mode)
        return known, a, b, scale, _numbers(tuple(a.shape[-2] for a, _ in parts), torch.int64, a.device, mode)


@functools.lru_cache(maxsize=64)
def _numbers(values: tuple[float, ...], dtype: torch.dtype, device: torch.device, inference: bool) -> torch.Tensor:
    """The values as a tensor, cached because every copy to a GPU waits for the GPU."""
    return torch.tensor(values, dtype=dtype, device=device)


def _factors(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors in a dtype that the operators accept with ``x``: its dtype or float32."""
    if a.dtype == b.dtype and a.dtype in (x.dtype, torch.float32) and x.dtype != torch.float64:
        return a, b
    return a.to(x.dtype), b.to(x.dtype)


class LinearMixin(_Tuner):
    """Forward of a LoRA layer over a linear base: one :func:`gossamer.low_rank_linear`, or a mixed batch."""

    def gossamer_obstacle(self) -> str | None:
        """Why the update cannot join the base layer's product, or None when it can."""
        return base_obstacle(self.base_layer)

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """PEFT's forward."""
        names = self._names(x, kwargs)
        if self.disable_adapters or (names is None and self.merged):
            return super().forward(x, *args, **kwargs)
        if names is not None:
            return self._mixed(x, names, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or not self._fits(x, active):
            return super().forward(x, *args, **kwargs)
        return self._fused(x, active)

    def _dropout(self, name: str) -> float:
        dropout = self.lora_dropout[name]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def _fits(self, x: torch.Tensor, active: list[str]) -> bool:
        if not active or base_obstacle(self.base_layer) is not None or not plain(x):
            return False
        if any(self._watched(name) for name in active):
            return False
        if any(type(self.lora_dropout[name]) not in (nn.Dropout, nn.Identity) for name in active):
            return False
        if len(active) > 1 and any(name in self.lora_variant or self._dropout(name) for name in active):
            return False
        # The rank of the factors themselves: PEFT pads them beyond its ``r`` to swap in adapters of higher rank.
        rank = sum(self.lora_A[name].weight.shape[0] for name in active)
        return rank <= min(MAX_RANK, self.in_features, self.out_features)

    def _bias(self, active: list[str], dtype: torch.dtype) -> torch.Tensor | None:
        bias = self.base_layer.bias
        total = None if bias is None else bias.to(dtype)
        for name in active:
            extra = self.lora_B[name].bias
            if extra is not None:
                extra = (extra * self.scaling[name]).to(dtype)
                total = extra if total is None else total + extra
        return total

    def _fused(self, x: torch.Tensor, active: list[str]) -> torch.Tensor:
        base, given = self.base_layer, x.dtype
        weight = nf4_weight(base) if type(base).__name__ == "Linear4bit" else base.weight
        if isinstance(weight, NF4Weight):
            x = x if base.compute_dtype is None else x.to(base.compute_dtype)
        elif type(base) is Conv1D:
            weight = weight.T
        if len(active) == 1:
            a, b, scale = self.lora_A[active[0]].weight, self.lora_B[active[0]].weight, self.scaling[active[0]]
        else:
            a, scale = torch.cat([self.lora_A[name].weight for name in active]), 1.0
            b = torch.cat([self.lora_B[name].weight * self.scaling[name] for name in active], dim=1)
        if isinstance(scale, torch.Tensor):
            b, scale = b * scale, 1.0
        a, b = _factors(x, a, b)
        if active[0] in self.lora_variant:
            y = self._dora(x, weight, a, b, scale, active[0])
        else:
            bias, dropout = self._bias(active, x.dtype), self._dropout(active[0])
            y = low_rank_linear(x, weight, a, b, scale=scale, bias=bias, dropout=dropout)
        # bitsandbytes returns the dtype of its input, under autocast too.
        return y.to(given) if isinstance(weight, NF4Weight) else y

    def _dora(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | NF4Weight,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        name: str,
    ) -> torch.Tensor:
        bias, dropout = self.base_layer.bias, self._dropout(name)
        dense = weight.dequantize(x.dtype) if isinstance(weight, NF4Weight) else weight
        gain = self.lora_magnitude_vector[name].weight / row_norms(dense, a, b, scale)
        dropped = F.dropout(x, dropout) if dropout else x
        y = low_rank_linear(dropped, weight, a, b, scale=scale)
        y = y * gain.to(y.dtype)
        if dropout:
            # PEFT scales the product of W and the x after dropout, and leaves the rest of x·Wᵀ unscaled.
            y = y + F.linear(x - dropped, dense)
        return y if bias is None else y + bias.to(y.dtype)

    def _mixed(self, x: torch.Tensor, names: list[str], *args: object, **kwargs: object) -> torch.Tensor:
        factors = {n: (self.lora_A[n].weight, self.lora_B[n].weight) for n in self.lora_A if n in names}
        limit = min(MAX_RANK, self.in_features, self.out_features)
        if any(a.shape[0] > limit for a, _ in factors.values()):
            return self._mixed_batch_forward(x, *args, adapter_names=names, **kwargs)
        base = self.base_layer
        own = not (args or kwargs) and base_obstacle(base) is None and type(base) in (*LINEAR, Conv1D) and plain(x)
        shape = x.shape[:-1]
        if own:
            x = x.reshape(-1, x.shape[-1])
            y = base_linear(x, base.weight.T if type(base) is Conv1D else base.weight, base.bias)
        else:
            y = base(x, *args, **kwargs)
        return self._add_mixed(x, y, names, factors, not own).view(*shape, y.shape[-1])

    def _add_mixed(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        names: list[str],
        factors: dict[str, tuple[torch.Tensor, torch.Tensor]],
        foreign: bool,
    ) -> torch.Tensor:
        """The base layer's ``y`` with each request's update; ``foreign`` if ``y`` came from calling the layer
        itself.
        """
        found = self._mixed_bank(names, factors)
        if found is None:
            return y
        known, a, b, scale, ranks = found
        rates = {self._dropout(name) for name in known}
        if len(rates) > 1:
            raise ValueError(f"lora_dropout must be one value for the adapters of a mixed batch, got {sorted(rates)}")
        if foreign and (hooked(self.base_layer) or (y._is_view() and torch.is_grad_enabled())):
            # Other code may hold the result, or autograd may not allow changing it in place.
            y = y.clone()
        repeats = y.shape[:-1].numel() // max(len(names), 1)
        ids, routing = _requests(tuple(names), known, repeats, x.device, torch.is_inference_mode_enabled())
        rows = F.dropout(x.to(y.dtype), rates.pop())
        y = multi_low_rank(rows, *_factors(rows, a, b), routing, scale=scale, out=y, ranks=ranks)
        if any(self.lora_B[name].bias is not None for name in known):
            none = y.new_zeros(y.shape[-1])
            extra = [none if (bias := self.lora_B[n].bias) is None else bias * self.scaling[n] for n in known]
            y = y + torch.stack([*extra, none]).to(y.dtype)[ids].view(y.shape)
        return y


class EmbeddingMixin(_Tuner):
    """Forward of a LoRA layer over an embedding table."""

    def gossamer_obstacle(self) -> str | None:
        """Why the layer is left to PEFT, or None."""
        return "its table is split over devices" if self.tp_layer is not None else None

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """PEFT's forward."""
        names = self._names(x, kwargs)
        if self.disable_adapters or (names is None and self.merged):
            return super().forward(x, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        if names is not None:
            return self._mixed(x, y, names)
        dtype = y.dtype
        for name in self.active_adapters:
            if name in self.lora_embedding_A:
                y = self._updated(x, y, name)
        return y.to(dtype)

    def _scaled(self, update: torch.Tensor, scale: float) -> torch.Tensor:
        """``update`` times the scale, and times the scale of base layers that scale their own output."""
        update, embed_scale = update * scale, self._get_embed_scale()
        return update if embed_scale is None else update * embed_scale.to(update.dtype)

    def _updated(self, x: torch.Tensor, y: torch.Tensor, name: str) -> torch.Tensor:
        a, b, scale = self.lora_embedding_A[name], self.lora_embedding_B[name], self.scaling[name]
        update = self._scaled(self._embed(x, a.T) @ b.T, scale)
        if name not in self.lora_variant:
            return y + update
        norms = row_norms(self.get_base_layer().weight.T, a, b * scale, 1.0)
        return (y + update) * (self.lora_magnitude_vector[name].weight / norms).to(y.dtype)

    def _mixed(self, x: torch.Tensor, y: torch.Tensor, names: list[str]) -> torch.Tensor:
        a, b = self.lora_embedding_A, self.lora_embedding_B
        found = self._mixed_bank(names, {n: (a[n], b[n]) for n in a if n in names})
        if found is None:
            return y
        known, _, b, scale, ranks = found
        rank = b.shape[2]
        repeats = y.shape[:-1].numel() // max(len(names), 1)
        ids, routing = _requests(tuple(names), known, repeats, x.device, torch.is_inference_mode_enabled())
        # Stacking all adapters' A would copy every table, so each request reads only its own.
        rows = y.new_zeros(*y.shape[:-1], rank)
        for name in known:
            mine = torch.tensor([position for position, other in enumerate(names) if other == name], device=x.device)
            part = self._embed(x[mine], a[name].T).to(rows.dtype)
            rows = rows.index_copy(0, mine, F.pad(part, (0, rank - part.shape[-1])))
        if rank > b.shape[1]:
            update = (rows.unsqueeze(-2) @ b.to(rows.dtype)[ids].view(*y.shape[:-1], *b.shape[1:]).mT).squeeze(-2)
            factor = torch.cat([scale, scale.new_zeros(1)])[ids].to(update.dtype).view(*y.shape[:-1], 1)
            return y + self._scaled(update * factor, 1.0)
        identity = torch.eye(rank, dtype=rows.dtype, device=rows.device).expand(len(known), rank, rank)
        update = multi_low_rank(rows, identity, b.to(rows.dtype), routing, scale=scale, ranks=ranks)
        return y + self._scaled(update, 1.0)


def _exchange(wrapper: peft_layer.ParamWrapper) -> GossamerEP | None:
    """What exchanges tokens if the wrapper's experts are divided among processes by gossamer."""
    return wrapper.get_base_layer().__dict__.get("gossamer_exchange")


def _update_obstacle(wrapper: peft_layer.ParamWrapper) -> str | None:
    base = wrapper.get_base_layer()
    if type(base) is nn.Linear and wrapper.parameter_name == "weight":
        return base_obstacle(base)
    if not is_experts(base):
        return f"its module {type(base).__name__} is not an experts module of transformers"
    targets = {"gate_up_proj", "up_proj", "down_proj"}
    if wrapper.parameter_name not in targets or wrapper.num_experts == 1:
        return f"its parameter {wrapper.parameter_name} is none of {sorted(targets)}"
    if hooked(base) and _exchange(wrapper) is None:
        return f"its {type(base).__name__} has hooks"
    return experts_obstacle(base)


def parallel_obstacle(wrapper: peft_layer.ParamWrapper) -> str | None:
    """Why neither PEFT nor gossamer can update a parameter of experts divided among processes, or None."""
    base = wrapper.get_base_layer()
    if not is_experts(base):
        return None
    # Where gossamer exchanges the tokens, PEFT's own sum W + ΔW cannot take its place.
    return division_obstacle(base) if _exchange(wrapper) is None else _update_obstacle(wrapper)


class ExpertsMixin(_Tuner):
    """Forward of PEFT's wrapper of a parameter: low-rank updates of an experts module, or of one matrix."""

    def _chain(self) -> list[_Tuner]:
        """The wrapper and those inside it, one for each parameter of the module."""
        chain, module = [], self
        while isinstance(module, peft_layer.ParamWrapper):
            chain.append(module)
            module = module.base_layer
        return chain

    def gossamer_obstacle(self) -> str | None:
        """Why the wrapped module is left to PEFT's sum ``W + ΔW``, or None; cached, as tracers cannot compute it."""
        self.__dict__["_gossamer_reason"] = reason = _update_obstacle(self)
        return reason

    @property
    def divided(self) -> bool:
        """Whether its experts are divided among processes by gossamer."""
        return _exchange(self) is not None

    def divide_factors(self) -> None:
        """Keep the factors of this process's experts, if they are divided among processes; every process calls it."""
        if (exchange := _exchange(self)) is None:
            return
        from gossamer.integrations._divided_factors import ExpertFactorA, ExpertFactorB, divide_factor

        copies = exchange.copies(self.get_param())
        for factors, cls in ((self.lora_A, ExpertFactorA), (self.lora_B, ExpertFactorB)):
            for linear in factors.values():
                divide_factor(linear, cls, self.num_experts, exchange.ep_mesh, copies)

    def gather_factors(self) -> None:
        """Undo :meth:`divide_factors`; every process calls it."""
        if self.divided:
            from gossamer.integrations._divided_factors import gather_factor

            for linear in (*self.lora_A.values(), *self.lora_B.values()):
                gather_factor(linear)

    def update_layer(self, adapter_name: str, *args: object, **kwargs: object) -> None:
        """As in PEFT; the factors are divided like the experts."""
        super().update_layer(adapter_name, *args, **kwargs)
        self.divide_factors()

    def get_delta_weight(self, adapter_name: str, *args: object, **kwargs: object) -> torch.Tensor:
        """As in PEFT; a DTensor for experts that are divided."""
        if (exchange := _exchange(self)) is None:
            return super().get_delta_weight(adapter_name, *args, **kwargs)
        from gossamer.integrations._divided_factors import whole_update

        a, b = (factors[adapter_name].weight.to_local() for factors in (self.lora_A, self.lora_B))
        update = (b @ a) * self.scaling[adapter_name]
        if not self._did_swap_in_out_features:
            update = update.mT
        parameter = self.get_param()
        return whole_update(update.to(parameter.dtype).contiguous(), parameter, exchange.ep_mesh)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As in PEFT; ``safe_merge`` is refused for experts that are divided."""
        if safe_merge and self.divided:
            raise ValueError("safe_merge must be False for experts that are divided among processes, got True")
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def _check_forward_args(self, x: torch.Tensor, *args: object, **kwargs: object) -> None:
        """PEFT's ParamWrapper does not mix adapters in a batch; here the rows of a request are adjacent."""
        names = kwargs.get("adapter_names")
        if names is not None and self.merged:
            raise ValueError("adapter_names must be None while adapters are merged: call unmerge_adapter() first")
        if names is not None and (not names or x.shape[0] % len(names)):
            raise ValueError(f"adapter_names must name one adapter a request, got {len(names)} for {x.shape[0]} rows")

    def _mixed_update(self, names: list[str], top_k_index: torch.Tensor) -> ExpertUpdate | None:
        """The updates of a mixed batch, one group for each adapter and expert."""
        known = tuple(sorted({name for name in names if name in self.lora_A}))
        if not known:
            return None
        parts = [expert_factors(self.lora_A[n].weight, self.lora_B[n].weight, self.num_experts) for n in known]
        rank = max(a.shape[1] for a, _ in parts)
        a = _stack([a for a, _ in parts], rank, -2).flatten(0, 1)
        b = _stack([b * self.scaling[n] for (_, b), n in zip(parts, known, strict=True)], rank, -1).flatten(0, 1)
        repeats = top_k_index.shape[0] // len(names)
        ids, _ = _requests(tuple(names), known, repeats, top_k_index.device, torch.is_inference_mode_enabled())
        return ExpertUpdate(a, b, adapter_slots(ids, top_k_index, len(known), self.num_experts))

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """PEFT's forward."""
        names, chain, base = self._names(x, kwargs), self._chain(), self.get_base_layer()
        if (exchange := _exchange(self)) is not None:
            if names is not None and not self.disable_adapters:
                raise ValueError("adapter_names must be None for experts that are divided among processes")
            return self._divided(exchange, x, *args, **kwargs)
        usable = not any(w.disable_adapters or w.merged or w.__dict__.get("_gossamer_reason", "new") for w in chain)
        usable = usable and not any(hooked(module) for module in chain[1:] if names is None) and not hooked(base)
        if names is not None and not self.disable_adapters:
            if not usable or type(base) is nn.Linear:
                raise ValueError(
                    f"adapter_names cannot mix adapters of {self.parameter_name}: its {type(base).__name__} is no "
                    "experts module that gossamer computes"
                )
            slots = args[0] if args else kwargs["top_k_index"]
            updates = {wrapper.parameter_name: wrapper._mixed_update(names, slots) for wrapper in chain}
            return experts_forward(base, x, *args, **kwargs, updates=updates)
        if not usable:
            return super().forward(x, *args, **kwargs)
        if type(base) is nn.Linear:
            return self._linear(x, base) if not (args or kwargs) else super().forward(x, *args, **kwargs)
        updates = {wrapper.parameter_name: wrapper._update() for wrapper in chain}
        return experts_forward(base, x, *args, **kwargs, updates=updates)

    def _divided(self, exchange: GossamerEP, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """The update where the experts are: ``exchange`` brings the rows to them."""
        chain, base = self._chain(), self.get_base_layer()
        if any(hooked(wrapper) or not isinstance(wrapper, ExpertsMixin) for wrapper in chain[1:]):
            raise ValueError(
                "a ParamWrapper inside another must be one that gossamer.replace switched, without hooks, for experts "
                "that are divided among processes"
            )
        updates = {}
        for wrapper in chain:
            if wrapper.disable_adapters and wrapper.merged:
                wrapper.unmerge()
            off = wrapper.disable_adapters or wrapper.merged
            updates[wrapper.parameter_name] = None if off else wrapper._update()
        if not any(updates.values()):
            return base(x, *args, **kwargs)
        with exchange.computing(functools.partial(experts_forward, base, updates=updates)):
            return base(x, *args, **kwargs)

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    def _factors_by_expert(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """``a (E, r, C)`` and ``b (E, N, r)`` of an adapter, of this process's experts if they are divided."""
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        if (exchange := _exchange(self)) is None:
            return expert_factors(a, b, self.num_experts)
        return exchange.own_part(a), exchange.own_part(b)

    def _linear(self, x: torch.Tensor, base: nn.Linear) -> torch.Tensor:
        active = self._active()
        rank = sum(self.lora_A[name].weight.shape[0] for name in active)
        if not active or rank > min(MAX_RANK, *base.weight.shape):
            return super().forward(x)
        a = torch.cat([self.lora_A[name].weight for name in active])
        b = torch.cat([self.lora_B[name].weight * self.scaling[name] for name in active], dim=1)
        return low_rank_linear(x, base.weight, *_factors(x, a, b), scale=1.0, bias=base.bias)

    def _update(self) -> ExpertUpdate | None:
        """The active adapters' updates as one update, with their ranks concatenated."""
        active = self._active()
        if not active:
            return None
        pairs = [self._factors_by_expert(name) for name in active]
        a = torch.cat([a for a, _ in pairs], dim=1)
        b = torch.cat([b * self.scaling[name] for (_, b), name in zip(pairs, active, strict=True)], dim=2)
        return ExpertUpdate(a, b)
