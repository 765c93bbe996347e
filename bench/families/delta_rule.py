"""The delta rule: prefill, training, packs and decoding, beside plain torch and other people's kernels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

import gossamer
from gossamer.bench.harness.case import (
    DENSE,
    DTYPES,
    OURS,
    REFERENCE,
    Case,
    Family,
    FloatGate,
    Outputs,
    Request,
    Variant,
)
from gossamer.bench.harness.cost import Cost, nbytes
from gossamer.bench.harness.peers import Peer, Unavailable, attribute, gather, import_module
from gossamer.ops import _delta_rule_reference as plain

# B sequences of T tokens (N > 1: one batch of N sequences in a pack), HK key heads and H value heads of D channels, G
# decays per head: 0 for none, 1, or D for one per channel. T = 1 is decoding.
SYMBOLS = ("B", "T", "HK", "H", "D", "G", "N")
SHAPES = {
    "qwen3-next": (1, 8192, 16, 32, 128, 1, 1),
    "kimi-linear": (1, 8192, 32, 32, 128, 128, 1),
    "qwen3-next-decode": (64, 1, 16, 32, 128, 1, 1),
    "cpu-gated": (1, 4096, 4, 8, 128, 1, 1),
    "cpu-short": (1, 1024, 4, 8, 128, 1, 1),
    "cpu-channels": (1, 1024, 8, 8, 128, 128, 1),
    "cpu-plain": (1, 2048, 8, 8, 64, 0, 1),
    "cpu-packed": (1, 4096, 4, 8, 128, 1, 9),
    "cpu-decode": (1, 1, 4, 8, 128, 1, 1),
    "cpu-decode-batch": (32, 1, 4, 8, 128, 1, 1),
}
DEFAULTS = {
    "cpu": ("cpu-gated", "cpu-channels", "cpu-plain", "cpu-packed", "cpu-decode", "cpu-decode-batch"),
    "cuda": ("qwen3-next", "kimi-linear", "qwen3-next-decode"),
}
QUICK = {"cpu": "cpu-short", "cuda": "qwen3-next"}
CHUNK = plain.CHUNK
# The most bytes of states that the graph of a loop over tokens may hold.
LOOP_BYTES = 1 << 30
# Errors of transformers' fallback pass up to this multiple of plain torch's; in float32 they are 2 to 3 times as large.
FALLBACK_ERROR = 4.0


@dataclass(frozen=True)
class Problem:
    """Operands in the case's dtype, and decays and states in the accumulator's.

    For decoding, the state is one that a step does not change.
    """

    operands: Mapping[str, torch.Tensor | None]
    state: torch.Tensor | None
    bounds: torch.Tensor | None
    dy: torch.Tensor
    both: bool

    @property
    def decodes(self) -> bool:
        """Whether the case computes one token from a state, without gradients."""
        return self.dy.shape[1] == 1 and not self.both

    def leaves(self) -> dict[str, torch.Tensor]:
        """Copies of the operands that take gradients."""
        return {f"d{n}": x.detach().clone().requires_grad_() for n, x in self.operands.items() if x is not None}

    def variant(self, name: str, role: str, call: Callable[..., torch.Tensor], gate: str | None = "truth") -> Variant:
        """A variant that computes ``call(q, k, v, beta, g)``; ``g`` is None without a decay."""
        leaves = self.leaves()
        tensors = [leaves.get(f"d{name}") for name in ("q", "k", "v", "beta", "g")]
        return Variant(name, role, lambda: call(*tensors), leaves, self.dy, gate=gate)

    def in_torch(self, compute: Callable, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
        """A form of the delta rule in plain torch."""
        state = None if self.state is None else self.state.to(plain.accumulator(dtype))

        def call(q, k, v, beta, g=None):
            options = (q.shape[-1] ** -0.5, None, True, False)
            return compute(plain.DeltaRule(q, k, v, beta, g, None, None, state, self.bounds, *options))[0]

        return call

    def outputs(self, dtype: torch.dtype) -> Outputs:
        """Output and gradients by plain torch in chunks."""
        call = self.in_torch(plain.chunked, dtype)
        leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in self.leaves().items()}
        wide = plain.accumulator(dtype)
        leaves = {name: x.detach().to(wide).requires_grad_() if name == "dg" else x for name, x in leaves.items()}
        y = call(*leaves.values())
        if not self.both:
            return {"y": y.detach()}
        return {
            "y": y.detach(),
            **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), self.dy.to(dtype)), strict=True)),
        }


def make_problem(request: Request) -> Problem:
    """Draw the tensors of a case; decays and learning rates are those of a model at the start of training."""
    b, t, key_heads, heads, size, decays, sequences = (request.sizes[s] for s in SYMBOLS)
    device, dtype, both = request.device, DTYPES[request.dtype], request.direction == "both"
    generator = torch.Generator(device).manual_seed(request.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    q, k, v = normal(b, t, key_heads, size), normal(b, t, key_heads, size), normal(b, t, heads, size)
    beta, g, state, bounds = normal(b, t, heads).sigmoid(), None, None, None
    if decays:
        g = -torch.nn.functional.softplus(normal(b, t, heads) if decays == 1 else normal(b, t, heads, size)) / 2
    if sequences > 1:
        cuts = torch.randint(0, t + 1, (sequences - 1,), generator=generator, device=device).sort().values
        bounds = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), t)])
    if t == 1 and not both:
        # With β = 1 and no decay, no call changes a state that already holds the value of the key.
        beta, g = torch.ones_like(beta), None if g is None else torch.zeros_like(g)
        unit = k / k.norm(dim=-1, keepdim=True)
        unit = unit.to(dtype).float().repeat_interleave(heads // key_heads, 2)[:, 0]
        unit = unit / unit.square().sum(-1, keepdim=True).add(plain.L2_EPS).sqrt()
        state = normal(b, heads, size, size)
        held = (unit.unsqueeze(2) @ state).squeeze(2)
        state += unit.unsqueeze(3) * (v.to(dtype).float()[:, 0] - held).unsqueeze(2)
    operands = {name: x.to(dtype) for name, x in (("q", q), ("k", k), ("v", v), ("beta", beta))}
    return Problem(operands | ({} if g is None else {"g": g}), state, bounds, normal(b, t, heads, size).to(dtype), both)


def _ours(problem: Problem) -> Callable[..., torch.Tensor]:
    if problem.decodes:
        state = problem.state.clone()

        def step(q, k, v, beta, g=None):
            q, k, v, beta, g = (x if x is None else x.squeeze(1) for x in (q, k, v, beta, g))
            return gossamer.delta_rule_step(q, k, v, beta, state, g=g, use_qk_l2norm=True).unsqueeze(1)

        return step

    def call(q, k, v, beta, g=None):
        return gossamer.delta_rule(q, k, v, beta, g=g, cu_seqlens=problem.bounds, use_qk_l2norm=True)[0]

    return call


def _recurrence(name: str, role: str, problem: Problem) -> Variant:
    b, t, heads, size = problem.dy.shape
    if problem.both and 16 * b * t * heads * size * size > LOOP_BYTES:
        raise Unavailable("the graph of its loop over tokens would keep a state for each")
    return problem.variant(name, role, problem.in_torch(plain.recurrent, problem.dy.dtype))


def _by_sequence(problem: Problem, call: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """If sequences are packed, call once per sequence."""
    if problem.bounds is None:
        return call
    bounds = problem.bounds.tolist()
    spans = [(begin, end) for begin, end in itertools.pairwise(bounds) if end > begin]
    return lambda *operands: torch.cat([call(*(x[:, b:e] for x in operands)) for b, e in spans], 1)


def transformers(name: str, role: str, problem: Problem) -> Variant:
    """The computation of transformers' models without other packages."""
    if "g" not in problem.operands:
        raise Unavailable("transformers has no model without decays")
    by_channel = problem.operands["g"].dim() == 4
    model = "kimi_linear" if by_channel else "qwen3_next"
    module = import_module(f"transformers.models.{model}.modeling_{model}", "transformers")
    forms = (
        ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
        if by_channel
        else ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
    )
    function = attribute(module, forms[problem.decodes], "transformers")
    if by_channel and problem.operands["q"].shape[2] != problem.dy.shape[2]:
        raise Unavailable("transformers has no grouped heads with decays by channel")

    def call(q, k, v, beta, g):
        options = {"output_final_state": problem.decodes, "use_qk_l2norm_in_kernel": True}
        return function(q, k, v, g=g, beta=beta, initial_state=problem.state, **options)[0]

    return problem.variant(name, role, _by_sequence(problem, call), gate="fallback")


