"""What our Trainers share: one that was evaluated before may train."""

from typing import Any

from accelerate.utils import extract_model_from_parallel
from transformers import Trainer


class EvaluateFirstTrainer(Trainer):
    """transformers' Trainer, which may be evaluated before it trains, on several processes too.

    `Trainer.evaluate` prepares a model for evaluation and marks it as prepared; a later `Trainer.train` (transformers
    5.23, accelerate 1.15) then leaves it as it is. On several processes it is never wrapped in
    DistributedDataParallel, and every process trains a model of its own, without a word.
    """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as [`Trainer.train`] does, with a model that is prepared for it."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # these prepare for both at once
            model: Any = self.model
            self.model = self.model_wrapped = extract_model_from_parallel(model, keep_fp32_wrapper=False)
            self.model._is_accelerate_prepared = False  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
            self.accelerator._models.clear()
        return super().train(*args, **kwargs)
