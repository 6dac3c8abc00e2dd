"""Recover a pruned CLIP by distillation from the dense one: one frozen configuration in, a saved folder out."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PrinterCallback

from hf_opentrans._files import check_output_folder
from hf_opentrans.models.image_loading import ImageInput
from hf_opentrans.models.modeling_sparse_clip import SparseCLIPModel

from .distillation import DistillationTrainer, DistillationWeights, ImageDataset
from .runs import REPORT_FILE, Schedule, checkpoints_of, find_checkpoint, save_run


@dataclass(frozen=True)
class DistillConfig(Schedule):
    """How to recover.

    Args:
        class_token, patch_tokens, taps: Weights of the parts of the loss, see `DistillationWeights`.
        resolution: Side of the crops in pixels; the CLIP's own where it is None.
        held_out: Share of the images that are only scored on, in (0, 1).

    All fields of `Schedule` too.

    Raises:
        ValueError: If a value is out of range.
    """

    learning_rate: float = 1e-4
    class_token: float = 1.0
    patch_tokens: float = 1.0
    taps: float = 1.0
    resolution: int | None = None
    held_out: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}. It must lie in (0, 1). Correct it.")
        if min(self.class_token, self.patch_tokens, self.taps) < 0 or not self.class_token + self.patch_tokens:
            raise ValueError(
                f"The weights are class_token={self.class_token}, patch_tokens={self.patch_tokens}, taps={self.taps}. "
                "None may be negative, and one of the tokens must count. Correct them."
            )


def distill(
    student: SparseCLIPModel,
    teacher: SparseCLIPModel,
    processor: Any,
    images: Sequence[ImageInput],
    config: DistillConfig,
    output: str | Path,
    *,
    resume: bool = False,
    on_stage: Callable[[str], object] = lambda line: None,
    progress: bool = False,
) -> dict[str, Any]:
    """Train the student's vision tower on the teacher's tokens of unlabelled images; save student, processor, report.

    Args:
        student: The pruned CLIP, trained in place.
        teacher: The dense CLIP.
        processor: Of either.
        images: Unlabelled; the first `held_out` of them, in an order drawn by the seed, are only scored on.
        config: How.
        output: New, empty, or an earlier output.
        resume: Whether to go on from a checkpoint of the same configuration.
        on_stage: Called with a line on what comes next.
        progress: Whether Trainer shows its bar.

    Returns:
        The report: configuration, cosines before and after on the held-out images, seconds.

    Raises:
        FileExistsError: If the output holds something else.
        ValueError: If there are too few images, the models do not belong together, or there is nothing, or something
            else, to resume from.
    """
    target = check_output_folder(output, marker=REPORT_FILE)
    if len(images) < 2:
        raise ValueError(
            f"There are {len(images)} images. Distillation trains on some and scores on others. Give more."
        )
    last = find_checkpoint(checkpoints_of(target), config, resume, student, teacher)
    student.vision_model.requires_grad_(True)
    student.visual_projection.requires_grad_(True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed)).tolist()
    held = min(len(images) - 1, max(1, round(config.held_out * len(images))))
    side = config.resolution or cast("int", student.vision_model.config.image_size)
    image_processor = getattr(processor, "image_processor", processor)
    parts = [[images[place] for place in places] for places in (order[held:], order[:held])]
    train, evaluate = (ImageDataset(part, image_processor, side) for part in parts)
    trainer = DistillationTrainer(
        student,
        teacher,
        config.arguments(checkpoints_of(target), progress=progress),
        weights=DistillationWeights(config.class_token, config.patch_tokens, config.taps),
        train_dataset=train,
        eval_dataset=evaluate,
    )
    trainer.remove_callback(PrinterCallback)  # figures go into the report, not to standard output
    on_stage(f"Distilling from {len(train)} images, scoring on {len(evaluate)} others")
    before = trainer.evaluate()
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=last)
    seconds = time.perf_counter() - start
    after = trainer.evaluate()
    report = {
        "config": asdict(config),
        "before": _cosines(before),
        "after": _cosines(after),
        "images": {"train": len(train), "held_out": len(evaluate)},
        "samples": config.samples * trainer.args.world_size,
        "seconds": seconds,
    }
    save_run(target, student, report, processor.save_pretrained)
    return report


def _cosines(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics[f"eval_{name}"] for name in ("loss", "class_token_cosine", "patch_token_cosine")}