def flash_linear_attention(name: str, role: str, problem: Problem) -> Variant:
    """The Triton kernels of flash-linear-attention."""
    g = problem.operands.get("g")
    stem = "delta_rule" if g is None else "kda" if g.dim() == 4 else "gated_delta_rule"
    module = import_module(f"fla.ops.{stem}", "flash-linear-attention")
    function = attribute(
        module, f"{'fused_recurrent' if problem.decodes else 'chunk'}_{stem}", "flash-linear-attention"
    )

    def call(q, k, v, beta, g=None):
        options = {} if g is None else {"g": g}
        options |= {"initial_state": problem.state, "use_qk_l2norm_in_kernel": True, "cu_seqlens": problem.bounds}
        return function(q, k, v, beta=beta, **options)[0]

    return problem.variant(name, role, call)


# `gossamer profile` takes the first that can run: a profile of the loop over tokens has millions of events.
PEERS = (
    Peer("transformers' fallback", "transformers", "transformers", transformers, REFERENCE),
    Peer("recurrence", None, "torch", _recurrence, REFERENCE),
    Peer("flash-linear-attention", "fla", "flash-linear-attention", flash_linear_attention, cuda_only=True),
)


def work(sizes: Mapping[str, int], both: bool) -> float:
    """FLOPs of the chunked form; a triangle counts as half a square, and recomputation does not count."""
    b, t, key_heads, heads, size = (sizes[s] for s in SYMBOLS[:5])
    square, triangle = size * size, min(t, CHUNK) * size
    flops = heads * (6.0 * square + 2.0 * triangle) + key_heads * 2.0 * triangle
    return b * t * (flops + (heads * (12.0 * square + 8.0 * triangle) if both else 0.0))


