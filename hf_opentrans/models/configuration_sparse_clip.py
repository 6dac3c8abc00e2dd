"""Configuration of a CLIP whose vision layers may differ in width.

This file travels with checkpoints as remote code: it imports nothing but transformers, huggingface_hub and siblings.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

from huggingface_hub.dataclasses import strict
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from .configuration_limits import (
    MOST_PARAMETERS,
    MOST_POSITIONS,
    SIZES,
    check_layers,
    check_number,
    check_size,
    check_sizes,
    shown,
)

SKIPPABLE = ("attention", "mlp")
VISION_MODEL_TYPES = ("clip_vision_model", "sparse_clip_vision_model")
CLIP_MODEL_TYPES = ("clip", "sparse_clip")
SEGMENTATION_MODES = ("vanilla", "maskclip", "sclip", "clearclip", "naclip")


_Base = PreTrainedConfig if TYPE_CHECKING else object


class _ReadsStockCLIP(_Base):
    """Read the config.json of a stock CLIP as our own, and refuse that of any other model."""

    readable_model_types: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """Return the configuration as a dictionary, with the model types of stock CLIP replaced by ours."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config.get("model_type")
        if model_type is not None and model_type not in cls.readable_model_types:
            raise ValueError(
                f"{str(pretrained_model_name_or_path)!r} holds a model of type {model_type!r}. "
                f"{cls.__name__} reads {', '.join(cls.readable_model_types)}. Give a CLIP model"
                + (" with both towers." if model_type in VISION_MODEL_TYPES else ".")
            )
        config = dict(config)
        if isinstance(config.get("vision_config"), dict):
            tower = {**config["vision_config"], "model_type": SparseCLIPVisionConfig.model_type}
            # A tower that is read alone has the precision of the whole model.
            tower["dtype"] = tower.get("dtype") or config.get("dtype") or config.get("torch_dtype")
            config["vision_config"] = tower
        if model_type is not None:
            config["model_type"] = cls.model_type
        return config, kwargs


