"""CAT-Seg on a CLIP vision transformer: the cosines of patches and names are themselves the features.

Cho et al. 2024 (arXiv 2303.11797). The map of cosines of every class (its cost) is embedded, aggregated over space in
windows and over classes by linear attention, and enlarged by a decoder that one class shares with all others. Nothing
depends on the number or the order of the classes. With `cost_residual` the decoder adds to the cosines and starts at
zero: the untrained model segments as CLIP does. Of the tower, queries and values are trained, and nothing else.
This file travels with checkpoints as remote code.
Reading order: attention, aggregation, decoder, head, model, loss.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn.functional import elu, interpolate, pad, scaled_dot_product_attention, softplus
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_catseg import CATSegConfig
from .configuration_sparse_clip import SparseCLIPVisionConfig
from .modeling_open_vocabulary import (
    READS,
    OpenVocabularyModel,
    OpenVocabularySegmenterOutput,
    check_labels,
    text_embeddings_of,
)
from .vocabulary import Vocabulary

MOST_GROUPS = 16
MLP_RATIO = 4
# Of classes that the prefilter drops: no softmax or sigmoid sees it, and half precision holds it.
DROPPED_LOGIT = -1e4
TINY = 1e-6
# Values in the widest map of the decoder that are held at once; more classes go through it in several parts.
_DECODER_VALUES = 2**25


class CATSegFeatures(NamedTuple):
    """What the head reads of an image: a tuple that can be kept, if the tower is frozen.

    Args:
        dense_embeds: CLIP's dense tokens in the space shared with text, `(batch_size, dim, height, width)`, unit
            length.
        fine: Of the layer that guides the fine block of the decoder, `(batch_size, hidden_size, height, width)`.
        coarse: Of the layer that guides the coarse block, of the same shape.
    """

    dense_embeds: torch.Tensor
    fine: torch.Tensor
    coarse: torch.Tensor


def window_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int, is_shifted: bool
) -> torch.Tensor:
    """Attend within windows of maps of shape `(maps, height, width, heads, channels)`; return the same shape.

    Windows are as large as the map at most. Shifted ones begin half a window later; what lies before the first is a
    smaller window of its own. The map is filled up to whole windows, and no position attends to the filling.
    """
    size = queries.shape[1:3]
    sides = [min(window, length) for length in size]
    shifts = [side // 2 if is_shifted and side < length else 0 for side, length in zip(sides, size, strict=True)]
    padded = [math.ceil(length / side) * side for side, length in zip(sides, size, strict=True)]
    missing = [whole - length for whole, length in zip(padded, size, strict=True)]
    mask = None
    if any(shifts) or any(missing):
        mask = _same_region(size, padded, sides, shifts, queries.device)
    parts = []
    for part in (queries, keys, values):
        filled = pad(part, (0, 0, 0, 0, 0, missing[1], 0, missing[0])) if any(missing) else part
        rolled = filled.roll((-shifts[0], -shifts[1]), (1, 2)) if any(shifts) else filled
        parts.append(_to_windows(rolled, sides))
    attended = scaled_dot_product_attention(*parts, attn_mask=mask)
    whole = _from_windows(attended, (queries.shape[0], *padded, *queries.shape[3:]), sides)
    back = whole.roll((shifts[0], shifts[1]), (1, 2)) if any(shifts) else whole
    return back[:, : size[0], : size[1]]


def _to_windows(maps: torch.Tensor, sides: Sequence[int]) -> torch.Tensor:
    """Return `(windows, maps * heads, positions, channels)`: a mask per window then serves all maps and heads."""
    cut = maps.unflatten(2, (-1, sides[1])).unflatten(1, (-1, sides[0]))
    return cut.permute(1, 3, 0, 5, 2, 4, 6).flatten(4, 5).flatten(2, 3).flatten(0, 1)


def _from_windows(windows: torch.Tensor, shape: Sequence[int], sides: Sequence[int]) -> torch.Tensor:
    maps, height, width, heads, channels = shape
    cut = windows.reshape(height // sides[0], width // sides[1], maps, heads, *sides, channels)
    return cut.permute(2, 0, 4, 1, 5, 3, 6).reshape(maps, height, width, heads, channels)


def _same_region(
    size: Sequence[int], padded: Sequence[int], sides: Sequence[int], shifts: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Return which positions of a window may see each other, `(windows, 1, positions, positions)`.

    Rolling brings the start of the map behind its end: the two share a window and are strangers. Every position of
    the filling is a region of its own, for a softmax over nothing is no number.
    """
    rolled, is_real = [], []
    for length, whole, shift in zip(size, padded, shifts, strict=True):
        position = torch.arange(whole, device=device) + shift
        rolled.append((position >= whole).long())
        is_real.append(position % whole < length)
    region = 2 * rolled[0][:, None] + rolled[1]
    alone = 4 + torch.arange(region.numel(), device=device).view_as(region)
    region = torch.where(is_real[0][:, None] & is_real[1], region, alone)
    region = _to_windows(region[None, :, :, None, None], sides)[:, 0, :, 0]
    return (region[:, :, None] == region[:, None, :])[:, None]


