"""Label-free recovery after pruning: the pruned tower learns the dense tower's tokens on unlabelled images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import normalize
from torch.utils.data import Dataset
from transformers import EvalPrediction, TrainingArguments
from transformers.utils.generic import ModelOutput

from hf_opentrans.models.image_loading import ImageInput, center_crop
from hf_opentrans.models.modeling_sparse_clip import (
    SparseCLIPEncoderLayer,
    SparseCLIPModel,
    SparseCLIPVisionModelWithProjection,
)

from .trainer import BaseTrainer

CACHE_BYTES = 2 * 10**9


@dataclass
class TowerOutput(ModelOutput):
    """What a tower makes of images.

    Args:
        tokens: Projected tokens of unit length, class token first, `(batch_size, tokens, dim)`.
        taps: Hidden states after the tapped layers, `(batch_size, taps, tokens, hidden_size)`.
    """

    tokens: torch.Tensor | None = None
    taps: torch.Tensor | None = None


class DistillationTower(SparseCLIPVisionModelWithProjection):
    """A vision tower that returns all projected tokens and hidden states; it shares its weights with a CLIP."""

    tapped: tuple[int, ...] = ()

    @classmethod
    def of(cls, clip: SparseCLIPModel, tapped: Sequence[int] = ()) -> "DistillationTower":
        """Wrap the vision tower and the projection of a CLIP: training the one trains the other.

        Args:
            clip: The model.
            tapped: Layers whose output is returned too, counted from 1.

        Raises:
            ValueError: If there is no such layer.
        """
        config = clip.vision_model.config
        outside = [layer for layer in tapped if not 1 <= layer <= config.num_hidden_layers]
        if outside:
            raise ValueError(
                f"Layer {outside[0]} is tapped. It must lie in [1, {config.num_hidden_layers}]. Correct it."
            )
        with torch.device("meta"):
            tower = cls(config)
        tower.vision_model, tower.visual_projection = clip.vision_model, clip.visual_projection
        tower.tapped = tuple(tapped)
        return tower

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - other outputs
        self, pixel_values: torch.Tensor, **kwargs: Any
    ) -> TowerOutput:
        """Return the tokens and the tapped hidden states of images of shape `(batch_size, 3, height, width)`."""
        vision = self.vision_model
        hidden = vision.pre_layrnorm(vision.embeddings(pixel_values, interpolate_pos_encoding=True))
        taps = []
        for index, layer in enumerate(cast("list[SparseCLIPEncoderLayer]", vision.encoder.layers), 1):
            hidden = layer(hidden, None)
            if index in self.tapped:
                taps.append(hidden)
        tokens = normalize(self.visual_projection(vision.post_layernorm(hidden)), dim=-1)
        return TowerOutput(tokens=tokens, taps=torch.stack(taps, 1) if taps else None)


class ImageDataset(Dataset[dict[str, torch.Tensor]]):
    """Unlabelled images as central square crops, with their position.

    Args:
        images: Paths, PIL images or arrays.
        image_processor: CLIP's image processor.
        resolution: Side in pixels.

    Raises:
        ValueError: If there is no image.
    """

    def __init__(self, images: Sequence[ImageInput], image_processor: Any, resolution: int) -> None:
        if not len(images):
            raise ValueError("There are 0 images. Distillation needs some. Give a folder or a list of images.")
        self.images, self.image_processor, self.resolution = images, image_processor, resolution

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pixels = center_crop(self.images[index], self.image_processor, self.resolution)
        return {"pixel_values": pixels, "index": torch.tensor(index)}


@dataclass(frozen=True)
class DistillationWeights:
    """Weights of the parts of the loss.

    Args:
        class_token: Of 1 - cosine of the class tokens.
        patch_tokens: Of the mean 1 - cosine of the patch tokens.
        taps: Of the mean squared error of the tapped hidden states, relative to their mean square.
    """

    class_token: float = 1.0
    patch_tokens: float = 1.0
    taps: float = 1.0


class DistillationTrainer(BaseTrainer):
    """transformers' Trainer that aims at a dense teacher's tokens; no labels, no text.

    Evaluation returns the mean cosines of class token and patch tokens. What the teacher says of an image is kept in
    half precision where all of it fits into `cache_bytes`, and computed again where it does not.

    Args:
        student: The pruned CLIP, trained in place. Its frozen parameters stay frozen; its text tower never trains.
        teacher: The dense CLIP.
        args: As for Trainer; `remove_unused_columns`, `label_names` and `batch_eval_metrics` are set here.
        tapped: Layers whose hidden states count, from 1. Defaults to the middle and the last.
        weights: Of the parts of the loss.
        cache_bytes: Most memory for the teacher's outputs.
        **kwargs: Trainer's: `train_dataset` and `eval_dataset` of kind `ImageDataset`, ...

    Raises:
        ValueError: If teacher and student differ in what they must share.
    """

    def __init__(
        self,
        student: SparseCLIPModel,
        teacher: SparseCLIPModel,
        args: TrainingArguments,
        *,
        tapped: Sequence[int] | None = None,
        weights: DistillationWeights | None = None,
        cache_bytes: int = CACHE_BYTES,
        **kwargs: Any,
    ) -> None:
        _check_pair(student, teacher)
        layers = student.vision_model.config.num_hidden_layers
        tapped = sorted({max(1, layers // 2), layers}) if tapped is None else tapped
        self.weights = weights or DistillationWeights()
        self.teacher = DistillationTower.of(teacher, tapped).eval()
        self.cache_bytes = cache_bytes
        self._cache: dict[int, tuple[torch.Tensor, ...]] = {}
        self._sums = torch.zeros(3, dtype=torch.float64)
        settings = {"remove_unused_columns": False, "label_names": ["index"], "batch_eval_metrics": True}
        tower = DistillationTower.of(student, tapped)
        super().__init__(tower, replace(args, **settings), compute_metrics=self._score, **kwargs)
        cast("Any", self.teacher).to(self.args.device)
        self.model_accepts_loss_kwargs = False

    def compute_loss(  # pyright: ignore[reportIncompatibleMethodOverride] - the rest of Trainer's arguments is unused
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Compare the student's tokens and taps with the teacher's."""
        output = model(pixel_values=inputs["pixel_values"])
        tokens, taps = self._teach(inputs, is_training=model.training)
        cosines = (output.tokens.float() * tokens).sum(-1)
        loss = self.weights.class_token * (1 - cosines[:, 0]).mean()
        loss = loss + self.weights.patch_tokens * (1 - cosines[:, 1:]).mean()
        if taps is not None and self.weights.taps:
            change = (output.taps.float() - taps).square().mean((0, 2, 3))
            loss = loss + self.weights.taps * (change / taps.square().mean((0, 2, 3))).mean()
        return (loss, cosines) if return_outputs else loss

    def prediction_step(  # pyright: ignore[reportIncompatibleMethodOverride] - tensors, never nested ones
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return loss, cosines of class token and patches, and positions."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, cosines = cast("Any", self.compute_loss(model, inputs, return_outputs=True))
        pair = torch.stack([cosines[:, 0], cosines[:, 1:].mean(1)], 1)
        return loss.detach().mean(), pair, inputs["index"]

    @torch.no_grad()
    def _teach(self, inputs: dict[str, Any], *, is_training: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the teacher's tokens and taps in float32, from memory where they are there."""
        # By content: positions would be those of other images in another data set.
        keys = [hash(image.cpu().numpy().tobytes()) for image in inputs["pixel_values"]]
        if all(key in self._cache for key in keys):
            kept = [torch.stack(parts) for parts in zip(*(self._cache[key] for key in keys), strict=True)]
            parts = [part.to(inputs["pixel_values"].device).float() for part in kept]
            return parts[0], parts[1] if len(parts) > 1 else None
        output = self.teacher(pixel_values=inputs["pixel_values"])
        halves = [part.half() for part in (output.tokens, output.taps) if part is not None]
        if self._fits(halves, is_training):
            for key, *parts in zip(keys, *(half.cpu() for half in halves), strict=True):
                self._cache[key] = tuple(parts)
        # Rounded in any case: a run that goes on after a stop sees the same numbers, kept or not.
        return halves[0].float(), halves[1].float() if len(halves) > 1 else None

    def _fits(self, parts: list[torch.Tensor], is_training: bool) -> bool:
        dataset: Any = self.train_dataset if is_training else self.eval_dataset
        one = sum(part[0].numel() * part.element_size() for part in parts)
        return hasattr(dataset, "__len__") and one * len(dataset) <= self.cache_bytes

    def _score(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, Any]:
        cosines = torch.as_tensor(prediction.predictions).double().cpu()
        self._sums += torch.cat([cosines.sum(0), torch.tensor([float(len(cosines))], dtype=torch.float64)])
        if not compute_result:
            return {}
        first, second, count = self._sums.tolist()
        self._sums.zero_()
        return {"class_token_cosine": first / count, "patch_token_cosine": second / count}


def _check_pair(student: nn.Module, teacher: nn.Module) -> None:
    ours, theirs = (cast("SparseCLIPModel", model).vision_model.config for model in (student, teacher))
    for name in ("hidden_size", "num_hidden_layers", "patch_size", "image_size", "projection_dim"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"The student has {name}={getattr(ours, name)} and the teacher {getattr(theirs, name)}. They must be "
                "equal: the student is a pruned copy of the teacher. Give the model that it was pruned from."
            )
    if not any(p.requires_grad for p in cast("SparseCLIPModel", student).vision_model.parameters()):
        raise ValueError(
            "No parameter of the student's vision tower trains. Distillation trains it. Call "
            "student.vision_model.requires_grad_(True), or select layers."
        )
