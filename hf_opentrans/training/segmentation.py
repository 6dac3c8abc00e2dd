"""Training a segmentation head with transformers' Trainer: data, trainer, and mIoU without stored logits."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedModel, TrainerCallback, TrainingArguments

from hf_opentrans.data.folder import IGNORE_INDEX, SegmentationFolder
from hf_opentrans.data.metrics import MeanIoU
from hf_opentrans.models.image_loading import load_rgb

from .regions import RegionTeacher
from .synonyms import SynonymSampler
from .trainer import BaseTrainer

# Range of the random scale of training crops: the image's short side over the crop's.
SCALES = (1.0, 1.5)


class SegmentationDataset(Dataset[dict[str, torch.Tensor]]):
    """Square crops of images with their masks, as `pixel_values` and `labels`.

    For training: random scale, random crop, random flip, drawn anew in every epoch (`set_epoch`) by a generator of the
    image's own, so that a resumed run sees the same crops. For evaluation: the whole image, squeezed to the square.

    Args:
        folder: Images and masks.
        image_processor: CLIP's image processor: mean and deviation are taken from it.
        resolution: Side of the crops in pixels.
        is_training: Which of the two.
        classes: Positions of the classes that count, in the order of the labels; pixels of others are ignored.
            Defaults to all.
        ignore_index: Label of pixels that do not count.
        seed: Of the crops.

    Raises:
        ValueError: If a class is outside the folder's, or the folder is empty.
    """

    def __init__(
        self,
        folder: SegmentationFolder,
        image_processor: Any,
        *,
        resolution: int,
        is_training: bool = True,
        classes: Sequence[int] | None = None,
        ignore_index: int = 255,
        seed: int = 0,
    ) -> None:
        self.seed, self.epoch = seed, 0
        count = len(folder.class_names)
        chosen = list(range(count)) if classes is None else list(classes)
        outside = [index for index in chosen if not 0 <= index < count]
        if outside or not chosen:
            raise ValueError(
                f"classes is {chosen}. Positions must lie in [0, {count - 1}], at least one. Correct them."
            )
        if 0 <= ignore_index < len(chosen):
            raise ValueError(
                f"ignore_index is {ignore_index}, which is also a label of the {len(chosen)} classes. It must be "
                "another number. Set it to -100."
            )
        self.folder, self.image_processor, self.resolution = folder, image_processor, resolution
        self.is_training, self.ignore_index = is_training, ignore_index
        self.class_names = tuple(folder.class_names[index] for index in chosen)
        # One entry more: -1, the folder's own mark of unlabelled pixels, is the last.
        self._labels = torch.full((count + 1,), ignore_index, dtype=torch.long)
        self._labels[chosen] = torch.arange(len(chosen))

    def set_epoch(self, epoch: int) -> None:
        """Draw other crops than in the epochs before."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.folder[index]
        image = load_rgb(sample.image_path)
        mask = torch.from_numpy(np.where(sample.mask == IGNORE_INDEX, len(self._labels) - 1, sample.mask))
        labels = self._labels[mask]
        side = self.resolution
        if self.is_training:
            drawn = np.random.default_rng((self.seed, self.epoch, index))
            return self._random_crop(image, labels, drawn)
        pixels = self._pixels(image.resize((side, side), Image.Resampling.BICUBIC))
        return {"pixel_values": pixels, "labels": _resize(labels, side, side)}

    def _random_crop(
        self, image: Image.Image, labels: torch.Tensor, drawn: np.random.Generator
    ) -> dict[str, torch.Tensor]:
        side, (low, high) = self.resolution, SCALES
        scale = drawn.uniform(low, high) * side / min(image.size)
        width, height = (max(side, round(length * scale)) for length in image.size)
        left, top = (int(drawn.integers(length - side + 1)) for length in (width, height))
        box = (left, top, left + side, top + side)
        cut = image.resize((width, height), Image.Resampling.BICUBIC).crop(box)
        labels = _resize(labels, height, width)[top : top + side, left : left + side]
        pixels = self._pixels(cut)
        if drawn.random() < 0.5:
            pixels, labels = pixels.flip(-1), labels.flip(-1)
        return {"pixel_values": pixels, "labels": labels}

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        prepared = self.image_processor(image, do_resize=False, do_center_crop=False, return_tensors="pt")
        return prepared["pixel_values"][0]


