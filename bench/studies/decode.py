"""Tokens per second of a small mixture-of-experts model of transformers, and where the time of a step goes."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

import gossamer
from gossamer.bench.harness.study import Case, Metric, Outcome, Report, Study, Unfit
from gossamer.nn import QuantizedLinear
from gossamer.ops._weights import WHOLE_FORMATS
from gossamer.ops.quantized_expert_weight import FORMATS

EAGER, GROUPED, FLOAT = "transformers eager", "transformers grouped_mm", "gossamer"
ROWS = " with int8 rows"
PARTS = ("experts", "linears", "attention")


@dataclass(frozen=True)
class Settings:
    """The sizes of the model, whose weights are random, and the work of a run.

    Attributes:
        hidden_size: H.
        intermediate_size: I of an expert.
        num_experts: E of a layer.
        top_k: K.
        layers: number of layers.
        heads: attention heads; half as many for keys and values.
        vocabulary: number of tokens in the vocabulary.
        dtype: dtype of the weights before they are quantised.
        prompt: tokens per prefill.
        prefills: number of timed prefills, of which the fastest counts.
        steps: timed steps of decoding after a prompt, of which the median counts.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    layers: int
    heads: int
    vocabulary: int
    dtype: str
    prompt: int
    prefills: int
    steps: int


def make_model(seed: int, settings: Settings) -> nn.Module:
    """A Qwen3-MoE model of random weights.

    Raises:
        Unfit: transformers is not installed.
    """
    try:
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    except ImportError:
        raise Unfit("needs transformers: pip install 'gossamer[transformers]'") from None
    config = Qwen3MoeConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        moe_intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads // 2,
        head_dim=settings.hidden_size // settings.heads,
        num_experts=settings.num_experts,
        num_experts_per_tok=settings.top_k,
        max_position_embeddings=settings.prompt + settings.steps + 1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, settings.dtype))
    try:
        return Qwen3MoeForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def prepare(name: str, model: nn.Module) -> None:
    """Make the model use the implementation and weight format that a case's name says."""
    if name in (EAGER, GROUPED):
        model.set_experts_implementation(name.split()[1])
        return
    gossamer.replace(model)
    if name != FLOAT:
        weight_format, *rounded = name.removeprefix(f"{FLOAT} ").split(ROWS)
        activations = "int8" if rounded else "float"
        gossamer.quantize_experts(model, weight_format, include_linears=True, activations=activations)


class Stopwatch:
    """Measures time by part of a model. Linear layers inside attention count as linear layers, not as attention."""

    def __init__(self, model: nn.Module) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._open: list[list[float]] = []
        self._handles = []
        for path, module in model.named_modules():
            part = self._part(path, module)
            if part is not None:
                self._handles.append(module.register_forward_pre_hook(self._enter))
                self._handles.append(module.register_forward_hook(functools.partial(self._leave, part)))

    @staticmethod
    def _part(path: str, module: nn.Module) -> str | None:
        if path.endswith(".experts"):
            return "experts"
        if path.endswith(".self_attn"):
            return "attention"
        return "linears" if isinstance(module, nn.Linear | QuantizedLinear) else None

    def _enter(self, *_: object) -> None:
        self._open.append([time.perf_counter(), 0.0])

    def _leave(self, part: str, *_: object) -> None:
        began, inner = self._open.pop()
        spent = time.perf_counter() - began
        self.seconds[part] += spent - inner
        if self._open:
            self._open[-1][1] += spent

    def remove(self) -> None:
        """Restore the model."""
        for handle in self._handles:
            handle.remove()


@contextlib.contextmanager
def stopwatch(model: nn.Module) -> Iterator[Stopwatch]:
    """A context with a stopwatch on the model."""
    watch = Stopwatch(model)
    try:
        yield watch
    finally:
        watch.remove()


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Generation:
    """Greedy decoding after a prompt, a step at a time."""

    def __init__(self, model: nn.Module, prompt: torch.Tensor) -> None:
        self.model, self.cache, self.tokens = model, None, prompt
        # The name of the cache argument depends on the version of transformers.
        self._name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def step(self) -> torch.Tensor:
        """Take the next token greedily, and return its logits ``(1, V)``."""
        found = self.model(self.tokens, **{self._name: self.cache}, use_cache=True, logits_to_keep=1)
        self.cache, logits = getattr(found, self._name), found.logits[:, -1]
        self.tokens = logits.argmax(-1, keepdim=True)
        return logits


