"""What is traced: modules with tensors in and tensors out, around a segmenter, a vision tower or a text tower."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from transformers.utils.generic import ModelOutput

from hf_opentrans.models.modeling_open_vocabulary import OpenVocabularyModel
from hf_opentrans.models.vocabulary import Vocabulary

PIXELS, TEXT = "pixel_values", "text_embeddings"


class Exportable(nn.Module):
    """A module whose results are named tensors in a fixed order."""

    output_names: tuple[str, ...] = ()

    def named(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the outputs by name."""
        return dict(zip(self.output_names, self(*inputs), strict=True))


class SegmenterGraph(Exportable):
    """A segmenter in one mode, with a vocabulary built in or text embeddings as an input.

    Args:
        model: Training-free or trained.
        vocabulary: An encoded vocabulary; None makes text embeddings an input.
        example: Images to find out by which outputs there are, `(batch_size, 3, height, width)`.
        options: Arguments of the model's forward: mode, reduced.
    """

    def __init__(
        self,
        model: OpenVocabularyModel,
        vocabulary: Vocabulary | None,
        example: torch.Tensor,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary
        self.options = dict(options)
        self.register_buffer("fixed", None if vocabulary is None else vocabulary.text_embeddings, persistent=True)
        dim = cast("int", model.config.projection_dim)
        text = None if vocabulary is not None else torch.eye(2, dim)
        with torch.no_grad():
            outputs = self._outputs(example, text)
        tensors = [name for name, value in outputs.items() if isinstance(value, torch.Tensor)]
        self.output_names = tuple(sorted(tensors, key=lambda name: name != "logits"))

    def forward(
        self, pixel_values: torch.Tensor, text_embeddings: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Return the outputs of the model in the order of `output_names`.

        Args:
            pixel_values: Images of shape `(batch_size, 3, height, width)`.
            text_embeddings: Unit embeddings of shape `(queries, dim)`; None with a built-in vocabulary.
        """
        outputs = self._outputs(pixel_values, text_embeddings)
        return tuple(cast("torch.Tensor", outputs[name]) for name in self.output_names)

    def _outputs(self, pixel_values: torch.Tensor, text_embeddings: torch.Tensor | None) -> ModelOutput:
        if self.vocabulary is None:
            return self.model(pixel_values, text_embeddings=text_embeddings, **self.options)
        vocabulary = replace(self.vocabulary, text_embeddings=self.fixed)
        return self.model(pixel_values, vocabulary=vocabulary, **self.options)


class TowerGraph(Exportable):
    """A vision tower alone."""

    def __init__(self, model: nn.Module, example: torch.Tensor) -> None:
        super().__init__()
        self.model = model
        with torch.no_grad():
            outputs = self._outputs(example)
        self.output_names = tuple(name for name, value in outputs.items() if isinstance(value, torch.Tensor))

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the outputs of the tower in the order of `output_names`."""
        outputs = self._outputs(pixel_values)
        return tuple(cast("torch.Tensor", outputs[name]) for name in self.output_names)

    def _outputs(self, pixel_values: torch.Tensor) -> ModelOutput:
        return self.model(pixel_values, interpolate_pos_encoding=True)


class TextGraph(Exportable):
    """A text tower with its projection: tokens to embeddings, not yet of unit length."""

    output_names = ("text_embeds",)

    def __init__(self, model: OpenVocabularyModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        """Map tokens of shape `(texts, length)` to embeddings of shape `(texts, dim)`."""
        features = self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        return (cast("Any", features).pooler_output,)
