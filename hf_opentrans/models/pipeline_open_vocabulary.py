"""`pipeline("zero-shot-image-segmentation")`: images and names in, masks out.

This file travels with checkpoints as remote code.
"""

from collections.abc import Iterator, Sequence, Sized
from os import PathLike
from types import GeneratorType
from typing import Any, ClassVar, cast

import torch
from torch.utils.data import DataLoader
from transformers import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    AutoModelForSemanticSegmentation,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    Pipeline,
    PreTrainedModel,
)
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

from .configuration_sparse_clip import SparseCLIPConfig
from .image_loading import ImageInput, check_timeout
from .modeling_dense_clip import DenseCLIPForSegmentation
from .modeling_open_vocabulary import CUSTOM_PIPELINES, OpenVocabularyModel
from .processing_open_vocabulary import OpenVocabularyProcessor
from .segmentation_result import SegmentationResult, SegmentList
from .segmenting import (
    Labels,
    PreparedImage,
    SegmentationOptions,
    as_vocabulary,
    check_count,
    prepare_image,
    segment_prepared,
)
from .vocabulary import VOCABULARY_FILE, Vocabulary

(TASK,) = CUSTOM_PIPELINES
_IMAGE_OPTIONS = ("mode", "inference", "resolution", "threshold")
_OPTIONS = ("candidate_labels", "background", *_IMAGE_OPTIONS, "timeout")
# What `pipeline()` hands on to every pipeline, beside the options.
_NOT_OPTIONS = ("local_files_only", "use_fast")


class Stream:
    """Outputs one by one, as they are asked for; as long as the inputs, where these have a length.

    Args:
        outputs: What is handed out.
        inputs: What they are made of.
    """

    def __init__(self, outputs: Iterator[SegmentList], inputs: Any) -> None:
        self._outputs, self._inputs = outputs, inputs

    def __iter__(self) -> Iterator[SegmentList]:
        return self

    def __next__(self) -> SegmentList:
        return next(self._outputs)

    def __len__(self) -> int:
        return len(self._inputs)


