"""Score a segmenter on a data set under a protocol: in several processes, resumable, with throughput.

Reading order: `evaluate_data`, `ProtocolSegmenter` (one image), `_Progress` (what is done, on disk).
"""

import hashlib
import json
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from hf_opentrans._distributed import add_up, is_distributed, is_main_process, process_count, wait_for_all
from hf_opentrans._files import write_json
from hf_opentrans._fingerprints import model_fingerprint
from hf_opentrans.data.folder import SegmentationData
from hf_opentrans.data.metrics import MeanIoU, SegmentationScores
from hf_opentrans.evaluation_protocols import Protocol
from hf_opentrans.models.image_loading import ImageInput, load_rgb
from hf_opentrans.models.modeling_dense_clip import DenseCLIPForSegmentation
from hf_opentrans.models.modeling_open_vocabulary import OpenVocabularyModel
from hf_opentrans.models.processing_open_vocabulary import OpenVocabularyProcessor
from hf_opentrans.models.vocabulary import BACKGROUND_NAME

SAVE_SECONDS = 30.0
# Images that are decoded before the model asks for them.
AHEAD = 2
_VERSIONS = ("hf_opentrans", "torch", "transformers", "numpy", "pillow")


@dataclass(frozen=True)
class EvaluationResult:
    """The scores of one model on one data set, with all they depend on.

    Args:
        scores: Over all images.
        class_names: Names by class index.
        protocol: With every knob that was left to the model filled in.
        images: How many were scored.
        images_per_second: Of all processes together, from file to counts; encoding the names is not part of it.
        outside_share: Share of that time that was not spent in the model: waiting for images, interpolation, counting.
        processes: How many worked.
        device: That the model ran on.
        versions: Of the packages that decide.
        date: When the last image was scored, ISO 8601, UTC.
        model_fingerprint: Of class, configuration and weights.
        data_fingerprint: Of class names, file names and file sizes.
    """

    scores: SegmentationScores
    class_names: tuple[str, ...]
    protocol: Protocol
    images: int
    images_per_second: float
    outside_share: float
    processes: int
    device: str
    versions: Mapping[str, str]
    date: str
    model_fingerprint: str
    data_fingerprint: str

    @property
    def per_class(self) -> list[dict[str, Any]]:
        """One entry per class: name, IoU, accuracy and pixels; None where there is nothing to measure."""
        scores = self.scores
        columns = (scores.per_class_iou, scores.per_class_accuracy, scores.target_pixels, scores.predicted_pixels)
        names = ("name", "iou", "accuracy", "target_pixels", "predicted_pixels")
        rows = zip(self.class_names, *columns, strict=True)
        return [{name: _or_none(value) for name, value in zip(names, row, strict=True)} for row in rows]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary, ready for JSON; nan becomes None."""
        values = asdict(self)
        values["scores"] = {name: _without_nan(value) for name, value in values["scores"].items()}
        return values | {"protocol": self.protocol.to_dict(), "class_names": list(self.class_names)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EvaluationResult":
        """Make a result of what `to_dict` returned.

        Raises:
            TypeError: If a field is missing or unknown.
        """
        parts = dict(values)
        parts["scores"] = SegmentationScores(**{n: _with_nan(n, v) for n, v in parts["scores"].items()})
        parts["protocol"] = Protocol(**parts["protocol"])
        parts["class_names"] = tuple(parts["class_names"])
        return cls(**parts)

    def save(self, path: str | Path) -> None:
        """Write everything to one JSON file."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "EvaluationResult":
        """Read what `save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def evaluate_data(
    model: OpenVocabularyModel,
    processor: OpenVocabularyProcessor,
    data: SegmentationData,
    protocol: Protocol,
    *,
    state: str | Path | None = None,
    limit: int | None = None,
    on_image: Callable[[], object] = int,
) -> EvaluationResult:
    """Segment every image under a protocol and compare with its mask.

    With several processes (see `_distributed.start_processes`) image i goes to process i modulo their number, and
    every process returns the total; all of them must call this. Every image is a batch of its own, so that the counts
    do not depend on how they are dealt out.

    Args:
        model: The segmenter, in evaluation mode.
        processor: Its processor.
        data: Images and masks, as `open_benchmark` or [`SegmentationFolder`] give them.
        protocol: See `find_protocol`.
        state: File that progress is saved to about every 30 seconds, and when an error ends the run; each process
            adds its number to the name. If such files are there the run goes on from them, with any number of
            processes. They stay after the last image: see `forget_state`. None: nothing is saved.
        limit: Only the first images.
        on_image: Called for every image of this process, also for those done in an earlier run.

    Raises:
        ValueError: If the model cannot follow the protocol, the state is of another run, or an image and its mask
            differ in size.
        RuntimeError: If no pixel has a label.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}. At least 1 image must be scored. Raise it or leave it out.")
    count = len(data) if limit is None else min(limit, len(data))
    segmenter = ProtocolSegmenter(model, processor, data.class_names, protocol)
    fingerprints = model_fingerprint(model), data_fingerprint(data)
    key = json.dumps([*fingerprints, segmenter.protocol.to_dict(), count])
    progress = _Progress(MeanIoU(len(data.class_names), absent=protocol.absent), state, key)
    progress.resume()
    rank, processes = _place()
    mine = range(rank, count, processes)
    remaining = [index for index in mine if index not in progress.done_before]
    for _ in range(len(mine) - len(remaining)):
        on_image()
    try:
        _work(segmenter, data, remaining, progress, on_image)
    except BaseException:
        progress.save()
        raise
    progress.save()
    progress.sum_over_processes()
    seconds = max(progress.seconds, 1e-9)
    return EvaluationResult(
        scores=progress.metric.compute(),
        class_names=tuple(data.class_names),
        protocol=segmenter.protocol,
        images=count,
        images_per_second=count * processes / seconds,
        outside_share=1 - progress.model_seconds / seconds,
        processes=processes,
        device=_device_name(model.device),
        versions={"python": platform.python_version(), **{name: version(name) for name in _VERSIONS}},
        date=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        model_fingerprint=fingerprints[0],
        data_fingerprint=fingerprints[1],
    )


