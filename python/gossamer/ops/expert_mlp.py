"""The whole expert feed-forward layer as one operator: gather, GEMM with GLU, GEMM, weighted sum back to tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch

from gossamer import _backend
from gossamer._activation import Activation, activate_reference, as_activation, check_interleaved
from gossamer._autocast import autocast
from gossamer._checks import (
    check_float,
    check_same_device,
    check_same_dtype,
    check_scale,
    check_shape,
    check_tensor,
)
from gossamer._layout import stored_transposed
from gossamer.ops._groups import Groups
from gossamer.ops._overwrite import may_overwrite
from gossamer.ops._records import define, define_gradients
from gossamer.ops._weights import Weight, as_weight, round_rows
from gossamer.ops.activate import activate
from gossamer.ops.dispatch import Dispatch, check_dispatch
from gossamer.ops.gather_reduce import combine_slots
from gossamer.ops.grouped_matmul import rows_by_weight
from gossamer.ops.low_rank import check_factor_dtype, check_rank
from gossamer.ops.quantized_expert_weight import QuantizedExpertWeight
from gossamer.ops.routed_experts import may_run, run_dispatched

LowRankFactors = tuple[torch.Tensor, torch.Tensor]


def expert_mlp_reference(
    x: torch.Tensor,
    gate_up: torch.Tensor | QuantizedExpertWeight,
    down: torch.Tensor | QuantizedExpertWeight,
    dispatch: Dispatch,
    weights: torch.Tensor,
    *,
    activation: str | Activation = "swiglu",
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    interleaved: bool = False,
    gate_up_lora: LowRankFactors | None = None,
    down_lora: LowRankFactors | None = None,
    lora_scale: float = 1.0,
) -> torch.Tensor:
    """:func:`expert_mlp` as a loop over experts in plain torch, differentiable, in any floating dtype."""
    activation = as_activation(activation)

    def multiplied(weight: torch.Tensor | QuantizedExpertWeight) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """The product of rows with an expert's weight."""
        if not isinstance(weight, QuantizedExpertWeight):
            return lambda rows, e: rows @ weight[e].T
        if weight.activations == "float":
            return multiplied(weight.dequantize(x.dtype))
        wide = weight.dequantize(torch.promote_types(x.dtype, torch.float32))
        return lambda rows, e: (round_rows(rows, weight.operand()) @ wide[e].T).to(x.dtype)

    by_gate_up, by_down = multiplied(gate_up), multiplied(down)
    slots = dispatch.slots.long()
    offsets = dispatch.offsets.tolist()
    flat_weights = weights.reshape(-1)
    accumulate = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(x.shape[0], down.shape[1], dtype=accumulate, device=x.device)
    for e in range(dispatch.num_experts):
        mine = slots[offsets[e] : offsets[e + 1]]
        token = mine // dispatch.top_k
        rows = x.index_select(0, token)
        hidden = by_gate_up(rows, e)
        if gate_up_lora is not None:
            hidden = hidden + lora_scale * (rows @ gate_up_lora[0][e].T.to(x.dtype) @ gate_up_lora[1][e].T.to(x.dtype))
        if gate_up_bias is not None:
            hidden = hidden + gate_up_bias[e]
        act = activate_reference(hidden, activation, interleaved)
        out = by_down(act, e)
        if down_lora is not None:
            out = out + lora_scale * (act @ down_lora[0][e].T.to(x.dtype) @ down_lora[1][e].T.to(x.dtype))
        if down_bias is not None:
            out = out + down_bias[e]
        y = y.index_add(0, token, out.to(accumulate) * flat_weights[mine].to(accumulate).unsqueeze(1))
    return y.to(x.dtype)


class ExpertMlp(NamedTuple):
    """Arguments of the expert layer ``y[t] = Σ_k weights[t,k]·(act(x[t]·W1ᵀ + b1)·W2ᵀ + b2)``.

    Attributes:
        x: ``(T, H)``.
        gate_up: W1 ``(E, 2I, H)``, or ``(E, I, H)`` for an ungated activation, with b1.
        down: W2 ``(E, O, I)``, with b2.
        groups: the R rows by expert.
        weights: ``(T, K)`` routing weights.
        activation: the activation with its constants.
        interleaved: whether gate and up alternate along 2I.
        save: whether to save intermediate results for the backward pass.
    """

    x: torch.Tensor
    gate_up: Weight
    down: Weight
    groups: Groups
    weights: torch.Tensor
    activation: Activation
    interleaved: bool
    save: bool

    def inputs(self) -> dict[str, torch.Tensor | None]:
        """The differentiable tensors by the names of :data:`GRADIENTS`, in that order."""
        up, down = self.gate_up, self.down
        parts = (up.data, up.bias, up.a, up.b, down.data, down.bias, down.a, down.b)
        return dict(zip(GRADIENTS, (self.x, self.weights, *parts), strict=True))


