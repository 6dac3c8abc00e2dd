"""The metrics of this package for `evaluate`, and what they do with what is handed to them."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_opentrans._distributed import process_count
from hf_opentrans._optional import require
from hf_opentrans.data.metrics import Absent, MeanIoU, SegmentationScores

# The folders in it can be given to `evaluate.load`.
METRICS_FOLDER = Path(__file__).parent / "evaluate_metrics"
_CLASSES = {"mean_iou": "StreamingMeanIoU"}


def load_metric(name: str = "mean_iou", **options: Any) -> Any:
    """Return a metric for `evaluate` that counts maps when they are added and stores none.

    It has `add`, `add_batch` and `compute` of `evaluate.Metric`, takes the arguments and gives the results of
    `evaluate`'s metric of the same name, needs no network, and adds up the counts of all processes of
    `torch.distributed`.

    Args:
        name: Of the metric: "mean_iou".
        options: Of the metric. For "mean_iou" `num_labels`, `ignore_index`, `reduce_labels`, `nan_to_num` and
            `absent`; and those of `evaluate.Metric`.

    Returns:
        An `evaluate.Metric`.

    Raises:
        ValueError: If there is no such metric, or an option is out of range.
        ImportError: If `evaluate` is not installed.

    Example:
        `metric = load_metric("mean_iou", num_labels=150, ignore_index=255)`, then for every batch
        `metric.add_batch(predictions=maps, references=labels)`, and `metric.compute()["mean_iou"]` at the end.
    """
    if name not in _CLASSES:
        raise ValueError(f"`name` is {name!r}. There is no such metric here. Use one of {sorted(_CLASSES)}.")
    require("train", "evaluate", "datasets")
    module = importlib.import_module(f"hf_opentrans.data.evaluate_metrics.{name}.{name}")
    return getattr(module, _CLASSES[name])(**options)


class MeanIoUStream:
    """What `evaluate`'s mean_iou takes and gives, around a `MeanIoU`.

    Args:
        num_labels: Number of classes; None if `compute` will tell.
        ignore_index: Reference value of pixels that do not count.
        reduce_labels: Whether 0 stands for no class and all other references are one too high.
        nan_to_num: Replaces nan in the results.
        absent: As for `MeanIoU`.
    """

    def __init__(
        self,
        num_labels: int | None = None,
        ignore_index: int = 255,
        reduce_labels: bool = False,
        nan_to_num: float | None = None,
        absent: Absent = "zero",
    ) -> None:
        """Start with no maps."""
        self._metric: MeanIoU | None = None
        self._settings: dict[str, Any] = {"ignore_index": ignore_index, "reduce_labels": reduce_labels}
        self._settings |= {"num_labels": num_labels}
        self._nan_to_num = nan_to_num
        self._absent: Absent = absent
        self.maps = 0
        if num_labels is not None:
            self._metric = MeanIoU(num_labels, ignore_index, absent=absent)

    def add(self, predictions: Any, references: Any, **unknown: Any) -> None:
        """Count maps.

        Args:
            predictions: Maps, each an array, a tensor, a picture or nested lists; or one array of them.
            references: The same.
            unknown: Must be empty.

        Raises:
            TypeError: If `unknown` is not empty, or a map does not hold integers.
            ValueError: If their number or a shape differs, a value is out of range, or the number of classes is not
                known yet.
        """
        if unknown:
            raise TypeError(
                f"There are the inputs {sorted(unknown)}. Only predictions and references count. Drop them."
            )
        if self._metric is None:
            raise ValueError(
                "`num_labels` is not known yet. Maps are counted when they are added, so it must be. Give it to "
                '`load_metric("mean_iou", num_labels=...)`.'
            )
        if predictions is None or references is None or len(predictions) != len(references):
            counts = [None if maps is None else len(maps) for maps in (predictions, references)]
            raise ValueError(f"There are {counts[0]} predictions and {counts[1]} references. Every map needs its own.")
        if isinstance(predictions, torch.Tensor | np.ndarray) and isinstance(references, torch.Tensor | np.ndarray):
            self._metric.update(predictions, self._reduced(references))
        else:
            for prediction, reference in zip(predictions, references, strict=True):
                self._metric.update(_as_map(prediction), self._reduced(_as_map(reference)))
        self.maps += len(predictions)

    def compute(
        self, predictions: Any = None, references: Any = None, processes: int = 1, **options: Any
    ) -> dict[str, Any]:
        """Return the scores of all maps of all processes, and forget them.

        Args:
            predictions: More maps, counted first.
            references: The same.
            processes: How many the caller was told there are.
            options: `num_labels`, `ignore_index`, `reduce_labels` as they are, or given here before the first map;
                and `nan_to_num`.

        Raises:
            TypeError: If there is another option.
            ValueError: If an option is not what the maps were counted with.
            RuntimeError: If there are several processes but no process group, or no labelled pixel.
        """
        nan_to_num = options.pop("nan_to_num", self._nan_to_num)
        self._agree(options)
        if processes > 1 and process_count() == 1:
            raise RuntimeError(
                f"`num_process` is {processes} and there is no process group to add up over. The score would be of "
                "a part of the maps. Call `torch.distributed.init_process_group` first, or start with accelerate."
            )
        if predictions is not None or references is not None:
            self.add(predictions, references)
        if self._metric is None:
            raise ValueError("`num_labels` is not known. A score needs the number of classes. Give it to the metric.")
        metric, self.maps = self._metric, 0
        metric.sum_over_processes()
        try:
            return _results(metric.compute(), nan_to_num)
        finally:
            metric.reset()

    def _agree(self, options: dict[str, Any]) -> None:
        """Take the options of `evaluate`'s own `compute` as long as no map was counted with others."""
        options = {name: value for name, value in options.items() if not (name == "label_map" and value is None)}
        unknown = sorted(set(options) - set(self._settings))
        if unknown:
            raise TypeError(
                f"There are the options {unknown}. The metric knows nan_to_num, {', '.join(sorted(self._settings))}. "
                "Map labels before they are added."
            )
        changed = {name: value for name, value in options.items() if value != self._settings[name]}
        if self.maps and changed:
            counted = {name: self._settings[name] for name in changed}
            raise ValueError(
                f"`compute` is told {changed}, but {self.maps} maps were counted with {counted}. They are not kept to "
                "be counted again. Give the options to `load_metric`."
            )
        if changed:
            self._settings |= changed
            labels, ignored = self._settings["num_labels"], self._settings["ignore_index"]
            self._metric = None if labels is None else MeanIoU(labels, ignored, absent=self._absent)

    def _reduced(self, reference: torch.Tensor | np.ndarray) -> torch.Tensor | np.ndarray:
        """Lower the labels by one; 0, and 255 of a byte map, become the ignore index. Any number of labels is safe."""
        if not self._settings["reduce_labels"]:
            return reference
        is_byte = reference.dtype in (torch.uint8, np.uint8)
        ids = torch.as_tensor(reference.astype(np.int64) if isinstance(reference, np.ndarray) else reference).long()
        ignored = self._settings["ignore_index"]
        is_nothing = (ids == 0) | (ids == ignored) | (is_byte & (ids == 255))
        return torch.where(is_nothing, ignored, ids - 1)


def _as_map(value: Any) -> torch.Tensor | np.ndarray:
    return value if isinstance(value, torch.Tensor | np.ndarray) else np.asarray(value)


def _results(scores: SegmentationScores, nan_to_num: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "mean_iou": scores.mean_iou,
        "mean_accuracy": scores.mean_accuracy,
        "overall_accuracy": scores.pixel_accuracy,
        "frequency_weighted_iou": scores.frequency_weighted_iou,
        "per_category_iou": np.array(scores.per_class_iou),
        "per_category_accuracy": np.array(scores.per_class_accuracy),
    }
    if nan_to_num is None:
        return found
    lists = ("per_category_iou", "per_category_accuracy")
    return found | {name: np.nan_to_num(found[name], nan=nan_to_num) for name in lists}
