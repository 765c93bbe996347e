"""Operators over records."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch

from gossamer.ops._records import Layout, define


@dataclass(frozen=True)
class Curve:
    power: float
    name: str = "power"


class Operands(NamedTuple):
    x: torch.Tensor
    bias: torch.Tensor | None


class Arguments(NamedTuple):
    weight: torch.Tensor
    operands: Operands
    curve: Curve
    sizes: list[int]
    dtype: torch.dtype | None = None


def test_layout_names_every_argument_once():
    """A record in a record gives its fields, with types as a schema writes them."""
    layout = Layout(Arguments)
    assert layout.paths == ["weight", "operands.x", "operands.bias", "curve.power", "curve.name", "sizes", "dtype"]
    assert layout.schema_types == ["Tensor", "Tensor", "Tensor?", "float", "str", "int[]", "ScalarType?"]
    assert layout.schema(["operands.bias"]).split(", ")[:3] == [
        "Tensor weight",
        "Tensor operands_x",
        "Tensor(a!)? operands_bias",
    ]
    args = Arguments(torch.ones(1), Operands(torch.zeros(2), None), Curve(2.0), [3, 4])
    assert layout.restore(layout.flatten(args)) == args


def test_backward_passes_keep_what_they_need():
    """The tensors of a forward pass's record may be None in its backward pass's, of a record in it too."""

    class Forward(NamedTuple):
        weight: torch.Tensor
        operands: Operands
        names: list[str]

    class Backward(NamedTuple):
        dy: torch.Tensor
        forward: Forward

    assert Layout(Forward).schema_types == ["Tensor", "Tensor", "Tensor?", "str[]"]
    assert Layout(Backward).schema_types == ["Tensor", "Tensor?", "Tensor?", "Tensor?", "str[]"]


def test_layout_refuses_what_no_schema_has():
    """A type that torch's dispatcher does not pass is an error when the operator is defined."""

    class Odd(NamedTuple):
        x: torch.Tensor
        table: dict

    with pytest.raises(TypeError, match=r"Odd\.table has a type that no operator takes"):
        Layout(Odd)
    with pytest.raises(TypeError, match=r"mutates names no fields: \['y'\]"):
        Layout(Operands).schema(["y"])


def _kernel(args: Arguments, backend: str) -> torch.Tensor:
    y = args.weight * args.operands.x.pow(args.curve.power)
    return y if args.operands.bias is None else y + args.operands.bias


def _fake(args: Arguments) -> torch.Tensor:
    return torch.empty_like(args.operands.x)


def _save(ctx, args: Arguments, output: torch.Tensor):
    return args, output


def _backward(ctx, args: Arguments, tensors, dy: torch.Tensor):
    (y,) = tensors
    assert ctx.backend == "reference" and y.shape == dy.shape and args.sizes == [7]
    x, bias = args.operands
    power = args.curve.power
    found = {"weight": dy * x.pow(power), "operands.x": dy * args.weight * power * x.pow(power - 1)}
    if bias is not None:
        found["operands.bias"] = dy
    return {name: found[name] for name in ctx.needs}


@pytest.fixture(scope="module")
def operator():
    """``weight · x^power + bias``."""
    operator = define("records_test", Arguments, kernel=_kernel, fake=_fake, returns="Tensor")
    operator.differentiate(_save, _backward)
    return operator


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("wanted", [("weight",), ("x",), ("weight", "x", "bias")])
def test_gradients_go_by_name(operator, with_bias, wanted):
    """The same gradients with and without the dispatcher, compiled or not, as finite differences say."""

    def tensor(name):
        return torch.rand(5, dtype=torch.float64).add(0.5).requires_grad_(name in wanted)

    weight, x, bias = tensor("weight"), tensor("x"), tensor("bias") if with_bias else None
    inputs = [t for t in (weight, x, bias) if t is not None and t.requires_grad]

    def call():
        return operator(Arguments(weight, Operands(x, bias), Curve(3.0), [7]), "reference")

    def gradients(call):
        return torch.autograd.grad(call().square().sum(), inputs)

    torch.autograd.gradcheck(lambda *_: call(), inputs)
    direct = gradients(call)
    with torch.profiler.profile():  # under which every call goes through the dispatcher
        dispatched = gradients(call)
    compiled = gradients(torch.compile(call, fullgraph=True, backend="aot_eager"))
    for other in (dispatched, compiled):
        assert all(torch.equal(a, b) for a, b in zip(direct, other, strict=True))


def test_operators_pass_opcheck(operator):
    """Schema, fake kernel and autograd registration agree."""
    x = torch.rand(5, requires_grad=True)
    flat = (torch.rand(5), x, None, 2.0, "power", [7], None, "reference")
    torch.library.opcheck(torch.ops.gossamer.records_test.default, flat)
