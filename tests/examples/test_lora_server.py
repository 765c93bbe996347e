"""The example that serves adapters by HTTP: every client gets its own adapter's text, under load too."""

from __future__ import annotations

import importlib
import json
import random
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")

from peft_models import drawn  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ADAPTERS = ("one", "two", "three")


@pytest.fixture(scope="module")
def example():
    """The example's module."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("lora_server")
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level model and its adapters."""
    root = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=256, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(root / "base")
    for i, name in enumerate((*ADAPTERS, "spare/late")):
        base = LlamaForCausalLM.from_pretrained(root / "base")
        options = {"r": 2 + i, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        drawn(peft.get_peft_model(base, peft.LoraConfig(**options, lora_alpha=8 * (2 + i)))).save_pretrained(
            root / name
        )
    return root


@pytest.fixture
def running(example, folder, device):
    """A server, and its engine, that end with the test."""
    engine = example.Engine(example.load(folder, device), max_batch=6)
    server = example.Server(engine, folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server, engine
    server.shutdown()
    thread.join()
    server.server_close()
    engine.stop()


def call(server, method, path, body=None):
    """Status and answer of a request."""
    address = f"http://127.0.0.1:{server.server_address[1]}{path}"
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, method=method), timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def alone(engine, prompt, adapter, count):
    """The same tokens by transformers' generate, one request at a time."""
    ids = torch.tensor([list(prompt.encode())], device=engine.device)
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    found = engine.served.generate(input_ids=ids, adapters=[adapter], eos_token_id=None, **options)
    return found[0, ids.shape[1] :].tolist()


def test_clients_get_their_own_adapters_text_under_load(running):
    """Sixteen clients at once, with prompts and answers of many lengths, while an adapter comes and goes."""
    server, engine = running
    errors, prompts = [], ["a", "def f(x):", "import this, and that", "x = 1\n" * 5]
    with torch.inference_mode():
        wanted = {
            (prompt, adapter): alone(engine, prompt, adapter, 12) for prompt in prompts for adapter in (*ADAPTERS, None)
        }
    assert len({tuple(tokens) for tokens in wanted.values()}) > len(prompts) * 2

    def client(number):
        draw = random.Random(number)
        try:
            for _ in range(6):
                prompt, adapter, count = draw.choice(prompts), draw.choice([*ADAPTERS, None]), draw.randint(1, 12)
                given = {"prompt": prompt, "adapter": adapter, "max_new_tokens": count}
                status, answer = call(server, "POST", "/generate", given)
                assert (status, answer["tokens"]) == (200, wanted[prompt, adapter][:count])
        except BaseException as error:
            errors.append(error)

    def exchange():
        try:
            for _ in range(4):
                assert call(server, "PUT", "/adapters/late", {"folder": "spare/late"}) == (200, {"added": "late"})
                given = {"prompt": "def", "adapter": "late", "max_new_tokens": 5}
                status, answer = call(server, "POST", "/generate", given)
                assert status == 200 and len(answer["tokens"]) == 5
                assert call(server, "DELETE", "/adapters/late") == (200, {"removed": "late"})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(16)] + [threading.Thread(target=exchange)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert 1 < engine.largest <= 6 and engine.steps < engine.tokens


def test_an_adapter_leaves_after_its_last_request(running):
    _, engine = running
    long = engine.submit(list(b"abc"), "two", 200)
    gone = threading.Thread(target=lambda: engine.remove("two"))
    gone.start()
    while "two" not in engine._leaving and not long.done():
        pass
    with pytest.raises(ValueError, match=r"adapter must be among .* got 'two'"):
        engine.submit(list(b"abc"), "two", 1)
    assert len(engine.submit(list(b"abc"), "one", 3).result(60)) == 3  # Does not wait for the long one.
    with torch.inference_mode():
        assert long.result(120)[:20] and len(long.result()) == 200
    gone.join()
    assert engine.served.adapter_names == ("one", "three")


def test_bad_requests_get_their_reason(running):
    server, _ = running
    assert call(server, "GET", "/adapters") == (200, {"adapters": sorted(ADAPTERS)})
    for given, message in (
        ({"prompt": "a", "adapter": "nobody"}, "adapter must be among"),
        ({"prompt": "a", "adapter": ["one"]}, "adapter must be among"),
        ({"prompt": ""}, "prompt must have 1 to 1024 tokens, got 0"),
        ({"prompt": 3}, "prompt must be a text, got 3"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens must be an int from 1"),
        ([], "must be a JSON object"),
    ):
        status, answer = call(server, "POST", "/generate", given)
        assert status == 400 and message in answer["error"]
    for folder in ("..", "/etc", "base/../../x"):
        status, answer = call(server, "PUT", "/adapters/x", {"folder": folder})
        assert status == 400 and "folder must be inside the served folder" in answer["error"]
    assert call(server, "PUT", "/adapters/x", {"folder": "base"})[0] == 400
    assert call(server, "DELETE", "/adapters/x")[0] == 400
    assert call(server, "POST", "/elsewhere", {})[0] == 404
    status, answer = call(server, "POST", "/generate", {"prompt": "a", "adapter": "one", "max_new_tokens": 2})
    assert status == 200 and len(answer["tokens"]) == 2


def test_a_failing_model_fails_its_requests_alone(running, monkeypatch):
    server, engine = running
    monkeypatch.setattr(engine.served, "_run", lambda *args: 1 / 0)
    status, answer = call(server, "POST", "/generate", {"prompt": "a"})
    assert (status, answer["error"]) == (500, "ZeroDivisionError: division by zero")
    monkeypatch.undo()
    assert call(server, "POST", "/generate", {"prompt": "a", "max_new_tokens": 3})[0] == 200
