"""Training-free open-vocabulary segmentation with a CLIP: dense tokens of the last block against text embeddings.

The modes differ in the last block alone (X: its input, q, k, v: of layer_norm1(X), O: out_proj, s: the softmax scale):

| mode      | attention                         | published with residual and MLP | source             |
|-----------|-----------------------------------|---------------------------------|--------------------|
| vanilla   | softmax(s q k^T)                  | yes                             | CLIP               |
| maskclip  | identity                          | no                              | arXiv 2112.01071   |
| sclip     | softmax(s q q^T) + softmax(s k k^T) | yes                           | arXiv 2312.01597   |
| clearclip | softmax(s q q^T)                  | no                              | arXiv 2407.12442   |
| naclip    | softmax(s k k^T + G)              | no                              | arXiv 2404.08181   |

This file travels with checkpoints as remote code.
"""

from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import normalize, scaled_dot_product_attention

from .configuration_sparse_clip import SEGMENTATION_MODES
from .modeling_open_vocabulary import OpenVocabularyModel, OpenVocabularySegmenterOutput, text_embeddings_of
from .modeling_sparse_clip import SparseCLIPAttention, SparseCLIPEncoderLayer
from .vocabulary import Vocabulary

NEIGHBOUR_SIGMA = 5.0  # patches; NACLIP's published width of the Gaussian
_PUBLISHED_REDUCED = {"vanilla": False, "maskclip": True, "sclip": False, "clearclip": True, "naclip": True}


