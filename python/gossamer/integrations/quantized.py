"""Quantise the experts and linear layers of a model in place, and load quantised ones from checkpoints."""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from gossamer._checks import FLOAT_DTYPES, check_device, check_tensor
from gossamer.integrations import surgery
from gossamer.integrations._report import Quantization, QuantizedModule
from gossamer.nn import QuantizedExpertStack, QuantizedLinear, Router
from gossamer.ops.quantized_expert_weight import (
    FORMATS,
    INT4_GROUPS,
    MX_GROUP,
    QuantizedExpertWeight,
    check_activations,
    check_format,
    check_group_size,
    check_quantizable,
    concatenate,
)

ADAPTER = "quantized"

# Names of an expert's gate, up and down matrices in checkpoints.
_EXPERT_NAMES = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",), ("w3",)),
    "down_proj": (("down_proj",), ("w2",)),
}

# Tensors that compressed-tensors stores for 4 bits with separate zero points, or with reordered columns.
_NOT_SYMMETRIC = ("weight_zero_point", "weight_g_idx")


# Names of the linear maps that choose experts.
_GATES = frozenset({"gate", "router"})


def _experts(model: nn.Module, required: bool = True) -> list[tuple[str, nn.Module]]:
    """Every experts module, of gossamer or of transformers."""
    surgery.check_model(model)
    foreign = surgery.loaded_adapter("transformers")
    found = [
        (name, module)
        for name, module in model.named_modules()
        if getattr(module, "weight_stacks", ()) or (foreign and foreign.is_experts(module))
    ]
    if not found and required:
        raise ValueError(
            "model must hold gossamer.nn.Experts or experts modules that use transformers' use_experts_implementation, "
            f"got none in {type(model).__name__}"
        )
    return found


def _linears(model: nn.Module, chosen: bool | Callable[[str, nn.Linear], bool]) -> list[tuple[str, nn.Module]]:
    """The plain linear layers to quantise: none that choose experts, or those for which ``chosen`` is true."""
    if chosen is False:
        return []
    routers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Router))

    def wanted(name: str, module: nn.Linear) -> bool:
        if chosen is not True:
            return chosen(name, module)
        return name.rpartition(".")[2] not in _GATES and not f"{name}.".startswith(routers) and module.out_features > 1

    return [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear and wanted(name, m)]


def _width(weight_format: str, group_size: int) -> int:
    """The number of which the input columns must be a multiple."""
    return {"int4": group_size, "mxfp4": MX_GROUP}.get(weight_format, 1)


def _width_obstacle(columns: int, weight_format: str, group_size: int) -> str | None:
    """Why this format cannot encode so many input columns, and which formats can; None if it can."""
    width = _width(weight_format, group_size)
    if columns % width == 0:
        return None
    fitting = [f"int4 with group_size {group}" for group in INT4_GROUPS if columns % group == 0]
    fitting += [name for name in FORMATS if name != "int4" and columns % _width(name, group_size) == 0]
    return f"{columns} input columns, not a multiple of {width}; formats that take them: {', '.join(fitting)}"


def _linear_obstacle(module: nn.Linear, uses: Counter, weight_format: str, group_size: int) -> str | None:
    """Why a linear layer is left unchanged, or None."""
    if uses[id(module.weight)] > 1:
        return "its weight is another module's too"
    if module.weight.dtype not in (*FLOAT_DTYPES, torch.float64):
        return "weight is not a floating-point tensor"
    reason = _width_obstacle(module.in_features, weight_format, group_size)
    return None if reason is None else f"it has {reason}"


def _weights(experts: nn.Module) -> tuple[tuple[str, ...], bool]:
    """Names of the weights of an experts module, and whether they are stored transposed."""
    if hasattr(experts, "weight_stacks"):
        return experts.weight_stacks, getattr(experts, "transposed", False)
    up = "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"
    return (up, "down_proj"), experts.is_transposed


def compute_by_gossamer(model: nn.Module) -> None:
    """Let gossamer compute the experts modules of transformers inside."""
    foreign = surgery.loaded_adapter("transformers")
    if foreign and foreign.holds_layers(model):
        foreign.replace(model)


