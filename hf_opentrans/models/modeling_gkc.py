"""GKC on a CLIP vision transformer that trains: mask queries that learn what CLIP sees in their regions.

Han et al. 2023 (arXiv 2303.09181). Queries are projected into the space shared with text and classified there; CLIP's
image embedding is not read, neither in training nor afterwards (but with `clip_residual`, which is not of the paper).
CLIP's knowledge comes from a frozen teacher that embeds crops of the target regions: see `RegionTeacher`. The pyramid
reads four layers of the tower, as in FC-CLIP.
This file travels with checkpoints as remote code.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import initialization as init

from .configuration_gkc import GKCConfig
from .configuration_sparse_clip import SparseCLIPVisionConfig
from .modeling_mask_queries import (
    MaskQueriesLoss,
    MaskQueriesOutput,
    MaskQueryDecoder,
    MaskTargets,
    MatchedPairs,
    TextClasses,
    hard_mask_pool,
    mask2former_config,
    semantic_logits,
    text_classes,
)
from .modeling_mask_query_base import MaskQueriesModel, TextClassifier
from .vocabulary import Vocabulary


def vanilla_loss(regions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean squared distance of region embeddings to CLIP's embeddings of the same regions.

        L = 1/n sum_i ||v_i - c_i||^2, v and c of unit length; zero without regions

    Args:
        regions: v of shape `(regions, dim)`.
        targets: c, CLIP's embeddings of the same regions.
    """
    distances = (normalize(regions, dim=-1) - normalize(targets, dim=-1)).square().sum()
    return distances / max(len(regions), 1)


def vision_loss(
    regions: torch.Tensor,
    targets: torch.Tensor,
    texts: torch.Tensor,
    counts: Sequence[int],
    scale: torch.Tensor | float,
) -> torch.Tensor:
    """Return the text-guided loss: relations between the regions of an image follow those between their names.

        L = (sum_b sum_{i, j in b} (s^2 t_i . t_j - v_i . c_j)^2 + sum_i ||v_i - c_i||^2) / (sum_b n_b^2 + n)

    Zero without regions.

    Args:
        regions: v of shape `(regions, dim)`, image after image.
        targets: c, CLIP's embeddings of the same regions.
        texts: t, text embeddings of the regions' classes.
        counts: Regions of every image.
        scale: s, learned, initially 1.

    Raises:
        ValueError: If the counts do not add up to the regions.
    """
    if sum(counts) != len(regions):
        raise ValueError(
            f"counts add up to {sum(counts)} and there are {len(regions)} regions. They must be equal. Correct counts."
        )
    v, c, t = (normalize(each, dim=-1) for each in (regions, targets, texts))
    parts = zip(v.split(list(counts)), c.split(list(counts)), t.split(list(counts)), strict=True)
    relations = [(scale**2 * names @ names.T - own @ theirs.T).square().sum() for own, theirs, names in parts]
    total = torch.stack(relations).sum() + (v - c).square().sum()
    return total / max(sum(count**2 for count in counts) + len(regions), 1)


class QueryClassifier(TextClassifier):
    """Projects the states of queries into the space shared with text; each output of the decoder by its own layer."""

    def __init__(self, hidden_dim: int, projection_dim: int, outputs: int) -> None:
        super().__init__(projection_dim)
        self.projections = nn.ModuleList(nn.Linear(hidden_dim, projection_dim) for _ in range(outputs))

    def forward(self, queries: torch.Tensor, output: int, prior: torch.Tensor | float = 0.0) -> torch.Tensor:
        """Return unit vectors of shape `(batch_size, num_queries, projection_dim)`.

        Args:
            queries: States of shape `(batch_size, num_queries, hidden_dim)`.
            output: Of the decoder, that they are of; -1 is the last.
            prior: What the projection is added to, of the shape of the result.
        """
        return normalize(self.projections[output](queries) + prior, dim=-1)


