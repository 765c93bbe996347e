"""Argument checks shared by the primitives. Each raises before any kernel starts and names argument, rule and value."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import TransformType, get_interpreter_stack

from gossamer._autocast import is_autocast
from gossamer._backend import takes

INDEX_DTYPES = (torch.int32, torch.int64)
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COMPUTED_DTYPES = (*FLOAT_DTYPES, torch.float64)
MAX_SIZE = 2**63 - 1


def check_tensor(name: str, value: object) -> None:
    """``value`` must be a torch.Tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def typed(value: object) -> str:
    """The name of a value's type; for numbers that are not Python's own, with the module and the value."""
    kind = type(value)
    if isinstance(value, numbers.Number) and kind.__module__ != "builtins":
        return f"{kind.__module__}.{kind.__qualname__} {value}"
    return kind.__name__


def shown(value: object) -> str:
    """A number in words of at most some hundred letters."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an int of {value.bit_length()} bits"
    return str(value)


def check_positive(**sizes: int) -> None:
    """Every size given must be an int of at least 1."""
    _check_sizes(1, sizes)


def check_widths(**sizes: int) -> None:
    """The sizes of a layer, ints of at least 1: parameters have sizes that are products of two, and fit an int64."""
    _check_sizes(1, sizes)
    if torch.compiler.is_compiling() or any(type(size) is not int for size in sizes.values()):
        return
    largest = sorted(sizes, key=sizes.__getitem__)[-2:]
    if math.prod(sizes[name] for name in largest) > 2**60:
        values = " · ".join(str(sizes[name]) for name in largest)
        raise ValueError(f"{' · '.join(largest)} must be at most 2**60, got {values}")


def check_sizes(**sizes: int) -> None:
    """Every size given must be an int of at least 0."""
    _check_sizes(0, sizes)


def check_lengths(**sizes: int) -> None:
    """Every size given must be an int of at least 0 that an int64 has room to add to."""
    _check_sizes(0, sizes, most=2**60)


def _check_sizes(least: int, sizes: dict[str, int], most: int = MAX_SIZE) -> None:
    for name, size in sizes.items():
        if not isinstance(size, (int, torch.SymInt)) or isinstance(size, bool):
            raise TypeError(f"{name} must be an int, got {typed(size)}")
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {shown(size)}")
        if type(size) is int and size > most:
            raise ValueError(f"{name} must be at most {most}, got {shown(size)}")


def check_flag(name: str, value: object) -> None:
    """``value`` must be a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_flags(**flags: object) -> None:
    """Every flag given must be a bool."""
    for name, value in flags.items():
        check_flag(name, value)