def _keep_in_files(model: nn.Module) -> None:
    """Let models of transformers be saved and loaded with their quantised experts."""
    if foreign := surgery.loaded_adapter("transformers"):
        foreign.keep_quantized_in_files(model)


def _nbytes(held: torch.Tensor | nn.Module) -> int:
    return held.nbytes if isinstance(held, torch.Tensor) else held.weight().nbytes


def hold(module: nn.Module, name: str, weight: QuantizedExpertWeight) -> None:
    """Put ``weight`` in place of the module's parameter or stack ``name``."""
    if name in module._parameters:
        del module._parameters[name]
    module.add_module(name, QuantizedExpertStack(weight))
    if type(module) is nn.Linear:
        # Changed in place, so that hooks and other references to the module stay valid.
        module.__class__ = QuantizedLinear
    surgery.mark(module, ADAPTER)


def undo_obstacle(module: nn.Module, before: None) -> str | None:
    """Why the layer cannot be restored: quantisation did not keep the float weights."""
    return "must hold its float weights to be restored, they were quantised"


def undo(module: nn.Module, before: None) -> nn.Module:
    """Never called, as :func:`undo_obstacle` refuses every module."""
    raise ValueError(undo_obstacle(module, before))


def _obstacle(module: nn.Module, weight_format: str, group_size: int) -> str | None:
    """Why the module's weights cannot be quantised to this format, or None when they can."""
    names, transposed = _weights(module)
    if type(module).__name__ == "LoRAExperts" and getattr(module, "dora", False):
        return "row lengths of DoRA need the weight itself"
    if getattr(module, "form", "grouped") == "block_sparse":
        return "products in block-sparse form need floats"
    for name in names:
        held = getattr(module, name)
        if isinstance(held, QuantizedExpertStack):
            return f"{name} is quantised already, as {held.format}"
        if not isinstance(held, torch.Tensor) or held.dtype not in (*FLOAT_DTYPES, torch.float64):
            return f"{name} is not a floating-point tensor"
        if surgery.is_divided(held):
            return f"{name} is divided among processes; quantise it before it is divided"
        c = held.shape[1] if transposed else held.shape[2]
        if reason := _width_obstacle(c, weight_format, group_size):
            return f"{name} has {reason}"
    return None