@strict
class SparseCLIPVisionConfig(_ReadsStockCLIP, CLIPVisionConfig):
    r"""Configuration of a [`SparseCLIPVisionModel`]: a [`CLIPVisionConfig`] whose layers may differ.

    Widths of single layers go into the official `per_layer_config`, a mapping from the layer's index to the values
    that differ there: `num_attention_heads` (0 allowed), `qk_head_dim`, `v_head_dim`, `intermediate_size`
    (0 allowed), `masked_heads`, `masked_neurons`, and `skip` (a list with "attention" and / or "mlp": the sublayer is
    left out altogether, its bias too).

    Args:
        head_dim (`int`, *optional*):
            Width of one head in the dense model; fixes the softmax scale `head_dim ** -0.5`, which pruning keeps.
            Defaults to `hidden_size // num_attention_heads`.
        qk_head_dim (`int`, *optional*):
            Width of the queries and keys of one head. Defaults to `head_dim`.
        v_head_dim (`int`, *optional*):
            Width of the values of one head. Defaults to `head_dim`.
        masked_heads (`list[int]`, *optional*):
            Heads whose output is multiplied by zero (structured masks, see `apply_masks`).
        masked_neurons (`list[int]`, *optional*):
            MLP neurons whose activation is multiplied by zero.
        pruning_config (`dict`, *optional*):
            Where the model comes from: base model, budget, unit, method. Information only.
    """

    model_type = "sparse_clip_vision_model"
    readable_model_types = (*VISION_MODEL_TYPES, *CLIP_MODEL_TYPES)

    head_dim: int | None = None
    qk_head_dim: int | None = None
    v_head_dim: int | None = None
    masked_heads: list[int] | None = None
    masked_neurons: list[int] | None = None
    pruning_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            # __dict__: a plain read raises once num_attention_heads has become a per-layer attribute.
            self.head_dim = self.hidden_size // max(self.__dict__["num_attention_heads"], 1)
        self.qk_head_dim = self.head_dim if self.qk_head_dim is None else self.qk_head_dim
        self.v_head_dim = self.head_dim if self.v_head_dim is None else self.v_head_dim
        # Before transformers goes through layers one by one.
        _check_tower(self.__dict__, "The vision tower has ")
        _check_grid(self.__dict__)
        check_layers(kwargs.get("per_layer_config"), self.num_hidden_layers)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation. Replaces CLIP's rule that heads must divide the hidden size."""
        for index, layer in enumerate(self.per_layer_config):
            for name, lowest in (
                ("num_attention_heads", 0),
                ("intermediate_size", 0),
                ("qk_head_dim", 1),
                ("v_head_dim", 1),
            ):
                value = layer.__dict__[name]
                if value < lowest:
                    raise ValueError(
                        f"Layer {index} has {name}={value}. It must be at least {lowest}. "
                        "Correct `per_layer_config`, or leave the sublayer out with `skip`."
                    )
            for name, width in (("masked_heads", "num_attention_heads"), ("masked_neurons", "intermediate_size")):
                outside = [i for i in layer.__dict__[name] or () if not 0 <= i < layer.__dict__[width]]
                if outside:
                    raise ValueError(
                        f"Layer {index} masks {name.removeprefix('masked_')} {outside[:5]}. Indices must lie in "
                        f"[0, {layer.__dict__[width]}). Correct `per_layer_config`."
                    )
            unknown = set(getattr(layer, "skip", ())) - set(SKIPPABLE)
            if unknown:
                raise ValueError(
                    f"Layer {index} skips {sorted(unknown)}. Only {list(SKIPPABLE)} can be skipped. Correct `skip`."
                )

    def validate_total_size(self) -> None:
        """Part of `@strict`-powered validation: sizes that are possible one by one may be absurd together."""
        parameters = (cast("int", self.image_size) // cast("int", self.patch_size)) ** 2 * self.hidden_size
        for layer in cast("Any", self.per_layer_config):
            attention = layer.num_attention_heads * (layer.qk_head_dim + layer.v_head_dim)
            parameters += 2 * self.hidden_size * (attention + layer.intermediate_size)
        if parameters > MOST_PARAMETERS:
            raise ValueError(
                f"The vision tower has {parameters:,} parameters by its sizes. It may have {MOST_PARAMETERS:,} at "
                "most: no model is that large, so the configuration is damaged. Get it again, or correct it."
            )

    def __eq__(self, other: object) -> bool:
        # The generated dataclass comparison reads every field and so raises on per-layer attributes.
        return type(self) is type(other) and _comparable(self) == _comparable(other)


@strict
class SparseCLIPConfig(_ReadsStockCLIP, CLIPConfig):
    r"""Configuration of a [`SparseCLIPModel`] and of a [`DenseCLIPForSegmentation`].

    The text tower is that of CLIP, the vision tower has a [`SparseCLIPVisionConfig`].

    Args:
        segmentation_mode (`str`, *optional*, defaults to `"naclip"`):
            How the last block turns into dense tokens: `"vanilla"`, `"maskclip"`, `"sclip"`, `"clearclip"` or
            `"naclip"`. The right one belongs to the model: it depends on how its patch tokens were trained.
        segmentation_reduced (`bool`, *optional*):
            Whether the last block is cut down to its attention output (no residual, no MLP). Defaults to what was
            published for the mode: `False` for vanilla and sclip, `True` for the others.
        segmentation_cut (`bool`, *optional*, defaults to `False`):
            Whether the last block's MLP was dropped, because the mode does not read it. Other modes are then refused.
        segmentation_logit_scale (`float`, *optional*, defaults to 40.0):
            Factor on the cosines before the softmax over names (SCLIP and NACLIP use 40).
        segmentation_templates (`str`, *optional*, defaults to `"photo"`):
            Name of the prompt templates: `"plain"`, `"photo"`, `"vild14"` or `"imagenet80"`.
    """

    model_type = "sparse_clip"
    readable_model_types = CLIP_MODEL_TYPES
    sub_configs_defaults = {"vision_config": SparseCLIPVisionConfig, "text_config": CLIPTextConfig}

    segmentation_mode: str = "naclip"
    segmentation_reduced: bool | None = None
    segmentation_cut: bool = False
    segmentation_logit_scale: float | int = 40.0
    segmentation_templates: str = "photo"

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.vision_config, CLIPVisionConfig):
            self.vision_config = self.vision_config.to_dict()
        check_size("projection_dim", self.projection_dim, *SIZES["projection_dim"], where="The model has ")
        check_number("segmentation_logit_scale", self.segmentation_logit_scale, 0.0, 1e6, "The model has ")
        # Under the names of old files too: transformers builds a tower of these first.
        for name in ("vision_config_dict", "text_config", "text_config_dict"):
            _check_stock_tower(kwargs.get(name, self.__dict__.get(name)), name.split("_")[0])
        if isinstance(self.vision_config, dict):
            self.vision_config = {**self.vision_config, "model_type": SparseCLIPVisionConfig.model_type}
        super().__post_init__(**kwargs)

    def validate_segmentation(self) -> None:
        """Part of `@strict`-powered validation."""
        if self.segmentation_mode not in SEGMENTATION_MODES:
            raise ValueError(
                f"segmentation_mode is {self.segmentation_mode!r}. It must be one of {list(SEGMENTATION_MODES)}."
            )

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and _comparable(self) == _comparable(other)


