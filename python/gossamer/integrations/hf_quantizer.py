"""Quantised experts in transformers' files: ``save_pretrained`` and ``from_pretrained`` keep them quantised.

Importing this module (``gossamer.integrations.transformers`` does) registers the quantisation method ``"gossamer"``
with transformers. :func:`gossamer.quantize_experts` and :func:`gossamer.load_quantized_experts` set it in the config of
a transformers model, which is then saved with codes and scales, and loaded without converting them to floats.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gossamer.integrations import quantized
from gossamer.nn import QuantizedExpertStack, QuantizedLinear
from gossamer.ops.quantized_expert_weight import (
    FORMATS,
    MX_GROUP,
    QuantizedExpertWeight,
    check_activations,
    check_format,
)

METHOD = "gossamer"

# When it saves, transformers splits experts whose parameters' names match certain patterns; these names match none.
_FILE_NAME = {
    f"{weight}.{part}": f"quantized_{part}_{weight}"
    for weight in ("gate_up_proj", "up_proj", "down_proj", "weight")
    for part in ("data", "scale")
}


@register_quantization_config(METHOD)
class QuantizedExpertsConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a model with quantised experts.

    ``from_pretrained(path, quantization_config=QuantizedExpertsConfig("int4"))`` quantises a float model when it is
    loaded.

    Args:
        format: the target format, one of those of :class:`gossamer.QuantizedExpertWeight`; None in files.
        group_size: group size of ``int4``.
        experts: what a file's experts are: the path of each weight -> its ``format``, the shapes of its ``data`` and
            ``scale``, ``scale_dtype``, and ``activations`` unless they are ``"float"``.
        activations: as in :func:`gossamer.quantize_experts`.

    Raises:
        ValueError: the format is unknown or does not support ``activations``, or neither a format nor experts are
            given.
    """

    def __init__(
        self,
        format: str | None = None,
        group_size: int = MX_GROUP,
        experts: Mapping[str, Mapping[str, object]] | None = None,
        activations: str = "float",
        **_: object,
    ) -> None:
        self.quant_method = METHOD
        if experts is not None and not isinstance(experts, Mapping):
            raise TypeError(f"experts must be a mapping or None, got {type(experts).__name__}")
        self.format, self.group_size, self.experts = format, group_size, dict(experts or {})
        self.activations = activations
        if format is not None:
            check_format(format)
            check_activations(activations, format)
        elif not self.experts:
            raise ValueError("quantization_config must have a format or a description of the experts, got neither")


def _stacks(model: nn.Module) -> dict[str, QuantizedExpertStack]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedExpertStack)}


def _described(model: nn.Module) -> QuantizedExpertsConfig:
    experts = {
        path: {
            "format": stack.format,
            "data": list(stack.data.shape),
            "scale": list(stack.scale.shape),
            "scale_dtype": str(stack.scale.dtype).removeprefix("torch."),
        }
        | ({} if stack.activations == "float" else {"activations": stack.activations})
        for path, stack in _stacks(model).items()
    }
    return QuantizedExpertsConfig(experts=experts)


def _empty(path: str, held: Mapping[str, object]) -> QuantizedExpertWeight:
    """The weight that a file's config describes, on meta.

    Raises:
        ValueError: the description has other keys or values than :class:`QuantizedExpertsConfig` writes.
        TypeError: the scales cannot have this dtype.
    """
    try:
        check_format(held["format"])
        dtypes = FORMATS[held["format"]][0], getattr(torch, str(held["scale_dtype"]))
        data, scale = (
            torch.empty(held[name], dtype=dtype, device="meta")
            for name, dtype in zip(("data", "scale"), dtypes, strict=True)
        )
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"quantization_config must give format, data, scale and scale_dtype of the experts {path}, got {held!r}"
        ) from error
    return QuantizedExpertWeight(data, scale, held["format"], held.get("activations", "float"))


