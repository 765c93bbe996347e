"""Attention whose query and output projections are experts, over keys and values that all experts share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from gossamer._autocast import no_autocast
from gossamer._checks import (
    check_flags,
    check_floating,
    check_index,
    check_number,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_strided,
    check_tensor,
    check_traceable,
    check_widths,
)
from gossamer._parameters import factory_of, new_parameter
from gossamer.nn.moe.experts.quantized_stack import expert_weight
from gossamer.nn.moe.routers import router_class
from gossamer.nn.moe.routing import Routing, check_hidden, check_selection
from gossamer.ops.dispatch import Dispatch
from gossamer.ops.gather_reduce import combine_slots
from gossamer.ops.grouped_matmul import grouped_matmul
from gossamer.ops.quantized_expert_weight import QuantizedExpertWeight


class KeyValueCache:
    """The keys and values that a layer has seen, for decoding; a call of the layer appends to it.

    Its storage grows by doubling. No gradient flows through it. Its size depends neither on the number of experts nor
    on K.
    """

    def __init__(self) -> None:
        self.length = 0
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``keys`` and ``values (B, h, S, d)``; return views of all keys and values so far, ``(B, h, length,
        d)``.

        Raises:
            TypeError: one is not a dense floating tensor, or they have another dtype than each other or the cache.
            ValueError: other sizes or devices differ, between keys and values or from those in the cache.
        """
        check_floating("keys", keys)
        check_floating("values", values)
        check_shape("keys", keys, (None,) * 4, "(B, h, S, d)")
        check_shape("values", values, tuple(keys.shape), "that of keys")
        cached = None if self._room is None else self._room[0]
        check_same_device(keys=keys, values=values, cached=cached)
        check_same_dtype(keys=keys, values=values, cached=cached)
        length = self.length + keys.shape[2]
        if self._room is None:
            self._room = keys.detach().clone(), values.detach().clone()
        else:
            batch, heads, capacity, dim = self._room[0].shape
            check_shape("keys", keys, (batch, heads, None, dim), "those of the cache, (B, h, S, d)")
            if length > capacity:
                self._room = tuple(self._grown(old, max(length, 2 * capacity)) for old in self._room)
            for room, new in zip(self._room, (keys, values), strict=True):
                room[:, :, self.length : length] = new.detach()
        self.length = length
        keys, values = (room[:, :, :length] for room in self._room)
        return keys, values

    def reorder(self, order: torch.Tensor) -> None:
        """Select sequences ``order (B',)``: the new sequence i continues the old sequence ``order[i]``.

        A sequence may occur several times, or not at all: beam search copies the beams that it keeps, and several
        continuations can share one prompt.

        Raises:
            TypeError: ``order`` does not hold int32 or int64.
            ValueError: it is not one-dimensional, or on another device than the keys.
            IndexError: on the CPU, it holds a number that is not that of a sequence.
        """
        check_index("order", order)
        check_shape("order", order, (None,), "(B',)")
        if self._room is None:
            return
        check_same_device(keys=self._room[0], order=order)
        batch = self._room[0].shape[0]
        if order.is_cpu and order.numel():
            least, most = (int(x) for x in order.aminmax())
            if least < 0 or most >= batch:
                raise IndexError(
                    f"order must hold sequences of the cache, from 0 to {batch - 1}, got {least if least < 0 else most}"
                )
        self._room = tuple(room.index_select(0, order) for room in self._room)

    def _grown(self, old: torch.Tensor, capacity: int) -> torch.Tensor:
        room = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
        room[:, :, : self.length] = old[:, :, : self.length]
        return room


