"""Segmentation data: emoji scenes drawn on demand, folders of images and masks, and mIoU.

Nothing in here knows about models. Drawing scenes needs the extra `demo`; the rest does not.
"""

from hf_opentrans.data.emoji import draw_emoji, emoji_names
from hf_opentrans.data.folder import SegmentationFolder, SegmentationSample
from hf_opentrans.data.metrics import MeanIoU, SegmentationScores
from hf_opentrans.data.scenes import TEXTURE_NAMES, Scene, SceneGenerator, write_scenes

__all__ = [
    "TEXTURE_NAMES",
    "MeanIoU",
    "Scene",
    "SceneGenerator",
    "SegmentationFolder",
    "SegmentationSample",
    "SegmentationScores",
    "draw_emoji",
    "emoji_names",
    "write_scenes",
]
