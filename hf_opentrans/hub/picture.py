"""The picture of a card: what every layer keeps, beside what it had."""

from pathlib import Path
from typing import Any

from hf_opentrans._optional import require
from hf_opentrans.pruning.report import LayerReport, PruningReport

PICTURE = "widths.png"
_GHOST, _INK, _GRID = "#e4e7ec", "#30363d", "#d0d4da"
# Fields of `LayerReport`, their names and colours (told apart by colour-blind readers too).
_ATTENTION = {
    "heads": ("heads", "#0072b2"),
    "qk_head_dim": ("q, k width", "#56b4e9"),
    "v_head_dim": ("v width", "#009e73"),
}
_MLP = {"neurons": ("neurons", "#d55e00")}


def draw_widths(report: PruningReport, path: str | Path) -> None:
    """Draw the kept widths of every layer as bars before those of the dense model.

    Args:
        report: Of the pruning.
        path: Of the picture, a PNG.

    Raises:
        ImportError: If matplotlib is missing.
    """
    require("demo", "matplotlib")
    from matplotlib.figure import Figure

    count = len(report.layers)
    figure = Figure(figsize=(max(7.5, 0.62 * count + 2.5), 4.4), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for panel, columns, title in ((panels[0], _ATTENTION, "attention"), (panels[1], _MLP, "MLP")):
        _draw(panel, report.layers, columns)
        panel.set_title(title, loc="left", fontsize=10, color=_INK)
    panels[1].set_xticks(range(count))
    panels[1].set_xlabel("layer", color=_INK)
    share = f"{report.macs / report.dense_macs:.0%} of the multiply-accumulates at {report.resolution} px"
    figure.suptitle(f"What is left in every layer: {share}", fontsize=11, color=_INK)
    figure.savefig(path, dpi=110, metadata={"Software": None})  # the same report gives the same file


def _draw(panel: Any, layers: tuple[LayerReport, ...], columns: dict[str, tuple[str, str]]) -> None:
    width = 0.8 / len(columns)
    for offset, (field, (label, colour)) in enumerate(columns.items()):
        places = [index - 0.4 + (offset + 0.5) * width for index in range(len(layers))]
        kept = [getattr(layer, field) for layer in layers]
        dense = [getattr(layer, f"dense_{field}") for layer in layers]
        shares = [now / before if before else 0.0 for now, before in zip(kept, dense, strict=True)]
        panel.bar(places, [1.0 if before else 0.0 for before in dense], 0.92 * width, color=_GHOST)
        panel.bar(places, shares, 0.92 * width, color=colour, label=label)
        for place, now, share in zip(places, kept, shares, strict=True):
            panel.text(place, share + 0.02, str(now), ha="center", va="bottom", fontsize=6, color=_INK)
    panel.set(ylim=(0, 1.18), xlim=(-0.6, len(layers) - 0.4))
    panel.set_yticks([0, 0.5, 1], ["none", "half", "all"], fontsize=8)
    panel.tick_params(length=0, colors=_INK)
    for side in ("top", "right", "left", "bottom"):
        panel.spines[side].set_color(_GRID if side == "bottom" else "none")
    panel.legend(ncols=len(columns), fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
