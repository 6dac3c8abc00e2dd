"""What all open-vocabulary segmenters share: their output, text turned into embeddings, and dense CLIP features.

The modes differ in the last block alone (X: its input, q, k, v: of layer_norm1(X), O: out_proj, s: the softmax scale):

| mode      | attention                         | published with residual and MLP | source             |
|-----------|-----------------------------------|---------------------------------|--------------------|
| vanilla   | softmax(s q k^T)                  | yes                             | CLIP               |
| maskclip  | identity                          | no                              | arXiv 2112.01071   |
| sclip     | softmax(s q q^T) + softmax(s k k^T) | yes                           | arXiv 2312.01597   |
| clearclip | softmax(s q q^T)                  | no                              | arXiv 2407.12442   |
| naclip    | softmax(s k k^T + G)              | no                              | arXiv 2404.08181   |

This file travels with checkpoints as remote code. The pipeline and the processor travel along: transformers copies the
files that it finds in a text search for relative imports, and this file may not import what stands above it, so the
line is here:

    from .pipeline_open_vocabulary import OpenVocabularySegmentationPipeline
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any, Self, cast

import torch
from torch import nn
from torch.nn.functional import normalize, scaled_dot_product_attention
from transformers import CLIPConfig, CLIPModel
from transformers.utils.generic import ModelOutput

from .configuration_sparse_clip import SEGMENTATION_MODES, SparseCLIPConfig
from .modeling_sparse_clip import SparseCLIPAttention, SparseCLIPEncoderLayer, SparseCLIPModel
from .vocabulary import Vocabulary

REMEMBERED_VOCABULARIES = 8
# What config.json says of the pipeline that lies beside it; `pipeline(task, model=folder)` reads it.
CUSTOM_PIPELINES = {
    "zero-shot-image-segmentation": {
        "impl": "pipeline_open_vocabulary.OpenVocabularySegmentationPipeline",
        "pt": ["AutoModelForSemanticSegmentation"],
        "type": "image",
    }
}
# Keys of a configuration that belong to one saved model, not to the architecture.
PER_FILE_KEYS = (
    "model_type",
    "architectures",
    "auto_map",
    "custom_pipelines",
    "transformers_version",
    "_name_or_path",
)
# What says which files of a repository are meant.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
_FINGERPRINT_VALUES = 64  # of every weight
NEIGHBOUR_SIGMA = 5.0  # patches; NACLIP's published width of the Gaussian
# Which of queries, keys and values of the last block a mode reads.
READS = {"vanilla": "qkv", "maskclip": "v", "sclip": "qkv", "clearclip": "qv", "naclip": "kv"}
_PUBLISHED_REDUCED = {"vanilla": False, "maskclip": True, "sclip": False, "clearclip": True, "naclip": True}


@dataclass
class OpenVocabularySegmenterOutput(ModelOutput):
    """What an open-vocabulary segmenter returns.

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
            Of a trained segmenter, where labels were given.
        logits (`torch.FloatTensor` of shape `(batch_size, queries, grid_height, grid_width)`, *optional*):
            Cosine of every position with every text embedding, times a scale.
        dense_embeds (`torch.FloatTensor` of shape `(batch_size, dim, grid_height, grid_width)`):
            Positions in the space shared with text, unit length (averaged over windows in "slide").
        vocabulary (`Vocabulary`, *optional*):
            The vocabulary that the queries belong to.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    dense_embeds: torch.Tensor | None = None
    vocabulary: Vocabulary | None = None


