"""Exported models, loaded again: same call and same results as in PyTorch, without its weights."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from transformers import CLIPImageProcessorPil
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_opentrans.deploy.mask_query_graph import QUERIES, class_inputs
from hf_opentrans.deploy.record import ExportRecord
from hf_opentrans.deploy.sessions import Session, open_session
from hf_opentrans.deploy.vocabularies import (
    check_encoder,
    is_saved_vocabulary,
    load_vocabulary,
    vocabulary_from_dict,
)
from hf_opentrans.deploy.wrappers import TEXT
from hf_opentrans.models.image_loading import ImageInput, as_list, load_rgb
from hf_opentrans.models.modeling_mask_queries import MaskQueriesOutput
from hf_opentrans.models.modeling_open_vocabulary import OpenVocabularySegmenterOutput
from hf_opentrans.models.processing_open_vocabulary import LONGEST_SIDE_RATIO, OpenVocabularyProcessor
from hf_opentrans.models.segmentation_result import SegmentationResult
from hf_opentrans.models.vocabulary import Vocabulary

FITS = ("windows", "stretch")
Labels = Vocabulary | Sequence[str | Sequence[str]] | str | Path


class _WithoutTokenizer(OpenVocabularyProcessor):
    """A processor for images alone; transformers refuses to build one."""

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor


@dataclass(frozen=True)
class _Opened:
    record: ExportRecord
    session: Session
    text: Session | None
    processor: OpenVocabularyProcessor


class ExportedModel:
    """What all exported models share; `load_exported` finds the right class for a folder."""

    format: ClassVar[str] = ""
    required_output: ClassVar[str] = "last_hidden_state"

    def __init__(self, opened: _Opened) -> None:
        self.record = opened.record
        self.processor = opened.processor
        self._session = opened.session
        self._text = opened.text

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, threads: int | None = None, precision: str | None = None, check: bool = True
    ) -> Self:
        """Load a folder that `hf-opentrans export` wrote. The model in PyTorch is not needed.

        Args:
            folder: The folder.
            threads: Of one run; the runtime's own choice by default.
            precision: For OpenVINO "fp32" or "bf16" in place of the recorded one.
            check: Compare the hashes of all files with the recorded ones before anything is read.

        Raises:
            FileNotFoundError: If the folder is no export, or a file is missing.
            ValueError: If a file was changed or cut short, or the folder holds another format.
            ImportError: If the runtime is not installed; names the extra.
            RuntimeError: If the runtime lacks an operator.
        """
        record = ExportRecord.load(folder)
        if cls.format and record.format != cls.format:
            raise ValueError(
                f"{str(folder)!r} holds the format {record.format!r}. {cls.__name__} reads {cls.format!r}. Use "
                "load_exported, which finds the class."
            )
        if cls.required_output not in record.outputs:
            raise ValueError(
                f"{str(folder)!r} holds a {record.model_class} with the outputs {', '.join(record.outputs)}. "
                f"{cls.__name__} needs {cls.required_output}. Use load_exported, which finds the class."
            )
        if check:
            record.check_files(folder)
        return cls(_open(Path(folder), record, threads, precision))

    def _run(
        self, pixel_values: torch.Tensor, text: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        height, width = self.record.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, height, width):
            raise ValueError(
                f"pixel_values have the shape {tuple(pixel_values.shape)}. This model was exported for (batch_size, "
                f"3, {height}, {width}). Resize the images, or export with --resolution {_size_text(pixel_values)}."
            )
        return self._session.run({"pixel_values": pixel_values.float(), **(text or {})})


class ExportedTower(ExportedModel):
    """An exported vision tower, in any format."""

    def __call__(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """Return `last_hidden_state` and `pooler_output`, of towers with projection `image_embeds` in its place.

        Args:
            pixel_values: Images of shape `(batch_size, 3, height, width)`, of the exported size.

        Raises:
            ValueError: If the images have another size.
        """
        found = self._run(pixel_values)
        pooled = found.get("pooler_output", found.get("image_embeds"))
        return BaseModelOutputWithPooling(last_hidden_state=found["last_hidden_state"], pooler_output=pooled)


class ExportedSegmenter(ExportedModel):
    """An exported segmenter.

    The size of its images is fixed. Images of other shapes are resized with their aspect ratio until they cover that
    size, and seen through windows of it that overlap by half ("windows"): what `inference="slide"` does in PyTorch. Or
    they are resized to exactly that size ("stretch"), in a single pass.
    """

    required_output = "logits"

    def __call__(
        self,
        pixel_values: torch.Tensor,
        vocabulary: Vocabulary | None = None,
        text_embeddings: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> OpenVocabularySegmenterOutput:
        """Return logits and dense embeddings of images, as the model in PyTorch does.

        Of a model with mask queries these are [`MaskQueriesOutput`]: masks and their classes too, for
        `post_process_instance_segmentation` and `post_process_panoptic_segmentation`.

        Args:
            pixel_values: Images of shape `(batch_size, 3, height, width)`, of the exported size.
            vocabulary: An encoded vocabulary (see `encode_vocabulary`); with a fixed vocabulary none or that one.
            text_embeddings: Instead of a vocabulary, unit embeddings of shape `(queries, dim)`.
            **kwargs: Ignored, so that a whole batch of a processor can be passed.

        Raises:
            ValueError: If the images have another size, or the text does not fit.
        """
        vocabulary, text = self._resolve(vocabulary, text_embeddings)
        found = self._run(pixel_values, self._text_inputs(vocabulary, text))
        kind = MaskQueriesOutput if "masks_queries_logits" in found else OpenVocabularySegmenterOutput
        return kind(vocabulary=vocabulary, **found)

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The fixed vocabulary, without embeddings; None where text is an input."""
        return None if self.record.vocabulary is None else vocabulary_from_dict(self.record.vocabulary)

    def encode_vocabulary(self, vocabulary: Vocabulary) -> Vocabulary:
        """Return `vocabulary` with text embeddings of the exported text tower.

        Raises:
            ValueError: If the export has a fixed vocabulary and so no text tower.
        """
        if self._text is None:
            raise ValueError(
                "This export has a fixed vocabulary and no text tower. Other names cannot be encoded. Leave the "
                "labels out, or export without --vocabulary."
            )
        return replace(vocabulary.encode(self._embed_texts), encoder=self.record.text_fingerprint)

    def segment(
        self,
        images: ImageInput | Sequence[ImageInput],
        labels: Labels | None = None,
        *,
        fit: str = "windows",
        threshold: float | None = None,
        batch_size: int = 8,
    ) -> list[SegmentationResult]:
        """Segment images of any size by text.

        Args:
            images: One image or several: paths, PIL images or arrays.
            labels: A [`Vocabulary`], class names such as `["cat", "sofa; couch"]`, or the folder of a saved
                vocabulary (`Vocabulary.save_pretrained`). With a fixed vocabulary leave them out.
            fit: "windows" or "stretch", see the class.
            threshold: See `OpenVocabularyProcessor.post_process_semantic_segmentation`.
            batch_size: Windows per run.

        Returns:
            One [`SegmentationResult`] per image, in the order given, at the image's own size.

        Raises:
            ValueError: If a choice is unknown, an image cannot be read, or the labels do not fit.
        """
        if fit not in FITS:
            raise ValueError(f"fit is {fit!r}. It must be one of {', '.join(FITS)}.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}. At least one window goes through at once. Raise it.")
        vocabulary = self._read_labels(labels)
        loaded = [load_rgb(image) for image in as_list(images)]
        results = []
        for image in loaded:
            logits = self._logits(image, vocabulary, fit, batch_size)
            outputs = OpenVocabularySegmenterOutput(logits=logits, vocabulary=vocabulary)
            sizes = [(image.height, image.width)]
            (result,) = self.processor.post_process_semantic_segmentation(outputs, sizes, threshold)
            results.append(replace(result, image=image))
        return results

    def _logits(self, image: Image.Image, vocabulary: Vocabulary, fit: str, batch_size: int) -> torch.Tensor:
        """Return the logits of one image, `(1, queries, grid_height, grid_width)`: the average over its windows."""
        window, patch = self.record.image_size, self.record.patch_size
        height, width = window if fit == "stretch" else covering_size((image.height, image.width), window, patch)
        size = {"height": height, "width": width}
        pixels = self.processor.image_processor(image, size=size, do_center_crop=False, return_tensors="pt")
        pixels = pixels["pixel_values"][0]
        corners = list(window_corners((height, width), window, patch))
        crops = [pixels[:, y : y + window[0], x : x + window[1]] for y, x in corners]
        batches = [torch.stack(crops[i : i + batch_size]) for i in range(0, len(crops), batch_size)]
        parts = torch.cat([_needed(self(batch, vocabulary=vocabulary).logits) for batch in batches])
        finer = parts.shape[2] * patch // window[0]  # positions per patch along a side
        total = parts.new_zeros(parts.shape[1], height // patch * finer, width // patch * finer)
        count = torch.zeros_like(total[0])
        for (y, x), part in zip(corners, parts, strict=True):
            rows = slice(y // patch * finer, y // patch * finer + part.shape[1])
            columns = slice(x // patch * finer, x // patch * finer + part.shape[2])
            total[:, rows, columns] += part
            count[rows, columns] += 1
        return (total / count)[None]

    def _read_labels(self, labels: Labels | None) -> Vocabulary:
        if labels is None:
            if self.vocabulary is None:
                raise ValueError("There are no labels, and this export has no fixed vocabulary. Give class names.")
            return self.vocabulary
        if isinstance(labels, Path) or (isinstance(labels, str) and is_saved_vocabulary(Path(labels))):
            labels = load_vocabulary(Path(labels))
        vocabulary = labels if isinstance(labels, Vocabulary) else None
        if vocabulary is None:
            names: Any = labels
            vocabulary = Vocabulary(names, templates=self.record.templates)
        check_encoder(vocabulary, self.record.text_fingerprint)
        if self._text is None or vocabulary.text_embeddings is not None:
            return vocabulary
        return self.encode_vocabulary(vocabulary)

    def _resolve(
        self, vocabulary: Vocabulary | None, text_embeddings: torch.Tensor | None
    ) -> tuple[Vocabulary | None, torch.Tensor | None]:
        """Return the vocabulary of the outputs, and the embeddings that are an input."""
        fixed = self.vocabulary
        if fixed is not None:
            if text_embeddings is not None or (vocabulary is not None and vocabulary.classes != fixed.classes):
                asked = "text embeddings" if vocabulary is None else ", ".join(vocabulary.names[:5])
                raise ValueError(
                    f"Asked for {asked}, and the vocabulary of this export is fixed: {', '.join(fixed.names[:5])} ... "
                    "Leave the labels out, or export without --vocabulary."
                )
            return fixed, None
        text = text_embeddings if vocabulary is None else vocabulary.text_embeddings
        if text is None:
            raise ValueError(
                "There is no encoded text. This export compares images with text embeddings. Pass the result of "
                "encode_vocabulary, or text_embeddings."
            )
        if text.ndim != 2 or not len(text) or text.shape[1] != self.record.text_dim:
            raise ValueError(
                f"The text embeddings have the shape {tuple(text.shape)}. They must be (queries, "
                f"{self.record.text_dim}), at least one. They are of another model: encode the names with this one."
            )
        return vocabulary, text

    def _text_inputs(self, vocabulary: Vocabulary | None, text: torch.Tensor | None) -> dict[str, torch.Tensor]:
        if text is None:
            return {}
        if QUERIES not in self.record.inputs:
            return {TEXT: text.float()}
        return class_inputs(vocabulary, text, self.record.ensemble)

    @torch.no_grad()
    def _embed_texts(self, texts: list[str]) -> torch.Tensor:
        limit = self.processor.tokenizer.model_max_length
        tokens = self.processor.tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        return _needed(self._text).run(inputs)["text_embeds"]


class OnnxSegmenter(ExportedSegmenter):
    """A segmenter that ONNX Runtime runs."""

    format = "onnx"


class OpenVINOSegmenter(ExportedSegmenter):
    """A segmenter that OpenVINO runs."""

    format = "openvino"


class TorchExportSegmenter(ExportedSegmenter):
    """A segmenter that is a `torch.export` graph."""

    format = "torch-export"


_SEGMENTERS: tuple[type[ExportedSegmenter], ...] = (OnnxSegmenter, OpenVINOSegmenter, TorchExportSegmenter)


def load_exported(folder: str | Path, **options: Any) -> Any:
    """Load an exported segmenter or tower by the class of its format; options as in `from_pretrained`."""
    record = ExportRecord.load(folder)
    if "logits" not in record.outputs:
        return ExportedTower.from_pretrained(folder, **options)
    kind = next(kind for kind in _SEGMENTERS if kind.format == record.format)
    return kind.from_pretrained(folder, **options)


def covering_size(size: tuple[int, int], window: tuple[int, int], patch: int) -> tuple[int, int]:
    """Return the `(height, width)` that an image gets before windows are cut from it.

    It is as small as covers the window with the image's aspect ratio, in multiples of the patch size. An image that is
    longer than six times its width is made shorter, as in PyTorch.

    Args:
        size: `(height, width)` of the image.
        window: `(height, width)` of the window.
        patch: Patch size in pixels.
    """
    scale = max(target / side for target, side in zip(window, size, strict=True))
    scale = min(scale, LONGEST_SIDE_RATIO * min(window) / max(size))
    height, width = (max(least, round(side * scale / patch) * patch) for side, least in zip(size, window, strict=True))
    return height, width


def window_corners(size: tuple[int, int], window: tuple[int, int], patch: int) -> Iterator[tuple[int, int]]:
    """Yield the top left corners of windows that overlap by half; the last ones are shifted back inside.

    Args:
        size: `(height, width)` of the image, multiples of the patch size.
        window: `(height, width)` of the windows, not larger.
        patch: Patch size in pixels; windows lie on the grid of patches.
    """
    starts = []
    for length, side in zip(size, window, strict=True):
        step = max(1, side // 2 // patch) * patch
        starts.append([*range(0, length - side, step), length - side])
    for y in starts[0]:
        yield from ((y, x) for x in starts[1])


def _open(folder: Path, record: ExportRecord, threads: int | None, precision: str | None) -> _Opened:
    chosen = record.precision
    if precision is not None and precision != record.precision:
        if record.format != "openvino" or precision not in ("fp32", "bf16"):
            raise ValueError(
                f"precision is {precision!r}, and the files in {str(folder)!r} are {record.precision}. Only OpenVINO "
                "files can compute in another one, fp32 or bf16. Leave it out, or export again."
            )
        chosen = precision
    options = {"file_format": record.format, "threads": threads}
    session = open_session(folder / record.model_file, precision=chosen, outputs=record.outputs, **options)
    text = None
    if record.text_file is not None:
        text = open_session(folder / record.text_file, precision="fp32", outputs=["text_embeds"], **options)
    if text is None:
        processor = _WithoutTokenizer(CLIPImageProcessorPil.from_pretrained(folder))
    else:
        processor = OpenVocabularyProcessor.from_pretrained(folder)
    return _Opened(record, session, text, processor)


def _needed(value: Any) -> Any:
    if value is None:
        raise ValueError("The export holds no logits or no text tower. A segmenter has both. Export the model again.")
    return value


def _size_text(pixels: torch.Tensor) -> str:
    return "x".join(str(side) for side in pixels.shape[-2:])
