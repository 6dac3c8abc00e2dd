"""Bounds on the sizes that a configuration may state, checked before they become loops or tensors.

A config.json may come from anywhere. The bounds lie far above every model that exists (ViT-22B has 48 layers, a width
of 6,144 and MLPs of 24,576) and far below what fills a memory with layers or lists.
This file travels with checkpoints as remote code: it imports nothing but the standard library.
"""

import math
from collections.abc import Mapping
from typing import Any

# Lowest and highest value. 0 heads and 0 neurons are what pruning may leave of a layer.
SIZES: dict[str, tuple[int, int]] = {
    "hidden_size": (1, 2**16),
    "intermediate_size": (0, 2**20),
    "num_hidden_layers": (0, 2**10),
    "num_attention_heads": (0, 2**12),
    "head_dim": (1, 2**14),
    "qk_head_dim": (1, 2**14),
    "v_head_dim": (1, 2**14),
    "projection_dim": (1, 2**16),
    "image_size": (1, 2**14),
    "patch_size": (1, 2**12),
    "num_channels": (1, 2**10),
    "vocab_size": (1, 2**24),
    "max_position_embeddings": (1, 2**20),
}
# What a file states is a value, whatever its type: all errors here are ValueErrors.
MOST_PARAMETERS = 2**35  # of one tower
MOST_POSITIONS = 2**20  # patches of an image
LAYER_KEYS = ("num_attention_heads", "qk_head_dim", "v_head_dim", "intermediate_size")
LAYER_LISTS = ("masked_heads", "masked_neurons", "skip")


def shown(value: Any) -> str:
    """Return a value for a message, cut where it is long."""
    # A list of a million entries is not written out to be cut.
    text = repr(value[:20] if isinstance(value, list | tuple | str) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_size(name: str, value: Any, lowest: int, most: int, where: str = "") -> None:
    """Refuse a size that is no whole number or out of bounds.

    Args:
        name: Of the field.
        value: What the configuration states; `None` passes.
        lowest: Least value that is accepted.
        most: Greatest value that is accepted.
        where: Put before the name: "Layer 3 has ", "The text tower has ".

    Raises:
        ValueError: If it is out of bounds, or no integer.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where}{name}={shown(value)}. It must be a whole number. Correct the configuration.")  # noqa: TRY004
    if value < lowest:
        raise ValueError(f"{where}{name}={value}. It must be at least {lowest}. Correct the configuration.")
    if value > most:
        raise ValueError(
            f"{where}{name}={shown(value)}. It must be at most {most}: no model is that large, so the configuration "
            "is damaged. Get it again, or correct it."
        )


def check_sizes(values: Mapping[str, Any], where: str) -> None:
    """Check every field of `SIZES` that a configuration holds.

    Args:
        values: The configuration's fields.
        where: Which tower, for the message: "The vision tower has ".

    Raises:
        ValueError: If one is out of bounds, or no integer.
    """
    for name, (lowest, most) in SIZES.items():
        check_size(name, values.get(name), lowest, most, where)


def check_number(name: str, value: Any, lowest: float, most: float, where: str = "") -> None:
    """Refuse a number that is NaN or outside `[lowest, most]`; `None` passes.

    Raises:
        ValueError: If it is.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= most:
        bounds = f"at least {lowest:g}" if math.isinf(most) else f"in [{lowest:g}, {most:g}]"
        raise ValueError(f"{where}{name}={shown(value)}. It must be a number {bounds}. Correct the configuration.")


def check_layers(layers: Any, count: int) -> None:
    """Check a `per_layer_config` before transformers copies it.

    Args:
        layers: What the configuration states; `None` passes.
        count: Layers of the model.

    Raises:
        ValueError: If it is no mapping from layers to the fields that may differ there, or a value is impossible.
    """
    if layers is None:
        return
    if not isinstance(layers, Mapping):
        raise ValueError(  # noqa: TRY004
            f"per_layer_config is a {type(layers).__name__}. It must map the indices of layers to what differs there. "
            "Correct the configuration."
        )
    if len(layers) > count:
        raise ValueError(
            f"per_layer_config has {len(layers)} entries, and the model {count} layers. There can be one entry for "
            "each layer. Correct the configuration."
        )
    seen: set[int] = set()
    for key, layer in layers.items():
        if not (isinstance(key, int) and not isinstance(key, bool)) and not (isinstance(key, str) and key.isdecimal()):
            raise ValueError(
                f"per_layer_config has the key {shown(key)}. Keys are indices of layers. Correct the configuration."
            )
        if not 0 <= int(key) < count or int(key) in seen:
            raise ValueError(
                f"per_layer_config has the layer {shown(key)}. Each must be there once, in [0, {count}). Correct the "
                "configuration."
            )
        seen.add(int(key))
        _check_layer(int(key), layer)


def _check_layer(index: int, layer: Any) -> None:
    if not isinstance(layer, Mapping):
        raise ValueError(  # noqa: TRY004
            f"Layer {index} is {shown(layer)}. It must hold what differs there, such as intermediate_size. Correct "
            "`per_layer_config`."
        )
    unknown = sorted({str(name) for name in layer} - {*LAYER_KEYS, *LAYER_LISTS})
    if unknown:
        raise ValueError(
            f"Layer {index} has {shown(', '.join(unknown))}. Layers can differ in "
            f"{', '.join(LAYER_KEYS + LAYER_LISTS)}. Correct `per_layer_config`."
        )
    for name in LAYER_KEYS:
        # `None` would not become the default here.
        if name in layer and layer[name] is None:
            raise ValueError(f"Layer {index} has {name}=None. It must be a whole number. Correct `per_layer_config`.")
        check_size(name, layer.get(name), *SIZES[name], where=f"Layer {index} has ")
    for name in LAYER_LISTS:
        entry = layer.get(name)
        kind = str if name == "skip" else int
        is_list = isinstance(entry, list | tuple | set | frozenset)
        if entry is not None and not (is_list and all(type(item) is kind for item in entry)):
            raise ValueError(
                f"Layer {index} has {name}={shown(entry)}. It must be a list of "
                f"{'names' if kind is str else 'indices'}. Correct `per_layer_config`."
            )


__all__ = ["check_layers", "check_number", "check_size", "check_sizes", "shown"]
