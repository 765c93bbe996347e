"""gossamer.nn.QuantizedExpertStack: products read panels, and everything else reads codes row after row."""

import copy
import pickle
import threading

import pytest
import torch

import gossamer
from gossamer.nn import QuantizedExpertStack, QuantizedLinear
from gossamer.ops.quantized_expert_weight import FORMATS

N, C = 64, 96


@pytest.fixture
def linear():
    """A layer whose codes lie in panels after a product, and a copy of its state."""
    if gossamer._backend.native_unavailable() or gossamer._C.isa() == "amx":
        pytest.skip("no products that read panels")
    torch.manual_seed(3)
    module = QuantizedLinear.from_linear(torch.nn.Linear(C, N), "int4")
    state = {name: value.clone() for name, value in module.state_dict().items()}
    product(module)
    assert arranged(module)
    return module, state


def product(module):
    with torch.no_grad():
        return module(torch.linspace(-1, 1, 2 * C).view(2, C))


def arranged(module):
    return dict(module.weight.named_buffers()).keys() == {"scale", "panels"}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_product_arranges_codes(weight_format):
    """Its bits and values are those of codes in rows, which something else refers to at first."""
    moe = gossamer.nn.MoE(64, 32, num_experts=4, top_k=2)
    gossamer.quantize_experts(moe, weight_format)
    x = torch.randn(5, 64)
    stack = moe.experts.gate_up_proj
    codes, values = stack.data.clone(), stack.weight().dequantize()
    with torch.no_grad():
        others = [module.data for module in moe.modules() if isinstance(module, QuantizedExpertStack)]
        want = moe(x)
        assert stack._buffers["panels"] is None
        del others
        assert torch.equal(moe(x), want) and torch.equal(moe(x), want)
        moved = stack.for_products()
        assert moved.layout == "panels" and torch.equal(moved.dequantize(), values)
        assert stack.for_products().data is moved.data
    # With gradients, products of the same codes as they lie.
    leaf = x.clone().requires_grad_()
    moe(leaf).square().sum().backward()
    assert stack._buffers["data"] is None and leaf.grad.isfinite().all()
    assert torch.equal(stack.weight().data.view(torch.uint8), codes.view(torch.uint8))
    assert stack._buffers["panels"] is None


READERS = {
    "state_dict": lambda module: module.state_dict(),
    "pickle": lambda module: pickle.loads(pickle.dumps(module)).state_dict(),
    "deepcopy": lambda module: copy.deepcopy(module).state_dict(),
    "data": lambda module: {**module.state_dict(), "weight.data": module.weight.data},
    "weight": lambda module: {**module.state_dict(), "weight.data": module.weight.weight().data},
    "to": lambda module: module.to("cpu").state_dict(),
    "half": lambda module: {**module.half().state_dict(), "bias": module.float().bias.detach()},
    "load": lambda module: (module.load_state_dict(module.state_dict()), module.state_dict())[1],
}


@pytest.mark.parametrize("reader", READERS)
def test_readers_get_rows(linear, reader):
    """Of the state, copies, pickles and so on; products arrange codes again."""
    module, state = linear
    want = product(module)
    found = READERS[reader](module)
    if reader == "half":
        found["bias"], state["bias"] = found["bias"].half(), state["bias"].half()
    assert same(found, state)
    del found
    if reader != "half":
        assert torch.equal(product(module), want) and arranged(module)


def test_files(linear, tmp_path):
    """What is saved is what was quantised, and it loads over codes in panels."""
    module, state = linear
    torch.save(module.state_dict(), tmp_path / "state.pt")
    other = QuantizedLinear.from_linear(torch.nn.Linear(C, N), "int4")
    product(other)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(product(other), product(module)) and same(other.state_dict(), state)


def test_setting_codes(linear):
    """New codes are those of the next product, and lent ones those of one call."""
    module, _ = linear
    codes = torch.randint(256, (1, N, C // 2), dtype=torch.uint8)

    def with_codes(data):
        return product(QuantizedLinear(gossamer.QuantizedExpertWeight(data, module.weight.scale, "int4"), module.bias))

    module.weight.data = codes.clone()
    want, lent, x = with_codes(codes), {"weight.data": codes.flip(1)}, torch.linspace(-1, 1, 2 * C).view(2, C)
    for in_panels in (False, True):
        assert arranged(module) == in_panels
        with torch.no_grad():
            assert torch.equal(torch.func.functional_call(module, lent, (x,)), with_codes(lent["weight.data"]))
        assert torch.equal(product(module), want)
    assert torch.equal(state_codes(module), codes)


def state_codes(module):
    return module.state_dict()["weight.data"].clone()


def test_layers_over_other_codes():
    """The tensors that a layer divides are rows; a layer computes with the codes that it is lent."""
    moe = gossamer.nn.MoE(64, 32, num_experts=4, top_k=2)
    gossamer.quantize_experts(moe, "int4")
    other, x, name = copy.deepcopy(moe), torch.randn(3, 64), "gate_up_proj.data"
    other.experts.gate_up_proj.data = other.experts.gate_up_proj.data.flip(1)
    with torch.no_grad():
        lent = {f"experts.{name}": other.experts.state_dict()[name].clone()}
        want = moe(x), other(x)
        assert torch.equal(moe(x), want[0])
        for _ in range(2):
            assert torch.equal(torch.func.functional_call(moe, lent, (x,)), want[1])
            assert torch.equal(moe(x), want[0])
        stacks = moe.experts.stacks()
        assert name in stacks and torch.equal(stacks[name], moe.experts.gate_up_proj.data)
        over = moe.experts.over({name: lent[f"experts.{name}"]}, 4)
        assert torch.equal(over(x, moe.router(x)), want[1])


def test_codes_that_stay(linear):
    """Codes that others read, that gradients pass, or that fit no panels."""
    module, _ = linear

    def held(data):
        return QuantizedExpertStack(gossamer.QuantizedExpertWeight(data, module.weight.scale, "int4"))

    codes = state_codes(module)
    for stack in (held(codes.repeat(2, 1, 1)[:1]), held(codes.clone().share_memory_()), held(codes)):
        with torch.no_grad():
            assert stack.for_products().layout == "rows"
    state = module.state_dict()
    product(module)
    assert module.weight._buffers["panels"] is None
    del state
    module(torch.randn(2, C))
    assert module.weight._buffers["panels"] is None
    with gossamer.backend("reference"):
        product(module)
    assert module.weight._buffers["panels"] is None
    odd = QuantizedLinear.from_linear(torch.nn.Linear(C, 48), "int4")
    product(odd)
    assert odd.weight._buffers["panels"] is None


def test_in_inference_mode(linear):
    """Codes that inference mode arranged train afterwards."""
    module, _ = linear
    module.weight.weight()
    with torch.inference_mode():
        module(torch.randn(2, C))
    assert arranged(module)
    x = torch.randn(2, C, requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.to_linear().weight.sum(0).expand(2, C))


def test_threads(linear):
    """Products of several threads while codes move to and fro."""
    module, state = linear
    want, wrong, done = product(module), [], threading.Event()

    def serve():
        while not done.is_set():
            if not torch.equal(product(module), want):
                wrong.append(1)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        if not same(module.state_dict(), state):
            wrong.append(2)
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiled(linear):
    """Compiled code reads the codes as they lie."""
    module, _ = linear
    want, x = product(module), torch.linspace(-1, 1, 2 * C).view(2, C)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), want) and arranged(module)
        module.weight.weight()
        assert torch.equal(compiled(x), want)
        assert torch.equal(module(x), want) and arranged(module)
        assert torch.equal(compiled(x), want)
