"""Resuming the Trainer of transformers with a mixture-of-experts model.

Checkpoints hold the experts of most models one by one; the model has them stacked, and ``from_pretrained`` converts.
``Trainer.train(resume_from_checkpoint=...)`` and ``load_best_model_at_end`` do not: they leave out what has another
name, with a warning, so training goes on with the experts that the model was made with. :class:`ResumeExperts` loads
them.
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

    What a checkpoint names otherwise than the model is kept when the Trainer loads it, converted by ``from_pretrained``
    when training begins (and, for the best model, when it ends), and copied into the model's own parameters. Needs
    memory for one more model on the CPU meanwhile. Models of PEFT, whose checkpoints hold adapters, DeepSpeed and FSDP
    are left to the Trainer.
    """

    def __init__(self) -> None:
        self._foreign: dict[str, torch.Tensor] = {}
        self._loaded: set[str] = set()

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start to keep the tensors that are loaded under names unknown to the model."""
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
                f"the checkpoint must hold {missing[0]} under the name that save_pretrained gives it, and so "
                f"{len(missing) - 1} more; it has {min(foreign)} and {len(foreign) - 1} more that are not the model's"
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
            ValueError: the checkpoint has not all that the model has.
        """
        if self._foreign:
            self._mend(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Give the model the experts of its best checkpoint, where ``load_best_model_at_end`` loaded that.

        Raises:
            ValueError: as :meth:`on_train_begin`.
        """
        if self._foreign:
            self._mend(kwargs["model"])