class _Example(NamedTuple):
    pixels: torch.Tensor
    mask: np.ndarray
    size: tuple[int, int]


class ProtocolSegmenter:
    """A model that segments single images by fixed names under a protocol.

    Args:
        model: The segmenter.
        processor: Its processor.
        class_names: Names by class index; ";" separates aliases.
        protocol: The protocol.

    Raises:
        ValueError: If the model cannot follow the protocol.
    """

    def __init__(
        self,
        model: OpenVocabularyModel,
        processor: OpenVocabularyProcessor,
        class_names: Sequence[str],
        protocol: Protocol,
    ) -> None:
        self.model, self.processor = model, processor
        self.protocol = protocol.resolve(model, processor)
        self.vocabulary = model.encode_vocabulary(self.protocol.vocabulary(class_names), processor.tokenizer)
        self.has_threshold = self.protocol.threshold is not None and BACKGROUND_NAME in self.vocabulary.names
        self.is_training_free = isinstance(model, DenseCLIPForSegmentation)
        self.model_seconds = 0.0

    def prepare(self, image: ImageInput) -> tuple[torch.Tensor, tuple[int, int]]:
        """Return pixel values of shape `(1, 3, height, width)`, and the image's own `(height, width)`."""
        patch = cast("int", self.model.vision_model.config.patch_size)
        sides = {"resolution": self.protocol.resolution, "longest_side": self.protocol.longest_side}
        batch = self.processor(image, size_divisor=patch, **sides)
        return batch["pixel_values"], batch["target_sizes"][0]

    @torch.inference_mode()
    def classes(self, pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Return the class of every pixel, `(height, width)`, -1 for none.

        Args:
            pixels: Of `prepare`.
            size: `(height, width)` of the result.
        """
        protocol = self.protocol
        options: dict[str, Any] = {}
        if self.is_training_free:
            windows = {"window_size": protocol.window, "window_stride": protocol.stride}
            options = {"mode": protocol.mode, "inference": protocol.inference, **windows}
        start = time.perf_counter()
        outputs = self.model(pixels.to(self.model.device, self.model.dtype), vocabulary=self.vocabulary, **options)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        self.model_seconds += time.perf_counter() - start
        if not self.has_threshold:
            return self.processor.post_process_class_ids(outputs, [size], prefilter=protocol.prefilter)[0]
        if self.is_training_free and protocol.logit_scale is not None:
            own = float(cast("Any", self.model.config).segmentation_logit_scale)
            outputs.logits = outputs.logits * (protocol.logit_scale / own)
        reduce = "max_prob" if protocol.alias_reduce == "mean_embedding" else protocol.alias_reduce
        (result,) = self.processor.post_process_semantic_segmentation(
            outputs, [size], protocol.threshold, alias_reduce=reduce, prefilter=protocol.prefilter
        )
        return result.segmentation


def _work(
    segmenter: ProtocolSegmenter,
    data: SegmentationData,
    indices: Sequence[int],
    progress: "_Progress",
    on_image: Callable[[], object],
) -> None:
    """Score images one after the other; the next ones are decoded meanwhile."""

    def load(index: int) -> _Example:
        sample = data[index]
        pixels, size = segmenter.prepare(load_rgb(sample.image_path))
        if sample.mask.shape != size:
            raise ValueError(
                f"{sample.mask_path} has {sample.mask.shape} pixels but {sample.image_path} has {size}, upright. A "
                "mask labels the pixels of its image one by one. Make the mask anew."
            )
        return _Example(pixels, sample.mask, size)

    saved = mark = time.perf_counter()
    with closing(_ahead(load, indices)) as examples:
        for index, example in zip(indices, examples, strict=True):
            before = segmenter.model_seconds
            ids = segmenter.classes(example.pixels, example.size)
            now = time.perf_counter()
            progress.add(index, ids, example.mask, now - mark, segmenter.model_seconds - before)
            mark = now
            on_image()
            if now - saved >= SAVE_SECONDS:
                progress.save()
                saved = now


def _ahead(load: Callable[[int], _Example], indices: Sequence[int]) -> Generator[_Example, None, None]:
    """Yield `load(index)` in order, running up to `AHEAD` calls early in a thread."""
    pool = ThreadPoolExecutor(1)
    pending = deque()
    try:
        for index in indices:
            pending.append(pool.submit(load, index))
            if len(pending) > AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class _Progress:
    """Counts, the images that they are of, and the file that holds both.

    Args:
        metric: Empty.
        state: See `evaluate_data`.
        key: What the counts depend on; a file with another one is refused.
    """

    def __init__(self, metric: MeanIoU, state: str | Path | None, key: str) -> None:
        self.metric, self.key = metric, key
        self.state = None if state is None else Path(state)
        self.done_before: frozenset[int] = frozenset()
        self.done: list[int] = []
        self.seconds = self.model_seconds = 0.0
        self._is_whole = True

    def add(self, index: int, ids: torch.Tensor, mask: np.ndarray, seconds: float, model_seconds: float) -> None:
        """Count one image."""
        self._is_whole = False  # an interrupt in here must not save half of it
        self.metric.update(ids, mask)
        self.done.append(index)
        self.seconds += seconds
        self.model_seconds += model_seconds
        self._is_whole = True

    def save(self) -> None:
        """Replace the file of this process as a whole."""
        if self.state is None or not self._is_whole:
            return
        target = self._part(*_place())
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                np.savez_compressed(
                    file,
                    key=np.array(self.key),
                    done=np.array(sorted(self.done), np.int64),
                    counts=self.metric.state.cpu().numpy(),
                    seconds=np.array([self.seconds, self.model_seconds]),
                )
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def resume(self) -> None:
        """Take over what earlier processes saved: the first process counts it, all of them skip its images."""
        if self.state is None:
            return
        found = sorted((_read_part(path, self.key) for path in _parts(self.state)), key=lambda part: -len(part.done))
        done: set[int] = set()
        for part in found:
            if part.done <= done:  # a process was stopped after it had merged this part
                continue
            if part.done & done:
                raise ValueError(
                    f"The saved progress {str(part.path)!r} counts images that another file counts too. Every image "
                    f"counts once. Delete {str(self.state)!r}.* and start again."
                )
            done |= part.done
            if is_main_process():
                self.metric.add_state(part.counts)
                self.seconds += part.seconds
                self.model_seconds += part.model_seconds
        self.done_before = frozenset(done)
        wait_for_all()  # nobody writes before all have read
        if is_main_process() and found:
            self.done = sorted(done)
            self.save()
            mine = self._part(*_place())
            for part in found:
                if part.path != mine:
                    part.path.unlink(missing_ok=True)
        wait_for_all()

    def sum_over_processes(self) -> None:
        """Add up counts and times."""
        self.metric.sum_over_processes()
        times = torch.tensor([self.seconds, self.model_seconds], dtype=torch.float64, device=_collective_device())
        add_up(times)
        self.seconds, self.model_seconds = times.tolist()

    def _part(self, rank: int, processes: int) -> Path:
        path = cast("Path", self.state)
        return path.with_name(f"{path.name}.{rank}-of-{processes}")


class _Part(NamedTuple):
    path: Path
    done: frozenset[int]
    counts: torch.Tensor
    seconds: float
    model_seconds: float


def _read_part(path: Path, key: str) -> _Part:
    fix = "Delete it to score everything again, or name another file."
    try:
        with np.load(path) as values:
            before, done = str(values["key"]), frozenset(values["done"].tolist())
            part = _Part(path, done, torch.from_numpy(values["counts"]), *values["seconds"].tolist())
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{str(path)!r} holds no progress of an evaluation ({error}). {fix}") from error
    if before != key:
        names = ("the model", "the data", "the protocol", "the number of images")
        pairs = zip(names, json.loads(before), json.loads(key), strict=True)
        changed = [name for name, old, new in pairs if old != new]
        raise ValueError(
            f"The progress in {str(path)!r} is of another run: {' and '.join(changed)} changed. Counts of different "
            f"runs must not be added. {fix}"
        )
    return part


def _parts(state: Path) -> list[Path]:
    return sorted(state.parent.glob(f"{state.name}.*-of-*"))


def forget_state(state: str | Path) -> None:
    """Delete the progress that `evaluate_data` saved, once its result is kept elsewhere."""
    if is_main_process():
        for path in _parts(Path(state)):
            path.unlink(missing_ok=True)


def data_fingerprint(data: SegmentationData) -> str:
    """Return a short hash of a data set's class names and of the names and sizes of its files, in their order."""
    files = [f"{path.name} {path.stat().st_size}" for pair in data._paths for path in pair]
    return hashlib.sha256(json.dumps([list(data.class_names), files]).encode()).hexdigest()[:16]


def _place() -> tuple[int, int]:
    """Return the number of this process, and how many there are."""
    return (torch.distributed.get_rank() if is_distributed() else 0), process_count()


def _collective_device() -> torch.device:
    uses_cuda = is_distributed() and torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if uses_cuda else torch.device("cpu")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and np.isnan(value) else value


def _without_nan(value: Any) -> Any:
    return [_or_none(item) for item in value] if isinstance(value, list | tuple) else _or_none(value)


def _with_nan(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(float("nan") if item is None else item for item in value)
    return float("nan") if value is None and name != "absent" else value
