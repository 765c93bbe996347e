"""Expert layers of transformers that do not use its experts interface: a forward for each class.

A layer gets a subclass of its class that computes the same from the same parameters. Classes that gossamer does not
support are listed with the reason.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import nn

from gossamer.integrations import _class_swap, surgery
from gossamer.integrations._class_swap import Swapped, undo, undo_obstacle
from gossamer.integrations._gates import gated_activation
from gossamer.integrations._report import Replacement, SwitchedModule
from gossamer.integrations.transformers import compute_dtype, dispatch_ids, experts_forward
from gossamer.nn.moe.mixture_of_attention import output_by_slot
from gossamer.ops.dispatch import Dispatch, dispatch
from gossamer.ops.expert_mlp import expert_mlp
from gossamer.ops.gather_dot import gather_dot
from gossamer.ops.gather_reduce import combine_slots, gather_reduce
from gossamer.ops.grouped_matmul import grouped_matmul
from gossamer.ops.product_key_topk import product_key_topk

ADAPTER = "expert_classes"
__all__ = ["ADAPTER", "holds_layers", "survey", "swap", "undo", "undo_obstacle"]


class _Layout(Swapped):
    """The mixin that gossamer puts before a class of transformers.

    A subclass defines the methods that compute the layer.

    Attributes:
        bypassed: paths of inner modules whose weights are read without calling them.
        inside: paths of inner modules that are switched together with the layer.
    """

    bypassed: ClassVar[tuple[str, ...]] = ()
    inside: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:
        """Why this module cannot be computed, in addition to the checks for every module."""
        return None

    @classmethod
    def detail(cls, module: nn.Module) -> tuple[bool, str]:
        """Whether the layer is one operator, and which activation or why not."""
        return _detail(module.act_fn)

    @staticmethod
    @functools.cache
    def class_of(theirs: type) -> type | None:
        """The subclass with which gossamer computes a class, or None if the class is not supported."""
        layout = LAYOUTS.get(_key(theirs))
        return None if layout is None else type(theirs.__name__, (layout, theirs), {"__module__": __name__})


def _detail(act_fn: Callable) -> tuple[bool, str]:
    activation = gated_activation(act_fn)
    return (False, "no fused kernel for its act_fn") if activation is None else (True, activation.name)


def _weights(weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weights if weights.dtype in (dtype, torch.float32) else weights.float()


def _feed_forward(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    routing: Dispatch,
    weights: torch.Tensor,
    act_fn: Callable,
) -> torch.Tensor:
    """``Σ_k weights · down · (act_fn(gate) · up)``, fused if the activation is known; in the dtype of ``x``."""
    dtype = compute_dtype(gate_up)
    rows = x.to(dtype)
    gate_up, down, weights = gate_up.to(dtype), down.to(dtype), _weights(weights, dtype)
    activation = gated_activation(act_fn)
    if activation is not None:
        return expert_mlp(rows, gate_up, down, routing, weights, activation=activation).to(x.dtype)
    gate, up = grouped_matmul(rows, gate_up, routing, y_grouped=True).chunk(2, dim=-1)
    rows = grouped_matmul((act_fn(gate) * up).to(dtype), down, routing, x_grouped=True, y_grouped=True)
    return combine_slots(rows, routing, weights).to(x.dtype)


class _JetMoeGating(_Layout):
    """Returns the chosen experts and their weights first, and the logits, which callers record, in their usual
    position.
    """

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, torch.Tensor]:
        logits = self.layer(hidden_states).float()
        chosen, ids = logits.topk(self.top_k, dim=1)
        return ids, torch.softmax(chosen, dim=1).type_as(hidden_states), None, None, logits


class _JetMoeExperts(_Layout):
    bypassed = ("input_linear", "output_linear")
    inside = ("router",)

    @classmethod
    def detail(cls, module: nn.Module) -> tuple[bool, str]:
        return _detail(module.activation)

    def forward(self, layer_input: torch.Tensor) -> torch.Tensor:
        x = layer_input.reshape(-1, layer_input.shape[-1])
        ids, weights, *_ = self.router(x)
        routing = dispatch(ids, self.router.num_experts)
        y = _feed_forward(x, self.input_linear.weight, self.output_linear.weight, routing, weights, self.activation)
        return y.view(layer_input.shape) + self.bias


class _JetMoeAttentionExperts(_Layout):
    bypassed = ("input_linear", "output_linear")
    inside = ("router",)

    @classmethod
    def detail(cls, module: nn.Module) -> tuple[bool, str]:
        return True, "mixture of attention"

    def map(self, layer_input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[Dispatch, torch.Tensor]]:
        x = layer_input.reshape(-1, layer_input.shape[-1])
        ids, weights, _, _, logits = self.router(x)
        routing = dispatch(ids, self.num_experts)
        weight = self.input_linear.weight
        q = grouped_matmul(x.to(compute_dtype(weight)), weight, routing).to(x.dtype)
        return q.view(*layer_input.shape[:2], self.top_k, -1), logits, (routing, weights)

    def reduce(self, layer_input: torch.Tensor, topo_info: tuple[Dispatch, torch.Tensor]) -> torch.Tensor:
        routing, weights = topo_info
        weight = self.output_linear.weight
        dtype = compute_dtype(weight)
        rows = layer_input.reshape(-1, layer_input.shape[-1]).to(dtype)
        y = output_by_slot(rows, weight, routing, _weights(weights, dtype)).to(layer_input.dtype)
        return y.view(*layer_input.shape[:2], -1) + self.bias


class _DbrxExperts(_Layout):
    bypassed = ("mlp",)

    @classmethod
    def detail(cls, module: nn.Module) -> tuple[bool, str]:
        return False, "gate and up are stacks of their own"

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        shape = (self.num_experts, self.ffn_hidden_size, self.hidden_size)
        dtype = compute_dtype(self.mlp.w1)
        gate, up, down = (w.view(shape).to(dtype) for w in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
        x = hidden_states.reshape(-1, self.hidden_size).to(dtype)
        routing = dispatch_ids(top_k_index, self.num_experts)
        gated = self.mlp.activation_fn(grouped_matmul(x, gate, routing, y_grouped=True))
        rows = (gated * grouped_matmul(x, up, routing, y_grouped=True)).to(dtype)
        rows = grouped_matmul(rows, down.transpose(1, 2), routing, x_grouped=True, y_grouped=True)
        y = combine_slots(rows, routing, _weights(top_k_weights, dtype)).to(hidden_states.dtype)
        return y.view(hidden_states.shape[0], -1, self.hidden_size)


class _LongcatFlashExperts(_Layout):
    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:
        return "it has no expert but the identity" if module.gate_up_proj is None else None

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        # Experts after the routed ones return their input.
        experts = self.num_routed_experts
        routing = dispatch_ids(top_k_index, experts)
        gate_up = self.gate_up_proj[:experts]
        y = _feed_forward(hidden_states, gate_up, self.down_proj, routing, top_k_weights, self.act_fn)
        kept = top_k_weights.masked_fill(top_k_index < experts, 0.0).sum(dim=1, keepdim=True)
        return y + (hidden_states * kept).to(y.dtype)


class _Step3p7Experts(_Layout):
    """The layout equals that of the experts interface; so does the activation, unless the module clamps it."""

    has_bias = is_transposed = False

    @classmethod
    def detail(cls, module: nn.Module) -> tuple[bool, str]:
        return _detail(module.act_fn) if module.limit == math.inf else (False, "the activation is clamped")

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if self.limit < math.inf:
            return experts_forward(self, hidden_states, top_k_index, top_k_weights)
        routing = dispatch_ids(top_k_index, self.num_experts)
        return _feed_forward(hidden_states, self.gate_up_proj, self.down_proj, routing, top_k_weights, self.act_fn)


class _Llama4Moe(_Layout):
    """Scores scale the experts' inputs. An expert that is not chosen has score 0 and output 0, so it is skipped."""

    bypassed = ("experts",)

    @classmethod
    def detail(cls, module: nn.Module) -> tuple[bool, str]:
        return _detail(module.experts.act_fn)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(x)
        ids = logits.topk(self.top_k, dim=1).indices
        # Each slot is treated as a separate token, since its input is scaled by its score.
        rows = (x.unsqueeze(1) * scores.gather(1, ids).unsqueeze(2)).view(-1, self.hidden_dim)
        routing = dispatch(ids.view(-1, 1), self.num_experts)
        ones = torch.ones(rows.shape[0], 1, dtype=torch.float32, device=x.device)
        gate_up, down = self.experts.gate_up_proj.transpose(1, 2), self.experts.down_proj.transpose(1, 2)
        routed = _feed_forward(rows, gate_up, down, routing, ones, self.experts.act_fn)
        out = self.shared_expert(x)
        return out + routed.view(x.shape[0], self.top_k, -1).sum(1), logits


