"""What the models with mask queries share: how they read the tower, what they are trained on, how text classifies.

This file travels with checkpoints as remote code.
"""

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import initialization as init

from .configuration_mask_queries import MaskQueriesConfig
from .modeling_mask_queries import MaskTargets, TextClasses, instance_targets, semantic_targets
from .modeling_open_vocabulary import OpenVocabularyModel

INITIAL_SCALE = 1 / 0.07  # CLIP's own at the start of its training
LARGEST_SCALE = 100.0


class TextClassifier(nn.Module):
    """Compares unit embeddings of masks with text, and with a learned embedding of "no object"."""

    def __init__(self, projection_dim: int) -> None:
        super().__init__()
        self.void_embed = nn.Parameter(torch.empty(projection_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))

    def compare(self, embeds: torch.Tensor, text: TextClasses) -> torch.Tensor:
        """Return logits of shape `(batch_size, num_queries, classes + 1)`; the last is "no object".

        Args:
            embeds: Unit vectors of shape `(batch_size, num_queries, projection_dim)`.
            text: Classes to compare with.
        """
        real = text.best_alias(embeds @ text.embeddings.T)
        void = embeds @ normalize(self.void_embed, dim=0)[:, None]
        return self.logit_scale.exp().clamp(max=LARGEST_SCALE) * torch.cat([real, void], -1)


class MaskQueriesModel(OpenVocabularyModel):
    """A CLIP with mask queries: the way from the tower to the head, and from labels to targets."""

    config: MaskQueriesConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def _more_features(self) -> tuple[str, ...]:
        """What a class reads of the tower beside the maps, in words."""
        return ()

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return all that the head reads of the tower, to be kept and given to `forward` as `features`.

        Args:
            pixel_values: Images of shape `(batch_size, 3, height, width)`, both sides multiples of the patch size.

        Returns:
            The maps of `config.tapped_layers`, each `(batch_size, hidden_size, grid_height, grid_width)`, and what
            else the class reads. They depend on the tower alone, not on the head.
        """
        return self._read_tower(pixel_values)

    def _read_tower(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        grid = self._grid(pixel_values)
        layers, depth = self.config.tapped_layers, len(self._layers)
        before, taps = self._run_blocks(pixel_values, layers)
        if depth in layers:
            taps[depth] = self._layers[-1](before, None)
        return self._maps(taps, grid)

    def _read_tower_and_clip(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the maps and CLIP's unit dense embeddings, `(batch_size, dim, grid_height, grid_width)`."""
        grid = self._grid(pixel_values)
        mode, reduced = self._resolve_mode(None, None)
        layers, depth = self.config.tapped_layers, len(self._layers)
        before, taps = self._run_blocks(pixel_values, layers)
        dense = self._last_block(before, grid, mode, reduced)
        if depth in layers:
            taps[depth] = dense if (mode, reduced) == ("vanilla", False) else self._layers[-1](before, None)
        return *self._maps(taps, grid), self._to_embeds(self.vision_model.post_layernorm(dense[:, 1:]), grid)

    def _maps(self, taps: Mapping[int, torch.Tensor], grid: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        """Return the outputs of the tapped blocks as maps of patches, in the order of the pyramid."""
        return tuple(taps[layer][:, 1:].transpose(1, 2).unflatten(2, grid) for layer in self.config.tapped_layers)

    def _features(
        self, pixel_values: torch.Tensor | None, features: Sequence[torch.Tensor] | None
    ) -> Sequence[torch.Tensor]:
        if (pixel_values is None) == (features is None):
            raise ValueError(
                f"There are {'no pixel_values and no' if features is None else 'both pixel_values and'} features. "
                "Exactly one of them must be given: features are what encode(pixel_values) returns. Correct the call."
            )
        if features is None:
            return self._read_tower(cast("torch.Tensor", pixel_values))
        maps = len(self.config.tapped_layers)
        if len(features) != maps + len(self._more_features):
            more = "".join(f" and {name}" for name in self._more_features)
            raise ValueError(
                f"There are {len(features)} features. They must be the {maps} maps of the tower{more}, as "
                "encode(pixel_values) returns them. Encode the images again."
            )
        return [part.to(self.logit_scale) for part in features]  # kept elsewhere, or in half precision

    def _targets(
        self,
        text: TextClasses | None,
        labels: torch.Tensor | None,
        mask_labels: Sequence[torch.Tensor] | None,
        class_labels: Sequence[torch.Tensor] | None,
        batch_size: int,
    ) -> MaskTargets | None:
        if labels is None and mask_labels is None and class_labels is None:
            return None
        if text is None:
            raise ValueError("There are labels and no text. The loss compares masks with names. Pass text_embeddings.")
        if labels is not None and mask_labels is None and class_labels is None:
            return semantic_targets(labels, batch_size, text.count, self.config.semantic_loss_ignore_index)
        if labels is None and mask_labels is not None and class_labels is not None:
            return instance_targets(mask_labels, class_labels, batch_size, text.count)
        given = {"labels": labels, "mask_labels": mask_labels, "class_labels": class_labels}
        raise ValueError(
            f"There are {' and '.join(name for name, value in given.items() if value is not None)}. It must be labels "
            "alone, or mask_labels with class_labels. Correct the call."
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TextClassifier):
            init.normal_(module.void_embed)
            init.constant_(module.logit_scale, math.log(INITIAL_SCALE))
            for linear in module.modules():
                if isinstance(linear, nn.Linear):  # torch's own initialisation, as the reference has
                    init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
                    init.uniform_(linear.bias, -(linear.in_features**-0.5), linear.in_features**-0.5)


__all__ = ["MaskQueriesModel", "TextClassifier"]