def linear_attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attend over the last dimension but one of `(..., items, channels)`, at a cost linear in the items.

        phi(q) (sum_j phi(k_j)^T v_j) / (phi(q) . sum_j phi(k_j)),   phi(x) = elu(x) + 1

    Katharopoulos et al. 2020 (arXiv 2006.16236), equation 5.
    """
    queries, keys = elu(queries) + 1, elu(keys) + 1
    total = queries @ keys.sum(-2).unsqueeze(-1)
    return (queries @ (keys.transpose(-1, -2) @ values)) / (total + TINY)


class GuidedAttention(nn.Module):
    """Attention whose queries and keys also see a guidance. Subclasses say which positions attend to which.

    Two projections and a sum are the projection of maps and guidance side by side; so that of the guidance is
    computed once for all classes, or for all positions.
    """

    def __init__(self, channels: int, guidance: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(channels, channels) for _ in range(3))
        self.query_guidance, self.key_guidance = (nn.Linear(guidance, channels, bias=False) for _ in range(2))
        self.output = nn.Linear(channels, channels)

    def forward(self, maps: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, classes, height, width, channels)` to the same shape; the guidance is broadcast."""
        queries = self.query(maps) + self.query_guidance(guidance)
        keys = self.key(maps) + self.key_guidance(guidance)
        parts = (part.unflatten(-1, (self.heads, -1)) for part in (queries, keys, self.value(maps)))
        return self.output(self.attend(*parts).flatten(-2))

    def attend(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, classes, height, width, heads, head width)` to the same shape."""
        raise NotImplementedError


class WindowAttention(GuidedAttention):
    """Every class for itself, over the positions of a window."""

    def __init__(self, channels: int, guidance: int, heads: int, window: int, is_shifted: bool) -> None:
        super().__init__(channels, guidance, heads)
        self.window, self.is_shifted = window, is_shifted

    def attend(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See [`GuidedAttention`]."""
        flat = [part.flatten(0, 1) for part in (queries, keys, values)]
        attended = window_attention(flat[0], flat[1], flat[2], self.window, self.is_shifted)
        return attended.unflatten(0, queries.shape[:2])


class ClassAttention(GuidedAttention):
    """Every position for itself, over the classes."""

    def attend(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See [`GuidedAttention`]."""
        parts = (part.movedim(1, -2) for part in (queries, keys, values))
        return linear_attention(*parts).movedim(-2, 1)


class AggregationLayer(nn.Module):
    """A pre-norm transformer layer around one of the attentions."""

    def __init__(self, attention: GuidedAttention, channels: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(channels), attention
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, MLP_RATIO * channels), nn.GELU(), nn.Linear(MLP_RATIO * channels, channels)
        )

    def forward(self, maps: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, classes, height, width, channels)` to the same shape."""
        maps = maps + self.attention(self.norm1(maps), guidance)
        return maps + self.mlp(self.norm2(maps))


class AggregationBlock(GradientCheckpointingLayer):
    """Plain windows, shifted windows, classes."""

    def __init__(self, config: CATSegConfig) -> None:
        super().__init__()
        channels, heads, image = config.cost_channels, config.aggregation_heads, config.guidance_channels
        plain, shifted = (WindowAttention(channels, image, heads, config.window_size, s) for s in (False, True))
        self.plain = AggregationLayer(plain, channels)
        self.shifted = AggregationLayer(shifted, channels)
        self.classes = AggregationLayer(ClassAttention(channels, config.text_guidance_channels, heads), channels)

    def forward(self, maps: torch.Tensor, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Map embedded costs `(batch_size, classes, height, width, channels)` to the same shape.

        Args:
            maps: The costs.
            image: Guidance of the windows, `(batch_size, 1, height, width, guidance_channels)`.
            text: Guidance of the classes, `(batch_size or 1, classes, 1, 1, text_guidance_channels)`.
        """
        return self.classes(self.shifted(self.plain(maps, image), image), text)


