"""Segment images of any size by text: the three-line use."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from .image_loading import ImageInput, as_list, load_rgb
from .modeling_dense_clip import DenseCLIPForSegmentation
from .modeling_open_vocabulary import OpenVocabularyModel
from .processing_open_vocabulary import OpenVocabularyProcessor
from .segmentation_result import SegmentationResult
from .vocabulary import Vocabulary

# In "slide" the image is larger than the window; the training-free literature uses 336 with windows of 224.
SLIDE_RATIO = 1.5


@torch.inference_mode()
def segment(
    model: OpenVocabularyModel,
    processor: OpenVocabularyProcessor,
    images: ImageInput | Sequence[ImageInput],
    labels: Vocabulary | Sequence[str | Sequence[str]],
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
        images: One image or several, of any sizes.
        labels: A [`Vocabulary`], or class names such as `["cat", "sofa; couch"]`.
        mode: How the last block is read. Defaults to the model's own (`config.segmentation_mode`); trained segmenters
            have no other.
        inference: "whole", or "slide" for overlapping windows at 1.5 times the resolution.
        resolution: Short side in pixels. Defaults to the processor's, times 1.5 in "slide".
        threshold: See `post_process_semantic_segmentation`.
        batch_size: Images of equal shape per pass.

    Returns:
        One [`SegmentationResult`] per image, in the order given, at the image's own size.

    Raises:
        ValueError: If a trained segmenter is asked for another mode or for windows.
    """
    options = {} if mode is None and inference == "whole" else {"mode": mode, "inference": inference}
    if options and not isinstance(model, DenseCLIPForSegmentation):
        raise ValueError(
            f"mode is {mode!r} and inference {inference!r}, and the model is a {type(model).__name__}. A trained "
            "segmenter reads whole images in the mode that it was trained in. Leave both out."
        )
    if not isinstance(labels, Vocabulary):
        labels = Vocabulary(labels, templates=cast("Any", model.config).segmentation_templates)
    vocabulary = model.encode_vocabulary(labels, processor.tokenizer)
    loaded = [load_rgb(image) for image in as_list(images)]
    if resolution is None:
        resolution = int(processor.resolution * (SLIDE_RATIO if inference == "slide" else 1))
    patch = cast("int", model.vision_model.config.patch_size)
    tensors = [processor(image, resolution=resolution, size_divisor=patch)["pixel_values"][0] for image in loaded]
    results: dict[int, SegmentationResult] = {}
    for batch in _batches(tensors, batch_size):
        pixels = torch.stack([tensors[i] for i in batch]).to(model.device, model.dtype)
        outputs = model(pixels, vocabulary=vocabulary, **options)
        sizes = [(loaded[i].height, loaded[i].width) for i in batch]
        done = processor.post_process_semantic_segmentation(outputs, sizes, threshold)
        results.update({i: replace(result, image=loaded[i]) for i, result in zip(batch, done, strict=True)})
    return [results[i] for i in range(len(loaded))]


def _batches(tensors: list[Any], batch_size: int) -> list[list[int]]:
    """Indices of tensors of equal shape, at most `batch_size` together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault(tuple(tensor.shape), []).append(index)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
