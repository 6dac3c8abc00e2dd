"""Parts of a tower that its host computes and never reads: dropped, with the same output bit for bit."""

from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from hf_opentrans.models.configuration_sparse_clip import SparseCLIPVisionConfig
from hf_opentrans.models.modeling_dense_clip import DenseCLIPForSegmentation
from hf_opentrans.models.modeling_sparse_clip import SparseCLIPEncoderLayer

from .hosts import HostTower


@dataclass(frozen=True)
class Cut:
    """Blocks that were dropped.

    Args:
        name: Path of the blocks in the host.
        blocks: How many.
        params: Their parameters.
        of_params: Parameters of the tower before.
        reason: Why nothing reads them.
        no_longer: Inputs that would need them; they are refused.
    """

    name: str
    blocks: int
    params: int
    of_params: int
    reason: str
    no_longer: str


def drop_unused(model: PreTrainedModel, prefix: str | None = None) -> tuple[Cut, ...]:
    """Drop the blocks above the deepest one that the host reads, in place; the output stays the same.

    CLIPSeg reads the blocks in `extract_layers`; LLaVA reads `vision_feature_layer`. Other hosts read the last block.
    A segmenter whose mode is reduced does not read the last block's MLP.

    Args:
        model: A host of a CLIP tower, or a `DenseCLIPForSegmentation`.
        prefix: See `HostTower.of`.

    Returns:
        What was dropped; empty where everything is read.
    """
    if isinstance(model, DenseCLIPForSegmentation):
        return _drop_last_mlp(model)
    host = HostTower.of(model, prefix)
    depth, config = len(host.layers), cast("Any", model.config)
    read = deepest_read(model)
    if read is None or read >= depth:
        return ()
    gone = host.layers[read:]
    cut = Cut(
        name=f"{host.prefix}.encoder.layers.{read}" + (f"-{depth - 1}" if depth - read > 1 else ""),
        blocks=depth - read,
        params=sum(parameter.numel() for parameter in gone.parameters()),
        of_params=sum(parameter.numel() for parameter in host.tower.parameters()),
        reason=f"the deepest block that {type(model).__name__} reads is number {read} of {depth}",
        no_longer=_refused(model)[1],
    )
    cast("Any", host.tower).encoder.layers = nn.ModuleList(host.layers[:read])
    if hasattr(config, "vision_feature_layer"):  # counted from the end, which has moved
        layers = config.vision_feature_layer
        moved = [index + depth - read if index < 0 else index for index in _as_list(layers)]
        config.vision_feature_layer = moved if isinstance(layers, (list, tuple)) else moved[0]
    if host.builds_by_type:
        _shorten(host, config, read)
    else:
        host.config.num_hidden_layers = config.vision_config.num_hidden_layers = read
    guard(model)
    return (cut,)


def _drop_last_mlp(model: DenseCLIPForSegmentation) -> tuple[Cut, ...]:
    """Drop the MLP and its LayerNorm of the last block, where the model's own mode is reduced."""
    config, layers = model.config, model.vision_model.encoder.layers
    mode, reduced = model._resolve_mode(None, None)
    last = cast("SparseCLIPEncoderLayer", layers[-1])
    if not reduced or not last.has_mlp:
        return ()
    gone = (last.mlp, last.layer_norm2)
    cut = Cut(
        name=f"vision_model.encoder.layers.{len(layers) - 1}.mlp",
        blocks=0,
        params=sum(parameter.numel() for part in gone for parameter in part.parameters()),
        of_params=sum(parameter.numel() for parameter in model.vision_model.parameters()),
        reason=f"the mode {mode!r} reads the attention of the last block alone",
        no_longer="Modes with the last block's MLP",
    )
    last.has_mlp = False
    del last.mlp, last.layer_norm2
    widths = _widths(config.vision_config)
    skip = sorted({*widths.get(len(layers) - 1, {}).get("skip", ()), "mlp"})
    widths[len(layers) - 1] = {**widths.get(len(layers) - 1, {}), "skip": skip}
    _set_config(model.vision_model, config, per_layer_config=widths)
    config.segmentation_cut = True
    return (cut,)


def _widths(config: Any) -> dict[int, dict[str, Any]]:
    return {int(index): layer for index, layer in (config.to_dict().get("per_layer_config") or {}).items()}


def _set_config(tower: nn.Module, config: Any, **changes: Any) -> None:
    """Replace a sparse tower's configuration in its host and in all of its modules."""
    old = config.vision_config
    values = {**old.to_dict(), **changes}
    del values["model_type"]
    new = SparseCLIPVisionConfig(**values)
    new._attn_implementation = old._attn_implementation
    config.vision_config = new
    for module in tower.modules():
        if isinstance(getattr(module, "config", None), SparseCLIPVisionConfig):
            cast("Any", module).config = new


def _shorten(host: HostTower, config: Any, depth: int) -> None:
    """Give a tower that its type builds the configuration of its first blocks."""
    if isinstance(config.vision_config, SparseCLIPVisionConfig):
        kept = {index: layer for index, layer in _widths(config.vision_config).items() if index < depth}
        _set_config(host.tower, config, num_hidden_layers=depth, per_layer_config=kept or None)
    else:
        config.vision_config.num_hidden_layers = host.config.num_hidden_layers = depth


def deepest_read(model: PreTrainedModel) -> int | None:
    """Return how many blocks a host reads, counted from the first; None where it reads the last one's output."""
    config = cast("Any", model.config)
    if hasattr(model, "extract_layers"):
        return max(config.extract_layers) + 1
    if hasattr(config, "vision_feature_layer"):
        depth = config.vision_config.num_hidden_layers
        return max(depth + 1 + i if i < 0 else i for i in _as_list(config.vision_feature_layer))
    return None


def guard(model: PreTrainedModel) -> None:
    """Refuse the input that would read dropped blocks: it would be answered from others without a word."""
    argument, what = _refused(model)

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get(argument) is not None:
            raise ValueError(
                f"{argument} is given to a {type(module).__name__} whose unused blocks were dropped. {what} would "
                "read them. Transfer again with drop_unused=False."
            )

    model.register_forward_pre_hook(check, with_kwargs=True)


def _refused(model: PreTrainedModel) -> tuple[str, str]:
    if hasattr(model, "extract_layers"):
        return "conditional_pixel_values", "Prompts that are images"
    return "vision_feature_layer", "Another layer for a single call"


def _as_list(value: int | list[int]) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
