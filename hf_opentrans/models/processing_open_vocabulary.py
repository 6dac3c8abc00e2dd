"""Images and names to tensors, and logits to segmentations."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPProcessor
from transformers.feature_extraction_utils import BatchFeature

from .image_loading import ImageInput, as_list, load_rgb
from .modeling_open_vocabulary import OpenVocabularySegmenterOutput
from .segmentation_result import UNLABELLED, SegmentationResult
from .vocabulary import BACKGROUND_NAME, Vocabulary

# Pictures longer than this many times the short side are made narrower: attention grows with the square of the tokens.
LONGEST_SIDE_RATIO = 6
# Upper bound on the logits that post-processing holds at once, in bytes.
STRIP_BYTES = 128 * 2**20


class OpenVocabularyProcessor(CLIPProcessor):
    """Prepares images and names for segmentation, and turns logits into [`SegmentationResult`] objects.

    Keeps the aspect ratio of images and never crops; reads the processor files of any CLIP folder.

    Args:
        image_processor: CLIP's image processor: mean, deviation and default resolution are taken from it.
        tokenizer: CLIP's tokenizer; None where only images are prepared.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> "OpenVocabularyProcessor":
        """Load image processor and tokenizer of a CLIP folder or Hub id. Needs no torchvision.

        Raises:
            OSError: If a file of the processor is missing.
        """
        source = pretrained_model_name_or_path
        image_processor = CLIPImageProcessorPil.from_pretrained(source, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
        # Without its files transformers makes a tokenizer that knows no word, and says nothing.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise OSError(
                f"There is no tokenizer in {str(source)!r}. It needs tokenizer.json, or vocab.json and merges.txt. "
                "Save the processor into the folder."
            )
        return cls(image_processor, tokenizer)

    @property
    def resolution(self) -> int:
        """Short side in pixels that images get by default."""
        size = self.image_processor.size
        return int(size.get("shortest_edge") or min(size["height"], size["width"]))

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] - images and their sizes alone
        self,
        images: ImageInput | Sequence[ImageInput],
        *,
        resolution: int | None = None,
        size_divisor: int = 16,
        **kwargs: Any,
    ) -> BatchFeature:
        """Return `pixel_values` and `target_sizes`.

        Args:
            images: One image or several: paths, PIL images or arrays (see `load_rgb`).
            resolution: Short side in pixels. Defaults to that of the image processor.
            size_divisor: Both sides become multiples of this, the model's patch size.
            **kwargs: Ignored.

        Returns:
            `pixel_values` of shape `(batch_size, 3, height, width)`, or a list of `(3, height, width)` tensors where
            the images differ in shape; `target_sizes`, the original `(height, width)` of each.
        """
        loaded = [load_rgb(image) for image in as_list(images)]
        tensors = [self._to_tensor(image, resolution or self.resolution, size_divisor) for image in loaded]
        same = len({tensor.shape for tensor in tensors}) == 1
        return BatchFeature(
            {
                "pixel_values": torch.stack(tensors) if same else tensors,
                "target_sizes": [(image.height, image.width) for image in loaded],
            }
        )

    def _to_tensor(self, image: Image.Image, resolution: int, divisor: int) -> torch.Tensor:
        scale = min(resolution / min(image.size), LONGEST_SIDE_RATIO * resolution / max(image.size))
        width, height = (max(divisor, round(side * scale / divisor) * divisor) for side in image.size)
        pixels = self.image_processor(
            image, size={"height": height, "width": width}, do_center_crop=False, return_tensors="pt"
        )
        return pixels["pixel_values"][0]

    def post_process_semantic_segmentation(
        self,
        outputs: OpenVocabularySegmenterOutput,
        target_sizes: Sequence[tuple[int, int]] | None = None,
        threshold: float | None = None,
    ) -> list[SegmentationResult]:
        """Turn logits into one class and score per pixel.

        Logits are interpolated (bilinear), softmax runs over all queries of the vocabulary, a class has the highest
        probability among its aliases (SCLIP, NACLIP). Works in strips, so that thousands of names fit in memory.

        Args:
            outputs: Of [`DenseCLIPForSegmentation`], called with a vocabulary.
            target_sizes: `(height, width)` of every result. Defaults to the size of the logits.
            threshold: Pixels whose best probability is lower become "background" where the vocabulary has such a
                class, and -1 (unlabelled) otherwise. In 0..1.

        Raises:
            ValueError: If the outputs hold no logits, or the sizes or the threshold do not fit.
        """
        if outputs.logits is None or outputs.vocabulary is None:
            raise ValueError(
                "The outputs hold no logits with a vocabulary. Both are needed. Call the model with vocabulary=."
            )
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}. It is a probability and must lie in 0..1.")
        grid = (outputs.logits.shape[-2], outputs.logits.shape[-1])
        sizes = list(target_sizes or [grid] * len(outputs.logits))
        if len(sizes) != len(outputs.logits):
            raise ValueError(
                f"There are {len(sizes)} target sizes for {len(outputs.logits)} images. Give one (height, width) each."
            )
        return [
            _segment(logits.float(), size, outputs.vocabulary, threshold)
            for logits, size in zip(outputs.logits, sizes, strict=True)
        ]


