"""What a precision does to segmentation: mIoU of exported models, beside that of the model they were made from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hf_opentrans.benchmark_runtime_plan import FORMATS
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.data.metrics import MeanIoU
from hf_opentrans.deploy.export import ExportConfig, export_model
from hf_opentrans.deploy.quantization import to_bfloat16
from hf_opentrans.deploy.segmenter import load_exported
from hf_opentrans.evaluation import evaluate_segmentation, folder_samples
from hf_opentrans.loading import load_dense_clip
from hf_opentrans.models.vocabulary import Vocabulary


@dataclass
class RuntimeScores:
    """Segments a folder with a model in any runtime and precision; every result is kept.

    Args:
        data: Images and masks.
        limit: Images that are used.
        calibration: Other images, for the ranges of int8-static.
        refused: Why `export` refused a model, by name, runtime and precision.
    """

    data: SegmentationFolder
    limit: int
    calibration: Sequence[Any] = ()
    refused: dict[tuple[str, str, str], str] = field(default_factory=dict)
    _known: dict[tuple[str, str, str], float | None] = field(default_factory=dict)

    def __call__(self, name: str, runtime: str, precision: str) -> float | None:
        """Return the mIoU of a model, 0..1; None where `export` refuses it, with the reason in `refused`.

        Exported models see images through windows of their size; in PyTorch they are segmented as `evaluate` does.

        Args:
            name: Folder or Hub id of a CLIP with both towers.
            runtime: Of the benchmark.
            precision: Of the benchmark.

        Raises:
            ValueError: If the model has no text tower.
        """
        key = name, "torch" if runtime not in FORMATS else runtime, precision
        if key not in self._known:
            try:
                self._known[key] = self._measure(name, runtime, precision)
            except RuntimeError as err:  # no longer the same model, or an operator that is missing
                self._known[key], self.refused[name, runtime, precision] = None, str(err)
        return self._known[key]

    @cached_property
    def _samples(self) -> list[tuple[Any, Any]]:
        """Images and masks, read once for all models and precisions."""
        return list(folder_samples(self.data, self.limit))

    def _measure(self, name: str, runtime: str, precision: str) -> float:
        model, processor = load_dense_clip(name)
        names = self.data.class_names
        samples = self._samples
        if runtime not in FORMATS:
            used: Any = to_bfloat16(model) if precision == "bf16" else model
            return evaluate_segmentation(used, processor, samples, names).mean_iou
        config = ExportConfig(format=FORMATS[runtime], precision=precision)
        calibration = self.calibration if precision == "int8-static" else None
        with TemporaryDirectory() as folder:
            vocabulary = Vocabulary(names, templates=model.config.segmentation_templates)
            target = Path(folder) / "exported"
            export_model(model, processor, target, config, vocabulary=vocabulary, calibration=calibration)
            exported = load_exported(target)
            metric = MeanIoU(len(names))
            for image, mask in samples:
                (result,) = exported.segment(image)
                metric.update(result.segmentation, torch.as_tensor(mask))
        return metric.compute().mean_iou
