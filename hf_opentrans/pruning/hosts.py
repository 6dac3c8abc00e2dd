"""Models that carry a CLIP vision tower: where it is, its weights under canonical names, and how widths go in."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from hf_opentrans.models.configuration_sparse_clip import SparseCLIPVisionConfig
from hf_opentrans.models.modeling_sparse_clip import (
    SparseCLIPAttention,
    SparseCLIPMLP,
    SparseCLIPVisionModel,
    SparseCLIPVisionModelWithProjection,
)

from .tower import Tower

# Class of the host: path to the tower. "" is the model itself.
TOWERS = {
    "CLIPModel": "vision_model",
    "CLIPVisionModel": "",
    "CLIPVisionModelWithProjection": "vision_model",
    "CLIPForImageClassification": "vision_model",
    "CLIPSegModel": "vision_model",
    "CLIPSegForImageSegmentation": "clip.vision_model",
    "OwlViTModel": "vision_model",
    "OwlViTForObjectDetection": "owlvit.vision_model",
    "Owlv2Model": "vision_model",
    "Owlv2ForObjectDetection": "owlv2.vision_model",
    "LlavaModel": "vision_tower",
    "LlavaForConditionalGeneration": "model.vision_tower",
    "VipLlavaForConditionalGeneration": "model.vision_tower",
    "LlavaNextForConditionalGeneration": "model.vision_tower",
    "GitModel": "image_encoder.vision_model",
    "GitForCausalLM": "git.image_encoder.vision_model",
    "VisionTextDualEncoderModel": "vision_model",
}
# Projections into the space shared with text, beside the tower; others carry one of their own or none.
PROJECTIONS = {
    "CLIPModel": "visual_projection",
    "CLIPVisionModelWithProjection": "visual_projection",
    "CLIPSegModel": "visual_projection",
    "CLIPSegForImageSegmentation": "clip.visual_projection",
}
# These build their tower from its configuration's model type: the sparse tower becomes theirs altogether.
BUILDS_BY_TYPE = ("LlavaModel", "LlavaForConditionalGeneration", "VipLlavaForConditionalGeneration")
BUILDS_BY_TYPE += ("LlavaNextForConditionalGeneration",)
SPELLINGS = {"pre_layrnorm": ("pre_layrnorm", "pre_layernorm")}
_PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
# Whose hooks record hidden states and attentions.
_RECORDING = "transformers.utils.output_capturing"
_COPIED = ("image_size", "num_channels", "hidden_act", "layer_norm_eps", "attention_dropout")


@dataclass(frozen=True)
class HostTower:
    """A view of the vision tower of any model; shares its weights.

    Args:
        model: The host.
        prefix: Path of the tower in it.
        tower: The tower.
        projection: CLIP's projection beside it; None where the host has none.
    """

    model: PreTrainedModel
    prefix: str
    tower: nn.Module
    projection: nn.Linear | None

    @classmethod
    def of(cls, model: PreTrainedModel, prefix: str | None = None) -> "HostTower":
        """Find the tower.

        Args:
            model: A transformers model.
            prefix: Path of the tower, for classes that are not known here.

        Raises:
            TypeError: If the class is unknown and no prefix is given, or what lies there is no CLIP tower.
        """
        known = next((name for name in _names(model) if name in TOWERS), None)
        if prefix is None and known is None:
            raise TypeError(
                f"The model is a {type(model).__name__}. Known hosts of a CLIP tower are {', '.join(TOWERS)}. "
                "Give the path of its tower as prefix, for example prefix='vision_model'."
            )
        path = TOWERS[known] if prefix is None and known is not None else (prefix or "").rstrip(".")
        tower = _submodule(model, path)
        _check_structure(tower, type(model).__name__, path)
        aside = PROJECTIONS.get(known or "")
        return cls(model, path, tower, cast("nn.Linear", _submodule(model, aside)) if aside else None)

    @property
    def config(self) -> Any:
        """Configuration of the tower."""
        return self.layers[0].self_attn.config

    @property
    def layers(self) -> Any:
        """The blocks, first to last."""
        return cast("Any", self.tower).encoder.layers

    @property
    def pre_norm(self) -> str:
        """How the host spells `pre_layrnorm`."""
        return next(name for name in SPELLINGS["pre_layrnorm"] if hasattr(self.tower, name))

    @property
    def builds_by_type(self) -> bool:
        """Whether the host builds its tower through `AutoModel`, so that the sparse class can be its tower."""
        return any(name in BUILDS_BY_TYPE for name in _names(self.model))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the weights under canonical names: without prefix, and `visual_projection.weight`."""
        found = {_canonical(name): value for name, value in self.tower.state_dict().items()}
        found.pop("embeddings.position_ids", None)
        if self.projection is not None:
            found["visual_projection.weight"] = self.projection.weight.detach()
        return found

    def name_of(self, canonical: str) -> str:
        """Return the name that a canonical tensor has in the host's state dict."""
        if canonical.startswith("visual_projection."):
            return f"{PROJECTIONS[next(n for n in _names(self.model) if n in PROJECTIONS)]}.weight"
        name = canonical.replace("pre_layrnorm", self.pre_norm, 1)
        return f"{self.prefix}.{name}" if self.prefix else name

    def sparse_config(self) -> SparseCLIPVisionConfig:
        """Return the tower's configuration as one of a sparse tower of full width."""
        values = {name: getattr(self.config, name) for name in (*_SIZES, *_COPIED)}
        if self.projection is not None:
            values["projection_dim"] = self.projection.out_features
        return SparseCLIPVisionConfig(**values)

    def to_sparse(self) -> SparseCLIPVisionModel | SparseCLIPVisionModelWithProjection:
        """Return a copy of the tower, with its projection where there is one, in float32."""
        build: Any = SparseCLIPVisionModel if self.projection is None else SparseCLIPVisionModelWithProjection
        with no_init_weights():
            copy = build(self.sparse_config())
        tensors = {name: value.detach().float() for name, value in self.tensors().items()}
        projection = tensors.pop("visual_projection.weight", None)
        view = Tower.of(copy)
        view.vision.load_state_dict(tensors, strict=True)
        if view.projection is not None and projection is not None:
            view.projection.load_state_dict({"weight": projection})
        return copy.to(next(self.tower.parameters()).device).eval()

    def install(self, config: SparseCLIPVisionConfig, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Give the tower the widths of `config`, and the weights, in place.

        Args:
            config: Of the small tower.
            tensors: Its weights under canonical names; None leaves them to be loaded later.
        """
        old = next(self.tower.parameters())
        if self.builds_by_type:
            self._replace(config, old)
        else:
            self._narrow(config, old)
        if tensors is None:
            return
        host = HostTower.of(self.model, self.prefix)
        found = {host.name_of(name).removeprefix(f"{self.prefix}."): value for name, value in tensors.items()}
        projection = found.pop(next((n for n in found if n.endswith("visual_projection.weight")), ""), None)
        host.tower.load_state_dict(found, strict=True)
        if self.projection is not None and projection is not None:
            self.projection.load_state_dict({"weight": projection})

    def _replace(self, config: SparseCLIPVisionConfig, like: torch.Tensor) -> None:
        config._attn_implementation = self.config._attn_implementation
        build: Any = SparseCLIPVisionModel
        with no_init_weights():
            tower = build(config)
        parent, _, name = self.prefix.rpartition(".")
        setattr(_submodule(self.model, parent), name, tower.to(like.device, like.dtype).train(self.tower.training))
        self.model.config.vision_config = config  # pyright: ignore[reportAttributeAccessIssue]

    def _narrow(self, config: SparseCLIPVisionConfig, like: torch.Tensor) -> None:
        for index, layer in enumerate(self.layers):
            widths = cast("SparseCLIPVisionConfig", config.per_layer_config[index])
            attention = _attention_class(type(layer.self_attn))(config, widths)
            mlp = SparseCLIPMLP(config, widths)
            # The host's own: set_attn_implementation() writes there.
            attention.config = layer.self_attn.config
            for hook in layer.self_attn._forward_hooks.values():
                if getattr(hook, "__module__", "") == _RECORDING:  # of a host that returned attentions before
                    attention.register_forward_hook(hook)
            for name, part in (("self_attn", attention), ("mlp", mlp)):
                setattr(layer, name, part.to(like.device, like.dtype).train(layer.training))


class _HostAttention(SparseCLIPAttention):
    """The sparse attention as a subclass of a host's own: transformers records attentions by class.

    The classes are made when they are needed, so pickle and deepcopy are told how.
    """

    host: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank_attention, (self.host,), self.__getstate__()


@functools.cache
def _attention_class(host: type[nn.Module]) -> type[SparseCLIPAttention]:
    """Return the sparse attention that passes for `host`."""
    if issubclass(host, SparseCLIPAttention):  # a tower that was installed before
        return host
    if issubclass(SparseCLIPAttention, host):
        return SparseCLIPAttention
    return type(f"Sparse{host.__name__}", (_HostAttention, host), {"host": host, "__doc__": _HostAttention.__doc__})


def _blank_attention(host: type[nn.Module]) -> SparseCLIPAttention:
    found = _attention_class(host)
    return found.__new__(found)


def check_same_size(host: HostTower, source: Mapping[str, Any]) -> None:
    """Compare the tower's sizes with those of the dense tower that a subnetwork was made from.

    Raises:
        ValueError: If one differs, or the tower is pruned already.
    """
    if any(_is_pruned(layer, source) for layer in host.layers):
        raise ValueError(
            f"The vision tower of the {type(host.model).__name__} is pruned already. A subnetwork is cut out of a "
            "dense tower. Load the dense model."
        )
    own = {name: host.config.__dict__[name] for name in _SIZES}
    other = {name: source[name] for name in _SIZES}
    if own != other:
        first, second = (", ".join(f"{name} {values[name]}" for name in _SIZES) for values in (own, other))
        raise ValueError(
            f"The vision tower of the {type(host.model).__name__} has {first}. The subnetwork was made from one with "
            f"{second}. Both must be of one size. Prune a CLIP of the target's size."
        )


def _is_pruned(layer: Any, source: Mapping[str, Any]) -> bool:
    """Tell a layer that was made narrower from one of another model."""
    attention, mlp = layer.self_attn, layer.mlp
    if not isinstance(attention, SparseCLIPAttention):
        return False
    heads, head_dim = source["num_attention_heads"], source["head_dim"]
    widths = (attention.num_heads, attention.qk_head_dim, attention.v_head_dim, mlp.fc1.out_features)
    return widths != (heads, head_dim, head_dim, source["intermediate_size"]) and (
        attention.embed_dim == source["hidden_size"]
    )


def _names(model: PreTrainedModel) -> list[str]:
    return [kind.__name__ for kind in type(model).__mro__]


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as err:
        raise TypeError(
            f"The {type(model).__name__} has no module {path!r}. The prefix must lead to its vision tower. Modules at "
            f"its top are {', '.join(name for name, _ in model.named_children())}."
        ) from err


def _check_structure(tower: nn.Module, host: str, path: str) -> None:
    where = f"{path!r} of the {host}" if path else f"the {host}"
    layers = getattr(getattr(tower, "encoder", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise TypeError(
            f"There is no CLIP vision tower at {where}: it has no encoder.layers. A tower has embeddings, "
            "encoder.layers and post_layernorm. Give another prefix."
        )
    names = {name for name, _ in layers[0].named_modules()}
    missing = [part for part in _PARTS if part not in names]
    if missing:
        fused = next((name for name in names if name.endswith("qkv")), None)
        found = f"it has one fused layer {fused!r}" if fused else f"it lacks {', '.join(missing)}"
        raise TypeError(
            f"The blocks at {where} are not those of CLIP: {found}. Transfer needs separate q_proj, k_proj, v_proj, "
            "out_proj, fc1 and fc2. This model can be pruned by the method, but takes no CLIP subnetwork."
        )
    embeddings = getattr(tower, "embeddings", None)
    lacks = [
        name for name in ("class_embedding", "patch_embedding", "position_embedding") if not hasattr(embeddings, name)
    ]
    if lacks or not any(hasattr(tower, name) for name in SPELLINGS["pre_layrnorm"]):
        lacks = lacks or ["pre_layrnorm"]
        raise TypeError(
            f"The tower at {where} is not CLIP's: it has no {', '.join(lacks)}. A CLIP tower has a class token and a "
            "LayerNorm before its blocks. This model can be pruned by the method, but takes no CLIP subnetwork."
        )


def _canonical(name: str) -> str:
    return name.replace("pre_layernorm", "pre_layrnorm", 1) if name.startswith("pre_layernorm") else name
