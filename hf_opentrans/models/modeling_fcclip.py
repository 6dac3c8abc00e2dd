"""FC-CLIP on a frozen CLIP vision transformer: mask queries, classified twice.

Yu et al. 2023 (arXiv 2308.02487) on a plain transformer: the pyramid reads four layers of the tower, which also gives
the dense map (see `modeling_open_vocabulary`) for the out-of-vocabulary classifier. The tower and the text are never
trained, so `encode` can be run once per image and its result be kept.
This file travels with checkpoints as remote code.
"""

from collections.abc import Collection, Sequence
from typing import Any, Self, cast

import torch
from torch import nn
from torch.nn.functional import normalize
from transformers.models.mask2former.modeling_mask2former import Mask2FormerMLPPredictionHead

from .configuration_fcclip import FCCLIPConfig
from .configuration_sparse_clip import SparseCLIPVisionConfig
from .modeling_mask_queries import (
    MaskQueriesLoss,
    MaskQueriesOutput,
    MaskQueryDecoder,
    TextClasses,
    hard_mask_pool,
    mask2former_config,
    semantic_logits,
    text_classes,
)
from .modeling_mask_query_base import MaskQueriesModel, TextClassifier
from .vocabulary import Vocabulary


class InVocabularyClassifier(TextClassifier):
    """Compares masks with text, by what the pixel decoder sees inside of them and by the states of their queries."""

    def __init__(self, hidden_dim: int, projection_dim: int) -> None:
        super().__init__(projection_dim)
        self.pool_norm = nn.LayerNorm(hidden_dim)
        self.pool_proj = nn.Linear(hidden_dim, hidden_dim)
        self.class_embed = Mask2FormerMLPPredictionHead(hidden_dim, hidden_dim, projection_dim)

    def forward(
        self, mask_features: torch.Tensor, masks: torch.Tensor, queries: torch.Tensor, text: TextClasses
    ) -> torch.Tensor:
        """Return logits of shape `(batch_size, num_queries, classes + 1)`; the last is "no object".

        Args:
            mask_features: Of shape `(batch_size, hidden_dim, height, width)`.
            masks: Logits of shape `(batch_size, num_queries, height, width)`; no gradient reaches them.
            queries: States of shape `(batch_size, num_queries, hidden_dim)`.
            text: Classes to compare with.
        """
        pooled, _ = hard_mask_pool(mask_features, masks)
        embeds = normalize(self.class_embed(self.pool_proj(self.pool_norm(pooled)) + queries), dim=-1)
        return self.compare(embeds, text)


class FCCLIPHead(nn.Module):
    """All that is trained."""

    def __init__(self, config: FCCLIPConfig) -> None:
        super().__init__()
        width = cast("SparseCLIPVisionConfig", config.vision_config).hidden_size
        self.decoder = MaskQueryDecoder(mask2former_config(config), width)
        self.classifier = InVocabularyClassifier(config.hidden_dim, cast("int", config.projection_dim))


def geometric_ensemble(
    in_vocabulary: torch.Tensor, out_of_vocabulary: torch.Tensor, weights: torch.Tensor, is_valid: torch.Tensor
) -> torch.Tensor:
    """Mix two classifications of masks: p_in^(1-w) p_out^w over the classes; "no object" is the first one's alone.

    Args:
        in_vocabulary: Logits of shape `(batch_size, num_queries, classes + 1)`, the last for "no object".
        out_of_vocabulary: Logits of shape `(batch_size, num_queries, classes)`.
        weights: Of the second one for every class, in [0, 1], `(classes,)`.
        is_valid: Whether a mask has a position that the second one saw, `(batch_size, num_queries)`; its weight is
            zero where not.

    Returns:
        Logarithms of probabilities, of shape `(batch_size, num_queries, classes + 1)`, in single precision.
    """
    with_void = in_vocabulary.float().log_softmax(-1)
    weight = weights.float() * is_valid[..., None]
    first = in_vocabulary[..., :-1].float().log_softmax(-1)
    second = out_of_vocabulary.float().log_softmax(-1)
    mixed = ((1 - weight) * first + weight * second).log_softmax(-1)
    real = with_void[..., :-1].logsumexp(-1, keepdim=True)
    return torch.cat([mixed + real, with_void[..., -1:]], -1)


def clip_weights(vocabulary: Vocabulary, seen: Collection[str], alpha: float, beta: float) -> torch.Tensor:
    """Return the weight of CLIP's own classification for every class of a vocabulary, `(classes,)`.

    Args:
        vocabulary: Its names count, not its embeddings.
        seen: Casefolded names of the training; a class is seen if one of its names is among them.
        alpha: Weight of seen classes, in [0, 1].
        beta: Weight of the others, in [0, 1].
    """
    is_seen = [any(name.casefold() in seen for name in group) for group in vocabulary.classes]
    return torch.tensor([alpha if each else beta for each in is_seen], dtype=torch.float32)


