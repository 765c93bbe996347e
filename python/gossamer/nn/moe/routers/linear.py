"""Routers with a linear map from hidden states to logits, and a rule that chooses experts from them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from gossamer._autocast import no_autocast
from gossamer._checks import check_flag, check_positive, check_widths
from gossamer._parameters import factory_of, new_parameter
from gossamer.nn.moe.routers.base import Router
from gossamer.nn.moe.routers.topk import sigmoid_topk, softmax_topk, topk_softmax
from gossamer.nn.moe.routing import Routing, check_hidden, check_selection


class _WideLinear(torch.autograd.Function):
    """``x·Wᵀ`` in a wider dtype; for the backward pass x and W are saved in their own dtypes, not as wide copies."""

    @staticmethod
    def forward(x, weight, dtype):
        return x.to(dtype) @ weight.to(dtype).T

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, ctx.dtype = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, dlogits):
        x, weight = ctx.saved_tensors
        with no_autocast(dlogits.device):
            dx = (dlogits @ weight.to(ctx.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
            dweight = (dlogits.T @ x.to(ctx.dtype)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dx, dweight, None


class LinearRouter(Router):
    """A linear map from hidden states to logits, and a rule that chooses experts from them.

    A subclass defines the rule, ``route(logits) -> Routing``.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K.
        bias: whether the logits have a bias, as in gpt-oss.
        upcast: whether the product is taken in float32, whatever the dtypes of the hidden states and the weight and
            under autocast too (the wide copies are not kept for the backward pass). Otherwise it is taken in the hidden
            states' dtype, as in Mixtral and Qwen3-MoE, and its result upcast.
        num_logits: rows of the linear map, for rules that do not use one logit per expert; None for E.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: ``(E, H)``, initially uniform in ±1/√H as in ``nn.Linear``; ``num_logits`` in place of E.
        bias: ``(E,)`` or None.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1, or K > E.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        bias: bool = False,
        upcast: bool = True,
        num_logits: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_selection(num_experts, top_k)
        check_widths(hidden_size=hidden_size, num_experts=num_experts)
        rows = num_experts if num_logits is None else num_logits
        check_positive(num_logits=rows)
        check_flag("bias", bias)
        check_flag("upcast", upcast)
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.upcast = upcast
        factory = factory_of(device, dtype)
        self.weight = new_parameter(rows, hidden_size, **factory)
        self.bias = new_parameter(rows, **factory) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Redraw weight and bias."""
        bound = self.hidden_size**-0.5
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """``(T, E)`` in float32 (float64 for float64) from hidden states ``x (..., H)``."""
        check_hidden(x, self.hidden_size, self.weight)
        x = x.reshape(-1, self.hidden_size)
        wide = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
        if not self.upcast:
            return F.linear(x, self.weight, self.bias).to(wide)
        with no_autocast(x.device):
            if x.dtype == self.weight.dtype == wide:
                return F.linear(x, self.weight, self.bias)
            # apply() inspects the signature of forward() in each call, which takes longer than one token's product.
            product = _WideLinear.apply if torch.is_grad_enabled() else _WideLinear.forward
            logits = product(x, self.weight, wide)
            return logits if self.bias is None else logits + self.bias.to(wide)

    def route(self, logits: torch.Tensor) -> Routing:
        """The routing for ``logits (T, E)``, or ``(T, num_logits)``."""
        raise NotImplementedError(f"{type(self).__name__} must define route(logits)")

    def forward(self, x: torch.Tensor, *, token_ids: torch.Tensor | None = None) -> Routing:
        """The routing of hidden states ``x (..., H)``; T is the product of the leading sizes."""
        return self.route(self.logits(x))

    def extra_repr(self) -> str:
        """Sizes and options."""
        options = "" if self.bias is None else ", bias=True"
        options += "" if self.upcast else ", upcast=False"
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}{options}"


class SoftmaxRouter(LinearRouter):
    """:func:`softmax_topk` over a linear map: OLMoE; with ``renormalize`` Mixtral, Qwen3-MoE; with groups DeepSeek-V2.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K.
        renormalize: as in :func:`softmax_topk`, like ``n_group``, ``topk_group`` and ``scale``.
        n_group: groups that the experts form.
        topk_group: groups that a token may use.
        scale: factor on the weights.
        **options: ``bias``, ``upcast``, ``device``, ``dtype`` of :class:`LinearRouter`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        renormalize: bool = False,
        n_group: int = 1,
        topk_group: int = 1,
        scale: float = 1.0,
        **options: object,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **options)
        check_selection(num_experts, top_k, n_group, topk_group, scale)
        self.selection = {
            "renormalize": renormalize,
            "n_group": n_group,
            "topk_group": topk_group,
            "scale": scale,
        }

    def route(self, logits: torch.Tensor) -> Routing:
        """:func:`softmax_topk` of ``logits (T, E)``."""
        return softmax_topk(logits, self.top_k, **self.selection)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in self.selection.items())])


class TopKSoftmaxRouter(LinearRouter):
    """:func:`topk_softmax` over a linear map: gpt-oss (with ``bias=True``), Mixtral, JetMoE.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K.
        **options: ``bias``, ``upcast``, ``device``, ``dtype`` of :class:`LinearRouter`.
    """

    def route(self, logits: torch.Tensor) -> Routing:
        """:func:`topk_softmax` of ``logits (T, E)``."""
        return topk_softmax(logits, self.top_k)


class SigmoidRouter(LinearRouter):
    """:func:`sigmoid_topk` over a linear map, with its correction bias: DeepSeek-V3.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K.
        n_group: as in :func:`sigmoid_topk`, like ``topk_group``, ``renormalize`` and ``scale``.
        topk_group: groups that a token may use.
        renormalize: whether weights are divided by their sum.
        scale: factor on the weights.
        **options: ``bias``, ``upcast``, ``device``, ``dtype`` of :class:`LinearRouter`.

    Attributes:
        e_score_correction_bias: ``(E,)`` float32 buffer, zero initially and saved with the state. It stays float32 when
            the module is cast, because :func:`gossamer.nn.update_expert_bias` moves it in steps that bfloat16 loses.
    """

    _wide_buffers = ("e_score_correction_bias",)

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        n_group: int = 1,
        topk_group: int = 1,
        renormalize: bool = True,
        scale: float = 1.0,
        **options: object,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **options)
        check_selection(num_experts, top_k, n_group, topk_group, scale)
        self.selection = {
            "n_group": n_group,
            "topk_group": topk_group,
            "renormalize": renormalize,
            "scale": scale,
        }
        bias = torch.zeros(num_experts, device=self.weight.device, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias)

    def reset_parameters(self) -> None:
        """Redraw the weight and set the correction bias to zero."""
        super().reset_parameters()
        if "e_score_correction_bias" in self._buffers:
            self.e_score_correction_bias.zero_()

    def route(self, logits: torch.Tensor) -> Routing:
        """:func:`sigmoid_topk` of ``logits (T, E)``."""
        return sigmoid_topk(logits, self.top_k, correction_bias=self.e_score_correction_bias, **self.selection)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in self.selection.items())])
