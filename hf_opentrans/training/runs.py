"""What every training command shares: checkpoints beside the output, Trainer's arguments, and how a run is saved."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_opentrans._checks import check_finite
from hf_opentrans._distributed import is_main_process, wait_for_all
from hf_opentrans._files import write_folder, write_json

REPORT_FILE, SELECTION_FILE = "training_report.json", "selection.json"
PRECISIONS = ("float32", "bf16", "fp16")
_RECORD, _MODEL = "config.json", "model_fingerprint"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Args:
        steps: Optimiser steps.
        batch_size: Images per step and process.
        learning_rate: Highest rate.
        weight_decay: Of AdamW.
        warmup: Share of the steps in which the rate rises; it then falls to zero linearly.
        save_every: Steps between checkpoints.
        gradient_accumulation: Batches per step.
        activation_checkpointing: Whether to compute activations again in the backward pass: less memory, a third more
            time.
        precision: "float32", or "bf16" or "fp16" for mixed precision.
        seed: Of everything that is drawn.

    Raises:
        ValueError: If a value is out of range.
    """

    steps: int = 300
    batch_size: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    save_every: int = 100
    gradient_accumulation: int = 1
    activation_checkpointing: bool = False
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate", "save_every", "gradient_accumulation"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}. It must be positive. Correct it.")
        for name in ("weight_decay", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}. It must lie in [0, 1]. Correct it.")

        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision is {self.precision!r}. It must be one of {', '.join(PRECISIONS)}. Correct it."
            )

    @property
    def samples(self) -> int:
        """Images that one process sees in the whole run."""
        return self.steps * self.batch_size * self.gradient_accumulation

    def arguments(self, checkpoints: Path, *, progress: bool) -> TrainingArguments:
        """Return Trainer's arguments."""
        return TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=self.steps,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_steps=round(self.warmup * self.steps),
            lr_scheduler_type="linear",
            gradient_accumulation_steps=self.gradient_accumulation,
            activation_checkpointing=self.activation_checkpointing,
            bf16=self.precision == "bf16",
            fp16=self.precision == "fp16",
            save_strategy="steps",
            save_steps=self.save_every,
            save_total_limit=1,
            logging_steps=max(1, self.steps // 10),
            seed=self.seed,
            disable_tqdm=not progress,
            use_cpu=not torch.accelerator.is_available(),  # Trainer wants to be told, for mixed precision
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
        )


def checkpoints_of(output: Path) -> Path:
    """Return the folder beside an output that holds its checkpoints until the run is done."""
    return output.with_name(f"{output.name}.checkpoints")


def model_fingerprint(*models: nn.Module) -> str:
    """Return a short hash of names, shapes and some values of all weights: other weights give another."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in model.state_dict().items():
            flat = tensor.detach().flatten()
            index = torch.linspace(0, max(flat.numel() - 1, 0), min(16, flat.numel())).round().long()
            values = flat[index.to(flat.device)].double().tolist()
            digest.update(f"{name} {tuple(tensor.shape)} {values}".encode())
    return digest.hexdigest()[:16]


def find_checkpoint(folder: Path, config: Any, resume: bool, *models: nn.Module) -> str | None:
    """Return the last checkpoint of a run to resume; for a new run, empty the folder and note the configuration.

    Args:
        folder: Of `checkpoints_of`.
        config: A dataclass; the run to resume must have had the same.
        resume: Which of the two.
        *models: That the run begins with; the run to resume must have begun with the same.

    Raises:
        ValueError: If there is nothing to resume, or the run had another configuration or began with other models.
    """
    record, values = folder / _RECORD, {**asdict(config), _MODEL: model_fingerprint(*models)}
    if not resume:
        if is_main_process():
            shutil.rmtree(folder, ignore_errors=True)
            write_json(record, values)
        wait_for_all()
        return None
    last = get_last_checkpoint(str(folder)) if record.is_file() else None
    if last is None:
        raise ValueError(f"There is no checkpoint in {str(folder)!r}. A run to resume needs one. Leave --resume out.")
    before = json.loads(record.read_text(encoding="utf-8"))
    if before.get(_MODEL) != values[_MODEL]:
        raise ValueError(
            f"The run in {str(folder)!r} began with another model: its weights differ. A run goes on as it began. "
            "Give the same model, or start anew without --resume."
        )
    changed = [name for name, value in asdict(config).items() if before.get(name) != value]
    if changed:
        raise ValueError(
            f"The run in {str(folder)!r} had another {changed[0]} ({before.get(changed[0])!r}, now "
            f"{getattr(config, changed[0])!r}). A run goes on as it began. Give the same options, or start anew "
            "without --resume."
        )
    return last


def save_run(output: Path, model: Any, report: dict[str, Any], save_more: Callable[[Path], object]) -> None:
    """Write model and report as one folder, or nothing at all, and remove the checkpoints.

    Args:
        output: The folder.
        model: Saved by `save_pretrained`.
        report: Written as `training_report.json`.
        save_more: Called with the folder for all else.

    Raises:
        ValueError: If training made a weight NaN or infinite.
    """
    try:
        if is_main_process():
            check_finite(model.state_dict())
            with write_folder(output, marker=REPORT_FILE) as folder:
                model.save_pretrained(folder)
                write_json(folder / REPORT_FILE, report)
                save_more(folder)
            shutil.rmtree(checkpoints_of(output), ignore_errors=True)
    finally:
        wait_for_all()
