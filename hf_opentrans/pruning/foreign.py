"""A pruner from elsewhere in the same harness: torch-pruning chooses on a copy, and its choice becomes a plan."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from hf_opentrans._optional import require

from .allocation import TOLERANCE, Budget
from .macs import LayerWidths, layer_widths
from .plan import LayerPlan, PruningConfig, PruningPlan
from .sizes import neuron_step, rounded_widths
from .tower import Tower


def torch_pruning_plan(tower: Tower, budget: Budget, config: PruningConfig) -> PruningPlan:
    """Let torch-pruning choose whole heads and MLP neurons by its group magnitude, the same ratio everywhere.

    It prunes a stock `CLIPVisionModel` with the tower's weights, in float32 on the CPU; which heads and neurons it
    kept is read off the weights that are left. Every layer keeps the same number of heads (all of them in the last
    block where `config.protect_last_attention` asks for it) and of neurons. Of the pairs of numbers that fill the
    budget, the one with the most equal shares of heads and of neurons is taken.

    Args:
        tower: A dense tower. Not changed.
        budget: What may stay.
        config: Read for `min_heads`, `min_neurons`, `round_neurons` and `protect_last_attention`.

    Returns:
        What every layer keeps; its cost lies in [keep - 0.02, keep] of the dense one.

    Raises:
        ImportError: If torch-pruning is not installed.
        ValueError: If the tower is not dense, or no numbers of heads and neurons meet the budget.
        RuntimeError: If torch-pruning kept anything else than the whole heads and neurons that it was asked for.
    """
    require("bench", "torch_pruning")
    dense = _dense_widths(tower)
    sizes = _choose_sizes(dense, len(tower.layers), budget, config)
    heads = [sizes.heads] * len(tower.layers)
    if config.protect_last_attention:
        heads[-1] = dense.heads
    if set(heads) == {dense.heads} and sizes.neurons == dense.neurons:
        return PruningPlan.keep_all(heads, [dense.neurons] * len(heads))
    # Tracing needs gradients, whatever mode the caller is in.
    with torch.inference_mode(mode=False), torch.enable_grad():
        original, pruned = _stock_copy(tower, dense), _stock_copy(tower, dense)
        _prune(pruned, dense, sizes, config)
    layers = []
    blocks = zip(_blocks(original), _blocks(pruned), heads, strict=True)
    for index, (before, after, asked) in enumerate(blocks):
        layer = LayerPlan(
            _kept(_head_tensors(before), _head_tensors(after), dense.v_head_dim, f"layer {index}, heads"),
            _kept(_neuron_tensors(before), _neuron_tensors(after), 1, f"layer {index}, neurons"),
        )
        if (len(layer.heads), len(layer.neurons)) != (asked, sizes.neurons):
            raise RuntimeError(
                f"torch-pruning kept {len(layer.heads)} heads and {len(layer.neurons)} neurons in layer {index}. It "
                f"was asked for {asked} and {sizes.neurons}. Install the version that constraints.txt names."
            )
        layers.append(layer)
    return PruningPlan(tuple(layers))


@dataclass(frozen=True)
class _Sizes:
    """Heads and neurons that every layer keeps."""

    heads: int
    neurons: int


def _dense_widths(tower: Tower) -> LayerWidths:
    """Return the widths that all layers share, or raise ValueError: stock CLIP expresses no others."""
    config = tower.vision.config
    widths = set(layer_widths(config))
    first = next(iter(widths))
    masks = ("masked_heads", "masked_neurons")
    is_masked = any(getattr(module, name, None) for module in tower.vision.modules() for name in masks)
    is_stock = first.qk_head_dim == first.v_head_dim and first.heads * first.v_head_dim == config.hidden_size
    is_whole = first.has_attention and first.has_mlp and first.neurons > 0
    if len(widths) != 1 or is_masked or not is_stock or not is_whole:
        raise ValueError(
            f"The tower has {len(widths)} different layer widths{' and masks' * is_masked}, for example {first}. "
            "torch-pruning works on a stock CLIPVisionModel, whose layers all have the same heads and neurons and "
            f"whose heads fill the hidden size of {config.hidden_size}. Give the dense model."
        )
    return first


def _choose_sizes(dense: LayerWidths, layers: int, budget: Budget, config: PruningConfig) -> _Sizes:
    """Return the numbers of heads and neurons, the same in all layers, that fill the budget most evenly."""
    budget.check()
    protected = int(config.protect_last_attention)
    step = neuron_step(dense.neurons, config.round_neurons)
    fewest = max(1, math.ceil(dense.neurons * config.min_neurons))
    widths = rounded_widths(dense.neurons, fewest, step)
    mlps = [layers * budget.cost.mlp(width) for width in widths]
    whole = budget.cost.attention(dense.heads, dense.qk_head_dim, dense.v_head_dim)
    found: list[tuple[float, float, _Sizes]] = []
    below: list[float] = []
    for heads in range(dense.heads, max(1, min(config.min_heads, dense.heads)) - 1, -1):
        attention = (layers - protected) * budget.cost.attention(heads, dense.qk_head_dim, dense.v_head_dim)
        rest = budget.cost.fixed() + protected * whole + attention
        shares = [(rest + mlp) / budget.dense for mlp in mlps]
        fitting = [pair for pair in zip(shares, widths, strict=True) if pair[0] <= budget.keep + 1e-9]
        if not fitting:
            continue
        share, neurons = fitting[0]
        below.append(share)
        if share >= budget.keep - TOLERANCE:
            unevenness = abs(heads / dense.heads - neurons / dense.neurons)
            found.append((unevenness, -share, _Sizes(heads, neurons)))
    if not found:
        nearest = f"the nearest choice keeps {max(below):.3f}" if below else "every choice keeps more"
        raise ValueError(
            f"keep={budget.keep:g} of the {budget.unit} cannot be met within {TOLERANCE:g} by torch-pruning: "
            f"{nearest}. It keeps the same number of heads, one at least, and of neurons in every layer. Choose "
            "another keep, a lower floor, or a smaller round_neurons."
        )
    return min(found, key=lambda item: item[:2])[2]


def _stock_copy(tower: Tower, dense: LayerWidths) -> CLIPVisionModel:
    """Return a stock model with the tower's weights, float32 on the CPU; it shares none of them."""
    config = tower.vision.config
    stock = CLIPVisionConfig(
        hidden_size=config.hidden_size,
        intermediate_size=dense.neurons,
        num_hidden_layers=len(tower.layers),
        num_attention_heads=dense.heads,
        num_channels=config.num_channels,
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
    )
    with torch.random.fork_rng(devices=[]):  # building a model draws weights that nobody uses
        model = CLIPVisionModel(stock).eval().float()
    model.load_state_dict(tower.vision.state_dict(), strict=True)
    return model


