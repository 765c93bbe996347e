"""Registration of primitives with torch's dispatcher."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable

import torch
import torch.compiler.config
from torch import Tensor, is_grad_enabled
from torch._C import (
    _any_requires_grad,
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import _profiler_enabled

_LIBRARY = torch.library.Library("gossamer", "FRAGMENT")
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
# Each operator's autograd function; its last argument is the set of dispatch keys.
_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}
_SCHEMAS: list[str] = []
_TAG = "gossamer-"


def is_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether the dispatcher would only differentiate and call the kernel for these tensors.

    It does more under a mode, a torch.func transformation, a trace or a profiler, and for tensors of other classes or
    devices. Must not be called in compiled code.
    """
    if _profiler_enabled() or _len_torch_function_stack() or _len_torch_dispatch_stack():
        return False
    if _are_functorch_transforms_active() or _get_tracing_state() is not None:
        return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN or not (tensor.is_cpu or tensor.is_cuda) or tensor.layout is not torch.strided:
            return False
        # Zero tensors have no memory, and negative views store their sign outside the memory.
        if tensor.is_neg() or tensor._is_zerotensor():
            return False
    return True


def check_strided(names: Iterable[str], values: Iterable[object]) -> None:
    """Check that no tensor is sparse: kernels follow strides."""
    for name, value in zip(names, values, strict=False):
        if isinstance(value, Tensor) and value.layout is not torch.strided:
            raise TypeError(f"{name} must have the layout torch.strided, got {value.layout}")


def _is_simple(schema: torch.FunctionSchema) -> bool:
    """Whether an operator has no lists of tensors and no keyword-only arguments, and mutates no argument."""
    lists = any("List" in str(a.type) and "Tensor" in str(a.type) for a in (*schema.arguments, *schema.returns))
    return not (lists or schema.is_mutable or any(a.kwarg_only for a in schema.arguments))


def _function(name: str, forward: Callable, backward: Callable) -> type[torch.autograd.Function]:
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"Differentiable_{name}", (torch.autograd.Function,), methods)


def _first_tensor(args: tuple) -> Tensor | None:
    for value in args:
        if isinstance(value, (list, tuple)):
            value = _first_tensor(value)
        if isinstance(value, Tensor):
            return value
    return None


def on_its_device(kernel: Callable) -> Callable:
    """Run the kernel with its tensors' device as the current device, so that launches go to its stream."""

    @functools.wraps(kernel)
    def launch(*args, **named):
        first = _first_tensor(args)
        if first is None or not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return kernel(*args, **named)
        with torch.cuda.device(first.get_device()):
            return kernel(*args, **named)

    return launch


def key_compiled_code(version: str) -> None:
    """Add the operators' schemas and the package's version to the cache keys of ``torch.compile``.

    Its disk caches store operator calls by name and arguments. After an upgrade, the same call may return something
    else.
    """
    digest = hashlib.sha256("\n".join([version, *sorted(_SCHEMAS)]).encode()).hexdigest()[:16]
    config = torch.compiler.config
    others = [part for part in config.cache_key_tag.split(";") if part and not part.startswith(_TAG)]
    config.cache_key_tag = ";".join([*others, f"{_TAG}{digest}"])


def register(schema: str, kernel: Callable, fake: Callable) -> Callable:
    """Define the operator ``gossamer::NAME(...)`` with one kernel for CPU and CUDA and its fake kernel.

    The kernel is registered below autograd with the dispatcher itself rather than through ``torch.library.custom_op``,
    whose per-call aliasing checks cost tens of microseconds.

    Args:
        schema: name and signature, such as ``"dispatch(Tensor expert_ids) -> Tensor"``.
        kernel: the implementation, tensors in and tensors out; it runs with its first tensor's device as the current
            device.
        fake: the shape-only implementation for meta and fake tensors.

    Returns:
        The operator.
    """
    name = schema.split("(", 1)[0]
    _SCHEMAS.append(schema)
    kernel = on_its_device(kernel)
    torch.library.define(f"gossamer::{name}", schema[len(name) :], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"gossamer::{name}", ("CPU", "CUDA"), kernel)
    torch.library.register_fake(f"gossamer::{name}", fake)
    operator = getattr(torch.ops.gossamer, name).default
    # The dispatcher counts the changes to what an operator mutates.
    if not _is_simple(operator._schema):
        return operator

    def below_autograd(keyset, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    # The set of dispatch keys goes last, so that inputs keep their places in needs_input_grad.
    def forward(ctx, *args):
        *inputs, keyset = args
        # Otherwise autograd would refuse in-place changes of results that are views of the kernel's own buffers.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return below_autograd(keyset, *inputs)

    def refuse(ctx, *gradients):
        raise NotImplementedError(f"gossamer::{name} has no derivative")

    def autograd(keyset, *args):
        if is_grad_enabled() and _any_requires_grad(*args):
            return _FUNCTIONS[name].apply(*args, keyset)
        return below_autograd(keyset, *args)

    _FUNCTIONS[name] = _function(name, forward, refuse)
    _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    return operator


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Give ``gossamer::NAME`` a backward pass.

    It does the same as ``torch.library.register_autograd`` for an operator that has no lists of tensors, has no
    keyword-only arguments and mutates none. ``register_autograd`` looks up the default values of all arguments at each
    call, which takes 30 microseconds.

    Args:
        name: name of the operator, which must be registered already.
        backward: ``(ctx, *gradients of outputs) -> gradients of inputs``.
        setup_context: ``(ctx, inputs, output)``, called after the forward pass.
    """
    if name not in _FUNCTIONS:
        raise TypeError(f"{name} must have no lists of tensors or keyword-only arguments, and change none")
    compute = _FUNCTIONS[name].forward

    def forward(ctx, *args):
        output = compute(ctx, *args)
        with torch._C._AutoDispatchBelowAutograd():
            setup_context(ctx, args[:-1], output)
        return output

    def differentiate(ctx, *gradients):
        whole = ctx.needs_input_grad
        ctx.needs_input_grad = whole[:-1]
        try:
            found = backward(ctx, *gradients)
        finally:
            ctx.needs_input_grad = whole  # the pass may run again
        return *(found if isinstance(found, tuple) else (found,)), None

    _FUNCTIONS[name] = _function(name, forward, differentiate)
