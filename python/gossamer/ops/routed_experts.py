"""A top-k router's choice, the dispatch and the experts of a call without gradients, in one native call.

The kernels are those of ``topk_routing``, ``dispatch`` and ``expert_mlp``, which give the same bits one by one. For a
few tokens the host needs as long for the calls as the kernels run, so what does not change is prepared once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch._C import _is_any_autocast_enabled
from torch.compiler import is_compiling

from gossamer import _backend
from gossamer._activation import Activation
from gossamer._checks import FLOAT_DTYPES
from gossamer.ops._registration import is_plain
from gossamer.ops._weights import Weight
from gossamer.ops.quantized_expert_weight import QuantizedExpertWeight
from gossamer.ops.topk_routing import MOST_CHOSEN

if TYPE_CHECKING:
    from gossamer import _C


class ExpertChoice(NamedTuple):
    """How experts are chosen from logits: the arguments of ``gossamer.nn.softmax_topk`` or ``sigmoid_topk``."""

    top_k: int
    sigmoid: bool
    renormalize: bool
    n_group: int
    topk_group: int
    scale: float
    bias: torch.Tensor | None


class ExpertStack(NamedTuple):
    """The weights of an expert layer with their biases, without updates, and its activation."""

    gate_up: Weight
    down: Weight
    activation: Activation
    interleaved: bool


class Prepared(NamedTuple):
    """What stays the same from call to call; it holds addresses, so the tensors must outlive its calls."""

    layer: _C.RoutedExperts
    num_experts: int
    hidden_size: int
    output_size: int
    dtypes: tuple[torch.dtype, ...]  # of x


def is_plain_on_cpu(*tensors: torch.Tensor | None) -> bool:
    """Whether these are ordinary tensors on the CPU, and no mode, transformation or profiler watches their use."""
    given = [tensor for tensor in tensors if tensor is not None]
    return all(tensor.is_cpu for tensor in given) and is_plain(given)


def may_run(x: torch.Tensor) -> bool:
    """Whether only the native kernels take part in a call with ``x``: no gradient, compiler, mode or autocast."""
    if is_compiling() or torch.is_grad_enabled() or not is_plain_on_cpu(x) or _is_any_autocast_enabled():
        return False
    return _backend.resolve("expert_mlp", x) == "native"


def _fits(choice: ExpertChoice, experts: ExpertStack) -> bool:
    """Whether the native kernels serve these, and their shapes fit each other."""
    up, down, activation = experts.gate_up, experts.down, experts.activation
    parts = (up.data, up.scale, up.bias, down.data, down.scale, down.bias, choice.bias)
    if not is_plain_on_cpu(*parts) or len(up.shape) != 3 or len(down.shape) != 3:
        return False
    (e, wide, h), (_, o, inner) = up.shape, down.shape
    shapes = [(down.shape, (e, o, inner)), (wide, activation.halves * inner)]
    shapes += [(w.bias.shape, (e, w.shape[1])) for w in (up, down) if w.bias is not None]
    if any(tuple(found) != wanted if isinstance(wanted, tuple) else found != wanted for found, wanted in shapes):
        return False
    if choice.bias is not None:
        if choice.bias.shape != (e,) or choice.bias.dtype != torch.float32 or not choice.bias.is_contiguous():
            return False
    sizes = choice.top_k, choice.n_group, choice.topk_group
    if not all(type(size) is int and 1 <= size <= e for size in sizes) or not isinstance(choice.scale, (int, float)):
        return False
    if (
        e % choice.n_group
        or not choice.topk_group <= min(choice.n_group, MOST_CHOSEN)
        or not 0 < choice.scale < math.inf
    ):
        return False
    if choice.top_k > min(e // choice.n_group * choice.topk_group, MOST_CHOSEN):
        return False
    return h > 0 and inner > 0 and _backend.serves_weights("native", "expert_mlp", (up.kind, down.kind), False)


def prepare(
    choice: ExpertChoice,
    weights: tuple[torch.Tensor | QuantizedExpertWeight, torch.Tensor | QuantizedExpertWeight],
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
    activation: Activation,
    interleaved: bool,
) -> Prepared | None:
    """What :func:`run` needs, or None if the native kernels do not serve these.

    Args:
        choice: of experts.
        weights: ``gate_up`` and ``down`` of :func:`gossamer.expert_mlp`.
        biases: of the same two.
        activation: as there, like ``interleaved``.
        interleaved: whether gate and up alternate.
    """
    if not all(isinstance(weight, (torch.Tensor, QuantizedExpertWeight)) for weight in weights):
        return None
    stored = (weight.operand() if isinstance(weight, QuantizedExpertWeight) else Weight(weight) for weight in weights)
    up, down = (weight._replace(bias=bias) for weight, bias in zip(stored, biases, strict=True))
    experts = ExpertStack(up, down, activation, interleaved)
    if _backend.native_unavailable() is not None or not _fits(choice, experts):
        return None
    values = (experts.gate_up.values, experts.down.values, experts.gate_up.bias, experts.down.bias)
    found = {value.dtype for value in values if value is not None}
    dtypes = tuple(dtype for dtype in FLOAT_DTYPES if found <= {dtype})
    if not dtypes:
        return None
    from gossamer.cpu_kernels import routed_experts

    e, _, h = experts.gate_up.shape
    return Prepared(routed_experts.prepare(choice, experts), e, h, experts.down.shape[1], dtypes)


def run(prepared: Prepared, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """The layer's output for ``x (T, H)``, for which :func:`may_run` is true, and ``logits (T, E)``.

    None if it does not serve them: for other dtypes and sizes, no tokens, and logits that are NaN or +inf.
    """
    if not is_plain_on_cpu(logits) or logits.dtype != torch.float32 or x.dtype not in prepared.dtypes:
        return None
    if x.shape[0] == 0 or x.shape[1] != prepared.hidden_size or logits.shape != (len(x), prepared.num_experts):
        return None
    from gossamer.cpu_kernels import routed_experts

    return routed_experts.run(prepared.layer, logits.contiguous(), x, prepared.output_size)