class OpenVocabularyModel(SparseCLIPModel):
    """A CLIP that segments: it turns a vocabulary into text embeddings, and images into dense ones."""

    main_input_name = "pixel_values"

    # The names that the folder or repository asks for where the user names none; saved with the model.
    default_vocabulary: Vocabulary | None = None
    # The revision that the weights were asked for: what belongs to them is read from the same one.
    loaded_revision: str | None = None

    def _set_trainable(self) -> None:
        """Freeze what this class never trains; heads call it when they are built."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as [`PreTrainedModel.from_pretrained`] does; the same parameters train as of a new model.

        The vocabulary that lies beside the weights (see `Vocabulary.save_pretrained`) becomes `default_vocabulary`.

        Raises:
            ValueError: If a tensor is missing or has the wrong shape, or the vocabulary is damaged.
        """
        if type(kwargs.get("config")) is CLIPConfig:  # AutoModelForSemanticSegmentation read a stock CLIP
            kwargs["config"] = cls.config_class(**_without(kwargs["config"].to_dict(), PER_FILE_KEYS))  # pyright: ignore[reportOptionalCall]
        source = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._set_trainable()
        model.config.__dict__.pop("custom_pipelines", None)  # of the folder, not of the model
        model.loaded_revision = kwargs.get("revision")
        if pretrained_model_name_or_path is not None:
            model.default_vocabulary = Vocabulary.find(pretrained_model_name_or_path, **source)
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as [`SparseCLIPModel.save_pretrained`] does, with the pipeline and, if there is one, the vocabulary.

        With the processor saved into the same folder `pipeline("zero-shot-image-segmentation", model=folder)` works:
        with `trust_remote_code=True` where this package is missing, as it is where it is installed.
        """
        values = self.config.__dict__
        values["custom_pipelines"] = {task: dict(entry) for task, entry in CUSTOM_PIPELINES.items()}
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            values.pop("custom_pipelines")
        if self.default_vocabulary is not None and kwargs.get("is_main_process", True):
            self.default_vocabulary.save_pretrained(save_directory)

    @classmethod
    def from_clip(cls, clip: CLIPModel, **options: Any) -> Self:
        """Put this class's head, with new weights, on a CLIP.

        Args:
            clip: A `CLIPModel`, a [`SparseCLIPModel`], dense or pruned, or a segmenter made of one; not changed.
            **options: Fields of the class's configuration: `decoder_channels`, `segmentation_mode`, ...

        Raises:
            ValueError: If the weights do not fit.
        """
        values, foreign = clip.config.to_dict(), set(PER_FILE_KEYS)
        if type(clip.config) is not cls.config_class:  # another head may have options of the same name
            own, shared = (
                {item.name for item in fields(cast("Any", kind))} for kind in (type(clip.config), SparseCLIPConfig)
            )
            foreign |= own - shared
        config = cast("Any", cls.config_class)(**{**_without(values, foreign), **options})
        model = cls(config).to(device=clip.device, dtype=clip.dtype)  # pyright: ignore[reportCallIssue]
        tower = {name: value for name, value in clip.state_dict().items() if not name.startswith("head.")}
        missing, unexpected = model.load_state_dict(tower, strict=False)
        lost = [name for name in missing if not name.startswith("head.")]
        if lost or unexpected:
            raise ValueError(
                f"The {type(clip).__name__} does not fit: {len(lost)} weights are missing ({lost[:2]}), "
                f"{len(unexpected)} are foreign ({unexpected[:2]}). Give a SparseCLIPModel."
            )
        model.config.name_or_path = clip.config.name_or_path
        return model

    def encode_vocabulary(self, vocabulary: Vocabulary, tokenizer: Any) -> Vocabulary:
        """Return `vocabulary` with the text embeddings of this model.

        The eight vocabularies that were used last are remembered, by their names, aliases and templates and by the
        model's device and precision. In training mode nothing is remembered, and going into training mode forgets all
        (the text tower may change). Weights that are changed in evaluation mode are not noticed: call
        `model.train().eval()` after such a change. Embeddings that were saved with a vocabulary are taken over if this
        model's text tower made them, and are made anew otherwise.

        Args:
            vocabulary: The names.
            tokenizer: CLIP's tokenizer.
        """
        if self.training:
            return self._encode(vocabulary, tokenizer)
        cache: dict[tuple[str, ...], Vocabulary] = self.__dict__.setdefault("_vocabularies", {})
        key = (vocabulary.fingerprint, str(self.device), str(self.dtype))
        encoded = cache.pop(key, None)
        if encoded is None:
            has_any = vocabulary.text_embeddings is not None and vocabulary.encoder is not None
            is_own = has_any and vocabulary.encoder == self.text_fingerprint()
            encoded = vocabulary if is_own else self._encode(vocabulary, tokenizer)
        cache[key] = encoded  # the last of the dictionary was used last
        while len(cache) > REMEMBERED_VOCABULARIES:
            cache.pop(next(iter(cache)))
        return encoded

    def train(self, mode: bool = True) -> Self:
        """Set the mode as `nn.Module.train` does; training forgets the vocabularies that were encoded before."""
        if mode:
            self.__dict__.pop("_vocabularies", None)
        return super().train(mode)

    def text_fingerprint(self) -> str:
        """SHA-256 over the precision and values of all weights of the text tower: tells whose embeddings are whose."""
        digest = hashlib.sha256(str(self.dtype).encode())
        parts = {"text_model": self.text_model, "text_projection": self.text_projection}
        for part, module in parts.items():
            for name, weight in module.named_parameters():
                values = weight.detach().flatten()
                chosen = values[:: max(1, values.numel() // _FINGERPRINT_VALUES)][:_FINGERPRINT_VALUES]
                digest.update(f"{part}.{name} {tuple(weight.shape)}".encode())
                digest.update(chosen.float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _encode(self, vocabulary: Vocabulary, tokenizer: Any) -> Vocabulary:
        # Outside of inference mode: what is remembered may meet gradients later.
        with torch.inference_mode(False):
            encoded = vocabulary.encode(lambda texts: self._embed_texts(texts, tokenizer))
            return replace(encoded, encoder=self.text_fingerprint())

    @torch.no_grad()
    def _embed_texts(self, texts: list[str], tokenizer: Any) -> torch.Tensor:
        limit = self.text_model.config.max_position_embeddings
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(self.device)
        return cast("Any", self.get_text_features(**inputs)).pooler_output

    def get_dense_features(
        self, pixel_values: torch.Tensor, mode: str | None = None, reduced: bool | None = None
    ) -> torch.Tensor:
        """Return unit patch tokens in the space shared with text, `(batch_size, dim, grid_height, grid_width)`."""
        mode, reduced = self._resolve_mode(mode, reduced)
        grid = self._grid(pixel_values)
        hidden, _ = self._run_blocks(pixel_values)
        hidden = self._last_block(hidden, grid, mode, reduced)
        return self._to_embeds(self.vision_model.post_layernorm(hidden[:, 1:]), grid)

    def _run_blocks(
        self, pixel_values: torch.Tensor, taps: Collection[int] = ()
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Run all blocks but the last, which every framework runs in its own way.

        Returns the input of the last block, `(batch_size, 1 + patches, hidden_size)`, and the outputs of the blocks
        in `taps`, counted from 1.
        """
        vision = self.vision_model
        hidden = vision.pre_layrnorm(vision.embeddings(pixel_values, interpolate_pos_encoding=True))
        found: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(self._layers[:-1], 1):
            hidden = layer(hidden, None)
            if index in taps:
                found[index] = hidden
        return hidden, found

    def _to_embeds(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Project patch tokens after the last LayerNorm; return unit vectors on the patch grid."""
        return normalize(self.visual_projection(tokens), dim=-1).transpose(1, 2).unflatten(2, grid)

    @property
    def _layers(self) -> list[SparseCLIPEncoderLayer]:
        return cast("list[SparseCLIPEncoderLayer]", self.vision_model.encoder.layers)

    def _resolve_mode(self, mode: str | None, reduced: bool | None) -> tuple[str, bool]:
        mode = self.config.segmentation_mode if mode is None else mode
        if reduced is None and mode == self.config.segmentation_mode:
            reduced = self.config.segmentation_reduced
        if mode not in SEGMENTATION_MODES:
            raise ValueError(f"mode is {mode!r}. It must be one of {', '.join(SEGMENTATION_MODES)}.")
        reduced = _PUBLISHED_REDUCED[mode] if reduced is None else reduced
        if self.config.segmentation_cut and not reduced:
            raise ValueError(
                f"mode is {mode!r} with the last block's MLP, which was dropped from this model because "
                f"{self.config.segmentation_mode!r} does not read it. Use a reduced mode, or the uncut model."
            )
        return mode, reduced

    def _last_block(self, hidden: torch.Tensor, grid: tuple[int, int], mode: str, reduced: bool) -> torch.Tensor:
        layer = self._layers[-1]
        if mode == "vanilla" and not reduced:
            return layer(hidden, None)
        if not layer.has_attention or layer.self_attn.num_heads == 0:
            raise ValueError(
                f"The last block has no attention heads. The mode {mode!r} reads them. Use mode='vanilla', or prune "
                "with protect_last_attention=True."
            )
        attended = _attend(layer.self_attn, layer.layer_norm1(hidden), grid, mode)
        if reduced:
            return attended
        hidden = hidden + attended
        return hidden + layer.mlp(layer.layer_norm2(hidden)) if layer.has_mlp else hidden

    @property
    def _patch_size(self) -> int:
        return cast("int", self.vision_model.config.patch_size)

    def _grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        patch = self._patch_size
        height, width = pixel_values.shape[-2:]
        if height % patch or width % patch or not height or not width:
            raise ValueError(
                f"The image is {height} x {width} pixels. Both sides must be multiples of the patch size {patch}. "
                "Resize it, for example with OpenVocabularyProcessor."
            )
        return height // patch, width // patch


def _attend(attention: SparseCLIPAttention, hidden: torch.Tensor, grid: tuple[int, int], mode: str) -> torch.Tensor:
    """Apply the block's own projections with the attention of `mode`; returns `(batch_size, tokens, hidden_size)`."""
    # What a mode does not read is not computed.
    *compared, v = attention.project(hidden, READS[mode])
    scale = attention.scale
    if mode == "maskclip":
        output = v
    elif mode == "vanilla":
        q, k = compared
        output = scaled_dot_product_attention(q, k, v, scale=scale)
    elif mode == "naclip":
        (k,) = compared
        bias = neighbour_bias(grid, device=v.device, dtype=v.dtype)
        output = scaled_dot_product_attention(k, k, v, attn_mask=bias, scale=scale)
    else:  # clearclip: queries with queries; sclip: and keys with keys
        output = cast("torch.Tensor", sum(scaled_dot_product_attention(x, x, v, scale=scale) for x in compared))
    return attention.merge_heads(output.transpose(1, 2))


def neighbour_bias(
    grid: tuple[int, int], device: torch.device | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """NACLIP's additive attention bias of shape `(1 + patches, 1 + patches)`: a Gaussian over patch distance.

    `exp(-|p_i - p_j|^2 / (2 sigma^2))` with sigma = 5 patches; zero in the row and column of the class token.
    """
    rows, columns = (torch.arange(size, device=device, dtype=torch.float32) for size in grid)
    points = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
    squared = (points[:, None] - points[None]).square().sum(-1)
    bias = torch.exp(-squared / (2 * NEIGHBOUR_SIGMA**2))
    return nn.functional.pad(bias, (1, 0, 1, 0)).to(dtype)


def _without(values: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def text_embeddings_of(vocabulary: Vocabulary | None, text_embeddings: torch.Tensor | None) -> torch.Tensor | None:
    """Return the embeddings of an encoded vocabulary, or those given instead of one.

    Raises:
        ValueError: If the vocabulary is not encoded.
    """
    if vocabulary is None:
        return text_embeddings
    if vocabulary.text_embeddings is None:
        raise ValueError(
            "The vocabulary has no text embeddings. It must be encoded by this model first. "
            "Call model.encode_vocabulary(vocabulary, tokenizer)."
        )
    return vocabulary.text_embeddings


def check_labels(logits: torch.Tensor | None, labels: torch.Tensor, ignore_index: int) -> tuple[torch.Tensor, int]:
    """Return the logits, and how many pixels count.

    Args:
        logits: Of shape `(batch_size, queries, height, width)`.
        labels: Index of the query of every pixel, `(batch_size, label_height, label_width)`.
        ignore_index: Label of pixels that do not count.

    Raises:
        ValueError: If there are no logits, a label is outside of the queries, or the shapes do not belong together.
    """
    if logits is None:
        raise ValueError("There are labels and no text. The loss compares pixels with names. Pass text_embeddings.")
    counted = labels[labels != ignore_index]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < logits.shape[1]:
        raise ValueError(
            f"Labels reach from {int(counted.min())} to {int(counted.max())}. They must lie in [0, "
            f"{logits.shape[1] - 1}], one for each name, or be ignore_index={ignore_index}. Correct the masks or the "
            "vocabulary."
        )
    if labels.ndim != 3 or len(labels) != len(logits):
        raise ValueError(
            f"labels have the shape {tuple(labels.shape)}. They must be (batch_size, height, width) with batch_size "
            f"{len(logits)}. Correct them."
        )
    return logits, counted.numel()


__all__ = ["OpenVocabularyModel", "OpenVocabularySegmenterOutput"]
