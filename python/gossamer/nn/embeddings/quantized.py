"""Tables whose rows are integers times a step, in training too."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch

from gossamer._checks import check_device, check_dtype, check_index, check_number, check_shape
from gossamer._row_codes import LEAST_SCALE, encode
from gossamer.nn.embeddings.fused_step import FusedTable
from gossamer.nn.embeddings.table import check_budget
from gossamer.optim import Optimizer

BITS = {8: torch.int8, 16: torch.int16}
STEPS = ("fixed", "learned")
ROUNDINGS = ("stochastic", "nearest")
# For 8 bits; 16 bits use a smaller step with the same range.
STEP_SIZE = 0.01
# Number of elements drawn or rounded at a time, so that no float table of full size is allocated.
_AT_ONCE = 1 << 22


class QuantizedEmbedding(FusedTable):
    """A table of b-bit codes, ``e(x) = Δ·q[x]``, trained without a master copy: every optimizer step rounds to codes.

    The optimizer reads a touched row as ``w = Δ·q``, steps it in float32 to ``w'`` and writes ``clip(w'/Δ)``, rounded
    up or down at random such that the expected value is exact. With ``rounding="nearest"``, steps smaller than Δ/2 have
    no effect. Codes have no gradient: without ``optimizer`` the table is fixed.

    - ``step="fixed"``: one Δ for the table.
    - ``step="learned"``: one Δ per row, which is updated before the row is rounded (ALPT): ``Δ ← max(Δ −
      step_lr/√(B·D·(2^(b−1)−1))·Σ_j g_j·δ_j, 2⁻²⁰)`` with B bags, ``δ_j = round(w'_j/Δ) − w'_j/Δ`` and, where
      ``w'_j/Δ`` is outside the range, the end of the range. g is the gradient of the row's step. The paper computes it
      again at ``round(w'/Δ)·Δ``, in a second pass over the batch of equal cost; g is the same if no step of the batch
      reaches Δ/2.

    Args:
        num_embeddings: N.
        embedding_dim: D.
        bits: b, 8 or 16.
        step: ``"fixed"`` or ``"learned"``.
        step_size: the initial Δ; 0.01 for 8 bits and 0.01/2⁸ for 16 by default, so that vectors reach ±1.28.
        step_lr: learning rate of learned steps.
        rounding: ``"stochastic"``, by the optimizer's ``seed``, or ``"nearest"``; it overrides the optimizer's
            ``stochastic_rounding``.
        mode: how bags are pooled: ``"sum"``, ``"mean"`` or ``"max"``.
        include_last_offset: whether offsets hold the end of the last bag too.
        device: of the table.
        dtype: of the vectors.
        optimizer: one of :mod:`gossamer.optim`, whose step is fused into the backward pass.

    Attributes:
        weight: ``(N, D)`` int8 or int16, a parameter that requires no gradient. It starts as numbers uniform in
            ``±1/√N``, rounded stochastically.
        scale: Δ, a float32 buffer ``(1,)`` or ``(N,)``, which stays float32 when the module is cast.

    Raises:
        TypeError: a size is not an int, a rate or step not a number, ``dtype`` not floating, or ``optimizer`` is not
            one of :mod:`gossamer.optim`.
        ValueError: a size is below 1, ``bits`` are other than 8 or 16, a name is unknown, ``step_size`` is not positive
            or ``step_lr`` negative.

    Source: Gupta et al., "Deep Learning with Limited Numerical Precision", ICML 2015; Li et al., "Adaptive
    Low-Precision Training for Embeddings in Click-Through Rate Prediction", AAAI 2023.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        bits: int = 8,
        step: str = "fixed",
        step_size: float | None = None,
        step_lr: float = 2e-5,
        rounding: str = "stochastic",
        mode: str = "sum",
        include_last_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        super().__init__()
        self._set_up(num_embeddings, embedding_dim, mode, include_last_offset)
        check_device("device", device)
        check_dtype("dtype", dtype)
        if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
            raise ValueError(f"bits must be 8 or 16, got {bits}")
        for name, value, known in (("step", step, STEPS), ("rounding", rounding, ROUNDINGS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        if step_size is None:
            step_size = STEP_SIZE / 2 ** (bits - 8)
        check_number("step_size", step_size)
        check_number("step_lr", step_lr)
        if not LEAST_SCALE <= step_size <= torch.finfo(torch.float32).max:
            raise ValueError(f"step_size must be in [2**-20, 2**128), got {step_size}")
        if not 0 <= step_lr < math.inf:
            raise ValueError(f"step_lr must be in [0, inf), got {step_lr}")
        self.bits, self.step, self.rounding = bits, step, rounding
        self.step_size, self.step_lr = float(step_size), float(step_lr)
        self.dtype = dtype or torch.get_default_dtype()
        codes = torch.empty(num_embeddings, embedding_dim, device=device, dtype=BITS[bits])
        self.weight = torch.nn.Parameter(codes, requires_grad=False)
        steps = num_embeddings if step == "learned" else 1
        self.register_buffer("scale", torch.empty(steps, device=device, dtype=torch.float32))
        self.reset_parameters()
        self.attach(optimizer)

    def __setattr__(self, name: str, value: object) -> None:
        """As for any fused table, but the table sets the optimizer's rounding."""
        if name == "optimizer" and isinstance(value, Optimizer):
            value = dataclasses.replace(value, stochastic_rounding=self.rounding == "stochastic")
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Redraw the codes, set the steps back, and reset the optimizer."""
        bound = self.num_embeddings**-0.5
        self.scale.fill_(self.step_size)

        def drawn(rows: slice) -> torch.Tensor:
            numbers = torch.empty_like(self.weight[rows], dtype=torch.float32).uniform_(-bound, bound)
            limits = torch.iinfo(self.weight.dtype)
            return numbers.div_(self.step_size).add_(torch.rand_like(numbers)).floor_().clamp_(limits.min, limits.max)

        if not self.weight.is_meta:
            self._write(drawn)
        self._reset_state()

    @torch.no_grad()
    def _write(self, codes: Callable[[slice], torch.Tensor]) -> None:
        for rows in self._parts():
            self.weight[rows] = codes(rows)

    def _parts(self) -> Iterator[slice]:
        count = max(_AT_ONCE // self.embedding_dim, 1)
        return (slice(first, first + count) for first in range(0, self.num_embeddings, count))

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors ``(..., D)`` of ``ids (...)``.

        Raises:
            TypeError: ``ids`` is not int32 or int64.
            IndexError: on the CPU, an id outside ``[0, N)``.
        """
        check_index("ids", ids)
        found = self.bags("weight", ids.reshape(-1), scale=self.scale, out_dtype=self.dtype)
        return found.view(*ids.shape, self.embedding_dim)

    def _pool(self, ids: torch.Tensor, *lists: torch.Tensor | None, **how: object) -> torch.Tensor:
        """Codes of sums and means are decoded as they are read."""
        check_index("ids", ids)
        if self.mode == "max":
            return super()._pool(ids, *lists, **how)
        return self.bags("weight", ids, *lists, scale=self.scale, out_dtype=self.dtype, **how)

    def _step(self, table: str | None = None) -> dict:
        return super()._step(table) | {"scale_lr": self.step_lr if self.step == "learned" else 0.0}

    def _apply(self, fn, recurse=True):
        """As for any module, but steps stay float32; a cast changes the dtype of the vectors."""
        before = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = before.to(self.scale.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=before.device)).dtype
        return self

    def _foreign(self, state_dict, prefix) -> list[str]:
        found = super()._foreign(state_dict, prefix)
        given = state_dict.get(prefix + "weight")
        if given is not None and given.dtype != self.weight.dtype:
            found.append(f"{prefix}weight must hold {self.weight.dtype}, got {given.dtype}")
        return found

    def extra_repr(self) -> str:
        """Sizes, bits, the kind of step and the mode, and the optimizer, if any."""
        return self._repr(f"bits={self.bits}", f"step={self.step!r}")

    @classmethod
    def from_budget(cls, num_embeddings: int, embedding_dim: int, nbytes: int, **options: object) -> QuantizedEmbedding:
        """The table with 16 bits if it fits ``nbytes`` bytes, else with 8 bits; raises the errors of
        :meth:`Table.from_budget`.

        With ``bits`` among the options, only that size is considered.
        """
        check_budget(nbytes)

        def make(bits: int, **more: object) -> QuantizedEmbedding:
            return cls(num_embeddings, embedding_dim, **options | {"bits": bits} | more)

        choices = (options["bits"],) if "bits" in options else BITS
        sizes = {bits: make(bits, device="meta").inference_nbytes() for bits in choices}
        cls._check_fits((num_embeddings, embedding_dim), nbytes, min(sizes.values()))
        return make(max(bits for bits, size in sizes.items() if size <= nbytes))

    @classmethod
    def from_table(cls, weight: torch.Tensor, *, nbytes: int | None = None, **options: object) -> QuantizedEmbedding:
        """A table that starts from weights ``(N, D)``, rounded to nearest or, with an optimizer, as its steps round.

        Args:
            weight: finite, floating.
            nbytes: as for :meth:`from_budget`; None if ``bits`` determine the size.
            **options: of the class. Without ``step_size``, the largest entry (of each row with learned steps) gets the
                largest code. Since vectors cannot grow beyond that, Δ is at least the class's default with an
                optimizer.

        Raises:
            TypeError: ``weight`` is not floating, and as the class does.
            ValueError: ``weight`` has another rank or is not finite, and as :meth:`from_budget` does.
        """
        check_shape("weight", weight, (None, None), "(N, D)")
        if not weight.is_floating_point():
            raise TypeError(f"weight must be floating, got {weight.dtype}")
        options = {"device": weight.device, "dtype": weight.dtype} | options
        made = cls(*weight.shape, **options) if nbytes is None else cls.from_budget(*weight.shape, nbytes, **options)
        if made.weight.is_meta:
            return made
        weight = weight.detach().to(made.weight.device)
        if options.get("step_size") is None:
            largest = weight.abs().amax(1) if made.step == "learned" else weight.abs().max().view(1)
            if not largest.isfinite().all():
                raise ValueError("weight must be finite, got NaN or infinity")
            least = LEAST_SCALE if made.optimizer is None else made.step_size
            made.scale.copy_((largest.float() / torch.iinfo(made.weight.dtype).max).clamp(min=least))

        def rounded(rows: slice) -> torch.Tensor:
            part, bits = weight[rows].float(), None
            scale = made.scale if made.scale.shape[0] == 1 else made.scale[rows]
            if made.optimizer is not None and made.rounding == "stochastic":
                bits = torch.randint(2**32, part.shape, device=part.device)
            return encode(part, scale.unsqueeze(1), made.weight.dtype, bits)

        made._write(rounded)
        return made
