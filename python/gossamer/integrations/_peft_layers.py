"""PEFT's LoRA layers with a forward pass on gossamer's operators; parameters, names and methods remain PEFT's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from gossamer.integrations._linear import LINEAR, plain
from gossamer.integrations._peft_tuner import (
    MAX_RANK,
    AdaptedLayer,
    adapter_requests,
    base_obstacle,
    factors_with,
    nf4_weight,
)
from gossamer.integrations.surgery import hooked
from gossamer.nn.linear.lora_factors import row_norms
from gossamer.ops.low_rank import base_linear, low_rank_linear
from gossamer.ops.multi_low_rank import multi_low_rank
from gossamer.ops.quantized_weight import NF4Weight


class LinearMixin(AdaptedLayer):
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
        a, b = factors_with(x, a, b)
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
        ids, routing = adapter_requests(tuple(names), known, repeats, x.device, torch.is_inference_mode_enabled())
        rows = F.dropout(x.to(y.dtype), rates.pop())
        y = multi_low_rank(rows, *factors_with(rows, a, b), routing, scale=scale, out=y, ranks=ranks)
        if any(self.lora_B[name].bias is not None for name in known):
            none = y.new_zeros(y.shape[-1])
            extra = [none if (bias := self.lora_B[n].bias) is None else bias * self.scaling[n] for n in known]
            y = y + torch.stack([*extra, none]).to(y.dtype)[ids].view(y.shape)
        return y


class EmbeddingMixin(AdaptedLayer):
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
        ids, routing = adapter_requests(tuple(names), known, repeats, x.device, torch.is_inference_mode_enabled())
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
