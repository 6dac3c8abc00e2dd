"""Segment images of any size by text: the three-line use, and the steps that the pipeline shares with it."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, cast

import torch
from PIL import Image

from .configuration_sparse_clip import SEGMENTATION_MODES
from .image_loading import ImageInput, as_list, load_rgb
from .modeling_open_vocabulary import OpenVocabularyModel
from .processing_open_vocabulary import OpenVocabularyProcessor
from .segmentation_result import SegmentationResult
from .vocabulary import Vocabulary

# In "slide" the image is larger than the window; the training-free literature uses 336 with windows of 224.
SLIDE_RATIO = 1.5
INFERENCES = ("whole", "slide")

Labels = Vocabulary | str | Sequence[str | Sequence[str]]


@dataclass(frozen=True)
class SegmentationOptions:
    """How images are segmented. Refuses what is out of range when it is made.

    Args:
        mode: How the last block is read (`SEGMENTATION_MODES`). None is the model's own way.
        inference: "whole", or "slide" for overlapping windows at 1.5 times the resolution.
        resolution: Short side in pixels. None is the processor's, times 1.5 in "slide".
        threshold: Pixels with a lower probability are background or unlabelled, in 0..1. None leaves all labelled.
        batch_size: Images of equal shape per pass.

    Raises:
        ValueError: If a choice is unknown or a number is out of range.
    """

    mode: str | None = None
    inference: str = "whole"
    resolution: int | None = None
    threshold: float | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in SEGMENTATION_MODES:
            raise ValueError(
                f"mode is {self.mode!r}. It must be one of {', '.join(SEGMENTATION_MODES)}. Leave it out for the "
                "model's own."
            )
        if self.inference not in INFERENCES:
            raise ValueError(f"inference is {self.inference!r}. It must be 'whole' or 'slide'. Choose one of them.")
        if self.resolution is not None:
            check_count("resolution", self.resolution)
        check_count("batch_size", self.batch_size)
        threshold = self.threshold
        if threshold is not None and not _lies_in_unit(threshold):
            raise ValueError(
                f"threshold is {threshold!r}. It is a probability and must lie in 0..1. Correct it, or leave it out."
            )

    def for_model(self, model: OpenVocabularyModel) -> dict[str, Any]:
        """Return the arguments of the model's `forward`.

        Raises:
            ValueError: If a trained segmenter is asked for another mode or for windows.
        """
        if self.mode is None and self.inference == "whole":
            return {}
        # Not by class: the remote copies of two modules may have a class each.
        if "inference" not in inspect.signature(type(model).forward).parameters:
            raise ValueError(
                f"mode is {self.mode!r} and inference {self.inference!r}, and the model is a {type(model).__name__}. "
                "A trained segmenter reads whole images in the mode that it was trained in. Leave both out."
            )
        return {"mode": self.mode, "inference": self.inference}


@dataclass(frozen=True)
class PreparedImage:
    """An image on its way to the model.

    Args:
        image: As it came, in 8-bit RGB.
        pixels: Resized and normalised, of shape `(3, height, width)`.
    """

    image: Image.Image
    pixels: torch.Tensor


def segment(
    model: OpenVocabularyModel,
    processor: OpenVocabularyProcessor,
    images: ImageInput | Sequence[ImageInput],
    labels: Labels,
    *,
    mode: str | None = None,
    inference: str = "whole",
    resolution: int | None = None,
    threshold: float | None = None,
    batch_size: int = 8,
) -> list[SegmentationResult]:
    """Segment images by the names in `labels`: one pass per image, whatever the number of names.

    Args:
        model: The segmenter, training-free or trained.
        processor: Its processor.
        images: One image or several, of any sizes (see `load_rgb`).
        labels: A [`Vocabulary`], class names such as `["cat", "sofa; couch"]`, or `"cat; sofa, couch"`.
        mode: How the last block is read. Defaults to the model's own (`config.segmentation_mode`); trained segmenters
            have no other.
        inference: "whole", or "slide" for overlapping windows at 1.5 times the resolution.
        resolution: Short side in pixels. Defaults to the processor's, times 1.5 in "slide".
        threshold: See `post_process_semantic_segmentation`.
        batch_size: Images of equal shape per pass.

    Returns:
        One [`SegmentationResult`] per image, in the order given, at the image's own size.

    Raises:
        ValueError: If an option is out of range, or a trained segmenter is asked for another mode or for windows.
    """
    options = SegmentationOptions(mode, inference, resolution, threshold, batch_size)
    options.for_model(model)  # refuses what the model cannot do before anything is read
    vocabulary = as_vocabulary(labels, cast("Any", model.config).segmentation_templates)
    loaded = [load_rgb(image) for image in as_list(images)]
    prepared = [prepare_image(model, processor, image, options) for image in loaded]
    return segment_prepared(model, processor, prepared, vocabulary, options)


def as_vocabulary(
    labels: Labels, templates: str | Sequence[str], background: str | Sequence[str] | None = None
) -> Vocabulary:
    """Return labels in any form as a vocabulary.

    Args:
        labels: A [`Vocabulary`], names, or one string with ";" between classes and "," between the names of one.
        templates: Prompt templates, where the labels are no vocabulary.
        background: Adds one more class (see [`Vocabulary`]).

    Raises:
        ValueError: If a name is empty or occurs twice.
        TypeError: If a label is no string.
    """
    if isinstance(labels, str):
        return Vocabulary.parse(labels, templates=templates, background=background)
    # By name too: the remote copies of two modules may have a class each.
    if isinstance(labels, Vocabulary) or type(labels).__name__ == Vocabulary.__name__:
        known = cast("Vocabulary", labels)
        return known if background is None else replace(known, background=background, text_embeddings=None)
    return Vocabulary(labels, templates=templates, background=background)


def prepare_image(
    model: OpenVocabularyModel,
    processor: OpenVocabularyProcessor,
    image: ImageInput,
    options: SegmentationOptions,
    timeout: float | None = None,
) -> PreparedImage:
    """Read, resize and normalise one image; its sides become multiples of the model's patch size.

    Args:
        model: What it is for.
        processor: The model's processor.
        image: See `load_rgb`.
        options: The resolution.
        timeout: Seconds that a download may take. Defaults to 30.
    """
    loaded = load_rgb(image, timeout)
    resolution = options.resolution
    if resolution is None:
        resolution = int(processor.resolution * (SLIDE_RATIO if options.inference == "slide" else 1))
    patch = cast("int", model.vision_model.config.patch_size)
    return PreparedImage(loaded, processor(loaded, resolution=resolution, size_divisor=patch)["pixel_values"][0])


@torch.inference_mode()
def segment_prepared(
    model: OpenVocabularyModel,
    processor: OpenVocabularyProcessor,
    prepared: Sequence[PreparedImage],
    vocabulary: Vocabulary,
    options: SegmentationOptions,
) -> list[SegmentationResult]:
    """Segment prepared images; those of equal shape share a pass.

    The text embeddings are the model's, whatever the vocabulary holds (see `encode_vocabulary`).

    Args:
        model: The segmenter.
        processor: Its processor.
        prepared: Of `prepare_image`, with the same options.
        vocabulary: The names.
        options: See [`SegmentationOptions`].

    Returns:
        One result per image, in the order given, at the image's own size.
    """
    encoded = model.encode_vocabulary(vocabulary, processor.tokenizer)
    results: dict[int, SegmentationResult] = {}
    for batch in _batches([item.pixels for item in prepared], options.batch_size):
        pixels = torch.stack([prepared[i].pixels for i in batch]).to(model.device, model.dtype)
        outputs = model(pixels, vocabulary=encoded, **options.for_model(model))
        images = [prepared[i].image for i in batch]
        sizes = [(image.height, image.width) for image in images]
        done = processor.post_process_semantic_segmentation(outputs, sizes, options.threshold)
        results.update({i: replace(found, image=image) for i, image, found in zip(batch, images, done, strict=True)})
    return [results[i] for i in range(len(prepared))]


def _batches(tensors: Sequence[torch.Tensor], batch_size: int) -> Iterator[list[int]]:
    """Yield the indices of tensors of equal shape, at most `batch_size` together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault(tuple(tensor.shape), []).append(index)
    for group in groups.values():
        yield from (group[i : i + batch_size] for i in range(0, len(group), batch_size))


def check_count(name: str, value: Any) -> None:
    """Refuse what is no whole number from 1 up.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}. It must be a whole number from 1 up. Correct it, or leave it out.")


def _lies_in_unit(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) <= 1
