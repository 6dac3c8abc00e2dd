"""Walk the pruned tower beside the dense one and rebuild every layer that reads what pruning changed."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import layer_norm

from hf_opentrans.models.modeling_sparse_clip import SparseCLIPEncoderLayer

from .calibration import Calibration, check_statistics, embed_parts, token_weights
from .macs import layer_widths
from .reconstruction import RIDGES, Rebuilt, oas_ridge, regress, regress_without_bias
from .statistics import CovarianceStatistics
from .tower import Tower

Key = tuple[int, str]
Hidden = list[list[torch.Tensor]]


@dataclass(frozen=True)
class Recipe:
    """How to rebuild.

    Args:
        propagates: Whether a layer reads the pruned model's own stream and aims at the dense stream (depth-order
            sweep), or reads the dense stream and aims at the dense layer's output.
        ridges: Candidates; none moves biases only; "oas" computes one from each covariance (CORP).
        gap_factors: Shares of the earlier layers' error that a layer may aim at; held-out data choose.
        refits_head: Whether the last LayerNorm and the visual projection are refitted too.
    """

    propagates: bool = True
    ridges: Sequence[float] | str = RIDGES
    gap_factors: Sequence[float] = (1.0, 0.5, 0.0)
    refits_head: bool = True


SWEEP = Recipe()
LOCAL = Recipe(propagates=False, gap_factors=(1.0,), refits_head=False)
MEAN_SHIFT_ONLY = replace(LOCAL, ridges=())
CORP = replace(LOCAL, ridges="oas")


@torch.no_grad()
def rebuild(
    tower: Tower,
    small: Tower,
    calibration: Calibration,
    metrics: dict[Key, torch.Tensor],
    recipe: Recipe,
    on_batch: Callable[[], object] = int,
    *,
    protected: Container[Key] = (),
) -> dict[Key, Rebuilt]:
    """Refit `out_proj` and `fc2` in depth order; writes into `small`.

    Args:
        tower: The dense tower.
        small: The pruned tower, whose layers hold plain slices of the dense weights.
        calibration: The images.
        metrics: Output metrics by `(layer, kind)`; the identity where one is missing.
        recipe: What a layer reads and aims at.
        on_batch: Called after every batch.
        protected: Sublayers whose own output is read elsewhere without the residual stream: they aim at their dense
            output alone, and leave the gap of the stream to others.
    """
    dense_hidden = embed_parts(tower, calibration)
    small_hidden = [list(part) for part in dense_hidden] if recipe.propagates else dense_hidden
    changed = None if recipe.propagates else _changed(tower, small)
    rebuilt: dict[Key, Rebuilt] = {}
    for index in range(len(tower.layers)):
        for kind in ("heads", "neurons"):
            branch, small_branch = (_branch(t.layers[index], kind) for t in (tower, small))
            if branch is None or small_branch is None:
                continue
            if changed is None or (index, kind) in changed:
                key = (index, kind)
                has_gap = recipe.propagates and key not in protected
                parts = _gather(small, key, (branch, small_branch), dense_hidden, small_hidden, has_gap, on_batch)
                check_statistics(index, kind, parts)
                rebuilt[key] = _solve(
                    small, key, parts, metrics, recipe if has_gap else replace(recipe, gap_factors=())
                )
                _step(small_branch, small_hidden if recipe.propagates else [], on_batch)
            else:
                _step(branch, dense_hidden, on_batch)
    if recipe.refits_head:
        _refit_head(tower, small, dense_hidden, small_hidden)
    return rebuilt


def _changed(tower: Tower, small: Tower) -> set[Key]:
    found = set()
    pairs = zip(layer_widths(tower.vision.config), layer_widths(small.vision.config), strict=True)
    for index, (old, new) in enumerate(pairs):
        if (old.heads, old.qk_head_dim, old.v_head_dim) != (new.heads, new.qk_head_dim, new.v_head_dim):
            found.add((index, "heads"))
        if old.neurons != new.neurons:
            found.add((index, "neurons"))
    return found


Branch = Callable[[torch.Tensor], torch.Tensor]


def _branch(layer: SparseCLIPEncoderLayer, kind: str) -> Branch | None:
    """Return what a sublayer adds to the residual stream, as a function of the stream; None where it is skipped."""
    if kind == "heads":
        return (lambda hidden: layer.self_attn(layer.layer_norm1(hidden))[0]) if layer.has_attention else None
    return (lambda hidden: layer.mlp(layer.layer_norm2(hidden))) if layer.has_mlp else None


def _gather(
    small: Tower,
    key: Key,
    branches: tuple[Branch, Branch],
    dense_hidden: Hidden,
    small_hidden: Hidden,
    has_gap: bool,
    on_batch: Callable[[], object],
) -> tuple[CovarianceStatistics, CovarianceStatistics]:
    """Gather rows [inputs of the small layer, target, gap] over both parts; moves the dense stream on."""
    consumer = small.consumer(*key)
    branch, small_branch = branches
    width = consumer.in_features + (1 + has_gap) * consumer.out_features
    tail = {"tail": consumer.out_features, "tail_with": consumer.in_features} if has_gap else {}
    parts = tuple(CovarianceStatistics(width, small.vision.device, **tail) for _ in range(2))
    seen: list[torch.Tensor] = []
    hook = consumer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        for statistics, dense_part, small_part in zip(parts, dense_hidden, small_hidden, strict=True):
            for position, (dense, pruned) in enumerate(zip(dense_part, small_part, strict=True)):
                target, gap = branch(dense), dense - pruned
                dense_part[position] = dense + target
                seen.clear()
                small_branch(pruned)
                inputs = seen[0] if seen else dense.new_empty(*dense.shape[:2], 0)  # a layer without heads
                rows = [inputs, target + gap, gap] if has_gap else [inputs, target]
                weights = token_weights(inputs if inputs.shape[-1] else target)
                statistics.update(torch.cat(rows, -1).flatten(0, 1), weights)
                on_batch()
    finally:
        hook.remove()
    return parts[0], parts[1]


def _solve(
    small: Tower,
    key: Key,
    parts: tuple[CovarianceStatistics, CovarianceStatistics],
    metrics: dict[Key, torch.Tensor],
    recipe: Recipe,
) -> Rebuilt:
    consumer = small.consumer(*key)
    ridges = recipe.ridges
    if isinstance(ridges, str):
        inputs = consumer.in_features
        both = parts[0].merge(parts[1])
        ridges = (max(1e-3, oas_ridge(both.covariance[:inputs, :inputs], both.rows)),)
    metric = metrics.get(key)
    metric = torch.eye(consumer.out_features) if metric is None else metric
    done = regress(consumer.weight, consumer.bias, *parts, metric, ridges=ridges, gap_factors=recipe.gap_factors)
    consumer.weight.copy_(done.weight)
    consumer.bias.copy_(done.bias)
    return done


def _step(branch: Branch, hidden: Hidden, on_batch: Callable[[], object]) -> None:
    for part in hidden:
        for position, batch in enumerate(part):
            part[position] = batch + branch(batch)
            on_batch()


def _refit_head(tower: Tower, small: Tower, dense_hidden: Hidden, small_hidden: Hidden) -> None:
    """Refit the last LayerNorm's scale and shift, channel by channel, and then the visual projection."""
    norm, small_norm = tower.vision.post_layernorm, small.vision.post_layernorm
    width, device = norm.weight.numel(), tower.vision.device
    plain = tuple(CovarianceStatistics(2 * width, device) for _ in range(2))
    for statistics, pairs in zip(plain, _pairs(dense_hidden, small_hidden), strict=True):
        for dense, pruned in pairs:
            rows = torch.cat([layer_norm(pruned, (width,), eps=norm.eps), norm(dense)], -1)
            statistics.update(rows.flatten(0, 1), token_weights(rows))
        statistics.reduce()
    scale, shift = _affine(small_norm, *plain)
    small_norm.weight.copy_(scale)
    small_norm.bias.copy_(shift)
    if tower.projection is None or small.projection is None:
        return
    outputs = tower.projection.out_features
    parts = tuple(CovarianceStatistics(width + outputs, device) for _ in range(2))
    for statistics, pairs in zip(parts, _pairs(dense_hidden, small_hidden), strict=True):
        for dense, pruned in pairs:
            target = tower.projection(norm(dense))
            # Tokens are compared by cosine: every token counts by its direction.
            length = target.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
            rows = torch.cat([small_norm(pruned), target], -1) / length
            statistics.update(rows.flatten(0, 1), token_weights(rows))
        statistics.reduce()
    small.projection.weight.copy_(regress_without_bias(small.projection.weight, parts[0], parts[1])[0])


def _pairs(dense_hidden: Hidden, small_hidden: Hidden) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    return [list(zip(dense, small, strict=True)) for dense, small in zip(dense_hidden, small_hidden, strict=True)]


def _affine(
    norm: torch.nn.LayerNorm, fit: CovarianceStatistics, held_out: CovarianceStatistics
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least-squares scale and shift of every channel; the old ones where held-out data prefer them."""
    width = norm.weight.numel()
    mean, covariance = fit.mean, fit.covariance
    variance = covariance.diagonal()[:width].clamp(min=torch.finfo(torch.float64).eps)
    scale = covariance.diagonal(width)[:width] / variance
    shift = mean[width:] - scale * mean[:width]
    old_scale, old_shift = norm.weight.double(), norm.bias.double()

    def error(scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        own, cross = held_out.covariance.diagonal(), held_out.covariance.diagonal(width)[:width]
        offset = held_out.mean[width:] - scale * held_out.mean[:width] - shift
        return own[width:] - 2 * scale * cross + scale**2 * own[:width] + offset**2

    is_better = error(scale, shift) < error(old_scale, old_shift)
    return torch.where(is_better, scale, old_scale), torch.where(is_better, shift, old_shift)