def output_by_slot(
    rows: torch.Tensor, weight: torch.Tensor | QuantizedExpertWeight, dispatch: Dispatch, weights: torch.Tensor
) -> torch.Tensor:
    """``y[t] = Σ_k weights[t,k] · weight[e(t,k)] · rows[t,k]``: each slot is multiplied by its expert's matrix, then
    summed.

    Args:
        rows: ``(T·K, C)``, a row per slot.
        weight: ``(E, N, C)``, a tensor or quantised.
        dispatch: dispatch of the T tokens.
        weights: ``(T, K)``.

    Returns:
        ``(T, N)``.
    """
    # Each slot is a token of its own, with one expert.
    slots = dataclasses.replace(dispatch, num_tokens=dispatch.num_rows, top_k=1)
    products = grouped_matmul(rows, weight, slots, y_grouped=True)
    return combine_slots(products, dispatch, weights)


class MixtureOfAttention(nn.Module):
    """Self-attention with routed queries: each expert has a query and an output projection; all share keys and values.

    Slot k of a token uses expert ``e_k``, whose h heads attend like ordinary heads:

    ``q_k = W_q[e_k] · x``, ``a_k = softmax(q_k·Kᵀ/√d)·V``, ``y = Σ_k w_k · W_o[e_k] · a_k``.

    The weights multiply only the output. Tan et al., "Scattered Mixture-of-Experts Implementation", 2024; Shen et al.,
    "JetMoE", 2024. Projections are :func:`gossamer.grouped_matmul`, which gathers and scatters the rows itself.

    >>> layer = gossamer.nn.MixtureOfAttention(1024, num_experts=8, top_k=2, num_heads=16, head_dim=64)
    >>> y, routing = layer(x, return_routing=True)
    >>> loss = task_loss(y) + 0.01 * gossamer.nn.load_balance_loss(routing)

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K; None with a ``router`` module.
        num_heads: h, heads of keys and values, and of each expert's queries.
        head_dim: d.
        router: as in :class:`MoE`: a name, or a module from hidden states to a :class:`Routing`.
        bias: whether one output bias is added, as in JetMoE.
        rope_theta: base of the rotary position embedding of queries and keys (halves rotated, as in Llama), or None.
        causal: whether a token attends only to itself and earlier tokens.
        attention: a function called as ``attention(q, k, v)`` with ``(B, heads, S, d)`` each, with ``is_causal=True``
            or ``attn_mask=`` if needed, like the default ``torch.nn.functional.scaled_dot_product_attention``; any such
            function of torch, or a ``functools.partial`` of one.
        device: of the parameters.
        dtype: of the parameters.
        **router_options: of a router given by name.

    Attributes:
        query_proj: ``(E, h·d, H)``, initially uniform in ±1/√H; :func:`gossamer.quantize_experts` quantises it and
            ``output_proj``.
        output_proj: ``(E, H, h·d)``, initially uniform in ±1/√(h·d).
        kv_proj: ``nn.Linear(H, 2·h·d)`` without bias: keys, then values.
        bias: ``(H,)``, zero initially, or None.
        router: the router.

    Raises:
        TypeError: a size is not an int, a flag not a bool, or ``router``, ``attention`` or ``rope_theta`` something
            else.
        ValueError: a size is below 1, K > E, the router is unknown or of other sizes, ``rope_theta`` is not positive,
            or d is odd with it.
    """

    # The parameters that gossamer.quantize_experts quantises.
    weight_stacks = ("query_proj", "output_proj")

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None,
        *,
        num_heads: int,
        head_dim: int,
        router: str | nn.Module = "topk_softmax",
        bias: bool = False,
        rope_theta: float | None = 10000.0,
        causal: bool = True,
        attention: Callable[..., torch.Tensor] = F.scaled_dot_product_attention,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **router_options: object,
    ) -> None:
        super().__init__()
        check_widths(hidden_size=hidden_size, num_experts=num_experts, num_heads=num_heads, head_dim=head_dim)
        check_flags(bias=bias, causal=causal)
        if top_k is not None:
            check_selection(num_experts, top_k)
        if rope_theta is not None:
            check_number("rope_theta", rope_theta, above=0, finite=True, optional=True)
            if head_dim % 2:
                raise ValueError(f"head_dim must be even for rotary position embeddings, got {head_dim}")
        if not callable(attention):
            raise TypeError(f"attention must be callable, got {type(attention).__name__}")
        factory = factory_of(device, dtype)
        self.hidden_size, self.num_experts = hidden_size, num_experts
        self.num_heads, self.head_dim = num_heads, head_dim
        self.rope_theta, self.causal, self.attention = rope_theta, causal, attention
        self.router = self._router(router, top_k, router_options | factory)
        width = num_heads * head_dim
        self.query_proj = new_parameter(num_experts, width, hidden_size, **factory)
        self.output_proj = new_parameter(num_experts, hidden_size, width, **factory)
        self.kv_proj = nn.Linear(hidden_size, 2 * width, bias=False, **factory)
        self.bias = new_parameter(hidden_size, **factory) if bias else None
        self.reset_parameters()

    def _router(self, router: object, top_k: int | None, options: dict[str, object]) -> nn.Module:
        if isinstance(router, str):
            return router_class(router).from_top_k(self.hidden_size, self.num_experts, top_k, **options)
        if not isinstance(router, nn.Module):
            raise TypeError(f"router must be a str or an nn.Module, got {type(router).__name__}")
        for name, wanted in (("num_experts", self.num_experts), ("top_k", top_k)):
            own = getattr(router, name, None)
            if None not in (own, wanted) and own != wanted:
                raise ValueError(f"router must have {name} = {wanted}, got {own}")
        return router

    def reset_parameters(self) -> None:
        """Redraw the projections of the experts, and set the bias to zero."""
        for weight in (self.query_proj, self.output_proj):
            nn.init.uniform_(weight, -(weight.shape[2] ** -0.5), weight.shape[2] ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        x: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
        routing: Routing | None = None,
        return_routing: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, Routing]:
        """The layer's output for ``x (B, S, H)``.

        Args:
            x: ``(B, S, H)``; with a cache the tokens that follow those in it.
            attention_mask: ``(B, L)``, false or 0 at padding, for all L tokens including those in the cache. A padding
                token attends only to itself, so that its output is finite, and no other token attends to it. Or ``(B or
                1, heads or 1, S, L)`` as ``scaled_dot_product_attention`` takes it; it must then include the causal
                mask.
            position_ids: ``(B, S)`` or ``(1, S)`` for the rotary embedding; None continues after the cache.
            cache: earlier keys and values, to which those of ``x`` are appended.
            routing: replaces the router's routing; of ``B·S`` tokens.
            return_routing: whether to return the :class:`Routing` too, for balance losses.

        Returns:
            ``y`` of the shape of ``x``, in its dtype or autocast's; with ``return_routing`` the pair ``(y, routing)``.

        Raises:
            RuntimeError: ``torch.jit.trace`` or ``torch.func.vmap`` records the call.
            TypeError: the router returns no Routing, or dtypes do not fit.
            ValueError: shapes or devices do not fit, or the routing is over other sizes.
        """
        check_traceable(type(self).__name__)
        check_hidden(x, self.hidden_size)
        if x.dim() != 3:
            raise ValueError(f"x must have shape (B, S, H), got {tuple(x.shape)}")
        batch, length, _ = x.shape
        tokens = x.reshape(-1, self.hidden_size)
        if routing is None:
            routing = self.router(x)
        if not isinstance(routing, Routing):
            raise TypeError(f"routing must be a gossamer.nn.Routing, got {type(routing).__name__}")
        if routing.num_experts != self.num_experts or routing.num_tokens != batch * length:
            raise ValueError(
                f"routing must be of {batch * length} tokens over {self.num_experts} experts, got {routing.num_tokens} "
                f"over {routing.num_experts}"
            )
        routing = routing.dispatched()
        past = 0 if cache is None else cache.length
        q = grouped_matmul(tokens, expert_weight(self.query_proj, False), routing.dispatch)
        q = q.view(batch, length, routing.top_k * self.num_heads, self.head_dim)
        k, v = (t.view(batch, length, self.num_heads, self.head_dim) for t in self.kv_proj(x).chunk(2, -1))
        if self.rope_theta is not None:
            q, k = self._rotated(position_ids, past, q, k)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        rows = self._attend(q, k, v, self._mask(attention_mask, x, past, k.shape[2]))
        output = expert_weight(self.output_proj, False)
        y = output_by_slot(rows, output, routing.dispatch, routing.weights)
        if self.bias is not None:
            y = y + self.bias
        if routing.residual is not None:
            y = y + routing.residual.unsqueeze(1).to(y.dtype) * tokens
        y = y.view(x.shape)
        return (y, routing) if return_routing else y

    def _rotated(self, position_ids: torch.Tensor | None, past: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """``tensors (B, S, heads, d)`` rotated by the angles of their positions."""
        batch, length, _, dim = tensors[0].shape
        device, wide = tensors[0].device, torch.promote_types(tensors[0].dtype, torch.float32)
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=device).unsqueeze(0)
        else:
            check_tensor("position_ids", position_ids)
            check_strided("position_ids", position_ids)
            check_same_device(x=tensors[0], position_ids=position_ids)
            if position_ids.shape not in ((batch, length), (1, length)):
                raise ValueError(
                    f"position_ids must have shape (B, S) or (1, S) with B = {batch}, S = {length}, got "
                    f"{tuple(position_ids.shape)}"
                )
        with no_autocast(device):
            frequencies = self.rope_theta ** -(torch.arange(0, dim, 2, device=device, dtype=wide) / dim)
            angles = position_ids.to(wide).unsqueeze(-1) * frequencies
            angles = torch.cat([angles, angles], -1).unsqueeze(2)
            cos, sin = angles.cos(), angles.sin()
            rotated = []
            for t in tensors:
                first, second = t.chunk(2, -1)
                rotated.append(t * cos.to(t.dtype) + torch.cat([-second, first], -1) * sin.to(t.dtype))
        return rotated

    def _mask(
        self, attention_mask: torch.Tensor | None, x: torch.Tensor, past: int, total: int
    ) -> dict[str, torch.Tensor | bool]:
        """The keyword arguments that tell the attention function which tokens see which."""
        batch, length, _ = x.shape
        ordered = self.causal and length > 1
        if attention_mask is not None:
            check_tensor("attention_mask", attention_mask)
            check_strided("attention_mask", attention_mask)
            check_same_device(x=x, attention_mask=attention_mask)
        if attention_mask is None:
            if not ordered:
                return {}
            if past == 0:
                return {"is_causal": True}
        elif attention_mask.dim() == 4:
            return {"attn_mask": attention_mask}
        else:
            check_shape("attention_mask", attention_mask, (batch, total), "(B, L)")
        keys = torch.arange(total, device=x.device)
        own = torch.arange(past, past + length, device=x.device).unsqueeze(1)
        seen = (keys <= own) if ordered else torch.ones(1, total, dtype=torch.bool, device=x.device)
        if attention_mask is not None:
            seen = (seen & (attention_mask != 0)[:, None, None, :]) | (keys == own)
        return {"attn_mask": seen}

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: dict) -> torch.Tensor:
        """``(B·S·K, h·d)`` from ``q (B, S, K·h, d)`` and ``k, v (B, h, L, d)``: head (k, i) sees keys and values i."""
        batch, length, heads, dim = q.shape
        top_k = heads // self.num_heads
        mask = how.get("attn_mask")
        if length == 1 and (mask is None or mask.dim() < 4 or mask.shape[1] == 1):
            # With one position, the slots are queries of one head, so that keys and values are read once.
            q = q.view(batch, top_k, self.num_heads, dim).transpose(1, 2)
            out = self.attention(q, k, v, **how).transpose(1, 2)
        else:
            k, v = (t.repeat(1, top_k, 1, 1) for t in (k, v))
            out = self.attention(q.transpose(1, 2), k, v, **how).transpose(1, 2)
        return out.reshape(batch * length * top_k, self.num_heads * dim)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, num_heads={self.num_heads}, "
            f"head_dim={self.head_dim}, bias={self.bias is not None}, rope_theta={self.rope_theta}, "
            f"causal={self.causal}"
        )
