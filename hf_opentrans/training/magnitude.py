"""Iterative magnitude pruning as OpenTrans published it: masks that grow while the model trains.

Zeros stay in tensors of full size: nothing gets smaller or faster, all figures of it are nominal. It is here to
reproduce the original method; `prune_model` is the one to use.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_opentrans.spectra.layers import find_layers

MASKS_FILE = "magnitude_masks.safetensors"


class IterativeMagnitudePruning(TrainerCallback):
    """Set a share of the weights that are still alive to zero, every so many steps; a callback for any Trainer.

    One threshold for all layers (global L1). There is no rewinding: weights, optimiser and schedule go on. After round
    r a share of `(1 - rate)^r` is alive. Masks are saved with every checkpoint and come back on resume.

    Args:
        rate: Share of the weights alive that a round removes, in (0, 1).
        every: Steps between rounds.
        first: Step of the first round. The reference prunes after one single step.
        rounds: How many; None goes on until training ends.
        structured: Whether whole outputs of a layer go, by the mean magnitude of their weights.
        target_modules: Which layers; a regular expression or names, as in PEFT. Defaults to all linear and
            convolution layers but the first, as in the reference.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        *,
        rate: float = 0.1,
        every: int = 5000,
        first: int = 1,
        rounds: int | None = None,
        structured: bool = False,
        target_modules: str | Collection[str] | None = None,
    ) -> None:
        if not 0 < rate < 1:
            raise ValueError(f"rate is {rate}. It must lie in (0, 1): the share that a round removes. Correct it.")
        if min(every, first) < 1 or (rounds is not None and rounds < 1):
            raise ValueError(
                f"every is {every}, first {first}, rounds {rounds}. They must be at least 1. Correct them."
            )
        self.rate, self.every, self.first, self.rounds = rate, every, first, rounds
        self.structured, self.target_modules = structured, target_modules
        self.masks: dict[str, torch.Tensor] = {}
        self.rounds_done = 0

    @property
    def density(self) -> float:
        """Share of the weights of the pruned layers that are alive."""
        total = sum(mask.numel() for mask in self.masks.values())
        return sum(int(mask.sum()) for mask in self.masks.values()) / total if total else 1.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start with all weights alive, or with the masks of the checkpoint that training goes on from."""
        model = _plain(kwargs["model"])
        names = list(find_layers(model, self.target_modules))
        names = names[1:] if self.target_modules is None else names
        if not names:
            raise ValueError("Only one layer could be pruned, and the first is left alone. Give target_modules.")
        self.masks = {name: torch.ones_like(_weight(model, name), dtype=torch.bool) for name in names}
        self.rounds_done = self._rounds_until(state.global_step)
        if self.rounds_done:
            path = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}" / MASKS_FILE
            if not path.is_file():
                raise FileNotFoundError(
                    f"There is no {MASKS_FILE} in {str(path.parent)!r}. A run that has pruned goes on with its masks. "
                    "Resume from a checkpoint of this callback."
                )
            self.masks = {name: mask.to(self.masks[name].device) for name, mask in load_file(path).items()}
        self.apply(model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove weights where a round is due, and keep those that are gone at zero."""
        model = _plain(kwargs["model"])
        if self._rounds_until(state.global_step) > self.rounds_done:
            self.prune(model)
        self.apply(model)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the masks into the checkpoint."""
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            save_file({name: mask.cpu().contiguous() for name, mask in self.masks.items()}, folder / MASKS_FILE)

    @torch.no_grad()
    def prune(self, model: nn.Module) -> None:
        """Do one round: the smallest `rate` of what is alive dies."""
        scores = {name: self._scores(_weight(model, name), mask) for name, mask in self.masks.items()}
        alive = torch.cat([score[torch.isfinite(score)] for score in scores.values()])
        dying = round(self.rate * len(alive))
        if dying:
            threshold = alive.sort().values[dying - 1]
            for name, score in scores.items():
                gone = score <= threshold
                self.masks[name] &= ~(gone.view(-1, *[1] * (self.masks[name].ndim - 1)) if self.structured else gone)
        self.rounds_done += 1

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set the weights that are gone to zero."""
        for name, mask in self.masks.items():
            _weight(model, name).mul_(mask)

    def _scores(self, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return magnitudes, of weights or of outputs; infinite where there is nothing left to remove."""
        magnitudes = weight.detach().abs().float()
        alive = mask
        if self.structured:
            magnitudes, alive = magnitudes.flatten(1).mean(1), mask.flatten(1).any(1)
        return magnitudes.masked_fill(~alive, float("inf"))

    def _rounds_until(self, step: int) -> int:
        due = 0 if step < self.first else 1 + (step - self.first) // self.every
        return due if self.rounds is None else min(due, self.rounds)


def _plain(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _weight(model: nn.Module, name: str) -> torch.Tensor:
    weight = model.get_submodule(name).weight
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"The layer {name!r} has no weight tensor. Leave it out with target_modules.")
    return weight.data