class MapGuidance(nn.Module):
    """Project a map of the tower. Its channels differ in size a hundredfold, so it is normalised before."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.project = nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, inputs, height, width)` to `(batch_size, outputs, height, width)`."""
        return self.project(self.norm(features.movedim(1, -1)).movedim(-1, 1))


def _block(inputs: int, outputs: int) -> nn.Sequential:
    groups = math.gcd(outputs, MOST_GROUPS)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.GroupNorm(groups, outputs), nn.ReLU()
    )


class UpBlock(nn.Module):
    """Twice the size: a transposed convolution, the guidance beside it, two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int, guidance: int) -> None:
        super().__init__()
        self.enlarge = nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
        self.refine = nn.Sequential(_block(outputs + guidance, outputs), _block(outputs, outputs))

    def forward(self, maps: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
        """Map `(maps, inputs, height, width)` to `(maps, outputs, 2 height, 2 width)`; the guidance has that size."""
        return self.refine(torch.cat([self.enlarge(maps), guidance], 1))


class CostDecoder(GradientCheckpointingLayer):
    """Two up-blocks and the last convolution; every class goes through for itself."""

    def __init__(self, config: CATSegConfig) -> None:
        super().__init__()
        coarse, fine = config.decoder_channels
        self.coarse = UpBlock(config.cost_channels, coarse, decoder_guidance(coarse))
        self.fine = UpBlock(coarse, fine, decoder_guidance(fine))
        self.output = nn.Conv2d(fine, 1, 3, padding=1)
        # Values of one class in the widest map, per position of the patch grid.
        self.values_per_patch = max(4 * (coarse + decoder_guidance(coarse)), 16 * (fine + decoder_guidance(fine)))

    def forward(self, maps: torch.Tensor, coarse: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
        """Return logits of shape `(batch_size, classes, 4 height, 4 width)`.

        Args:
            maps: Aggregated costs, `(batch_size, classes, height, width, channels)`.
            coarse: Guidance of the first block, `(batch_size, channels, 2 height, 2 width)`.
            fine: Guidance of the second block, `(batch_size, channels, 4 height, 4 width)`.
        """
        classes = maps.shape[1]
        flat = maps.flatten(0, 1).movedim(-1, 1)
        coarse, fine = (part[:, None].expand(-1, classes, -1, -1, -1).flatten(0, 1) for part in (coarse, fine))
        flat = self.fine(self.coarse(flat, coarse), fine)
        return self.output(flat).view(maps.shape[0], classes, *flat.shape[-2:])


def decoder_guidance(channels: int) -> int:
    """Return the width of the guidance of an up-block: half its own, as in the paper."""
    return max(1, channels // 2)


class CATSegHead(nn.Module):
    """All that CAT-Seg adds to a CLIP; four times as fine as the patches."""

    def __init__(self, config: CATSegConfig) -> None:
        super().__init__()
        hidden = cast("SparseCLIPVisionConfig", config.vision_config).hidden_size
        dim = cast("int", config.projection_dim)
        coarse, fine = config.decoder_channels
        self.prefilter = config.vocab_prefilter
        self.embed = nn.Conv2d(1, config.cost_channels, 7, padding=3)
        self.image_guidance = MapGuidance(dim, config.guidance_channels)
        self.text_guidance = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, config.text_guidance_channels), nn.ReLU())
        self.coarse_guidance = MapGuidance(hidden, decoder_guidance(coarse))
        self.fine_guidance = MapGuidance(hidden, decoder_guidance(fine))
        self.blocks = nn.ModuleList(AggregationBlock(config) for _ in range(config.aggregation_blocks))
        self.decoder = CostDecoder(config)
        self.logit_scale = nn.Parameter(torch.tensor(0.0)) if config.cost_residual else None

    def forward(
        self, features: CATSegFeatures, text_embeddings: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return logits of shape `(batch_size, queries, 4 height, 4 width)`, and which queries the prefilter kept.

        Args:
            features: Of the tower.
            text_embeddings: Unit embeddings, `(queries, dim)`.
        """
        cost = torch.einsum("bdhw,qd->bqhw", features.dense_embeds, text_embeddings)
        queries = text_embeddings.shape[0]  # len() would fix it in an exported graph
        if self.prefilter is None or self.prefilter >= queries:
            return self._logits(features, cost, text_embeddings[None]), None
        kept = cost.detach().amax((2, 3)).topk(self.prefilter, dim=1).indices
        found = self._logits(features, cost.gather(1, _over_maps(kept, cost)), text_embeddings[kept])
        logits = found.new_full((cost.shape[0], queries, *found.shape[2:]), DROPPED_LOGIT)
        is_kept = torch.zeros_like(cost[:, :, 0, 0], dtype=torch.bool).scatter(1, kept, True)
        return logits.scatter(1, _over_maps(kept, logits), found), is_kept

    def _logits(self, features: CATSegFeatures, cost: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Aggregate and decode the cost of the classes in `text`, `(batch_size or 1, classes, dim)`."""
        height, width = cost.shape[2:]
        maps = self.embed(cost.flatten(0, 1)[:, None]).unflatten(0, cost.shape[:2]).movedim(2, -1)
        image = self.image_guidance(features.dense_embeds).movedim(1, -1)[:, None]
        names = self.text_guidance(text)[:, :, None, None]
        for block in self.blocks:
            maps = block(maps, image, names)
        coarse = _enlarge(self.coarse_guidance(features.coarse), 2)
        fine = _enlarge(self.fine_guidance(features.fine), 4)
        together = max(1, _DECODER_VALUES // (cost.shape[0] * height * width * self.decoder.values_per_patch))
        # An exported graph takes any number of classes; a loop over parts would fix it.
        parts = [maps] if torch.compiler.is_compiling() else maps.split(together, 1)
        logits = torch.cat([self.decoder(part, coarse, fine) for part in parts], 1)
        return logits if self.logit_scale is None else logits + self.logit_scale.exp() * _enlarge(cost, 4)


class CATSegForSegmentation(OpenVocabularyModel):
    """A CLIP with CAT-Seg's head. Trained are the head, and queries and values of the vision tower.

    For another choice of layers: `freeze_unselected(model, selection, ["head"])`.
    """

    config: CATSegConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = CATSegConfig

    def __init__(self, config: CATSegConfig) -> None:
        super().__init__(config)
        self.head = CATSegHead(config)
        self.post_init()
        self._set_trainable()

    def _set_trainable(self) -> None:
        self.requires_grad_(False)
        self.head.requires_grad_(True)
        mode, _ = self._resolve_mode(None, None)
        for layer in self._layers:
            if not layer.has_attention or layer.self_attn.num_heads == 0:
                continue
            layer.self_attn.v_proj.requires_grad_(True)
            # Distributed training waits in vain for the gradient of what no mode reads.
            is_read = layer is not self._layers[-1] or "q" in READS[mode]
            layer.self_attn.q_proj.requires_grad_(is_read)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - another task, another signature
        self,
        pixel_values: torch.Tensor | None = None,
        vocabulary: Vocabulary | None = None,
        text_embeddings: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        features: Sequence[torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> OpenVocabularySegmenterOutput:
        """Return one logit per query and position, on a grid four times as fine as the patches; with labels, a loss.

        Args:
            pixel_values: Images of shape `(batch_size, 3, height, width)`, both sides multiples of the patch size.
            vocabulary: An encoded [`Vocabulary`] (see `encode_vocabulary`).
            text_embeddings: Instead of a vocabulary, unit embeddings of shape `(queries, dim)`.
            labels: Index of the query of every pixel, `(batch_size, label_height, label_width)`, of any size;
                `config.semantic_loss_ignore_index` where a pixel does not count.
            features: Instead of `pixel_values`, what `encode` returned for them. Nothing of the tower is trained then.
            **kwargs: Ignored, so that a whole batch of a processor can be passed.

        Raises:
            ValueError: If there are neither images nor features or both, the image is no multiple of the patch size,
                the text is not encoded, or labels are given without text or outside of it.
        """
        text_embeddings = text_embeddings_of(vocabulary, text_embeddings)
        if (pixel_values is None) == (features is None):
            both = "both pixel_values and features" if features is not None else "neither pixel_values nor features"
            raise ValueError(f"There are {both}. The head reads one of them. Pass pixel_values, or features.")
        read = self.encode(pixel_values) if pixel_values is not None else CATSegFeatures(*cast("Any", features))
        logits = loss = kept = None
        if text_embeddings is not None:
            logits, kept = self.head(read, text_embeddings.to(read.dense_embeds.device, read.dense_embeds.dtype))
        if labels is not None:
            loss = _sigmoid_loss(logits, labels, self.config.semantic_loss_ignore_index, kept)
        return OpenVocabularySegmenterOutput(
            loss=loss, logits=logits, dense_embeds=read.dense_embeds, vocabulary=vocabulary
        )

    def encode(self, pixel_values: torch.Tensor) -> CATSegFeatures:
        """Return what the head reads of images, to keep it where the tower is frozen (then under `torch.no_grad`).

        Args:
            pixel_values: Images of shape `(batch_size, 3, height, width)`, both sides multiples of the patch size.
        """
        grid = self._grid(pixel_values)
        fine, coarse = self.config.tapped_layers
        before, taps = self._run_blocks(pixel_values, (fine, coarse))
        last = self._last_block(before, grid, *self._resolve_mode(None, None))
        dense = self._to_embeds(self.vision_model.post_layernorm(last[:, 1:]), grid)
        maps = (taps[layer][:, 1:].transpose(1, 2).unflatten(2, grid) for layer in (fine, coarse))
        return CATSegFeatures(dense, *maps)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if not isinstance(module, CATSegHead):
            return
        # From the head down, so that its layers are told from those of the tower; children come before parents.
        for part in module.modules():
            if isinstance(part, nn.Linear):
                init.xavier_uniform_(part.weight)
            elif isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
                init.kaiming_normal_(part.weight, nonlinearity="relu")
        # Not zero: the norm behind it takes away the size of what has no offset, and so that of the cosines.
        init.uniform_(cast("torch.Tensor", module.embed.bias), -1 / 7, 1 / 7)
        output = module.decoder.output
        init.constant_(cast("torch.Tensor", output.bias), self.config.classifier_bias)
        if module.logit_scale is not None:
            init.zeros_(output.weight)
            init.constant_(module.logit_scale, math.log(self.config.initial_scale))


def _enlarge(maps: torch.Tensor, factor: int) -> torch.Tensor:
    return interpolate(maps, scale_factor=factor, mode="bilinear", align_corners=False)


def _over_maps(index: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Spread an index of shape `(batch_size, classes)` over height and width of maps, as `gather` wants it."""
    return index[:, :, None, None].expand(-1, -1, *maps.shape[2:])


def _sigmoid_loss(
    logits: torch.Tensor | None, labels: torch.Tensor, ignore_index: int, kept: torch.Tensor | None
) -> torch.Tensor:
    """Return the binary cross-entropy of every query, averaged over counted pixels and queries.

    A query's own pixels ask for 1, all others for 0: `sum_q softplus(z_q) - z_label` per pixel. Queries that the
    prefilter dropped, those that are not in `kept`, do not count: softplus is 0 at their logit.
    """
    logits, counted = check_labels(logits, labels, ignore_index)
    is_counted = labels != ignore_index
    full = interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    targets = torch.where(is_counted, labels.long(), 0)
    own = full.gather(1, targets[:, None])[:, 0]
    queries = logits.shape[1]
    if kept is not None:
        queries = int(kept[0].sum())
        own = own * kept.gather(1, targets.flatten(1)).view_as(targets)
    # A product, not a choice: a batch without labels has a loss of zero that all parameters have a part in.
    total = ((softplus(full).sum(1) - own) * is_counted).sum()
    return total / (max(counted, 1) * queries)


__all__ = ["CATSegForSegmentation"]
