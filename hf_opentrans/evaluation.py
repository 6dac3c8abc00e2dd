"""Measure models: segmentation quality, fidelity to the dense model, zero-shot classification."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from PIL import Image

from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.data.metrics import MeanIoU, SegmentationScores
from hf_opentrans.evaluation_protocols import find_protocol
from hf_opentrans.evaluation_runs import ProtocolSegmenter
from hf_opentrans.models.image_loading import ImageInput, center_crop, load_rgb
from hf_opentrans.models.modeling_dense_clip import DenseCLIPForSegmentation
from hf_opentrans.models.modeling_open_vocabulary import OpenVocabularyModel
from hf_opentrans.models.processing_open_vocabulary import OpenVocabularyProcessor
from hf_opentrans.models.vocabulary import Vocabulary


@dataclass(frozen=True)
class Fidelity:
    """How close a model's tokens are to the dense model's, as mean cosines.

    Args:
        class_token: Of the projected class token.
        patch_tokens: Of the projected patch tokens.
        images: Number of images.
    """

    class_token: float
    patch_tokens: float
    images: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


def evaluate_segmentation(
    model: OpenVocabularyModel,
    processor: OpenVocabularyProcessor,
    samples: Iterable[tuple[ImageInput, Any]],
    class_names: Sequence[str],
    *,
    on_image: Callable[[], object] = int,
    **options: Any,
) -> SegmentationScores:
    """Segment images by all class names and compare with their masks; see `evaluate_data` for folders.

    Args:
        model: The segmenter.
        processor: Its processor.
        samples: Pairs of an image and its mask of shape `(height, width)`: class indices, -1 where nothing counts.
        class_names: Names by class index; ";" separates aliases.
        on_image: Called after every image.
        **options: Knobs of the protocol "native" to change, such as mode, inference or resolution: see [`Protocol`].

    Raises:
        ValueError: If the model cannot follow the protocol, or an image and its mask differ in size.
    """
    protocol = find_protocol("native", **options)
    segmenter = ProtocolSegmenter(model, processor, class_names, protocol)
    metric = MeanIoU(len(class_names), absent=protocol.absent)
    for image, mask in samples:
        metric.update(segmenter.classes(*segmenter.prepare(image)), torch.as_tensor(mask))
        on_image()
    return metric.compute()


def folder_samples(folder: SegmentationFolder, limit: int | None = None) -> Iterable[tuple[Image.Image, Any]]:
    """Yield image and mask of a segmentation folder, the first `limit` of them."""
    for index in range(len(folder) if limit is None else min(limit, len(folder))):
        sample = folder[index]
        yield load_rgb(sample.image_path), sample.mask


@torch.inference_mode()
def fidelity(
    model: DenseCLIPForSegmentation,
    dense: DenseCLIPForSegmentation,
    images: Iterable[ImageInput],
    *,
    image_processor: Any,
    resolution: int | None = None,
    batch_size: int = 16,
) -> Fidelity:
    """Compare the projected class and patch tokens of the ordinary forward pass with those of the dense model.

    Args:
        model: The smaller model.
        dense: The model that it was made from.
        images: Images that neither was calibrated on.
        image_processor: CLIP's image processor (resizes the short side, crops the centre).
        resolution: Side in pixels. Defaults to the dense model's `image_size`.
        batch_size: Images per pass.
    """
    pixels = center_crops(images, image_processor, resolution or native_side(dense))
    reference = FidelityReference.of(dense, pixels, batch_size)
    return reference.compare(model)


@dataclass(frozen=True)
class FidelityReference:
    """The dense model's tokens of some images, to compare several models with.

    Args:
        batches: Pixel values and unit tokens (class token, patch tokens) of every batch.
    """

    batches: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]

    @classmethod
    @torch.inference_mode()
    def of(cls, dense: DenseCLIPForSegmentation, pixels: torch.Tensor, batch_size: int = 16) -> "FidelityReference":
        """Run the dense model on pixel values of shape `(images, 3, side, side)`."""
        return cls(tuple((batch, *projected_tokens(dense, batch)) for batch in pixels.split(batch_size)))

    @torch.inference_mode()
    def compare(self, model: DenseCLIPForSegmentation) -> Fidelity:
        """Return the mean cosines of a model's tokens to these."""
        sums, images = torch.zeros(2, dtype=torch.float64), 0
        for pixels, class_token, patch_tokens in self.batches:
            own_class, own_patches = projected_tokens(model, pixels)
            sums[0] += (own_class * class_token).sum(-1).double().sum()
            sums[1] += (own_patches * patch_tokens).sum(-1).double().mean(1).sum()
            images += len(pixels)
        return Fidelity(*(sums / images).tolist(), images=images)


def center_crops(images: Iterable[ImageInput], image_processor: Any, side: int) -> torch.Tensor:
    """Return pixel values of shape `(images, 3, side, side)`."""
    return torch.stack([center_crop(image, image_processor, side) for image in images])


def native_side(model: DenseCLIPForSegmentation) -> int:
    """Return the side in pixels of the square images that the model was trained on."""
    return int(cast("Any", model.config.vision_config).image_size)


def projected_tokens(model: DenseCLIPForSegmentation, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the unit class token `(batch_size, dim)` and patch tokens `(batch_size, patches, dim)`."""
    vision = model.vision_model
    hidden = vision(pixels.to(model.device, model.dtype), interpolate_pos_encoding=True).last_hidden_state
    tokens = torch.nn.functional.normalize(model.visual_projection(vision.post_layernorm(hidden)), dim=-1)
    return tokens[:, 0], tokens[:, 1:]


@torch.inference_mode()
def zero_shot_accuracy(
    model: DenseCLIPForSegmentation,
    processor: OpenVocabularyProcessor,
    images: Iterable[ImageInput],
    targets: Sequence[int],
    class_names: Sequence[str],
    *,
    resolution: int | None = None,
    batch_size: int = 32,
) -> float:
    """Return the share of images whose class token is nearest to the text of their own class.

    Args:
        model: The model.
        processor: Its processor.
        images: Images.
        targets: Class index of each.
        class_names: Names by class index; ";" separates aliases.
        resolution: Side in pixels. Defaults to the model's `image_size`.
        batch_size: Images per pass.
    """
    vocabulary = Vocabulary(class_names, templates=model.config.segmentation_templates)
    vocabulary = model.encode_vocabulary(vocabulary, processor.tokenizer)
    text, query_to_class = vocabulary.text_embeddings, vocabulary.query_to_class
    if text is None:
        raise RuntimeError("Encoding the vocabulary gave no embeddings. This is a fault of the package: report it.")
    side = resolution or native_side(model)
    pixels = center_crops(images, processor.image_processor, side)
    expected = torch.as_tensor(list(targets))
    correct = 0
    for batch, answers in zip(pixels.split(batch_size), expected.split(batch_size), strict=True):
        class_tokens, _ = projected_tokens(model, batch)
        queries = (class_tokens @ text.to(class_tokens).T).argmax(1).cpu()
        correct += int((query_to_class[queries] == answers).sum())
    return correct / len(expected)
