"""Mask queries over a plain vision transformer: what FC-CLIP and its kin share, on transformers' Mask2Former.

The tower has one resolution; a simple pyramid makes four of it, which the pixel decoder and the masked decoder read.
Losses differ from Mask2Former's in one thing: pixels without a label do not count. Masks are compared on pixels drawn
from those that have one, a query that finds no mask learns "no object" only in images that have one, and everything
else is inherited. This file travels with checkpoints as remote code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import distributed, nn
from torch.nn.functional import interpolate, normalize
from transformers import Mask2FormerConfig
from transformers.models.mask2former import modeling_mask2former as mask2former
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerHungarianMatcher,
    Mask2FormerLoss,
    Mask2FormerPixelDecoder,
    Mask2FormerPreTrainedModel,
    Mask2FormerTransformerModule,
    dice_loss,
    pair_wise_dice_loss,
    pair_wise_sigmoid_cross_entropy_loss,
    sample_point,
    sigmoid_cross_entropy_loss,
)

from .modeling_open_vocabulary import OpenVocabularySegmenterOutput, text_embeddings_of
from .vocabulary import Vocabulary

MOST_GROUPS = 16
LOWEST_LOGIT = -1e4  # of further aliases of a class: no probability, and finite in half precision too
SMALLEST_SHARE = 1e-30  # of a class in a pixel, before the logarithm

# For every image the matched queries and, in the same order, their masks.
MatchedPairs = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class MaskQueriesOutput(OpenVocabularySegmenterOutput):
    """What a segmenter with mask queries returns: an [`OpenVocabularySegmenterOutput`] and the masks.

    Args:
        class_queries_logits (`torch.FloatTensor` of shape `(batch_size, num_queries, classes + 1)`, *optional*):
            Class of every mask; the last one is "no object".
        masks_queries_logits (`torch.FloatTensor` of shape `(batch_size, num_queries, height, width)`):
            Masks, on a grid four times as fine as the patches; inside where positive.
    """

    class_queries_logits: torch.Tensor | None = None
    masks_queries_logits: torch.Tensor | None = None


# Text


@dataclass(frozen=True)
class TextClasses:
    """Text embeddings, and the class that each belongs to.

    Args:
        embeddings: Unit vectors of shape `(queries, dim)`.
        query_to_class: Class of every query, ascending, of shape `(queries,)`.
        count: Number of classes.
        clip_weights: Of CLIP's own classification for every class, in [0, 1], `(classes,)`; None leaves them to the
            names and the configuration.
        class_queries: Of a graph for any number of names, which must not compare the two numbers: the queries of every
            class, `(classes, most)`, its first one again where there are fewer.
    """

    embeddings: torch.Tensor
    query_to_class: torch.Tensor
    count: int
    clip_weights: torch.Tensor | None = None
    class_queries: torch.Tensor | None = None

    @property
    def _has_aliases(self) -> bool:
        return self.class_queries is not None or self.count != self.query_to_class.shape[0]

    def best_alias(self, logits: torch.Tensor) -> torch.Tensor:
        """Reduce logits of shape `(batch_size, masks, queries)` to `(batch_size, masks, classes)`."""
        if self.class_queries is not None:
            found = logits.index_select(-1, self.class_queries.flatten())
            return found.unflatten(-1, self.class_queries.shape).amax(-1)
        if not self._has_aliases:
            return logits
        best = logits.new_zeros(*logits.shape[:-1], self.count)
        index = self.query_to_class.expand_as(logits)
        return best.scatter_reduce(-1, index, logits, "amax", include_self=False)

    def mean_alias(self) -> torch.Tensor:
        """Return one unit embedding per class, the mean over its aliases, `(classes, dim)`."""
        total = self.embeddings.new_zeros(self.count, self.embeddings.shape[1])
        return normalize(total.index_add(0, self.query_to_class, self.embeddings), dim=-1)

    def to_queries(self, logits: torch.Tensor) -> torch.Tensor:
        """Spread `(batch_size, classes, height, width)` over the queries: the first alias of a class stands for it.

        The other aliases get a very low logit, so that a softmax over the queries is one over the classes.
        """
        if not self._has_aliases:
            return logits
        owners = self.query_to_class
        # By counting: a graph for any number of queries has no neighbours and no search.
        first = (owners[None] < torch.arange(self.count, device=owners.device)[:, None]).sum(1)
        is_first = torch.arange(owners.shape[0], device=owners.device) == first.index_select(0, owners)
        lowest = logits.new_full((), LOWEST_LOGIT)
        return torch.where(is_first[:, None, None], logits.index_select(1, owners), lowest)


def text_classes(
    vocabulary: Vocabulary | None, text_embeddings: torch.Tensor | TextClasses | None, like: torch.Tensor
) -> TextClasses | None:
    """Return the classes of an encoded vocabulary, or of embeddings that are each a class; None without either.

    Args:
        vocabulary: An encoded vocabulary.
        text_embeddings: Instead of it, unit vectors of shape `(queries, dim)`; or what is returned.
        like: Device and precision to take, and the width as its size 1.

    Raises:
        ValueError: If the vocabulary is not encoded, or the embeddings have another shape.
    """
    if isinstance(text_embeddings, TextClasses):
        return text_embeddings
    found = text_embeddings_of(vocabulary, text_embeddings)
    if found is None:
        return None
    if found.ndim != 2 or not len(found) or found.shape[1] != like.shape[1]:
        raise ValueError(
            f"text_embeddings have the shape {tuple(found.shape)}. They must be (queries, {like.shape[1]}), at least "
            "one. Encode the names with this model."
        )
    classes = torch.arange(len(found)) if vocabulary is None else vocabulary.query_to_class
    count = len(found) if vocabulary is None else len(vocabulary.classes)
    return TextClasses(found.to(like.device, like.dtype), classes.to(like.device), count)


# From one map of a tower to masks


def _groups(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, MOST_GROUPS), channels)


def _project(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 1, bias=False), _groups(outputs)


class ViTFeaturePyramid(nn.Module):
    """Maps of a quarter, half, one and two patches per position, of maps that all have one.

    Li et al. 2022 (arXiv 2203.16527). Tokens are normalised first: a few channels of a CLIP tower are very large.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half, quarter = max(1, inputs // 2), max(1, inputs // 4)
        self.norms = nn.ModuleList(nn.LayerNorm(inputs) for _ in range(4))
        self.levels = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(inputs, half, 2, 2),
                    _groups(half),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, 2),
                    *_project(quarter, outputs),
                ),
                nn.Sequential(nn.ConvTranspose2d(inputs, half, 2, 2), *_project(half, outputs)),
                nn.Sequential(*_project(inputs, outputs)),
                # ceil_mode: an image of one row of patches has a coarse row too.
                nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), *_project(inputs, outputs)),
            ]
        )

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return four maps, the finest first, of four of shape `(batch_size, inputs, height, width)`, or of one."""
        chosen = list(maps) * (len(self.levels) if len(maps) == 1 else 1)
        normed = [norm(x.movedim(1, -1)).movedim(-1, 1) for norm, x in zip(self.norms, chosen, strict=True)]
        return [level(x) for level, x in zip(self.levels, normed, strict=True)]


@dataclass(frozen=True)
class MaskQueries:
    """What the masked decoder gives: one entry per layer, and one before the first.

    Args:
        masks: Mask logits, each of shape `(batch_size, num_queries, height, width)`.
        queries: States of the queries, each of shape `(batch_size, num_queries, hidden_dim)`.
        mask_features: Of the pixel decoder, `(batch_size, hidden_dim, height, width)`.
    """

    masks: tuple[torch.Tensor, ...]
    queries: tuple[torch.Tensor, ...]
    mask_features: torch.Tensor


def mask2former_config(config: Any) -> Mask2FormerConfig:
    """Return the configuration of transformers' parts; `config` is a [`MaskQueriesConfig`]."""
    return Mask2FormerConfig(
        feature_size=config.hidden_dim,
        mask_feature_size=config.hidden_dim,
        hidden_dim=config.hidden_dim,
        encoder_feedforward_dim=max(1, config.feedforward_dim // 2),
        dim_feedforward=config.feedforward_dim,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers + 1,
        num_attention_heads=config.num_attention_heads,
        num_queries=config.num_queries,
        class_weight=float(config.class_weight),
        mask_weight=float(config.mask_weight),
        dice_weight=float(config.dice_weight),
        no_object_weight=float(config.no_object_weight),
        train_num_points=config.train_num_points,
    )


class MaskQueryDecoder(Mask2FormerPreTrainedModel):
    """Pyramid, pixel decoder and masked decoder, with Mask2Former's own initialisation.

    Args:
        config: See `mask2former_config`. Its strides are nominal: only their ratios matter.
        inputs: Width of the tower.
    """

    def __init__(self, config: Mask2FormerConfig, inputs: int) -> None:
        super().__init__(config)
        width = config.feature_size
        self.pyramid = ViTFeaturePyramid(inputs, width)
        self.pixel_decoder = Mask2FormerPixelDecoder(config, [width] * len(self.pyramid.levels))
        self.transformer_module = Mask2FormerTransformerModule(in_features=width, config=config)
        self.post_init()

    def forward(self, maps: Sequence[torch.Tensor]) -> MaskQueries:
        """Return masks of the maps of a tower, each of shape `(batch_size, inputs, height, width)`: four, or one."""
        pixels = self.pixel_decoder(self.pyramid(maps), output_attentions=False, output_hidden_states=False)
        found = self.transformer_module(pixels.multi_scale_features, pixels.mask_features)
        queries = tuple(state.transpose(0, 1) for state in found.intermediate_hidden_states)
        return MaskQueries(tuple(found.masks_queries_logits), queries, pixels.mask_features)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Of foreign classes transformers skips modules without weights of their own: Mask2Former's attention.
        super()._initialize_weights(module, is_custom_code=False)


def hard_mask_pool(features: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Average features inside of masks; no gradient reaches the masks.

    Args:
        features: Of shape `(batch_size, dim, height, width)`.
        masks: Logits of shape `(batch_size, masks, mask_height, mask_width)`; resized (bilinear) to the features, a
            position is inside where they are positive.

    Returns:
        Means of shape `(batch_size, masks, dim)`, zero for masks without a position; and whether there is one, of
        shape `(batch_size, masks)`.
    """
    masks = masks.detach()
    if masks.shape[-2:] != features.shape[-2:]:
        masks = interpolate(masks, size=features.shape[-2:], mode="bilinear", align_corners=False)
    inside = (masks > 0).to(features.dtype)
    area = inside.sum((-2, -1))
    pooled = torch.einsum("bdhw,bqhw->bqd", features, inside) / area.clamp_min(1)[..., None]
    return pooled, area > 0


def semantic_logits(classes: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Return log sum_q softmax(classes)_q sigmoid(masks)_q without "no object", in single precision.

    Args:
        classes: Logits of shape `(batch_size, num_queries, classes + 1)`.
        masks: Logits of shape `(batch_size, num_queries, height, width)`.

    Returns:
        Of shape `(batch_size, classes, height, width)`.
    """
    shares = classes.float().softmax(-1)[..., :-1]
    return torch.einsum("bqc,bqhw->bchw", shares, masks.float().sigmoid()).clamp_min(SMALLEST_SHARE).log()


# Training


@dataclass(frozen=True)
class MaskTargets:
    """Masks to find, one entry per image.

    Args:
        masks: Boolean, each of shape `(masks, height, width)`.
        classes: Class of every mask, each of shape `(masks,)`.
        counted: Pixels that have a label, each boolean of shape `(height, width)`. In images without any, nothing
            counts.
    """

    masks: tuple[torch.Tensor, ...]
    classes: tuple[torch.Tensor, ...]
    counted: tuple[torch.Tensor, ...]


def semantic_targets(labels: torch.Tensor, batch_size: int, classes: int, ignore_index: int) -> MaskTargets:
    """Return one mask per class that is present. Ignored pixels are in no mask, and are not counted.

    Args:
        labels: Class of every pixel, `(batch_size, height, width)`.
        batch_size: Of the images.
        classes: Number of classes.
        ignore_index: Label of pixels that do not count.

    Raises:
        ValueError: If the labels have another shape, or lie outside of the classes.
    """
    if labels.ndim != 3 or len(labels) != batch_size:
        raise ValueError(
            f"labels have the shape {tuple(labels.shape)}. They must be (batch_size, height, width) with batch_size "
            f"{batch_size}. Correct them."
        )
    labels = labels.long()
    counted = labels != ignore_index
    _refuse_outside(labels[counted], classes, f", or be ignore_index={ignore_index}")
    present = [image[mask].unique() for image, mask in zip(labels, counted, strict=True)]
    masks = tuple(image[None] == ids[:, None, None] for image, ids in zip(labels, present, strict=True))
    return MaskTargets(masks, tuple(present), tuple(counted))


def instance_targets(
    mask_labels: Sequence[torch.Tensor], class_labels: Sequence[torch.Tensor], batch_size: int, classes: int
) -> MaskTargets:
    """Return the given masks as targets; all pixels count.

    Args:
        mask_labels: For every image, `(masks, height, width)`, zero outside of the mask.
        class_labels: For every image, the class of every mask, `(masks,)`.
        batch_size: Of the images.
        classes: Number of classes.

    Raises:
        ValueError: If images, masks and classes do not fit together.
    """
    fits = len(mask_labels) == len(class_labels) == batch_size and all(
        masks.ndim == 3 and ids.shape == masks.shape[:1] for masks, ids in zip(mask_labels, class_labels, strict=True)
    )
    if not fits:
        raise ValueError(
            f"mask_labels have the shapes {[tuple(x.shape) for x in mask_labels]}, class_labels "
            f"{[tuple(x.shape) for x in class_labels]}. They must be (masks, height, width) and (masks,) for each of "
            f"the {batch_size} images. Correct them."
        )
    for ids in class_labels:
        _refuse_outside(ids, classes)
    counted = tuple(torch.ones(x.shape[1:], dtype=torch.bool, device=x.device) for x in mask_labels)
    return MaskTargets(tuple(x > 0 for x in mask_labels), tuple(ids.long() for ids in class_labels), counted)


def _refuse_outside(labels: torch.Tensor, classes: int, exception: str = "") -> None:
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"Labels reach from {int(labels.min())} to {int(labels.max())}. They must lie in [0, {classes - 1}], one "
            f"for each class{exception}. Correct the masks or the vocabulary."
        )


def _draw_pixels(counted: torch.Tensor, rows: int, count: int) -> torch.Tensor:
    """Return flat indices of counted pixels, `(rows, count)`; all pixels, once, where there are no more."""
    places = counted.flatten().nonzero()[:, 0]
    if len(places) <= count:
        return places.expand(rows, -1)
    return places[torch.randint(len(places), (rows, count), device=places.device)]


def _sample(masks: torch.Tensor, pixels: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Return `(rows, masks, pixels)` of masks `(rows, masks, h, w)`, as resized (bilinear) to `size`."""
    height, width = size
    x, y = (pixels % width + 0.5) / width, (pixels.div(width, rounding_mode="floor") + 0.5) / height
    return sample_point(masks, torch.stack((x, y), -1).to(masks), align_corners=False, padding_mode="border")


class CountedPixelMatcher(Mask2FormerHungarianMatcher):
    """The Hungarian matcher of Mask2Former, whose points are pixels that have a label."""

    def __init__(self, config: Mask2FormerConfig, counted: Sequence[torch.Tensor]) -> None:
        super().__init__(config.class_weight, config.mask_weight, config.dice_weight, config.train_num_points)
        self.counted = counted

    @torch.no_grad()
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - upstream calls lists of tensors a tensor
        self,
        masks_queries_logits: torch.Tensor,
        class_queries_logits: torch.Tensor,
        mask_labels: Sequence[torch.Tensor],
        class_labels: Sequence[torch.Tensor],
    ) -> MatchedPairs:
        """Return for every image the matched queries and, in the same order, their masks.

        Args:
            masks_queries_logits: Of shape `(batch_size, num_queries, height, width)`.
            class_queries_logits: Of shape `(batch_size, num_queries, classes + 1)`.
            mask_labels: See [`MaskTargets`].
            class_labels: See [`MaskTargets`].
        """
        images = zip(masks_queries_logits, class_queries_logits, mask_labels, class_labels, self.counted, strict=True)
        return [self._match(*image) for image in images]

    def _match(
        self,
        masks: torch.Tensor,
        classes: torch.Tensor,
        mask_labels: torch.Tensor,
        class_labels: torch.Tensor,
        counted: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not len(class_labels):
            return torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
        pixels = _draw_pixels(counted, 1, self.num_points)
        logits = _sample(masks[None], pixels, counted.shape)[0]
        truth = mask_labels.flatten(1)[:, pixels[0]].to(logits.dtype)
        cost = self.cost_mask * pair_wise_sigmoid_cross_entropy_loss(logits, truth)
        cost = cost + self.cost_dice * pair_wise_dice_loss(logits, truth)
        cost = cost - self.cost_class * classes.softmax(-1)[:, class_labels]
        worst = torch.finfo(cost.dtype).max
        cost = torch.nan_to_num(cost, nan=worst, posinf=worst, neginf=worst)
        # scipy's, by way of transformers: remote code may not ask for scipy itself.
        rows, columns = cast("Any", mask2former).linear_sum_assignment(cost.cpu())
        return torch.as_tensor(rows), torch.as_tensor(columns)


class MaskQueriesLoss(Mask2FormerLoss):
    """The loss of Mask2Former for one batch and its classes. Pixels without a label do not count.

    Args:
        config: See `mask2former_config`.
        targets: What is to be found.
        classes: Number of classes, without "no object".
    """

    def __init__(self, config: Mask2FormerConfig, targets: MaskTargets, classes: int) -> None:
        weights = {
            "loss_cross_entropy": config.class_weight,
            "loss_mask": config.mask_weight,
            "loss_dice": config.dice_weight,
        }
        super().__init__(config, weights)
        # Upstream takes the number of classes from its config; here every call may have another vocabulary.
        self.num_labels = classes
        self.empty_weight = torch.tensor([1.0] * classes + [self.eos_coef], device=targets.counted[0].device)
        self.matcher = CountedPixelMatcher(config, targets.counted)
        self.targets = targets

    def total(self, masks: Sequence[torch.Tensor], classes: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the weighted sum over the layers of the decoder, a scalar in single precision.

        Args:
            masks: Mask logits of every layer, `(batch_size, num_queries, height, width)`.
            classes: Class logits of every layer, `(batch_size, num_queries, classes + 1)`.
        """
        layers = [self.of_layer(*layer)[0] for layer in zip(masks, classes, strict=True)]
        return torch.stack(layers).sum()

    def of_layer(self, masks: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, MatchedPairs]:
        """Return the weighted loss of one layer, a scalar in single precision, and the pairs that it is of.

        Args:
            masks: Mask logits, `(batch_size, num_queries, height, width)`.
            classes: Class logits, `(batch_size, num_queries, classes + 1)`.
        """
        masks, classes = masks.float(), classes.float()
        ids: Any = self.targets.classes
        pairs = self.matcher(masks, classes, self.targets.masks, ids)
        parts = self.loss_masks(masks, self.targets.masks, pairs, self.get_num_masks(ids, device=ids[0].device))
        parts |= self.loss_labels(classes, ids, pairs)
        weighted = [self.weight_dict[name] * part for name, part in parts.items()]
        return torch.stack(weighted).sum(), pairs

    def loss_labels(
        self, class_queries_logits: torch.Tensor, class_labels: Sequence[torch.Tensor], indices: Any
    ) -> dict[str, torch.Tensor]:
        """Return the cross-entropy over the queries of images that have a label; zero without any such image."""
        kept = [index for index, counted in enumerate(self.targets.counted) if bool(counted.any())]
        if not kept:
            return {"loss_cross_entropy": class_queries_logits.sum() * 0}
        chosen = [class_labels[index] for index in kept]
        return super().loss_labels(class_queries_logits[kept], chosen, [indices[index] for index in kept])  # pyright: ignore[reportArgumentType]

    def loss_masks(  # pyright: ignore[reportIncompatibleMethodOverride] - upstream calls a tensor an integer
        self,
        masks_queries_logits: torch.Tensor,
        mask_labels: Sequence[torch.Tensor],
        indices: Any,
        num_masks: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Return the binary cross-entropy and the dice loss of matched masks, on labelled pixels."""
        losses = {"loss_mask": masks_queries_logits.sum() * 0, "loss_dice": masks_queries_logits.sum() * 0}
        images = zip(masks_queries_logits, mask_labels, self.targets.counted, indices, strict=True)
        for masks, labels, counted, (queries, chosen) in images:
            if len(queries):
                predicted = masks[queries][:, None]
                pixels = self._uncertain_pixels(predicted.detach(), counted)
                logits = _sample(predicted, pixels, counted.shape)[:, 0]
                truth = labels[chosen].flatten(1).gather(1, pixels).to(logits.dtype)
                count: Any = num_masks
                losses["loss_mask"] = losses["loss_mask"] + sigmoid_cross_entropy_loss(logits, truth, count)
                losses["loss_dice"] = losses["loss_dice"] + dice_loss(logits, truth, count)
        return losses

    def _uncertain_pixels(self, masks: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        """Draw pixels of shape `(masks, pixels)`, most of them where the masks `(masks, 1, h, w)` are undecided."""
        drawn = _draw_pixels(counted, len(masks), int(self.num_points * self.oversample_ratio))
        if drawn.shape[1] <= self.num_points:
            return drawn
        doubt = self.calculate_uncertainty(_sample(masks, drawn, counted.shape)[:, 0])
        uncertain = int(self.importance_sample_ratio * self.num_points)
        chosen = drawn.gather(1, doubt.topk(uncertain, dim=1).indices)
        return torch.cat([chosen, _draw_pixels(counted, len(masks), self.num_points - uncertain)], 1)

    def get_num_masks(  # pyright: ignore[reportIncompatibleMethodOverride] - upstream calls a list a tensor
        self, class_labels: Sequence[torch.Tensor], device: torch.device
    ) -> torch.Tensor:
        """Return the mean number of masks per process, at least 1; of this process alone outside of training."""
        count = torch.tensor(float(sum(len(ids) for ids in class_labels)), device=device)
        if torch.is_grad_enabled() and distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(count)
            count = count / distributed.get_world_size()
        return count.clamp(min=1)


__all__ = [
    "MaskQueriesLoss",
    "MaskQueriesOutput",
    "MaskQueryDecoder",
    "MaskTargets",
    "TextClasses",
    "ViTFeaturePyramid",
    "hard_mask_pool",
    "instance_targets",
    "mask2former_config",
    "semantic_logits",
    "semantic_targets",
    "text_classes",
]
