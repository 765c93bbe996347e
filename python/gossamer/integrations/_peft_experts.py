"""PEFT's wrappers of parameters of experts modules, with a forward pass on gossamer's operators."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from peft.tuners.lora import layer as peft_layer
from torch import nn

from gossamer.integrations._expert_updates import ExpertUpdate, adapter_slots
from gossamer.integrations._peft_tuner import (
    MAX_RANK,
    AdaptedLayer,
    adapter_requests,
    base_obstacle,
    factors_with,
    stack_factors,
)
from gossamer.integrations.surgery import hooked
from gossamer.integrations.transformers import division_obstacle, experts_forward, experts_obstacle, is_experts
from gossamer.nn import expert_factors
from gossamer.ops.low_rank import low_rank_linear

if TYPE_CHECKING:
    from gossamer.integrations.expert_parallel import GossamerEP


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
        return f"its parameter {wrapper.parameter_name} is not one of {sorted(targets)}"
    if hooked(base) and _exchange(wrapper) is None:
        return f"its {type(base).__name__} has hooks"
    return experts_obstacle(base)


def parallel_obstacle(wrapper: peft_layer.ParamWrapper) -> str | None:
    """Why neither PEFT nor gossamer can update a parameter of experts divided among processes, or None."""
    base = wrapper.get_base_layer()
    if not is_experts(base):
        return None
    # Where gossamer exchanges the tokens, the update cannot be left to PEFT, which adds ΔW to W.
    return division_obstacle(base) if _exchange(wrapper) is None else _update_obstacle(wrapper)


class ExpertsMixin(AdaptedLayer):
    """Forward of PEFT's wrapper of a parameter: low-rank updates of an experts module, or of one matrix."""

    def _chain(self) -> list[AdaptedLayer]:
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
        a = stack_factors([a for a, _ in parts], rank, -2).flatten(0, 1)
        b = stack_factors([b * self.scaling[n] for (_, b), n in zip(parts, known, strict=True)], rank, -1).flatten(0, 1)
        repeats = top_k_index.shape[0] // len(names)
        ids, _ = adapter_requests(tuple(names), known, repeats, top_k_index.device, torch.is_inference_mode_enabled())
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
        return low_rank_linear(x, base.weight, *factors_with(x, a, b), scale=1.0, bias=base.bias)

    def _update(self) -> ExpertUpdate | None:
        """The active adapters' updates as one update, with their ranks concatenated."""
        active = self._active()
        if not active:
            return None
        pairs = [self._factors_by_expert(name) for name in active]
        a = torch.cat([a for a, _ in pairs], dim=1)
        b = torch.cat([b * self.scaling[name] for (_, b), name in zip(pairs, active, strict=True)], dim=2)
        return ExpertUpdate(a, b)
