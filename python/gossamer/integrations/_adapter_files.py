"""Reading LoRA adapters from the folders that PEFT writes: JSON and safetensors, never pickles."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."

# Options supported with any value: they only affect which layers have factors, their sizes, or how they were trained.
_SERVED = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern"),
    *("target_parameters", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "ensure_weight_tying", "qalora_group_size", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
# Initialisations that leave the base weights unchanged; the others would need a separate base for each adapter.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Factors:
    """The update of one module, or of one parameter of an experts module, by one adapter.

    Attributes:
        a: ``(r, C)``; for a table ``(r, N)``; for experts PEFT's flat ``(E·r, C)``.
        b: ``(O, r)``; for a table ``(D, r)``; for experts PEFT's flat ``(O, r·E)``.
        scale: α/r, or α/√r.
        bias: ``(O,)``, added with the scale, or None.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None


def _read_config(name: str, folder: Path) -> dict[str, object]:
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"adapter {name!r}: {folder} must be a folder with {CONFIG}, which is missing")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"adapter {name!r}: {path} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"adapter {name!r}: {path} must be of peft_type 'LORA', got {kind!r}")
    refused = [
        f"{k}={v!r}" for k, v in config.items() if k not in _SERVED and v and k not in ("init_lora_weights", "bias")
    ]
    if config.get("init_lora_weights", True) not in _INITS:
        refused.append(f"init_lora_weights={config['init_lora_weights']!r}")
    if config.get("bias", "none") != "none":
        refused.append(f"bias={config['bias']!r}")
    if refused:
        raise ValueError(f"adapter {name!r} sets options that cannot be served beside others: {', '.join(refused)}")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"adapter {name!r}: alpha_pattern of {path} must be a mapping, got {patterns!r}")
    alphas = {f"alpha_pattern[{pattern!r}]": alpha for pattern, alpha in patterns.items()}
    for key, value in {"lora_alpha": config.get("lora_alpha"), "r": config.get("r"), **alphas}.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not abs(value) <= sys.float_info.max:
            raise ValueError(f"adapter {name!r}: {key} of {path} must be a number, got {value!r}")
    return config


def _read_weights(name: str, folder: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ImportError("gossamer.serve_adapters needs safetensors: pip install 'gossamer[peft]'") from error

    path = folder / WEIGHTS
    if not path.is_file():
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        if pickled:
            raise ValueError(
                f"adapter {name!r}: {folder} holds {', '.join(pickled)}, a pickle, which runs code when it is read; "
                f"save it again with PEFT's save_pretrained(..., safe_serialization=True)"
            )
        raise ValueError(f"adapter {name!r}: {folder} must hold {WEIGHTS}, which is missing")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"adapter {name!r}: {path} is not a safetensors file: {error}") from error


def _alpha(config: dict[str, object], path: str) -> float:
    """α of a module: from the first pattern that matches the end of its path, as in PEFT, else the adapter's."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return float(alpha)
    return float(config["lora_alpha"])


def _targeted(config: dict[str, object], path: str, module: nn.Module) -> list[str]:
    """The parameters of ``module`` that ``target_parameters`` names, in the order in which PEFT wraps them."""
    targets = config.get("target_parameters") or ()
    keys = [(f"{path}.{name}", name) for name, _ in module.named_parameters(recurse=False)]
    return [name for key, name in keys if any(key == t or key.endswith(f".{t}") for t in targets)]


def _sizes(name: str, path: str, module: nn.Module, parameter: str | None) -> tuple[int, int, int]:
    """Number of experts, inputs and outputs of an updated module: a linear layer, a table (N inputs) or an experts'
    parameter.
    """
    if parameter is not None:
        weight = getattr(module, parameter)
        if weight.dim() != 3:
            raise ValueError(f"adapter {name!r}: {path}.{parameter} must have 3 dimensions, got {tuple(weight.shape)}")
        experts, rows, columns = weight.shape
        return (experts, rows, columns) if getattr(module, "is_transposed", False) else (experts, columns, rows)
    if isinstance(module, nn.Embedding):
        return 1, module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.Linear):
        return 1, module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return 1, module.nx, module.nf
    raise ValueError(
        f"adapter {name!r} updates {path}, a {type(module).__name__}; served are linear layers, embedding "
        "tables and experts modules"
    )


def _check_base(name: str, key: str, value: torch.Tensor, path: str, module: nn.Module) -> None:
    """A base weight saved with an adapter must equal the model's own, because all adapters share one base."""
    own = getattr(module, key.rpartition(".")[2], None)
    if (
        not isinstance(own, torch.Tensor)
        or own.shape != value.shape
        or not torch.equal(own.detach().cpu(), value.to(own.dtype))
    ):
        raise ValueError(f"adapter {name!r} brings its own weight of {path}, which differs from the model's: {key}")


