"""Expert layers on the CPU without gradients: choice of experts, dispatch and experts of a call in one native call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from gossamer.nn.moe.experts.grouped import Experts
from gossamer.nn.moe.experts.quantized_stack import QuantizedExpertStack, expert_weight
from gossamer.nn.moe.routers.linear import LinearRouter, SigmoidRouter, SoftmaxRouter, TopKSoftmaxRouter
from gossamer.nn.moe.routing import Routing
from gossamer.ops.routed_experts import ExpertChoice, Prepared, may_run, prepare, run, run_chosen

# Routers whose choice the native kernel makes: exactly these classes, because subclasses may choose differently.
_CHOICES: dict[type, Callable[[LinearRouter], ExpertChoice]] = {
    SoftmaxRouter: lambda router: ExpertChoice(router.top_k, False, *_selection(router), None),
    TopKSoftmaxRouter: lambda router: ExpertChoice(router.top_k, False, True, 1, 1, 1.0, None),
    SigmoidRouter: lambda router: ExpertChoice(
        router.top_k, True, *_selection(router), router._buffers["e_score_correction_bias"]
    ),
}


def _selection(router: SoftmaxRouter | SigmoidRouter) -> tuple:
    chosen = router.selection
    return chosen["renormalize"], chosen["n_group"], chosen["topk_group"], chosen["scale"]


class _Kept(NamedTuple):
    """What was prepared for an expert layer, with the settings and tensors that it depends on."""

    settings: tuple
    tensors: tuple[tuple, ...]
    prepared: Prepared | None


# Kept outside the modules, because it can be neither copied nor pickled.
_KEPT: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def held_tensors(experts: nn.Module, names: Sequence[str]) -> list[torch.Tensor | None]:
    """The tensors that hold the weights called ``names`` of an expert layer, and their biases."""
    found = []
    for name in names:
        held = experts._parameters.get(name)
        if held is None and type(stack := experts._modules.get(name)) is QuantizedExpertStack:
            buffers = stack._buffers
            found += (buffers["panels"] if buffers["data"] is None else buffers["data"], buffers["scale"])
        else:
            found.append(held)
        found.append(experts._parameters.get(f"{name}_bias"))
    return found


def holds(experts: nn.Module, names: Sequence[str], biases: bool) -> bool:
    """Whether a layer holds the weights ``names``, and biases if asked, where :func:`held_tensors` finds them."""
    parameters, modules = experts._parameters, experts._modules
    weights = all(parameters.get(name) is not None or type(modules.get(name)) is QuantizedExpertStack for name in names)
    return weights and not (biases and any(parameters.get(f"{name}_bias") is None for name in names))


def held_formats(experts: nn.Module, names: Sequence[str]) -> list[tuple[str, str]]:
    """How the weights called ``names`` are quantised, where they are."""
    stacks = [experts._modules.get(name) for name in names]
    return [(stack.format, stack.activations) for stack in stacks if type(stack) is QuantizedExpertStack]


def kept_for(
    experts: nn.Module,
    settings: tuple,
    tensors: Callable[[], list[torch.Tensor | None]],
    make: Callable[[], Prepared | None],
) -> tuple[Prepared | None, list[torch.Tensor | None]]:
    """What ``make()`` prepared for an expert layer, made again whenever it is no longer valid.

    Args:
        experts: the layer.
        settings: everything that determines the result except tensors.
        tensors: returns the tensors whose addresses the result holds.
        make: prepares.

    Returns:
        The result, and its tensors, which must be held during its calls.
    """
    found, kept = tensors(), _KEPT.get(experts)
    if kept is None or kept.settings != settings or not _same(kept.tensors, found):
        # Preparing moves codes into panels, which it can only do while nothing else, such as ``found``, refers to them.
        del found
        prepared = make()
        found = tensors()
        kept = _KEPT[experts] = _Kept(settings, _marks(found), prepared)
    return kept.prepared, found


def _layout(tensor: torch.Tensor) -> list:
    return [tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()]


def _marks(tensors: list[torch.Tensor | None]) -> tuple[tuple, ...]:
    """Weak references to tensors, which keep no replaced weight alive, and the addresses and layouts of their
    values.
    """
    return tuple((_nothing,) if tensor is None else (weakref.ref(tensor), *_layout(tensor)) for tensor in tensors)


def _nothing() -> None:
    """Stands in for the reference to a tensor that a layer does not have."""


def _same(marks: tuple[tuple, ...], tensors: list[torch.Tensor | None]) -> bool:
    """Whether these are the tensors that :func:`_marks` saw, with the same memory in the same layout."""
    if len(marks) != len(tensors):
        return False
    for (reference, *layout), tensor in zip(marks, tensors, strict=True):
        if reference() is not tensor or (tensor is not None and layout != _layout(tensor)):
            return False
    return True


def _replaced(module: nn.Module, *methods: str) -> bool:
    """Whether calling a module would do more than its class's ``forward``, or an instance has its own methods."""
    if module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl is not None:
        return True
    own = module.__dict__
    return "forward" in own or any(name in own for name in methods)


def _prepared(experts: Experts, choice: ExpertChoice | None) -> tuple[Prepared | None, list[torch.Tensor | None]]:
    """:func:`kept_for` of a plain expert layer."""
    names, bias = experts.weight_stacks, None if choice is None else choice.bias
    settings = (
        None if choice is None else choice[:-1],
        experts.form,
        experts.capacity_factor,
        experts.exchange,
        experts.activation,
        experts.interleaved,
        experts.transposed,
        held_formats(experts, names),
    )

    def make() -> Prepared | None:
        if experts.form != "grouped" or experts.capacity_factor is not None or experts.exchange is not None:
            return None
        if not holds(experts, names, False):
            return None
        weights = tuple(expert_weight(getattr(experts, name), experts.transposed) for name in names)
        biases = tuple(experts._parameters[f"{name}_bias"] for name in names)
        return prepare(weights, biases, experts.activation, experts.interleaved, choice)

    return kept_for(experts, settings, lambda: [*held_tensors(experts, names), bias], make)


def _is_plain(experts: nn.Module) -> bool:
    """Whether calling an expert layer only computes :class:`Experts`."""
    if type(experts) is not Experts or _global_forward_hooks or _global_forward_pre_hooks:
        return False
    return not _replaced(experts, "compute")


def infer(router: nn.Module | None, experts: nn.Module, x: torch.Tensor, most: int | None) -> torch.Tensor | None:
    """``experts(x, router(x))`` of ``x (T, H)`` with the same bits; None if the modules themselves must be called.

    That is so in training, on other devices, under compilers, autocast and other modes, for routers and expert layers
    that are not of a plain class, for more than ``most`` experts per token, if a module has hooks or methods of its
    own, and for every call that raises an error.
    """
    if type(router) not in _CHOICES or not _is_plain(experts) or not may_run(x) or _replaced(router, "route"):
        return None
    prepared, _held = _prepared(experts, _CHOICES[type(router)](router))
    if prepared is None or (most is not None and router.top_k > most):
        return None
    return run(prepared, router.logits(x), x)


def infer_routed(experts: nn.Module, routing: Routing, x: torch.Tensor) -> torch.Tensor | None:
    """``experts(x, routing)`` of ``x (T, H)`` and a routing that is not dispatched, like :func:`infer`."""
    if not _is_plain(experts) or not may_run(x) or routing.dispatch is not None or routing.max_rows is not None:
        return None
    prepared, _held = _prepared(experts, None)
    if prepared is None or routing.num_experts != prepared.num_experts:
        return None
    return run_chosen(prepared, routing.expert_ids, routing.weights, x)
