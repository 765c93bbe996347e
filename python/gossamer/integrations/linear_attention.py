"""Delta-rule layers of transformers: their state updates and convolutions, computed by gossamer.

transformers writes each such layer (the gated delta nets of Qwen3-Next and its relatives, Kimi delta attention and its
relatives) as a ``forward`` that calls functions of its own module: a chunked and a recurrent state update, a causal
convolution and its one-step form. Without flash-linear-attention and causal-conv1d, these are plain torch. The layer
gets a subclass of its class whose ``forward`` is the same code, including decorators, with gossamer's functions under
those names. Projections, norms, caches and hooks stay unchanged.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator

import torch
from torch import nn

from gossamer.integrations import _class_swap, surgery
from gossamer.integrations._class_swap import Swapped, undo, undo_obstacle
from gossamer.integrations._report import Replacement, SwitchedModule
from gossamer.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from gossamer.ops.delta_rule import delta_rule, delta_rule_step

ADAPTER = "linear_attention"
__all__ = ["ADAPTER", "holds_layers", "survey", "swap", "undo", "undo_obstacle"]


def _no_gradient(*tensors: torch.Tensor | None) -> bool:
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


def _update_state(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = 64,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`gossamer.delta_rule` with the signature that transformers calls; the state may be updated in place.

    Shapes are those of :func:`gossamer.delta_rule`. ``chunk_size`` is ignored; gossamer chooses its own.
    """
    if cu_seqlens is None:
        cu_seqlens = kwargs.get("cu_seq_lens_q")
    wide = torch.promote_types(query.dtype, torch.float32)
    g = g if g.dtype in (query.dtype, wide) else g.to(wide)
    beta = beta if beta.dtype in (query.dtype, wide) else beta.to(wide)
    state = initial_state
    if state is not None and state.dtype != wide:
        state = state.to(wide)
    one_token = query.shape[1] == 1 and output_final_state and cu_seqlens is None
    if one_token and state is not None and state.is_contiguous() and _no_gradient(query, key, value, g, beta, state):
        # The caller passes the cache's state and stores the result there, so the state may change in place.
        o = delta_rule_step(
            query[:, 0], key[:, 0], value[:, 0], beta[:, 0], state, g=g[:, 0], use_qk_l2norm=use_qk_l2norm_in_kernel
        )
        return o.unsqueeze(1), state
    return delta_rule(
        query,
        key,
        value,
        beta,
        g=g,
        initial_state=state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        use_qk_l2norm=use_qk_l2norm_in_kernel,
    )


def _begins(seq_idx: torch.Tensor) -> torch.Tensor:
    """``cu_seqlens`` of a batch of one, from the sequence number of each position ``(1, T)``."""
    changes = (seq_idx[0].diff() != 0).nonzero().squeeze(1) + 1
    ends = torch.tensor([seq_idx.shape[1]], device=seq_idx.device)
    return torch.cat([ends.new_zeros(1), changes, ends])


def _activate(y: torch.Tensor, activation: str | None) -> torch.Tensor:
    if activation is None:
        return y
    from transformers.activations import ACT2FN

    return ACT2FN[activation](y)


def _fused(activation: str | None) -> bool:
    return activation in (None, "silu", "swish")


def _convolve(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs: object,
) -> torch.Tensor:
    """:func:`gossamer.causal_conv1d` with the signature that transformers calls.

    Args:
        hidden_states: ``(B, C, T)``.
        weight: ``(C, W)``.
        bias: ``(C,)`` or None.
        activation: a name of transformers' ``ACT2FN`` or None.
        seq_idx: ``(1, T)``, the number of the sequence that each position of a pack belongs to; or None.
        cu_seqlens: the same as sequence boundaries; takes precedence over ``seq_idx``.
        **kwargs: ``cu_seq_lens_q`` is another name of ``cu_seqlens``.
    """
    if cu_seqlens is None:
        cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is None and seq_idx is not None:
        cu_seqlens = _begins(seq_idx)
    if cu_seqlens is not None and int(hidden_states.shape[0]) != 1:
        raise ValueError(f"hidden_states must be a batch of one for packed sequences, got {hidden_states.shape[0]}")
    x = hidden_states.transpose(1, 2)
    if weight.dtype not in (x.dtype, torch.float32):
        x = x.to(weight.dtype)
    fused = _fused(activation)
    y, _ = causal_conv1d(x, weight, bias, activation=activation if fused else None, cu_seqlens=cu_seqlens)
    y = y if fused else _activate(y, activation)
    return y.transpose(1, 2).to(hidden_states.dtype)


