"""Hostile calls of the public functions: no signal, no result that plain torch contradicts, no error without a name.

``python tests/fuzz/fuzzer.py --cases 50000`` runs so many, each a seed; ``--seed N --cases 1`` repeats one. A case
takes a good call of one target, spoils some of its arguments and runs it in a child process, which is replaced when it
dies.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace

import torch

import gossamer
from gossamer import BlockSparseTensor, BlockTopology

ERRORS = (TypeError, ValueError, IndexError)
# Relative RMS errors that separate rounding from wrong results.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
MEMORY = 6 << 30
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def randn(rng: random.Random, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(2**31))).to(dtype)


def ids(rng: random.Random, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(rng.randrange(2**31)))


def size(rng: random.Random, least: int = 1, most: int = 40) -> int:
    return rng.choice([least, least + 1, rng.randint(least, most)])


def low_rank(rng):
    m, n, c = size(rng, 0), size(rng), size(rng)
    r, dtype = rng.randint(1, min(n, c)), rng.choice(FLOATS)
    weight = randn(rng, n, c, dtype=dtype)
    kind = rng.choice((None, None, gossamer.NF4Weight, gossamer.Int8Weight, gossamer.Float8Weight))
    factor = rng.choice((dtype, torch.float32))
    args = {"x": randn(rng, m, c, dtype=dtype), "weight": weight if kind is None else kind.quantize(weight)}
    args |= {
        "a": randn(rng, r, c, dtype=factor),
        "b": randn(rng, n, r, dtype=factor),
        "scale": rng.choice((0.5, 1, -2.0)),
    }
    bias = randn(rng, n, dtype=dtype) if rng.random() < 0.5 else None
    return gossamer.low_rank_linear, args | {"bias": bias, "dropout": rng.choice((0.0, 0.3)), "seed": 5}


def multi_low_rank(rng):
    m, n, c, adapters = size(rng, 0), size(rng), size(rng), size(rng, 1, 5)
    r = rng.randint(1, min(n, c))
    args = {"x": randn(rng, m, c), "a": randn(rng, adapters, r, c), "b": randn(rng, adapters, n, r)}
    routing = ids(rng, adapters + 1, m) - 1
    args["adapter_ids"] = gossamer.adapter_dispatch(routing, adapters) if rng.random() < 0.5 else routing
    args["scale"] = rng.choice((1.0, randn(rng, adapters).abs()))
    args["ranks"] = rng.choice((None, ids(rng, r + 1, adapters)))
    if rng.random() < 0.5:
        return gossamer.multi_low_rank, args | {"out": rng.choice((None, randn(rng, m, n)))}
    return gossamer.multi_low_rank_linear, args | {
        "weight": randn(rng, n, c),
        "bias": rng.choice((None, randn(rng, n))),
    }


def dispatch(rng):
    experts = size(rng, 1, 9)
    expert_ids = ids(rng, experts + 1, size(rng, 0), rng.randint(1, experts))
    return gossamer.dispatch, {"expert_ids": expert_ids, "num_experts": experts, "max_rows": rng.choice((None, 1000))}


def grouped_matmul(rng):
    t, n, c, experts = size(rng, 0), size(rng), size(rng), size(rng, 1, 6)
    routing = gossamer.dispatch(ids(rng, experts + 1, t, rng.randint(1, experts)), experts)
    dtype = rng.choice(FLOATS)
    args = {"x": randn(rng, t, c, dtype=dtype), "weight": randn(rng, experts, n, c, dtype=dtype), "dispatch": routing}
    return gossamer.grouped_matmul, args | {"bias": rng.choice((None, randn(rng, experts, n, dtype=dtype)))}


def expert_mlp(rng):
    t, h, i, experts = size(rng, 0), size(rng), size(rng, 1, 20), size(rng, 1, 6)
    k, dtype = rng.randint(1, experts), rng.choice(FLOATS)
    args = {"x": randn(rng, t, h, dtype=dtype), "gate_up": randn(rng, experts, 2 * i, h, dtype=dtype)}
    args |= {"down": randn(rng, experts, h, i, dtype=dtype), "weights": randn(rng, t, k, dtype=dtype)}
    return gossamer.expert_mlp, args | {"dispatch": gossamer.dispatch(ids(rng, experts + 1, t, k), experts)}


def block_sparse(rng):
    bm, bn = rng.choice((16, 32)), rng.choice((16, 32))
    rows, cols = bm * rng.randint(0, 4), bn * rng.randint(0, 4)
    topology = BlockTopology.random((rows, cols), (bm, bn), rng.random())
    if rng.random() < 0.3:
        topology, (rows, cols) = topology.transposed(), (cols, rows)
    n, activation = size(rng, 0), rng.choice((None, None, "relu", "silu"))
    values = randn(rng, topology.nnz_blocks, *topology.block)
    kind = rng.randrange(3)
    if kind == 0:
        args = {"a": randn(rng, rows, n), "b": randn(rng, n, cols), "topology": topology}
        return gossamer.sdd, args | {"activation": activation}
    s = BlockSparseTensor(values, topology)
    dense = {"b": randn(rng, cols, n)} if kind == 1 else {"a": randn(rng, n, rows)}
    return (None, gossamer.dsd, gossamer.dds)[kind], {"s": s, **dense, "activation": activation}


def topologies(rng):
    bm, bn, rows, cols = rng.choice((16, 64)), rng.choice((16, 128)), rng.randint(0, 5), rng.randint(0, 5)
    mask = ids(rng, 2, rows, cols).bool()
    kind = rng.randrange(3)
    if kind == 0:
        return BlockTopology.from_mask, {"mask": mask, "block": (bm, bn), "nnz": rng.choice((None, rows * cols + 2))}
    if kind == 1:
        row, col = mask.nonzero().unbind(1)
        args = {"rows": row, "cols": col, "shape": (rows * bm, cols * bn), "block": (bm, bn)}
        return BlockTopology.from_indices, args | {"sort": rng.random() < 0.5}
    _, args = dispatch(rng)
    made = gossamer.dispatch(args["expert_ids"], args["num_experts"])
    return BlockTopology.from_dispatch, {"dispatch": made, "ffn_size": bn * rng.randint(1, 3), "block": (bm, bn)}


def quantised(rng):
    kind = rng.choice((gossamer.NF4Weight, gossamer.Int8Weight, gossamer.Float8Weight))
    options = (
        {"block_size": rng.choice((32, 64, 7)), "double": rng.random() < 0.5} if kind is gossamer.NF4Weight else {}
    )
    return kind.quantize, {"weight": randn(rng, size(rng), size(rng)), **options}


def activate(rng):
    preact = randn(rng, size(rng, 0), 2 * size(rng), dtype=rng.choice(FLOATS))
    return gossamer.activate, {
        "preact": preact,
        "activation": rng.choice(("swiglu", "relu", "geglu", "clamped_swiglu")),
    }


def gather_reduce(rng):
    rows, bags = size(rng), size(rng, 0)
    table, index = randn(rng, rows, size(rng), dtype=rng.choice(FLOATS[:3])), ids(rng, rows, bags, size(rng, 1, 6))
    weights = rng.choice((None, randn(rng, *index.shape)))
    return gossamer.gather_reduce, {"table": table, "index": index, "weights": weights}


TARGETS = (
    low_rank,
    low_rank,
    multi_low_rank,
    dispatch,
    grouped_matmul,
    expert_mlp,
    block_sparse,
    block_sparse,
    topologies,
    quantised,
    activate,
    gather_reduce,
)


def _spread(t: torch.Tensor) -> torch.Tensor:
    return torch.stack([t, t], -1)[..., 0]


def _beyond(t: torch.Tensor) -> torch.Tensor:
    return torch.empty(1, device="meta", dtype=t.dtype).expand(2**31 + 1, *t.shape[1:] or (1,))


def _moved(t: torch.Tensor, value: float, step: int) -> torch.Tensor:
    """``value`` throughout a floating tensor, ``step`` added to integers, the opposite of truth values."""
    if t.dtype in FLOATS:
        return torch.full_like(t, value)
    return ~t if t.dtype == torch.bool else t + step


# What becomes of a tensor: the same values stored otherwise, other values, other kinds.
SPOILED: tuple[Callable[[random.Random, torch.Tensor], object], ...] = (
    lambda rng, t: _spread(t) if t.dim() else t,
    lambda rng, t: t.mT.contiguous().mT if t.dim() >= 2 else t,
    lambda rng, t: t[:1].expand(t.shape) if t.dim() and t.shape[0] else t,
    lambda rng, t: t.to("meta"),
    lambda rng, t: _beyond(t),
    lambda rng, t: t[:0] if t.dim() else t,
    lambda rng, t: t[..., :0] if t.dim() else t,
    lambda rng, t: t[1:] if t.dim() else t,
    lambda rng, t: torch.cat([t, t]) if t.dim() else t,
    lambda rng, t: t.unsqueeze(0),
    lambda rng, t: t.to(rng.choice((*FLOATS, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool))),
    lambda rng, t: _moved(t, torch.nan, -1),
    lambda rng, t: _moved(t, torch.inf, 2**20),
    lambda rng, t: t * 0 if t.dtype in (*FLOATS, torch.int32, torch.int64) else t,
    lambda rng, t: t.flip(0) if t.dim() else t,
    lambda rng, t: t.detach().requires_grad_() if t.dtype in FLOATS else t,
    lambda rng, t: t.to_sparse() if t.dtype in FLOATS else t,
    lambda rng, t: t.tolist(),
    lambda rng, t: None,
    lambda rng, t: "text",
)
OTHERS = (None, -1, 0, 2**31, 2**63, 1.5, float("nan"), True, "text", [1], (16, 16), torch.ones(2))


def spoil(rng: random.Random, value: object) -> tuple[object, str]:
    """Another value in place of one, and the name of the field that it was put into, ``""`` for the value itself."""
    if isinstance(value, torch.Tensor):
        try:
            return rng.choice(SPOILED)(rng, value), ""
        except NotImplementedError:  # torch lacks the operation for the dtype
            return None, ""
    if is_dataclass(value) and not isinstance(value, type) and rng.random() < 0.9:
        field = rng.choice(fields(value)).name
        if rng.random() < 0.15 and isinstance(getattr(value, field), torch.Tensor) and getattr(value, field).numel():
            # A structure that was right when it was made, and whose tensor is written to afterwards.
            tensor = getattr(value, field)
            tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice((-1, 1, 100))
            return value, field
        inner, deeper = spoil(rng, getattr(value, field))
        return replace(value, **{field: inner}), deeper or field
    return rng.choice(OTHERS), ""


def fields_of(value: object) -> Iterator[str]:
    """Names that an error in a structure may speak of."""
    if is_dataclass(value):
        for field in fields(value):
            yield field.name
            yield from fields_of(getattr(value, field.name))


def tensors_of(result: object) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif is_dataclass(result):
        for field in fields(result):
            yield from tensors_of(getattr(result, field.name))
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from tensors_of(part)


def differs(ours: torch.Tensor, theirs: torch.Tensor) -> str | None:
    if (ours.shape, ours.dtype, ours.device) != (theirs.shape, theirs.dtype, theirs.device):
        return (
            f"{tuple(ours.shape)} {ours.dtype} {ours.device}, not {tuple(theirs.shape)} {theirs.dtype} {theirs.device}"
        )
    if ours.device.type == "meta" or not ours.numel():
        return None
    if ours.dtype not in TOLERANCE:
        same = (ours.float() == theirs.float()) | (ours.float().isnan() & theirs.float().isnan())
        return None if same.all() else "other numbers"
    one, other = ours.detach().double(), theirs.detach().double()
    finite = other.isfinite()
    # A dense product has NaN where a sparse one leaves zero times infinity out.
    if (finite & ~one.isfinite()).any():
        return "not finite"
    finite &= one.isfinite()
    one, other = one[finite], other[finite]
    error, scale = float((one - other).norm()), float(other.norm())
    return None if error <= TOLERANCE[ours.dtype] * scale + 1e-30 else f"relative error {error / max(scale, 1e-30):.2g}"


def copied(value: object) -> object:
    """The arguments again, so that one call cannot change what the next sees; structures as they are."""
    return (
        value.clone()
        if isinstance(value, torch.Tensor) and value.device.type == "cpu" and not value.is_sparse
        else value
    )


def attempt(call: Callable, args: dict, backend: str | None) -> object:
    args = {name: copied(value) for name, value in args.items()}
    torch.manual_seed(0)  # of dropout masks that the call draws itself
    if backend is None:
        return call(**args)
    with gossamer.backend(backend):
        return call(**args)


def run(seed: int) -> dict | None:
    """One case; what is wrong with it, or None."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    target = rng.choice(TARGETS)
    call, args = target(rng)
    spoiled = rng.sample(sorted(args), min(len(args), rng.choice((0, 1, 1, 1, 2))))
    names = {"blocks", *args, *(name for value in args.values() for name in fields_of(value))}
    about = {"seed": seed, "call": getattr(call, "__qualname__", str(call)), "spoiled": spoiled}
    try:
        for name in spoiled:
            args[name], field = spoil(rng, args[name])
            about["spoiled"] = [f"{n}.{field}" if n == name and field else n for n in about["spoiled"]]
            names |= {field} if field else set()
        ours = attempt(call, args, None)
    except ERRORS as error:
        # The word itself, or the plural and the parts that a structure names.
        known = re.findall(r"\w+", str(error))
        if any(form in known for name in names for form in (name, name.removesuffix("s"), f"{name}s")):
            return None
        return about | {"kind": "no name", "what": f"{type(error).__name__}: {error}"[:300]}
    except Exception as error:
        if isinstance(error, RuntimeError) and "allocate" in str(error):
            return None
        return about | {"kind": "raw error", "what": f"{type(error).__name__}: {error}"[:300]}
    try:
        theirs = attempt(call, args, "reference")
    except Exception as error:
        if (
            "cannot serve" in str(error)
            or "allocate" in str(error)
            or any(t.device.type == "meta" for t in tensors_of(ours))
        ):
            return None
        return about | {"kind": "accepted", "what": f"plain torch says {type(error).__name__}: {error}"[:300]}
    for one, other in zip(tensors_of(ours), tensors_of(theirs), strict=True):
        if wrong := differs(one, other):
            return about | {"kind": "wrong result", "what": wrong}
    return None