class ExpertMlpBackward(NamedTuple):
    """Arguments of the layer's gradients.

    Attributes:
        dy: ``(T, O)``.
        forward: the arguments of the forward pass.
        preact: the pre-activation ``(R, 2I)`` of sorted rows.
        s1: ``x·aᵀ (R, r)`` of the update of W1, in float32 or float64; None without an update.
        s2: ``act·aᵀ (R, r)`` of the update of W2.
        needs: names of the needed gradients, among :data:`GRADIENTS`.
    """

    dy: torch.Tensor
    forward: ExpertMlp
    preact: torch.Tensor
    s1: torch.Tensor | None
    s2: torch.Tensor | None
    needs: list[str]


# y, and, if saved, the pre-activation, s1 and s2 as in ExpertMlpBackward.
ExpertMlpOutput = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
GRADIENTS = (
    "x",
    "weights",
    *(f"gate_up.{part}" for part in ("data", "bias", "a", "b")),
    *(f"down.{part}" for part in ("data", "bias", "a", "b")),
)


@functools.cache
def _kernels(backend: str) -> ModuleType:
    if backend == "native":
        from gossamer.cpu_kernels import expert_mlp
    elif backend == "triton":
        from gossamer.triton_kernels import expert_mlp
    else:
        from gossamer.cuda_kernels import expert_mlp
    return expert_mlp


def _forward(args: ExpertMlp, backend: str) -> ExpertMlpOutput:
    return _kernels(backend).expert_mlp(args)


def _forward_fake(args: ExpertMlp) -> ExpertMlpOutput:
    x, num_rows = args.x, args.groups.slots.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)

    def low(weight: Weight) -> torch.Tensor | None:
        return x.new_empty(num_rows, weight.a.shape[1], dtype=wide) if args.save and weight.a is not None else None

    preact = x.new_empty(num_rows, args.gate_up.shape[1]) if args.save else None
    return x.new_empty(x.shape[0], args.down.shape[1]), preact, low(args.gate_up), low(args.down)


_expert_mlp = define(
    "expert_mlp",
    ExpertMlp,
    kernel=_forward,
    fake=_forward_fake,
    returns="(Tensor y, Tensor preact, Tensor s1, Tensor s2)",
)


def _backward(args: ExpertMlpBackward, backend: str, overwrite: bool = False) -> dict[str, torch.Tensor]:
    return _kernels(backend).expert_mlp_backward(args, overwrite)


def _empty_gradient(like: torch.Tensor) -> torch.Tensor:
    """An uninitialised gradient with the layout of a weight."""
    if like.dim() == 3 and stored_transposed(like):
        return like.new_empty(like.shape[0], like.shape[2], like.shape[1]).transpose(1, 2)
    return like.new_empty(like.shape)


def _backward_fake(args: ExpertMlpBackward) -> dict[str, torch.Tensor]:
    inputs = args.forward.inputs()
    return {name: _empty_gradient(inputs[name]) for name in args.needs}


_expert_mlp_backward = define_gradients(
    "expert_mlp_backward", ExpertMlpBackward, GRADIENTS, kernel=_backward, fake=_backward_fake
)
# The same, with d(preact) written over preact, which is as large as all other activations together.
_expert_mlp_backward_ = define_gradients(
    "expert_mlp_backward_",
    ExpertMlpBackward,
    GRADIENTS,
    kernel=functools.partial(_backward, overwrite=True),
    fake=_backward_fake,
    mutates=("preact",),
)


def _save(ctx, args: ExpertMlp, output: ExpertMlpOutput):
    _, *saved = output
    if not args.save:
        raise RuntimeError("gossamer::expert_mlp needs save=True where a gradient is wanted")
    ctx.mark_non_differentiable(*(t for t in saved if t is not None))
    # Otherwise autograd would make (R, 2I) zeros as the gradient of preact.
    ctx.set_materialize_grads(False)
    # Detached aliases, so that the storage's reference count shows whether anything else holds preact.
    return args, *(t if t is None else t.detach() for t in saved)


def _differentiate(ctx, args: ExpertMlp, tensors: tuple, dy: torch.Tensor | None, *_):
    if dy is None:
        return {}
    preact, s1, s2 = tensors
    overwrites = ctx.backend != "native" and may_overwrite(preact)
    operator = _expert_mlp_backward_ if overwrites else _expert_mlp_backward
    return operator(ExpertMlpBackward(dy, args, preact, s1, s2, sorted(ctx.needs)), ctx.backend)


_expert_mlp.differentiate(_save, _differentiate)


