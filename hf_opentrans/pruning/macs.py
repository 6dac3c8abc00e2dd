"""What a vision tower costs: multiply-accumulates of one image and parameters, from its configuration alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from transformers import CLIPVisionConfig

from hf_opentrans.models.configuration_elastic_clip import values_at
from hf_opentrans.models.configuration_sparse_clip import SparseCLIPVisionConfig


@dataclass(frozen=True)
class LayerWidths:
    """Widths of one layer; zero heads or neurons where the sublayer is empty or skipped."""

    heads: int
    qk_head_dim: int
    v_head_dim: int
    neurons: int
    has_attention: bool = True
    has_mlp: bool = True


@dataclass(frozen=True)
class TowerCost:
    """The cost model of one tower: `macs` and `params` of fixed parts and per unit.

    Args:
        hidden_size: Width of the residual stream.
        tokens: Class token and patches.
        patch_inputs: Inputs of the patch embedding (channels x patch x patch).
        positions: Rows of the position table (parameters only).
        projection_dim: Width of the visual projection; 0 where there is none.
    """

    hidden_size: int
    tokens: int
    patch_inputs: int
    positions: int
    projection_dim: int

    @classmethod
    def of(cls, config: CLIPVisionConfig, *, resolution: int | None = None, projection: bool = True) -> "TowerCost":
        """Read a configuration.

        Args:
            config: A stock or sparse CLIP vision configuration.
            resolution: Side of the square input in pixels. Defaults to `image_size`.
            projection: Whether the tower ends in the visual projection (applied to the class token).
        """
        patch, image_size = cast("int", config.patch_size), cast("int", config.image_size)
        patches = ((resolution or image_size) // patch) ** 2
        return cls(
            hidden_size=config.hidden_size,
            tokens=1 + patches,
            patch_inputs=config.num_channels * patch**2,
            positions=1 + (image_size // patch) ** 2,
            projection_dim=config.projection_dim if projection else 0,
        )

    def fixed(self, unit: str) -> int:
        """Cost of everything outside the layers."""
        if unit == "macs":
            return (self.tokens - 1) * self.patch_inputs * self.hidden_size + self.hidden_size * self.projection_dim
        norms = 2 * 2 * self.hidden_size
        embeddings = self.hidden_size * (1 + self.patch_inputs + self.positions)
        return embeddings + norms + self.hidden_size * self.projection_dim

    def head(self, unit: str, qk_head_dim: int, v_head_dim: int) -> int:
        """Cost of one head: its rows of q, k, v, its columns of out_proj, and both attention products.

        The products run at the larger of both widths, because fused kernels take one width only (`pad_heads`).
        """
        linear = 2 * self.hidden_size * (qk_head_dim + v_head_dim)
        if unit == "macs":
            return self.tokens * linear + self.tokens**2 * 2 * max(qk_head_dim, v_head_dim)
        return linear + 2 * qk_head_dim + v_head_dim

    def neuron(self, unit: str) -> int:
        """Cost of one MLP neuron: its row of fc1 and its column of fc2."""
        return 2 * self.hidden_size * self.tokens if unit == "macs" else 2 * self.hidden_size + 1

    def sublayer(self, unit: str) -> int:
        """Cost that a sublayer has without any unit: its LayerNorm and output bias (parameters only)."""
        return 0 if unit == "macs" else 3 * self.hidden_size

    def layer(self, unit: str, widths: LayerWidths) -> int:
        """Cost of one layer."""
        heads = widths.heads * self.head(unit, widths.qk_head_dim, widths.v_head_dim)
        sublayers = (widths.has_attention + widths.has_mlp) * self.sublayer(unit)
        return heads + widths.neurons * self.neuron(unit) + sublayers

    def total(self, unit: str, layers: tuple[LayerWidths, ...]) -> int:
        """Cost of the whole tower."""
        return self.fixed(unit) + sum(self.layer(unit, widths) for widths in layers)


class CostModel(Protocol):
    """What a tower costs in one unit: the same three questions for MACs, parameters and measured latency."""

    def fixed(self) -> float:
        """Cost of everything that pruning does not touch."""
        ...

    def attention(self, heads: int, qk_head_dim: int, v_head_dim: int) -> float:
        """Cost of one layer's attention."""
        ...

    def mlp(self, neurons: int) -> float:
        """Cost of one layer's MLP."""
        ...


def tower_cost(cost: CostModel, layers: Iterable[LayerWidths]) -> float:
    """Return what a tower with these layers costs."""
    spent = (cost.attention(w.heads, w.qk_head_dim, w.v_head_dim) + cost.mlp(w.neurons) for w in layers)
    return cost.fixed() + sum(spent)


@dataclass(frozen=True)
class CountedCost:
    """A `CostModel` that counts.

    Args:
        tower: What single units cost.
        unit: "macs" or "params".
        sublayers: Attentions and MLPs that are there at all.
    """

    tower: TowerCost
    unit: str
    sublayers: int

    def fixed(self) -> float:
        """Cost of everything that pruning does not touch."""
        return self.tower.fixed(self.unit) + self.sublayers * self.tower.sublayer(self.unit)

    def attention(self, heads: int, qk_head_dim: int, v_head_dim: int) -> float:
        """Cost of one layer's heads."""
        return heads * self.tower.head(self.unit, qk_head_dim, v_head_dim)

    def mlp(self, neurons: int) -> float:
        """Cost of one layer's neurons."""
        return neurons * self.tower.neuron(self.unit)


def layer_widths(config: CLIPVisionConfig) -> tuple[LayerWidths, ...]:
    """Read the widths of every layer from a stock or sparse configuration."""
    widths = []
    for layer in config.per_layer_config:
        skip = getattr(layer, "skip", None) or ()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // layer.num_attention_heads
        widths.append(
            LayerWidths(
                heads=0 if "attention" in skip else layer.num_attention_heads,
                qk_head_dim=getattr(layer, "qk_head_dim", None) or head_dim,
                v_head_dim=getattr(layer, "v_head_dim", None) or head_dim,
                neurons=0 if "mlp" in skip else layer.intermediate_size,
                has_attention="attention" not in skip,
                has_mlp="mlp" not in skip,
            )
        )
    return tuple(widths)


def budget_widths(vision: SparseCLIPVisionConfig, entry: Mapping[str, Any]) -> tuple[LayerWidths, ...]:
    """Read the widths of every layer at one budget of a checkpoint of several.

    Args:
        vision: Of the tower, with the widths of any budget.
        entry: Of the configuration's `elastic_budgets`.
    """
    values = {name: value for name, value in values_at(vision, entry).items() if name != "elastic_budgets"}
    return layer_widths(SparseCLIPVisionConfig(**values))


def count_macs(config: CLIPVisionConfig, *, resolution: int | None = None, projection: bool = True) -> int:
    """Count the multiply-accumulates of one image through the vision tower.

    Patch embedding, all linear layers, both attention products, and the projection of the class token; biases,
    normalisation and activations are not counted.
    """
    return TowerCost.of(config, resolution=resolution, projection=projection).total("macs", layer_widths(config))


def count_params(config: CLIPVisionConfig, *, projection: bool = True) -> int:
    """Count the parameters of the vision tower."""
    return TowerCost.of(config, projection=projection).total("params", layer_widths(config))