def _prune(model: CLIPVisionModel, dense: LayerWidths, sizes: _Sizes, config: PruningConfig) -> None:
    """Prune `model` in place with torch-pruning.

    Its defaults keep some channels of every head and shrink the residual stream; stock CLIP then mixes channels of
    different heads without an error. Hence whole heads only, and the layers that write into the stream are ignored.
    """
    import torch_pruning

    blocks = _blocks(model)
    ignored: list[nn.Module] = [model.embeddings.patch_embedding]
    num_heads: dict[nn.Module, int] = {}
    for index, block in enumerate(blocks):
        attention = block.self_attn
        ignored += [attention.out_proj, block.mlp.fc2]
        if config.protect_last_attention and index == len(blocks) - 1:
            ignored.append(attention)
        if sizes.neurons == dense.neurons:
            ignored.append(block.mlp.fc1)
        num_heads |= dict.fromkeys((attention.q_proj, attention.k_proj, attention.v_proj), dense.heads)
    # Half a unit less than must go: it rounds the heads that go up and the neurons that stay down.
    # The neurons' ratio is never zero, for then torch-pruning 1.6.1 skips the heads too.
    gone_heads, gone_neurons = dense.heads - sizes.heads, max(dense.neurons - sizes.neurons, 1)
    side = model.config.image_size
    pruner = torch_pruning.BasePruner(
        model,
        torch.zeros(1, model.config.num_channels, side, side),  # pyright: ignore[reportArgumentType]
        torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=(gone_neurons - 0.5) / dense.neurons,
        head_pruning_ratio=max(gone_heads - 0.5, 0.0) / dense.heads,
        num_heads=num_heads,
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=ignored,
        # A list of pairs, though torch-pruning's documentation says dictionary.
        unwrapped_parameters=[(model.embeddings.class_embedding, 0)],  # pyright: ignore[reportArgumentType]
        # Its defaults are dictionaries that all pruners share, and that would keep every model alive.
        in_channel_groups={},
        out_channel_groups={},
    )
    pruner.step()


def _blocks(model: CLIPVisionModel) -> list[CLIPEncoderLayer]:
    return cast("list[CLIPEncoderLayer]", list(model.encoder.layers))


def _head_tensors(block: CLIPEncoderLayer) -> list[torch.Tensor]:
    """Return all weights of the heads of a block, channels first."""
    attention = block.self_attn
    return [*_rows(attention.q_proj, attention.k_proj, attention.v_proj), attention.out_proj.weight.T]


def _neuron_tensors(block: CLIPEncoderLayer) -> list[torch.Tensor]:
    """Return all weights of the neurons of a block, neurons first."""
    return [*_rows(block.mlp.fc1), block.mlp.fc2.weight.T]


def _rows(*linears: nn.Linear) -> list[torch.Tensor]:
    return [tensor for linear in linears for tensor in (linear.weight, linear.bias[:, None])]


def _kept(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor], size: int, where: str) -> tuple[int, ...]:
    """Find the units that stayed, `size` channels each, by equality of all their weights, bit for bit.

    Units that are equal in every weight can stand in for each other: the first ones count as kept.
    """
    places: dict[bytes, list[int]] = {}
    for index, key in enumerate(_keys(before, size, where)):
        places.setdefault(key, []).append(index)
    kept = []
    for key in _keys(after, size, where):
        if not places.get(key):
            raise _cut_across(where, "some of the weights that stayed belong to no single unit of the dense model")
        kept.append(places[key].pop(0))
    return tuple(sorted(kept))


def _keys(tensors: Sequence[torch.Tensor], size: int, where: str) -> list[bytes]:
    channels = {len(tensor) for tensor in tensors}
    if len(channels) != 1 or channels.pop() % size:
        lengths = [len(tensor) for tensor in tensors]
        raise _cut_across(where, f"its layers have {lengths} channels, which must be one multiple of {size}")
    units = torch.cat([tensor.detach() for tensor in tensors], dim=1).unflatten(0, (-1, size))
    return [unit.numpy().tobytes() for unit in units]


def _cut_across(where: str, found: str) -> RuntimeError:
    return RuntimeError(
        f"torch-pruning cut across heads or neurons ({where}): {found}. Only whole ones make a plan. Install the "
        "version that constraints.txt names."
    )
