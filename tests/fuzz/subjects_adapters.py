"""Adapters: many of them served over one model, from folders whose files may say anything."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from draws import ids, randn, size

import gossamer


class Model(torch.nn.Module):
    """An embedding table and two linear layers."""

    def __init__(self, vocabulary: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(vocabulary, hidden, dtype=dtype)
        self.up = torch.nn.Linear(hidden, 2 * hidden, dtype=dtype)
        self.down = torch.nn.Linear(2 * hidden, hidden, bias=False, dtype=dtype)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``(B, T)`` ids to ``(B, T, H)``."""
        x = self.embed(input_ids)
        return x + self.down(torch.nn.functional.silu(self.up(x)))


def _adapter(rng, vocabulary, hidden, dtype):
    """The tensors of one adapter by name, and its config."""
    rank = size(rng, 1, 5)
    shapes = {"embed": (vocabulary, hidden), "up": (hidden, 2 * hidden), "down": (2 * hidden, hidden)}
    tensors = {}
    for name in rng.sample(sorted(shapes), rng.randint(1, 3)):
        inputs, outputs = shapes[name]
        keys = ("lora_embedding_A", "lora_embedding_B") if name == "embed" else ("lora_A.weight", "lora_B.weight")
        tensors[f"base_model.model.{name}.{keys[0]}"] = randn(rng, rank, inputs, dtype=dtype)
        tensors[f"base_model.model.{name}.{keys[1]}"] = randn(rng, outputs, rank, dtype=dtype)
    return tensors, {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "use_rslora": rng.random() < 0.3}


def _serve(vocabulary, hidden, dtype, input_ids, adapters, **files):
    from safetensors.torch import save_file

    model = Model(vocabulary, hidden, dtype)
    names = sorted({name.partition("_")[0] for name in files})
    with tempfile.TemporaryDirectory() as root:
        for name in names:
            folder = Path(root, name)
            folder.mkdir()
            (folder / "adapter_config.json").write_text(json.dumps(files[f"{name}_config"], default=str))
            tensors = {
                key: value.detach().contiguous().clone()
                for key, value in files[f"{name}_tensors"].items()
                if isinstance(value, torch.Tensor) and value.device.type == "cpu" and not value.is_sparse
            }
            save_file(tensors, folder / "adapter_model.safetensors")
        served = gossamer.serve_adapters(model, {name: Path(root, name) for name in names})
    with torch.no_grad():
        y = served(input_ids, adapters=adapters)
        if isinstance(adapters, list) and len(adapters) > 1:
            # A request's rows must not depend on where in the batch it lies.
            back = served(input_ids.flip(0), adapters=adapters[::-1]).flip(0)
            if not torch.allclose(y.double(), back.double(), 1e-2, 1e-2, equal_nan=True):
                raise AssertionError("a request's answer follows its place in the batch")
        served.close()
        return y, model(input_ids)


def served(rng):
    vocabulary, hidden = size(rng, 2, 20), size(rng, 2, 12)
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float64))
    args = {"vocabulary": vocabulary, "hidden": hidden, "dtype": dtype}
    names = ["one", "two"][: rng.randint(1, 2)]
    for name in names:
        tensors, config = _adapter(rng, vocabulary, hidden, rng.choice((dtype, None)))
        args |= {f"{name}_tensors": tensors, f"{name}_config": config}
    requests = size(rng, 0, 5)
    args["adapters"] = [rng.choice((None, *names)) for _ in range(requests)]
    args["input_ids"] = ids(rng, vocabulary, requests, size(rng, 1, 4))

    def call(**args):
        return _serve(**args)

    call.__qualname__ = "serve_adapters"
    call.signature = ["adapter"]
    # What is the model's own.
    call.fixed = ("vocabulary", "hidden", "dtype", "input_ids")
    return call, args


SUBJECTS = (served,)