def quantize_experts(
    model: nn.Module,
    format: str,
    *,
    group_size: int = MX_GROUP,
    strict: bool = True,
    include_linears: bool | Callable[[str, nn.Linear], bool] = False,
    activations: str = "float",
) -> Quantization:
    """Replace the expert weights of a model by quantised ones, in place, one matrix at a time.

    Works on :class:`gossamer.nn.Experts` (so :class:`gossamer.nn.MoE` and :class:`gossamer.nn.LoRAExperts`), on every
    other :class:`gossamer.nn.ExpertLayer` that names ``weight_stacks``, on :class:`gossamer.nn.MixtureOfAttention`, and
    on the experts modules of transformers models that use its experts interface, which :func:`gossamer.replace` then
    computes. A parameter such as ``gate_up_proj`` becomes a module with the buffers ``gate_up_proj.data`` and
    ``gate_up_proj.scale``; the float weights are freed. Routers, biases and everything else stay unchanged. Quantised
    experts are frozen, but gradients of activations, biases and low-rank factors pass through them. This cannot be
    undone. A model of transformers keeps them through ``save_pretrained`` and ``from_pretrained``, which needs ``import
    gossamer.integrations.transformers``.

    Args:
        model: any module with experts inside.
        format: ``"fp8"``, ``"fp8_block"``, ``"int8"``, ``"int4"`` or ``"mxfp4"``; see
            :class:`gossamer.QuantizedExpertWeight`.
        group_size: of ``int4``: 32, 64 or 128.
        strict: whether a module that cannot be quantised is an error (then nothing is changed); otherwise it is left
            unchanged and listed in the report.
        include_linears: whether the model's ``nn.Linear`` layers (attention, shared experts, the head) become
            :class:`gossamer.nn.QuantizedLinear` of the same format, except those called ``gate`` or ``router``, those
            within a router and those with one output; or a function of a layer's path and the layer that returns
            whether to quantise it. Layers that cannot be quantised, such as a head that shares the embedding's weight,
            are left unchanged and listed in the report.
        activations: ``"int8"`` also rounds the rows that these weights multiply to 8 bits, for the formats ``int8``,
            ``int4`` and ``mxfp4``; :class:`gossamer.QuantizedExpertWeight` states the error.

    Returns:
        What was quantised, with bytes before and after; ``print`` it.

    Raises:
        TypeError: ``model`` is not a module, or ``include_linears`` neither a bool nor a function.
        ValueError: the format or group size is unknown, the format does not support ``activations``, the model holds
            nothing to quantise, a weight is empty or holds NaN or infinity (then nothing is changed), or, under
            ``strict``, an experts module's weights do not fit the format or are quantised already.
    """
    check_format(format)
    check_activations(activations, format)
    check_group_size(group_size, format)
    if not isinstance(include_linears, bool) and not callable(include_linears):
        raise TypeError(f"include_linears must be a bool or a function, got {type(include_linears).__name__}")
    surgery.check_model(model)
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    linears = surgery.survey(
        _linears(model, include_linears), lambda name, module: _linear_obstacle(module, uses, format, group_size)
    )
    found = surgery.survey(
        _experts(model, required=not linears.chosen), lambda name, module: _obstacle(module, format, group_size)
    )
    if found.skipped and strict:
        raise ValueError("model has experts that cannot be quantised: " + surgery.reasons(found.skipped))
    for name, module in linears.chosen:
        check_quantizable(f"{name}.weight" if name else "weight", module.weight.unsqueeze(0), format, group_size)
    for name, module in found.chosen:
        names, transposed = _weights(module)
        for weight_name in names:
            weight = getattr(module, weight_name)
            wide = weight.transpose(1, 2) if transposed else weight
            check_quantizable(f"{name}.{weight_name}" if name else weight_name, wide, format, group_size)
    # This comes before the first matrix is dropped, so that a model that gossamer cannot compute stays intact.
    if found.chosen:
        compute_by_gossamer(model)
    done, options = [], {"group_size": group_size, "activations": activations}
    for name, module in linears.chosen:
        before, class_name = module.weight.nbytes, type(module).__name__
        weight = QuantizedExpertWeight.quantize_checked(module.weight.detach().unsqueeze(0), format, **options)
        hold(module, "weight", weight)
        done.append(QuantizedModule(name, class_name, format, before, weight.nbytes))
    for name, module in found.chosen:
        names, transposed = _weights(module)
        before = after = 0
        for weight_name in names:
            weight = getattr(module, weight_name).detach()
            before += weight.nbytes
            wide = weight.transpose(1, 2) if transposed else weight
            quantized = QuantizedExpertWeight.quantize_checked(wide, format, **options)
            hold(module, weight_name, quantized)
            after += quantized.nbytes
            del weight, wide
        done.append(QuantizedModule(name, type(module).__name__, format, before, after))
    _keep_in_files(model)
    return Quantization(tuple(done), (*found.skipped, *linears.skipped))


def _infer_format(data: torch.Tensor, scale: torch.Tensor) -> str:
    if data.dtype == torch.float8_e4m3fn:
        return "fp8" if scale.dim() == 2 else "fp8_block"
    if data.dtype == torch.int8:
        return "int8"
    return "mxfp4" if scale.dtype == torch.uint8 else "int4"


