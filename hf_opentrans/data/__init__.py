"""Segmentation data: emoji scenes drawn on demand, folders of images and masks, benchmarks by name, and mIoU.

Nothing in here knows about models. Drawing scenes needs the extra `demo`; the rest does not.
"""

from hf_opentrans.data.benchmarks import BENCHMARKS, Benchmark, class_names, find_benchmark, open_benchmark
from hf_opentrans.data.boundary import BoundaryIoU
from hf_opentrans.data.convert import convert_benchmark
from hf_opentrans.data.emoji import draw_emoji, emoji_names
from hf_opentrans.data.folder import SegmentationData, SegmentationFolder, SegmentationSample
from hf_opentrans.data.metric_loading import load_metric
from hf_opentrans.data.metrics import MeanIoU, SegmentationScores
from hf_opentrans.data.panoptic import PanopticQuality
from hf_opentrans.data.scenes import TEXTURE_NAMES, Scene, SceneGenerator, write_scenes

__all__ = [
    "BENCHMARKS",
    "TEXTURE_NAMES",
    "Benchmark",
    "BoundaryIoU",
    "MeanIoU",
    "PanopticQuality",
    "Scene",
    "SceneGenerator",
    "SegmentationData",
    "SegmentationFolder",
    "SegmentationSample",
    "SegmentationScores",
    "class_names",
    "convert_benchmark",
    "draw_emoji",
    "emoji_names",
    "find_benchmark",
    "load_metric",
    "open_benchmark",
    "write_scenes",
]
