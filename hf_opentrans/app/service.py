"""Answer one request of the demo: the same picture and names through the reference and the pruned model, measured.

Models are shared by all visitors. One lock covers the choice of the budget and the passes, so that nobody gets the
budget of somebody else and no pass is timed while another runs.
"""

import math
import statistics
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from hf_opentrans.loading import load_segmenter
from hf_opentrans.models.modeling_elastic_clip import ElasticCLIPForSegmentation
from hf_opentrans.models.modeling_open_vocabulary import OpenVocabularyModel
from hf_opentrans.models.processing_open_vocabulary import OpenVocabularyProcessor
from hf_opentrans.models.segmentation_result import SegmentationResult
from hf_opentrans.models.segmenting import INFERENCES, PreparedImage, SegmentationOptions, prepare_image
from hf_opentrans.models.vocabulary import Vocabulary
from hf_opentrans.pruning.latency_timing import milliseconds, processor_name
from hf_opentrans.pruning.macs import TowerCost, layer_widths

from .uploads import read_classes, read_upload

ROUNDS = 5
MOST_SECONDS = 2.0  # of timing; the round that passes it is the last


@dataclass(frozen=True)
class Side:
    """One model's part of an answer.

    Args:
        name: What to call the model.
        budget: Share of the dense model that was set; None for a model without budgets.
        result: The segmentation, at the size of the picture.
        milliseconds: Median time of the forward pass, from pixels and encoded names to logits.
        macs: Multiply-accumulates of the image encoder in one pass (in "slide": of one window).
        weight_bytes: Bytes of the image encoder's weights in use.
    """

    name: str
    budget: float | None
    result: SegmentationResult
    milliseconds: float
    macs: int
    weight_bytes: int


@dataclass(frozen=True)
class Answer:
    """Both sides, and how they compare.

    Args:
        image: The picture that was segmented.
        reference: The dense model, or the largest budget where there is none.
        pruned: The model at the budget that was asked for.
        agreement: Share of the pixels that have the same class on both sides, in 0..1.
        rounds: Timed passes of each side, in turn.
        inference: "whole" or "slide".
        machine: Processor or accelerator, and threads.
    """

    image: Image.Image
    reference: Side
    pruned: Side
    agreement: float
    rounds: int
    inference: str
    machine: str

    @property
    def speed_up(self) -> float:
        """How many times faster the pruned model was in this request."""
        return self.reference.milliseconds / self.pruned.milliseconds


@dataclass
class _Runner:
    """A model on its way through one request."""

    model: OpenVocabularyModel
    pixels: torch.Tensor
    encoded: Vocabulary
    arguments: dict[str, Any]
    outputs: Any = None

    def run(self) -> None:
        with torch.inference_mode():
            self.outputs = self.model(self.pixels, vocabulary=self.encoded, **self.arguments)


