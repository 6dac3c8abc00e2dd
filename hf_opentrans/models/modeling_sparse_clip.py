"""CLIP whose vision layers may differ in width: the model that a pruned tower becomes.

This file travels with checkpoints as remote code: it imports nothing but torch, transformers and siblings.
Reading order: attention, MLP, layer, encoder, vision model, vision model with projection, two-tower model.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionModel, CLIPVisionModelWithProjection
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.clip.modeling_clip import (
    CLIPMLP,
    CLIPAttention,
    CLIPEncoder,
    CLIPEncoderLayer,
    CLIPVisionEmbeddings,
    eager_attention_forward,
)

from .configuration_sparse_clip import SparseCLIPConfig, SparseCLIPVisionConfig


def _linear(in_features: int, out_features: int) -> nn.Linear:
    """`nn.Linear` that may be empty: a layer without heads or neurons is what the configuration asks for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors is a no-op")
        return nn.Linear(in_features, out_features)


def _register_mask(module: nn.Module, name: str, width: int, masked: Iterable[int] | None) -> None:
    """Add a 0/1 buffer, or None where nothing is masked. Not saved: the configuration holds the indices."""
    mask = None if not masked else _mask_values(width, masked)
    module.register_buffer(name, mask, persistent=False)


def _mask_values(width: int, masked: Iterable[int]) -> torch.Tensor:
    mask = torch.ones(width)
    mask[list(masked)] = 0.0
    return mask


class SparseCLIPAttention(CLIPAttention):
    """CLIP's attention with any number of heads, and with query-key and value widths of their own."""

    head_mask: torch.Tensor | None

    def __init__(self, config: SparseCLIPVisionConfig, layer_config: SparseCLIPVisionConfig) -> None:
        nn.Module.__init__(self)
        self.config = config  # the GLOBAL config: set_attn_implementation() writes there
        self.embed_dim = config.hidden_size
        self.num_heads = layer_config.num_attention_heads
        self.qk_head_dim = cast("int", layer_config.qk_head_dim)
        self.v_head_dim = cast("int", layer_config.v_head_dim)
        self.head_dim = self.v_head_dim
        # Of the dense model: pruning must not change the softmax temperature.
        self.scale = cast("int", config.head_dim) ** -0.5
        self.dropout = config.attention_dropout
        self.is_causal = False
        self.k_proj = _linear(self.embed_dim, self.num_heads * self.qk_head_dim)
        self.v_proj = _linear(self.embed_dim, self.num_heads * self.v_head_dim)
        self.q_proj = _linear(self.embed_dim, self.num_heads * self.qk_head_dim)
        self.out_proj = _linear(self.num_heads * self.v_head_dim, self.embed_dim)
        self.masked_heads = layer_config.masked_heads
        _register_mask(self, "head_mask", self.num_heads, self.masked_heads)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map hidden states of shape `(batch_size, tokens, hidden_size)` to the same shape, and attention weights."""
        if self.num_heads == 0:  # explicit: ONNX Runtime refuses the Reshape of a zero-size tensor
            weights = None
            if self.config._attn_implementation == "eager":  # for no head, that attentions stay one per layer
                weights = hidden_states.new_zeros(len(hidden_states), 0, *[hidden_states.shape[1]] * 2)
            return self.out_proj.bias.expand_as(hidden_states), weights
        queries, keys, values = self.project(hidden_states)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            cast("str", self.config._attn_implementation), eager_attention_forward
        )
        if self.qk_head_dim != self.v_head_dim:
            queries, keys, values = self.pad_heads(queries, keys, values)
        output, weights = attention(
            self,
            queries,
            keys,
            values,
            attention_mask,
            scaling=self.scale,
            dropout=self.dropout if self.training else 0.0,
            **kwargs,
        )
        return self.merge_heads(output[..., : self.v_head_dim]), weights

    @staticmethod
    def pad_heads(*parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Fill queries, keys and values with zeros to one width: fused kernels take nothing else.

        Products with zeros change nothing; the fused kernel saves several times what the padding costs.
        """
        width = max(part.shape[-1] for part in parts)
        return tuple(nn.functional.pad(part, (0, width - part.shape[-1])) for part in parts)

    def project(self, hidden_states: torch.Tensor, parts: str = "qkv") -> tuple[torch.Tensor, ...]:
        """Return queries, keys and values, each of shape `(batch_size, heads, tokens, head width)`.

        `parts` names the wanted ones, in their order: "kv" computes keys and values alone.
        """
        shape = (*hidden_states.shape[:-1], self.num_heads, -1)
        projections = {"q": self.q_proj, "k": self.k_proj, "v": self.v_proj}
        return tuple(projections[part](hidden_states).view(shape).transpose(1, 2) for part in parts)

    def merge_heads(self, output: torch.Tensor) -> torch.Tensor:
        """Mask, concatenate and project head outputs of shape `(batch_size, tokens, heads, v_head_dim)`."""
        if self.head_mask is not None:
            output = output * self.head_mask[:, None].to(output.dtype)
        return self.out_proj(output.flatten(-2).contiguous())