def build(request: Request) -> Case:
    """Build :func:`gossamer.delta_rule`, or ``delta_rule_step`` for decoding, beside the same chunks in plain torch."""
    problem = make_problem(request)
    ours = problem.variant("gossamer", OURS, _ours(problem))
    in_chunks = problem.in_torch(plain.recurrent if problem.decodes else plain.chunked, problem.dy.dtype)
    dense = problem.variant("plain torch", DENSE, in_chunks)
    peers, skipped = gather(PEERS, request, problem)
    truth = functools.cache(lambda: FloatGate(problem.outputs(torch.float64), problem.outputs(problem.dy.dtype)))
    gates = {"truth": truth, "fallback": lambda: replace(truth(), multiple=FALLBACK_ERROR)}
    operands = nbytes(*problem.operands.values())
    moved = operands + nbytes(problem.dy) + 2.0 * nbytes(problem.state)
    if request.direction == "both":
        moved += 2.0 * operands + nbytes(problem.dy)
    return Case(
        "delta_rule",
        request.shape,
        request.sizes,
        request.dtype,
        request.device,
        request.direction,
        (ours, dense, *peers),
        skipped,
        work(request.sizes, request.direction == "both"),
        moved,
        gates,
        "every output, whole",
    )


def rule(sizes: Mapping[str, int]) -> str | None:
    """The reason why a shape is invalid, or None."""
    if sizes["H"] % sizes["HK"]:
        return f"H must be a multiple of HK, got H={sizes['H']} and HK={sizes['HK']}"
    if sizes["G"] not in (0, 1, sizes["D"]):
        return f"G must be 0, 1 or D, got G={sizes['G']} and D={sizes['D']}"
    if sizes["N"] > 1 and sizes["B"] > 1:
        return f"a pack of N sequences has B = 1, got N={sizes['N']} and B={sizes['B']}"
    return None


def _of_call(call: Mapping[str, object], both: bool) -> float:
    q, v = call["args_q"], call["args_v"]
    b, t, key_heads, size = q.shape
    sizes = dict(zip(SYMBOLS, (b, t, key_heads, v.shape[2], size), strict=False))
    return work(sizes, True) - work(sizes, False) if both else work(sizes, False)


def cost(call: Mapping[str, object], result: object) -> Cost:
    """The cost of a forward pass: work of the chunked form, bytes of operands and results."""
    names = ("args_q", "args_k", "args_v", "args_beta", "args_g", "args_initial_state")
    return Cost(_of_call(call, False), nbytes(*map(call.get, names), *result))


def cost_backward(call: Mapping[str, object], result: object) -> Cost:
    """The cost of the gradients, without recomputation."""
    named = {name.removeprefix("forward_"): value for name, value in call.items()}
    names = ("args_q", "args_k", "args_v", "args_beta", "args_g", "checkpoints", "d_o")
    return Cost(_of_call(named, True), nbytes(*map(named.get, names), *result))


def cost_step(call: Mapping[str, object], result: object) -> Cost:
    """The cost of a step: the state is read and written once."""
    state = call["initial_state"]
    return Cost(6.0 * state.numel(), 2.0 * nbytes(state) + nbytes(call["q"], call["k"], call["v"], call["g"], result))


COSTS = {
    "gossamer::delta_rule": cost,
    "gossamer::delta_rule_backward": cost_backward,
    "gossamer::delta_rule_step": cost_step,
}
DIMENSIONS = {"batch": "B", "tokens": "T", "heads": "H", "channels": "D", "sequences": "N"}
FAMILY = Family(
    "delta_rule",
    SHAPES,
    SYMBOLS,
    DEFAULTS,
    QUICK,
    build,
    skews=("uniform",),
    dimensions=DIMENSIONS,
    work=("B", "T", "D", "G"),
    peers=PEERS,
    rule=rule,
)


def bench_delta_rule(measured):
    """Entry point of pytest-benchmark."""
    measured()