@functools.cache
def _float_logits(seed: int, settings: Settings) -> torch.Tensor:
    """The logits of transformers' plain loop over experts for the prompt."""
    model = make_model(seed, settings)
    prepare(EAGER, model)
    return model(_prompt(seed, settings), logits_to_keep=1).logits[:, -1].float()


def _prompt(seed: int, settings: Settings) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(settings.vocabulary, (1, settings.prompt), generator=generator)


@torch.inference_mode()
def run(name: str, seed: int, settings: Settings, report: Report) -> Outcome:
    """One implementation and format: prefill, decoding, then decoding again under a stopwatch."""
    truth = _float_logits(seed, settings)
    model = make_model(seed, settings)
    # Counted before quantisation, which packs two 4-bit codes into one element and adds scales.
    parameters = sum(p.numel() for p in model.parameters())
    prepare(name, model)
    gc.collect()
    prompt = _prompt(seed, settings)
    generation = Generation(model, prompt)
    error = ((generation.step().float() - truth).norm() / truth.norm()).item()
    report(0.3, "prefill")
    prefill = min(_seconds(Generation(model, prompt).step) for _ in range(settings.prefills))
    report(0.5, "decoding")
    step = statistics.median(_seconds(generation.step) for _ in range(settings.steps))
    generation = Generation(model, prompt)
    generation.step()
    report(0.8, "decoding under a stopwatch")
    with stopwatch(model) as watch:
        whole = sum(_seconds(generation.step) for _ in range(settings.steps))
    shares = {part: seconds / whole for part, seconds in watch.seconds.items()}
    weights = [*model.parameters(), *model.buffers()]
    metrics = {
        "step_ms": step * 1e3,
        "decode": 1 / step,
        "prefill": settings.prompt / prefill,
        "megabytes": sum(w.nbytes for w in weights) / 1e6,
        "error": error,
        **shares,
        "framework": 1 - sum(shares.values()),
    }
    return Outcome(parameters=parameters, metrics=metrics)


def cases() -> list[Case]:
    """Two implementations of transformers, gossamer in float, and gossamer with each format of quantised weights."""
    plain = [Case(EAGER, "float"), Case(GROUPED, "float"), Case(FLOAT, "float")]
    exact = [Case(f"{FLOAT} {f}", "quantised", "experts and linear layers") for f in FORMATS]
    rounded = [
        Case(f"{FLOAT} {f}{ROWS}", "quantised", "experts and linear layers, with rows rounded to 8 bits too")
        for f in WHOLE_FORMATS
    ]
    return plain + exact + rounded


STUDY = Study(
    name="decode",
    title="Decoding a small mixture-of-experts model",
    question="How long does a token take, in which part of the model, in float and with quantised weights?",
    baseline=EAGER,
    headline="step_ms",
    metrics=(
        Metric("step_ms", "ms a token", 2),
        Metric("decode", "tokens a second, decoding", 1),
        Metric("prefill", "tokens a second, prefill", 0),
        Metric("experts", "share of experts", 2),
        Metric("linears", "share of other linear layers", 2),
        Metric("attention", "share of attention", 2),
        Metric("framework", "share of all else", 2),
        Metric("megabytes", "MB of weights", 0),
        Metric("error", "relative error of logits", 4),
    ),
    x_label="",
    y_label="",
    cases=cases,
    settings={
        "quick": Settings(512, 256, 64, 4, 3, 8, 8192, "bfloat16", prompt=128, prefills=2, steps=12),
        "full": Settings(1024, 512, 64, 8, 6, 16, 32768, "bfloat16", prompt=512, prefills=3, steps=64),
    },
    seeds={"quick": 1, "full": 3},
    run=run,
)
