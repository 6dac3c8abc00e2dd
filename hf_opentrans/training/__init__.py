"""Training with transformers' Trainer."""

from hf_opentrans._optional import require

require("train", "accelerate")

from .segmentation import SegmentationDataset, SegmentationTrainer  # noqa: E402

__all__ = ["SegmentationDataset", "SegmentationTrainer"]
