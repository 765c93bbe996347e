"""Serve many LoRA adapters over one model by HTTP, with continuous batching and only the standard library.

    python examples/finetune_lora.py --out runs/lora        # a base model and two adapters
    python examples/lora_server.py runs/lora --port 8000
    curl -d '{"prompt": "def ", "adapter": "code", "max_new_tokens": 40}' localhost:8000/generate

The folder holds a byte-level transformers model in ``base/``, and adapters as PEFT saves them in folders of their own.
One thread runs the model that ``gossamer.serve_adapters`` returned: in one call, every step gives each running request
its next token, whatever its adapter. Requests join and leave between steps, so none waits for another to end.

    POST   /generate          {"prompt": text, "adapter": name or null, "max_new_tokens": number}
    GET    /adapters          names
    PUT    /adapters/NAME     {"folder": name of a folder inside the served one}
    DELETE /adapters/NAME     once the requests that use it have ended
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
import torch.nn.functional as F

import gossamer

try:
    from transformers import AutoModelForCausalLM, DynamicCache
except ImportError as error:
    sys.exit(f"this example needs {error.name}: pip install 'gossamer[transformers]'")

MAX_TOKENS = 1024
MAX_WAITING = 256


class Busy(Exception):
    """Too many requests are waiting."""


@dataclass(eq=False)
class Request:
    """One request: ``prompt`` and the tokens that follow it."""

    prompt: list[int]
    adapter: str | None
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)
    done: Future[list[int]] = field(default_factory=Future)


class Batch:
    """The running requests, with the keys and values of all their tokens, shorter ones padded on the left."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.mask = torch.zeros(0, 0, dtype=torch.int64)
        self.cache: list[tuple[torch.Tensor, torch.Tensor]] = []

    def join(self, requests: list[Request], mask: torch.Tensor, cache: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add requests whose prompts the model has read."""
        length = max(mask.shape[1], self.mask.shape[1])

        def padded(tensor: torch.Tensor, dim: int) -> torch.Tensor:
            missing = length - tensor.shape[dim]
            return F.pad(tensor, (*[0, 0] * (tensor.dim() - 1 - dim % tensor.dim()), missing, 0))

        if self.requests:
            mask = torch.cat([padded(self.mask, 1), padded(mask, 1)])
            cache = [
                tuple(torch.cat([padded(old, 2), padded(new, 2)]) for old, new in zip(*layers, strict=True))
                for layers in zip(self.cache, cache, strict=True)
            ]
        self.requests, self.mask, self.cache = self.requests + requests, mask, cache

    def keep(self, rows: list[int]) -> None:
        """Drop all other requests, and the columns that only they needed."""
        self.requests, self.mask = [self.requests[row] for row in rows], self.mask[rows]
        start = int(self.mask.any(0).int().argmax()) if rows else 0
        self.mask = self.mask[:, start:]
        self.cache = [tuple(t[rows, :, start:] for t in layer) for layer in self.cache] if rows else []


class Engine:
    """Runs a served model in its own thread; each step adds one token to each running request.

    Args:
        served: what ``gossamer.serve_adapters`` returned.
        max_batch: number of requests that run at a time; others wait.
    """

    def __init__(self, served: torch.nn.Module, max_batch: int = 16) -> None:
        self.served, self.max_batch = served, max_batch
        self.device = next(served.model.parameters()).device
        self.steps = self.tokens = self.largest = 0
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._leaving: set[str] = set()
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, prompt: list[int], adapter: str | None, max_new_tokens: int) -> Future[list[int]]:
        """Return a future of the tokens that follow ``prompt``.

        Raises:
            ValueError: the prompt is empty or too long, the number of tokens is not from 1 to 1024, or the adapter is
                unknown.
            Busy: too many requests are waiting, or the engine has stopped.
        """
        if not 1 <= len(prompt) <= MAX_TOKENS:
            raise ValueError(f"prompt must have 1 to {MAX_TOKENS} tokens, got {len(prompt)}")
        if type(max_new_tokens) is not int or not 1 <= max_new_tokens <= MAX_TOKENS:
            raise ValueError(f"max_new_tokens must be an int from 1 to {MAX_TOKENS}, got {max_new_tokens!r}")
        request = Request(prompt, adapter, max_new_tokens)
        with self._changed:
            there = [name for name in self.served.adapter_names if name not in self._leaving]
            if adapter is not None and adapter not in there:
                raise ValueError(f"adapter must be among {there} or null, got {adapter!r}")
            if self._stopped or len(self._waiting) >= MAX_WAITING:
                raise Busy("the server is stopping" if self._stopped else f"{MAX_WAITING} requests are waiting already")
            self._waiting.append(request)
            self._changed.notify_all()
        return request.done

    def remove(self, adapter: str) -> None:
        """Take no more requests for the adapter, and drop it when the last that uses it has ended.

        Raises:
            ValueError: there is no such adapter.
        """
        with self._changed:
            if adapter not in self.served.adapter_names or adapter in self._leaving:
                raise ValueError(f"adapter must be among {list(self.served.adapter_names)}, got {adapter!r}")
            self._leaving.add(adapter)
            self._changed.wait_for(lambda: all(r.adapter != adapter for r in (*self._waiting, *self._running)))
            self.served.remove_adapters([adapter])
            self._leaving.discard(adapter)

    def stop(self) -> None:
        """End the thread; requests that have not ended fail."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        batch = Batch()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._waiting or self._running)
                if self._stopped:
                    break
                room = self.max_batch - len(self._running)
                fresh = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
                self._running += fresh
            try:
                with torch.inference_mode():
                    if batch.requests:
                        self._decode(batch)
                    if fresh:
                        self._read(batch, fresh)
                ended = [request for request in batch.requests if len(request.tokens) >= request.max_new_tokens]
                batch.keep([row for row, request in enumerate(batch.requests) if request not in ended])
                error = None
            except Exception as raised:
                ended, error, batch = list(self._running), raised, Batch()
            self._end(ended, error)
        with self._changed:
            left = [*self._running, *self._waiting]
            self._waiting.clear()
        self._end(left, RuntimeError("the server stopped"))

    def _end(self, requests: list[Request], error: Exception | None) -> None:
        with self._changed:
            self._running = [request for request in self._running if request not in requests]
            self._changed.notify_all()
        for request in requests:
            request.done.set_result(request.tokens) if error is None else request.done.set_exception(error)

    def _call(
        self, requests: list[Request], ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Give each request its next token; return the keys and values of all tokens so far."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = self.served(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=positions.to(self.device),
            past_key_values=cache,
            use_cache=True,
            adapters=[request.adapter for request in requests],
        )
        for request, token in zip(requests, out.logits[:, -1].argmax(-1).tolist(), strict=True):
            request.tokens.append(token)
        self.steps, self.tokens = self.steps + 1, self.tokens + len(requests)
        self.largest = max(self.largest, len(requests))
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _decode(self, batch: Batch) -> None:
        cache = DynamicCache()
        for index, (keys, values) in enumerate(batch.cache):
            cache.update(keys, values, index)
        ids = torch.tensor([request.tokens[-1:] for request in batch.requests])
        batch.mask = F.pad(batch.mask, (0, 1), value=1)
        batch.cache = self._call(batch.requests, ids, batch.mask, cache)

    def _read(self, batch: Batch, fresh: list[Request]) -> None:
        length = max(len(request.prompt) for request in fresh)
        padding = [[0] * (length - len(request.prompt)) for request in fresh]
        ids = torch.tensor([zeros + request.prompt for zeros, request in zip(padding, fresh, strict=True)])
        mask = torch.tensor([zeros + [1] * len(request.prompt) for zeros, request in zip(padding, fresh, strict=True)])
        batch.join(fresh, mask, self._call(fresh, ids, mask, DynamicCache()))


class Handler(BaseHTTPRequestHandler):
    """Speaks HTTP for an engine."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        """Answer with the adapters' names."""
        self._answer(lambda: {"adapters": list(self.server.engine.served.adapter_names)}, "/adapters")

    def do_POST(self) -> None:
        """Answer with the tokens that follow a prompt."""
        self._answer(self._generate, "/generate")

    def do_PUT(self) -> None:
        """Add an adapter."""
        self._answer(self._add, "/adapters/")

    def do_DELETE(self) -> None:
        """Remove an adapter."""
        self._answer(self._remove, "/adapters/")

    def _generate(self) -> dict[str, object]:
        given = self._body()
        if not isinstance(given.get("prompt"), str):
            raise ValueError(f"prompt must be a text, got {given.get('prompt')!r}")
        prompt, limit = list(given["prompt"].encode()), given.get("max_new_tokens", 32)
        tokens = self.server.engine.submit(prompt, given.get("adapter"), limit).result()
        return {"text": bytes(token & 255 for token in tokens).decode(errors="replace"), "tokens": tokens}

    def _add(self) -> dict[str, object]:
        folder = self._body().get("folder")
        path = (self.server.root / str(folder)).resolve()
        if not isinstance(folder, str) or self.server.root not in path.parents:
            raise ValueError(f"folder must be inside the served folder, got {folder!r}")
        self.server.engine.served.add_adapters({self._name(): path})
        return {"added": self._name()}

    def _remove(self) -> dict[str, object]:
        self.server.engine.remove(self._name())
        return {"removed": self._name()}

    def _name(self) -> str:
        return self.path.removeprefix("/adapters/")

    def _body(self) -> dict[str, object]:
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 < length <= 1 << 20:
            raise ValueError(f"the body must be JSON of 1 byte to 1 MiB, got {length} bytes")
        body = json.loads(self.rfile.read(length))
        if not isinstance(body, dict):
            raise ValueError(f"the body must be a JSON object, got {type(body).__name__}")
        return body

    def _answer(self, function: Callable[[], dict[str, object]], path: str) -> None:
        status, answer = 404, {"error": f"there is no {self.command} {self.path}"}
        if self.path == path or (path.endswith("/") and self.path.startswith(path) and len(self.path) > len(path)):
            try:
                status, answer = 200, function()
            except ValueError as error:
                status, answer = 400, {"error": str(error)}
            except Busy as error:
                status, answer = 503, {"error": str(error)}
            except Exception as error:
                status, answer = 500, {"error": f"{type(error).__name__}: {error}"}
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status != 200:
            # The rest of the request has not been read.
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


class Server(ThreadingHTTPServer):
    """An HTTP server over an engine.

    Args:
        engine: runs the model.
        root: where the folders of new adapters must be.
        port: the port; 0 for any free one.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, engine: Engine, root: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.engine, self.root = engine, root.resolve()


def load(folder: Path, device: str) -> torch.nn.Module:
    """The served model of a folder with ``base/`` and adapters."""
    adapters = {path.parent.name: path.parent for path in sorted(folder.glob("*/adapter_config.json"))}
    if not adapters or not (folder / "base").is_dir():
        raise ValueError(f"{folder} must hold a model in base/ and adapters, as examples/finetune_lora.py writes them")
    return gossamer.serve_adapters(AutoModelForCausalLM.from_pretrained(folder / "base").to(device).eval(), adapters)


def main(arguments: list[str] | None = None) -> int:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-batch", type=int, default=16, help="requests that run at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    engine = Engine(load(options.folder, options.device), options.max_batch)
    with Server(engine, options.folder, options.port) as server:
        names = ", ".join(engine.served.adapter_names)
        print(f"http://127.0.0.1:{server.server_address[1]} serves {names}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            engine.stop()
            print(f"{engine.tokens} tokens in {engine.steps} steps of at most {engine.largest} requests")
    return 0


if __name__ == "__main__":
    sys.exit(main())