def read_adapter(name: str, folder: Path, modules: dict[str, nn.Module]) -> dict[tuple[str, str | None], Factors]:
    """One adapter's factors by (module path, parameter of an experts module or None), all sizes checked.

    Args:
        name: name of the adapter, for messages.
        folder: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        modules: the model's modules by path.

    Raises:
        ValueError: a file is missing, damaged or a pickle; an option cannot be served; a tensor belongs to no module,
            lacks its partner, or has the wrong size for its module.
    """
    config, weights = _read_config(name, folder), _read_weights(name, folder)
    parts: dict[tuple[str, str | None], dict[str, torch.Tensor]] = {}
    for key, value in weights.items():
        match = re.fullmatch(
            r"(.*)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B)", key
        )
        stem = (match[1] if match else key.rpartition(".")[0]).removeprefix(PREFIX)
        path = stem
        while path.endswith(".base_layer"):
            path = path.removesuffix(".base_layer")
        module = modules.get(path)
        if module is None or not key.startswith(PREFIX):
            raise ValueError(f"adapter {name!r}: its tensor {key} belongs to no module of the model")
        if match is None:
            _check_base(name, key, value, path, module)
            continue
        parameter = None
        if targeted := _targeted(config, path, module):
            depth = (len(stem) - len(path)) // len(".base_layer")
            if depth >= len(targeted):
                raise ValueError(f"adapter {name!r}: its tensor {key} fits none of {targeted} of {path}")
            parameter = targeted[len(targeted) - 1 - depth]
        parts.setdefault((path, parameter), {})[match[2]] = value
    if not parts:
        raise ValueError(f"adapter {name!r}: {folder / WEIGHTS} must hold LoRA factors, got none")
    return {
        (path, parameter): _factors(name, config, path, parameter, found, modules[path])
        for (path, parameter), found in parts.items()
    }


def _factors(
    name: str,
    config: dict[str, object],
    path: str,
    parameter: str | None,
    found: dict[str, torch.Tensor],
    module: nn.Module,
) -> Factors:
    experts, inputs, outputs = _sizes(name, path, module, parameter)
    keys = (
        ("lora_embedding_A", "lora_embedding_B")
        if isinstance(module, nn.Embedding)
        else ("lora_A.weight", "lora_B.weight")
    )
    label = path if parameter is None else f"{path}.{parameter}"
    if missing := [key for key in keys if key not in found]:
        raise ValueError(f"adapter {name!r}: {label} must have {' and '.join(keys)}, got no {' and no '.join(missing)}")
    a, b = (found[key] for key in keys)
    bias = found.get("lora_B.bias")
    wide = a.shape[0] if a.dim() == 2 else 0
    fits = wide >= 1 and wide % experts == 0 and tuple(a.shape) == (wide, inputs) and tuple(b.shape) == (outputs, wide)
    if not fits or (bias is not None and tuple(bias.shape) != (outputs,)):
        raise ValueError(
            f"adapter {name!r}: the factors of {label} must have shapes (r, {inputs}) and ({outputs}, r)"
            f"{f', r a multiple of {experts}' if experts > 1 else ''}, got {tuple(a.shape)} and {tuple(b.shape)}"
            f"{'' if bias is None else f' with a bias {tuple(bias.shape)}'}"
        )
    if not all(t.is_floating_point() for t in (a, b)):
        raise ValueError(
            f"adapter {name!r}: the factors of {label} must be floating point, got {a.dtype} and {b.dtype}"
        )
    rank = wide // experts
    alpha = _alpha(config, label)
    return Factors(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), bias)