def _product(rows: torch.Tensor, weight: Weight, dispatch: Dispatch, x_grouped: bool, backend: str) -> torch.Tensor:
    """``rows·Wᵀ + bias`` of sorted rows, and the update's product."""
    factors = weight.a, weight.b
    y = rows_by_weight(rows, weight._replace(a=None, b=None), dispatch, x_grouped, True, backend)
    if weight.a is None:
        return y
    a, b = (Weight(f.to(rows.dtype)) for f in factors)
    s = rows_by_weight(rows, a, dispatch, x_grouped, True, backend)
    update = rows_by_weight(s, b, dispatch, True, True, backend)
    if abs(weight.factor) > torch.finfo(y.dtype).max:
        # torch.add refuses an alpha outside the dtype; this product overflows to infinity, as in the fused kernels.
        return y + update * weight.factor
    return torch.add(y, update, alpha=weight.factor)


def _composed(args: ExpertMlp, dispatch: Dispatch, backend: str) -> torch.Tensor:
    """The layer as separate products on its dispatch, for weights that a family's fused kernels do not support."""
    hidden = _product(args.x, args.gate_up, dispatch, False, backend)
    act = activate(hidden, args.activation, interleaved=args.interleaved)
    out = _product(act, args.down, dispatch, True, backend)
    return combine_slots(out, dispatch, args.weights)


def _with_factors(name: str, weight: Weight, factors: LowRankFactors | None, factor: float, x: torch.Tensor) -> Weight:
    """``weight (E, N, C)`` with the update ``(a (E, r, C), b (E, N, r))``, in autocast's dtype if any."""
    if factors is None:
        return weight
    if not isinstance(factors, (tuple, list)) or len(factors) != 2:
        raise TypeError(f"{name} must be a pair (a, b) of tensors, got {type(factors).__name__}")
    a, b = factors
    e, n, c = weight.shape
    check_shape(f"{name}[0]", a, (e, None, c), "(E, r, C)")
    rank = a.shape[1]
    check_shape(f"{name}[1]", b, (e, n, rank), "(E, N, r)")
    check_rank(rank, n, c)
    a, b = autocast(a, b)
    check_factor_dtype(x, a, b, (f"{name}[0]", f"{name}[1]"))
    check_same_device(**{"x": x, f"{name}[0]": a, f"{name}[1]": b})
    return weight._replace(a=a, b=b, factor=factor)


