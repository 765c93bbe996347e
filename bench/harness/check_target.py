"""Finds the targets of ``gossamer check``: a module by its import path or its Hugging Face name, and its inputs."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gossamer.bench.harness.case import DTYPES
from gossamer.bench.harness.check import made_by, take_weights

INPUT_DTYPES = {**DTYPES, "fp64": torch.float64, "int64": torch.int64, "int32": torch.int32, "bool": torch.bool}
# Shape of the token ids for a language model without a given input.
TOKEN_SHAPE = (2, 32)


def attribute(path: str, option: str) -> object:
    """The object that ``package.module:attribute`` names; the current folder is searched too, as with ``python -m``.

    Raises:
        ValueError: there is no such module or attribute, or importing it fails.
    """
    name, _, rest = path.partition(":")
    if not name or not rest:
        raise ValueError(f"{option} must be package.module:attribute, got {path!r}")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(name)
    except Exception as error:
        # The user's own code may raise anything while it is imported.
        raise ValueError(f"{option} {path}: importing {name} raised {type(error).__name__}: {error}") from error
    for part in rest.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{option} {path}: {getattr(found, '__name__', found)} has no attribute {part!r}")
        found = getattr(found, part)
    return found


def _called(make: Callable[[], object], option: str, path: str) -> torch.nn.Module:
    try:
        made = make()
    except Exception as error:
        raise ValueError(f"{option} {path}: calling it raised {type(error).__name__}: {error}") from error
    if not isinstance(made, torch.nn.Module):
        raise ValueError(f"{option} {path} must be a torch.nn.Module or build one, got {type(made).__name__}")
    return made


def load_module(path: str) -> torch.nn.Module:
    """The module at ``package.module:attribute``: an instance, or what the callable there builds without arguments."""
    found = attribute(path, "MODULE")
    if isinstance(found, torch.nn.Module):
        return found
    if not callable(found):
        raise ValueError(f"MODULE {path} must be a torch.nn.Module or build one, got {type(found).__name__}")
    return _called(found, "MODULE", path)


def load_replacement(path: str, original: torch.nn.Module) -> torch.nn.Module:
    """The replacement at ``package.module:attribute``.

    An instance is used as it is. A callable that needs an argument is called with a copy of the original. One that
    needs none builds a module, and the original's weights are loaded into it, so names and shapes must match.
    """
    found = attribute(path, "--replacement")
    if isinstance(found, torch.nn.Module):
        return found
    if not callable(found):
        raise ValueError(f"--replacement {path} must be a torch.nn.Module or build one, got {type(found).__name__}")
    built_anew = []

    def make() -> object:
        made, anew = made_by(found, original)
        built_anew.append(anew)
        return made

    made = _called(make, "--replacement", path)
    if built_anew[0]:
        try:
            take_weights(made, original)
        except ValueError as error:
            raise ValueError(f"--replacement {path} {error}") from None
    return made


def settings(given: Sequence[str]) -> dict[str, object]:
    """``["hidden_size=64"]`` as ``{"hidden_size": 64}``; a value that is not JSON is taken as text."""
    found: dict[str, object] = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ValueError(f"--set must be KEY=VALUE, got {item!r}")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


# Settings that every config takes although no attribute or parameter has their name.
_ANY_CONFIG = ("attn_implementation", "experts_implementation", "rope_theta", "rope_scaling", "torch_dtype")


def _reads(config_class: type, key: str) -> bool:
    """Whether the model's source reads the setting, as ``getattr(config, "head_dim", None)`` does."""
    try:
        source = inspect.getsource(
            importlib.import_module(config_class.__module__.replace(".configuration", ".modeling"))
        )
    except (ImportError, OSError):
        return False
    return re.search(rf"""config\.{re.escape(key)}\b|["']{re.escape(key)}["']""", source) is not None


def _check_settings(config_class: type, values: Mapping[str, object]) -> None:
    """Raise if the config class has no such setting and its model reads none: most config classes accept any name."""
    known = {*inspect.signature(config_class.__init__).parameters, *config_class.attribute_map, *_ANY_CONFIG}
    known.update(vars(config_class()), config_class.sub_configs)
    for key in values:
        if key in known or _reads(config_class, key):
            continue
        close = difflib.get_close_matches(key, sorted(known))
        like = f"; close names: {', '.join(close)}" if close else ""
        raise ValueError(f"--set {key}: {config_class.__name__} has no such setting{like}")


def _check_experts(config: object) -> None:
    """Raise if a token would choose more experts than the model has."""
    config = config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    given = next((n for n in names if isinstance(getattr(config, n, None), int)), None)
    if isinstance(chosen, int) and given is not None and 0 < getattr(config, given) < chosen:
        raise ValueError(f"num_experts_per_tok ({chosen}) is larger than {given} ({getattr(config, given)})")


def _builder(name: str, values: Mapping[str, object]) -> Callable[[], torch.nn.Module]:
    try:
        import transformers
    except ImportError:
        raise ValueError(
            f"MODULE {name!r}: a Hugging Face name needs transformers: pip install 'gossamer[transformers]'"
        ) from None
    found = getattr(transformers, name, None)
    if found is None and name in transformers.CONFIG_MAPPING:
        found = transformers.CONFIG_MAPPING[name]
    try:
        if inspect.isclass(found) and issubclass(found, transformers.PretrainedConfig):
            _check_settings(found, values)
            config = found(**values)
            _check_experts(config)
            kinds = (transformers.AutoModelForCausalLM, transformers.AutoModel)
            kind = next((k for k in kinds if type(config) in k._model_mapping), None)
            if kind is None:
                raise ValueError(f"MODULE {name!r}: transformers has no model for {type(config).__name__}")
            return lambda: kind.from_config(config)
        if inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel) and found.config_class:
            _check_settings(found.config_class, values)
            config = found.config_class(**values)
            _check_experts(config)
            return lambda: found(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"MODULE {name!r}: {error}") from error
    raise ValueError(
        f"MODULE must be package.module:attribute, or a model class, config class or model type of transformers "
        f"{transformers.__version__}, got {name!r}"
    )


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))


