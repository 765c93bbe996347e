"""Hugging Face transformers 5: gossamer as an experts implementation.

Importing this module registers :func:`experts_forward` under the name ``"gossamer"``, after which
``from_pretrained(..., experts_implementation="gossamer")`` and ``model.set_experts_implementation("gossamer")`` work;
and the quantisation of :mod:`gossamer.integrations.hf_quantizer`, after which ``from_pretrained`` reads quantised
experts.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Mapping

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

try:
    import transformers
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        "gossamer's transformers integration needs transformers 5: pip install 'gossamer[transformers]'"
    ) from error

try:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
except ImportError as error:
    raise ImportError(
        f"gossamer's transformers integration needs transformers 5 or later, got {transformers.__version__}: "
        "pip install 'gossamer[transformers]'"
    ) from error

from gossamer._activation import Activation
from gossamer._checks import INDEX_DTYPES
from gossamer.integrations import surgery
from gossamer.integrations._expert_updates import ExpertUpdate
from gossamer.integrations._gates import fused_activation
from gossamer.integrations._report import Replacement, SwitchedModule
from gossamer.integrations.hf_quantizer import keep_quantized_in_files as keep_quantized_in_files
from gossamer.integrations.hf_quantizer import quantized_file_names as quantized_file_names
from gossamer.nn import QuantizedExpertStack
from gossamer.nn.moe.experts.quantized_stack import expert_weight
from gossamer.nn.moe.inference import held_formats, held_tensors, holds, kept_for
from gossamer.ops.dispatch import Dispatch, dispatch
from gossamer.ops.expert_mlp import expert_mlp
from gossamer.ops.gather_reduce import combine_slots
from gossamer.ops.grouped_matmul import grouped_matmul
from gossamer.ops.routed_experts import Prepared, may_run, prepare, run_chosen

NAME = "gossamer"


def dispatch_ids(top_k_index: torch.Tensor, num_experts: int) -> Dispatch:
    """The dispatch of expert ids of any integer dtype, of which a token may have more than there are experts."""
    ids = top_k_index if top_k_index.dtype in INDEX_DTYPES else top_k_index.long()
    top_k = ids.shape[1]
    if top_k <= num_experts:
        # On a rank that has only some of the experts, max_rows makes buffers of only the rows of these experts.
        return dispatch(ids, num_experts, max_rows=ids.numel())
    # Under expert parallelism a rank may have fewer experts than K. Ids from num_experts on belong to other ranks, and
    # are sorted as experts whose rows lie past the last offset kept.
    wide = dispatch(ids, top_k)
    return dataclasses.replace(wide, offsets=wide.offsets[: num_experts + 1], num_experts=num_experts)


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype products run in: autocast's where it is on, as for ``nn.Linear``, else that of the weights."""
    device_type = weight.device.type
    if torch.is_autocast_enabled(device_type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return weight.dtype


def _inferred(
    experts: nn.Module,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    activation: Activation,
    interleaved: bool,
) -> torch.Tensor | None:
    """:func:`experts_forward` in one native call; None where its operators compute it."""
    if not may_run(x):
        return None
    names = ("gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj", "down_proj")
    if not holds(experts, names, experts.has_bias):
        return None

    def make() -> Prepared | None:
        stored = tuple(expert_weight(getattr(experts, name), experts.is_transposed) for name in names)
        biases = tuple(experts._parameters.get(f"{name}_bias") if experts.has_bias else None for name in names)
        return prepare(stored, biases, activation, interleaved)

    settings = activation, interleaved, experts.is_transposed, experts.has_bias, held_formats(experts, names)
    prepared, _held = kept_for(experts, settings, lambda: held_tensors(experts, names), make)
    return None if prepared is None else run_chosen(prepared, ids, weights, x)


def experts_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    updates: Mapping[str, ExpertUpdate | None] | None = None,
) -> torch.Tensor:
    """Forward of an experts module: ``y[t] = Σ_k top_k_weights[t,k]·expert_{top_k_index[t,k]}(hidden_states[t])``.

    Where the module's activation is one that gossamer fuses, the layer is :func:`gossamer.expert_mlp`. Otherwise its
    own ``_apply_gate`` or ``act_fn``, and its norm after each expert, run between two :func:`gossamer.grouped_matmul`.

    Args:
        self: an instance of a class decorated with transformers' ``use_experts_implementation``.
        hidden_states: ``(T, H)``; taken in the dtype of the weights, or of autocast, as transformers' own grouped
            implementation does.
        top_k_index: ``(T, K)`` expert ids; those of ``num_experts`` and more are dropped.
        top_k_weights: ``(T, K)`` routing weights of any floating dtype.
        updates: low-rank updates by the name of the parameter they update.

    Returns:
        ``(T, H)`` in the dtype of ``hidden_states``.

    Raises:
        TypeError: the weights are in a dtype without kernels.
        ValueError: shapes do not fit, or (on the CPU) an id is negative.
    """
    updates = updates or {}
    activation, interleaved, _ = fused_activation(self)
    if activation is not None and all(update is None for update in updates.values()):
        y = _inferred(self, hidden_states, top_k_index, top_k_weights, activation, interleaved)
        if y is not None:
            return y
    has_gate, has_bias = getattr(self, "has_gate", True), self.has_bias
    up = self.gate_up_proj if has_gate else self.up_proj
    up_bias = (self.gate_up_proj_bias if has_gate else self.up_proj_bias) if has_bias else None
    down, down_bias = self.down_proj, self.down_proj_bias if has_bias else None
    up, down = expert_weight(up, self.is_transposed), expert_weight(down, self.is_transposed)
    # Quantised weights are taken in the dtype of what they multiply.
    dtype = compute_dtype(next((w for w in (up, down) if isinstance(w, torch.Tensor)), hidden_states))
    x = hidden_states.to(dtype)
    up, down, up_bias, down_bias = (
        t.to(dtype) if isinstance(t, torch.Tensor) else t for t in (up, down, up_bias, down_bias)
    )
    weights = top_k_weights if top_k_weights.dtype in (dtype, torch.float32) else top_k_weights.float()
    routing = dispatch_ids(top_k_index, up.shape[0])
    up_update = updates.get("gate_up_proj" if has_gate else "up_proj")
    down_update = updates.get("down_proj")
    if activation is not None and all(u is None or u.fusible for u in (up_update, down_update)):
        y = expert_mlp(
            x,
            up,
            down,
            routing,
            weights,
            activation=activation,
            gate_up_bias=up_bias,
            down_bias=down_bias,
            interleaved=interleaved,
            gate_up_lora=up_update and up_update.factors(dtype),
            down_lora=down_update and down_update.factors(dtype),
        )
        return y.to(hidden_states.dtype)
    rows = grouped_matmul(x, up, routing, bias=up_bias, y_grouped=True)
    if up_update is not None:
        rows = rows + up_update.rows(x, routing, grouped=False)
    rows = self._apply_gate(rows) if has_gate else self.act_fn(rows)
    act = rows.to(dtype)
    rows = grouped_matmul(act, down, routing, bias=down_bias, x_grouped=True, y_grouped=True)
    if down_update is not None:
        rows = rows + down_update.rows(act, routing, grouped=True)
    if getattr(self, "has_post_expert_norm", False):
        rows = self.post_expert_norm(rows)
    return combine_slots(rows, routing, weights).to(hidden_states.dtype)


