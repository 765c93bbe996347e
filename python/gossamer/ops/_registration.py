"""Registration of primitives with torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("gossamer", "FRAGMENT")


def register(schema: str, kernel: Callable, fake: Callable) -> Callable:
    """Define the operator ``gossamer::NAME(...)`` with one kernel for CPU and CUDA and its fake kernel.

    The kernel is registered below autograd with the dispatcher itself rather than through ``torch.library.custom_op``,
    whose per-call aliasing checks cost tens of microseconds.

    Args:
        schema: name and signature, such as ``"dispatch(Tensor expert_ids) -> Tensor"``.
        kernel: the implementation, tensors in and tensors out.
        fake: the shape-only implementation for meta and fake tensors.

    Returns:
        The operator's overload, ready to call.
    """
    name = schema.split("(", 1)[0]
    torch.library.define(f"gossamer::{name}", schema[len(name) :], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"gossamer::{name}", ("CPU", "CUDA"), kernel)
    torch.library.register_fake(f"gossamer::{name}", fake)
    return getattr(torch.ops.gossamer, name).default


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Give ``gossamer::NAME`` a backward pass.

    It does what ``torch.library.register_autograd`` does for an operator without lists of tensors and keyword-only
    arguments that changes none. That one looks the default values of all arguments up in each call, which takes 30
    microseconds.

    Args:
        name: of the operator, registered before.
        backward: ``(ctx, *gradients of outputs) -> gradients of inputs``.
        setup_context: ``(ctx, inputs, output)``, called after the forward pass.
    """
    operator = getattr(torch.ops.gossamer, name).default
    schema = operator._schema
    lists = any("List" in str(a.type) and "Tensor" in str(a.type) for a in (*schema.arguments, *schema.returns))
    if lists or schema.is_mutable or any(a.kwarg_only for a in schema.arguments):
        raise TypeError(f"{name} must have no lists of tensors or keyword-only arguments, and change none")
    defaults = tuple(a.default_value for a in schema.arguments)

    def below_autograd(keyset, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    # The set of dispatch keys goes last, so that inputs keep their places in needs_input_grad.
    def forward(ctx, *args):
        *inputs, keyset = args
        output = below_autograd(keyset, *inputs)
        with torch._C._AutoDispatchBelowAutograd():
            # The dispatcher leaves out last arguments that are equal to their defaults.
            setup_context(ctx, (*inputs, *defaults[len(inputs) :]), output)
        return output

    def differentiate(ctx, *gradients):
        whole = ctx.needs_input_grad
        ctx.needs_input_grad = whole[:-1]
        try:
            found = backward(ctx, *gradients)
        finally:
            ctx.needs_input_grad = whole  # the pass may run again
        return *(found if isinstance(found, tuple) else (found,)), None

    function = type(
        f"Differentiable_{name}",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(differentiate)},
    )

    def autograd(keyset, *args):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args, keyset)
        return below_autograd(keyset, *args)

    _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
