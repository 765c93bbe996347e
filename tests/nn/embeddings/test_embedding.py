"""gossamer.nn.Embedding and EmbeddingBag against torch.nn's, and what an optimizer in the backward pass changes."""

import copy
import itertools
import re
from pathlib import Path

import pytest
import torch
from helpers import check_draws
from torch.nn.utils import parametrize, prune

import gossamer
from gossamer import optim
from gossamer.nn import Embedding, EmbeddingBag
from gossamer.optim import SGD, Adam, PartialRowwiseAdam, RowwiseAdagrad

N, D = 13, 9


def outcome(layer, args, dout, weights=None):
    """Result, the table after the call, and the gradients of table and per-sample weights, densely."""
    if weights is not None:
        args = (*args, weights.detach().requires_grad_())
    layer.weight.grad = None
    out = layer(*args)
    out.backward(dout.to(out.dtype))
    grad = layer.weight.grad
    found = {"out": out.detach(), "table": layer.weight.detach().clone()}
    found["grad"] = grad.to_dense() if grad.is_sparse else grad
    return found | ({"weights": args[-1].grad} if weights is not None else {})


def compare(ours, theirs, args, weights=None):
    """Hold our layer against torch's in float64, with torch's in the same dtype for a baseline; returns our outcome."""
    assert type(ours).__mro__[2] is type(theirs) and list(ours.state_dict()) == ["weight"]
    table = ours.weight.detach().clone()
    theirs.load_state_dict(ours.state_dict())
    shape = copy.deepcopy(theirs)(*args, *(() if weights is None else (weights.to(table.dtype),))).shape
    dout = torch.randn(shape, device=table.device)
    actual = outcome(ours, args, dout, weights)
    if table.dtype == torch.float64:
        for name, value in outcome(theirs, args, dout, weights).items():
            torch.testing.assert_close(actual[name], value)
        return actual

    def draw(i):
        plain = copy.deepcopy(theirs)
        plain.weight.data.copy_(table.roll(i, 0))
        wide = copy.deepcopy(plain).double()
        rolled = dout.roll(-i, 0)
        truth = outcome(wide, args, rolled.double(), None if weights is None else weights.double())
        return truth, outcome(plain, args, rolled, weights)

    check_draws(actual, draw)
    return actual