def expert_mlp(
    x: torch.Tensor,
    gate_up: torch.Tensor | QuantizedExpertWeight,
    down: torch.Tensor | QuantizedExpertWeight,
    dispatch: Dispatch,
    weights: torch.Tensor,
    *,
    activation: str | Activation = "swiglu",
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    interleaved: bool = False,
    gate_up_lora: LowRankFactors | None = None,
    down_lora: LowRankFactors | None = None,
    lora_scale: float = 1.0,
) -> torch.Tensor:
    """The feed-forward layer of every token's experts: ``y[t] = Σ_k weights[t,k]·(act(x[t]·W1ᵀ + b1)·W2ᵀ + b2)``.

    W1, b1, W2 and b2 are those of expert ``expert_ids[t,k]``. W2 may have another number O of rows than ``x`` has
    columns. For the backward pass ``x``, the pre-activation ``(R, 2I)`` and the routing are saved and the rest is
    recomputed, after SonicMoE (Guo et al., 2025). The routing-weight gradient is ``⟨dy·W2, act⟩``, so the expert
    outputs are not saved. Dropped slots add nothing and get zero gradient.

    With low-rank factors (LoRA, Hu et al., 2021) the product ``v·W1ᵀ`` becomes ``v·W1ᵀ + lora_scale·(v·A1ᵀ)·B1ᵀ`` with
    the factors of the same expert, and ``v·W2ᵀ`` likewise; no expert's ``B·A`` is ever formed.

    Args:
        x: ``(T, H)``.
        gate_up: ``(E, 2I, H)``, or ``(E, I, H)`` for an ungated activation. Transposed storage ``(E, H, 2I)`` is given
            as ``gate_up.transpose(1, 2)`` and is not copied; so too for ``down``.
        down: ``(E, O, I)``, O being H in most layers. Either may be a frozen :class:`gossamer.QuantizedExpertWeight` of
            that shape, dequantised inside the kernels. If another argument needs a gradient, a layer with such a weight
            runs as separate :func:`gossamer.grouped_matmul` products that save the pre-activation and the activation;
            these are rounded, so the last bits of the result differ from the same call without gradients.
        dispatch: from :func:`gossamer.dispatch`, with the same T and E.
        weights: ``(T, K)`` routing weights; the dtype of ``x``, or float32.
        activation: a name of :class:`gossamer.Activation`, or one with its constants.
        gate_up_bias: ``(E, 2I)`` or ``(E, I)``, or None.
        down_bias: ``(E, O)`` or None.
        interleaved: whether gate and up alternate along 2I (gate even, up odd) instead of lying one after the other.
        gate_up_lora: ``(A1, B1)``, ``A1 (E, r, H)`` and ``B1 (E, 2I, r)`` or ``(E, I, r)``, or None; the dtype of
            ``x``, or float32, which is rounded to it for the products while its gradient is not.
        down_lora: ``(A2, B2)``, ``A2 (E, r, I)`` and ``B2 (E, O, r)``, or None; its rank may differ.
        lora_scale: the factor of both low-rank updates.

    Returns:
        ``(T, O)`` in the dtype of ``x``. Accumulated in float32 (float64 for float64). Under ``torch.autocast``
        everything except the routing weights is cast to its dtype.

    Raises:
        TypeError: an argument is not a tensor, a dispatch or a bool, a dtype is not supported, or dtypes differ.
        ValueError: the activation is unknown, or ``interleaved`` without a gate; shapes or devices do not fit each
            other or the dispatch, a rank is 0 or beyond its matrix, a part of a quantised weight requires a gradient,
            or ``lora_scale`` is a tensor that requires one, has several elements or lies on a GPU.
    """
    activation = as_activation(activation)
    check_interleaved(interleaved, activation)
    check_tensor("x", x)
    check_dispatch(dispatch)
    if type(gate_up) is type(down) is QuantizedExpertWeight and gate_up_bias is down_bias is None and may_run(x):
        if gate_up_lora is down_lora is None and type(lora_scale) is float:
            y = run_dispatched(gate_up, down, dispatch, weights, x, activation, interleaved)
            if y is not None:
                return y
    backend = _backend.resolve("expert_mlp", x)
    e, t, k = dispatch.num_experts, dispatch.num_tokens, dispatch.top_k
    check_shape("x", x, (t, None), "(T, H)")
    second, h = as_weight("down", down, (e, None, None), "(E, O, I)").for_backend(backend), x.shape[1]
    _, o, inner = second.shape
    symbols = f"(E, {'2I' if activation.gated else 'I'}, H)"
    if o != h:
        # I is taken from W1, because a W2 of the wrong shape is likelier than an intended different number of rows.
        inner = as_weight("gate_up", gate_up, (e, None, h), symbols).shape[1] // activation.halves
        as_weight("down", down, (e, None, inner), "(E, O, I)")
    wide = activation.halves * inner
    first = as_weight("gate_up", gate_up, (e, wide, h), symbols).for_backend(backend)
    check_tensor("weights", weights)
    check_shape("weights", weights, (t, k), "(T, K)")
    if gate_up_bias is not None:
        check_shape("gate_up_bias", gate_up_bias, (e, wide), f"(E, {'2I' if activation.gated else 'I'})")
    if down_bias is not None:
        check_shape("down_bias", down_bias, (e, o), "(E, O)")
    x, up_values, down_values, gate_up_bias, down_bias = autocast(
        x, first.values, second.values, gate_up_bias, down_bias
    )
    lora_scale = check_scale("lora_scale", lora_scale)
    first = _with_factors("gate_up_lora", first.with_values(up_values, gate_up_bias), gate_up_lora, lora_scale, x)
    second = _with_factors("down_lora", second.with_values(down_values, down_bias), down_lora, lora_scale, x)
    check_float("x", x, backend)
    _backend.check_served("expert_mlp", backend, x, first.quantized or second.quantized)
    check_same_dtype(x=x, gate_up=up_values, down=down_values, gate_up_bias=gate_up_bias, down_bias=down_bias)
    if weights.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"weights must have the dtype of x, {x.dtype}, or torch.float32, got {weights.dtype}")
    check_same_device(
        x=x,
        gate_up=first.data,
        down=second.data,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        weights=weights,
        dispatch=dispatch.slots,
    )
    if backend == "reference":
        return expert_mlp_reference(
            x,
            gate_up if first.quantized else first.data,
            down if second.quantized else second.data,
            dispatch,
            weights,
            activation=activation,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            interleaved=interleaved,
            gate_up_lora=None if first.a is None else (first.a, first.b),
            down_lora=None if second.a is None else (second.a, second.b),
            lora_scale=lora_scale,
        )
    parts = (x, weights, up_values, gate_up_bias, first.a, first.b, down_values, down_bias, second.a, second.b)
    save = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts)
    args = ExpertMlp(x, first, second, dispatch.groups, weights, activation, interleaved, save)
    served = _backend.serves_weights(backend, "expert_mlp", (first.kind, second.kind), save)
    if "int8" in (first.activations, second.activations):
        served = served and _backend.rounds_rows(backend, "expert_mlp", x)
    # Rows without columns still have products, namely the biases, which the fused kernels leave out.
    if h == 0 < o or not served:
        return _composed(args, dispatch, backend)
    y, *_ = _expert_mlp(args, backend)
    return y
