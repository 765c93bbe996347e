"""Threads that share a PEFT model after replace: the adapters of a mixed batch belong to the call that named them."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import random
import threading
import time

import pytest
import torch

import gossamer

peft = pytest.importorskip("peft")

from peft_models import drawn, tokens, wrapped  # noqa: E402

from gossamer.integrations.peft import mixed_adapters  # noqa: E402

NAMES = ("default", "wide", "__base__")


def replaced(device, **options):
    """A model with two adapters of different ranks on the same layers."""
    model = wrapped("llama", device, **options)
    model.add_adapter("wide", peft.LoraConfig(r=9, lora_alpha=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    gossamer.replace(drawn(model))
    return model.eval()


def test_every_thread_gets_its_own_rows(device):
    """By adapter_names, by mixed_adapters, and with the active adapter alone, all at once."""
    model = replaced(device)
    ids = tokens(device, rows=4, length=5)
    with torch.no_grad():
        alone = {name: model(input_ids=ids, adapter_names=[name] * 4).logits for name in NAMES}
    active = alone["default"]
    assert min((alone[a] - alone[b]).abs().max() for a in NAMES for b in NAMES if a != b) > 1e-2
    end, calls, errors = time.monotonic() + 3, [0] * 6, []

    def run(thread):
        draw = random.Random(thread)
        try:
            while time.monotonic() < end:
                names = draw.choices(NAMES, k=draw.randint(1, 4))
                rows = ids[: len(names)]
                with torch.no_grad():
                    if thread % 3 == 0:
                        logits = model(input_ids=rows, adapter_names=names).logits
                    elif thread % 3 == 1:
                        with mixed_adapters(model, names):
                            logits = model(input_ids=rows).logits
                    else:
                        logits, names = model(input_ids=rows).logits, ["default"] * len(names)
                for row, name in enumerate(names):
                    torch.testing.assert_close(logits[row], alone[name][row], rtol=1e-4, atol=1e-4)
                calls[thread] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and min(calls) >= 2
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, active)


def test_names_end_with_their_call(device):
    """Names end with their call even if it raises, and inside another block."""
    model = replaced(device)
    ids = tokens(device, rows=2)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with mixed_adapters(model, ["wide", "default"]):
            mixed = model(input_ids=ids).logits
            with pytest.raises(ValueError, match="Length of `adapter_names`"):
                model(input_ids=ids, adapter_names=["default"])
            assert torch.equal(model(input_ids=ids).logits, mixed)
            torch.testing.assert_close(model(input_ids=ids, adapter_names=["default"] * 2).logits, plain)
            assert torch.equal(model(input_ids=ids).logits, mixed)
        assert torch.equal(model(input_ids=ids).logits, plain)


@pytest.mark.parametrize("compiled", [False, True])
def test_asyncio_tasks_keep_their_names_across_awaits(device, compiled):
    """Tasks share a thread, and other threads compute for them: neither eager nor compiled code mixes up their rows."""
    model = replaced(device)
    ids = tokens(device, rows=2)
    batches = [["wide"] * 2, ["default"] * 2, ["__base__", "wide"], None]
    with torch.no_grad():
        wanted = [model(input_ids=ids, adapter_names=names or ["default"] * 2).logits for names in batches]
        run = torch.compile(model, backend="eager") if compiled else model
        if compiled:
            run(input_ids=ids)  # traced before a task is seen

    @torch.no_grad()
    def logits():
        return run(input_ids=ids).logits

    async def serve(names):
        with contextlib.ExitStack() as stack:
            if names is not None:
                stack.enter_context(mixed_adapters(model, names))
            await asyncio.sleep(0.01)  # until every task has begun
            found = [logits()]
            await asyncio.sleep(0)
            return [*found, await asyncio.to_thread(logits), logits()]

    async def serve_all():
        return await asyncio.gather(*map(serve, batches))

    for names, found, right in zip(batches, asyncio.run(serve_all()), wanted, strict=True):
        for each in found:
            torch.testing.assert_close(each, right, msg=lambda text, names=names: f"{names}: {text}")


def test_names_reach_threads_while_another_thread_compiles(device, monkeypatch):
    """Torch then says so to all threads."""
    model = replaced(device)
    ids = tokens(device, rows=2)
    with torch.no_grad():
        wanted = model(input_ids=ids, adapter_names=["wide"] * 2).logits
        monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
        found = []
        with mixed_adapters(model, ["wide"] * 2):
            context = contextvars.copy_context()
            thread = threading.Thread(target=context.run, args=(lambda: found.append(model(input_ids=ids).logits),))
            thread.start()
            thread.join()
    torch.testing.assert_close(found[0].detach(), wanted)


def test_modules_that_peft_computes_refuse_overlap(device):
    """PEFT passes the names by hooks on the modules, which the calls of other threads would run into."""
    model = replaced(device, modules_to_save=["lm_head"])
    ids = tokens(device, rows=2)
    names = ["default", "__base__"]
    with torch.no_grad():
        wanted = model(input_ids=ids, adapter_names=names).logits
    inside, go, found = threading.Event(), threading.Event(), []

    def hook(module, args):
        inside.set()
        go.wait(60)

    layer = model.get_submodule("base_model.model.model.layers.1")
    handle = layer.register_forward_pre_hook(hook)

    def mixed():
        with torch.no_grad():
            found.append(model(input_ids=ids, adapter_names=names).logits)

    thread = threading.Thread(target=mixed)
    thread.start()
    inside.wait(60)
    try:
        for given in ({}, {"adapter_names": names}):
            with pytest.raises(ValueError, match="must not overlap another call of the model: its Modules"):
                model(input_ids=ids, **given)
    finally:
        go.set()
        thread.join()
        handle.remove()
    assert torch.equal(found[0], wanted)
    with torch.no_grad():
        model(input_ids=ids)


def test_data_parallel_copies_are_refused(device):
    """A copy gets only some rows of the batch, but would get all names."""
    model = replaced(device)
    with mixed_adapters(model, ["wide", "default"]):
        with pytest.raises(ValueError, match=r"torch\.nn\.DataParallel cannot divide a batch that mixes adapters"):
            model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")._replicate_for_data_parallel()


def test_compiled_models_follow_the_names(device):
    """Another batch of names is another trace; without names the active adapter computes."""
    model = replaced(device)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    x = torch.randn(3, 4, 50, device=device)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    with torch.no_grad():
        for names in (["wide", None, "default"], ["default", "wide", None]):
            with mixed_adapters(model, names):
                wanted = layer(x)
                torch.testing.assert_close(compiled(x), wanted)
        assert not torch.allclose(layer(x), wanted)
        torch.testing.assert_close(compiled(x), layer(x))
