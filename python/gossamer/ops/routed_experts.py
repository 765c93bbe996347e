"""A whole expert layer without gradients in one native call: dispatch and experts, optionally with top-k routing.

The kernels are those of ``topk_routing``, ``dispatch`` and ``expert_mlp``, and results have the same bits as theirs.
With a few tokens, three separate calls cost the host as much time as the kernels run, so everything that does not
change between calls is prepared once.
"""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch._C import _is_any_autocast_enabled
from torch.compiler import is_compiling

from gossamer import _backend
from gossamer._activation import Activation
from gossamer._checks import FLOAT_DTYPES, INDEX_DTYPES
from gossamer.ops._registration import is_plain
from gossamer.ops._weights import Weight
from gossamer.ops.quantized_expert_weight import QuantizedExpertWeight
from gossamer.ops.topk_routing import MOST_CHOSEN

if TYPE_CHECKING:
    from gossamer import _C
    from gossamer.ops.dispatch import Dispatch


class ExpertChoice(NamedTuple):
    """How experts are chosen from logits: the arguments of ``gossamer.nn.softmax_topk`` or ``sigmoid_topk``."""

    top_k: int
    sigmoid: bool
    renormalize: bool
    n_group: int
    topk_group: int
    scale: float
    bias: torch.Tensor | None


class Prepared(NamedTuple):
    """The arguments that stay the same from call to call, as memory addresses: the tensors must outlive the record."""

    layer: _C.PreparedExperts
    choice: ExpertChoice | None
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


def _is_valid(choice: ExpertChoice, num_experts: int) -> bool:
    """Whether the native kernel of the choice serves these sizes."""
    sizes, bias = (choice.top_k, choice.n_group, choice.topk_group), choice.bias
    if not all(type(size) is int and 1 <= size <= num_experts for size in sizes) or num_experts % choice.n_group:
        return False
    if not isinstance(choice.scale, (int, float)) or not 0 < choice.scale < math.inf:
        return False
    if bias is not None and (bias.shape != (num_experts,) or bias.dtype != torch.float32 or not bias.is_contiguous()):
        return False
    reachable = num_experts // choice.n_group * choice.topk_group
    return choice.topk_group <= min(choice.n_group, MOST_CHOSEN) and choice.top_k <= min(reachable, MOST_CHOSEN)


def _fits(up: Weight, down: Weight, activation: Activation) -> bool:
    """Whether the native kernels serve these weights with their biases, and their shapes fit each other."""
    if len(up.shape) != 3 or len(down.shape) != 3:
        return False
    (e, wide, h), inner = up.shape, down.shape[2]
    if wide != activation.halves * inner or down.shape[0] != e or h == 0 or inner == 0:
        return False
    if any(weight.bias is not None and weight.bias.shape != (e, weight.shape[1]) for weight in (up, down)):
        return False
    return _backend.serves_weights("native", "expert_mlp", (up.kind, down.kind), False)


def prepare(
    weights: tuple[torch.Tensor | QuantizedExpertWeight, torch.Tensor | QuantizedExpertWeight],
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
    activation: Activation,
    interleaved: bool,
    choice: ExpertChoice | None = None,
) -> Prepared | None:
    """The record that :func:`run` and :func:`run_chosen` need, or None if the native kernels do not serve the layer.

    Args:
        weights: ``gate_up`` and ``down`` of :func:`gossamer.expert_mlp`.
        biases: of the same two.
        activation: as there, like ``interleaved``.
        interleaved: whether gate and up alternate.
        choice: of experts, for :func:`run`.
    """
    if _backend.native_unavailable() is not None:
        return None
    if not all(isinstance(weight, (torch.Tensor, QuantizedExpertWeight)) for weight in weights):
        return None
    stored = (weight.operand() if isinstance(weight, QuantizedExpertWeight) else Weight(weight) for weight in weights)
    up, down = (weight._replace(bias=bias) for weight, bias in zip(stored, biases, strict=True))
    tensors = (up.data, up.scale, up.bias, down.data, down.scale, down.bias, None if choice is None else choice.bias)
    if not is_plain_on_cpu(*tensors) or not _fits(up, down, activation):
        return None
    e, _, h = up.shape
    found = {value.dtype for value in (up.values, down.values, *biases) if value is not None}
    dtypes = tuple(dtype for dtype in FLOAT_DTYPES if found <= {dtype})
    if "int8" in (up.activations, down.activations):
        # Rows in float64 are rounded before its products.
        dtypes = tuple(dtype for dtype in dtypes if dtype != torch.float64)
    if not dtypes or not (choice is None or _is_valid(choice, e)):
        return None
    from gossamer.cpu_kernels import routed_experts

    layer = routed_experts.prepare(up, down, activation, interleaved)
    return Prepared(layer, choice, e, h, down.shape[1], dtypes)


