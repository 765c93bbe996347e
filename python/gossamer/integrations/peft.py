"""PEFT: the LoRA layers of a ``PeftModel`` computed by gossamer, with PEFT's own modules, names, saving and loading.

:func:`gossamer.replace` exchanges the class of each tuner layer for a subclass with another ``forward``, in place. The
layer's contents remain PEFT's: PEFT adds, switches, disables, merges, saves and loads adapters.

Options of ``LoraConfig`` that are computed: ``r``, ``lora_alpha``, ``lora_dropout``, ``use_rslora``, ``use_dora``,
``lora_bias``, ``fan_in_fan_out``, ``rank_pattern``, ``alpha_pattern``, ``target_parameters``; and all options that only
choose layers or initial values: :data:`SUPPORTED`. Setting any other option raises an error that names it.

Experts that transformers divided among processes with ``DistributedConfig(ep_implementation="gossamer")`` keep the
factors of their adapters with them: ``gossamer.replace`` turns PEFT's factors into DTensors by expert, so call it
before you make the optimizer. Every process calls ``replace``, ``restore``, ``state_dict`` and ``save_pretrained``;
state dicts and files hold all experts' factors in PEFT's layout. Without ``replace`` PEFT cannot compute such a model.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

from torch import nn

try:
    import peft
except ModuleNotFoundError as error:
    if error.name not in ("peft", "accelerate"):
        raise
    raise ImportError("gossamer's PEFT integration needs peft: pip install 'gossamer[peft]'") from error

if tuple(int(part) for part in peft.__version__.split(".")[:2]) < (0, 21):
    raise ImportError(
        f"gossamer's PEFT integration needs peft 0.21 or later, got {peft.__version__}: pip install 'gossamer[peft]'"
    )

from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora import model as peft_model
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from gossamer.integrations import surgery
from gossamer.integrations._calls import Running, Slot, scope
from gossamer.integrations._peft_config import SUPPORTED as SUPPORTED
from gossamer.integrations._peft_config import check_config
from gossamer.integrations._peft_experts import ExpertsMixin, parallel_obstacle
from gossamer.integrations._peft_layers import EmbeddingMixin, LinearMixin
from gossamer.integrations._peft_tuner import BASE
from gossamer.integrations._report import Replacement, SwitchedModule

ADAPTER = "peft"
_IGNORED = "_ddp_params_and_buffers_to_ignore"
_OURS = (LinearMixin, EmbeddingMixin, ExpertsMixin)

_VARIANTS = (DoraLinearVariant, DoraEmbeddingVariant)


class Linear(LinearMixin, peft_layer.Linear):
    """PEFT's ``lora.Linear``, computed by gossamer."""


class Embedding(EmbeddingMixin, peft_layer.Embedding):
    """PEFT's ``lora.Embedding``, computed by gossamer."""


class ParamWrapper(ExpertsMixin, peft_layer.ParamWrapper):
    """PEFT's ``lora.ParamWrapper``, computed by gossamer."""


class LoraModel(peft_model.LoraModel):
    """PEFT's ``LoraModel``, whose ``adapter_names`` belong to a call: threads that share the model may mix adapters."""

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: object, **kwargs: object) -> Iterator[None]:
        foreign = next((type(m).__name__ for m in self.modules() if _takes_names(m)), None)
        with contextlib.ExitStack() as stack:
            stack.enter_context(scope())
            if foreign is not None:
                # PEFT passes names to these modules through hooks, which would run in the calls of all threads.
                call = None if kwargs.get("adapter_names") is None else object()
                message = (
                    f"a call with adapter_names must not overlap another call of the model: its {foreign} is PEFT's, "
                    "which takes the names of whichever call set them last"
                )
                stack.enter_context(self._gossamer_running.call(call, message))
            stack.enter_context(super()._enable_peft_forward_hooks(*args, **kwargs))
            yield


_CLASSES: dict[type, type] = {
    peft_model.LoraModel: LoraModel,
    peft_layer.Linear: Linear,
    peft_layer.Embedding: Embedding,
    peft_layer.ParamWrapper: ParamWrapper,
}