class DenseCLIPForSegmentation(OpenVocabularyModel):
    """CLIP as a segmenter, without training. Same weights as [`SparseCLIPModel`]; loads any CLIP folder."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - another task, another signature
        self,
        pixel_values: torch.Tensor,
        vocabulary: Vocabulary | None = None,
        text_embeddings: torch.Tensor | None = None,
        mode: str | None = None,
        reduced: bool | None = None,
        inference: str = "whole",
        window_size: int | None = None,
        window_stride: int | None = None,
        **kwargs: Any,
    ) -> OpenVocabularySegmenterOutput:
        """Compare every patch with every text embedding, in one image pass for all classes.

        Args:
            pixel_values: Images of shape `(batch_size, 3, height, width)`, both sides multiples of the patch size.
            vocabulary: An encoded [`Vocabulary`] (see `encode_vocabulary`).
            text_embeddings: Instead of a vocabulary, unit embeddings of shape `(queries, dim)`.
            mode: See `SparseCLIPConfig.segmentation_mode`, the default.
            reduced: See `SparseCLIPConfig.segmentation_reduced`, the default.
            inference: "whole" sees the image at once; "slide" averages overlapping square windows.
            window_size: Side of the windows in pixels. Defaults to the model's `image_size`.
            window_stride: Distance of the windows in pixels. Defaults to half a window.
            **kwargs: Ignored, so that a whole batch of a processor can be passed.

        Raises:
            ValueError: If a choice is unknown, the image is no multiple of the patch size, or the text is not encoded.
        """
        text_embeddings = text_embeddings_of(vocabulary, text_embeddings)
        if inference == "whole":
            tokens = self.get_dense_features(pixel_values, mode, reduced)
        elif inference == "slide":
            tokens = self._slide(pixel_values, mode, reduced, window_size, window_stride)
        else:
            raise ValueError(f"inference is {inference!r}. It must be 'whole' or 'slide'.")
        logits = None
        if text_embeddings is not None:
            text_embeddings = text_embeddings.to(tokens.device, tokens.dtype)
            logits = self.config.segmentation_logit_scale * torch.einsum("bdhw,qd->bqhw", tokens, text_embeddings)
        return OpenVocabularySegmenterOutput(logits=logits, dense_embeds=tokens, vocabulary=vocabulary)

    def get_dense_features(
        self, pixel_values: torch.Tensor, mode: str | None = None, reduced: bool | None = None
    ) -> torch.Tensor:
        """Return unit patch tokens in the space shared with text, `(batch_size, dim, grid_height, grid_width)`."""
        mode, reduced = self._resolve_mode(mode, reduced)
        vision, grid = self.vision_model, self._grid(pixel_values)
        hidden = vision.pre_layrnorm(vision.embeddings(pixel_values, interpolate_pos_encoding=True))
        for layer in self._layers[:-1]:
            hidden = layer(hidden, None)
        hidden = self._last_block(hidden, grid, mode, reduced)
        tokens = self.visual_projection(vision.post_layernorm(hidden[:, 1:]))
        return normalize(tokens, dim=-1).transpose(1, 2).unflatten(2, grid)

    @property
    def _layers(self) -> list[SparseCLIPEncoderLayer]:
        return cast("list[SparseCLIPEncoderLayer]", self.vision_model.encoder.layers)

    def _resolve_mode(self, mode: str | None, reduced: bool | None) -> tuple[str, bool]:
        mode = self.config.segmentation_mode if mode is None else mode
        if reduced is None and mode == self.config.segmentation_mode:
            reduced = self.config.segmentation_reduced
        if mode not in SEGMENTATION_MODES:
            raise ValueError(f"mode is {mode!r}. It must be one of {', '.join(SEGMENTATION_MODES)}.")
        return mode, _PUBLISHED_REDUCED[mode] if reduced is None else reduced

    def _last_block(self, hidden: torch.Tensor, grid: tuple[int, int], mode: str, reduced: bool) -> torch.Tensor:
        layer = self._layers[-1]
        if mode == "vanilla" and not reduced:
            return layer(hidden, None)
        if not layer.has_attention or layer.self_attn.num_heads == 0:
            raise ValueError(
                f"The last block has no attention heads. The mode {mode!r} reads them. Use mode='vanilla', or prune "
                "with protect_last_attention=True."
            )
        attended = _attend(layer.self_attn, layer.layer_norm1(hidden), grid, mode)
        if reduced:
            return attended
        hidden = hidden + attended
        return hidden + layer.mlp(layer.layer_norm2(hidden)) if layer.has_mlp else hidden

    def _slide(
        self,
        pixel_values: torch.Tensor,
        mode: str | None,
        reduced: bool | None,
        window_size: int | None,
        window_stride: int | None,
    ) -> torch.Tensor:
        """Average the tokens of overlapping windows: all windows of all images form one batch.

        Windows lie on the patch grid and cosines are linear in the tokens, so averaging tokens averages logits.
        """
        patch = self._patch_size
        side = (window_size or cast("int", self.vision_model.config.image_size)) // patch
        step = (window_stride or side * patch // 2) // patch
        if side < 1 or step < 1:
            raise ValueError(
                f"The window of {window_size} pixels with stride {window_stride} is too small. Both must be at least "
                f"the patch size {patch}. Raise them or leave them out."
            )
        rows, columns = (size // patch for size in pixel_values.shape[-2:])
        tall, wide = min(side, rows), min(side, columns)
        corners = [(y, x) for y in _starts(rows, tall, step) for x in _starts(columns, wide, step)]
        windows = [
            pixel_values[..., y * patch : (y + tall) * patch, x * patch : (x + wide) * patch] for y, x in corners
        ]
        parts = torch.cat([self.get_dense_features(chunk, mode, reduced) for chunk in torch.cat(windows).split(32)])
        parts = parts.unflatten(0, (len(corners), -1))
        total = parts.new_zeros(*parts.shape[1:3], rows, columns)
        count = parts.new_zeros(rows, columns)
        for (y, x), part in zip(corners, parts, strict=True):
            total[..., y : y + tall, x : x + wide] += part
            count[y : y + tall, x : x + wide] += 1
        return total / count


def _starts(length: int, window: int, step: int) -> list[int]:
    """Starts of windows that cover `length`; the last one is shifted back inside, never padded."""
    return [*range(0, length - window, step), length - window]


def _attend(attention: SparseCLIPAttention, hidden: torch.Tensor, grid: tuple[int, int], mode: str) -> torch.Tensor:
    """Apply the block's own projections with the attention of `mode`; returns `(batch_size, tokens, hidden_size)`."""
    q, k, v = attention.project(hidden)
    scale = attention.scale
    if mode == "vanilla":
        output = scaled_dot_product_attention(q, k, v, scale=scale)
    elif mode == "maskclip":
        output = v
    elif mode == "clearclip":
        output = scaled_dot_product_attention(q, q, v, scale=scale)
    elif mode == "sclip":
        output = scaled_dot_product_attention(q, q, v, scale=scale) + scaled_dot_product_attention(
            k, k, v, scale=scale
        )
    else:
        bias = neighbour_bias(grid, device=v.device, dtype=v.dtype)
        output = scaled_dot_product_attention(k, k, v, attn_mask=bias, scale=scale)
    return attention.merge_heads(output.transpose(1, 2))


def neighbour_bias(
    grid: tuple[int, int], device: torch.device | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """NACLIP's additive attention bias of shape `(1 + patches, 1 + patches)`: a Gaussian over patch distance.

    `exp(-|p_i - p_j|^2 / (2 sigma^2))` with sigma = 5 patches; zero in the row and column of the class token.
    """
    rows, columns = (torch.arange(size, device=device, dtype=torch.float32) for size in grid)
    points = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
    squared = (points[:, None] - points[None]).square().sum(-1)
    bias = torch.exp(-squared / (2 * NEIGHBOUR_SIGMA**2))
    return nn.functional.pad(bias, (1, 0, 1, 0)).to(dtype)


__all__ = ["DenseCLIPForSegmentation"]