class _DogeExperts(_Layout):
    """Experts of single neurons, found by product keys."""

    bypassed = ("down_embed", "up_embed")

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:
        if module.top_k > module.num_keys:
            return f"a token has {module.top_k} experts of {module.num_keys} keys a side"
        return None

    @classmethod
    def detail(cls, module: nn.Module) -> tuple[bool, str]:
        return True, "product keys"

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = self.router_gate(hidden_states).view(2, x.shape[0], -1)
        scores, ids = product_key_topk(logits[0], logits[1], self.top_k)
        weights = scores.to(logits.dtype).softmax(dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        hidden = gather_dot(self.down_embed.weight, ids, x)
        factors = self.act_fn(hidden) * weights
        routed = gather_reduce(self.up_embed.weight, ids, weights=factors, out_dtype=x.dtype)
        shared = self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return shared + routed.view(shared.shape), logits


# By folder of transformers.models and name of the class.
LAYOUTS: dict[tuple[str, str], type[_Layout]] = {
    ("dbrx", "DbrxExperts"): _DbrxExperts,
    ("doge", "DogeCDMoE"): _DogeExperts,
    ("jetmoe", "JetMoeMoA"): _JetMoeAttentionExperts,
    ("jetmoe", "JetMoeMoE"): _JetMoeExperts,
    ("jetmoe", "JetMoeTopKGating"): _JetMoeGating,
    ("llama4", "Llama4TextMoe"): _Llama4Moe,
    ("longcat_flash", "LongcatFlashExperts"): _LongcatFlashExperts,
    ("step3p7", "Step3p7Experts"): _Step3p7Experts,
}
_SEPARATE = "its experts are modules of their own, whose weights form no stack"
# The reason why a class of experts is not supported.
LEFT: dict[tuple[str, str], str] = {
    ("nllb_moe", "NllbMoeExperts"): _SEPARATE,
    ("switch_transformers", "SwitchTransformersExperts"): _SEPARATE,
    ("vitpose_backbone", "VitPoseNaiveMoe"): _SEPARATE,
}
# Layers that are switched together with the layer that contains them.
_INSIDE = {("jetmoe", "JetMoeTopKGating")}


def _key(cls: type) -> tuple[str, str] | None:
    """Folder and name of a class of ``transformers.models``."""
    parts = cls.__module__.split(".")
    return (parts[2], cls.__name__) if parts[:2] == ["transformers", "models"] and len(parts) > 3 else None


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        key = _key(type(module))
        if key in LEFT or (key in LAYOUTS and key not in _INSIDE):
            yield name, module


def holds_layers(model: nn.Module) -> bool:
    """Whether the model has an expert layer of one of these classes that gossamer does not compute yet."""
    return any(True for _ in _layers(model))


def _obstacle(name: str, module: nn.Module) -> str | None:
    """Why gossamer cannot compute this layer, or None when it can."""
    key = _key(type(module))
    if key in LEFT:
        return LEFT[key]
    if "forward" in module.__dict__:
        return "its forward is overridden on the instance"
    layout = LAYOUTS[key]
    for path in layout.bypassed:
        if surgery.hooked(module.get_submodule(path)):
            return f"its {path} has hooks, which would not run, because gossamer does not call it"
    for path in layout.inside:
        if _key(type(module.get_submodule(path))) not in LAYOUTS:
            return f"its {path} is a {type(module.get_submodule(path)).__name__}"
    for parameter_name, parameter in module.named_parameters():
        if reason := surgery.tensor_obstacle(parameter_name, parameter):
            return reason
    return layout.obstacle(module)


def survey(model: nn.Module, strict: bool) -> surgery.Survey:
    """Such expert layers inside ``model``; raises a ValueError when ``strict`` and one cannot be switched."""
    return _class_swap.survey(_layers(model), _obstacle, strict, "expert layers")


def swap(model: nn.Module, found: surgery.Survey) -> Replacement:
    """Give the chosen layers gossamer's classes."""
    switched = []
    for name, module in found.chosen:
        layout = LAYOUTS[_key(type(module))]
        switched.append(SwitchedModule(name, type(module).__name__, *layout.detail(module)))
        for part in (module, *(module.get_submodule(path) for path in layout.inside)):
            _class_swap.switch(part, ADAPTER, _Layout)
    return Replacement(tuple(switched), found.skipped, "expert layers")
