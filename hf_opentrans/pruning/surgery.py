"""Apply a plan: as masks that can be trained through, or by really removing heads and neurons."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection
from transformers.initialization import no_init_weights

from hf_opentrans.models.configuration_sparse_clip import SparseCLIPConfig, SparseCLIPVisionConfig
from hf_opentrans.models.modeling_sparse_clip import (
    SparseCLIPAttention,
    SparseCLIPModel,
    SparseCLIPVisionModel,
    SparseCLIPVisionModelWithProjection,
)

from .macs import layer_widths
from .plan import LayerPlan, PruningPlan
from .tower import SparseModel, Tower

PrunableModel = CLIPModel | CLIPVisionModel | CLIPVisionModelWithProjection
_SPARSE_CLASSES = (
    (CLIPModel, SparseCLIPModel),
    (CLIPVisionModelWithProjection, SparseCLIPVisionModelWithProjection),
    (CLIPVisionModel, SparseCLIPVisionModel),
)
# Keys that belong to one saved model, not to the architecture.
_PER_FILE_KEYS = ("architectures", "auto_map", "transformers_version", "_name_or_path")


def to_sparse(model: PrunableModel) -> SparseModel:
    """Return a copy of a CLIP model as the sparse class of the same kind; same outputs, bit for bit.

    Args:
        model: `CLIPModel`, `CLIPVisionModel`, `CLIPVisionModelWithProjection`, or a sparse or segmenting class.

    Raises:
        TypeError: If the model has no CLIP vision tower.
    """
    extract: Any = getattr(model, "extract", None)
    if extract is not None:  # of several budgets the one that is set
        model = extract()
    for stock, sparse in _SPARSE_CLASSES:
        if isinstance(model, stock):
            target = type(model) if isinstance(model, sparse) else sparse
            return _build(target, model, model.config.to_dict(), model.state_dict())
    raise TypeError(
        f"The model is a {type(model).__name__}. Pruning needs a CLIP vision tower: CLIPModel, CLIPVisionModel, "
        "CLIPVisionModelWithProjection or their sparse classes. Load the model with one of them."
    )


def apply_masks(model: PrunableModel, plan: PruningPlan) -> SparseModel:
    """Return a copy whose removed heads and neurons are multiplied by zero.

    The masks act on head outputs and on activations after GELU, so that training cannot bring a removed unit back.
    They are recorded in the configuration (`masked_heads`, `masked_neurons`) and come back from disk.

    Args:
        model: See `to_sparse`.
        plan: What to keep.

    Raises:
        ValueError: If the plan does not fit the model.
    """
    sparse = to_sparse(model)
    widths = _check_plan(sparse, plan)
    for index, (width, layer) in enumerate(zip(widths, plan.layers, strict=True)):
        new, old = (layer.qk_head_dim, layer.v_head_dim), (width.qk_head_dim, width.v_head_dim)
        if any(n is not None and n != o for n, o in zip(new, old, strict=True)):
            raise ValueError(
                f"The plan narrows the heads of layer {index}. Masks can only leave out whole heads and neurons. "
                "Use slice_model, or a plan that was made without the structure 'ranks'."
            )
    overrides = [
        {
            "masked_heads": sorted(set(range(width.heads)) - set(layer.heads)) or None,
            "masked_neurons": sorted(set(range(width.neurons)) - set(layer.neurons)) or None,
        }
        for width, layer in zip(widths, plan.layers, strict=True)
    ]
    return _build(type(sparse), model, _with_layers(sparse, overrides), sparse.state_dict())


@dataclass(frozen=True)
class HeadMaps:
    """Linear maps into the narrower heads of one layer; None where a width stays.

    Args:
        query, key: Of queries and keys, `(heads, new width, old width)`.
        value: Of values, `(heads, new width, old width)`.
        output: Back to what `out_proj` read, transposed, `(heads, new width, old width)`.
    """

    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None
    output: torch.Tensor | None = None


def slice_model(
    model: PrunableModel, plan: PruningPlan | None = None, maps: Mapping[int, HeadMaps] | None = None
) -> SparseModel:
    """Return a physically smaller model; without narrower heads it computes what the masked model computes.

    Args:
        model: See `to_sparse`.
        plan: What to keep. Defaults to what the model's own masks keep.
        maps: By layer, where the plan narrows heads: their new queries, keys and values.

    Raises:
        ValueError: If the plan does not fit the model, there is neither a plan nor a mask, or maps are missing.
    """
    sparse = to_sparse(model)
    plan = plan_of_masks(sparse) if plan is None else plan
    _check_plan(sparse, plan)
    maps = maps or {}
    tower = Tower.of(sparse)
    state = sparse.state_dict()
    prefix = "" if tower.vision is sparse else "vision_model."
    overrides = []
    for index, (layer, kept) in enumerate(zip(tower.layers, plan.layers, strict=True)):
        name = f"{prefix}encoder.layers.{index}."
        override: dict[str, Any] = {"num_attention_heads": len(kept.heads), "intermediate_size": len(kept.neurons)}
        if layer.has_attention:
            attention = layer.self_attn
            override["masked_heads"] = _renumber(attention.masked_heads, kept.heads)
            queries = unit_columns(kept.heads, attention.qk_head_dim)
            values = unit_columns(kept.heads, attention.v_head_dim)
            for part, rows in (("q", queries), ("k", queries), ("v", values)):
                _take(state, f"{name}self_attn.{part}_proj", rows, dim=0)
            _take(state, f"{name}self_attn.out_proj", values, dim=1)
            override |= _narrow_heads(state, f"{name}self_attn.", kept, attention, maps.get(index, HeadMaps()), index)
        if layer.has_mlp:
            override["masked_neurons"] = _renumber(layer.mlp.masked_neurons, kept.neurons)
            neurons = torch.tensor(kept.neurons, dtype=torch.long)
            _take(state, f"{name}mlp.fc1", neurons, dim=0)
            _take(state, f"{name}mlp.fc2", neurons, dim=1)
        overrides.append(override)
    return _build(type(sparse), model, _with_layers(sparse, overrides), state)


def replace_tower(
    model: PrunableModel, config: SparseCLIPVisionConfig, tensors: Mapping[str, torch.Tensor]
) -> SparseModel:
    """Return a copy of a CLIP model, of its sparse class, with another vision tower.

    Args:
        model: See `to_sparse`.
        config: Of the new tower: its widths are taken, nothing else.
        tensors: All its weights under canonical names, `visual_projection.weight` too where the model has one.
    """
    sparse = to_sparse(model)
    values, state = sparse.config.to_dict(), sparse.state_dict()
    vision = values.get("vision_config", values)
    vision["per_layer_config"] = config.to_dict().get("per_layer_config")
    vision["pruning_config"] = config.pruning_config
    prefix = "" if isinstance(sparse, SparseCLIPVisionModel) else "vision_model."
    for name, tensor in tensors.items():
        key = name if name.startswith("visual_projection.") else prefix + name
        state[key] = tensor.to(state[key]) if key in state else tensor
    return _build(type(sparse), model, values, state)


def _narrow_heads(
    state: dict[str, torch.Tensor],
    name: str,
    kept: LayerPlan,
    attention: SparseCLIPAttention,
    maps: HeadMaps,
    layer: int,
) -> dict[str, int]:
    """Rewrite the projections of narrower heads; return the widths for the configuration."""
    override: dict[str, int] = {}
    for width, old, given in (
        ("qk_head_dim", attention.qk_head_dim, (maps.query, maps.key)),
        ("v_head_dim", attention.v_head_dim, (maps.value, maps.output)),
    ):
        new = getattr(kept, width)
        if new is None or new == old or not kept.heads:
            continue
        if any(m is None or tuple(m.shape) != (len(kept.heads), new, old) for m in given):
            raise ValueError(
                f"The plan narrows {width} of layer {layer} to {new}. That needs one map from {old} to {new} for each "
                f"of the {len(kept.heads)} heads. Pass `maps`, or a plan without widths."
            )
        override[width] = new
    if "qk_head_dim" in override:
        query, key = (_blocks(m) for m in (maps.query, maps.key))
        state[f"{name}k_proj.bias"] = torch.zeros_like(state[f"{name}k_proj.bias"])  # softmax never sees it
        _transform(state, f"{name}q_proj", query)
        _transform(state, f"{name}k_proj", key)
        _balance(state, f"{name}q_proj", f"{name}k_proj")
    if "v_head_dim" in override:
        _transform(state, f"{name}v_proj", _blocks(maps.value))
        weight = state[f"{name}out_proj.weight"]
        output = _blocks(maps.output).T.to(weight.device)
        state[f"{name}out_proj.weight"] = (weight.double() @ output).to(weight.dtype)
    return override


def _blocks(maps: torch.Tensor | None) -> torch.Tensor:
    return torch.block_diag(*() if maps is None else maps.double())


def _transform(state: dict[str, torch.Tensor], name: str, change: torch.Tensor) -> None:
    for key in (f"{name}.weight", f"{name}.bias"):
        old = state[key]
        state[key] = (change.to(old.device) @ old.double()).to(old.dtype)


def _balance(state: dict[str, torch.Tensor], query: str, key: str) -> None:
    """Give matching rows of queries and keys weights of one size: their product is what counts, fp16 holds it then."""
    key_size = state[f"{key}.weight"].norm(dim=1)
    query_size = torch.cat([state[f"{query}.weight"], state[f"{query}.bias"][:, None]], 1).norm(dim=1)
    tiny = torch.finfo(query_size.dtype).tiny ** 0.5
    factor = (key_size.clamp(min=tiny) / query_size.clamp(min=tiny)).sqrt()
    state[f"{query}.weight"] = state[f"{query}.weight"] * factor[:, None]
    state[f"{query}.bias"] = state[f"{query}.bias"] * factor
    state[f"{key}.weight"] = state[f"{key}.weight"] / factor[:, None]


def plan_of_masks(model: SparseModel) -> PruningPlan:
    """Return the plan that a masked model's masks stand for.

    Raises:
        ValueError: If nothing is masked.
    """
    heads, neurons = [], []
    for layer in Tower.of(model).layers:
        heads.append(_unmasked(layer.self_attn.num_heads, layer.self_attn.masked_heads) if layer.has_attention else ())
        neurons.append(_unmasked(layer.mlp.fc2.in_features, layer.mlp.masked_neurons) if layer.has_mlp else ())
    widths = layer_widths(Tower.of(model).vision.config)
    if all(len(h) == w.heads and len(n) == w.neurons for h, n, w in zip(heads, neurons, widths, strict=True)):
        raise ValueError(
            "The model has no masks. slice_model then needs a plan. Pass `plan`, or call apply_masks first."
        )
    return PruningPlan.from_dict({"layers": [{"heads": h, "neurons": n} for h, n in zip(heads, neurons, strict=True)]})


def unit_columns(units: Sequence[int], width: int) -> torch.Tensor:
    """Return the indices of all inputs that belong to `units` of `width` adjacent inputs each."""
    return (torch.tensor(units, dtype=torch.long)[:, None] * width + torch.arange(width)).flatten()


def _unmasked(width: int, masked: Iterable[int] | None) -> tuple[int, ...]:
    return tuple(sorted(set(range(width)) - set(masked or ())))


def _renumber(masked: Sequence[int] | None, kept: Sequence[int]) -> list[int] | None:
    return [position for position, unit in enumerate(kept) if unit in set(masked or ())] or None


def _take(state: dict[str, torch.Tensor], name: str, index: torch.Tensor, dim: int) -> None:
    weight = state[f"{name}.weight"]
    state[f"{name}.weight"] = weight.index_select(dim, index.to(weight.device))
    if dim == 0:  # outputs go, so does their bias
        bias = state[f"{name}.bias"]
        state[f"{name}.bias"] = bias[index.to(bias.device)]


def _check_plan(model: SparseModel, plan: PruningPlan) -> tuple:
    widths = layer_widths(Tower.of(model).vision.config)
    if len(plan) != len(widths):
        raise ValueError(
            f"The plan has {len(plan)} layers and the vision tower {len(widths)}. Both must agree. "
            "Use a plan that was made for this model."
        )
    for index, (width, layer) in enumerate(zip(widths, plan.layers, strict=True)):
        for kind, kept, total in (("head", layer.heads, width.heads), ("neuron", layer.neurons, width.neurons)):
            if kept and kept[-1] >= total:
                raise ValueError(
                    f"The plan keeps {kind} {kept[-1]} of layer {index}, which has {total} {kind}s. Indices must be "
                    "below that. Use a plan that was made for this model."
                )
    return widths


def _with_layers(model: SparseModel, overrides: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the model's configuration as a dictionary with `overrides` merged into each layer's."""
    config = model.config.to_dict()
    vision = config.get("vision_config", config)
    present = {int(index): dict(values) for index, values in (vision.get("per_layer_config") or {}).items()}
    vision["per_layer_config"] = {i: {**present.get(i, {}), **new} for i, new in enumerate(overrides)}
    return config


def _build(
    target: type[Any], source: PrunableModel, config: dict[str, Any], state: dict[str, torch.Tensor]
) -> SparseModel:
    """Create `target` from a configuration, with copies of the weights, on the source's device, in its precision."""
    config_class = target.config_class
    config = {key: value for key, value in config.items() if key not in (*_PER_FILE_KEYS, "model_type")}
    if issubclass(config_class, SparseCLIPVisionConfig):
        config.pop("vision_config", None)
    built_config = config_class(**config)
    implementation = source.config._attn_implementation
    parameter = next(source.parameters())
    with no_init_weights():
        model = target._from_config(built_config, attn_implementation=implementation, dtype=parameter.dtype)
    model.load_state_dict({key: value.detach().clone() for key, value in state.items()}, strict=True)
    model.config.name_or_path = source.config.name_or_path
    return model.to(parameter.device).train(source.training)


__all__ = [
    "HeadMaps",
    "SparseCLIPConfig",
    "apply_masks",
    "plan_of_masks",
    "replace_tower",
    "slice_model",
    "to_sparse",
    "unit_columns",
]