@register_quantizer(METHOD)
class QuantizedExpertsQuantizer(HfQuantizer):
    """Creates stacks of quantised experts before a checkpoint is read, and maps their tensors to names in files."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: object) -> PreTrainedModel:
        """Put an empty stack in place of each weight that the checkpoint holds quantised."""
        if not self.pre_quantized:
            return model
        for path, held in self.quantization_config.experts.items():
            empty = _empty(path, held)
            parent, _, weight = path.rpartition(".")
            module = _find(model, parent)
            if not isinstance(getattr(module, weight, None), (nn.Parameter, QuantizedExpertStack)):
                raise ValueError(f"quantization_config names the experts {path}, which {type(model).__name__} lacks")
            quantized.hold(module, weight, empty)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: object) -> PreTrainedModel:
        if not self.pre_quantized:
            config = self.quantization_config
            options = {"group_size": config.group_size, "activations": config.activations}
            quantized.quantize_experts(model, config.format, **options)
            return model
        missing = [
            f"{path}.{name}"
            for path, stack in _stacks(model).items()
            for name, tensor in stack.named_buffers()
            if not getattr(tensor, "_is_hf_initialized", False)
        ]
        if missing:
            raise ValueError(
                f"the checkpoint must hold {missing[0]}, as {_FILE_NAME['.'.join(missing[0].split('.')[-2:])]}, and "
                f"{len(missing) - 1} more that its quantization_config names"
            )
        quantized.compute_by_gossamer(model)
        keep_quantized_in_files(model)
        return model

    def get_weight_conversions(self) -> list[WeightRenaming]:
        """Conversions from names in files to names in the model."""
        return [WeightRenaming(file_name, name) for name, file_name in _FILE_NAME.items()] if self.pre_quantized else []

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The model's state under the names that files have."""
        prefixes = tuple(f"{path}." for path in _stacks(model))
        state = {}
        for name, tensor in model.state_dict().items():
            if name.startswith(prefixes) and prefixes:
                parent, weight, part = name.rsplit(".", 2)
                name = f"{parent}.{_FILE_NAME[f'{weight}.{part}']}"
            state[name] = tensor
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # transformers passes the value of the config, which may be a name.
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for path, stack in _stacks(model).items():
            parent, _, weight = path.rpartition(".")
            module = model.get_submodule(parent)
            values = stack.weight().dequantize(dtype or torch.float32)
            values = values.transpose(1, 2).contiguous() if getattr(module, "is_transposed", False) else values
            delattr(module, weight)
            if isinstance(module, QuantizedLinear):
                values, module.__class__ = values[0], nn.Linear
            module.register_parameter(weight, nn.Parameter(values, requires_grad=False))
        return model

    def is_serializable(self) -> bool:
        """True: ``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: the rest of the model may be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True: transformers' Trainer accepts the model without adapters, since routers and attention can be
        trained.
        """
        return True

    @property
    def is_compileable(self) -> bool:
        """True: ``torch.compile`` works."""
        return True


def _find(model: nn.Module, path: str) -> nn.Module | None:
    """The module at this path; the model may be a part of the model to which the path belongs, or contain it."""
    modules = dict(model.named_modules())
    ends = (name for name in modules if name and (name.endswith(f".{path}") or path.endswith(f".{name}")))
    return modules.get(path) or modules.get(next(ends, None))


def _refuse_to_save(other: str, *args: object, **kwargs: object) -> NoReturn:
    raise ValueError(
        f"a model with experts quantised by gossamer and {other} besides cannot be saved by save_pretrained: its "
        "config has room for one quantisation; save model.state_dict(), which gossamer.load_quantized_experts reads"
    )


def keep_quantized_in_files(model: nn.Module) -> None:
    """Let every transformers model inside that has quantised experts be saved and loaded with them."""
    described = set()
    for part in model.modules():
        if not isinstance(part, PreTrainedModel) or not _stacks(part):
            continue
        other = getattr(part, "hf_quantizer", None)
        if other is not None and not isinstance(other, QuantizedExpertsQuantizer):
            part.save_pretrained = functools.partial(_refuse_to_save, str(other.quantization_config.quant_method))
            continue
        # A part shares the config of the whole model, which is visited first, and finds its experts by path suffixes.
        if id(part.config) not in described:
            described.add(id(part.config))
            part.config.quantization_config = _described(part)
        part.hf_quantizer = QuantizedExpertsQuantizer(part.config.quantization_config, pre_quantized=True)


def quantized_file_names(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Names in files of the tensors of quantised experts, by their names in the model."""
    found = {}
    own = set(_FILE_NAME.values())
    keys = [key for key in tensors if key.rpartition(".")[2] in own]
    if keys:
        renamings = []
        if isinstance(model, PreTrainedModel):
            renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
        to_model = {file_name: name for name, file_name in _FILE_NAME.items()}
        for key in keys:
            name = key
            for renaming in renamings:
                name, _ = renaming.rename_source_key(name)
            parent, _, last = name.rpartition(".")
            found[f"{parent}.{to_model[last]}"] = key
    return found
