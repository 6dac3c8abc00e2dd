"""Training with transformers' Trainer: segmentation heads, and label-free recovery of pruned towers."""

from hf_opentrans._optional import require

require("train", "accelerate")

from .distillation import DistillationTrainer, DistillationWeights, ImageDataset  # noqa: E402
from .finetune import FinetuneConfig, FinetuneResult, finetune  # noqa: E402
from .magnitude import IterativeMagnitudePruning, vanilla_loss, vision_loss  # noqa: E402
from .recovery import DistillConfig, distill  # noqa: E402
from .segmentation import SegmentationDataset, SegmentationTrainer  # noqa: E402

__all__ = [
    "DistillConfig",
    "DistillationTrainer",
    "DistillationWeights",
    "FinetuneConfig",
    "FinetuneResult",
    "ImageDataset",
    "IterativeMagnitudePruning",
    "SegmentationDataset",
    "SegmentationTrainer",
    "distill",
    "finetune",
    "vanilla_loss",
    "vision_loss",
]
