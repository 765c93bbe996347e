"""The options of MegaBlocks' layers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gossamer._checks import check_device, check_flags, check_number, check_widths
from gossamer.nn.moe.capacity import check_capacity_factor
from gossamer.nn.moe.routing import check_selection

DEFAULT_ACTIVATION_FN = functools.partial(F.gelu, approximate="tanh")
_DEFAULT_INIT = functools.partial(nn.init.normal_, mean=0.0, std=0.02)


def _default_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@dataclasses.dataclass
class Arguments:
    """Options of :class:`MoE` and :class:`dMoE`, with MegaBlocks' names and defaults.

    Attributes:
        hidden_size: d.
        ffn_hidden_size: f of each expert.
        num_layers: of the model, for the balance loss.
        bias: whether one bias ``(d,)`` is added to the layer's output.
        return_bias: whether the layer returns ``(output, bias)`` instead of adding the bias.
        activation_fn: a function of torch or any other; those that :func:`gossamer.expert_mlp` knows are fused.
        moe_num_experts: E.
        moe_top_k: k.
        moe_capacity_factor: for :class:`MoE`: an expert serves ``int(factor·k·T/E)`` slots; 0 means no limit.
        moe_normalize_expert_weights: p of the norm that a token's weights are divided by, or None.
        moe_loss_weight: λ of the balance loss; with 0 nothing is recorded.
        moe_jitter_eps: in training the router gets ``x·u`` with u uniform in ``1 ± eps``; None for no jitter.
        moe_lbl_in_fp32: whether the balance loss is computed in float32.
        moe_expert_model_parallelism: must be False: there is one device.
        expert_parallel_group: must be None.
        pipeline_model_parallel_size: stages that the layers are spread over, for the balance loss.
        num_layers_per_virtual_pipeline_stage: layers of this stage, or None.
        memory_optimized_mlp: no effect: the fused layer always saves as little for the backward pass as this option.
        mlp_type: ``"mlp"`` or ``"glu"``; ``"glu"`` for :class:`dMoE` only.
        mlp_impl: for :class:`dMoE`: ``"sparse"`` for block-sparse products, ``"grouped"`` for grouped ones.
        fp16: whether parameters are float16.
        bf16: whether they are bfloat16, without ``fp16``; with neither they have torch's default dtype.
        device: of the parameters; the current GPU, or the CPU where there is none.
        init_method: fills the router's weight and w1, v1 in place.
        output_layer_init_method: fills w2 in place.
        uniform_expert_assignment: whether slots go to experts in turn, for measurements.
        shared_expert: whether to add a dense network that every token uses.
        fc_cls: class of its linear layers.
        fc_kwargs: further options of the linear layers.
        remat_act_fn: no effect.
        shared_expert_hidden_size: its hidden size; ``ffn_hidden_size`` by default.
        shared_expert_weighted_sum: whether it is averaged with the k experts instead of added.
        moe_zloss_weight: weight of the router z-loss; with 0 nothing is recorded.
        moe_zloss_in_fp32: whether it is computed in float32.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1, K > E, an option is not supported, or a named choice is unknown.
    """

    hidden_size: int = 1024
    ffn_hidden_size: int = 4096
    num_layers: int = 1
    bias: bool = True
    return_bias: bool = True
    activation_fn: Callable | None = DEFAULT_ACTIVATION_FN
    moe_num_experts: int = 1
    moe_top_k: int = 1
    moe_capacity_factor: float = 1
    moe_normalize_expert_weights: float | None = None
    moe_loss_weight: float = 0.1
    moe_jitter_eps: float | None = None
    moe_lbl_in_fp32: bool = False
    moe_expert_model_parallelism: bool = False
    expert_parallel_group: Any = None
    pipeline_model_parallel_size: int = 1
    num_layers_per_virtual_pipeline_stage: int | None = None
    memory_optimized_mlp: bool = False
    mlp_type: str = "mlp"
    mlp_impl: str = "sparse"
    fp16: bool = True
    bf16: bool = False
    device: torch.device | str | int = dataclasses.field(default_factory=_default_device)
    init_method: Callable[[torch.Tensor], object] = _DEFAULT_INIT
    output_layer_init_method: Callable[[torch.Tensor], object] = _DEFAULT_INIT
    uniform_expert_assignment: bool = False
    shared_expert: bool = False
    fc_cls: Any = nn.Linear
    fc_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    remat_act_fn: bool = True
    shared_expert_hidden_size: int | None = None
    shared_expert_weighted_sum: bool = False
    moe_zloss_weight: float = 0
    moe_zloss_in_fp32: bool = False

    def __post_init__(self) -> None:
        check_arguments(self)
        if self.shared_expert_hidden_size is None:
            self.shared_expert_hidden_size = self.ffn_hidden_size

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the parameters; None means torch's default."""
        return torch.float16 if self.fp16 else torch.bfloat16 if self.bf16 else None

    @property
    def layers_recorded(self) -> int:
        """Number of layers whose balance loss belongs to this pipeline stage."""
        if self.num_layers_per_virtual_pipeline_stage is not None:
            return self.num_layers_per_virtual_pipeline_stage
        return self.num_layers // self.pipeline_model_parallel_size


def check_arguments(args: Arguments) -> None:
    """Check the options of :class:`Arguments`; layers call it again, since options may have been changed."""
    names = ("hidden_size", "ffn_hidden_size", "num_layers", "pipeline_model_parallel_size")
    check_widths(**{name: getattr(args, name) for name in names})
    check_device("device", args.device)
    try:
        check_selection(args.moe_num_experts, args.moe_top_k)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("num_experts", "moe_num_experts").replace("top_k", "moe_top_k")) from None
    if args.moe_expert_model_parallelism:
        raise ValueError("moe_expert_model_parallelism must be False: gossamer computes all experts on one device")
    if args.expert_parallel_group is not None:
        raise ValueError("expert_parallel_group must be None: gossamer computes all experts on one device")
    for name, choices in (("mlp_type", ("mlp", "glu")), ("mlp_impl", ("sparse", "grouped"))):
        if getattr(args, name) not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {getattr(args, name)!r}")
    if not callable(args.activation_fn):
        raise TypeError(f"activation_fn must be callable, got {type(args.activation_fn).__name__}")
    # Annotations are strings in this file.
    flags = [field.name for field in dataclasses.fields(Arguments) if field.type == "bool"]
    check_flags(**{name: getattr(args, name) for name in flags})
    check_number("moe_capacity_factor", args.moe_capacity_factor)
    check_number("moe_loss_weight", args.moe_loss_weight)
    check_number("moe_zloss_weight", args.moe_zloss_weight)
    check_number("moe_jitter_eps", args.moe_jitter_eps, optional=True)
    check_number("moe_normalize_expert_weights", args.moe_normalize_expert_weights, optional=True)
    try:
        check_capacity_factor(args.moe_capacity_factor or None)
    except (TypeError, ValueError) as error:
        raise type(error)(f"moe_{error}") from None


def from_megatron(megatron_args: Any) -> Arguments:
    """:class:`Arguments` from those of Megatron-LM: every option that has the same name there."""
    names = [field.name for field in dataclasses.fields(Arguments)]
    return Arguments(**{name: getattr(megatron_args, name) for name in names if hasattr(megatron_args, name)})
