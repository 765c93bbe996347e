"""Shared by the low-rank layers: ranks and scales, initial factors, row norms, merging, optimizer groups."""

from __future__ import annotations

import math

import torch
from torch import nn

from gossamer._autocast import no_autocast
from gossamer._checks import check_fits, check_number, check_scale
from gossamer._numerics import accumulation_dtype

INITS = ("kaiming", "gaussian", "spectral")

# Number of a weight's elements that a norm or a merge holds in float32 at a time.
_CHUNK = 1 << 22


def check_rank(rank: int, rows: int, columns: int, name: str = "rank") -> None:
    """``rank`` must be an int in ``[1, min(rows, columns)]``."""
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"{name} must be an int, got {type(rank).__name__}")
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(f"{name} must be in [1, {min(rows, columns)}] for a {rows} x {columns} matrix, got {rank}")


def checked_alpha(alpha: float | None, rank: int) -> float:
    """α, by default r; it must be finite, in float32 too, in which products are scaled."""
    name, value = ("rank", rank) if alpha is None else ("alpha", alpha)
    check_number(name, value, finite=True)
    check_fits(name, value, torch.float32)
    return float(value)


def check_dropout(dropout: float) -> None:
    """``dropout`` must be a probability below 1."""
    check_number("dropout", dropout)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")


def check_init(init: str) -> None:
    """``init`` must be one of :data:`INITS`."""
    if init not in INITS:
        raise ValueError(f"init must be one of {INITS}, got {init!r}")


def lora_scale(alpha: float, rank: int, rank_stabilized: bool) -> float:
    """α/r of LoRA (Hu et al., 2021), or α/√r of rsLoRA (Kalajdzievski, 2023)."""
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


@torch.no_grad()
def spectral_factors(weight: torch.Tensor, rank: int, *, ones: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors ``v (..., r, I)`` and ``u (..., O, r)`` of the best approximation of rank r: ``u·v = U_r·Σ_r·V_rᵀ``.

    The singular values are split evenly, ``u = U_r·√Σ_r`` and ``v = √Σ_r·V_rᵀ``; with ``ones`` they are replaced by 1.
    """
    u, s, vh = torch.linalg.svd(weight.detach().to(accumulation_dtype(weight.dtype)), full_matrices=False)
    root = torch.ones_like(s[..., :rank]) if ones else s[..., :rank].sqrt()
    return root.unsqueeze(-1) * vh[..., :rank, :], u[..., :rank] * root.unsqueeze(-2)


@torch.no_grad()
def spectral_split_(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """PiSSA (Meng et al., 2024): write the principal part of ``weight`` into the factors and keep the residual.

    ``scale·b·a`` becomes the best approximation of rank r, and ``weight`` its residual.
    """
    if not scale > 0:
        raise ValueError(f"alpha must be above 0 for init='spectral', whose factors it divides, got a scale of {scale}")
    v, u = spectral_factors(weight, a.shape[-2])
    root = math.sqrt(scale)
    a.copy_(v / root)
    b.copy_(u / root)
    # The rounded factors are subtracted, so that the sum equals the old weight up to one rounding.
    wide = weight.to(v.dtype)
    with no_autocast(weight.device):
        weight.copy_(wide - scale * (b.to(v.dtype) @ a.to(v.dtype)))


@torch.no_grad()
def draw_factors_(a: torch.Tensor, b: torch.Tensor, init: str) -> None:
    """LoRA's initial factors: ``b`` zero, ``a`` uniform in ±1/√I for ``"kaiming"``, N(0, 1/r²) for ``"gaussian"``."""
    if init == "gaussian":
        nn.init.normal_(a, std=1 / a.shape[-2])
    else:
        nn.init.uniform_(a, -(a.shape[-1] ** -0.5), a.shape[-1] ** -0.5)
    nn.init.zeros_(b)


def _row_chunks(weight: torch.Tensor) -> list[slice]:
    rows, step = weight.shape[0], max(_CHUNK // max(weight.shape[1], 1), 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


@torch.no_grad()
def row_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """``‖weight[o] + scale·(b·a)[o]‖₂ (O,)`` in float32 (float64 for float64), never holding the whole sum."""
    wide = accumulation_dtype(weight.dtype)
    a, b = a.to(wide), b.to(wide)
    with no_autocast(weight.device):
        norms = [
            torch.linalg.vector_norm(torch.addmm(weight[rows].to(wide), b[rows], a, alpha=scale), dim=1)
            for rows in _row_chunks(weight)
        ]
    return torch.cat(norms) if norms else weight.new_zeros(0, dtype=wide)


@torch.no_grad()
def add_low_rank_(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, gain: torch.Tensor | None = None
) -> None:
    """``weight ← gain ⊙ (weight + scale·b·a)`` in place, rounded once; ``gain (O,)`` scales rows."""
    wide = accumulation_dtype(weight.dtype)
    a, b = a.to(wide), b.to(wide)
    with no_autocast(weight.device):
        for rows in _row_chunks(weight):
            total = torch.addmm(weight[rows].to(wide), b[rows], a, alpha=scale)
            weight[rows] = total if gain is None else total * gain[rows, None].to(wide)


def lora_plus_groups(
    module: nn.Module,
    lr: float,
    *,
    ratio: float = 16.0,
    embedding_lr: float = 1e-6,
    weight_decay: float = 0.0,
) -> list[dict[str, object]]:
    """Optimizer groups of LoRA+ (Hayou et al., 2024): B learns ``ratio`` times as fast as A.

    Works on gossamer's layers and on PEFT models. Parameters that need no gradient are left out, and so are empty
    groups.

    Args:
        module: holds the trainable parameters.
        lr: η of A and of every parameter that no other group takes.
        ratio: η_B/η_A, at least 1. B and every parameter of one dimension learn at ``ratio·lr``.
        embedding_lr: of both factors on embedding tables.
        weight_decay: of all groups but that of the biases and norms, which has none.

    Returns:
        Up to four groups for a ``torch.optim`` optimizer, in the order A, embedding, B, B without decay; each has a
        ``"name"``.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.
        ValueError: ``ratio`` below 1, a negative rate or decay, or no trainable parameter.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    check_number("ratio", ratio, least=1)
    for name, value in (("lr", lr), ("embedding_lr", embedding_lr), ("weight_decay", weight_decay)):
        # torch's optimizers take rates in tensors, too.
        check_number(name, check_scale(name, value), least=0)
    groups: dict[str, list[nn.Parameter]] = {"lora_A": [], "embedding": [], "lora_B": [], "lora_B_no_decay": []}
    seen: set[int] = set()
    for owner_name, owner in module.named_modules():
        is_norm = "norm" in type(owner).__name__.lower()
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            path = f"{owner_name}.{name}"
            if "lora_embedding_" in path:
                groups["embedding"].append(parameter)
            elif "lora_B" in path or parameter.dim() == 1:
                groups["lora_B_no_decay" if is_norm or "bias" in name else "lora_B"].append(parameter)
            else:
                groups["lora_A"].append(parameter)
    if not seen:
        raise ValueError("module must have a parameter that requires a gradient, got none")
    rates = {"lora_A": lr, "embedding": embedding_lr, "lora_B": ratio * lr, "lora_B_no_decay": ratio * lr}
    return [
        {
            "name": name,
            "params": params,
            "lr": rates[name],
            "weight_decay": 0.0 if name == "lora_B_no_decay" else weight_decay,
        }
        for name, params in groups.items()
        if params
    ]
