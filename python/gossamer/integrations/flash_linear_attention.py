"""flash-linear-attention's operators on the CPU: gossamer as a backend in that package's own registry.

Its own kernels are written in Triton and need an accelerator. Its registry (``fla.backends``) lets another package
compute ``chunk_gated_delta_rule``, ``chunk_kda`` and the forward pass of ``fused_recurrent_kda``. ``chunk_delta_rule``,
``fused_recurrent_delta_rule`` and ``fused_recurrent_gated_delta_rule`` are not open to backends: call
:func:`gossamer.delta_rule` instead.
"""

from __future__ import annotations

import functools
import inspect
from typing import NamedTuple

import torch

from gossamer.ops.delta_rule import delta_rule

# Arguments that do not affect values, and arguments that must be absent.
_IRRELEVANT = {"chunk_size", "chunk_indices", "cu_seqlens_cpu", "disable_recompute", "safe_gate", "max_num_seqs"}
_REFUSED = ("cp_context", "use_graph", "return_intermediate_states", "ssm_state_indices", "num_accepted_tokens")


def _wide(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in a dtype that :func:`gossamer.delta_rule` accepts together with ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    return x if x.dtype in (dtype, wide) else x.to(wide)


class _Call(NamedTuple):
    """A call of an operator of flash-linear-attention, by its argument names.

    Shapes are those of :func:`gossamer.delta_rule`; with ``state_v_first`` states are ``(N, H, D_v, D_k)``. Raw
    ``beta`` becomes σ(beta), or 2σ(beta) with ``allow_neg_eigval``; a gate without ``A_log`` is
    ``lower_bound·σ(g + dt_bias)``.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    scale: float | None = None
    initial_state: torch.Tensor | None = None
    output_final_state: bool = False
    use_qk_l2norm_in_kernel: bool = False
    use_gate_in_kernel: bool = False
    A_log: torch.Tensor | None = None
    dt_bias: torch.Tensor | None = None
    lower_bound: float | None = None
    use_beta_sigmoid_in_kernel: bool = False
    allow_neg_eigval: bool = False
    state_v_first: bool = False
    cu_seqlens: torch.Tensor | None = None

    def gate(self) -> dict[str, object]:
        """The arguments of the gate, if ``g`` is raw."""
        if not self.use_gate_in_kernel:
            return {}
        dtype = self.q.dtype
        a_log = torch.zeros(self.v.shape[2]) if self.A_log is None else self.A_log
        dt_bias = None if self.dt_bias is None else _wide(self.dt_bias, dtype)
        return {"A_log": _wide(a_log, dtype), "dt_bias": dt_bias, "lower_bound": self.lower_bound}

    def compute(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output and the final state by :func:`gossamer.delta_rule`."""
        dtype = self.q.dtype
        wide = torch.promote_types(dtype, torch.float32)
        beta, state = self.beta, self.initial_state
        if self.use_beta_sigmoid_in_kernel:
            beta = beta.to(wide).sigmoid() * (2 if self.allow_neg_eigval else 1)
        if state is not None:
            state = state.to(wide).mT if self.state_v_first else state.to(wide)
        o, last = delta_rule(
            self.q,
            self.k,
            self.v,
            _wide(beta, dtype),
            g=_wide(self.g, dtype),
            scale=self.scale,
            initial_state=state,
            output_final_state=self.output_final_state,
            cu_seqlens=self.cu_seqlens,
            use_qk_l2norm=self.use_qk_l2norm_in_kernel,
            **self.gate(),
        )
        return o, last.mT.contiguous() if last is not None and self.state_v_first else last


def _options(entry_point: object, args: tuple, kwargs: dict) -> dict[str, object]:
    """The arguments of a call by name, including defaults."""
    bound = inspect.signature(entry_point).bind(*args, **kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    return given | given.pop("kwargs", {})


def _obstacle(given: dict[str, object]) -> str | None:
    """Why gossamer does not compute a call, or None."""
    if any(isinstance(x, torch.Tensor) and not x.is_cpu for x in given.values()):
        return "gossamer serves tensors on the CPU"
    refused = [name for name in _REFUSED if given.get(name) not in (None, False)]
    unknown = sorted(given.keys() - set(_Call._fields) - _IRRELEVANT - set(_REFUSED) - {"inplace_final_state", "out"})
    if refused or unknown:
        return f"gossamer does not serve {', '.join([*refused, *unknown])}"
    return None


@functools.cache
def register() -> tuple[str, ...]:
    """Make flash-linear-attention compute its gated delta rules on the CPU with gossamer, forward and backward.

    Calls on other devices are not affected. The environment variable ``FLA_GOSSAMER=0`` turns this off.

    Returns:
        The names of the operators that gossamer computes.

    Raises:
        ImportError: flash-linear-attention (its package ``fla-core``) is not installed, or has no registry
            (before 0.6).
    """
    from fla.backends import BaseBackend
    from fla.backends import register as registered
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule
    from fla.ops.kda.chunk import chunk_kda
    from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd

    options = {
        function.__name__: functools.partial(_options, inspect.unwrap(function))
        for function in (chunk_gated_delta_rule, chunk_kda, fused_recurrent_kda_fwd)
    }

    class Gossamer(BaseBackend):
        backend_type, env_var, priority = "gossamer", "FLA_GOSSAMER", 4

        def verify(self, function_name: str, *args: object, **kwargs: object) -> tuple[bool, str | None]:
            """Whether gossamer computes a call, and if not, why."""
            if function_name not in options:
                return False, "gossamer serves whole operators"
            obstacle = _obstacle(options[function_name](args, kwargs))
            return obstacle is None, obstacle

        def chunk_gated_delta_rule(self, *args: object, **kwargs: object) -> tuple:
            return _served(options["chunk_gated_delta_rule"](args, kwargs))

        def chunk_kda(self, *args: object, **kwargs: object) -> tuple:
            return _served(options["chunk_kda"](args, kwargs))

        def fused_recurrent_kda_fwd(self, *args: object, **kwargs: object) -> tuple:
            given = options["fused_recurrent_kda_fwd"](args, kwargs)
            given["output_final_state"] |= given["inplace_final_state"]
            o, last = _served(given)
            if given["out"] is not None:
                o = given["out"].copy_(o)
            if given["inplace_final_state"]:
                last = given["initial_state"].copy_(last)
            return o, last

    for entry_point in ("gated_delta_rule", "kda", chunk_kda):
        registered(entry_point)(Gossamer)
    return tuple(options)


def _served(given: dict[str, object]) -> tuple[torch.Tensor, torch.Tensor | None]:
    return _Call(**{name: value for name, value in given.items() if name in _Call._fields}).compute()
