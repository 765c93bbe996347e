"""Launchers of the delta rule's Triton kernels; the kernels are in the modules beside this one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer.triton_kernels.delta_rule_backward import run_backward
from gossamer.triton_kernels.delta_rule_forward import run_forward, run_step

if TYPE_CHECKING:
    from gossamer.ops._delta_rule_reference import DeltaRule
    from gossamer.ops.delta_rule import DeltaRuleBackward, DeltaRuleForward


def delta_rule(call: DeltaRuleForward) -> tuple[torch.Tensor, torch.Tensor | None, None]:
    """The output, and the final state if requested. No states are kept; the backward pass recomputes them."""
    return *run_forward(call.args), None


def delta_rule_step(args: DeltaRule) -> torch.Tensor:
    """The output of one token; the initial state changes in place."""
    return run_step(args)


def delta_rule_backward(call: DeltaRuleBackward) -> dict[str, torch.Tensor]:
    """The gradients named in ``call.needs``."""
    found = run_backward(call.forward.args, call.d_o, call.dfinal_state)._asdict()
    return {name: found[name] for name in call.needs}
