"""Many LoRA adapters over one model, mixed in one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from gossamer.integrations._adapter_files import Factors, read_adapter
from gossamer.integrations._expert_updates import ExpertUpdate, adapter_slots
from gossamer.integrations._linear import plain_linear
from gossamer.nn import expert_factors
from gossamer.ops.dispatch import Dispatch
from gossamer.ops.low_rank import base_linear
from gossamer.ops.multi_low_rank import adapter_dispatch, multi_low_rank

# Arguments of transformers models that hold tokens, (batch, length) or (batch, length, hidden).
_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def _first_tensor(args: tuple, kwargs: dict[str, object]) -> torch.Tensor | None:
    """The argument whose first dimension is the batch."""
    return next((t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.dim()), None)


class _Requests:
    """The adapter of each request of the call that is running, sorted once for each number of rows."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.ids: torch.Tensor | None = None
        self.num_adapters = 0
        self._counts: set[int] = set()
        self._sorted: dict[tuple[int, torch.device], tuple[torch.Tensor, Dispatch]] = {}

    def begin(self, ids: torch.Tensor, num_adapters: int) -> None:
        self.clear()
        self.ids, self.num_adapters = ids, num_adapters
        self._counts = {ids.shape[0]}

    def note(self, shape: torch.Size) -> None:
        """Learn how many rows a whole batch has, from what is known to be ``(batch, length, ...)``."""
        if self.ids is not None and len(shape) > 1 and shape[0] % self.ids.shape[0] == 0:
            self._counts |= {shape[0], shape[:2].numel()}

    def rows(self, shape: torch.Size, device: torch.device) -> tuple[torch.Tensor, Dispatch]:
        """The adapter ``(M,)`` of each of M rows, those of a request adjacent, and the rows sorted by it.

        Raises:
            ValueError: the rows are not those of whole requests, one after the other.
        """
        count, requests = shape.numel(), self.ids.shape[0]
        key = (count, device)
        if requests > 1 and len(shape) > 1:
            if shape[0] % requests:
                raise ValueError(
                    f"adapters cannot be told apart in a layer whose rows {tuple(shape)} are not those of {requests} "
                    "requests, such as a table of positions"
                )
            self._counts.add(count)
        elif requests > 1 and count not in self._counts:
            raise ValueError(
                f"adapters cannot be told apart in a layer of {count} rows: of {requests} requests, "
                f"{sorted(self._counts)} were expected, not some tokens of a batch"
            )
        if key not in self._sorted:
            ids = self.ids.to(device).repeat_interleave(count // requests)
            self._sorted[key] = ids, adapter_dispatch(ids, self.num_adapters)
        return self._sorted[key]


def _dtype(module: nn.Module) -> torch.dtype:
    """What the module computes in; bitsandbytes' layers say it apart from their weight."""
    dtype = next(module.parameters(recurse=False)).dtype
    if dtype.is_floating_point and dtype.itemsize >= 2:
        return dtype
    return getattr(module, "compute_dtype", None) or torch.bfloat16


def _fitted(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with a rank within its matrix: beyond it, one factor becomes the product itself."""
    rank, (n, c) = a.shape[0], (b.shape[0], a.shape[1])
    if rank <= min(n, c):
        return a, b
    product = b.float() @ a.float()
    return (product, torch.eye(n)) if n <= c else (torch.eye(c), product)


def _wide(parts: list[torch.Tensor | None], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensors one behind the other, each in the corner of a zero tensor of ``shape``."""
    bank = torch.zeros(len(parts), *shape, dtype=dtype)
    for row, part in zip(bank, parts, strict=True):
        if part is not None:
            row[tuple(slice(size) for size in part.shape)] = part.to(dtype)
    return bank


class _Bank(nn.Module):
    """The updates of one module by every adapter; a rank of 0 where an adapter leaves it alone."""

    def __init__(self, requests: _Requests, factors: list[Factors | None], module: nn.Module) -> None:
        super().__init__()
        self._requests, dtype = requests, _dtype(module)
        device = next(module.parameters(recurse=False)).device
        self.table = isinstance(module, nn.Embedding)
        pairs = [None if f is None else _fitted(f.a, f.b) for f in factors]
        ranks = [0 if p is None else p[0].shape[0] for p in pairs]
        some, rank = next(p for p in pairs if p is not None), max(ranks)
        # A table's A is stored by row, so that an id reads adjacent elements.
        a = [None if p is None else p[0].T if self.table else p[0] for p in pairs]
        shape = (some[0].shape[1], rank) if self.table else (rank, some[0].shape[1])
        scales = [0.0 if f is None else f.scale for f in factors]
        factor = float(getattr(module, "embed_scale", 1.0)) if self.table else 1.0
        buffers = {
            "a": _wide(a, shape, dtype),
            "b": _wide([p and p[1] for p in pairs], (some[1].shape[0], rank), dtype),
            "scale": torch.tensor(scales, dtype=torch.float32) * factor,
            "ranks": torch.tensor(ranks),
            "bias": None,
        }
        if any(f is not None and f.bias is not None for f in factors):
            biases = [None if f is None or f.bias is None else f.bias.float() * f.scale for f in factors]
            # The last row is that of the id -1.
            buffers["bias"] = _wide([*biases, None], (some[1].shape[0],), dtype)
        for name, buffer in buffers.items():
            self.register_buffer(name, None if buffer is None else buffer.to(device), persistent=False)

    def hook(self, module: nn.Module, args: tuple, kwargs: dict, y: torch.Tensor) -> torch.Tensor | None:
        """The module's output with the updates added, as a forward hook returns it."""
        if self._requests.ids is None:
            return None
        # Another hook may hold the output, and autograd may not let anyone write to it.
        y = y.clone() if torch.is_grad_enabled() or len(module._forward_hooks) > 1 else y
        return self._updated(args[0] if args else next(iter(kwargs.values())), y)

    def forward_of(self, module: nn.Linear, input: torch.Tensor) -> torch.Tensor:
        """The forward of a plain linear layer, whose argument callers may name."""
        if self._requests.ids is None:
            return type(module).forward(module, input)
        rows = input.reshape(-1, input.shape[-1])
        y = base_linear(rows, module.weight, module.bias).view(*input.shape[:-1], module.out_features)
        return self._updated(input, y)

    def _updated(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """``y``, written to, with the updates added."""
        ids, routing = self._requests.rows(x.shape if self.table else y.shape[:-1], y.device)
        if self.table:
            row = x.reshape(-1) + ids.clamp(min=0) * self.a.shape[1]
            x = F.embedding(row, self.a.flatten(0, 1)).view(*y.shape[:-1], -1)
            rank = x.shape[-1]
            a = torch.eye(rank, dtype=x.dtype, device=x.device).expand(self.a.shape[0], rank, rank)
        else:
            x, a = x.to(y.dtype), self.a
        a, b = a.to(y.dtype), self.b.to(y.dtype)
        y = multi_low_rank(x.to(y.dtype), a, b, routing, scale=self.scale, out=y, ranks=self.ranks)
        return y if self.bias is None else y + self.bias.to(y.dtype)[ids].view(y.shape)


class _ExpertsBank(nn.Module):
    """The updates of one experts module by every adapter."""

    def __init__(self, requests: _Requests, factors: dict[str, list[Factors | None]], module: nn.Module) -> None:
        super().__init__()
        self._requests, self.names = requests, tuple(factors)
        for name, of_parameter in factors.items():
            weight = getattr(module, name)
            self.num_experts = weight.shape[0]
            pairs = [f and expert_factors(f.a, f.b.float() * f.scale, self.num_experts) for f in of_parameter]
            some = next(p for p in pairs if p is not None)
            rank = max(p[0].shape[1] for p in pairs if p is not None)
            shapes = (self.num_experts, rank, some[0].shape[2]), (self.num_experts, some[1].shape[1], rank)
            for letter, shape, part in zip("ab", shapes, (0, 1), strict=True):
                bank = _wide([p and p[part] for p in pairs], shape, weight.dtype).flatten(0, 1).to(weight.device)
                self.register_buffer(f"{name}_{letter}", bank, persistent=False)

    def forward_of(
        self, module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The experts module's forward."""
        from gossamer.integrations.transformers import experts_forward

        if self._requests.ids is None:
            return type(module).forward(module, hidden_states, top_k_index, top_k_weights)
        ids, _ = self._requests.rows(hidden_states.shape[:-1], hidden_states.device)
        slots = adapter_slots(ids, top_k_index, self._requests.num_adapters, self.num_experts)
        updates = {n: ExpertUpdate(getattr(self, f"{n}_a"), getattr(self, f"{n}_b"), slots) for n in self.names}
        return experts_forward(module, hidden_states, top_k_index, top_k_weights, updates=updates)


def _check_experts(path: str, module: nn.Module) -> None:
    """The module must be one of transformers' experts modules, in a form that gossamer computes."""
    from gossamer.integrations.transformers import experts_obstacle, is_experts

    reason = experts_obstacle(module) if is_experts(module) else "it is no experts module of transformers"
    if reason is not None:
        raise ValueError(f"adapters update parameters of {path}, a {type(module).__name__}: {reason}")


class ServedModel(nn.Module):
    """A model that serves many LoRA adapters in one batch, each request by its own; made by :func:`serve_adapters`.

    Attributes:
        model: the model itself. Called directly it computes without adapters.
        adapter_names: what requests may name.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, Mapping[tuple[str, str | None], Factors]]) -> None:
        super().__init__()
        self.model, self.adapter_names = model, tuple(adapters)
        self._requests, self._handles, self._replaced = _Requests(), [], []
        modules = dict(model.named_modules())
        self.banks = nn.ModuleList()
        updated: dict[str, set[str]] = {}
        for path, parameter in sorted({key for factors in adapters.values() for key in factors}, key=str):
            updated.setdefault(path, set()).update([] if parameter is None else [parameter])
        for path, parameters in updated.items():
            if parameters:
                _check_experts(path, modules[path])
        for path, parameters in updated.items():
            module = modules[path]
            if parameters:
                given = {n: [f.get((path, n)) for f in adapters.values()] for n in sorted(parameters)}
                bank = _ExpertsBank(self._requests, given, module)
            else:
                bank = _Bank(self._requests, [f.get((path, None)) for f in adapters.values()], module)
            if parameters or plain_linear(module):
                module.forward = partial(bank.forward_of, module)
                self._replaced.append(module)
            else:
                self._handles.append(module.register_forward_hook(bank.hook, with_kwargs=True))
            self.banks.append(bank)
        # generate() calls the model with other lengths than its own arguments have.
        self._handles.append(model.register_forward_pre_hook(self._note, with_kwargs=True))

    def _note(self, model: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
        """Learn the batch's rows from what holds tokens; patches of images, say, may be other rows."""
        for tensor in (_first_tensor(args, kwargs), *(kwargs.get(name) for name in _TOKENS)):
            if isinstance(tensor, torch.Tensor):
                self._requests.note(tensor.shape)

    def _begin(self, adapters: Sequence[str | None], args: tuple, kwargs: dict[str, object]) -> None:
        if isinstance(adapters, str) or not all(name is None or isinstance(name, str) for name in adapters):
            raise TypeError(f"adapters must be a sequence of str or None, got {adapters!r}")
        if unknown := sorted({name for name in adapters if name is not None} - set(self.adapter_names)):
            raise ValueError(f"adapters must be among {list(self.adapter_names)} or None, got {unknown}")
        if not self._handles and not self._replaced:
            raise ValueError("the model no longer serves adapters: close() was called")
        first = _first_tensor(args, kwargs)
        if first is not None and first.shape[0] != len(adapters):
            raise ValueError(
                f"adapters must name one adapter for each of {first.shape[0]} requests, got {len(adapters)}"
            )
        index = {name: position for position, name in enumerate(self.adapter_names)}
        ids = torch.tensor([-1 if name is None else index[name] for name in adapters], dtype=torch.int64)
        if len(adapters):
            device = first.device if first is not None else next(self.model.parameters()).device
            self._requests.begin(ids.to(device), len(index))
            # An encoder may be called before the model is.
            self._note(self.model, args, kwargs)

    def forward(self, *args: object, adapters: Sequence[str | None], **kwargs: object) -> object:
        """The model's output, each request by its own adapter.

        Args:
            *args: of the model; the first tensor's first dimension is the batch.
            adapters: the name of each request's adapter, or None for none.
            **kwargs: of the model.

        Raises:
            TypeError: ``adapters`` is a str or holds something else than str and None.
            ValueError: an unknown adapter, another number of names than requests, or :meth:`close` was called.
        """
        self._begin(adapters, args, kwargs)
        try:
            return self.model(*args, **kwargs)
        finally:
            self._requests.clear()

    def generate(self, *args: object, adapters: Sequence[str | None], **kwargs: object) -> object:
        """The model's ``generate``, each request by its own adapter; its beams and returned sequences share it.

        Raises:
            TypeError: as :meth:`forward`.
            ValueError: as :meth:`forward`.
        """
        self._begin(adapters, args, kwargs)
        try:
            return self.model.generate(*args, **kwargs)
        finally:
            self._requests.clear()

    def close(self) -> None:
        """Take the adapters off the model again; it is then as it was."""
        for handle in self._handles:
            handle.remove()
        for module in self._replaced:
            module.__dict__.pop("forward", None)
        self._handles, self._replaced = [], []


def serve_adapters(model: nn.Module, adapters: Mapping[str, str | Path]) -> ServedModel:
    """Serve many LoRA adapters over one transformers model: every request of a batch names its own, or none.

    The adapters of a layer lie side by side, whatever their ranks, and a batch's rows are sorted by adapter once for
    the whole model; each layer then adds ``scale·(x·Aᵀ)·Bᵀ`` of every row's adapter in one
    :func:`gossamer.multi_low_rank` (after Punica, Chen et al., 2023, and S-LoRA, Sheng et al., 2023). The model's
    weights are shared and unchanged. PEFT need not be installed.

    >>> served = gossamer.serve_adapters(model, {"sql": "adapters/sql", "chat": "adapters/chat"})
    >>> served.generate(input_ids=ids, adapters=["chat", None, "sql"], max_new_tokens=32)

    Args:
        model: a transformers model, or any module; its linear layers, embedding tables and (transformers') experts
            modules may be updated.
        adapters: folders written by PEFT's ``save_pretrained``, with ``adapter_config.json`` and
            ``adapter_model.safetensors``, by the names that requests will use. LoRA and rsLoRA, with ``lora_bias``,
            ``rank_pattern``, ``alpha_pattern`` and ``target_parameters``.

    Returns:
        The :class:`ServedModel`. The factors are in the dtype and on the device of the layer they update.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``, ``adapters`` no mapping, or a name no str.
        ValueError: no adapters; a folder's file is missing, damaged, or a pickle; an option that cannot be served
            beside others (DoRA, saved modules, initialisations that change the base, ...), by name; a tensor that fits
            no module, or not by its size; a model that PEFT has wrapped.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(adapters, Mapping) or not all(isinstance(name, str) for name in adapters):
        raise TypeError(f"adapters must be a mapping from names to folders, got {adapters!r}")
    if not adapters:
        raise ValueError("adapters must name at least one adapter, got none")
    if any(hasattr(module, "peft_config") or hasattr(module, "lora_A") for module in model.modules()):
        raise ValueError(f"model must be without adapters of PEFT, got {type(model).__name__}: unload() them first")
    modules = dict(model.named_modules())
    return ServedModel(model, {name: read_adapter(name, Path(path), modules) for name, path in adapters.items()})