INPUTS = {
    "vector": lambda: torch.randint(N, (17,)),
    "cube": lambda: torch.randint(N, (2, 3, 4), dtype=torch.int32),
    "none": lambda: torch.empty(0, 3, dtype=torch.int64),
    "strided": lambda: torch.randint(N, (6, 4)).t()[::2],
}
OPTIONS = [
    {},
    {"padding_idx": 3},
    {"padding_idx": -1, "sparse": True},
    {"sparse": True},
    {"scale_grad_by_freq": True},
    {"scale_grad_by_freq": True, "padding_idx": 0},
    {"max_norm": 2.0},
    {"max_norm": 3.0, "norm_type": 1.0, "padding_idx": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("input", INPUTS)
def test_embedding_is_torchs(device, input, options):
    """Every argument, ids of every form: rows, their gradient, and the table that max_norm changes in place."""
    ours = Embedding(N, D, device=device, **options)
    with torch.no_grad():
        # A padding row that is not zero is read all the same.
        ours.weight.normal_()
    theirs = torch.nn.Embedding(N, D, device=device, **options)
    ids = INPUTS[input]().to(device)
    actual = compare(ours, theirs, (ids,))
    if "max_norm" not in options:
        assert torch.equal(actual["out"], theirs(ids))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(device, dtype):
    """Half precision and float64, with duplicates whose gradients are summed in float32 or above."""
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("float64 is for the CPU")
    ids = torch.randint(3, (40,), device=device)
    compare(Embedding(N, D, device=device, dtype=dtype), torch.nn.Embedding(N, D, device=device, dtype=dtype), (ids,))
    bags = [c(N, D, mode="sum", device=device, dtype=dtype) for c in (EmbeddingBag, torch.nn.EmbeddingBag)]
    compare(*bags, (ids, torch.tensor([0, 9, 9], device=device)), torch.rand(40, device=device).to(dtype))


BAG_OPTIONS = [
    {"mode": mode} | options
    for mode, options in itertools.product(
        ("sum", "mean", "max"), ({}, {"padding_idx": 3}, {"padding_idx": -2, "max_norm": 2.0}, {"sparse": True})
    )
    if mode != "max" or "sparse" not in options
]


@pytest.mark.parametrize("options", BAG_OPTIONS, ids=str)
@pytest.mark.parametrize("form", ["ragged", "last", "square", "int32"])
def test_embedding_bag_is_torchs(device, form, options):
    """Every mode over ragged bags with empty ones at both ends, with and without the last offset, and fixed width."""
    last = form == "last"
    ours = EmbeddingBag(N, D, include_last_offset=last, device=device, **options)
    theirs = torch.nn.EmbeddingBag(N, D, include_last_offset=last, device=device, **options)
    index = torch.randint(N, (20,), device=device)
    # One bag of nothing but padding.
    index[5:8] = options.get("padding_idx", 0) % N
    args = (index, torch.tensor([0, 0, 5, 8, 20, 20], device=device))
    if form == "square":
        args = (index.view(4, 5),)
    if form == "int32":
        args = tuple(a.int() for a in args)
    with_weights = options["mode"] == "sum"
    weights = torch.randn(args[0].shape, device=device) if with_weights else None
    if with_weights and form in ("ragged", "last"):
        compare(ours, theirs, args)
    compare(ours, theirs, args if weights is None or len(args) == 2 else (*args, None), weights)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("sparse", [False, True])
def test_bag_gradient_by_frequency(device, mode, sparse):
    """scale_grad_by_freq by its definition, a row's gradient over how often it is listed; torch's CPU kernel errs."""
    index = torch.tensor([1, 3, 1, 0, 2, 1], device=device)
    offsets = torch.tensor([0, 3, 5], device=device)
    scaled = EmbeddingBag(N, D, mode=mode, scale_grad_by_freq=True, sparse=sparse, device=device)
    plain = torch.nn.EmbeddingBag(N, D, mode=mode, device=device)
    dout = torch.randn(3, D, device=device)
    expected = outcome(plain, (index, offsets), dout)["grad"]
    counts = torch.bincount(index, minlength=N).clamp(min=1).unsqueeze(1)
    actual = outcome(scaled, (index, offsets), dout)["grad"]
    torch.testing.assert_close(actual, expected / counts)


def test_nested_input(device):
    """A nested tensor of bags, with nested weights."""
    bags = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5, 5])]
    nested = torch.nested.nested_tensor(bags, layout=torch.jagged, device=device)
    weights = torch.nested.nested_tensor_from_jagged(torch.rand(6, device=device), nested.offsets())
    ours = EmbeddingBag(N, D, mode="sum", device=device)
    theirs = torch.nn.EmbeddingBag.from_pretrained(ours.weight.detach(), mode="sum")
    torch.testing.assert_close(ours(nested, per_sample_weights=weights), theirs(nested, per_sample_weights=weights))


def test_bag_errors(device):
    """What torch refuses is refused, with its exceptions."""
    ids, offsets = torch.randint(N, (6,), device=device), torch.tensor([0, 2], device=device)
    bag = EmbeddingBag(N, D, device=device)
    for args in ((ids,), (ids.view(2, 3), offsets), (ids, offsets.view(1, 2)), (ids.view(1, 2, 3),)):
        with pytest.raises(ValueError):
            bag(*args)
    with pytest.raises(NotImplementedError):
        bag(ids, offsets, torch.rand(6, device=device))
    with pytest.raises(ValueError, match="shape of input"):
        bag(ids, offsets, torch.rand(5, device=device))
    for options in ({"sparse": True}, {"scale_grad_by_freq": True}):
        with pytest.raises(ValueError):
            EmbeddingBag(N, D, mode="max", device=device, **options)(ids, offsets)
    for layer in (Embedding, EmbeddingBag):
        with pytest.raises(AssertionError):
            layer(N, D, padding_idx=N)
        with pytest.raises(TypeError, match="int32 or int64"):
            layer(N, D, device=device)(ids.float().view(2, 3))
    if device == "cpu":
        with pytest.raises(IndexError, match="got 13"):
            Embedding(N, D)(torch.tensor([0, N]))