def load_hugging_face(
    name: str, values: Mapping[str, object], dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    """A Hugging Face model with random weights, by the name of its class, of its config, or of its type.

    Raises:
        ValueError: no model has that name, its config refuses a setting (most accept any name), or the check of the
            model would not fit into memory.
    """
    build = _builder(name, values)
    try:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in build().parameters())
        # Weights and gradients of the original, of its copy, and of the float64 run.
        need = parameters * (4 * dtype.itemsize + 2 * 8)
        if need > _free_bytes(device):
            raise ValueError(
                f"it has {parameters / 1e9:.3g} billion parameters, whose check needs {need / 2**30:.0f} GiB and "
                f"{_free_bytes(device) / 2**30:.0f} are free; make it smaller, as with --set num_hidden_layers=2"
            )
        torch.manual_seed(0)
        return build().to(device=device, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"MODULE {name!r}: {error}") from error
    except Exception as error:
        # An inconsistent config can raise any exception while the model is built.
        raise ValueError(
            f"MODULE {name!r}: the original model cannot be built with these settings: {type(error).__name__}: {error}"
        ) from error


def parse_input(text: str, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """``"4,128,512:bf16"`` as a random normal tensor, ``"2,32:int64:1000"`` as random integers below 1000.

    Raises:
        ValueError: the shape or the dtype is malformed or unknown, or an integer dtype is given without a limit.
    """
    shape_text, *rest = text.split(":")
    sizes = [size.strip() for size in shape_text.split(",")]
    if not all(size.isdecimal() for size in sizes) or len(rest) > 2:
        raise ValueError(f"--input must be SHAPE[:DTYPE[:LIMIT]] such as 4,128,512:bf16, got {text!r}")
    if rest and rest[0] not in INPUT_DTYPES:
        raise ValueError(f"--input: the dtype must be one of {', '.join(INPUT_DTYPES)}, got {rest[0]!r}")
    shape, wanted = tuple(map(int, sizes)), INPUT_DTYPES[rest[0]] if rest else dtype
    generator = torch.Generator().manual_seed(seed)
    if wanted.is_floating_point:
        if len(rest) > 1:
            raise ValueError(f"--input: only integers have a limit, got {text!r}")
        return torch.randn(shape, generator=generator).to(device=device, dtype=wanted)
    if wanted == torch.bool:
        return torch.randint(2, shape, generator=generator).to(device=device, dtype=wanted)
    if len(rest) < 2 or not rest[1].isdecimal() or int(rest[1]) < 1:
        raise ValueError(f"--input: integers need a limit that they stay below, as in 2,32:int64:1000, got {text!r}")
    return torch.randint(int(rest[1]), shape, generator=generator).to(device=device, dtype=wanted)


def load_inputs(path: Path, device: torch.device) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Tensors of a safetensors file: those named 0, 1, ... are positional arguments, others keyword arguments.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError("--inputs needs safetensors: pip install safetensors") from None
    try:
        found = load_file(str(path), device=str(device))
    except Exception as error:
        # safetensors raises its own errors in addition to the system's.
        raise ValueError(f"--inputs {path}: {error}") from None
    positional = sorted((name for name in found if name.isdecimal()), key=int)
    return tuple(found[name] for name in positional), {k: v for k, v in found.items() if not k.isdecimal()}


def token_ids(module: torch.nn.Module, device: torch.device) -> torch.Tensor:
    """Random token ids for a language model, the dimensions of :data:`TOKEN_SHAPE`."""
    config = module.config
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if vocabulary is None:
        raise ValueError(f"{type(module).__name__} has no vocabulary: give its inputs with --input or --inputs")
    return torch.randint(vocabulary, TOKEN_SHAPE, generator=torch.Generator().manual_seed(0)).to(device)


@dataclass(frozen=True)
class Target:
    """What a check is run on."""

    module: torch.nn.Module
    replacement: torch.nn.Module | None
    inputs: tuple[torch.Tensor, ...]
    kwargs: dict[str, object]


def gather(
    module: str,
    replacement: str | None,
    inputs: Sequence[str],
    inputs_file: Path | None,
    config: Sequence[str],
    dtype: torch.dtype | None,
    device: torch.device,
    *,
    train: bool = False,
) -> Target:
    """Everything that the command line names.

    Raises:
        ValueError: the module, the replacement or an input cannot be loaded or built.
    """
    kwargs: dict[str, object] = {}
    by_path = ":" in module
    if by_path:
        if config:
            raise ValueError("--set is for models of transformers, and MODULE is an import path")
        made = load_module(module).to(device=device, dtype=dtype)
    else:
        made = load_hugging_face(module, settings(config), dtype or torch.float32, device)
        # A cache of keys and values is not a result to compare.
        kwargs["use_cache"] = False
    made.train(train)
    other = None
    if replacement is not None:
        other = load_replacement(replacement, made).to(device=device, dtype=dtype).train(train)
    own = next((p.dtype for p in made.parameters() if p.is_floating_point()), torch.float32)
    if inputs_file is not None:
        given, named = load_inputs(inputs_file, device)
        kwargs |= named
    elif inputs:
        given = tuple(parse_input(text, own, device, seed) for seed, text in enumerate(inputs))
    elif by_path:
        raise ValueError("give the layer's inputs: --input 4,128,512:bf16 for each, or --inputs FILE.safetensors")
    else:
        given = (token_ids(made, device),)
    return Target(made, other, given, kwargs)
