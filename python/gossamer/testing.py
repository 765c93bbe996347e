"""Tools for testing sparse layers: errors against float64 truth, and routings that are hard on kernels."""

from __future__ import annotations

import torch

from gossamer._checks import (
    check_device,
    check_floating,
    check_has_numbers,
    check_number,
    check_positive,
    check_seed,
    check_shape,
    check_sizes,
    check_tensor,
)

# Slack of assert_close over the same-dtype computation: a factor, and a part of the dtype's epsilon.
RMS_FACTOR, RMS_EPS = 1.25, 0.25
MAX_FACTOR, MAX_EPS = 1.5, 2.0


def errors(value: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Relative RMS error ``‖value − truth‖ / ‖truth‖`` and maximum error over the RMS of ``truth``, both in float64.

    Args:
        value: any shape and dtype.
        truth: same shape, float64 for a meaningful answer.

    Returns:
        ``(rms, max)``. Both are infinite when the two differ by NaN or infinity, and absolute errors when ``truth`` is
        zero.
    """
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    if value.shape != truth.shape:
        raise ValueError(f"value must have the shape of truth, {tuple(truth.shape)}, got {tuple(value.shape)}")
    if truth.numel() == 0:
        return 0.0, 0.0
    difference = (value - truth).abs()
    if not torch.isfinite(difference).all():
        return float("inf"), float("inf")
    scale = float(truth.square().mean().sqrt()) or 1.0
    return float(difference.square().mean().sqrt()) / scale, float(difference.max()) / scale


def assert_close(actual: torch.Tensor, truth: torch.Tensor, baseline: torch.Tensor, name: str = "result") -> None:
    """Assert that ``actual`` is as close to ``truth`` as ``baseline`` is, up to a small slack.

    The rule: relative RMS error at most 1.25 times the baseline's plus a quarter of the dtype's epsilon, maximum error
    at most 1.5 times the baseline's plus two epsilons (over the RMS of ``truth``).

    Args:
        actual: the tensor under test.
        truth: the float64 reference on the same (upcast) inputs.
        baseline: the plain-torch computation in the dtype of ``actual``.
        name: the name of the tensor in the message.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a tensor is on the meta device.
        AssertionError: ``actual`` breaks the rule; the message gives all four errors.
    """
    for argument, tensor in (("actual", actual), ("truth", truth), ("baseline", baseline)):
        check_tensor(argument, tensor)
        check_has_numbers(argument, tensor)
    if actual.dtype != baseline.dtype or actual.shape != truth.shape:
        raise AssertionError(
            f"{name}: {actual.dtype} {tuple(actual.shape)}, expected {baseline.dtype} {tuple(truth.shape)}"
        )
    eps = torch.finfo(actual.dtype).eps
    rms, worst = errors(actual, truth)
    base_rms, base_worst = errors(baseline, truth)
    if rms > RMS_FACTOR * base_rms + RMS_EPS * eps or worst > MAX_FACTOR * base_worst + MAX_EPS * eps:
        raise AssertionError(
            f"{name}: relative RMS error {rms:.3e} against the baseline's {base_rms:.3e}, maximum {worst:.3e} against "
            f"{base_worst:.3e} ({actual.dtype}, epsilon {eps:.1e})"
        )


def random_expert_ids(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    *,
    skew: str = "uniform",
    popularity: torch.Tensor | None = None,
    dropped: float = 0.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Draw ``(T, K)`` int64 expert ids, distinct within a token.

    Args:
        num_tokens: T.
        num_experts: E.
        top_k: K.
        skew: ``"uniform"``; ``"zipf"``, popularity ``1/(e+1)``; ``"one"``, expert E−1 is every token's first choice;
            ``"few"``, only the first K experts are used.
        popularity: ``(E,)`` relative popularity of each expert, in place of ``skew``.
        dropped: fraction of slots given the id E, "no expert".
        seed: seed of the generator.
        device: device of the result.

    Raises:
        TypeError: a size or the seed is not an int, ``dropped`` not a number, or ``popularity`` not a floating tensor.
        ValueError: a size is too small, K > E, ``skew`` is unknown, ``dropped`` is not in [0, 1], or ``popularity`` is
            not ``(E,)``.
    """
    check_sizes(num_tokens=num_tokens)
    check_positive(num_experts=num_experts, top_k=top_k)
    if top_k > num_experts:
        raise ValueError(f"top_k must be at most num_experts, got top_k={top_k}, num_experts={num_experts}")
    check_seed(seed)
    check_number("dropped", dropped, least=0, most=1)
    check_device("device", device)
    if popularity is not None:
        check_floating("popularity", popularity)
        check_shape("popularity", popularity, (num_experts,), "(E,)")
        check_has_numbers("popularity", popularity)
    generator = torch.Generator().manual_seed(seed)
    known = {
        "uniform": torch.ones(num_experts),
        "zipf": 1.0 / torch.arange(1, num_experts + 1),
        "one": torch.ones(num_experts).index_fill(0, torch.tensor(num_experts - 1), 1e6),
        "few": torch.cat([torch.ones(top_k), torch.zeros(num_experts - top_k)]),
    }
    if not isinstance(skew, str) or skew not in known:
        raise ValueError(f"skew must be one of {sorted(known)}, got {skew!r}")
    if popularity is None:
        popularity = known[skew]
    # Gumbel top-k: sampling without replacement in one vectorised step.
    noise = -torch.empty(num_tokens, num_experts).exponential_(generator=generator).log()
    scores = popularity.log() + noise
    ids = scores.topk(top_k, dim=1).indices
    if dropped:
        ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < dropped, num_experts)
    return ids.to(device)