class OpenVocabularySegmentationPipeline(Pipeline):
    """Zero-shot image segmentation with any open-vocabulary segmenter, or with a plain CLIP.

    The model goes into evaluation mode. Weights in float16 become float32 on a CPU, where float16 is slow.

    Args:
        model: A segmenter of this package, or a `CLIPModel`, which needs no training.
        processor: An [`OpenVocabularyProcessor`] or `CLIPProcessor`. Defaults to that of the folder or repository and
            the revision that the model came from.
        tokenizer: Instead of a processor, together with `image_processor`.
        image_processor: Instead of a processor, together with `tokenizer`.
        **kwargs: `device`, `dtype`, `batch_size`, `num_workers`, and defaults for the options of a call.

    Raises:
        TypeError: If the model or the processor is of another kind.
        ValueError: If an option is unknown or out of range, or float16 is asked for on a CPU.

    Example:
        >>> pipe = pipeline("zero-shot-image-segmentation", model="folder")
        >>> masks = pipe("photo.jpg", candidate_labels=["cat", "sofa; couch"], background="words26")
        >>> masks.save("overlay.png")
    """

    # `pipeline()` loads the processor with the revision, token and cache of the model.
    _load_processor = None
    _load_tokenizer = _load_image_processor = _load_feature_extractor = _load_video_processor = False
    _registered_impl: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any = None,
        tokenizer: Any = None,
        image_processor: Any = None,
        **kwargs: Any,
    ) -> None:
        segmenter = _as_segmenter(model)
        if processor is None and tokenizer is not None and image_processor is not None:
            processor = OpenVocabularyProcessor(image_processor, tokenizer)
        if processor is None:
            processor = _processor_of(segmenter)
        for name in _NOT_OPTIONS:
            kwargs.pop(name, None)
        if kwargs.get("batch_size") is not None:
            check_count("batch_size", kwargs["batch_size"])
        dtype = kwargs.get("dtype")
        super().__init__(model=segmenter, processor=OpenVocabularyProcessor.of(processor), **kwargs)
        if self.device.type == "cpu" and segmenter.dtype == torch.float16:
            if dtype in (torch.float16, "float16"):
                raise ValueError(
                    "dtype is float16 and the device is a CPU, where it is slow. On a CPU models run in float32 or "
                    "bfloat16. Leave dtype out, or choose another device."
                )
            segmenter.float()
        segmenter.eval()

    @property
    def _segmenter(self) -> OpenVocabularyModel:
        return cast("OpenVocabularyModel", self.model)

    @property
    def _own_processor(self) -> OpenVocabularyProcessor:
        return cast("OpenVocabularyProcessor", self.processor)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] - images, not any inputs
        self, images: Any, candidate_labels: Labels | None = None, **options: Any
    ) -> Any:
        """Segment images by names.

        Texts are encoded once per vocabulary and remembered across calls (see `OpenVocabularyModel.encode_vocabulary`
        for the rule). A list of images is read as a whole before the model runs, so that a bad image is refused first
        and images of equal shape share passes wherever they stand. A data set or an iterator is read `batch_size`
        images at a time; those of equal shape among them share a pass.

        Args:
            images: One image (path, http or https address, PIL image, array or tensor of shape
                `(height, width, channels)`), a list of them, a torch `Dataset` or an iterator.
            candidate_labels: Names such as `["cat", "sofa; couch"]`, a [`Vocabulary`], or `"cat; sofa, couch"`.
                Defaults to the vocabulary saved with the model.
            **options: `background` (see [`Vocabulary`]), `mode`, `inference`, `resolution`, `threshold` (see
                [`SegmentationOptions`]), `timeout` in seconds for addresses, `batch_size` (1 by default) and
                `num_workers`.

        Returns:
            For one image a [`SegmentList`]: `{"score", "label", "mask"}` for every class that occurs, largest first,
            with the mean probability over its pixels and a mask of 0 and 255. For a list of images a list of these;
            for a data set or an iterator a [`Stream`].

        Raises:
            ValueError: If an option is unknown or out of range, there are no labels, or an image is damaged.
            TypeError: If an image is of another kind.
            OSError: If an image does not exist or cannot be reached.
        """
        if candidate_labels is not None:
            options["candidate_labels"] = candidate_labels
        if options.get("batch_size") is not None:
            check_count("batch_size", options["batch_size"])
        if isinstance(images, tuple):
            images = list(images)
        elif isinstance(images, Iterator) and not isinstance(images, GeneratorType):
            images = (image for image in images)  # the one kind of iterator that transformers knows
        if isinstance(images, list) and not images:
            given = {name: value for name, value in options.items() if name not in ("batch_size", "num_workers")}
            self._job({**self._forward_params, **self._sanitize_parameters(**given)[1]}, batch_size=1)
            return []
        return super().__call__(images, **options)

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Save model, code, processor and vocabulary: all that `pipeline(task, model=folder)` needs.

        Args:
            save_directory: The folder.
            **kwargs: See `Pipeline.save_pretrained`.
        """
        super().save_pretrained(save_directory, **kwargs)
        self._own_processor.save_pretrained(save_directory)

    def _sanitize_parameters(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Return (none, the options given, none), after refusing what is wrong with each of them alone."""
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise ValueError(
                f"The pipeline has no option {unknown[0]!r}. Its options are {', '.join(_OPTIONS)}, batch_size and "
                "num_workers. Correct the spelling."
            )
        SegmentationOptions(**{name: options[name] for name in _IMAGE_OPTIONS if name in options})
        check_timeout(options.get("timeout"))
        return {}, options, {}

    def _job(self, options: dict[str, Any], batch_size: int) -> dict[str, Any]:
        """Return what `preprocess` and `_forward` need; refuses what does not go together or with this model."""
        chosen = {name: options[name] for name in _IMAGE_OPTIONS if name in options}
        segmentation = SegmentationOptions(**chosen, batch_size=batch_size)
        segmentation.for_model(self._segmenter)
        return {"options": segmentation, "vocabulary": self._vocabulary(options)}

    def _vocabulary(self, options: dict[str, Any]) -> Vocabulary:
        labels = options.get("candidate_labels")
        if labels is None:
            labels = self._segmenter.default_vocabulary
        if labels is None:
            raise ValueError(
                f"There are no candidate_labels, and no {VOCABULARY_FILE} was saved with the model. Names to segment "
                'by are needed. Give candidate_labels=["cat", "dog"].'
            )
        templates = cast("Any", self.model.config).segmentation_templates
        return as_vocabulary(labels, templates, options.get("background"))

    def preprocess(  # pyright: ignore[reportIncompatibleMethodOverride] - typed parameters
        self, image: ImageInput, options: SegmentationOptions, timeout: float | None = None
    ) -> PreparedImage:
        """Read, resize and normalise one image (see `prepare_image`)."""
        return prepare_image(self._segmenter, self._own_processor, image, options, timeout)

    def _forward(  # pyright: ignore[reportIncompatibleMethodOverride] - images of any shapes, not one batch of tensors
        self, prepared: Sequence[PreparedImage], vocabulary: Vocabulary, options: SegmentationOptions
    ) -> list[SegmentationResult]:
        return segment_prepared(self._segmenter, self._own_processor, prepared, vocabulary, options)

    def postprocess(self, result: SegmentationResult) -> SegmentList:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the list of masks of one image."""
        return SegmentList(result)

    def run_single(
        self,
        inputs: ImageInput,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> SegmentList:
        """Segment one image."""
        (found,) = self.get_iterator([inputs], 0, 1, preprocess_params, forward_params, postprocess_params)
        return found

    def get_iterator(  # pyright: ignore[reportIncompatibleMethodOverride] - an iterator all the same
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Stream:
        """Return the outputs one by one, in the order of the inputs.

        transformers' own way pads or concatenates a batch into one tensor, which images of different sizes do not
        allow: here a batch stays a list, and `_forward` puts together what has the same shape.
        """
        job = self._job(forward_params, batch_size)
        reading = {"options": job["options"], "timeout": forward_params.get("timeout")}
        read = PipelineDataset if isinstance(inputs, Sized) else PipelineIterator
        loader = DataLoader(
            read(inputs, self.preprocess, reading),
            batch_size=len(inputs) if isinstance(inputs, list) else batch_size,
            num_workers=num_workers if isinstance(inputs, Sized) else min(num_workers, 1),
            collate_fn=list,
        )
        forward: Any = self.forward
        results = (result for batch in loader for result in forward(batch, **job))
        return Stream((self.postprocess(result, **postprocess_params) for result in results), inputs)


class _InstalledPipeline:
    """Hides the pipeline that a config.json names: this package is installed and has it, so no code has to be trusted.

    transformers runs a pipeline that the config names from the folder alone, and asks for `trust_remote_code`.
    """

    def __get__(self, config: Any, kind: type | None = None) -> dict[str, Any]:
        return {}

    def __set__(self, config: Any, value: Any) -> None:
        """Forget the value; `OpenVocabularyModel.save_pretrained` writes it."""


def register_pipeline() -> None:
    """Make the task known to `pipeline()`, and processors and stock CLIP folders to the Auto classes.

    For the installed package; remote code needs none of it. Calling it again changes nothing.
    """
    known = PIPELINE_REGISTRY.supported_tasks.get(TASK)
    if known is None or known["impl"] is not OpenVocabularySegmentationPipeline:
        PIPELINE_REGISTRY.register_pipeline(
            TASK,
            pipeline_class=OpenVocabularySegmentationPipeline,
            pt_model=(AutoModelForSemanticSegmentation,),
            type="image",
        )
    # Not by AutoModelForSemanticSegmentation.register, which wants the configuration class that the model names:
    # `OpenVocabularyModel.from_pretrained` translates.
    segmenters: Any = MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING
    segmenters.register(CLIPConfig, DenseCLIPForSegmentation, exist_ok=True)
    AutoProcessor.register(SparseCLIPConfig, OpenVocabularyProcessor, exist_ok=True)
    SparseCLIPConfig.custom_pipelines = _InstalledPipeline()  # pyright: ignore[reportAttributeAccessIssue]


def _as_segmenter(model: Any) -> OpenVocabularyModel:
    """Return a segmenter itself, and a CLIP as the training-free one."""
    # By what it can do: the remote copies of two modules may have a class each.
    if hasattr(model, "encode_vocabulary"):
        return model
    if isinstance(model, CLIPModel):
        return DenseCLIPForSegmentation.from_clip(model)
    raise TypeError(
        f"The model is a {type(model).__name__}. The pipeline needs an open-vocabulary segmenter or a CLIPModel with "
        "both towers. Load one of them."
    )


def _processor_of(model: OpenVocabularyModel) -> OpenVocabularyProcessor:
    source = model.config.name_or_path
    if not source:
        raise ValueError(
            "There is no processor, and the model says no folder that it came from. The pipeline needs a processor. "
            "Give processor=OpenVocabularyProcessor.from_pretrained(folder)."
        )
    revision = {} if model.loaded_revision is None else {"revision": model.loaded_revision}
    return OpenVocabularyProcessor.from_pretrained(source, **revision)


__all__ = ["OpenVocabularySegmentationPipeline"]
