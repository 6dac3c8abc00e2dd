"""Configuration of a CLIP that holds several nested budgets in one checkpoint.

The widths of the vision layers are those of the largest budget, as in any pruned model; `elastic_budgets` lists what
the other budgets keep of them.
This file travels with checkpoints as remote code: it imports nothing but huggingface_hub and siblings.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from huggingface_hub.dataclasses import strict

from .configuration_sparse_clip import SparseCLIPConfig, SparseCLIPVisionConfig

# What `layers` of a budget lists for every layer, in this order, under its names in `per_layer_config`.
WIDTHS = ("num_attention_heads", "qk_head_dim", "v_head_dim", "intermediate_size")
# Figures that a budget may carry.
FIGURES = ("macs", "params", "cosine_class", "cosine_patches")
MOST_BUDGETS = 64
_WRONG = "Save the model again with `prune_elastic`."


@strict
class ElasticCLIPVisionConfig(SparseCLIPVisionConfig):
    r"""Configuration of an [`ElasticCLIPVisionModel`], with or without projection.

    Args:
        elastic_budgets (`list[dict]`, *optional*):
            The nested budgets, largest first. Each has `budget` (share of the dense model that it keeps), `layers`
            (for every layer heads, width of queries and keys, width of values, neurons) and figures: `macs`, `params`,
            `cosine_class` and `cosine_patches` (to the dense model's tokens, on images that nothing was fitted on).
    """

    model_type = "elastic_clip_vision_model"
    readable_model_types = ("elastic_clip_vision_model",)

    elastic_budgets: list[dict[str, Any]] | None = None

    def validate_elastic(self) -> None:
        """Part of `@strict`-powered validation."""
        check_budgets(self.elastic_budgets, self)


@strict
class ElasticCLIPConfig(SparseCLIPConfig):
    r"""Configuration of an [`ElasticCLIPModel`] and of an [`ElasticCLIPForSegmentation`].

    Args:
        elastic_budgets (`list[dict]`, *optional*):
            See [`ElasticCLIPVisionConfig`].
    """

    model_type = "elastic_clip"
    readable_model_types = ("elastic_clip",)

    elastic_budgets: list[dict[str, Any]] | None = None

    def validate_elastic(self) -> None:
        """Part of `@strict`-powered validation."""
        if isinstance(self.vision_config, SparseCLIPVisionConfig):
            check_budgets(self.elastic_budgets, self.vision_config)


def widths_of(vision: SparseCLIPVisionConfig) -> list[list[int]]:
    """Return heads, query-key width, value width and neurons of every layer; 0 units where a sublayer is skipped."""
    found = []
    for layer in vision.per_layer_config:
        skip = getattr(layer, "skip", None) or ()
        heads, qk, v, neurons = (int(layer.__dict__[name]) for name in WIDTHS)
        found.append([0 if "attention" in skip else heads, qk, v, 0 if "mlp" in skip else neurons])
    return found


def check_budgets(budgets: Any, vision: SparseCLIPVisionConfig) -> None:
    """Refuse budgets that are not nested in each other, or in the widths of the vision tower.

    Raises:
        ValueError: If a value cannot be meant; the message names it.
    """
    if budgets is None:
        return
    if not isinstance(budgets, Sequence) or not 1 <= len(budgets) <= MOST_BUDGETS:
        raise ValueError(f"elastic_budgets has no list of 1 to {MOST_BUDGETS} budgets. It needs one. {_WRONG}")
    for index, entry in enumerate(budgets):
        share: Any = entry.get("budget") if isinstance(entry, Mapping) else None
        if type(share) not in (int, float) or not 0 < share <= 1:
            raise ValueError(f"Budget number {index} keeps {share!r}. It must lie in (0, 1]. {_WRONG}")
        _check_layers(entry, int(vision.num_hidden_layers))
        wrong = [name for name in FIGURES if entry.get(name) is not None and type(entry[name]) not in (int, float)]
        if wrong:
            raise ValueError(f"Budget {share:g} has {wrong[0]}={str(entry[wrong[0]])[:40]!r}, no number. {_WRONG}")
    for larger, smaller in pairwise([{"layers": widths_of(vision), "budget": 1.1}, *budgets]):
        if smaller["budget"] >= larger["budget"]:
            raise ValueError(
                f"elastic_budgets lists {smaller['budget']:g} after {larger['budget']:g}. The largest must come "
                f"first, and none twice. {_WRONG}"
            )
        for layer, (wide, narrow) in enumerate(zip(larger["layers"], smaller["layers"], strict=True)):
            is_largest = smaller is budgets[0]
            if any(n > w for w, n in zip(wide, narrow, strict=True)) or (is_largest and list(wide) != list(narrow)):
                raise ValueError(
                    f"Budget {smaller['budget']:g} has the widths {list(narrow)} in layer {layer}, where the "
                    f"{'tower' if is_largest else 'next larger budget'} has {list(wide)}. Budgets must be nested. "
                    f"{_WRONG}"
                )


def _check_layers(entry: Mapping[str, Any], count: int) -> None:
    layers: Any = entry.get("layers")
    is_list = isinstance(layers, Sequence) and len(layers) == count
    if not is_list or not all(isinstance(layer, Sequence) and len(layer) == len(WIDTHS) for layer in layers):
        raise ValueError(
            f"Budget {entry['budget']:g} does not list {len(WIDTHS)} widths for each of {count} layers. It must. "
            f"{_WRONG}"
        )
    for index, layer in enumerate(layers):
        if any(type(width) is not int or width < 0 for width in layer) or 0 in layer[1:3]:
            raise ValueError(
                f"Budget {entry['budget']:g} has the widths {str(list(layer))[:60]} in layer {index}. They must be "
                f"whole numbers, those inside heads 1 or more. {_WRONG}"
            )


def find_budget(budgets: Sequence[Mapping[str, Any]], budget: float) -> int:
    """Return the position of a budget.

    Raises:
        ValueError: If there is no such budget; lists those that there are.
    """
    if not budgets:
        raise ValueError(f"budget is {budget!r}, and elastic_budgets in config.json is missing or empty. {_WRONG}")
    is_number = isinstance(budget, int | float) and not isinstance(budget, bool)
    for index, entry in enumerate(budgets):
        if is_number and abs(float(entry["budget"]) - budget) < 1e-6:
            return index
    listed = ", ".join(f"{entry['budget']:g}" for entry in budgets)
    raise ValueError(
        f"budget is {budget!r}. This checkpoint holds the budgets {listed} and no others. Choose one of "
        "them, or make another checkpoint with `prune_elastic`."
    )


def values_at(vision: SparseCLIPVisionConfig, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the vision configuration as a dictionary, with the widths of one budget.

    Args:
        vision: With the widths of any budget.
        entry: Of `elastic_budgets`.
    """
    values = vision.to_dict()
    values.pop("model_type", None)
    present = {int(index): dict(layer) for index, layer in (values.get("per_layer_config") or {}).items()}
    values["per_layer_config"] = {
        index: {**present.get(index, {}), **dict(zip(WIDTHS, layer, strict=True))}
        for index, layer in enumerate(entry["layers"])
    }
    origin = values.get("pruning_config")
    if origin is not None and entry.get("budget") is not None:
        values["pruning_config"] = {**origin, "keep": entry["budget"]}
    return values


# With both towers, and of a vision tower alone.
ELASTIC_TYPES = (ElasticCLIPConfig.model_type, ElasticCLIPVisionConfig.model_type)

__all__ = ["ElasticCLIPConfig", "ElasticCLIPVisionConfig"]