def stepped(layer, args, dout, steps=2):
    """The table after backward passes, with its state."""
    for _ in range(steps):
        layer(*args).backward(dout)
    return layer.weight.detach().clone()


def torch_steps(theirs, optimizer, args, dout, steps=2):
    """The table after as many steps of a torch optimizer."""
    for _ in range(steps):
        optimizer.zero_grad()
        theirs(*args).backward(dout)
        optimizer.step()
    return theirs.weight.detach()


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}, {"max_norm": 2.0}], ids=str)
def test_fused_embedding(device, options):
    """A step in the backward pass is torch.optim's on the dense gradient; the padding row is read and stays."""
    ours = Embedding(N, D, device=device, optimizer=SGD(lr=0.3), **options)
    with torch.no_grad():
        ours.weight.normal_()
    theirs = torch.nn.Embedding(N, D, device=device, **options)
    theirs.load_state_dict({"weight": ours.weight})
    ids = torch.randint(N, (3, 7), device=device)
    assert torch.equal(ours(ids), copy.deepcopy(theirs)(ids))
    dout = torch.randn(3, 7, D, device=device)
    expected = torch_steps(theirs, torch.optim.SGD(theirs.parameters(), lr=0.3), (ids,), dout)
    torch.testing.assert_close(stepped(ours, (ids,), dout), expected)
    assert ours.weight.grad is None and int(ours.optimizer_step) == 2


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("frequency", [False, True])
def test_fused_bag(device, mode, frequency):
    """Likewise for bags, and the gradient of per-sample weights is that before the step."""
    if mode == "max" and frequency:
        pytest.skip("not a combination that torch has")
    options = {"mode": mode, "scale_grad_by_freq": frequency, "padding_idx": 2, "device": device}
    ours = EmbeddingBag(N, D, optimizer=SGD(lr=0.3), **options)
    plain = EmbeddingBag(N, D, **options)
    plain.load_state_dict({"weight": ours.weight})
    args = (torch.randint(N, (20,), device=device), torch.tensor([0, 0, 5, 8, 20], device=device))
    weights = [torch.rand(20, device=device, requires_grad=True) for _ in range(2)] if mode == "sum" else [None] * 2
    if mode == "sum":
        weights[1].data.copy_(weights[0].data)
    dout = torch.randn(5, D, device=device)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.3)
    expected = torch_steps(plain, optimizer, (*args, weights[0]), dout, 1)
    torch.testing.assert_close(stepped(ours, (*args, weights[1]), dout, 1), expected)
    if mode == "sum":
        torch.testing.assert_close(weights[1].grad, weights[0].grad)


def test_other_optimizers_leave_fused_tables_alone(device):
    """The table is a parameter without a gradient: weight decay of a plain optimizer does not reach it."""
    model = torch.nn.Sequential(Embedding(N, D, device=device, optimizer=SGD(lr=0.0)), torch.nn.Linear(D, 2).to(device))
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.5)
    model(torch.randint(N, (4,), device=device)).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, before) and not model[0].weight.requires_grad
    with torch.no_grad():
        assert not model[0](torch.randint(N, (4,), device=device)).requires_grad


