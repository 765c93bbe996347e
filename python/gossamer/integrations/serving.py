"""Many LoRA adapters over one model, mixed in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from gossamer.integrations._adapter_banks import AdapterFactors, Bank, Call, ExpertsBank, Table, make_table
from gossamer.integrations._adapter_files import read_adapter
from gossamer.integrations._calls import Running, Slot, in_backward, scope
from gossamer.integrations._linear import plain_linear
from gossamer.integrations.surgery import check_model

# Arguments of transformers models that hold tokens, (batch, length) or (batch, length, hidden).
_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def _first_tensor(args: tuple, kwargs: dict[str, object]) -> torch.Tensor | None:
    """The argument whose first dimension is the batch."""
    return next((t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.dim()), None)


class _Route:
    """Gives a served module the running call and its adapters' factors."""

    def __init__(self, slot: Slot, path: str) -> None:
        self.slot, self.path = slot, path
        self.had_gradients = False

    def bank(self) -> tuple[Call | None, Bank | ExpertsBank | None]:
        """The running call and the factors to add here; (None, None) outside calls.

        Raises:
            ValueError: a backward pass recomputes the layer, after the end of the call whose requests it needs.
        """
        call = self.slot.get()
        if call is None:
            if self.had_gradients and in_backward():
                raise ValueError(
                    f"{self.path} cannot be computed again in a backward pass, as gradient checkpointing does: which "
                    "adapters its requests had is known during their call only; use torch.no_grad() or no checkpointing"
                )
            return None, None
        if not torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled():
            self.had_gradients = True
        return call, call.table.banks.get(self.path)


def _served_forward(route: _Route, module: nn.Module, *args: object, **kwargs: object) -> torch.Tensor:
    call, bank = route.bank()
    return type(module).forward(module, *args, **kwargs) if bank is None else bank(call, module, *args, **kwargs)


def _served_hook(
    route: _Route, module: nn.Module, args: tuple, kwargs: dict[str, object], y: torch.Tensor
) -> torch.Tensor | None:
    call, bank = route.bank()
    return None if bank is None else bank.after(call, module, args, kwargs, y)


