"""Train a mixture-of-experts model with transformers' Trainer, resume it, and compare with uninterrupted training.

    python examples/finetune_moe_trainer.py --out runs/moe-trainer

Nothing is downloaded: a small byte-level Qwen3-MoE learns the text of Python's standard library. It is trained for
``--steps`` steps with a checkpoint halfway, and resumed from there in a new model, in two ways: with ``ResumeExperts``,
which ends at the same weights, and by the Trainer alone, which does not load the checkpoint's experts. The losses of
all three go to ``metrics.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
from pathlib import Path

import torch

import gossamer
from gossamer.bench.studies.text import as_bytes, python_files

try:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments, set_seed

    from gossamer.integrations.trainer import ResumeExperts
except ImportError as error:
    sys.exit(f"this example needs {error.name}: pip install 'gossamer[transformers]' accelerate")

VOCABULARY = 256


class Windows(torch.utils.data.Dataset):
    """Consecutive windows of a text's bytes."""

    def __init__(self, text: torch.Tensor, length: int) -> None:
        self.windows = text[: len(text) // length * length].view(-1, length).long()

    def __len__(self) -> int:
        """The number of windows."""
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """A window, which is its own target."""
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def make(options: argparse.Namespace, seed: int) -> Qwen3MoeForCausalLM:
    """A model from the seed, with experts computed by gossamer."""
    torch.manual_seed(seed)
    size = options.hidden_size
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=size,
            moe_intermediate_size=size // 2,
            num_experts=options.experts,
            num_experts_per_tok=2,
            num_hidden_layers=options.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=size // 4,
            max_position_embeddings=options.sequence,
        )
    )
    gossamer.replace(model)
    return model


def train(
    options: argparse.Namespace, folder: Path, *, resume: Path | None = None, mend: bool = True, seed: int = 0
) -> tuple[Qwen3MoeForCausalLM, dict[int, float]]:
    """Train from the start or from a checkpoint; return the model and the loss of each step."""
    model = make(options, seed)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        save_steps=options.steps // 2,
        logging_steps=1,
        per_device_train_batch_size=options.batch,
        learning_rate=options.lr,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=options.device == "cpu",
        seed=0,
    )
    set_seed(0)
    trainer = Trainer(model, arguments, train_dataset=options.data, callbacks=[ResumeExperts()] if mend else [])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model, {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def distance(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """The largest difference of two models' parameters."""
    return max(float((a - b).detach().abs().max()) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def main(arguments: list[str] | None = None) -> int:
    """Train three times and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60, help="an even number; the checkpoint is halfway")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--corpus-bytes", type=int, default=2_000_000)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.steps < 2 or options.steps % 2:
        parser.error(f"--steps must be even and at least 2, got {options.steps}")
    parts, size = [], 0
    for path in python_files(Path(sysconfig.get_path("stdlib"))):
        if size >= options.corpus_bytes:
            break
        parts.append(path.read_bytes())
        size += len(parts[-1])
    options.data = Windows(as_bytes(parts)[: options.corpus_bytes], options.sequence)

    whole, losses = train(options, options.out / "whole")
    checkpoint = options.out / "whole" / f"checkpoint-{options.steps // 2}"
    results = {"at a stretch": {"losses": losses, "largest difference": 0.0}}
    for name, mend in (("resumed with ResumeExperts", True), ("resumed by the Trainer alone", False)):
        # A different seed, so that weights that the checkpoint does not restore are noticed.
        model, losses = train(options, options.out / "resumed", resume=checkpoint, mend=mend, seed=1)
        results[name] = {"losses": losses, "largest difference": distance(model, whole)}
    for name, result in results.items():
        last = result["losses"][options.steps]
        print(f"{name}: last loss {last:.4f}, weights differ by at most {result['largest difference']:.2e}")
    (options.out / "metrics.json").write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