def child(first: int, last: int) -> None:
    """Run the cases of some seeds, a line before each and one after."""
    torch.set_num_threads(1)
    # Sizes that nobody has memory for are refused by the allocator, not by the system.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for seed in range(first, last):
        print(json.dumps({"begin": seed}), flush=True)
        print(json.dumps({"end": run(seed)}), flush=True)


def fuzz(first: int, count: int, report: Callable[[dict], None] = lambda finding: None) -> list[dict]:
    """Run ``count`` cases from seed ``first`` on; returns the findings."""
    findings, seed, end = [], first, first + count
    while seed < end:
        command = [sys.executable, "-W", "ignore", __file__, "--child", str(seed), str(end)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            message = json.loads(line)
            if "begin" in message:
                seed = message["begin"]
            else:
                seed += 1
                if message["end"]:
                    findings.append(message["end"])
                    report(message["end"])
        if process.wait() and seed < end:
            findings.append({"seed": seed, "kind": "died", "what": f"exit status {process.returncode}"})
            report(findings[-1])
            seed += 1
    return findings


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return 0
    findings = fuzz(args.seed, args.cases, lambda finding: print(json.dumps(finding), flush=True))
    print(f"{args.cases} cases, {len(findings)} findings: {dict(Counter(f['kind'] for f in findings))}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