def _note_rows(slot: Slot, model: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
    """Record the batch's rows from arguments that hold tokens; others, such as image patches, may have other rows."""
    if (call := slot.get()) is None:
        return
    for tensor in (_first_tensor(args, kwargs), *(kwargs.get(name) for name in _TOKENS)):
        if isinstance(tensor, torch.Tensor):
            call.note(tensor.shape)


class ServedModel(nn.Module):
    """A model that serves many LoRA adapters in one batch, one per request; made by :func:`serve_adapters`.

    Threads may call one served model at the same time, while others add and remove adapters: each call has its own
    adapters.

    Attributes:
        model: the model itself. Called directly it computes without adapters.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, AdapterFactors]) -> None:
        super().__init__()
        self.model = model
        self._slot, self._running = Slot(), Running()
        self._handles, self._replaced = {}, {}
        self.banks = nn.ModuleList()
        # generate() calls the model with other lengths than those of its own arguments.
        self._handles[""] = model.register_forward_pre_hook(partial(_note_rows, self._slot), with_kwargs=True)
        try:
            self._use(make_table(dict(model.named_modules()), adapters))
        except BaseException:
            self.close()
            raise

    def _use(self, table: Table) -> None:
        """Use this table in calls that start from now on."""
        modules = dict(self.model.named_modules())
        for path, bank in table.banks.items():
            if f"{path}." in self._handles or path in self._replaced:
                continue
            module, route = modules[path], _Route(self._slot, path)
            if isinstance(bank, ExpertsBank) or plain_linear(module):
                module.forward = partial(_served_forward, route, module)
                self._replaced[path] = module
            else:
                hook = partial(_served_hook, route)
                self._handles[f"{path}."] = module.register_forward_hook(hook, with_kwargs=True)
        # Registered, so that they move with the model.
        self.banks = nn.ModuleList(table.banks.values())
        self._table = table

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The names that requests may currently use."""
        return self._table.names

    def add_adapters(self, adapters: Mapping[str, str | Path]) -> None:
        """Serve more adapters, under new names. Running calls keep the adapters they started with.

        The factors of all adapters are stored again; the old factors are freed when the last call that uses them ends.

        Args:
            adapters: as in :func:`serve_adapters`.

        Raises:
            TypeError: as :func:`serve_adapters`.
            ValueError: as :func:`serve_adapters`; a name is served already; :meth:`close` was called.
        """
        _check_adapters(adapters)
        self._check_open()
        modules = dict(self.model.named_modules())
        read = {name: read_adapter(name, Path(path), modules) for name, path in adapters.items()}
        with self._running.change():
            if known := sorted(read.keys() & self._table.factors.keys()):
                raise ValueError(
                    f"adapters must have new names, got {known}, which are served already: remove them first"
                )
            self._check_open()
            self._use(make_table(modules, {**self._table.factors, **read}))

    def remove_adapters(self, names: Iterable[str]) -> None:
        """Stop serving these adapters. Running calls keep them until they end.

        Raises:
            TypeError: ``names`` is a str, or holds something else.
            ValueError: a name is unknown, or :meth:`close` was called.
        """
        iterable = isinstance(names, Iterable) and not isinstance(names, (str, torch.Tensor))
        if not iterable or not all(isinstance(n, str) for n in names):
            raise TypeError(f"names must be an iterable of str, got {names!r}")
        names = set(names)
        with self._running.change():
            self._check_open()
            if unknown := sorted(names - self._table.factors.keys()):
                raise ValueError(f"names must be among {list(self.adapter_names)}, got {unknown}")
            kept = {name: factors for name, factors in self._table.factors.items() if name not in names}
            self._use(make_table(dict(self.model.named_modules()), kept))

    def _check_open(self) -> None:
        if not self._handles:
            raise ValueError("the model no longer serves adapters: close() was called")

    def _begin(self, adapters: Sequence[str | None], args: tuple, kwargs: dict[str, object]) -> Call | None:
        if (
            not isinstance(adapters, Sequence)
            or isinstance(adapters, str)
            or not all(name is None or isinstance(name, str) for name in adapters)
        ):
            raise TypeError(f"adapters must be a sequence of str or None, got {adapters!r}")
        table = self._table
        if unknown := sorted({name for name in adapters if name is not None} - set(table.names)):
            raise ValueError(f"adapters must be among {list(table.names)} or None, got {unknown}")
        self._check_open()
        first = _first_tensor(args, kwargs)
        if first is not None and first.shape[0] != len(adapters):
            raise ValueError(
                f"adapters must name one adapter for each of {first.shape[0]} requests, got {len(adapters)}"
            )
        if not adapters:
            return None
        index = {name: position for position, name in enumerate(table.names)}
        ids = torch.tensor([-1 if name is None else index[name] for name in adapters], dtype=torch.int64)
        device = first.device if first is not None else next(self.model.parameters()).device
        return Call(ids.to(device), table)

    def _run(
        self, function: Callable, adapters: Sequence[str | None], args: tuple, kwargs: dict[str, object]
    ) -> object:
        with self._running.call(), scope():
            self._slot.assign(self._begin(adapters, args, kwargs))
            # An encoder may be called before the model.
            _note_rows(self._slot, self.model, args, kwargs)
            return function(*args, **kwargs)

    def forward(self, *args: object, adapters: Sequence[str | None], **kwargs: object) -> object:
        """The model's output, computing each request with its own adapter.

        Args:
            *args: arguments of the model; the first tensor's first dimension is the batch.
            adapters: the name of each request's adapter, or None for none.
            **kwargs: arguments of the model.

        Raises:
            TypeError: ``adapters`` is a str or holds something else than str and None.
            ValueError: an unknown adapter, another number of names than requests, or :meth:`close` was called.
        """
        return self._run(self.model, adapters, args, kwargs)

    def generate(self, *args: object, adapters: Sequence[str | None], **kwargs: object) -> object:
        """The model's ``generate``, with one adapter per request, shared by its beams and returned sequences.

        Raises:
            TypeError: as :meth:`forward`.
            ValueError: as :meth:`forward`.
        """
        return self._run(self.model.generate, adapters, args, kwargs)

    def close(self) -> None:
        """Remove the adapters from the model once running calls have ended, which restores it.

        Raises:
            ValueError: called from inside a call, as by a streamer.
        """
        if self._slot.get() is not None:
            raise ValueError("close() must not be called during a call of the same thread, whose end it waits for")
        with self._running.none():
            for handle in self._handles.values():
                handle.remove()
            for module in self._replaced.values():
                module.__dict__.pop("forward", None)
            self._handles, self._replaced = {}, {}

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise ValueError(
            "a model that serves adapters cannot be copied by torch.nn.DataParallel, whose copies would share the "
            "requests of a call: serve from one process for each device"
        )


def _check_adapters(adapters: object) -> None:
    if not isinstance(adapters, Mapping) or not all(isinstance(name, str) for name in adapters):
        raise TypeError(f"adapters must be a mapping from names to folders, got {adapters!r}")
    if not adapters:
        raise ValueError("adapters must name at least one adapter, got none")


def serve_adapters(model: nn.Module, adapters: Mapping[str, str | Path]) -> ServedModel:
    """Serve many LoRA adapters over one transformers model: each request of a batch names its adapter, or none.

    The adapters of a layer are stored side by side, whatever their ranks, and a batch's rows are sorted by adapter once
    for the whole model; each layer then adds ``scale·(x·Aᵀ)·Bᵀ`` of every row's adapter in one
    :func:`gossamer.multi_low_rank` (after Punica, Chen et al., 2023, and S-LoRA, Sheng et al., 2023). The model's
    weights are shared and unchanged. PEFT need not be installed. Threads may share the served model, and
    :meth:`ServedModel.add_adapters` and :meth:`ServedModel.remove_adapters` work while calls run.

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
        TypeError: ``model`` is not a ``torch.nn.Module``, ``adapters`` no mapping, or a name no str.
        ValueError: there are no adapters; a file is missing, damaged or a pickle; an adapter sets an option that cannot
            be served beside others (DoRA, saved modules, initialisations that change the base, ...), which the message
            names; a tensor belongs to no module or has the wrong size; or PEFT has wrapped the model, it serves
            adapters already, or ``torch.nn.DataParallel`` copies it.
    """
    check_model(model)
    _check_adapters(adapters)
    if isinstance(model, ServedModel) or any(
        isinstance(hook, partial) and hook.func is _note_rows
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
    ):
        raise ValueError(
            f"model must not serve adapters already, got {type(model).__name__}: use add_adapters of its ServedModel, "
            "or close() it"
        )
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise ValueError("model must be without torch.nn.DataParallel, whose copies would share the requests of a call")
    if any(hasattr(module, "peft_config") or hasattr(module, "lora_A") for module in model.modules()):
        raise ValueError(f"model must be without adapters of PEFT, got {type(model).__name__}: unload() them first")
    modules = dict(model.named_modules())
    return ServedModel(model, {name: read_adapter(name, Path(path), modules) for name, path in adapters.items()})
