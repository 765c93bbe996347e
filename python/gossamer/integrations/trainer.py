"""Resuming the Trainer of transformers with a mixture-of-experts model.

Checkpoints hold the experts of most models one by one; the model has them stacked, and ``from_pretrained`` converts.
``Trainer.train(resume_from_checkpoint=...)`` and ``load_best_model_at_end`` do not convert: they skip tensors under
other names, with a warning, so training would continue with newly initialised experts. :class:`ResumeExperts` loads
the checkpoint's.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ResumeExperts(TrainerCallback):
    """Loads the experts that the Trainer leaves out of a checkpoint, with any implementation of experts.

    >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[ResumeExperts()])
    >>> trainer.train(resume_from_checkpoint=True)

    Tensors that a checkpoint stores under other names than the model are kept when the Trainer loads it. When training
    begins (and, for the best model, when it ends) ``from_pretrained`` converts them, and they are copied into the
    model's parameters. This temporarily needs memory for a second model on the CPU. Models of PEFT, whose checkpoints
    hold adapters, DeepSpeed and FSDP are left to the Trainer.
    """

    def __init__(self) -> None:
        self._foreign: dict[str, torch.Tensor] = {}
        self._loaded: set[str] = set()

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start keeping tensors that are loaded under names that the model does not have."""
        model = kwargs.get("model")
        if isinstance(model, PreTrainedModel) and not getattr(model, "_hf_peft_config_loaded", False):
            model.register_load_state_dict_pre_hook(self._keep)

    def _keep(
        self, model: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, metadata: object, *others: object
    ) -> None:
        own = {prefix + name for name in model.state_dict()}
        for name, tensor in state_dict.items():
            if name in own:
                self._loaded.add(name.removeprefix(prefix))
            elif name.startswith(prefix):
                self._foreign[name.removeprefix(prefix)] = tensor

    def _mend(self, model: PreTrainedModel) -> None:
        foreign, loaded, self._foreign, self._loaded = self._foreign, self._loaded, {}, set()
        own = model.state_dict()
        left = own.keys() - loaded - set(getattr(model, "all_tied_weights_keys", None) or ())
        if not foreign or not left:
            return
        fresh, found = type(model).from_pretrained(
            None,
            config=copy.deepcopy(model.config),
            state_dict=foreign,
            dtype=model.dtype,
            output_loading_info=True,
        )
        if missing := sorted(left & set(found["missing_keys"])):
            raise ValueError(
                f"the checkpoint must hold {missing[0]} under the name that save_pretrained gives it, and "
                f"{len(missing) - 1} others; it has {min(foreign)} and {len(foreign) - 1} others that the model lacks"
            )
        with torch.no_grad():
            values = fresh.state_dict()
            for name in left:
                own[name].copy_(values[name])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Give the model the experts of the checkpoint that training resumes from.

        Raises:
            ValueError: the checkpoint lacks a tensor of the model.
        """
        if self._foreign:
            self._mend(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Give the model the experts of its best checkpoint if ``load_best_model_at_end`` loaded it.

        Raises:
            ValueError: as :meth:`on_train_begin`.
        """
        if self._foreign:
            self._mend(kwargs["model"])