def _quantized_classes() -> None:
    """Add the layers over bitsandbytes' base layers; PEFT imports their module only if bitsandbytes is installed."""
    bnb = sys.modules.get("peft.tuners.lora.bnb")
    for name in ("Linear4bit", "Linear8bitLt"):
        theirs = getattr(bnb, name, None)
        if theirs is not None and theirs not in _CLASSES:
            ours = type(name, (LinearMixin, theirs), {"__module__": __name__, "__doc__": f"PEFT's ``lora.{name}``."})
            _CLASSES[theirs] = globals()[name] = ours


def _takes_names(module: nn.Module) -> bool:
    """Whether PEFT passes ``adapter_names`` to the module, and gossamer does not compute it."""
    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not isinstance(module, _OURS)


def holds_layers(model: nn.Module) -> bool:
    """Whether ``model`` has layers of any of PEFT's tuners inside."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def _check_configs(model: nn.Module) -> None:
    for module in model.modules():
        for adapter_name, config in (module.__dict__.get("peft_config") or {}).items():
            check_config(adapter_name, config)


def _obstacle(name: str, layer: nn.Module) -> str | None:
    """Why gossamer cannot compute this layer at all, or None."""
    if isinstance(layer, _OURS):
        return None
    if isinstance(layer, peft_layer.ParamWrapper) and (reason := parallel_obstacle(layer)) is not None:
        return reason
    if type(layer) not in _CLASSES:
        known = ", ".join(sorted(f"lora.{cls.__name__}" for cls in _CLASSES if issubclass(cls, BaseTunerLayer)))
        return f"there is no forward for it; there is one for {known}"
    for adapter_name, variant in layer.lora_variant.items():
        if type(variant) not in _VARIANTS:
            return f"its adapter {adapter_name!r} is a {type(variant).__name__}"
    return None


def _detail(layer: nn.Module) -> tuple[bool, str]:
    reason = layer.gossamer_obstacle()
    if reason is not None:
        return False, f"PEFT's own sum for one adapter at a time, since {reason}"
    what = {LinearMixin: "low_rank_linear", EmbeddingMixin: "rows of A and B", ExpertsMixin: "expert_mlp"}
    if isinstance(layer, ExpertsMixin) and type(layer.get_base_layer()) is nn.Linear:
        return True, "low_rank_linear"
    return True, next(text for cls, text in what.items() if isinstance(layer, cls))


def survey(model: nn.Module, strict: bool) -> surgery.Survey:
    """PEFT's tuner layers in ``model``; a ValueError for unsupported options, or under ``strict`` for unsupported
    layers.
    """
    surgery.check_model(model)
    _quantized_classes()
    _check_configs(model)
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    found = surgery.survey(layers, _obstacle)
    if found.skipped and strict:
        why = surgery.reasons(found.skipped, "{name} (lora.{class_name}): {reason}")
        raise ValueError(f"model has tuner layers that gossamer cannot compute: {why}")
    return found


def swap(model: nn.Module, found: surgery.Survey) -> Replacement:
    """Give the chosen layers gossamer's classes."""
    layers = [layer for _, layer in found.chosen]
    for layer in layers:
        if not isinstance(layer, _OURS):
            layer.__class__ = _CLASSES[type(layer)]
            layer.gossamer_names = Slot()
            surgery.mark(layer, ADAPTER)
        if isinstance(layer, ExpertsMixin):
            layer.divide_factors()
    if any(isinstance(layer, ExpertsMixin) and layer.divided for layer in layers):
        _leave_to_experts(model)
    for module in model.modules():
        if type(module) is peft_model.LoraModel:
            module.__class__, module._gossamer_running = LoraModel, Running()
            surgery.mark(module, ADAPTER)
    switched = tuple(SwitchedModule(name, type(layer).__name__, *_detail(layer)) for name, layer in found.chosen)
    return Replacement(switched, found.skipped, "LoRA layers")


def _leave_to_experts(model: nn.Module) -> None:
    """Let DistributedDataParallel ignore the DTensors of a model: the gradients of divided factors are complete."""
    known = getattr(model, _IGNORED, ())
    surgery.mark(model, ADAPTER, tuple(known))
    divided = (name for name, parameter in model.named_parameters() if surgery.is_divided(parameter))
    setattr(model, _IGNORED, list(dict.fromkeys((*known, *divided))))


def undo_obstacle(layer: nn.Module, before: tuple[str, ...] | None) -> str | None:
    """Why the layer cannot get PEFT's class back."""
    if isinstance(layer, (*_OURS, LoraModel)) or before is not None:
        return None
    return f"must have the class that replace gave it to be restored, got {type(layer).__name__}"