def _check_tower(values: Mapping[str, Any], where: str) -> None:
    """Refuse sizes and numbers of a tower that cannot be meant."""
    check_sizes(values, where)
    check_number("layer_norm_eps", values.get("layer_norm_eps"), 0.0, 1.0, where)
    check_number("attention_dropout", values.get("attention_dropout"), 0.0, 1.0, where)
    activation = values.get("hidden_act")
    if activation is not None and not (isinstance(activation, str) and activation in ACT2FN):
        raise ValueError(
            f"{where}hidden_act={shown(activation)}. transformers has no such activation. Correct the configuration."
        )


def _check_stock_tower(tower: Any, kind: str) -> None:
    """Check a tower of which transformers makes its own configuration, which has hardly any bounds."""
    values = tower.to_dict() if isinstance(tower, PreTrainedConfig) else tower
    if not isinstance(values, Mapping):
        return  # absent, or refused by its type
    where = f"The {kind} tower has "
    _check_tower(values, where)
    check_size("num_attention_heads", values.get("num_attention_heads"), 1, SIZES["num_attention_heads"][1], where)
    if kind == "text" and values.get("per_layer_config"):
        raise ValueError(
            "The text tower has per_layer_config. Only layers of the vision tower can differ. Correct the "
            "configuration."
        )
    if kind == "vision":
        check_layers(values.get("per_layer_config"), values.get("num_hidden_layers", SIZES["num_hidden_layers"][1]))


def _check_grid(values: Mapping[str, Any]) -> None:
    """Refuse patches that make no grid, or one whose positions fill the memory."""
    image, patch = values["image_size"], values["patch_size"]
    positions = 0 if image is None or patch is None else (image // patch) ** 2
    if not 1 <= positions <= MOST_POSITIONS:
        raise ValueError(
            f"The vision tower has image_size={image} and patch_size={patch}. They must make a grid of 1 to "
            f"{MOST_POSITIONS:,} patches. Correct the configuration."
        )


def _comparable(config: Any) -> dict[str, Any]:
    values = dict(config.to_dict(), _name_or_path="")
    # Loading writes the precision of the whole model into its towers' configurations, building does not.
    for tower in ("text_config", "vision_config"):
        if tower in values:
            values[tower] = {key: item for key, item in values[tower].items() if key != "dtype"}
    return values


__all__ = ["SparseCLIPConfig", "SparseCLIPVisionConfig"]