def region_prior(dense: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Return the unit mean of CLIP's dense embeddings inside of masks, `(batch_size, masks, dim)`.

    Args:
        dense: Unit vectors, `(batch_size, dim, height, width)`.
        masks: Logits of shape `(batch_size, masks, mask_height, mask_width)`, without gradient. One that is empty gets
            the mean of the image: a direction of nothing would have an endless gradient.
    """
    pooled, is_valid = hard_mask_pool(dense, masks)
    whole = dense.flatten(2).mean(2)[:, None]
    return normalize(torch.where(is_valid[..., None], pooled, whole), dim=-1)


class GKCHead(nn.Module):
    """All that GKC adds to a CLIP."""

    def __init__(self, config: GKCConfig) -> None:
        super().__init__()
        width = cast("SparseCLIPVisionConfig", config.vision_config).hidden_size
        self.decoder = MaskQueryDecoder(mask2former_config(config), width)
        # One output before the first layer, and one of each.
        outputs = config.decoder_layers + 1
        self.classifier = QueryClassifier(config.hidden_dim, cast("int", config.projection_dim), outputs)
        self.starts_at_zero = config.clip_residual
        self.relation_scale = nn.Parameter(torch.ones(())) if config.distillation == "vision" else None

    def distill(
        self,
        embeds: torch.Tensor,
        pairs: MatchedPairs,
        regions: Sequence[torch.Tensor],
        texts: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Return the distillation loss of one output of the decoder, a scalar in single precision.

        Args:
            embeds: Unit vectors of the queries, `(batch_size, num_queries, dim)`.
            pairs: Queries and masks that were matched.
            regions: For every image CLIP's embeddings of its masks, `(masks, dim)`; zero where there is none, and
                such a mask does not count.
            texts: For every image the text embeddings of its masks' classes, `(masks, dim)`.
        """
        own, theirs, names = [], [], []
        for states, (queries, masks), region, text in zip(embeds, pairs, regions, texts, strict=True):
            is_given = region.any(-1)[masks]
            own.append(states[queries[is_given.to(queries.device)]])
            theirs.append(region[masks][is_given])
            names.append(text[masks][is_given])
        v, c, t = (torch.cat(part).float() for part in (own, theirs, names))
        if self.relation_scale is None:
            return vanilla_loss(v, c)
        return vision_loss(v, c, t, [len(part) for part in own], self.relation_scale.float())


class GKCForSegmentation(MaskQueriesModel):
    """A CLIP tower that trains, with mask queries: semantic, instance and panoptic segmentation by text.

    Trained are the head, and the vision tower up to the deepest layer that the pyramid reads. CLIP's image embedding
    (`visual_projection`, `post_layernorm`) is not read, and `segmentation_mode` does not matter; with `clip_residual`
    it is read in that mode, by its pretrained weights.
    """

    config: GKCConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = GKCConfig

    def __init__(self, config: GKCConfig) -> None:
        super().__init__(config)
        self.head = GKCHead(config)
        self.post_init()
        self._set_trainable()

    def _set_trainable(self) -> None:
        deepest = len(self._layers) if self.config.clip_residual else max(self.config.tapped_layers)
        above = self._layers[deepest:]
        unread = (self.visual_projection, self.vision_model.post_layernorm, *above)
        for part in (self.text_model, self.text_projection, *unread):
            part.requires_grad_(False)
        self.logit_scale.requires_grad_(False)

    @property
    def _more_features(self) -> tuple[str, ...]:
        return ("the dense embeddings",) if self.config.clip_residual else ()

    def _read_tower(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.config.clip_residual:
            return self._read_tower_and_clip(pixel_values)
        return super()._read_tower(pixel_values)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - another task, another signature
        self,
        pixel_values: torch.Tensor | None = None,
        vocabulary: Vocabulary | None = None,
        text_embeddings: torch.Tensor | TextClasses | None = None,
        labels: torch.Tensor | None = None,
        mask_labels: Sequence[torch.Tensor] | None = None,
        class_labels: Sequence[torch.Tensor] | None = None,
        features: Sequence[torch.Tensor] | None = None,
        region_embeddings: Sequence[torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> MaskQueriesOutput:
        """Propose masks and classify them; with labels, return the loss over all outputs of the decoder.

        The loss is Mask2Former's. Exactly where `region_embeddings` are given, `config.distillation_weight` times the
        distillation of the matched queries is added for each output. It is a mean over the regions of one process.
        With a loss, no gradient flows through `logits`.

        Args:
            pixel_values: Images of shape `(batch_size, 3, height, width)`, both sides multiples of the patch size.
            vocabulary: An encoded [`Vocabulary`] (see `encode_vocabulary`).
            text_embeddings: Instead of a vocabulary, unit embeddings of shape `(queries, dim)`, each a class. Or a
                [`TextClasses`], for graphs.
            labels: Index of the class of every pixel, `(batch_size, label_height, label_width)`, of any size;
                `config.semantic_loss_ignore_index` where a pixel does not count.
            mask_labels: Instead of labels, for every image masks of shape `(masks, height, width)`, zero outside.
            class_labels: With `mask_labels`, for every image the classes of its masks, `(masks,)`.
            features: Instead of images, what `encode` returned for them. Nothing of the tower is trained then.
            region_embeddings: For every image CLIP's unit image embeddings of its target regions, `(masks, dim)`: in
                the order of `mask_labels`, or one for each class that `labels` hold, ascending (`RegionTeacher`). A
                region whose row is zero is not distilled; of more than `config.max_regions` others, a random choice.
            **kwargs: Ignored, so that a whole batch of a processor can be passed.

        Returns:
            `logits` are the logarithm of the share of every class, `(batch_size, queries, 4 grid_height,
            4 grid_width)`: that of a class is in the channel of its first name, its other names have a very low one.
            There are `dense_embeds` with `clip_residual` alone.

        Raises:
            ValueError: If the image is no multiple of the patch size, the text is not encoded, labels are given
                without text or outside of it, region embeddings do not belong to the labels or the configuration asks
                for none, or arguments exclude each other.
        """
        read = self._features(pixel_values, features)
        maps, dense = (read[:-1], read[-1]) if self.config.clip_residual else (read, None)
        text = text_classes(vocabulary, text_embeddings, like=self.head.classifier.void_embed[None])
        targets = self._targets(text, labels, mask_labels, class_labels, maps[0].shape[0])
        regions = self._regions(region_embeddings, targets)
        found = self.head.decoder(maps)
        outputs = MaskQueriesOutput(dense_embeds=dense, vocabulary=vocabulary, masks_queries_logits=found.masks[-1])
        if text is None:
            return outputs
        # Without a loss the outputs before the last need no classes.
        layers = range(len(found.queries)) if targets is not None else [-1]
        priors = [0.0 if dense is None else region_prior(dense, found.masks[layer]) for layer in layers]
        embeds = [
            self.head.classifier(found.queries[layer], layer, prior)
            for layer, prior in zip(layers, priors, strict=True)
        ]
        classes = [self.head.classifier.compare(part, text) for part in embeds]
        if targets is not None:
            outputs.loss = self._loss((found.masks, embeds, classes), text, targets, regions)
        outputs.class_queries_logits = classes[-1]
        with torch.set_grad_enabled(torch.is_grad_enabled() and targets is None):
            outputs.logits = text.to_queries(semantic_logits(classes[-1], found.masks[-1]))
        return outputs

    def _loss(
        self,
        layers: tuple[Sequence[torch.Tensor], ...],
        text: TextClasses,
        targets: MaskTargets,
        regions: Sequence[torch.Tensor] | None,
    ) -> torch.Tensor:
        """Return the loss of all outputs of the decoder: their masks, embeddings and class logits."""
        criterion = MaskQueriesLoss(self.head.decoder.config, targets, text.count)
        names = text.mean_alias()
        texts = [names[ids.to(names.device)] for ids in targets.classes]
        losses, distilled = [], []
        for masks, embeds, classes in zip(*layers, strict=True):
            loss, pairs = criterion.of_layer(masks, classes)
            losses.append(loss)
            if regions is not None:
                distilled.append(self.head.distill(embeds, pairs, regions, texts))
        total = torch.stack(losses).sum()
        return total + self.config.distillation_weight * torch.stack(distilled).sum() if distilled else total

    def _regions(
        self, given: Sequence[torch.Tensor] | None, targets: MaskTargets | None
    ) -> Sequence[torch.Tensor] | None:
        """Return the embeddings of the target regions; of too many, a random choice is left and the others are zero.

        Raises:
            ValueError: If they are given and there is no use for them, or they do not belong to the targets.
        """
        if given is None:
            return None
        if self.config.distillation == "none" or targets is None:
            lack = "distillation is 'none'" if targets is not None else "There are no labels"
            raise ValueError(
                f"{lack}, and there are region_embeddings. They must be given with labels, to a model that is "
                "distilled. Leave them out, or set distillation to 'vision'."
            )
        counts = [len(ids) for ids in targets.classes]
        dim = self.head.classifier.void_embed.shape[0]
        if [tuple(part.shape) for part in given] != [(count, dim) for count in counts]:
            raise ValueError(
                f"region_embeddings have the shapes {[tuple(part.shape) for part in given]}. They must be one row of "
                f"{dim} for each of the {counts} regions of the images. Embed the regions of these labels."
            )
        rows = torch.cat([part.to(self.device) for part in given])
        places = rows.any(-1).nonzero()[:, 0]
        if len(places) > self.config.max_regions:
            order = torch.randperm(len(places), device=rows.device)
            rows = rows.index_fill(0, places[order[self.config.max_regions :]], 0)
        return rows.split(counts)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if not isinstance(module, GKCHead):
            return
        if module.relation_scale is not None:
            init.ones_(module.relation_scale)
        if module.starts_at_zero:
            for projection in module.classifier.projections.children():
                init.zeros_(cast("nn.Linear", projection).weight)
                init.zeros_(cast("nn.Linear", projection).bias)


__all__ = ["GKCForSegmentation"]