def test_fused_checkpoint(device):
    """Table and state go through a state_dict to the same bits; anything else is refused, with nothing changed."""
    ids, dout = torch.randint(N, (11,), device=device), torch.randn(11, D, device=device)
    first = Embedding(N, D, device=device, optimizer=RowwiseAdagrad(lr=0.1))
    stepped(first, (ids,), dout)
    saved = {k: v.clone() for k, v in first.state_dict().items()}
    assert list(saved) == ["weight", "optimizer_step", "optimizer_sum", "optimizer_algorithm"]
    second = Embedding(N, D, device=device, optimizer=RowwiseAdagrad(lr=0.1))
    second.load_state_dict(saved)
    assert torch.equal(stepped(first, (ids,), dout), stepped(second, (ids,), dout))
    assert torch.equal(first.optimizer_sum, second.optimizer_sum)
    for other in (
        Embedding(N, D, device=device, optimizer=SGD(lr=0.1)),
        Embedding(N, D, device=device, optimizer=PartialRowwiseAdam(lr=0.1)),
        Embedding(N, D + 1, device=device, optimizer=RowwiseAdagrad(lr=0.1)),
    ):
        before = {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(RuntimeError, match=r"another optimizer's|must have shape"):
            other.load_state_dict(saved)
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    with pytest.raises(RuntimeError, match="optimizer_sum"):
        first.load_state_dict({"weight": saved["weight"]})


def test_copies_and_casts(device):
    """A deep copy trains by itself; a cast to half keeps the state in float32; a table may be moved and tied."""
    layer = Embedding(N, D, device=device, optimizer=Adam(lr=0.1))
    ids, dout = torch.randint(N, (11,), device=device), torch.randn(11, D, device=device)
    stepped(layer, (ids,), dout)
    before = layer.weight.detach().clone()
    clone = copy.deepcopy(layer)
    assert torch.equal(stepped(clone, (ids,), dout), stepped(copy.deepcopy(layer), (ids,), dout))
    assert torch.equal(layer.weight, before) and not torch.equal(clone.weight, before)
    sums = layer.optimizer_exp_avg.clone()
    half = layer.half()
    assert half.weight.dtype == torch.float16 and torch.equal(half.optimizer_exp_avg, sums)
    stepped(half, (ids,), dout.half())
    assert torch.isfinite(half.weight).all() and int(half.optimizer_step) == 4
    pretrained = Embedding.from_pretrained(before, optimizer=SGD(lr=1.0))
    expected = before.clone().index_add(0, ids, -dout)
    torch.testing.assert_close(stepped(pretrained, (ids,), dout, 1), expected)
    assert not Embedding.from_pretrained(before).weight.requires_grad


def test_fused_errors():
    """Combinations that have no meaning, and a table that is asked for a gradient after all."""
    for layer in (Embedding, EmbeddingBag):
        with pytest.raises(ValueError, match="sparse"):
            layer(N, D, sparse=True, optimizer=SGD(lr=0.1))
        with pytest.raises(TypeError, match=r"gossamer\.optim"):
            layer(N, D, optimizer=torch.optim.SGD)
        with pytest.raises(ValueError, match="frozen"):
            layer.from_pretrained(torch.randn(3, 2), freeze=True, optimizer=SGD(lr=0.1))
    layer = Embedding(N, D, optimizer=SGD(lr=0.1))
    layer.weight.requires_grad_()
    with pytest.raises(ValueError, match="must not require a gradient"):
        layer(torch.tensor([1]))


@pytest.mark.parametrize("fused", [False, True])
def test_compiles(device, fused):
    """Traced whole, forward and backward, for any number of ids: the same bits."""
    torch._dynamo.reset()
    optimizer = Adam(lr=0.1) if fused else None
    model = torch.nn.ModuleList(
        [Embedding(N, D, padding_idx=2, optimizer=optimizer), EmbeddingBag(N, D, mode="sum", optimizer=optimizer)]
    ).to(device)

    def f(model, ids, offsets, weights):
        return model[0](ids).sin().sum(0) + model[1](ids, offsets, weights).cos().sum(0)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    twin = copy.deepcopy(model)
    for length in (11, 17, 19):
        ids, weights = torch.randint(N, (length,), device=device), torch.rand(length, device=device)
        offsets = torch.tensor([0, 3, 3, 9], device=device)
        results = []
        for function, layers in ((compiled, model), (f, twin)):
            w = weights.clone().requires_grad_()
            out = function(layers, ids, offsets, w)
            out.sum().backward()
            results.append([out, w.grad, *layers.state_dict().values(), *(p.grad for p in layers.parameters())])
        for a, b in zip(*results, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_kernels_serve_the_layers(kernel_backend, device):
    """Each kernel family gives the reference's answers and steps, duplicates and padding included."""
    ids = torch.randint(N, (5, 6), device=device)
    dout = torch.randn(5, D, device=device)
    tables = []
    for backend in (kernel_backend, "reference"):
        torch.manual_seed(3)
        bag = EmbeddingBag(N, D, mode="mean", padding_idx=1, device=device, optimizer=RowwiseAdagrad(lr=0.2))
        with gossamer.backend(backend):
            tables.append(stepped(bag, (ids,), dout))
    torch.testing.assert_close(*tables)


def model_with_ties():
    """Tables in several places: tied by module and by parameter, under a hook, of a derived class, and already ours."""

    class Scaled(torch.nn.Embedding):
        def forward(self, input):
            return 2 * super().forward(input)

    model = torch.nn.Module()
    model.tokens = torch.nn.Embedding(N, D, padding_idx=0)
    model.alias = model.tokens
    model.head = torch.nn.Linear(D, N, bias=False)
    model.head.weight = model.tokens.weight
    model.bag = torch.nn.EmbeddingBag(N, D, mode="max")
    model.scaled = Scaled(N, D)
    model.ours = Embedding(N, D)
    model.patched = torch.nn.Embedding(N, D)
    model.patched.forward = lambda input: input
    return model


def test_replace_and_restore(device):
    """Modules change class where they stand; parameters, ties, hooks and answers stay; restore undoes it."""
    model = model_with_ties().to(device)
    seen = []
    model.tokens.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    names, parameters = list(model.state_dict()), list(model.parameters())
    ids = torch.randint(N, (4, 3), device=device)
    before = [model.tokens(ids), model.bag(ids), model.scaled(ids)]
    report = gossamer.replace(model, embeddings=True)
    assert [m.name for m in report.switched] == ["tokens", "bag"]
    assert {m.name: m.class_name for m in report.skipped} == {"scaled": "Scaled", "patched": "Embedding"}
    assert "2 of 4 embedding modules" in str(report) and "13 rows of 9 of mode 'max'" in str(report)
    assert type(model.tokens) is Embedding and model.alias is model.tokens and type(model.bag) is EmbeddingBag
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.head.weight is model.tokens.weight
    after = [model.tokens(ids), model.bag(ids), model.scaled(ids)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)) and len(seen) == 2
    clone = copy.deepcopy(model)
    for restored in (model, clone):
        gossamer.restore(restored)
        assert type(restored.tokens) is torch.nn.Embedding and type(restored.bag) is torch.nn.EmbeddingBag
        assert type(restored.ours) is Embedding
    with pytest.raises(ValueError, match="switched"):
        gossamer.restore(model)


def test_replace_errors():
    """Nothing to switch, no module, and a dtype without kernels."""
    with pytest.raises(ValueError, match="got none in Linear"):
        gossamer.replace(torch.nn.Linear(2, 2), embeddings=True)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        gossamer.replace(3, embeddings=True)
    with pytest.raises(ValueError, match="complex64"):
        gossamer.replace(torch.nn.Embedding(3, 2, dtype=torch.complex64), embeddings=True)
    assert not gossamer.replace(torch.nn.Linear(2, 2), embeddings=True, strict=False).switched


def test_the_guides_blocks_run():
    """Each block of docs/embedding.md by itself, after the first."""
    pytest.importorskip("safetensors")
    guide = Path(__file__).resolve().parents[3] / "docs" / "embedding.md"
    first, *blocks = re.findall(r"^```python\n(.*?)^```", guide.read_text(), re.M | re.S)
    assert len(blocks) >= 8
    for block in blocks:
        exec(compile(first + block, str(guide), "exec"), {})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (optim.SGD(lr=0.1), optim.SGD(lr=0.1, momentum=0.9)),
        (optim.SGD(lr=0.1, momentum=0.9), optim.SGD(lr=0.1)),
    ],
    ids=["momentum", "none"],
)
def test_a_checkpoint_of_another_optimizer_changes_nothing(before, after):
    """The table stays too; without ``strict`` a plain table's rows are taken."""
    saved = gossamer.nn.Embedding(10, 4, optimizer=before).state_dict()
    layer = gossamer.nn.Embedding(10, 4, optimizer=after)
    own = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"the table's optimizer keeps .*, and the state holds"):
        layer.load_state_dict(saved)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, own[name]), name
    layer.load_state_dict({"weight": saved["weight"]}, strict=False)
    assert torch.equal(layer.weight, saved["weight"])