class FCCLIPForSegmentation(MaskQueriesModel):
    """A frozen CLIP with trained mask queries: semantic, instance and panoptic segmentation by text.

    The vision and the text tower have no gradients, keep no graph, and stay in evaluation mode. Behind the maps
    `encode` returns CLIP's unit dense embeddings, `(batch_size, dim, grid_height, grid_width)`, which depend on
    `config.segmentation_mode`.
    """

    config: FCCLIPConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = FCCLIPConfig

    def __init__(self, config: FCCLIPConfig) -> None:
        super().__init__(config)
        self.head = FCCLIPHead(config)
        self.post_init()
        self._set_trainable()

    def _set_trainable(self) -> None:
        for part in self._frozen_parts:
            part.requires_grad_(False).eval()
        self.logit_scale.requires_grad_(False)

    @property
    def _frozen_parts(self) -> tuple[nn.Module, ...]:
        return self.vision_model, self.text_model, self.visual_projection, self.text_projection

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the head; CLIP stays in evaluation mode."""
        super().train(mode)
        for part in self._frozen_parts:
            part.eval()
        return self

    @property
    def _more_features(self) -> tuple[str, ...]:
        return ("the dense embeddings",)

    @torch.no_grad()
    def _read_tower(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._read_tower_and_clip(pixel_values)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - another task, another signature
        self,
        pixel_values: torch.Tensor | None = None,
        vocabulary: Vocabulary | None = None,
        text_embeddings: torch.Tensor | TextClasses | None = None,
        labels: torch.Tensor | None = None,
        mask_labels: Sequence[torch.Tensor] | None = None,
        class_labels: Sequence[torch.Tensor] | None = None,
        features: Sequence[torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> MaskQueriesOutput:
        """Propose masks and classify them; with labels, return the loss over all layers of the decoder.

        The loss is that of the in-vocabulary classifier. In evaluation mode the outputs hold the ensemble with CLIP's
        own classification of the masks, in training mode the in-vocabulary classifier alone. With a loss, no gradient
        flows through `logits`.

        Args:
            pixel_values: Images of shape `(batch_size, 3, height, width)`, both sides multiples of the patch size.
            vocabulary: An encoded [`Vocabulary`] (see `encode_vocabulary`). A class is seen if one of its names is in
                `config.seen_classes`.
            text_embeddings: Instead of a vocabulary, unit embeddings of shape `(queries, dim)`, each a class. Without
                names they stand for the classes of the training: all count as seen. Or a [`TextClasses`], for graphs.
            labels: Index of the class of every pixel, `(batch_size, label_height, label_width)`, of any size;
                `config.semantic_loss_ignore_index` where a pixel does not count.
            mask_labels: Instead of labels, for every image masks of shape `(masks, height, width)`, zero outside.
            class_labels: With `mask_labels`, for every image the classes of its masks, `(masks,)`.
            features: Instead of images, what `encode` returned for them.
            **kwargs: Ignored, so that a whole batch of a processor can be passed.

        Returns:
            `logits` are the logarithm of the share of every class, `(batch_size, queries, 4 grid_height,
            4 grid_width)`: that of a class is in the channel of its first name, its other names have a very low one.

        Raises:
            ValueError: If the image is no multiple of the patch size, the text is not encoded, labels are given
                without text or outside of it, or arguments exclude each other.
        """
        *maps, dense = self._features(pixel_values, features)
        text = text_classes(vocabulary, text_embeddings, like=dense)
        targets = self._targets(text, labels, mask_labels, class_labels, dense.shape[0])
        found = self.head.decoder(maps)
        masks = found.masks[-1]
        outputs = MaskQueriesOutput(dense_embeds=dense, vocabulary=vocabulary, masks_queries_logits=masks)
        if text is None:
            return outputs
        # Without a loss the layers before the last need no classes.
        layers = slice(None if targets is not None else -1, None)
        classes = [
            self.head.classifier(found.mask_features, layer_masks, queries, text)
            for layer_masks, queries in zip(found.masks[layers], found.queries[layers], strict=True)
        ]
        if targets is not None:
            outputs.loss = MaskQueriesLoss(self.head.decoder.config, targets, text.count).total(found.masks, classes)
        best = classes[-1]
        if not self.training:
            best = self._ensemble(best, masks, dense, text, self._clip_weights(vocabulary, text))
        outputs.class_queries_logits = best
        with torch.set_grad_enabled(torch.is_grad_enabled() and targets is None):
            outputs.logits = text.to_queries(semantic_logits(best, masks))
        return outputs

    def _clip_weights(self, vocabulary: Vocabulary | None, text: TextClasses) -> torch.Tensor:
        """Return the weight of CLIP's own classification for every class, `(classes,)`."""
        if text.clip_weights is not None:
            return text.clip_weights
        config = self.config
        if vocabulary is None:
            return text.embeddings.new_full((text.count,), config.ensemble_alpha, dtype=torch.float32)
        weights = clip_weights(vocabulary, config.seen_names, config.ensemble_alpha, config.ensemble_beta)
        return weights.to(text.embeddings.device)

    def _ensemble(
        self,
        in_vocabulary: torch.Tensor,
        masks: torch.Tensor,
        dense: torch.Tensor,
        text: TextClasses,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        pooled, is_valid = hard_mask_pool(dense, masks)
        cosines = text.best_alias(normalize(pooled, dim=-1) @ text.embeddings.T)
        return geometric_ensemble(in_vocabulary, self.logit_scale.exp() * cosines, weights, is_valid)


__all__ = ["FCCLIPForSegmentation"]