def _convolve_step(
    hidden_states: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **kwargs: object,
) -> torch.Tensor:
    """:func:`gossamer.causal_conv1d_step` in the form that transformers calls; ``conv_state`` is updated in place.

    Args:
        hidden_states: ``(B, C, T)``, T mostly 1.
        conv_state: ``(B, C, S)``, the inputs before.
        weight: ``(C, W)``.
        bias: ``(C,)`` or None.
        activation: a name of transformers' ``ACT2FN`` or None.
        **kwargs: ignored.
    """
    fused = _fused(activation)
    inner = activation if fused else None
    dtype = hidden_states.dtype if weight.dtype == torch.float32 else weight.dtype
    x = hidden_states.to(dtype)
    if x.shape[2] == 1 and conv_state.dtype == dtype and _no_gradient(x, conv_state, weight, bias):
        y = causal_conv1d_step(x.squeeze(2), conv_state, weight, bias, activation=inner).unsqueeze(2)
    else:
        y, last = causal_conv1d(
            x.transpose(1, 2),
            weight,
            bias,
            activation=inner,
            initial_state=conv_state.to(dtype),
            output_final_state=True,
        )
        y = y.transpose(1, 2)
        conv_state.copy_(last)
    y = y if fused else _activate(y, activation)
    return y.to(hidden_states.dtype)


# The functions that transformers' layers call, by their names in transformers' modules.
_STATE_UPDATES = {
    "torch_chunk_gated_delta_rule": _update_state,
    "torch_recurrent_gated_delta_rule": _update_state,
    "chunk_kimi_delta_attention": _update_state,
    "recurrent_kimi_delta_attention": _update_state,
}
_FUNCTIONS = _STATE_UPDATES | {"causal_conv1d_fn": _convolve, "causal_conv1d_update": _convolve_step}


def _innermost(function: Callable) -> Callable:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _calls(cls: type) -> set[str]:
    """The names among gossamer's that a class's ``forward`` calls."""
    code = getattr(_innermost(cls.forward), "__code__", None)
    return set(_FUNCTIONS) & set(code.co_names) if code else set()


def _with_functions(function: Callable, functions: dict[str, Callable]) -> Callable | None:
    """``function`` with other functions under these global names; None where a decorator cannot be inspected.

    Its decorators are rebuilt around it; each is found through the closure cell that holds the wrapped function.
    """
    if not isinstance(function, types.FunctionType):
        return None
    scope, cells = function.__globals__, function.__closure__
    wrapped = function.__dict__.get("__wrapped__")
    if wrapped is None:
        # torch.compile looks up globals in the module of that name, where it would find transformers' functions.
        scope = {name: value for name, value in scope.items() if name != "__name__"} | functions
    else:
        inner = _with_functions(wrapped, functions)
        holds = [cell.cell_contents is wrapped for cell in cells or ()]
        if inner is None or sum(holds) != 1:
            return None
        cells = tuple(types.CellType(inner) if held else cell for cell, held in zip(cells, holds, strict=True))
    made = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__doc__, made.__qualname__, made.__module__ = function.__doc__, function.__qualname__, function.__module__
    made.__dict__.update(function.__dict__)
    if wrapped is not None:
        made.__wrapped__ = inner
    return made


class _Computed(Swapped):
    """Mixed into the classes that gossamer makes."""

    @staticmethod
    @functools.cache
    def class_of(theirs: type) -> type | None:
        """The subclass whose ``forward`` calls gossamer's functions, or None where it cannot be made."""
        forward = _with_functions(theirs.forward, {name: _FUNCTIONS[name] for name in _calls(theirs)})
        if forward is None:
            return None
        return type(theirs.__name__, (_Computed, theirs), {"forward": forward, "__module__": __name__})


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if not isinstance(module, _Computed) and _calls(type(module)) & set(_STATE_UPDATES):
            yield name, module


def holds_layers(model: nn.Module) -> bool:
    """Whether the model has a delta-rule layer of transformers that gossamer does not compute yet."""
    return any(True for _ in _layers(model))


def _obstacle(name: str, module: nn.Module) -> str | None:
    """Why gossamer cannot compute this layer, or None when it can."""
    if "forward" in module.__dict__:
        return "its forward is overridden on the instance"
    if _Computed.class_of(type(module)) is None:
        return "its forward has a decorator that cannot be inspected"
    parameter = next(module.parameters(), None)
    return None if parameter is None else surgery.tensor_obstacle("a weight", parameter)


def survey(model: nn.Module, strict: bool) -> surgery.Survey:
    """The delta-rule layers inside ``model``; raises a ValueError when ``strict`` and one cannot be switched."""
    return _class_swap.survey(_layers(model), _obstacle, strict, "delta-rule layers")


def swap(model: nn.Module, found: surgery.Survey) -> Replacement:
    """Give the chosen layers classes that call gossamer's functions."""
    switched = []
    for name, module in found.chosen:
        theirs = type(module)
        _class_swap.switch(module, ADAPTER, _Computed)
        kind = "by channel" if any("kimi" in called for called in _calls(theirs)) else "by head"
        switched.append(SwitchedModule(name, theirs.__name__, True, f"delta rule gated {kind}"))
    return Replacement(tuple(switched), found.skipped, "delta-rule layers")