def _per_expert(
    tensors: Mapping[str, torch.Tensor], prefix: str, name: str, num_experts: int, used: list[str]
) -> QuantizedExpertWeight | None:
    """A stack made from separate quantised matrices of each expert, with gate and up separate; None if there are
    none.
    """
    for parts in _EXPERT_NAMES.get(name, ()):
        packed = f"{prefix}0.{parts[0]}.weight_packed" in tensors
        weight = "weight_packed" if packed else "weight"
        first = f"{prefix}0.{parts[0]}."
        scale = next((s for s in ("weight_scale_inv", "weight_scale") if first + s in tensors), None)
        if scale is None or first + weight not in tensors:
            continue

        def stacked(part: str, which: str) -> torch.Tensor:
            keys = [f"{prefix}{e}.{part}.{which}" for e in range(num_experts)]
            if missing := [key for key in keys if key not in tensors]:
                raise ValueError(f"tensors must hold every expert of {prefix}{part}, {missing[0]} is missing")
            used.extend(keys)
            values = [tensors[key] for key in keys]
            for key, value in zip(keys, values, strict=True):
                if (value.shape, value.dtype) != (values[0].shape, values[0].dtype):
                    raise ValueError(
                        f"tensors must hold experts of one shape and dtype: {keys[0]} is {tuple(values[0].shape)} "
                        f"{values[0].dtype}, {key} is {tuple(value.shape)} {value.dtype}"
                    )
            # Viewed as bytes, because torch does not stack every 8-bit type.
            if values[0].dtype.itemsize == 1:
                return torch.stack([v.contiguous().view(torch.uint8) for v in values]).view(values[0].dtype)
            return torch.stack(values)

        for key in (f"{prefix}0.{part}.{which}" for part in parts for which in _NOT_SYMMETRIC):
            if packed and key in tensors:
                raise ValueError(f"tensors must hold symmetric int4 with columns in order, got {key} beside it")
        read = QuantizedExpertWeight.from_int4 if packed else QuantizedExpertWeight.from_fp8
        return concatenate([read(stacked(part, weight), stacked(part, scale)) for part in parts])
    return None


def _pair(tensors: Mapping[str, torch.Tensor], used: list[str], first: str, second: str) -> tuple[torch.Tensor, ...]:
    """Two tensors that must both be present."""
    for name, other in ((first, second), (second, first)):
        if name not in tensors:
            raise ValueError(f"tensors must hold {name} beside {other}")
        check_tensor(name, tensors[name])
    used += [first, second]
    return tensors[first], tensors[second]


def _read(
    tensors: Mapping[str, torch.Tensor], prefix: str, name: str, num_experts: int, used: list[str]
) -> QuantizedExpertWeight | None:
    """The stack that ``tensors`` hold for the weight ``name`` of the module at ``prefix``, or None."""
    key = prefix + name
    if f"{key}.data" in tensors:
        data, scale = _pair(tensors, used, f"{key}.data", f"{key}.scale")
        return QuantizedExpertWeight(data, scale, _infer_format(data, scale))
    if f"{key}_blocks" in tensors:
        return QuantizedExpertWeight.from_mxfp4(*_pair(tensors, used, f"{key}_blocks", f"{key}_scales"))
    if f"{key}_scale_inv" in tensors:
        return QuantizedExpertWeight.from_fp8(*_pair(tensors, used, key, f"{key}_scale_inv"))
    return _per_expert(tensors, prefix, name, num_experts, used)


def _placed(
    weight: QuantizedExpertWeight, device: torch.device | str | None, activations: str
) -> QuantizedExpertWeight:
    """The weight on ``device`` (None leaves it where it is), with this choice of ``activations``."""
    data, scale = (t if device is None else t.to(device) for t in (weight.data, weight.scale))
    return replace(weight, data=data, scale=scale, activations=activations)