class SparseCLIPMLP(CLIPMLP):
    """CLIP's MLP with a width of its own and an optional mask on the activations."""

    neuron_mask: torch.Tensor | None

    def __init__(self, config: SparseCLIPVisionConfig, layer_config: SparseCLIPVisionConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = _linear(config.hidden_size, layer_config.intermediate_size)
        self.fc2 = _linear(layer_config.intermediate_size, config.hidden_size)
        self.masked_neurons = layer_config.masked_neurons
        _register_mask(self, "neuron_mask", layer_config.intermediate_size, self.masked_neurons)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map hidden states of shape `(batch_size, tokens, hidden_size)` to the same shape."""
        hidden_states = self.activation_fn(self.fc1(hidden_states))
        if self.neuron_mask is not None:
            hidden_states = hidden_states * self.neuron_mask.to(hidden_states.dtype)
        return self.fc2(hidden_states)


class SparseCLIPEncoderLayer(CLIPEncoderLayer):
    """CLIP's pre-norm block; `skip` in the layer's configuration leaves a sublayer out altogether."""

    self_attn: SparseCLIPAttention
    mlp: SparseCLIPMLP

    def __init__(self, config: SparseCLIPVisionConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)
        layer_config = cast("SparseCLIPVisionConfig", config.per_layer_config[layer_idx])
        skip = getattr(layer_config, "skip", ())
        self.embed_dim, self.layer_idx = config.hidden_size, layer_idx
        self.has_attention, self.has_mlp = "attention" not in skip, "mlp" not in skip
        if self.has_attention:
            self.self_attn = SparseCLIPAttention(config, layer_config)
            self.layer_norm1 = nn.LayerNorm(self.embed_dim, eps=config.layer_norm_eps)
        if self.has_mlp:
            self.mlp = SparseCLIPMLP(config, layer_config)
            self.layer_norm2 = nn.LayerNorm(self.embed_dim, eps=config.layer_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Map hidden states of shape `(batch_size, tokens, hidden_size)` to the same shape."""
        if self.has_attention:
            attention, _ = self.self_attn(self.layer_norm1(hidden_states), attention_mask, **kwargs)
            hidden_states = hidden_states + attention
        if self.has_mlp:
            hidden_states = hidden_states + self.mlp(self.layer_norm2(hidden_states))
        return hidden_states


class SparseCLIPEncoder(CLIPEncoder):
    """The stack of blocks."""

    def __init__(self, config: SparseCLIPVisionConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.layers = nn.ModuleList(SparseCLIPEncoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.gradient_checkpointing = False


_Base = PreTrainedModel if TYPE_CHECKING else object


class SparseCLIPLoadingMixin(_Base):
    """Loading that never hands out random weights, and saving under this model's own key names."""

    # Commit, tag or branch of the Hub that the weights were asked for, where it is known.
    loaded_revision: str | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as [`PreTrainedModel.from_pretrained`] does, but raise where a weight is missing.

        Accepts folders and Hub ids of stock CLIP models too; text weights are left out where the class has no text
        tower. With `output_loading_info=True` missing keys are returned instead, for the caller to judge.

        Raises:
            ValueError: If the checkpoint lacks a tensor, or a tensor has another shape than the configuration says.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)  # a pickle is a program
        try:
            model, info = super().from_pretrained(  # pyright: ignore[reportGeneralTypeIssues] - a pair with output_loading_info
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except RuntimeError as err:
            if "size mismatch" not in str(err) and "mismatched" not in str(err):
                raise
            raise ValueError(
                f"The weights in {str(pretrained_model_name_or_path)!r} do not have the shapes that its config.json "
                "states. Both must come from the same model. Save the model again with `save_pretrained`."
            ) from err
        missing = sorted(info["missing_keys"])
        if missing and not wants_info:
            raise ValueError(
                f"The checkpoint {str(pretrained_model_name_or_path)!r} lacks {len(missing)} of the weights that "
                f"{cls.__name__} needs, among them {', '.join(missing[:3])}. Missing weights would be random numbers, "
                "so nothing was loaded. Give a complete CLIP checkpoint of this architecture."
            )
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as [`PreTrainedModel.save_pretrained`] does, by default under this class's own key names.

        The stock default writes the key names of the file that the model was loaded from; a reader without this
        package would then find none of them.
        """
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)

    def _move_missing_keys_from_meta_to_device(self, missing_keys: Any, *args: Any, **kwargs: Any) -> None:
        # Before transformers makes up values for what the files lack: an absurd width would fill the memory.
        state = self.state_dict()
        lacking = sum(state[name].numel() for name in missing_keys if name in state)
        held = sum(tensor.numel() for tensor in state.values() if not tensor.is_meta)
        if lacking > held + MOST_MADE_UP:
            raise ValueError(
                f"The configuration asks for {lacking:,} parameters that the weight files lack, and they hold "
                f"{held:,}. Both must come from the same model. Save the model again with `save_pretrained`."
            )
        super()._move_missing_keys_from_meta_to_device(missing_keys, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Masks are not in the checkpoint; a model that was built on the meta device gets their values here.
        if isinstance(module, SparseCLIPAttention) and module.head_mask is not None:
            init.copy_(module.head_mask, _mask_values(module.num_heads, module.masked_heads or ()))
        elif isinstance(module, SparseCLIPMLP) and module.neuron_mask is not None:
            init.copy_(module.neuron_mask, _mask_values(module.fc1.out_features, module.masked_neurons or ()))


# Parameters that transformers may make up beside those in the files: more are an absurd configuration.
MOST_MADE_UP = 2**24
_RECORDED = {"hidden_states": SparseCLIPEncoderLayer, "attentions": SparseCLIPAttention}
_UNSPLIT = ["CLIPVisionEmbeddings", "SparseCLIPEncoderLayer"]


class SparseCLIPVisionModel(SparseCLIPLoadingMixin, CLIPVisionModel):
    """The vision tower: a [`CLIPVisionModel`] whose layers may differ in width."""

    config: SparseCLIPVisionConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = SparseCLIPVisionConfig
    _no_split_modules = _UNSPLIT
    _can_record_outputs = _RECORDED
    _keys_to_ignore_on_load_unexpected = [
        r"^(clip\.)?(text_model|text_projection|visual_projection|logit_scale)",
        r"position_ids",
    ]

    def __init__(self, config: SparseCLIPVisionConfig) -> None:
        PreTrainedModel.__init__(self, config)  # not CLIPVisionModel's constructor: its layers are all alike
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # upstream's spelling
        self.encoder = SparseCLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()


class SparseCLIPVisionModelWithProjection(SparseCLIPLoadingMixin, CLIPVisionModelWithProjection):
    """The vision tower with CLIP's projection into the space that it shares with text."""

    config: SparseCLIPVisionConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = SparseCLIPVisionConfig
    _no_split_modules = _UNSPLIT
    _can_record_outputs = _RECORDED
    _keys_to_ignore_on_load_unexpected = [r"^(text_model|text_projection|logit_scale)", r"position_ids"]

    def __init__(self, config: SparseCLIPVisionConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.vision_model = SparseCLIPVisionModel._from_config(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.post_init()


class SparseCLIPModel(SparseCLIPLoadingMixin, CLIPModel):
    """CLIP with a dense text tower and a vision tower whose layers may differ in width."""

    config: SparseCLIPConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    vision_model: SparseCLIPVisionModel
    config_class = SparseCLIPConfig
    _no_split_modules = ["CLIPTextEmbeddings", "CLIPEncoderLayer", *_UNSPLIT]
    _keys_to_ignore_on_load_unexpected = [r"position_ids"]

    def __init__(self, config: SparseCLIPConfig) -> None:
        PreTrainedModel.__init__(self, config)
        text_config = cast("CLIPTextConfig", config.text_config)
        vision_config = cast("SparseCLIPVisionConfig", config.vision_config)
        self.projection_dim = cast("int", config.projection_dim)
        self.text_embed_dim, self.vision_embed_dim = text_config.hidden_size, vision_config.hidden_size
        self.text_model = CLIPTextModel._from_config(text_config)
        self.vision_model = SparseCLIPVisionModel._from_config(vision_config)
        self.visual_projection = nn.Linear(self.vision_embed_dim, self.projection_dim, bias=False)
        self.text_projection = nn.Linear(self.text_embed_dim, self.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.post_init()


# In this file, so that a remote copy has it too: without it a checkpoint with `vision_model.*` keys loads nothing.
register_checkpoint_conversion_mapping(
    "SparseCLIPVisionModel", [PrefixChange(prefix_to_remove="vision_model")], overwrite=True
)

__all__ = ["SparseCLIPModel", "SparseCLIPVisionModel", "SparseCLIPVisionModelWithProjection"]