def _accept_name() -> None:
    """Make model classes take our name where they check it against a fixed list, as in the first releases of 5."""
    check = transformers.PreTrainedModel.get_correct_experts_implementation
    try:
        # Later releases accept any registered name without reading the model, so None can stand in for it.
        check(None, NAME)
    except ValueError:
        pass
    else:
        return

    @functools.wraps(check)
    def get_correct_experts_implementation(self, requested_experts):
        return NAME if requested_experts == NAME else check(self, requested_experts)

    transformers.PreTrainedModel.get_correct_experts_implementation = get_correct_experts_implementation


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
_accept_name()
# Earlier releases of 5 have no interface for it, and some builds of torch have no process groups.
if torch.distributed.is_available() and importlib.util.find_spec("transformers.distributed.expert_parallel"):
    importlib.import_module("gossamer.integrations.expert_parallel")


ADAPTER = "transformers"


def is_experts(module: nn.Module) -> bool:
    """Whether the class went through ``use_experts_implementation``, which leaves these attributes on its instances."""
    return all(name in module.__dict__ for name in ("config", "has_bias", "is_transposed"))


def holds_layers(model: nn.Module) -> bool:
    """Whether the model contains an experts module."""
    return any(is_experts(module) for module in model.modules())


def _expert_weights(experts: nn.Module) -> list[tuple[str, torch.Tensor | None]]:
    up = "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"
    names = [up, "down_proj", *((up + "_bias", "down_proj_bias") if experts.has_bias else ())]
    return [(name, getattr(experts, name, None)) for name in names]


def division_obstacle(experts: nn.Module) -> str | None:
    """Why adapters cannot update weights that transformers divided among processes, or None when it did not."""
    weights = _expert_weights(experts)
    if getattr(experts, "_is_expert_parallel", False):
        return (
            "its experts are divided among processes: adapters of such experts need "
            'DistributedConfig(..., ep_implementation="gossamer") and gossamer.replace'
        )
    # FSDP2's DTensors are whole again in the forward pass; those of a tensor-parallel plan become local parts in the
    # forward that the plan puts in the instance.
    if "forward" in experts.__dict__ and any(surgery.is_divided(w) for _, w in weights):
        return "its matrices are divided among processes by a tensor-parallel plan, which adapters do not follow"
    return None


