"""Balance without a loss: a bias on the choice of experts, which follows their counts."""

from __future__ import annotations

import torch
import torch.distributed as dist

from gossamer._checks import check_index, check_number, check_same_device, check_shape, check_written
from gossamer.nn.moe.losses.totals import kept_tokens, slot_counts, sum_over_ranks
from gossamer.nn.moe.routing import Routing


def expert_counts(
    routing: Routing, *, mask: torch.Tensor | None = None, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """``(E,)`` int64: slots given to each expert by the tokens that count, as :func:`update_expert_bias` takes them.

    Args:
        routing: of any router.
        mask: as in :func:`load_balance_loss`.
        group: process group over whose ranks they are summed.

    Raises:
        TypeError: ``routing`` is not a Routing, or ``group`` is not a process group.
        ValueError: a mask of another size or device.
    """
    if not isinstance(routing, Routing):
        raise TypeError(f"routing must be a Routing, got {type(routing).__name__}")
    counts = slot_counts(kept_tokens(mask, routing.expert_ids), routing).long()
    return sum_over_ranks(counts, group, counts)


def update_expert_bias(bias: torch.Tensor, counts: torch.Tensor, rate: float) -> torch.Tensor:
    """Move a correction bias towards balance, in place: ``b_e += rate · sign(mean(c) − c_e)``.

    This is the auxiliary-loss-free balancing of Wang et al. (2024) and DeepSeek-V3. Call it after each training step
    with the counts of that step's whole batch. :func:`expert_counts` excludes padding and sums over data-parallel
    ranks, so that all ranks move their bias equally. The comparison is exact, in integers; there is no gradient. It may
    run between a forward pass and its backward pass.

    Args:
        bias: ``(E,)`` float32 or float64, such as ``SigmoidRouter.e_score_correction_bias``; overwritten.
        counts: ``(E,)`` int32 or int64, slots given to each expert, such as :attr:`Routing.counts`.
        rate: the step, at least 0; 1e-3 in DeepSeek-V3.

    Returns:
        ``bias``.

    Raises:
        TypeError: ``counts`` does not hold integers, or ``bias`` is narrower than float32, where such steps round away.
        ValueError: shapes or devices differ, or ``rate`` is negative or not finite.
    """
    check_shape("bias", bias, (None,), "(E,)")
    if bias.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"bias must be float32 or float64, got {bias.dtype}, in which small steps round away")
    check_written("bias", bias)
    check_shape("counts", counts, tuple(bias.shape), "(E,)")
    check_index("counts", counts)
    check_same_device(bias=bias, counts=counts)
    check_number("rate", rate, least=0, finite=True)
    with torch.no_grad():
        counts = counts.long()
        direction = (counts.sum() - counts.numel() * counts).sign()
        return bias.add_(direction.to(bias.dtype) * rate)
