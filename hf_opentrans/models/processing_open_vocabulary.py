"""Images and names to tensors, and logits to segmentations."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPProcessor
from transformers.feature_extraction_utils import BatchFeature

from .image_loading import ImageInput, as_list, load_rgb
from .modeling_open_vocabulary import HUB_OPTIONS, OpenVocabularySegmenterOutput
from .segmentation_result import UNLABELLED, SegmentationResult
from .vocabulary import BACKGROUND_NAME, Vocabulary

# Pictures longer than this many times the short side are made narrower: attention grows with the square of the tokens.
LONGEST_SIDE_RATIO = 6
# Upper bound on the logits that post-processing holds at once, in bytes.
STRIP_BYTES = 128 * 2**20
# How the names of a class become its score; see `post_process_semantic_segmentation`.
ALIAS_REDUCES = ("max_prob", "max_logit")
# Bytes that `upsampled_argmax` holds per compared value: the value, where it is the best, its index, and room.
_BYTES_PER_VALUE = 16
# What says which files of a repository are meant.
_HUB_OPTIONS = (*HUB_OPTIONS, "proxies")


class OpenVocabularyProcessor(CLIPProcessor):
    """Prepares images and names for segmentation, and turns logits into [`SegmentationResult`] objects.

    Keeps the aspect ratio of images and never crops; reads the processor files of any CLIP folder.

    Args:
        image_processor: CLIP's image processor: mean, deviation and default resolution are taken from it.
        tokenizer: CLIP's tokenizer.
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
        # AutoProcessor and pipelines pass on more than these, "dtype" for one.
        options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        image_processor = CLIPImageProcessorPil.from_pretrained(source, **options)
        # Where the type in config.json is not known, AutoTokenizer asks whether its code may run.
        trust = {"trust_remote_code": kwargs["trust_remote_code"]} if kwargs.get("trust_remote_code") else {}
        tokenizer = AutoTokenizer.from_pretrained(source, **options, **trust)
        _check_tokenizer(tokenizer, repr(str(source)))
        return cls(image_processor, tokenizer)

    @classmethod
    def of(cls, processor: Any) -> "OpenVocabularyProcessor":
        """Return the processor itself, or one of this class with the parts of a `CLIPProcessor`.

        Raises:
            TypeError: If it has no image processor and tokenizer.
            OSError: If its tokenizer knows no word.
        """
        if isinstance(processor, cls):
            return processor
        image_processor, tokenizer = (getattr(processor, name, None) for name in ("image_processor", "tokenizer"))
        if image_processor is None or tokenizer is None:
            raise TypeError(
                f"The processor is a {type(processor).__name__}. It must hold CLIP's image processor and tokenizer. "
                "Give an OpenVocabularyProcessor or a CLIPProcessor."
            )
        _check_tokenizer(tokenizer, "the processor")
        if not isinstance(image_processor, CLIPImageProcessorPil):  # the same pixels with and without torchvision
            image_processor = CLIPImageProcessorPil.from_dict(image_processor.to_dict())
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
        longest_side: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Return `pixel_values` and `target_sizes`.

        Args:
            images: One image or several: paths, PIL images or arrays (see `load_rgb`).
            resolution: Short side in pixels. Defaults to that of the image processor.
            size_divisor: Both sides become multiples of this, the model's patch size.
            longest_side: Upper bound on the long side in pixels; the short side then shrinks along. Defaults to
                `LONGEST_SIDE_RATIO` times the resolution.
            **kwargs: Ignored.

        Returns:
            `pixel_values` of shape `(batch_size, 3, height, width)`, or a list of `(3, height, width)` tensors where
            the images differ in shape; `target_sizes`, the original `(height, width)` of each.
        """
        loaded = [load_rgb(image) for image in as_list(images)]
        resolution = resolution or self.resolution
        longest = longest_side or LONGEST_SIDE_RATIO * resolution
        tensors = [self._to_tensor(image, resolution, longest, size_divisor) for image in loaded]
        same = len({tensor.shape for tensor in tensors}) == 1
        return BatchFeature(
            {
                "pixel_values": torch.stack(tensors) if same else tensors,
                "target_sizes": [(image.height, image.width) for image in loaded],
            }
        )

    def _to_tensor(self, image: Image.Image, resolution: int, longest: int, divisor: int) -> torch.Tensor:
        scale = min(resolution / min(image.size), longest / max(image.size))
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
        *,
        alias_reduce: str = "max_prob",
        prefilter: int | None = None,
    ) -> list[SegmentationResult]:
        """Turn logits into one class and score per pixel.

        Logits are interpolated (bilinear). Works in strips, so that thousands of names fit in memory. Where the class
        alone is wanted, `post_process_class_ids` is much faster.

        Args:
            outputs: Of [`DenseCLIPForSegmentation`], called with a vocabulary.
            target_sizes: `(height, width)` of every result. Defaults to the size of the logits.
            threshold: Pixels whose best probability is lower become "background" where the vocabulary has such a
                class, and -1 (unlabelled) otherwise. In 0..1.
            alias_reduce: What the names of a class have to do with its probability. "max_prob" (SCLIP, NACLIP): the
                softmax runs over all names, and a class has the highest probability among its names. "max_logit"
                (FC-CLIP): a class has the highest logit among its names, and the softmax runs over classes. Both
                choose the same class. (For "mean_embedding" see `Vocabulary.merged`.)
            prefilter: In every image keep this many names, those with the highest logit at any position of the grid;
                all others get no pixel, and probabilities are over the names that are kept.

        Raises:
            ValueError: If the outputs hold no logits, or the sizes, the threshold or a choice do not fit.
        """
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}. It is a probability and must lie in 0..1.")
        if alias_reduce not in ALIAS_REDUCES:
            raise ValueError(f"alias_reduce is {alias_reduce!r}. It must be one of {', '.join(ALIAS_REDUCES)}.")
        vocabulary, parts = _images(outputs, target_sizes, prefilter)
        fallback = vocabulary.names.index(BACKGROUND_NAME) if BACKGROUND_NAME in vocabulary.names else UNLABELLED
        results = []
        for logits, owners, size in parts:
            ids, scores = _classes_and_scores(logits, owners, size, alias_reduce)
            if threshold is not None:
                ids = torch.where(scores < threshold, fallback, ids)
            results.append(SegmentationResult(ids.cpu(), scores.cpu(), vocabulary.names))
        return results

    def post_process_class_ids(
        self,
        outputs: OpenVocabularySegmenterOutput,
        target_sizes: Sequence[tuple[int, int]] | None = None,
        *,
        prefilter: int | None = None,
    ) -> list[torch.Tensor]:
        """Turn logits into one class per pixel, without scores: the fast way for scoring.

        The classes are those of `post_process_semantic_segmentation` without a threshold, under either alias rule.

        Args:
            outputs: Of an open-vocabulary segmenter, called with a vocabulary.
            target_sizes: `(height, width)` of every result. Defaults to the size of the logits.
            prefilter: See `post_process_semantic_segmentation`.

        Returns:
            Class indices of shape `(height, width)` for every image, on the device of the logits.

        Raises:
            ValueError: If the outputs hold no logits, or the sizes or the prefilter do not fit.
        """
        _, parts = _images(outputs, target_sizes, prefilter)
        return [owners[upsampled_argmax(logits, size)] for logits, owners, size in parts]


def _check_tokenizer(tokenizer: Any, source: str) -> None:
    """Refuse the tokenizer that transformers makes, without a word, where its files are missing: it knows no word."""
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise OSError(
            f"There is no tokenizer in {source}. It needs tokenizer.json, or vocab.json and merges.txt. "
            "Save the processor into the folder."
        )


def _images(
    outputs: OpenVocabularySegmenterOutput, target_sizes: Sequence[tuple[int, int]] | None, prefilter: int | None
) -> tuple[Vocabulary, Iterator[tuple[torch.Tensor, torch.Tensor, tuple[int, int]]]]:
    """Return the vocabulary, and for every image logits, the class of each of their channels, and the size."""
    logits, vocabulary = outputs.logits, outputs.vocabulary
    if logits is None or vocabulary is None:
        raise ValueError(
            "The outputs hold no logits with a vocabulary. Both are needed. Call the model with vocabulary=."
        )
    if prefilter is not None and prefilter < 1:
        raise ValueError(f"prefilter is {prefilter}. At least 1 name must be kept. Raise it or leave it out.")
    sizes = list(target_sizes or [(logits.shape[-2], logits.shape[-1])] * len(logits))
    if len(sizes) != len(logits):
        raise ValueError(
            f"There are {len(sizes)} target sizes for {len(logits)} images. Give one (height, width) each."
        )
    owners = vocabulary.query_to_class.to(logits.device)
    parts = (_prefiltered(image.float(), owners, prefilter) for image in logits)
    return vocabulary, ((*part, size) for part, size in zip(parts, sizes, strict=True))


def _prefiltered(logits: torch.Tensor, owners: torch.Tensor, keep: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    if keep is None or keep >= len(logits):
        return logits, owners
    kept = logits.flatten(1).amax(1).topk(keep).indices.sort().values
    return logits[kept], owners[kept]


def _classes_and_scores(
    logits: torch.Tensor, owners: torch.Tensor, size: tuple[int, int], alias_reduce: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return class and probability of every pixel, of shape `(height, width)`."""
    ids = torch.empty(size, dtype=torch.long, device=logits.device)
    scores = torch.empty(size, device=logits.device)
    for rows, strip in upsampled_strips(logits, size):
        compared, classes = (strip, owners) if alias_reduce == "max_prob" else _best_names(strip, owners)
        best, winner = compared.max(dim=0)
        # softmax of the winner alone: exp(best - logsumexp)
        scores[rows] = (best - compared.logsumexp(dim=0)).exp()
        ids[rows] = classes[winner]
    return ids, scores