def experts_obstacle(experts: nn.Module) -> str | None:
    """Why gossamer cannot compute this experts module, or None when it can."""
    if getattr(experts.config, "_experts_implementation", None) == "deepgemm_megamoe":
        return "deepgemm_megamoe rewrites the weights at load time, so it cannot be left afterwards"
    chain = [type(experts).forward]
    while hasattr(chain[-1], "__wrapped__"):
        chain.append(chain[-1].__wrapped__)
    freevars = {}
    for forward in chain:
        freevars |= dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    if "experts_interface" in freevars:
        interface = freevars["experts_interface"].cell_contents
        if NAME not in interface:
            return f"it is quantised: {type(interface).__name__} does not accept an implementation for floats"
    elif (
        "original_forward" not in freevars
        and "__class__" not in freevars
        and "forward" not in chain[0].__code__.co_names
    ):
        # A subclass with a forward of its own uses an implementation only if it calls the base class's forward.
        return f"{type(experts).__name__}.forward does not use an experts implementation"
    for name, weight in _expert_weights(experts):
        if isinstance(weight, QuantizedExpertStack):
            continue
        if not isinstance(weight, torch.Tensor):
            return f"it has no tensor {name}"
        if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
            return f"it is quantised: {name} is {weight.dtype}"
        if is_traceable_wrapper_subclass(weight) and type(weight).__name__ != "DTensor":
            return f"it is quantised: {name} is a {type(weight).__name__}"
        if reason := surgery.tensor_obstacle(name, weight, wrappers=("DTensor",)):
            return reason
    return None


def _set_implementation(config: object, value: str | None) -> None:
    # Setting the property would also change every sub-config, whose modules gossamer may not compute.
    name = "_experts_implementation_internal"
    setattr(config, name if hasattr(config, name) else "_experts_implementation", value)


def _no_experts(model: nn.Module) -> str:
    foreign = sorted(
        {type(m).__name__ for m in model.modules() if "Experts" in type(m).__name__ or "MoE" in type(m).__name__}
    )
    hint = f"; {', '.join(foreign)} do not use that interface" if foreign else ""
    return (
        f"model must hold experts modules that use transformers' use_experts_implementation, got none in "
        f"{type(model).__name__}{hint}"
    )


def survey(model: nn.Module, strict: bool) -> surgery.Survey:
    """The experts modules inside ``model``; raises a ValueError when ``strict`` and there are none or one cannot be
    switched.
    """
    surgery.check_model(model)
    experts = [(name, module) for name, module in model.named_modules() if is_experts(module)]
    if not experts and strict:
        raise ValueError(_no_experts(model))
    found = surgery.survey(experts, lambda name, module: experts_obstacle(module))
    if found.skipped and strict:
        raise ValueError("model has experts modules that gossamer cannot compute: " + surgery.reasons(found.skipped))
    names = {skipped.name for skipped in found.skipped}
    blocked = {id(module.config): name for name, module in experts if name in names}

    def shares_config(name: str, module: nn.Module) -> str | None:
        other = blocked.get(id(module.config))
        return other and f"it shares its config with {other}, which cannot be switched"

    free = surgery.survey(found.chosen, shares_config)
    return surgery.Survey(free.chosen, found.skipped + free.skipped)


def _detail(experts: nn.Module) -> tuple[bool, str]:
    activation, interleaved, reason = fused_activation(experts)
    if activation is None:
        return False, reason
    constants = f"(alpha={activation.alpha:g}, limit={activation.limit:g})"
    text = activation.name + (constants if activation.name == "clamped_swiglu" else "")
    return True, text + (", interleaved" if interleaved else "")


def swap(model: nn.Module, found: surgery.Survey) -> Replacement:
    """Name gossamer as the implementation in the configs of the chosen modules."""
    with_config = [m for m in model.modules() if hasattr(m.__dict__.get("config"), "_experts_implementation")]
    before = [(module, module.config._experts_implementation) for module in with_config]
    if isinstance(model, transformers.PreTrainedModel) and found.chosen and not found.skipped:
        model.set_experts_implementation(NAME)
    for _, module in found.chosen:
        _set_implementation(module.config, NAME)
    if found.chosen:
        # Every module of a shared config, so that parts of the model are restored by themselves.
        for module, implementation in before:
            surgery.mark(module, ADAPTER, implementation)
    switched = tuple(SwitchedModule(n, type(m).__name__, *_detail(m)) for n, m in found.chosen)
    return Replacement(switched, found.skipped)


def undo_obstacle(module: nn.Module, before: str | None) -> str | None:
    """Why the previous implementation cannot be restored, or None: it cannot read quantised weights."""
    if is_experts(module) and any(isinstance(weight, QuantizedExpertStack) for _, weight in _expert_weights(module)):
        return "must hold its float weights to be restored, they were quantised"
    return None


def undo(module: nn.Module, before: str | None) -> nn.Module:
    """Put the previous implementation back into the module's config."""
    _set_implementation(module.config, before)
    return module


def replace(model: nn.Module, *, strict: bool = True) -> Replacement:
    """:func:`gossamer.replace` of experts modules."""
    return swap(model, survey(model, strict))


def restore(model: nn.Module) -> None:
    """:func:`gossamer.restore` of experts modules."""
    surgery.check_model(model)
    if not surgery.undo(model, ADAPTER):
        raise ValueError(f"model must be one that gossamer.replace switched, got {type(model).__name__}")
