"""What all open-vocabulary segmenters share: their output, and text turned into embeddings.

This file travels with checkpoints as remote code.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers.utils.generic import ModelOutput

from .modeling_sparse_clip import SparseCLIPModel
from .vocabulary import Vocabulary

REMEMBERED_VOCABULARIES = 8


@dataclass
class OpenVocabularySegmenterOutput(ModelOutput):
    """What an open-vocabulary segmenter returns.

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
            Of a trained segmenter, where labels were given.
        logits (`torch.FloatTensor` of shape `(batch_size, queries, grid_height, grid_width)`, *optional*):
            Cosine of every position with every text embedding, times a scale.
        dense_embeds (`torch.FloatTensor` of shape `(batch_size, dim, grid_height, grid_width)`):
            Positions in the space shared with text, unit length (averaged over windows in "slide").
        vocabulary (`Vocabulary`, *optional*):
            The vocabulary that the queries belong to.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    dense_embeds: torch.Tensor | None = None
    vocabulary: Vocabulary | None = None


class OpenVocabularyModel(SparseCLIPModel):
    """A CLIP that segments: it turns a vocabulary into text embeddings with its own text tower."""

    main_input_name = "pixel_values"

    def encode_vocabulary(self, vocabulary: Vocabulary, tokenizer: Any) -> Vocabulary:
        """Return `vocabulary` with the text embeddings of this model; remembers the last vocabularies it encoded."""
        cache: dict[str, Vocabulary] = self.__dict__.setdefault("_vocabularies", {})
        # In training the text tower may change between calls.
        key = vocabulary.fingerprint
        if self.training or key not in cache:
            cache[key] = vocabulary.encode(lambda texts: self._embed_texts(texts, tokenizer))
            while len(cache) > REMEMBERED_VOCABULARIES:
                cache.pop(next(iter(cache)))
        return cache[key]

    @torch.no_grad()
    def _embed_texts(self, texts: list[str], tokenizer: Any) -> torch.Tensor:
        limit = self.text_model.config.max_position_embeddings
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(self.device)
        return cast("Any", self.get_text_features(**inputs)).pooler_output

    @property
    def _patch_size(self) -> int:
        return cast("int", self.vision_model.config.patch_size)

    def _grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        patch = self._patch_size
        height, width = pixel_values.shape[-2:]
        if height % patch or width % patch or not height or not width:
            raise ValueError(
                f"The image is {height} x {width} pixels. Both sides must be multiples of the patch size {patch}. "
                "Resize it, for example with OpenVocabularyProcessor."
            )
        return height // patch, width // patch


def text_embeddings_of(vocabulary: Vocabulary | None, text_embeddings: torch.Tensor | None) -> torch.Tensor | None:
    """Return the embeddings of an encoded vocabulary, or those given instead of one.

    Raises:
        ValueError: If the vocabulary is not encoded.
    """
    if vocabulary is None:
        return text_embeddings
    if vocabulary.text_embeddings is None:
        raise ValueError(
            "The vocabulary has no text embeddings. It must be encoded by this model first. "
            "Call model.encode_vocabulary(vocabulary, tokenizer)."
        )
    return vocabulary.text_embeddings


__all__ = ["OpenVocabularyModel", "OpenVocabularySegmenterOutput"]
