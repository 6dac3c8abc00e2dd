"""The vision tower of a model: where it is, its layers, and the two linear layers of each that read prunable units."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn.functional import normalize

from hf_opentrans.models.modeling_sparse_clip import (
    SparseCLIPEncoderLayer,
    SparseCLIPModel,
    SparseCLIPVisionModel,
    SparseCLIPVisionModelWithProjection,
)

SparseModel = SparseCLIPModel | SparseCLIPVisionModel | SparseCLIPVisionModelWithProjection


@dataclass(frozen=True)
class Tower:
    """A view of a model's vision tower; shares its weights.

    Args:
        vision: The tower.
        projection: The projection into the space shared with text; None where the model has none.
    """

    vision: SparseCLIPVisionModel
    projection: nn.Linear | None

    @classmethod
    def of(cls, model: SparseModel) -> "Tower":
        """Find the tower of any of the sparse classes."""
        if isinstance(model, SparseCLIPVisionModel):
            return cls(model, None)
        return cls(model.vision_model, model.visual_projection)

    @property
    def layers(self) -> list[SparseCLIPEncoderLayer]:
        """The blocks, first to last."""
        return cast("list[SparseCLIPEncoderLayer]", self.vision.encoder.layers)

    @property
    def consumers(self) -> dict[tuple[int, str], nn.Linear]:
        """The layers that read heads (`out_proj`) and neurons (`fc2`), by `(layer, "heads" | "neurons")`."""
        found: dict[tuple[int, str], nn.Linear] = {}
        for index, layer in enumerate(self.layers):
            for kind, is_there in (("heads", layer.has_attention), ("neurons", layer.has_mlp)):
                if is_there and self.consumer(index, kind).in_features:
                    found[index, kind] = self.consumer(index, kind)
        return found

    def consumer(self, layer: int, kind: str) -> nn.Linear:
        """Return the layer that reads the units of one sublayer, empty or not."""
        block = self.layers[layer]
        return block.self_attn.out_proj if kind == "heads" else block.mlp.fc2

    def group_size(self, layer: int, kind: str) -> int:
        """Inputs of the consumer that belong to one unit: the value width for heads, 1 for neurons."""
        return self.layers[layer].self_attn.v_head_dim if kind == "heads" else 1

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return what the first layer reads, of shape `(batch_size, tokens, hidden_size)`."""
        return self.vision.pre_layrnorm(self.vision.embeddings(pixels, interpolate_pos_encoding=True))

    def finish(self, hidden: torch.Tensor) -> torch.Tensor:
        """Turn the last layer's output into unit tokens in the shared space (class token first)."""
        hidden = self.vision.post_layernorm(hidden)
        return normalize(hidden if self.projection is None else self.projection(hidden), dim=-1)

    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return unit tokens of shape `(batch_size, tokens, dim)` of the ordinary forward pass."""
        hidden = self.embed(pixels)
        for layer in self.layers:
            hidden = layer(hidden, None)
        return self.finish(hidden)

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """Return the weights under canonical names: without prefix, and `visual_projection.weight`."""
        tensors = dict(self.vision.state_dict())
        if self.projection is not None:
            tensors["visual_projection.weight"] = self.projection.weight.detach()
        return tensors


def summed_cosines(tokens: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return two sums over a batch: of the class tokens' cosines, and of each image's mean over its patch tokens.

    Args:
        tokens: Unit tokens of shape `(batch_size, tokens, dim)`, class token first.
        expected: The same, to compare with.
    """
    cosines = (tokens * expected).sum(-1).double().cpu()
    return torch.stack([cosines[:, 0].sum(), cosines[:, 1:].mean(1).sum()])