def check_number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    finite: bool = False,
    optional: bool = False,
) -> None:
    """``value`` must be a float or an int of 64 bits, which torch computes with, within the bounds given.

    It must not be a bool or NaN; with ``optional`` it may be None.

    Args:
        name: name of the argument.
        value: value of the argument.
        least: the least value allowed.
        above: the value must be greater than this.
        most: the greatest value allowed.
        below: the value must be less than this.
        finite: whether infinities are refused.
        optional: whether None is allowed.
    """
    if value is None and optional:
        return
    # float first: isinstance of an abstract class takes a microsecond.
    if not isinstance(value, (float, numbers.Real)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number{' or None' if optional else ''}, got {type(value).__name__}")
    if not isinstance(value, float) and isinstance(value, numbers.Rational):
        if not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be a float or an int, got {type(value).__name__}")
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{name} must be a float or an int of 64 bits, got {shown(value)}")
    # Comparisons only: compilers may make the number symbolic, and functions of math do not take symbols.
    if (
        value != value
        or (least is not None and not value >= least)
        or (above is not None and not value > above)
        or (most is not None and not value <= most)
        or (below is not None and not value < below)
        or (finite and not -math.inf < value < math.inf)
    ):
        raise ValueError(f"{name} must be {_bounds_in_words(least, above, most, below, finite)}, got {value}")


def _bounds_in_words(
    least: float | None, above: float | None, most: float | None, below: float | None, finite: bool
) -> str:
    if least is not None and most is not None:
        return f"from {least} to {most}"
    words = [] if least is None else [f"at least {least}"]
    if above is not None:
        words.append("positive" if above == 0 and most is None and below is None else f"above {above}")
    words += [f"{word} {bound}" for word, bound in (("at most", most), ("below", below)) if bound is not None]
    words += ["finite"] if finite else []
    return " and ".join(words) or "a number"


def check_seed(seed: object, name: str = "seed") -> None:
    """``seed`` must be an int in ``[0, 2**63)``."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"{name} must be an int, got {type(seed).__name__}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"{name} must be in [0, 2**63), got {shown(seed)}")


def check_dtype(name: str, value: object) -> None:
    """``value`` must be a floating torch.dtype of 16 bits or more, or None; torch computes in no smaller one."""
    if value is None:
        return
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype, got {type(value).__name__}")
    if value in COMPUTED_DTYPES:
        return
    wanted = "float32, float16, bfloat16 or float64" if value.is_floating_point else "floating"
    raise TypeError(f"{name} must be {wanted}, got {value}")


def check_fits(name: str, value: float, dtype: torch.dtype) -> None:
    """A number, or infinity, must lie in the range of a dtype, since torch fills no tensor with a larger one."""
    if torch.finfo(dtype).max < abs(value) < math.inf:
        raise ValueError(f"{name} must fit {dtype}, got {value}")


def check_path(name: str, value: object) -> None:
    """``value`` must be a str or another path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a str or a path, got {type(value).__name__}")


def check_device(name: str, value: object) -> None:
    """``value`` must be a torch.device that tensors can be made on, the name of one, or None."""
    if value is None:
        return
    if not isinstance(value, (str, int, torch.device)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a torch.device or its name, got {type(value).__name__}")
    rule = "a torch.device or its name"
    try:
        device = torch.device(value)
        if device.type in ("cpu", "meta"):
            return
        rule = "a device that tensors can be made on"
        torch.empty(0, device=device)
    except (RuntimeError, ValueError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"{name} must be {rule}, got {value!r}: {reason}") from None


def check_strided(name: str, tensor: torch.Tensor) -> None:
    """``tensor`` must be dense."""
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must have the layout torch.strided, got {tensor.layout}")


def check_floating(name: str, tensor: object) -> None:
    """``tensor`` must be a dense tensor of a floating dtype of 16 bits or more."""
    check_tensor(name, tensor)
    check_strided(name, tensor)
    check_computed(name, tensor)


def check_computed(name: str, tensor: torch.Tensor) -> None:
    """The dtype of ``tensor`` must be a floating one of 16 bits or more; torch computes in no smaller one."""
    if tensor.dtype in COMPUTED_DTYPES:
        return
    wanted = "float32, float16, bfloat16 or float64" if tensor.is_floating_point() else "floating point"
    raise TypeError(f"{name} must be {wanted}, got {tensor.dtype}")


def check_has_numbers(name: str, tensor: torch.Tensor) -> None:
    """``tensor``, whose values are read, must not be on the meta device."""
    if tensor.is_meta:
        raise ValueError(f"{name} must hold values, got a tensor on meta")


def check_sequence(name: str, value: object) -> None:
    """``value`` must be a list, a tuple or another sequence, but not a string."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(f"{name} must be a sequence, got {type(value).__name__}")


def check_written(name: str, tensor: torch.Tensor) -> None:
    """``tensor`` must be writable: dense, and without strides of 0, by which several elements share one address."""
    check_strided(name, tensor)
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(f"{name} must not have elements that share memory, got strides {tensor.stride()}")


def check_padding_idx(padding_idx: int | None, num_rows: int) -> None:
    """``padding_idx`` must be None or an int in ``[-N, N)``."""
    if padding_idx is None:
        return
    if not isinstance(padding_idx, (int, torch.SymInt)) or isinstance(padding_idx, bool):
        raise TypeError(f"padding_idx must be an int or None, got {type(padding_idx).__name__}")
    if not -num_rows <= padding_idx < num_rows:
        raise ValueError(f"padding_idx must be in [-N, N) with N={num_rows}, got {padding_idx}")


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int | None, ...], symbols: str) -> None:
    """``tensor.shape`` must equal ``expected``, where None is any size; ``symbols`` is the documented shape."""
    if not isinstance(tensor, torch.Tensor):
        check_tensor(name, tensor)
    check_shape_of(name, tensor.shape, expected, symbols)


def check_shape_of(name: str, shape: tuple[int, ...], expected: tuple[int | None, ...], symbols: str) -> None:
    """:func:`check_shape` for something that has a shape but is not a tensor."""
    if len(shape) == len(expected):
        for size, wanted in zip(shape, expected, strict=True):
            if wanted is not None and wanted != size:
                break
        else:
            return
    wanted = ", ".join("any" if e is None else str(e) for e in expected)
    raise ValueError(f"{name} must have shape {symbols} = ({wanted}), got {tuple(shape)}")


def last_size(name: str, tensor: torch.Tensor, symbols: str) -> int:
    """The size of the last dimension of ``tensor``, which must have one; ``symbols`` is the documented shape."""
    check_tensor(name, tensor)
    if tensor.dim() < 1:
        raise ValueError(f"{name} must have shape {symbols}, got {tuple(tensor.shape)}")
    check_strided(name, tensor)
    return tensor.shape[-1]


def check_input(x: torch.Tensor, columns: int, weight: torch.Tensor, symbols: str = "(..., C)") -> None:
    """``x (..., C)`` must fit a layer with C = ``columns`` and this weight; under autocast any floating dtype does."""
    last_size("x", x, symbols)
    check_shape("x", x, (*x.shape[:-1], columns), symbols)
    check_computed("x", x)
    if x.device != weight.device:
        raise ValueError(f"x must be on the device of the parameters, {weight.device}, got {x.device}")
    if x.dtype != weight.dtype and not is_autocast(x):
        raise TypeError(f"x must have the dtype of the parameters, {weight.dtype}, got {x.dtype}")


def _first_to_differ(attribute: str, tensors: dict[str, torch.Tensor | None]) -> tuple | None:
    """The name and attribute of the first tensor given, and those of the first one whose attribute differs."""
    first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        value = getattr(tensor, attribute)
        if first is None:
            first_name, first = name, value
        elif value != first:
            return first_name, first, name, value
    return None


def check_scale(name: str, scale: float | torch.Tensor) -> float:
    """``scale`` as a number; a tensor must be on the CPU, and must not require a gradient, since it would get none."""
    if isinstance(scale, torch.Tensor):
        if scale.requires_grad:
            raise ValueError(f"{name} must be a number, which has no gradient, got a tensor that requires one")
        if scale.numel() != 1:
            raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(scale.shape)}")
        if scale.device.type != "cpu":
            raise ValueError(
                f"{name} must be a number or a tensor on the CPU, got one on {scale.device}, which would have to be "
                "waited for"
            )
        return scale.item()
    if not isinstance(scale, (float, numbers.Real, torch.SymFloat, torch.SymInt)) or isinstance(scale, bool):
        raise TypeError(f"{name} must be a number, got {scale!r}")
    whole = isinstance(scale, numbers.Integral)
    if isinstance(scale, numbers.Rational) and not (whole and -(2**63) <= scale < 2**63):
        # torch multiplies tensors by no fraction, and by no int of more than 64 bits.
        return as_float(name, scale)
    return scale


def as_float(name: str, value: numbers.Real) -> float:
    """A number as a float, which must not be too large for one."""
    try:
        return float(value)
    except OverflowError:
        kind = f"an int of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
        raise ValueError(f"{name} must fit a float, got {kind}") from None


def check_no_gradient(function: str, other: str, **tensors: torch.Tensor | None) -> None:
    """No tensor may require a gradient in a ``function`` that updates its state in place; ``other`` can provide one."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, but {function} has no derivative: use torch.no_grad(), or {other} with "
                "T = 1"
            )


def check_same_device(**tensors: torch.Tensor | None) -> None:
    """All tensors given must be on the first one's device."""
    if odd := _first_to_differ("device", tensors):
        first_name, device, name, found = odd
        raise ValueError(f"{name} must be on the device of {first_name}, {device}, got {found}")


def check_same_dtype(**tensors: torch.Tensor | None) -> None:
    """All tensors given must have the first one's dtype."""
    if odd := _first_to_differ("dtype", tensors):
        first_name, dtype, name, found = odd
        raise TypeError(f"{name} must have the dtype of {first_name}, {dtype}, got {found}")


def check_float(name: str, tensor: torch.Tensor, backend: str) -> None:
    """``tensor`` must be float32, float16 or bfloat16; float64 too, where ``backend`` computes in it."""
    if isinstance(tensor, torch.Tensor) and tensor.dtype in FLOAT_DTYPES:
        return
    check_tensor(name, tensor)
    check_float_dtype(name, tensor.dtype, tensor.device, backend)


def check_float_dtype(name: str, dtype: torch.dtype, device: torch.device, backend: str) -> None:
    """``dtype`` must be one that :func:`check_float` takes of a tensor on ``device``."""
    if dtype in FLOAT_DTYPES or (dtype == torch.float64 and takes(backend, torch.float64)):
        return
    extra = " or float64" if takes(backend, torch.float64) else ", or float64 on the CPU"
    raise TypeError(f"{name} must be float32, float16, bfloat16{extra}, got {dtype} on {device}")


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Every value of ``tensor`` must be finite."""
    # A NaN makes both extremes NaN. Unlike isfinite, aminmax allocates no mask as large as the tensor.
    if tensor.is_meta or not tensor.numel() or torch.compiler.is_compiling():
        return
    if all(bool(bound.isfinite()) for bound in torch.aminmax(tensor)):
        return
    wrong = tensor.numel() - int(tensor.isfinite().sum())
    raise ValueError(f"{name} must hold finite values, got {wrong:,} of {tensor.numel():,} that are NaN or infinite")


def check_index(name: str, tensor: torch.Tensor) -> None:
    """``tensor`` must be a dense tensor of int32 or int64."""
    check_tensor(name, tensor)
    if tensor.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
    if tensor.layout is not torch.strided:
        check_strided(name, tensor)


def check_id_range(name: str, ids: torch.Tensor, limit: int, symbol: str) -> None:
    """On the CPU, outside compilers, every id must be in ``[0, limit)``; ``symbol`` names the limit."""
    if not ids.is_cpu or not ids.numel() or torch.compiler.is_compiling():
        return
    least, most = (int(value) for value in ids.aminmax())
    if least < 0 or most >= limit:
        raise IndexError(f"{name} must be in [0, {symbol}) with {symbol}={limit}, got {least} to {most}")


def raise_negative(name: str, expert_ids: torch.Tensor, place: int) -> NoReturn:
    """Raise the error of a negative id at a flat place of ``expert_ids (T, K)``."""
    token, slot = divmod(place, expert_ids.shape[1])
    raise ValueError(
        f"{name} must not be negative, got {int(expert_ids[token, slot])} at token {token}, slot {slot}; "
        "ids >= num_experts mean no expert"
    )


def check_no_negative(name: str, expert_ids: torch.Tensor) -> None:
    """On the CPU no id of ``expert_ids (T, K)`` may be negative; reads the values."""
    if expert_ids.is_cpu and expert_ids.numel() and int(expert_ids.min()) < 0:
        raise_negative(name, expert_ids, int((expert_ids.reshape(-1) < 0).nonzero()[0]))


def check_traceable(name: str) -> None:
    """Raise under ``torch.jit.trace`` and ``torch.func.vmap``, which cannot record the layer called ``name``.

    Raises:
        RuntimeError: one of the two is active; the message says what to use instead.
    """
    if torch.compiler.is_compiling():
        return
    if torch.jit.is_tracing():
        raise RuntimeError(f"torch.jit.trace cannot record {name}: use torch.export.export or torch.compile instead")
    if _are_functorch_transforms_active() and any(
        interpreter.key() == TransformType.Vmap for interpreter in get_interpreter_stack() or ()
    ):
        raise RuntimeError(
            f"torch.func.vmap cannot map over {name}, which sends each sample to different experts: for per-sample "
            "gradients call torch.func.grad in a loop over the samples"
        )