def _takes(prepared: Prepared, x: torch.Tensor) -> bool:
    return x.dtype in prepared.dtypes and x.dim() == 2 and x.shape[0] > 0 and x.shape[1] == prepared.hidden_size


def run(prepared: Prepared, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """The layer's output for ``x (T, H)``, for which :func:`may_run` is true, and ``logits (T, E)``.

    None if the native call does not serve them: other dtypes or sizes, no tokens, or logits that are NaN or +inf.
    """
    if not _takes(prepared, x) or not is_plain_on_cpu(logits):
        return None
    if logits.dtype != torch.float32 or logits.shape != (x.shape[0], prepared.num_experts):
        return None
    from gossamer.cpu_kernels import routed_experts

    return routed_experts.run(prepared, logits, x)


def run_chosen(
    prepared: Prepared, expert_ids: torch.Tensor, weights: torch.Tensor, x: torch.Tensor
) -> torch.Tensor | None:
    """The layer's output for ``x (T, H)``, for which :func:`may_run` is true, with given ``(T, K)`` ids and weights.

    None if the native call does not serve them: other dtypes or sizes, no tokens, K > E, or negative ids.
    """
    if not _takes(prepared, x) or not is_plain_on_cpu(expert_ids, weights):
        return None
    if expert_ids.dtype not in INDEX_DTYPES or weights.dtype not in (x.dtype, torch.float32):
        return None
    shape = expert_ids.shape
    if len(shape) != 2 or weights.shape != shape or shape[0] != x.shape[0] or not 0 < shape[1] <= prepared.num_experts:
        return None
    from gossamer.cpu_kernels import routed_experts

    return routed_experts.run_chosen(prepared, expert_ids, weights, x)


class _Kept(NamedTuple):
    """What was prepared for a pair of quantised weights, of which the first keeps it."""

    down: weakref.ref[QuantizedExpertWeight]
    activation: Activation
    interleaved: bool
    places: list
    prepared: Prepared | None


def run_dispatched(
    gate_up: QuantizedExpertWeight,
    down: QuantizedExpertWeight,
    dispatch: Dispatch,
    weights: torch.Tensor,
    x: torch.Tensor,
    activation: Activation,
    interleaved: bool,
) -> torch.Tensor | None:
    """``gossamer.expert_mlp`` of tensors for which :func:`may_run` is true, with a dispatch that was checked.

    None if it does not serve them, or if they do not fit each other.
    """
    tensors = gate_up.data, gate_up.scale, down.data, down.scale
    if not {torch.Tensor}.issuperset(map(type, tensors)) or not isinstance(weights, torch.Tensor):
        return None
    # The tensors of a weight stay, but their memory can be replaced.
    places, kept = [part for t in tensors for part in (t.data_ptr(), t.shape, t.is_contiguous())], gate_up._prepared
    if (
        kept is None
        or kept.down() is not down
        or kept.activation != activation
        or kept.interleaved != interleaved
        or kept.places != places
    ):
        prepared = prepare((gate_up, down), (None, None), activation, interleaved)
        kept = _Kept(weakref.ref(down), activation, interleaved, places, prepared)
        object.__setattr__(gate_up, "_prepared", kept)
    prepared = kept.prepared
    if prepared is None or not _takes(prepared, x) or not is_plain_on_cpu(weights, dispatch.slots, dispatch.offsets):
        return None
    shape = dispatch.num_tokens, dispatch.top_k
    if dispatch.num_experts != prepared.num_experts or x.shape[0] != shape[0] or weights.shape != shape:
        return None
    if weights.dtype not in (x.dtype, torch.float32):
        return None
    from gossamer.cpu_kernels import routed_experts

    return routed_experts.run_dispatched(prepared, dispatch, weights, x)
