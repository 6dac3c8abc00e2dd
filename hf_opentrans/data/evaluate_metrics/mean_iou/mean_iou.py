"""Mean IoU as a metric of `evaluate` that counts every map at once and stores none.

`evaluate.load` takes the path of this file's folder. It reads one import per line.
"""

# pyright: reportMissingImports=false
from typing import Any

import datasets
import evaluate

from hf_opentrans.data.metric_loading import MeanIoUStream

_DESCRIPTION = """
Mean intersection over union of semantic segmentation, over the pixels of all maps. Maps are counted when they are
added; nothing is stored.
"""
_INPUTS = """
Args:
    predictions: Maps of class ids, or one array of them. The ignore index means "no answer".
    references: Maps of class ids and the ignore index, each as large as its prediction.
"""


class StreamingMeanIoU(evaluate.Metric):
    """Mean IoU that needs the memory of one confusion matrix, whatever the number of images.

    Args:
        num_labels: Number of classes. May be left out if it is given to `compute` together with the maps.
        ignore_index: Reference value of pixels that do not count.
        reduce_labels: Whether 0 stands for no class and all other references are one too high, as in ADE20k.
        nan_to_num: Replaces nan in the results.
        absent: "zero" or "ignore"; see `hf_opentrans.data.MeanIoU`.
        kwargs: Of `evaluate.Metric`.
    """

    def __init__(
        self,
        config_name: str | None = None,
        *,
        num_labels: int | None = None,
        ignore_index: int = 255,
        reduce_labels: bool = False,
        nan_to_num: float | None = None,
        absent: Any = "zero",
        **kwargs: Any,
    ) -> None:
        """Start with no maps."""
        self._stream = MeanIoUStream(num_labels, ignore_index, reduce_labels, nan_to_num, absent)
        super().__init__(config_name, **kwargs)

    def __len__(self) -> int:
        return self._stream.maps

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Count the pixels of a batch of maps."""
        self._stream.add(predictions, references, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Count the pixels of one map."""
        self._stream.add([prediction], [reference], **kwargs)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Return the scores of all maps since the last call, of all processes of `torch.distributed`, in each."""
        return self._stream.compute(predictions, references, self.num_process, **kwargs)

    def _info(self, *_: Any) -> Any:
        maps = datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()})
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=maps)
