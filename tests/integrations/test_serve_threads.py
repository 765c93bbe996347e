"""Threads that share a served model: every call gets its own requests' adapters, while others come and go."""

from __future__ import annotations

import contextvars
import copy
import os
import pickle
import random
import threading
import time

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gossamer
from gossamer.integrations._calls import Slot, _values, scope

peft = pytest.importorskip("peft")
pytest.importorskip("safetensors")

from peft_models import drawn, llama, qwen3_moe, tokens  # noqa: E402

SECONDS = float(os.environ.get("GOSSAMER_STRESS_SECONDS", "3"))
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A base model and eight adapters of several ranks, layers and kinds, by name."""
    root = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    base, folders = qwen3_moe().eval(), {}
    for i in range(8):
        options = {"r": 1 + i % 3, "target_modules": [["q_proj"], ["o_proj", "v_proj"], ["embed_tokens"]][i % 3]}
        if i % 2:
            options["target_parameters"] = EXPERTS
        drawn(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))).save_pretrained(root / str(i))
        folders[f"adapter{i}"] = root / str(i)
    return base, folders


def in_threads(functions):
    """Run the functions at the same time; raises the first error of any."""
    errors = []

    def run(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_eight_threads_while_adapters_come_and_go(adapters, device):
    """For ``GOSSAMER_STRESS_SECONDS``; every row is what its adapter gives alone, however the calls overlap."""
    base, folders = adapters
    model = copy.deepcopy(base).to(device)
    served = gossamer.serve_adapters(model, folders)
    ids = tokens(device, rows=6, length=5)
    with torch.no_grad():
        alone = {n: served(ids, adapters=[n] * 6).logits for n in (*folders, None)}
    apart = min((alone[a] - alone[b]).abs().max() for a in alone for b in alone if a is not b)
    assert apart > 1e-2
    end, calls = time.monotonic() + SECONDS, [0] * 8

    def serve(thread):
        draw = random.Random(thread)
        while time.monotonic() < end:
            names = draw.choices([*folders, None], k=draw.randint(1, 6))
            with torch.no_grad():
                logits = served(ids[: len(names)], adapters=names).logits
                plain = model(ids[:2]).logits if draw.random() < 0.2 else alone[None][:2]
            for row, name in enumerate(names):
                torch.testing.assert_close(logits[row], alone[name][row], rtol=1e-4, atol=apart.item() / 100)
            torch.testing.assert_close(plain, alone[None][:2], rtol=1e-4, atol=apart.item() / 100)
            calls[thread] += 1

    def change():
        while time.monotonic() < end:
            served.add_adapters({"guest": folders["adapter1"], "other": folders["adapter2"]})
            with torch.no_grad():
                guest = served(ids, adapters=["guest"] * 6).logits
            torch.testing.assert_close(guest, alone["adapter1"], rtol=1e-4, atol=apart.item() / 100)
            served.remove_adapters(["guest", "other"])

    in_threads([*(lambda t=t: serve(t) for t in range(8)), change])
    assert min(calls) >= 2
    assert served.adapter_names == tuple(folders)
    print(f"{sum(calls)} calls in {SECONDS:.0f} s")


def test_a_call_keeps_the_adapters_it_began_with(adapters, device):
    """Removed, replaced under the same name, and added on layers that no adapter updated before."""
    base, folders = adapters
    served = gossamer.serve_adapters(copy.deepcopy(base).to(device), {"x": folders["adapter0"]})
    ids = tokens(device, rows=2, length=4)
    with torch.no_grad():
        before = served(ids, adapters=["x", None]).logits
        attention = served.model.model.layers[0].self_attn

        def exchange(module, args):
            served.remove_adapters(["x"])
            served.add_adapters({"x": folders["adapter1"], "y": folders["adapter0"]})

        handle = attention.register_forward_pre_hook(exchange)
        during = served(ids, adapters=["x", None]).logits
        handle.remove()
        assert torch.equal(during, before) and served.adapter_names == ("x", "y")
        after = served(ids, adapters=["y", "x"]).logits
        torch.testing.assert_close(after[0], before[0])
        alone = gossamer.serve_adapters(copy.deepcopy(base).to(device), {"x": folders["adapter1"]})
        torch.testing.assert_close(after[1], alone(ids, adapters=["x", "x"]).logits[1])
        with pytest.raises(ValueError, match=r"adapters must have new names, got \['x'\]"):
            served.add_adapters({"x": folders["adapter2"]})
        with pytest.raises(ValueError, match=r"names must be among \['x', 'y'\], got \['z'\]"):
            served.remove_adapters(["z"])
        with pytest.raises(TypeError, match="names must be an iterable of str, got 'x'"):
            served.remove_adapters("x")
        served.remove_adapters(["x", "y"])
        assert served.adapter_names == ()
        assert torch.equal(served(ids, adapters=[None, None]).logits, served.model(ids).logits)
        served.close()
        with pytest.raises(ValueError, match="no longer serves adapters"):
            served.add_adapters({"x": folders["adapter2"]})


def test_a_bad_adapter_changes_nothing(adapters, tmp_path):
    base, folders = adapters
    served = gossamer.serve_adapters(copy.deepcopy(base), {"x": folders["adapter0"]})
    with pytest.raises(ValueError, match=r"must be a folder with adapter_config\.json"):
        served.add_adapters({"y": folders["adapter1"], "z": tmp_path})
    assert served.adapter_names == ("x",)


def test_one_model_is_served_once(adapters):
    base, folders = adapters
    model, names = copy.deepcopy(base), {"x": folders["adapter0"]}
    served = gossamer.serve_adapters(model, names)
    for again in (served, model, torch.nn.Sequential(model)):
        with pytest.raises(ValueError, match="model must not serve adapters already"):
            gossamer.serve_adapters(again, names)
    with pytest.raises(ValueError, match=r"copied by torch\.nn\.DataParallel"):
        served._replicate_for_data_parallel()
    served.close()
    gossamer.serve_adapters(model, names).close()
    with pytest.raises(ValueError, match=r"model must be without torch\.nn\.DataParallel"):
        gossamer.serve_adapters(torch.nn.DataParallel(copy.deepcopy(base)), names)


def test_closing_waits_for_the_calls_that_run(adapters, device):
    base, folders = adapters
    served = gossamer.serve_adapters(copy.deepcopy(base).to(device), {"x": folders["adapter1"]})
    ids = tokens(device, rows=1, length=4)
    with torch.no_grad():
        wanted = served(ids, adapters=["x"]).logits
    inside, found, ended, closed = threading.Event(), [], [], []

    def hook(module, args):
        inside.set()
        assert not closed
        with pytest.raises(ValueError, match="must not be called during a call"):
            served.close()
        time.sleep(0.2)

    handle = served.model.model.layers[0].register_forward_pre_hook(hook)
    served.model.register_forward_hook(lambda *_: ended.append(1))

    def call():
        with torch.no_grad():
            found.append(served(ids, adapters=["x"]).logits)

    def close():
        inside.wait()
        served.close()
        closed.append(len(ended))

    in_threads([call, close])
    handle.remove()
    assert torch.equal(found[0], wanted) and closed == [1]


def test_copies_serve_by_themselves(adapters, device):
    base, folders = adapters
    served = gossamer.serve_adapters(copy.deepcopy(base).to(device), {"x": folders["adapter1"]})
    ids = tokens(device, rows=2, length=4)
    with torch.no_grad():
        wanted = served(ids, adapters=["x", None]).logits
        for twin in (copy.deepcopy(served), pickle.loads(pickle.dumps(served))):
            assert torch.equal(twin(ids, adapters=["x", None]).logits, wanted)
            served.model(ids)  # A call of one model is not a call of the other.
            twin.close()
            assert torch.equal(served(ids, adapters=["x", None]).logits, wanted)


def test_layers_are_not_computed_again_without_their_requests(adapters, device):
    """Gradient checkpointing recomputes them in the backward pass, after the call has ended, which raises an error."""
    base, folders = adapters
    served = gossamer.serve_adapters(copy.deepcopy(base).to(device), {"x": folders["adapter0"]})
    layer = served.model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 3, 32, device=device, requires_grad=True)
    served.model.forward = lambda x: checkpoint(layer, x, use_reentrant=False)
    served(x, adapters=["x"])
    with pytest.raises(ValueError, match="q_proj cannot be computed again in a backward pass"):
        served(x, adapters=["x"]).sum().backward()


def test_compiled_models_follow_the_requests(tmp_path, device):
    torch.manual_seed(0)
    base, folders = llama(1).to(device).eval(), {}
    for name in ("a", "b"):
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
        drawn(peft.get_peft_model(copy.deepcopy(base), config)).save_pretrained(tmp_path / name)
        folders[name] = tmp_path / name
    served = gossamer.serve_adapters(base, folders)
    layer = base.model.layers[0].mlp.down_proj
    x = torch.randn(2, 3, 50, device=device)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    eager_and_compiled = []
    for function in (layer, compiled):
        base.forward = lambda x, function=function: function(x)
        with torch.no_grad():
            found = [served(x, adapters=names) for names in (["a", "b"], ["b", None], ["b", "a"])]
            eager_and_compiled.append([*found, function(x)])
    torch.testing.assert_close(*eager_and_compiled)


def test_a_backward_pass_sees_what_its_caller_sees():
    """Autograd's own threads, as CUDA's, have torch's copy of the caller's context, and no other."""
    slot, seen = Slot(), []

    def elsewhere(context):
        seen.append(slot.get())
        torch._C._stash_obj_in_tls("context", context)
        try:
            seen.append(slot.get())
        finally:
            torch._C._remove_obj_from_tls("context")
        seen.append(slot.get())

    with scope():
        slot.assign("mine")
        context = contextvars.copy_context()
        in_threads([lambda: elsewhere(context)])
        with scope():
            slot.assign("inner")
            assert slot.get() == "inner" and copy.copy(slot).get() is None
        assert slot.get() == "mine"
    assert slot.get() is None and seen == [None, "mine", None]


class _Asks(torch.autograd.Function):
    """Notes what a slot holds while it is differentiated, and in how far torch hands the caller's context on."""

    @staticmethod
    def forward(ctx, x, slot, seen):
        ctx.slot, ctx.seen = slot, seen
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        handed = torch._C._is_key_in_tls("context") and torch._C._get_obj_in_tls("context").get(_values, {})
        ctx.seen.append((ctx.slot.get(), handed and handed.get(ctx.slot)))
        return gradient, None, None


@pytest.mark.parametrize("anew", [False, True], ids=["plain", "checkpointed"])
def test_backward_from_another_thread_sees_that_threads_call(anew):
    """Not the call of the forward pass: also in what autograd gives to threads of its own, and computes again."""
    slot, seen, losses = Slot(), [], []
    leaf = torch.ones(3, requires_grad=True)

    def forward():
        with scope():
            slot.assign("forward")
            ask = (lambda x: _Asks.apply(x, slot, seen)) if not anew else None
            losses.append((ask(leaf) if ask else checkpoint(_Asks.apply, leaf, slot, seen, use_reentrant=False)).sum())

    def backward():
        with scope():
            slot.assign("backward")
            losses[0].backward()

    in_threads([forward])
    in_threads([backward])
    assert seen == [("backward", "backward")] and torch.equal(leaf.grad, torch.ones(3))
    assert slot.get() is None