def load_quantized_experts(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    *,
    device: torch.device | str | None = None,
    activations: str = "float",
) -> Quantization:
    """Load the quantised expert weights of a checkpoint into a model, without converting them to floats.

    The model's own expert weights may be on the meta device: they are dropped. For an experts module called ``P``, and
    each of its weights ``W`` (``gate_up_proj`` or ``up_proj``, and ``down_proj``), these names are known:

    * ``P.W.data`` and ``P.W.scale``: the state of a model that :func:`gossamer.quantize_experts` made; linear layers
      with such a ``weight`` become :class:`gossamer.nn.QuantizedLinear`;
    * ``P.quantized_data_W`` and ``P.quantized_scale_W``: its files, as ``save_pretrained`` of transformers writes them;
    * ``P.W_blocks`` and ``P.W_scales``: gpt-oss's mxfp4;
    * ``P.W`` and ``P.W_scale_inv``: fp8 in the layout of transformers;
    * ``P.e.gate_proj.weight`` with ``.weight_scale_inv`` or ``.weight_scale``, and so on for each expert e: fp8 as in
      DeepSeek-V3, in blocks, rows or matrices; ``w1``, ``w3``, ``w2`` are gate, up and down too;
    * ``P.e.gate_proj.weight_packed`` with ``.weight_scale``: symmetric int4 of compressed-tensors.

    Args:
        model: any module with experts inside, as in :func:`gossamer.quantize_experts`.
        tensors: tensors by their names in the model's ``state_dict``; may be a mapping that reads from files.
        device: device of the stacks; None to leave them where they are.
        activations: as in :func:`gossamer.quantize_experts`.

    Returns:
        A report of what was loaded. ``used`` lists the tensors; load the others with ``load_state_dict(...,
        strict=False)``.

    Raises:
        TypeError: ``model`` is not a module, or a tensor has another dtype than its format.
        ValueError: the model holds no experts, a module's weight is not among ``tensors``, shapes do not fit, or a
            format does not support ``activations``.
    """
    surgery.check_model(model)
    if not hasattr(tensors, "keys") or not hasattr(tensors, "__getitem__"):
        raise TypeError(f"tensors must be a mapping of names to tensors, got {type(tensors).__name__}")
    check_device("device", device)
    linears = any(key.endswith(("weight.data", "quantized_data_weight")) for key in tensors)
    experts = _experts(model, required=not linears)
    file_names: dict[str, str] = {}
    if foreign := surgery.loaded_adapter("transformers"):
        file_names = foreign.quantized_file_names(model, tensors)
        tensors = ChainMap({name: tensors[key] for name, key in file_names.items()}, tensors)
    loaded, used = [], []
    for name, module in experts:
        names, transposed = _weights(module)
        prefix = f"{name}." if name else ""
        weights = {}
        for weight_name in names:
            held = getattr(module, weight_name)
            if isinstance(held, QuantizedExpertStack):
                shape = held.weight().shape
            else:
                shape = tuple(held.transpose(1, 2).shape if transposed else held.shape)
            weight = _read(tensors, prefix, weight_name, shape[0], used)
            if weight is None:
                raise ValueError(f"tensors must hold a quantised {prefix}{weight_name} under one of the known names")
            if weight.shape != shape:
                raise ValueError(f"{prefix}{weight_name} must have shape (E, N, C) = {shape}, got {weight.shape}")
            weights[weight_name] = _placed(weight, device, activations)
        loaded.append((name, module, weights))
    for name, module in model.named_modules():
        key = f"{name}.weight" if name else "weight"
        if type(module) not in (nn.Linear, QuantizedLinear) or f"{key}.data" not in tensors:
            continue
        weight = _read(tensors, f"{name}." if name else "", "weight", 1, used)
        if weight.shape != (1, module.out_features, module.in_features):
            shape = 1, module.out_features, module.in_features
            raise ValueError(f"{key} must have shape (1, O, I) = {shape}, got {weight.shape}")
        loaded.append((name, module, {"weight": _placed(weight, device, activations)}))
    if experts:
        compute_by_gossamer(model)
    done = []
    for name, module, weights in loaded:
        before = sum(_nbytes(getattr(module, weight_name)) for weight_name in weights)
        for weight_name, weight in weights.items():
            hold(module, weight_name, weight)
        formats = " and ".join(dict.fromkeys(w.format for w in weights.values()))
        after = sum(w.nbytes for w in weights.values())
        done.append(QuantizedModule(name, type(module).__name__, formats, before, after))
    _keep_in_files(model)
    return Quantization(tuple(done), (), tuple(file_names.get(name, name) for name in used))