class _SetEpoch(TrainerCallback):
    """Tells a data set which epoch begins, through wrappers such as `Subset`."""

    def __init__(self, dataset: Any) -> None:
        while not hasattr(dataset, "set_epoch") and hasattr(dataset, "dataset"):
            dataset = dataset.dataset
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(int((state.epoch or 0) + 1e-6))


class SegmentationTrainer(BaseTrainer):
    """transformers' Trainer for open-vocabulary segmenters: text embeddings go in, mIoU comes out.

    Evaluation keeps a confusion matrix and nothing else: class ids are taken on the device, batch by batch. All else
    (checkpoints, resume, mixed precision, accumulation, activation checkpointing, DDP, FSDP) is Trainer's.

    Args:
        model: A segmenter with a loss, such as `DeepLabV3PlusForSegmentation`. Freeze layers before.
        args: As for Trainer; `remove_unused_columns`, `label_names` and `batch_eval_metrics` are set here.
        text_embeddings: Unit embeddings of the classes of the data, `(classes, dim)`: of an encoded vocabulary.
        ignore_index: Label of pixels that do not count. Defaults to the model's.
        synonyms: In training, what the classes are called instead of `text_embeddings`: drawn anew in every step, by
            `args.seed` and the number of the step, so that a resumed run draws the same.
        teacher: Embeds the regions of training batches, which the model gets as `region_embeddings`.
        **kwargs: Trainer's: `train_dataset`, `eval_dataset`, `callbacks`, `optimizers`, ...
    """

    def __init__(
        self,
        model: PreTrainedModel | torch.nn.Module,
        args: TrainingArguments,
        *,
        text_embeddings: torch.Tensor,
        ignore_index: int | None = None,
        synonyms: SynonymSampler | None = None,
        teacher: RegionTeacher | None = None,
        **kwargs: Any,
    ) -> None:
        settings = {"remove_unused_columns": False, "label_names": ["labels"], "batch_eval_metrics": True}
        self.text_embeddings, self.synonyms, self.teacher = text_embeddings, synonyms, teacher
        own = getattr(getattr(model, "config", None), "semantic_loss_ignore_index", 255)
        self.ignore_index = own if ignore_index is None else ignore_index
        self._metric = MeanIoU(len(text_embeddings), self.ignore_index)
        super().__init__(model, replace(args, **settings), compute_metrics=self._score, **kwargs)
        # The loss is a mean over the pixels of a batch; Trainer then averages over accumulated batches.
        self.model_accepts_loss_kwargs = False
        self.add_callback(_SetEpoch(self.train_dataset))

    def compute_loss(  # pyright: ignore[reportIncompatibleMethodOverride] - the rest is passed on as it comes
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Pass text with every batch, and with those of training what the teacher sees in their regions."""
        text: dict[str, Any] = {"text_embeddings": self.text_embeddings}
        if model.training and self.synonyms is not None:
            text = self.synonyms.inputs(self.args.seed, self.state.global_step)
        if model.training and self.teacher is not None:
            regions = self.teacher.embed(inputs["pixel_values"], inputs["labels"], self.ignore_index)
            text["region_embeddings"] = regions
        return super().compute_loss(model, {**inputs, **text}, return_outputs=return_outputs, **kwargs)

    def prediction_step(  # pyright: ignore[reportIncompatibleMethodOverride] - tensors, never nested ones
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return loss, class ids and labels: nothing larger than a label map is kept or sent to other processes."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = cast("Any", self.compute_loss(model, inputs, return_outputs=True))
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[1]
        labels = inputs["labels"]
        full = interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        return loss.detach().mean(), full.argmax(1), labels

    def _score(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, Any]:
        self._metric.update(cast("torch.Tensor", prediction.predictions), cast("torch.Tensor", prediction.label_ids))
        if not compute_result:
            return {}
        scores = self._metric.compute()
        self._metric.reset()
        return {"mean_iou": scores.mean_iou, "pixel_accuracy": scores.pixel_accuracy}


def _resize(labels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Take the nearest label."""
    return interpolate(labels[None, None].double(), size=(height, width), mode="nearest-exact")[0, 0].long()