def _segment(
    logits: torch.Tensor, size: tuple[int, int], vocabulary: Vocabulary, threshold: float | None
) -> SegmentationResult:
    query_to_class = vocabulary.query_to_class.to(logits.device)
    ids = torch.empty(size, dtype=torch.long, device=logits.device)
    scores = torch.empty(size, device=logits.device)
    for rows, strip in upsampled_strips(logits, size):
        best, query = strip.max(dim=0)
        # softmax of the winner alone: exp(best - logsumexp)
        scores[rows] = (best - strip.logsumexp(dim=0)).exp()
        ids[rows] = query_to_class[query]
    if threshold is not None:
        fallback = vocabulary.names.index(BACKGROUND_NAME) if BACKGROUND_NAME in vocabulary.names else UNLABELLED
        ids = torch.where(scores < threshold, fallback, ids)
    return SegmentationResult(ids.cpu(), scores.cpu(), vocabulary.names)


def upsampled_strips(logits: torch.Tensor, size: tuple[int, int], max_bytes: int = STRIP_BYTES) -> Any:
    """Yield `(row slice, logits of shape (channels, rows, width))` of the bilinearly resized map, strip by strip.

    Equals `torch.nn.functional.interpolate(..., mode="bilinear", align_corners=False)`, but holds at most about
    `max_bytes` at once.

    Args:
        logits: Map of shape `(channels, grid_height, grid_width)`.
        size: Target `(height, width)` in pixels.
        max_bytes: Upper bound on one strip; at least one row is always held.
    """
    height, width = size
    vertical = _bilinear_matrix(logits.shape[1], height, logits.device)
    wide = logits @ _bilinear_matrix(logits.shape[2], width, logits.device).T
    rows_per_strip = max(1, max_bytes // (logits.shape[0] * width * 4 * 2))
    for start in range(0, height, rows_per_strip):
        rows = slice(start, min(start + rows_per_strip, height))
        used = vertical[rows].any(0).nonzero()[:, 0]  # few source rows: the product is cheap
        first, last = int(used[0]), int(used[-1])
        yield rows, vertical[rows, first : last + 1] @ wide[:, first : last + 1]


def _bilinear_matrix(source: int, target: int, device: torch.device) -> torch.Tensor:
    """Return the weights of every source index in every target index, `(target, source)` (half-pixel centres)."""
    position = ((torch.arange(target, device=device) + 0.5) * (source / target) - 0.5).clamp(0, source - 1)
    low = position.floor().long()
    weight = (position - low).float()
    matrix = torch.zeros(target, source, device=device)
    matrix.scatter_add_(1, low[:, None], (1 - weight)[:, None])
    return matrix.scatter_add_(1, (low + 1).clamp(max=source - 1)[:, None], weight[:, None])


__all__ = ["OpenVocabularyProcessor"]
