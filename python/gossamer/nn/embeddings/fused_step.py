"""The base of tables trained in their backward pass: optimizer state in buffers, and its checkpoints."""

from __future__ import annotations

import torch

from gossamer._numerics import accumulation_dtype
from gossamer.nn.embeddings.table import Table, bytes_of, check_lists
from gossamer.nn.replicas import check_alone, is_sharded
from gossamer.ops.composed_rows import Parts
from gossamer.ops.embedding import embedding
from gossamer.ops.gather_compose import gather_compose
from gossamer.ops.gather_compose_step import gather_compose_step
from gossamer.ops.gather_dot import gather_dot, gather_dot_step
from gossamer.ops.gather_reduce import gather_reduce
from gossamer.ops.gather_reduce_step import gather_reduce_step
from gossamer.optim import Optimizer

_PREFIX = "optimizer_"


class FusedStep(torch.nn.Module):
    """A module whose tables, if it has an optimizer, are trained by a step in its backward pass.

    A table is a parameter that requires no gradient, so it can be moved, cast, tied and saved like any other, while its
    ``.grad`` stays None and an optimizer over ``model.parameters()`` ignores it. The optimizer state is in buffers
    named ``optimizer_step``, ``optimizer_sum`` and so on, which are part of the ``state_dict``; with several tables
    they are ``optimizer_<table>_step`` and so on.

    A step uses the gradients as they arrive in the backward pass, before a loss scaler could unscale them or
    ``clip_grad_norm_`` clip them, and only those of this process. ``DistributedDataParallel`` and ``fully_shard`` over
    a table with an optimizer raise a ``ValueError``, unless they are told to ignore it.

    A subclass lists its parameters in :attr:`tables`, calls :meth:`attach` after creating them, and reads them with
    :meth:`rows`, :meth:`bags`, :meth:`dots` and :meth:`composed`.

    Attributes:
        tables: names of the parameters ``(rows, columns)`` that the optimizer steps.
        optimizer: one of :mod:`gossamer.optim`, or None. May be set to another one with the same state, to change a
            hyperparameter.
    """

    tables: tuple[str, ...] = ("weight",)
    optimizer: Optimizer | None = None

    def attach(self, optimizer: Optimizer | None) -> None:
        """Set the optimizer and make its state for every table.

        Raises:
            TypeError: ``optimizer`` is not one of :mod:`gossamer.optim`.
        """
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be one of gossamer.optim, got {type(optimizer).__name__}")
        self.optimizer = optimizer
        if optimizer is None:
            return
        for name in self.tables:
            getattr(self, name).requires_grad_(False)
        for name, tensor in self._fresh_buffers().items():
            self.register_buffer(name, tensor)
        self._new_handle()

    def rows(self, table: str, ids: torch.Tensor) -> torch.Tensor:
        """Rows ``ids (...)`` of one of :attr:`tables`, ``(..., columns)``; with an optimizer, backward steps them."""
        if self.optimizer is None:
            return embedding(getattr(self, table), ids)
        found = gather_reduce_step(getattr(self, table), ids.reshape(-1), None, None, **self._step(table))
        return found.view(*ids.shape, found.shape[-1])

    def bags(
        self,
        table: str,
        ids: torch.Tensor,
        offsets: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        **how: object,
    ) -> torch.Tensor:
        """:func:`gossamer.gather_reduce` of one of :attr:`tables`; with an optimizer, backward steps its rows."""
        check_lists(ids, offsets, weights)
        if self.optimizer is None:
            return gather_reduce(getattr(self, table), ids, offsets, weights, **how)
        return gather_reduce_step(getattr(self, table), ids, offsets, weights, **how, **self._step(table))

    def dots(self, table: str, ids: torch.Tensor, x: torch.Tensor, **how: object) -> torch.Tensor:
        """:func:`gossamer.gather_dot` of one of :attr:`tables`; with an optimizer, backward steps its rows."""
        if self.optimizer is None:
            return gather_dot(getattr(self, table), ids, x, **how)
        return gather_dot_step(getattr(self, table), ids, x, **how, **self._step(table))

    def composed(
        self,
        table: str,
        ids: torch.Tensor,
        parts: Parts,
        offsets: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        **how: object,
    ) -> torch.Tensor:
        """:func:`gossamer.gather_compose` of one of :attr:`tables`; with an optimizer, backward steps its rows."""
        if self.optimizer is None:
            return gather_compose(getattr(self, table), ids, parts, offsets, weights, **how)
        return gather_compose_step(getattr(self, table), ids, parts, offsets, weights, **how, **self._step(table))

    def detach_optimizer(self) -> None:
        """Stop training the tables: drop the optimizer and its state."""
        self.optimizer = None
        for name in [name for name in self._buffers if name.startswith(_PREFIX)]:
            del self._buffers[name]

    def inference_nbytes(self) -> int:
        """Bytes without the optimizer's state."""
        state = [b for name, b in self.named_buffers() if name.split(".")[-1].startswith(_PREFIX)]
        return self.nbytes() - bytes_of(state)

    def freeze(self) -> FusedStep:
        """As for any :class:`Table`; the optimizer and its state are dropped."""
        self.detach_optimizer()
        return super().freeze()

    def _fresh_state(self, table: str) -> dict[str, torch.Tensor]:
        """The optimizer's initial state."""
        weight = getattr(self, table)
        return self.optimizer.state(*weight.shape, weight.device, accumulation_dtype(weight.dtype))

    def _prefix(self, table: str) -> str:
        return _PREFIX if len(self.tables) == 1 else f"{_PREFIX}{table}_"

    def _fresh_buffers(self) -> dict[str, torch.Tensor]:
        device = getattr(self, self.tables[0]).device
        buffers = {}
        for table in self.tables:
            buffers |= {self._prefix(table) + name: tensor for name, tensor in self._fresh_state(table).items()}
        return buffers | {_PREFIX + "algorithm": torch.tensor([self.optimizer.algorithm], device=device)}

    def _reset_state(self) -> None:
        """Reset the optimizer's state, also when its storage is uninitialised, as after ``to_empty()``."""
        if self.optimizer is not None:
            for name, tensor in self._fresh_buffers().items():
                self._buffers[name].copy_(tensor)

    def _new_handle(self) -> None:
        # Not a parameter: it only makes results differentiable.
        device = getattr(self, self.tables[0]).device
        self._handle = torch.zeros(0, device=device, requires_grad=True)

    def __setattr__(self, name: str, value: object) -> None:
        """As for any module; raises an error if ``fully_shard`` replaces the table by this process's shard."""
        if name in self.tables and self.optimizer is not None and is_sharded(value):
            raise ValueError(
                f"optimizer must be None in a sharded model, got {type(self.optimizer).__name__}: the step of "
                f"{type(self).__name__} would change a gathered copy of its {name}, which is thrown away. Leave the "
                "table out by fully_shard's ignored_params"
            )
        super().__setattr__(name, value)

    def _step(self, table: str | None = None) -> dict:
        """The arguments of a lookup that steps a table; raises an error in a replica, which would diverge from the
        others.

        Also raises an error if the table is computed again in each forward pass, so that a step would be lost.
        """
        check_alone(self)
        table = table or self.tables[0]
        if table not in self._parameters:
            raise ValueError(
                f"optimizer must be None where {table} is not a parameter, as under a parametrization or "
                f"pruning, got {type(self.optimizer).__name__}: its steps would be lost"
            )
        names = ("step", *self.optimizer.state_kinds())
        state = {name: getattr(self, self._prefix(table) + name) for name in names}
        return {"handle": self._handle, "optimizer": self.optimizer, "state": state}

    def _apply(self, fn, recurse=True):
        """As for any module, but the optimizer's state keeps the dtype that steps are computed in."""
        states = {k: b for k, b in self._buffers.items() if k.startswith(_PREFIX)} if self.optimizer else {}
        super()._apply(fn, recurse)
        if self.optimizer is not None:
            wide = accumulation_dtype(getattr(self, self.tables[0]).dtype)
            for name, before in states.items():
                after = self._buffers[name]
                if after.is_floating_point() and after.dtype != wide:
                    self._buffers[name] = before.to(after.device, wide)
            self._new_handle()
        return self

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        problems = self._foreign(state_dict, prefix)
        if problems:
            # Either everything is loaded or nothing.
            error_msgs.extend(problems)
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if self.optimizer is not None:
            # Assigned tensors may be on another device than those they replace.
            self._new_handle()

    def _foreign(self, state_dict, prefix) -> list[str]:
        """Why ``state_dict`` does not fit this module: another optimizer's state, or other sizes."""
        found = []
        key = prefix + _PREFIX + "algorithm"
        if self.optimizer is not None and key in state_dict and not state_dict[key].is_meta:
            code = int(state_dict[key])
            if code != self.optimizer.algorithm:
                name = type(self.optimizer).__name__
                found.append(f"{key} says that the state is another optimizer's than {name}'s (code {code})")
        # Missing state, or state for a table without an optimizer, is left to load_state_dict(strict=False).
        mine = {prefix + name for name in self._buffers if name.startswith(_PREFIX)}
        given = {key for key in state_dict if key.startswith(prefix + _PREFIX)}
        if not found and mine and given and mine != given:
            keeps, holds = ", ".join(sorted(mine)), ", ".join(sorted(given))
            found.append(f"the table's optimizer keeps {keeps}, and the state holds {holds}")
        for name, own in (self._parameters | self._buffers).items():
            given = state_dict.get(prefix + name)
            if own is not None and given is not None and given.shape != own.shape:
                found.append(f"{prefix + name} must have shape {tuple(own.shape)}, got {tuple(given.shape)}")
        return found


class FusedTable(FusedStep, Table):
    """A :class:`Table` of one or several parameters that an optimizer steps in the backward pass: :class:`FusedStep`.

    >>> class Sum(gossamer.nn.FusedTable):
    ...     tables = ("first", "second")
    ...
    ...     def __init__(self, num_embeddings, embedding_dim, *, optimizer=None, device=None):
    ...         super().__init__()
    ...         self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
    ...         for name in self.tables:
    ...             setattr(self, name, torch.nn.Parameter(torch.randn(num_embeddings, embedding_dim, device=device)))
    ...         self.attach(optimizer)
    ...
    ...     def lookup(self, ids):
    ...         return self.rows("first", ids) + self.rows("second", ids)
    """
