"""Training-free open-vocabulary segmentation with a CLIP: dense tokens of the last block against text embeddings.

The modes differ in the last block alone: see `modeling_open_vocabulary`.
This file travels with checkpoints as remote code.
"""

from typing import Any, cast

import torch

from .modeling_open_vocabulary import OpenVocabularyModel, OpenVocabularySegmenterOutput, text_embeddings_of
from .vocabulary import Vocabulary


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


__all__ = ["DenseCLIPForSegmentation"]
