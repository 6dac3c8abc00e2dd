"""Training with transformers' Trainer: segmentation heads, and label-free recovery of pruned towers."""

from hf_opentrans._optional import require

require("train", "accelerate")

from .distillation import DistillationTrainer, DistillationWeights, ImageDataset  # noqa: E402
from .finetune import FinetuneConfig, FinetuneResult, finetune  # noqa: E402
from .magnitude import IterativeMagnitudePruning  # noqa: E402
from .recovery import DistillConfig, distill  # noqa: E402
from .regions import RegionTeacher  # noqa: E402
from .segmentation import SegmentationDataset, SegmentationTrainer  # noqa: E402
from .synonyms import SynonymSampler  # noqa: E402

__all__ = [
    "DistillConfig",
    "DistillationTrainer",
    "DistillationWeights",
    "FinetuneConfig",
    "FinetuneResult",
    "ImageDataset",
    "IterativeMagnitudePruning",
    "RegionTeacher",
    "SegmentationDataset",
    "SegmentationTrainer",
    "SynonymSampler",
    "distill",
    "finetune",
]