class SegmentationService:
    """Segments for many visitors at once with one reference and one pruned model.

    Args:
        model: The pruned model; with budgets, if it is elastic.
        processor: Its processor.
        reference: The model to compare with, and its processor. Defaults to a copy of the largest budget.
        names: What to call the pruned model and the reference.

    Raises:
        ValueError: If a model without budgets has no reference.
    """

    def __init__(
        self,
        model: OpenVocabularyModel,
        processor: OpenVocabularyProcessor,
        reference: tuple[OpenVocabularyModel, OpenVocabularyProcessor] | None = None,
        names: tuple[str, str] = ("pruned", "dense"),
    ) -> None:
        """Keep the models; nothing runs yet."""
        self._model, self._processor = model.eval(), processor
        self.budgets: tuple[float, ...] = tuple(model.budgets) if isinstance(model, ElasticCLIPForSegmentation) else ()
        self.has_dense = reference is not None
        if reference is None:
            if not self.budgets:
                raise ValueError(
                    f"The model is a {type(model).__name__} without budgets. There is nothing to compare it with. "
                    "Name the dense model too (--dense), or give a model that `prune-elastic` wrote."
                )
            largest = cast("ElasticCLIPForSegmentation", model).set_budget(self.budgets[0])
            reference = (largest.extract().eval(), processor)
            names = (names[0], f"largest budget, {self.budgets[0]:g}")
        self._reference, self._reference_processor = reference
        self.names = names
        self._lock = threading.Lock()

    @classmethod
    def load(cls, model: str | Path, dense: str | Path | None = None) -> "SegmentationService":
        """Load both models in float32; no code of their folders is run.

        Args:
            model: Folder or Hub id of an elastic model, or with `dense` of any segmenter.
            dense: Folder or Hub id of the reference. Defaults to the largest budget.

        Raises:
            FileNotFoundError: If there is no such model.
            ValueError: If it is no open-vocabulary segmenter, its files are damaged, or there is no reference.
        """
        loaded, processor = load_segmenter(model)
        reference = None if dense is None else load_segmenter(dense)
        return cls(loaded, processor, reference)

    @property
    def inferences(self) -> tuple[str, ...]:
        """What both models can do: "whole", and "slide" where both are training-free."""
        found = []
        for inference in INFERENCES:
            options = SegmentationOptions(inference=inference)
            try:
                options.for_model(self._model)
                options.for_model(self._reference)
            except ValueError:
                continue
            found.append(inference)
        return tuple(found)

    def nearest_budget(self, budget: float | None) -> float | None:
        """Return the checkpoint's budget that is closest to a number between its smallest and largest one.

        Raises:
            ValueError: If the number lies outside, or is missing where the model has budgets.
        """
        if not self.budgets:
            return None
        low, high = self.budgets[-1], self.budgets[0]
        slack = 1e-6  # the slider's arithmetic
        if budget is None or not math.isfinite(budget) or not low - slack <= budget <= high + slack:
            raise ValueError(
                f"The budget is {budget}. This model has budgets from {low:g} to {high:g}. Choose one of "
                f"{', '.join(f'{each:g}' for each in self.budgets)}."
            )
        return min(self.budgets, key=lambda each: abs(each - budget))

    def answer(
        self, picture: str | Path | None, classes: str, budget: float | None = None, inference: str = "whole"
    ) -> Answer:
        """Segment one picture with both models.

        Args:
            picture: Path of the uploaded file.
            classes: Names: ";" or a new line between classes, "," between names of one class.
            budget: Share of the dense model, between the smallest and the largest budget; the nearest one is used.
            inference: One of `inferences`.

        Raises:
            ValueError: If something of it cannot be used; the message is meant for the visitor.
        """
        chosen = self.nearest_budget(budget)
        if inference not in self.inferences:
            raise ValueError(
                f"The mode is {inference!r}. It must be one of {', '.join(self.inferences)}. Choose one of them."
            )
        options = SegmentationOptions(inference=inference)
        sides = ((self._reference, self._reference_processor), (self._model, self._processor))
        vocabularies = [read_classes(classes, cast("Any", m.config).segmentation_templates) for m, _ in sides]
        image = read_upload(picture)
        prepared = [prepare_image(model, processor, image, options) for model, processor in sides]
        with self._lock:
            if chosen is not None:
                cast("ElasticCLIPForSegmentation", self._model).set_budget(chosen)
            runners = [
                _Runner(
                    model,
                    item.pixels[None].to(model.device, model.dtype),
                    model.encode_vocabulary(vocabulary, processor.tokenizer),
                    options.for_model(model),
                )
                for (model, processor), item, vocabulary in zip(sides, prepared, vocabularies, strict=True)
            ]
            times = _time(runners)
            costs = [(_macs(runner, inference), _weight_bytes(runner.model)) for runner in runners]
        results = [
            _result(processor, runner, item)
            for (_, processor), runner, item in zip(sides, runners, prepared, strict=True)
        ]
        reference, pruned = (
            Side(name, share, result, statistics.median(taken), *cost)
            for name, share, result, taken, cost in zip(
                reversed(self.names), (self._reference_budget, chosen), results, times, costs, strict=True
            )
        )
        same = reference.result.segmentation == pruned.result.segmentation
        machine = _machine(self._model.device)
        return Answer(image, reference, pruned, float(same.float().mean()), len(times[0]), inference, machine)

    @property
    def _reference_budget(self) -> float | None:
        return None if self.has_dense else self.budgets[0]


def _time(runners: list[_Runner]) -> list[list[float]]:
    """Time both models in turn, so that a busy moment meets both; the first round warms up and is not counted."""
    for runner in runners:
        runner.run()
    times: list[list[float]] = [[] for _ in runners]
    start = time.perf_counter()
    for _ in range(ROUNDS):
        for runner, taken in zip(runners, times, strict=True):
            taken.append(milliseconds(runner.run, runner.model.device))
        if time.perf_counter() - start > MOST_SECONDS:
            break
    return times


def _result(processor: OpenVocabularyProcessor, runner: _Runner, item: PreparedImage) -> SegmentationResult:
    size = (item.image.height, item.image.width)
    (found,) = processor.post_process_semantic_segmentation(runner.outputs, [size], None)
    return replace(found, image=item.image)


def _macs(runner: _Runner, inference: str) -> int:
    """Count the image encoder's multiply-accumulates for the shape of this request, or for one window of it."""
    config = cast("Any", runner.model.vision_model.config)
    rows, columns = (side // config.patch_size for side in runner.pixels.shape[-2:])
    if inference == "slide":
        window = config.image_size // config.patch_size
        rows, columns = min(rows, window), min(columns, window)
    cost = replace(TowerCost.of(config), tokens=1 + rows * columns)
    return cost.total("macs", layer_widths(config))


def _weight_bytes(model: OpenVocabularyModel) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.vision_model.parameters())


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'s' * (threads > 1)}"
