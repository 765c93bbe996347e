"""Training with a moving choice of blocks at a constant budget: SET, RigL and the rule of DSL."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable

import torch
from torch import nn

from gossamer._checks import check_number, check_positive, check_seed
from gossamer.nn.linear.block_sparse import BlockSparseLinear, highest, move_blocks_
from gossamer.nn.replicas import is_sharded
from gossamer.nn.schedules import ConstantSchedule, CosineSchedule, Schedule

# rule -> (fraction at the start and at the end; whether new blocks follow the gradient; whether the optimizer's step of
# that iteration is skipped)
RULES: dict[str, tuple[float, float, bool, bool]] = {
    "set": (0.3, 0.0, False, True),
    "rigl": (0.3, 0.0, True, True),
    "dsl": (0.5, 0.005, True, False),
}


def moved_mask(mask: torch.Tensor, norms: torch.Tensor, growth: torch.Tensor, count: int) -> torch.Tensor:
    """Drop the ``count`` blocks of smallest norm, then grow the ``count`` blocks of highest growth score.

    Every block that is not kept can be grown, including one just dropped. Among equal scores the first is dropped, or
    grown.

    Args:
        mask: bool, where the blocks are.
        norms: float of the same shape; read where ``mask`` is True.
        growth: float of the same shape, not negative.
        count: at most the number of blocks.

    Returns:
        A mask with as many blocks as ``mask``.
    """
    # Positions without a block rank last, so that they are never dropped.
    dropped = highest((-norms).masked_fill(~mask, -math.inf), count)
    kept = mask & ~dropped
    return kept | highest(growth.masked_fill(kept, -1.0), count)


def _check_whole(layers: list[BlockSparseLinear]) -> None:
    if any(is_sharded(layer.values) for layer in layers):
        raise ValueError("the values of block-sparse layers must be whole to move, got those of a sharded model")


class PruneAndRegrow:
    """Moves the blocks of :class:`BlockSparseLinear` layers while they train; each layer keeps its number of blocks.

    Every ``every`` steps before ``until``, each layer drops ``k`` of its ``n`` blocks, those of smallest Frobenius
    norm, and grows k others, which start at zero. With ``f(t) = f_end + (f_0 − f_end)/2·(1 + cos(π·t/until))``:

    ===========  ==========================================================================================
    ``"set"``    k = ⌊n·f(t)⌋, grown at random (SET, Mocanu et al., 2018); f from 0.3 to 0
    ``"rigl"``   k = ⌊n·f(t)⌋, grown where ``‖G_b‖`` of the dense gradient is largest (RigL, Evci et al., 2020);
                 f from 0.3 to 0
    ``"dsl"``    k = ⌈n·f(t)⌉, grown by ``‖G_b‖``, after the optimizer's step (DSL, Wang et al.); f from 0.5 to 0.005
    ===========  ==========================================================================================

    In ``"set"`` and ``"rigl"`` the move replaces the optimizer's step of that iteration. A block that is dropped and
    grown in one move keeps its values. Optimizer state stored by block moves along: kept blocks keep their moments, new
    ones start at zero. No dense weight, moment or lasting dense gradient is stored: norms of ``G_b`` are computed from
    bands of ``dyᵀ·x``, only in steps that move blocks, and for these inputs and output gradients are kept until the end
    of the step. Frozen layers, and layers that no backward pass reached in such a step, stay unchanged.

    >>> moves = gossamer.nn.PruneAndRegrow(model, optimizer, rule="rigl", every=100, until=25_000)
    >>> for batch in batches:
    ...     optimizer.zero_grad()
    ...     loss(model, batch).backward()
    ...     moves.step()  # in place of optimizer.step()

    Args:
        model: a module that contains such layers, or an iterable of layers.
        optimizer: the optimizer of their parameters.
        rule: ``"set"``, ``"rigl"`` or ``"dsl"``.
        every: number of steps between moves.
        until: the step from which on nothing moves.
        fraction: f_0, in [0, 1]; the rule's by default.
        final_fraction: f_end, in [0, 1]; the rule's by default.
        anneal: ``"cosine"``; ``"constant"`` for f_0 throughout; or a :class:`Schedule` whose ``density(t)`` is f(t).
        seed: seed of the choices of ``"set"``, which are the same on every device.

    Raises:
        TypeError: ``model`` is something else, or a number is not an int.
        ValueError: ``model`` has no block-sparse linear layer, a number is out of range, a name is unknown, a layer's
            values are sharded, or a rule that follows the gradient is used with several processes; each process sees
            only its own batch's gradient, so they would move different blocks.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[BlockSparseLinear],
        optimizer: torch.optim.Optimizer,
        *,
        rule: str = "rigl",
        every: int = 100,
        until: int,
        fraction: float | None = None,
        final_fraction: float | None = None,
        anneal: str | Schedule = "cosine",
        seed: int = 0,
    ) -> None:
        check_positive(every=every, until=until)
        if not isinstance(rule, str) or rule not in RULES:
            raise ValueError(f"rule must be one of {sorted(RULES)}, got {rule!r}")
        if not isinstance(anneal, Schedule) and anneal not in ("cosine", "constant"):
            if not isinstance(anneal, str):
                raise TypeError(f"anneal must be a str or a gossamer.nn.Schedule, got {type(anneal).__name__}")
            raise ValueError(f"anneal must be 'cosine' or 'constant', got {anneal!r}")
        if isinstance(anneal, Schedule) and (fraction, final_fraction) != (None, None):
            raise ValueError("fraction and final_fraction must be None beside a Schedule, which gives the fractions")
        first, last, self._by_gradient, self._instead = RULES[rule]
        self.fraction = first if fraction is None else fraction
        self.final_fraction = last if final_fraction is None else final_fraction
        for name in ("fraction", "final_fraction"):
            check_number(name, getattr(self, name), least=0, most=1)
        check_seed(seed)
        if not isinstance(model, (nn.Module, Iterable)) or isinstance(model, torch.Tensor):
            raise TypeError(f"model must be a torch.nn.Module or layers of one, got {type(model).__name__}")
        if not callable(getattr(optimizer, "step", None)) or not hasattr(optimizer, "state"):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        modules = model.modules() if isinstance(model, nn.Module) else model
        self.layers = [layer for layer in modules if isinstance(layer, BlockSparseLinear)]
        if not self.layers:
            raise ValueError(f"model must hold BlockSparseLinear layers, got none in {type(model).__name__}")
        _check_whole(self.layers)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self._by_gradient and distributed and torch.distributed.get_world_size() > 1:
            raise ValueError(f"rule {rule!r} needs one process, got {torch.distributed.get_world_size()}: take 'set'")
        self.optimizer, self.rule, self.every, self.until, self.anneal = optimizer, rule, every, until, anneal
        self._generator = torch.Generator().manual_seed(seed)
        self._steps = 0
        self._observe()

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return self._steps

    @property
    def due(self) -> bool:
        """Whether the coming step moves blocks."""
        t = self._steps + 1
        return t % self.every == 0 and t < self.until

    @property
    def schedule(self) -> Schedule:
        """The schedule f(t)."""
        if isinstance(self.anneal, Schedule):
            return self.anneal
        if self.anneal == "constant":
            return ConstantSchedule(self.fraction)
        return CosineSchedule(self.fraction, self.final_fraction, self.until)

    def fraction_at(self, t: int) -> float:
        """f(t), the share of a layer's blocks that a move at step t changes.

        Raises:
            ValueError: a schedule of one's own gives a share outside [0, 1].
        """
        share = self.schedule.density(t)
        if not isinstance(share, numbers.Real) or not 0 <= share <= 1:
            raise ValueError(f"anneal must give shares from 0 to 1, got {share} at step {t}")
        return share

    def step(self, optimizer_step: Callable[[], object] | None = None) -> bool:
        """Take the optimizer's step, move blocks, or both, depending on the rule.

        Args:
            optimizer_step: replaces ``optimizer.step``, such as ``lambda: scaler.step(optimizer)``. When "set" or
                "rigl" moves blocks it is not called, and ``scaler.update()`` must not be called either.

        Returns:
            Whether blocks moved.

        Raises:
            ValueError: as :meth:`move` does.
        """
        due = self.due
        if not (due and self._instead):
            (optimizer_step or self.optimizer.step)()
        if due:
            self.move()
        self._steps += 1
        self._observe()
        return due

    def _observe(self) -> None:
        if self._by_gradient:
            for layer in self.layers:
                layer.observe_gradient(self.due)

    @torch.no_grad()
    def move(self) -> None:
        """Move the blocks of every layer now, by the share of the next step; :meth:`step` calls it when it is due.

        Raises:
            ValueError: the rule follows the gradient and the step is not one that observed it, the optimizer keeps
                state of these layers that is not stored by block, or a layer's values are sharded.
        """
        _check_whole(self.layers)
        share = self.fraction_at(self._steps + 1)
        for layer in self.layers:
            if not layer.values.requires_grad:
                continue
            growth = layer.gradient_norms() if self._by_gradient else self._random(layer)
            if growth is None:
                continue
            blocks = layer.values.shape[0]
            # Rounding of a product such as 10 · 0.3 must not change its integer part.
            exact = round(blocks * share, 9)
            count = min(math.ceil(exact) if self.rule == "dsl" else math.floor(exact), blocks)
            states = self._stored_by_block(layer)
            source = layer.change_topology(moved_mask(layer.block_mask, self._norms(layer), growth, count))
            for state in states:
                move_blocks_(state, source)

    def _stored_by_block(self, layer: BlockSparseLinear) -> list[torch.Tensor]:
        state = self.optimizer.state.get(layer.values, {})
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        for name, value in tensors.items():
            if value.shape != layer.values.shape and value.numel() != 1:
                raise ValueError(
                    f"the optimizer's {name} of a block-sparse weight must be stored by block, of shape "
                    f"{tuple(layer.values.shape)}, to move along, got {tuple(value.shape)}"
                )
        return [value for value in tensors.values() if value.shape == layer.values.shape]

    @staticmethod
    def _norms(layer: BlockSparseLinear) -> torch.Tensor:
        places = layer.topology.flat_places()
        values = layer.values.flatten(1).float()
        norms = values.new_zeros(layer.block_mask.numel())
        return norms.scatter(0, places, torch.linalg.vector_norm(values, dim=1)).view_as(layer.block_mask)

    def _random(self, layer: BlockSparseLinear) -> torch.Tensor:
        shape, device = layer.block_mask.shape, layer.values.device
        return torch.rand(shape, generator=self._generator, device="cpu", dtype=torch.float32).to(device)

    def state_dict(self) -> dict[str, object]:
        """The number of steps and the state of the random choices. The positions of blocks are in the model's state."""
        return {"steps": self._steps, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from :meth:`state_dict`."""
        self._steps = state["steps"]
        self._generator.set_state(state["generator"])
        self._observe()
