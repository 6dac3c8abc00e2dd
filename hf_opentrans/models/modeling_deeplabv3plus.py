"""DeepLabV3+ on a CLIP vision transformer, with text embeddings as the classifier.

Chen et al. 2018 (arXiv 1802.02611) on a plain transformer: the map of the last layer goes through the atrous pyramid,
is enlarged twice and meets a low-level map. Group norm takes the place of batch norm: small batches, several processes
and frozen parts then give the same figures. With `clip_residual` the decoder adds to CLIP's own dense embedding and
starts at zero: the untrained model segments as CLIP does, and names that training never shows are not lost.
This file travels with checkpoints as remote code.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate, normalize
from transformers import initialization as init

from .configuration_deeplabv3plus import DeepLabV3PlusConfig
from .configuration_sparse_clip import SparseCLIPVisionConfig
from .modeling_open_vocabulary import (
    OpenVocabularyModel,
    OpenVocabularySegmenterOutput,
    check_labels,
    text_embeddings_of,
)
from .vocabulary import Vocabulary

MOST_GROUPS = 16


class DecoderConvolution(nn.Conv2d):
    """A convolution of the decoder; its own class, so that initialisation tells it from the patch embedding."""


def _block(inputs: int, outputs: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    groups = math.gcd(outputs, MOST_GROUPS)
    padding = dilation * (kernel // 2)
    convolution = DecoderConvolution(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(groups, outputs), nn.ReLU())


class AtrousPyramid(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1 convolution, dilated 3x3 ones, and the mean of the map, side by side."""

    def __init__(self, inputs: int, outputs: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList([_block(inputs, outputs, 1), *(_block(inputs, outputs, 3, r) for r in rates)])
        # Without norm: of a single position per group it would leave nothing.
        self.pooled = nn.Sequential(DecoderConvolution(inputs, outputs, 1), nn.ReLU())
        self.project = _block(outputs * (len(rates) + 2), outputs, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, inputs, height, width)` to `(batch_size, outputs, height, width)`."""
        pooled = self.pooled(features.mean((2, 3), keepdim=True)).expand(-1, -1, *features.shape[2:])
        return self.project(torch.cat([*(branch(features) for branch in self.branches), pooled], 1))


class DeepLabV3PlusHead(nn.Module):
    """Pyramid, decoder and projection into the space shared with text; twice as fine as the patches."""

    def __init__(self, config: DeepLabV3PlusConfig) -> None:
        super().__init__()
        hidden = cast("SparseCLIPVisionConfig", config.vision_config).hidden_size
        channels, skip = config.decoder_channels, config.skip_channels
        self.pyramid = AtrousPyramid(hidden, channels, tuple(config.atrous_rates))
        self.low_level = _block(hidden, skip, 1)
        self.decoder = nn.Sequential(_block(channels + skip, channels, 3), _block(channels, channels, 3))
        self.project = DecoderConvolution(channels, cast("int", config.projection_dim), 1)
        self.starts_at_zero = config.clip_residual
        self.logit_scale = nn.Parameter(torch.tensor(math.log(config.initial_scale)))

    def forward(
        self, features: torch.Tensor, low_level: torch.Tensor, dense_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return unit embeddings of shape `(batch_size, dim, 2 height, 2 width)` of maps on the patch grid.

        Args:
            features: Of the last layer, `(batch_size, hidden_size, height, width)`.
            low_level: Of an earlier layer, of the same shape.
            dense_embeds: CLIP's unit embeddings, `(batch_size, dim, height, width)`; the decoder adds to them.
        """
        high = _double(self.pyramid(features))
        low = _double(self.low_level(low_level))
        embeds = self.project(self.decoder(torch.cat([high, low], 1)))
        return normalize(embeds if dense_embeds is None else _double(dense_embeds) + embeds, dim=1)


class DeepLabV3PlusForSegmentation(OpenVocabularyModel):
    """A CLIP with a trained DeepLabV3+ decoder. The text tower is never trained: no gradient reaches it."""

    config: DeepLabV3PlusConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = DeepLabV3PlusConfig

    def __init__(self, config: DeepLabV3PlusConfig) -> None:
        super().__init__(config)
        self.head = DeepLabV3PlusHead(config)
        layers = cast("SparseCLIPVisionConfig", config.vision_config).num_hidden_layers
        self.low_level_layer = config.low_level_layer or max(1, round(layers / 3))
        self.post_init()
        self._set_trainable()

    def _set_trainable(self) -> None:
        for unused in (self.text_model, self.text_projection, self.visual_projection):
            unused.requires_grad_(False)
        self.logit_scale.requires_grad_(False)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - another task, another signature
        self,
        pixel_values: torch.Tensor | None = None,
        vocabulary: Vocabulary | None = None,
        text_embeddings: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        features: Sequence[torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> OpenVocabularySegmenterOutput:
        """Compare every position with every text embedding; with labels, return their cross-entropy.

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
        embeds = self.head(*(self.encode(pixel_values) if pixel_values is not None else cast("Any", features)))
        logits = loss = None
        if text_embeddings is not None:
            text_embeddings = text_embeddings.to(embeds.device, embeds.dtype)
            logits = self.head.logit_scale.exp() * torch.einsum("bdhw,qd->bqhw", embeds, text_embeddings)
        if labels is not None:
            loss = _cross_entropy(logits, labels, self.config.semantic_loss_ignore_index)
        return OpenVocabularySegmenterOutput(loss=loss, logits=logits, dense_embeds=embeds, vocabulary=vocabulary)

    def encode(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what the head reads of images, to keep it where the tower is frozen (then under `torch.no_grad`).

        Args:
            pixel_values: Images of shape `(batch_size, 3, height, width)`, both sides multiples of the patch size.

        Returns:
            The maps of the last layer and of `low_level_layer`, `(batch_size, hidden_size, grid_height, grid_width)`,
            and, with `clip_residual`, CLIP's unit dense embeddings, `(batch_size, dim, grid_height, grid_width)`.
        """
        grid = self._grid(pixel_values)
        before, taps = self._run_blocks(pixel_values, (self.low_level_layer,))
        last = self._layers[-1](before, None)
        tokens = self.vision_model.post_layernorm(last[:, 1:])
        low = (taps[self.low_level_layer] if taps else last)[:, 1:]
        maps = tokens.transpose(1, 2).unflatten(2, grid), low.transpose(1, 2).unflatten(2, grid)
        if not self.config.clip_residual:
            return maps
        mode, reduced = self._resolve_mode(None, None)
        if (mode, reduced) != ("vanilla", False):
            dense = self._last_block(before, grid, mode, reduced)
            tokens = self.vision_model.post_layernorm(dense[:, 1:])
        return (*maps, self._to_embeds(tokens, grid))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DecoderConvolution):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                # Not zero: where all channels below are silent, the embedding is the bias alone, and the gradient of
                # its direction would be endless.
                init.uniform_(module.bias, -(module.in_channels**-0.5), module.in_channels**-0.5)
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, DeepLabV3PlusHead):
            init.constant_(module.logit_scale, math.log(self.config.initial_scale))
            if module.starts_at_zero:
                init.zeros_(module.project.weight)
                init.zeros_(cast("torch.Tensor", module.project.bias))


def _double(features: torch.Tensor) -> torch.Tensor:
    return interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)


def _cross_entropy(logits: torch.Tensor | None, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    logits, counted = check_labels(logits, labels, ignore_index)
    full = interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    total = cross_entropy(full, labels.long(), ignore_index=ignore_index, reduction="sum")
    return total / max(counted, 1)  # a batch without labels has no loss, not NaN


__all__ = ["DeepLabV3PlusForSegmentation"]
