"""What our Trainers share: learning rates by part of the model, and training after an evaluation."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import Trainer

ParameterGroups = Callable[[nn.Module], list[dict[str, Any]]]


class BaseTrainer(Trainer):
    """transformers' Trainer with two additions.

    `Trainer.evaluate` prepares a model for evaluation and marks it as prepared; a later `Trainer.train` (transformers
    5.23, accelerate 1.15) then leaves it as it is. On several processes it is never wrapped in
    DistributedDataParallel, and every process trains a model of its own, without a word. Here it is prepared anew.

    Args:
        *args: As for Trainer.
        parameter_groups: Returns AdamW's parameter groups of the model, for example those of
            `hf_opentrans.spectra.selection.parameter_groups`. It is called when training begins, so that it also works
            where FSDP replaces the parameters. Defaults to Trainer's own groups.
        **kwargs: As for Trainer.
    """

    def __init__(self, *args: Any, parameter_groups: ParameterGroups | None = None, **kwargs: Any) -> None:
        self.parameter_groups = parameter_groups
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build the optimiser, with the groups of `parameter_groups` if there are some."""
        if self.optimizer is None and self.parameter_groups is not None:
            groups = self.parameter_groups(self.model if model is None else model)  # pyright: ignore[reportArgumentType]
            rate, decay = self.args.learning_rate, self.args.weight_decay
            self.optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=decay)
        return super().create_optimizer(model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as [`Trainer.train`] does, with a model that is prepared for it."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # these prepare for both at once
            model: Any = self.model
            self.model = self.model_wrapped = extract_model_from_parallel(model, keep_fp32_wrapper=False)
            self.model._is_accelerate_prepared = False  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
            self.accelerator._models.clear()
        return super().train(*args, **kwargs)
