"""The Trainer example, and the callback by which a resumed Trainer gets the experts of its checkpoint."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")

import transformers
from safetensors.torch import load_file, save_file

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = {"--steps": 6, "--hidden-size": 32, "--layers": 2, "--experts": 3, "--sequence": 16, "--batch": 4,
        "--corpus-bytes": 20_000, "--device": "cpu"}  # fmt: skip


@pytest.fixture(scope="module")
def example():
    """The example's module."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("finetune_moe_trainer")
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def finished(example, tmp_path_factory):
    """The folder of a tiny run."""
    out = tmp_path_factory.mktemp("trainer")
    assert example.main(["--out", str(out), *(str(part) for pair in TINY.items() for part in pair)]) == 0
    return out


def test_a_resumed_run_ends_where_one_at_a_stretch_does(finished):
    results = json.loads((finished / "metrics.json").read_text())
    whole, mended, alone = results.values()
    assert list(mended["losses"]) == list(whole["losses"])
    assert mended["losses"] == whole["losses"]
    assert mended["largest difference"] == 0.0
    # Without the callback the Trainer goes on with other experts.
    assert alone["largest difference"] > 1e-2 and alone["losses"]["4"] != whole["losses"]["4"]


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.arange(index, index + 6)
        return {"input_ids": ids, "labels": ids}


def trainer_of(model, folder, **options):
    from gossamer.integrations.trainer import ResumeExperts

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True,
        per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, **options,
    )  # fmt: skip
    return transformers.Trainer(
        model, arguments, train_dataset=Data(), eval_dataset=Data(), callbacks=[ResumeExperts()]
    )


def make(cls, config, seed, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return cls(config(**sizes, num_key_value_heads=2, num_experts_per_tok=2, **options))


CASES = {
    "mixtral": lambda seed: make(
        transformers.MixtralForCausalLM, transformers.MixtralConfig, seed, num_local_experts=3, intermediate_size=8
    ),
    "tied": lambda seed: make(
        transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig, seed, num_experts=3, moe_intermediate_size=8,
        tie_word_embeddings=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_checkpoints_are_resumed_whole(name, tmp_path):
    """With every parameter of the checkpoint, under any implementation; the best model is loaded whole too."""
    model = CASES[name](0)
    trainer_of(model, tmp_path).train()
    resumed = CASES[name](1)
    trainer_of(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), model.parameters(), strict=True))
    best = CASES[name](0)
    trainer = trainer_of(
        best, tmp_path / "best", load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
        metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    wanted = type(best).from_pretrained(trainer.state.best_model_checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(best.parameters(), wanted.parameters(), strict=True))


def test_a_checkpoint_without_an_expert_is_refused(tmp_path):
    trainer_of(CASES["mixtral"](0), tmp_path).train()
    path = tmp_path / "checkpoint-2" / "model.safetensors"
    tensors = {name: t for name, t in load_file(path).items() if ".w2." not in name}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the checkpoint must hold model\.layers\.0\.mlp\.experts\.down_proj"):
        trainer_of(CASES["mixtral"](1), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