def _best_names(logits: torch.Tensor, owners: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest logit among the names of every class that has one, and these classes."""
    classes, counts = owners.unique_consecutive(return_counts=True)
    first = counts.cumsum(0) - counts
    best = logits[first]
    for number in range(1, int(counts.max())):
        more = (counts > number).nonzero()[:, 0]
        best[more] = torch.maximum(best[more], logits[first[more] + number])
    return best, classes


class _Axis(NamedTuple):
    """How the pixels along one side lie between the positions of a grid.

    Args:
        low: First position of every cell that has pixels, `(cells,)`; the second one is `high`.
        high: The next position, or the same at the end.
        weights: Weight of `high` for the pixels of every cell, `(cells, pixels)`, zero where there are fewer.
        cell: Cell of every pixel, `(side,)`.
        offset: Place of every pixel in its cell, `(side,)`.
    """

    low: torch.Tensor
    high: torch.Tensor
    weights: torch.Tensor
    cell: torch.Tensor
    offset: torch.Tensor

    @classmethod
    def of(cls, source: int, target: int, device: torch.device) -> "_Axis":
        """Divide `target` pixels among `source` positions (half-pixel centres)."""
        low, weight = _bilinear_positions(source, target, device)
        cells, cell, counts = low.unique_consecutive(return_inverse=True, return_counts=True)
        offset = torch.arange(target, device=device) - (counts.cumsum(0) - counts)[cell]
        weights = torch.zeros(len(cells), int(counts.max()), device=device)
        weights[cell, offset] = weight
        return cls(cells, (cells + 1).clamp(max=source - 1), weights, cell, offset)


def upsampled_argmax(logits: torch.Tensor, size: tuple[int, int], max_bytes: int = STRIP_BYTES) -> torch.Tensor:
    """Return the channel that is largest at every pixel of the bilinearly resized map, `(height, width)`.

    Equals `torch.nn.functional.interpolate(..., mode="bilinear", align_corners=False).argmax` where no two channels
    tie within rounding; of exactly equal ones either may win. A pixel is a weighted mean of the four positions around
    it. So a channel that exceeds the strongest one at none of these four wins nowhere between them, and only the
    others are interpolated there: usually few.

    Args:
        logits: Map of shape `(channels, grid_height, grid_width)`.
        size: Target `(height, width)` in pixels.
        max_bytes: Upper bound on what is held at once beside the result and a copy of the logits; at least one row of
            cells is compared, and one cell interpolated.

    Raises:
        ValueError: If a logit is not finite.
    """
    if not bool(logits.isfinite().all()):
        raise ValueError("The logits hold NaN or infinite values. No class is the largest. Use another precision.")
    rows = _Axis.of(logits.shape[1], size[0], logits.device)
    columns = _Axis.of(logits.shape[2], size[1], logits.device)
    by_position = logits.permute(1, 2, 0).contiguous()
    shape = (len(rows.low), len(columns.low), rows.weights.shape[1], columns.weights.shape[1])
    winners = torch.empty(shape, dtype=torch.long, device=logits.device)
    # Four corners of every channel, and a few flags.
    band = max(1, max_bytes // (len(columns.low) * len(logits) * 24))
    for start in range(0, len(rows.low), band):
        part = slice(start, start + band)
        corners = [
            by_position[y[part]][:, x].flatten(0, 1)
            for y in (rows.low, rows.high)
            for x in (columns.low, columns.high)
        ]
        across = columns.weights.repeat(len(rows.low[part]), 1)
        down = rows.weights[part].repeat_interleave(len(columns.low), 0)
        winners[part] = _winners(corners, down, across, max_bytes).view(-1, *shape[1:])
    return winners[rows.cell[:, None], columns.cell, rows.offset[:, None], columns.offset]


def _winners(
    corners: Sequence[torch.Tensor], down: torch.Tensor, across: torch.Tensor, max_bytes: int
) -> torch.Tensor:
    """Return the largest channel at the pixels of every cell, `(cells, pixels down, pixels across)`.

    Args:
        corners: Channels at the top left, top right, bottom left and bottom right, each `(cells, channels)`.
        down: Weights of the bottom, `(cells, pixels down)`.
        across: Weights of the right, `(cells, pixels across)`.
        max_bytes: See `upsampled_argmax`.
    """
    strongest = (corners[0] + corners[1] + corners[2] + corners[3]).argmax(1, keepdim=True)
    may_win = torch.zeros_like(corners[0], dtype=torch.bool).scatter_(1, strongest, True)
    for corner in corners:
        may_win |= corner > corner.gather(1, strongest)
    counts, order = may_win.sum(1).sort()
    counts = counts.tolist()
    winners = torch.empty(len(order), down.shape[1], across.shape[1], dtype=torch.long, device=down.device)
    start = 0
    while start < len(order):
        # Cells with about as many channels go together; what is filled up cannot win.
        end = bisect_right(counts, counts[start] * 5 // 4)
        fitting = max_bytes // (_BYTES_PER_VALUE * counts[end - 1] * down.shape[1] * across.shape[1])
        end = min(end, start + max(1, fitting))
        cells = order[start:end]
        channels = may_win[cells].byte().topk(counts[end - 1], dim=1).indices
        kept = [corner[cells].gather(1, channels)[:, :, None] for corner in corners]
        left, right = (torch.lerp(kept[i], kept[i + 2], down[cells][:, None]) for i in (0, 1))
        values = torch.lerp(left[..., None], right[..., None], across[cells][:, None, None])
        # argmax along a middle dimension is a hundred times slower than amax.
        is_best = values == values.amax(1, keepdim=True)
        numbers = channels.float()[:, :, None, None]  # exact up to 2^24
        winners[cells] = torch.where(is_best, numbers, float(may_win.shape[1])).amin(1).long()
        start = end
    return winners


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
    low, weight = _bilinear_positions(source, target, device)
    matrix = torch.zeros(target, source, device=device)
    matrix.scatter_add_(1, low[:, None], (1 - weight)[:, None])
    return matrix.scatter_add_(1, (low + 1).clamp(max=source - 1)[:, None], weight[:, None])


def _bilinear_positions(source: int, target: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for every target index the source index before it, and the weight of the one after."""
    position = ((torch.arange(target, device=device) + 0.5) * (source / target) - 0.5).clamp(0, source - 1)
    low = position.floor().long()
    return low, (position - low).float()


# In this file, so that the remote copy does it too: a saved processor names its class and travels with its code.
OpenVocabularyProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["OpenVocabularyProcessor"]