def undo(layer: nn.Module, before: tuple[str, ...] | None) -> nn.Module:
    """Give the layer PEFT's class back, or a model the names that DistributedDataParallel ignored before."""
    if before is not None:
        setattr(layer, _IGNORED, list(before))
    if not isinstance(layer, (*_OURS, LoraModel)):
        return layer
    if isinstance(layer, ExpertsMixin):
        layer.gather_factors()
    layer.__class__ = next(theirs for theirs, ours in _CLASSES.items() if type(layer) is ours)
    for name in ("gossamer_names", "_gossamer_reason", "_gossamer_running"):
        layer.__dict__.pop(name, None)
    return layer


def replace(model: nn.Module, *, strict: bool = True) -> Replacement:
    """Exchange the forward of every LoRA layer in ``model``; :func:`gossamer.replace` calls it for PEFT models.

    Call it again to switch layers that were added later.

    Args:
        model: a ``PeftModel``, or any module with PEFT's tuner layers inside.
        strict: whether a layer that gossamer cannot compute is an error; otherwise it is left to PEFT and named.

    Raises:
        ValueError: an adapter's config sets an option that is not computed; under ``strict``, a layer that cannot be.
    """
    return swap(model, survey(model, strict))


def restore(model: nn.Module) -> bool:
    """Give every layer its class back; returns whether there was anything to undo."""
    return surgery.undo(model, ADAPTER)


def _adapters_of(module: nn.Module) -> set[str]:
    """The adapters that a layer of PEFT has parameters for."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return set(module._adapters)
    parts = (getattr(module, name, None) for name in module.adapter_layer_names)
    return {name for part in parts if part is not None for name in part}


@contextlib.contextmanager
def mixed_adapters(model: nn.Module, adapter_names: Sequence[str | None]) -> Iterator[None]:
    """Apply to each row of a batch its own adapter inside the ``with`` block, in training too.

    PEFT's ``adapter_names`` does this for inference only. Here every adapter of the batch gets gradients, so several
    adapters train in one step: make them trainable with ``peft_model.base_model.set_adapter([...])``. With gradient
    checkpointing the backward pass recomputes layers, so it must be inside the block too. The names are those of the
    block's thread or asyncio task: others may run the model with other names, or none, at the same time. Once a task of
    asyncio has entered a block, compiled models read the names between graphs, which ``fullgraph=True`` does not allow.

    Args:
        model: a model that :func:`gossamer.replace` switched.
        adapter_names: the adapter of each row of the batch; None, or PEFT's ``"__base__"``, means none.

    Raises:
        TypeError: ``adapter_names`` is a str or holds something else than str and None.
        ValueError: the model was not switched, or an adapter is missing, uses DoRA, which mixed batches do not support,
            or has a part that only PEFT computes, such as ``modules_to_save``. Forward passes in the block raise it if
            an adapter updates a parameter outside experts by ``target_parameters``.
    """
    if isinstance(adapter_names, str) or not all(name is None or isinstance(name, str) for name in adapter_names):
        raise TypeError(f"adapter_names must be a sequence of str or None, got {adapter_names!r}")
    names = [BASE if name is None else name for name in adapter_names]
    layers = [m for m in model.modules() if isinstance(m, _OURS)]
    if not layers:
        raise ValueError("model must be one that gossamer.replace switched, got one without LoRA layers of gossamer")
    used = set(names) - {BASE}
    there = {name for layer in layers for name in (*layer.lora_A, *layer.lora_embedding_A)}
    if missing := sorted(used - there):
        raise ValueError(f"adapter_names must be among {sorted(there)}, got {missing}")
    for path, module in model.named_modules():
        if _takes_names(module):
            if own := sorted(used & _adapters_of(module)):
                raise ValueError(
                    f"adapter {own[0]!r} has a {type(module).__name__} at {path}, which gossamer does not compute: "
                    "it would serve all rows with the active adapter's"
                )
    for layer in layers:
        for name in used:
            if layer.use_dora.get(name):
                raise ValueError(f"adapter {name!r} has use_dora=True, which a mixed batch cannot have")
    with scope():
        for layer in layers:
            layer.gossamer_names.assign(names, user_block=True)
        yield