@pytest.mark.parametrize("cls", [gossamer.nn.Embedding, gossamer.nn.EmbeddingBag])
def test_reset_parameters_starts_the_optimizer_anew(cls):
    """After training, and where the storage came without values."""
    optimizer = optim.Adagrad(lr=0.1, initial_accumulator=0.5)
    for layer in (
        cls(10, 4, optimizer=optimizer),
        cls(10, 4, optimizer=optimizer, device="meta").to_empty(device="cpu"),
    ):
        if not layer.weight.isnan().any():
            layer(torch.tensor([[1, 2]])).sum().backward()
        layer.reset_parameters()
        assert torch.equal(layer.optimizer_sum, torch.full((10, 4), 0.5))
        assert layer.optimizer_step.item() == 0
        assert layer.optimizer_algorithm.item() == optimizer.algorithm


def test_a_state_may_be_assigned_to_a_layer_without_memory():
    """A layer made on the meta device takes the tensors of a state as they are, and trains."""
    optimizer = gossamer.optim.SGD(lr=0.5)
    whole = gossamer.nn.Embedding(10, 4, optimizer=optimizer)
    layer = gossamer.nn.Embedding(10, 4, optimizer=optimizer, device="meta")
    layer.load_state_dict(whole.state_dict(), assign=True)
    before = layer.weight.detach().clone()
    layer(torch.tensor([1, 3])).sum().backward()
    assert torch.equal(layer.weight[[1, 3]], before[[1, 3]] - 0.5)


@pytest.mark.parametrize("how", ["parametrization", "pruning"])
def test_a_table_that_is_computed_anew_takes_no_step(how):
    """Its step would change what the forward pass computed from the parameter, which is discarded afterwards."""
    layer = gossamer.nn.EmbeddingBag(10, 4, mode="sum", optimizer=gossamer.optim.SGD(lr=1.0))
    if how == "pruning":
        prune.random_unstructured(layer, "weight", 0.5)
    else:
        parametrize.register_parametrization(layer, "weight", torch.nn.Tanh())
    with pytest.raises(ValueError, match=r"optimizer must be None where weight is not a parameter.*got SGD"):
        layer(torch.tensor([[1, 2]]))


def test_a_module_whose_class_has_changed_is_not_restored():
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4))
    gossamer.replace(model, embeddings=True)
    parametrize.register_parametrization(model[0], "weight", torch.nn.Tanh())
    with pytest.raises(ValueError, match=r"0 must have the class that replace gave it.*got ParametrizedEmbedding"):
        gossamer.restore(model)
    parametrize.remove_parametrizations(model[0], "weight")
    gossamer.restore(model)
    assert type(model[0]) is torch.nn.Embedding
