"""Put the figures of one run into its report."""

from typing import cast

import torch

from hf_opentrans._distributed import add_up

from .allocation import Budget, pareto
from .calibration import Calibration, embed_parts
from .macs import TowerCost, layer_widths, tower_cost
from .plan import PruningConfig
from .reconstruction import Rebuilt
from .refit import Key
from .report import LayerReport, MenuCurve, PruningReport
from .selection import Selection
from .sizes import Menu, Size
from .tower import Tower


def make_report(
    tower: Tower,
    small: Tower,
    choice: Selection,
    rebuilt: dict[Key, Rebuilt],
    calibration: Calibration,
    config: PruningConfig,
    budget: Budget,
    seconds: dict[str, float],
) -> PruningReport:
    """Collect widths, costs, errors and notes."""
    before, after = (layer_widths(t.vision.config) for t in (tower, small))
    cost = TowerCost.of(tower.vision.config, resolution=config.resolution, projection=tower.projection is not None)
    totals = {unit: (cost.total(unit, before), cost.total(unit, after)) for unit in ("macs", "params")}
    return PruningReport(
        config=config.to_dict(),
        layers=_layer_reports(tower, small, choice, rebuilt),
        resolution=config.resolution or cast("int", tower.vision.config.image_size),
        dense_macs=totals["macs"][0],
        macs=totals["macs"][1],
        dense_params=totals["params"][0],
        params=totals["params"][1],
        realised_keep=tower_cost(budget.cost, after) / budget.dense,
        calibration_images=calibration.num_images,
        calibration_tokens=calibration.num_images * cost.tokens,
        seconds={name: round(value, 3) for name, value in seconds.items()},
        notes=(*calibration.warnings, *_notes(config, rebuilt)),
        predicted_error=choice.predicted_error,
        curves=tuple(_curve(menu, size, budget) for menu, size in zip(choice.menus, choice.sizes, strict=True))
        if config.method == "obs"
        else (),
    )


def _layer_reports(
    tower: Tower, small: Tower, choice: Selection, rebuilt: dict[Key, Rebuilt]
) -> tuple[LayerReport, ...]:
    before, after = (layer_widths(t.vision.config) for t in (tower, small))
    predicted: dict[int, float] = {}
    for menu, size in zip(choice.menus, choice.sizes, strict=True):
        predicted[menu.layer] = predicted.get(menu.layer, 0.0) + size.error
    layers = []
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        values: dict[str, float | None] = {}
        for kind in ("heads", "neurons"):
            if (done := rebuilt.get((index, kind))) is not None:
                values[f"{kind}_error"], values[f"{kind}_error_uncompensated"] = done.error, done.error_before
                values[f"{kind}_ridge"], values[f"{kind}_gap_factor"] = done.ridge, done.gap_factor
        if choice.predicted_error is not None:
            values["predicted_error"] = predicted.get(index, 0.0)
        widths = (new.heads, new.neurons, old.heads, old.neurons)
        inner = (new.qk_head_dim, new.v_head_dim, old.qk_head_dim, old.v_head_dim)
        layers.append(LayerReport(*widths, *inner, **values))
    return tuple(layers)


def _notes(config: PruningConfig, rebuilt: dict[Key, Rebuilt]) -> list[str]:
    notes = []
    if config.protect_last_attention:
        notes.append("The attention of the last block is protected: training-free dense heads read its q, k and v.")
    kept = [f"{kind} of layer {layer}" for (layer, kind), done in rebuilt.items() if done.is_kept]
    if kept:
        notes.append(f"Kept as sliced, because refitting raised the held-out error: {', '.join(kept)}.")
    singular = [f"{kind} of layer {layer}" for (layer, kind), done in rebuilt.items() if done.is_singular]
    if singular:
        notes.append(f"Only biases were refitted, because the inputs are constant: {', '.join(singular)}.")
    if config.method == "imp":
        notes.append("Weights were set to zero; nothing is smaller or faster. Its MACs are nominal.")
    return notes


def _curve(menu: Menu, size: Size, budget: Budget) -> MenuCurve:
    front = pareto(menu, budget.cost)
    dense = menu.cost(menu.sizes[0], budget.cost)
    chosen = next((index for index, (_, option) in enumerate(front) if option == size), None)
    costs = tuple(cost / dense if dense else 0.0 for cost, _ in front)
    return MenuCurve(menu.layer, menu.kind, costs, tuple(option.error for _, option in front), chosen)


@torch.no_grad()
def realised_error(tower: Tower, small: Tower, calibration: Calibration) -> float:
    """Return the squared change of the unit class token plus that of the patches (mean), on the held-out images."""
    _, held_out = embed_parts(tower, calibration)
    totals = torch.zeros(2, dtype=torch.float64, device=tower.vision.device)
    for hidden in held_out:
        pair = []
        for each in (tower, small):
            moved = hidden
            for layer in each.layers:
                moved = layer(moved, None)
            pair.append(each.finish(moved))
        changes = (pair[0] - pair[1]).square().sum(-1).double()
        totals += torch.stack([(changes[:, 0] + changes[:, 1:].mean(1)).sum(), changes.new_tensor(float(len(hidden)))])
    add_up(totals)
    return float(totals[0] / totals[1])
