"""Launchers of the native delta rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import DTYPES, empty_huge

if TYPE_CHECKING:
    from gossamer.ops.delta_rule import DeltaRule, DeltaRuleBackward, DeltaRuleForward

_ABSENT = (0, 0, 0, 0, 0)


def _heads(x: torch.Tensor | None) -> tuple[int, int, int, int, int]:
    """``(pointer, batch stride, token stride, head stride, dtype code)``; channels are contiguous."""
    if x is None:
        return _ABSENT
    return x.data_ptr(), *x.stride()[:3], DTYPES[x.dtype]


def _unit_channels(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 3 or x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _pointer(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class _Call:
    """The arguments in the form that ``_C`` takes. It keeps the tensors behind the pointers alive."""

    def __init__(
        self,
        args: DeltaRule,
        o: torch.Tensor | None,
        final_state: torch.Tensor | None,
        checkpoints: torch.Tensor | None = None,
    ) -> None:
        wide = torch.promote_types(args.q.dtype, torch.float32)
        self.q, self.k, self.v = _unit_channels(args.q), _unit_channels(args.k), _unit_channels(args.v)
        self.beta = args.beta
        self.g = None if args.g is None else _unit_channels(args.g)
        self.a_log, self.dt_bias = (
            None if x is None else x.detach().to(wide).contiguous() for x in (args.a_log, args.dt_bias)
        )
        self.initial_state = None if args.initial_state is None else args.initial_state.contiguous()
        self.bounds = None if args.cu_seqlens is None else args.cu_seqlens.to(torch.int64).contiguous()
        self.outputs = o, final_state, checkpoints
        b, t, key_heads, key_size = args.q.shape
        self.record = _C.DeltaRule(
            arrays=tuple(map(_heads, (self.q, self.k, self.v, self.beta, self.g, o))),
            sizes=(b, t, key_heads, args.v.shape[2], key_size, args.v.shape[3]),
            bounds=_pointer(self.bounds),
            num_sequences=args.num_sequences,
            decay=0 if args.g is None else args.g.dim() - 2,
            a_log=_pointer(self.a_log),
            dt_bias=_pointer(self.dt_bias),
            lower_bound=args.lower_bound,
            scale=args.scale,
            l2norm=args.use_qk_l2norm,
            initial_state=_pointer(self.initial_state),
            final_state=_pointer(final_state),
            checkpoints=_pointer(checkpoints),
        )


def delta_rule(call: DeltaRuleForward) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The output, and if requested the final state and the states for the backward pass."""
    args = call.args
    o = empty_huge(tuple(args.v.shape), args.v.dtype)
    wide = torch.promote_types(args.q.dtype, torch.float32)
    final_state = torch.empty(args.state_shape, dtype=wide) if args.output_final_state else None
    checkpoints = empty_huge(call.checkpoint_shape, wide) if call.checkpoint_tokens else None
    native = _Call(args, o, final_state, checkpoints)
    _C.delta_rule(native.record, torch.get_num_threads())
    return o, final_state, checkpoints


def delta_rule_step(args: DeltaRule) -> torch.Tensor:
    """The output of one token; the initial state changes in place."""
    o = torch.empty(args.v.shape, dtype=args.v.dtype)
    native = _Call(args, o, args.initial_state)
    _C.delta_rule_step(native.record, torch.get_num_threads())
    return o


def _token(x: torch.Tensor | None) -> tuple[int, int, int, int, int]:
    if x is None:
        return _ABSENT
    strides = x.stride()
    return x.data_ptr(), strides[0], 0, strides[1], DTYPES[x.dtype]


def step_of_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    state: torch.Tensor,
    scale: float,
    use_qk_l2norm: bool,
) -> torch.Tensor:
    """:func:`delta_rule_step` of operands without a dimension of tokens, and without a raw gate."""
    b, key_heads, key_size = q.shape
    heads, value_size = v.shape[1:]
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    if g is not None and g.dim() == 3 and g.stride(2) != 1:
        g = g.contiguous()
    o = torch.empty((b, heads, value_size), dtype=v.dtype)
    record = _C.DeltaRule(
        arrays=(_token(q), _token(k), _token(v), _token(beta), _token(g), _token(o)),
        sizes=(b, 1, key_heads, heads, key_size, value_size),
        bounds=0,
        num_sequences=b,
        decay=0 if g is None else g.dim() - 1,
        a_log=0,
        dt_bias=0,
        lower_bound=None,
        scale=scale,
        l2norm=use_qk_l2norm,
        initial_state=0,
        final_state=state.data_ptr(),
        checkpoints=0,
    )
    _C.delta_rule_step(record, torch.get_num_threads())
    return o


def delta_rule_backward(call: DeltaRuleBackward) -> dict[str, torch.Tensor]:
    """The gradients named in ``call.needs``."""
    args, wanted = call.forward.args, frozenset(call.needs)
    wide = torch.promote_types(args.q.dtype, torch.float32)
    gated = wanted & {"g", "a_log", "dt_bias"}
    found = {name: empty_huge(tuple(getattr(args, name).shape), args.q.dtype) for name in wanted & {"q", "k", "v"}}
    if "beta" in wanted:
        found["beta"] = torch.empty(args.beta.shape, dtype=args.beta.dtype)
    if gated:
        found["g"] = empty_huge(tuple(args.g.shape), wide)
    if "initial_state" in wanted:
        found["initial_state"] = torch.empty(args.state_shape, dtype=wide)
    d_o = _unit_channels(call.d_o)
    dfinal_state = None if call.dfinal_state is None else call.dfinal_state.to(wide).contiguous()
    native = _Call(args, None, None, call.checkpoints)
    threads = torch.get_num_threads()
    gradients = tuple(_heads(found.get(name)) for name in ("q", "k", "v", "beta", "g"))
    _C.delta_rule_backward(
        native.record, _heads(d_o), _pointer(dfinal_state), gradients, _pointer(found.get("initial_state")), threads
    )
    if gated and args.a_log is not None:
        channels = args.g.shape[3] if args.by_channel else 1
        found["a_log"] = torch.empty(args.a_log.shape, dtype=wide)
        if args.dt_bias is not None:
            found["dt_bias"] = torch.empty(args.dt_bias.shape, dtype=wide)
        pointers = tuple(map(_pointer, (native.a_log, native.dt_bias)))
        results = tuple(_pointer(found.get(name)) for name in ("a_log", "dt_bias"))
        b, t, heads = args.v.shape[:3]
        _C.gate_backward(
            b, t, heads, channels, _heads(native.g), _heads(found["g"]), *pointers, args.lower_bound, *results, threads
        )
    return {name: gradient.to(getattr(args, name).dtype) for name, gradient in found.items() if name in wanted}
