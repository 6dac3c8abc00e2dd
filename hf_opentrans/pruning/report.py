"""What pruning did, in numbers that can be printed, saved and compared."""

import json
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from hf_opentrans._optional import require

REPORT_FILE = "pruning_report.json"


@dataclass(frozen=True)
class LayerReport:
    """One layer before and after.

    Args:
        heads, neurons: Heads and neurons after pruning.
        dense_heads, dense_neurons: The same before.
        qk_head_dim, v_head_dim: Widths inside each head after pruning.
        dense_qk_head_dim, dense_v_head_dim: The same before.
        predicted_error: What the menus expect the final tokens to lose by this layer; None for methods without menus.
        heads_error, neurons_error: Held-out error of the rebuilt sublayers under the output metric; None where nothing
            was rebuilt. After the depth-order sweep it includes what the layers before have left.
        heads_error_uncompensated, neurons_error_uncompensated: The same before rebuilding.
        heads_ridge, neurons_ridge: Ridge that was chosen, relative; None for a mean shift alone or no rebuild.
        heads_gap_factor, neurons_gap_factor: Share of the earlier layers' error that was aimed at.
    """

    heads: int
    neurons: int
    dense_heads: int
    dense_neurons: int
    qk_head_dim: int = 0
    v_head_dim: int = 0
    dense_qk_head_dim: int = 0
    dense_v_head_dim: int = 0
    predicted_error: float | None = None
    heads_error: float | None = None
    neurons_error: float | None = None
    heads_error_uncompensated: float | None = None
    neurons_error_uncompensated: float | None = None
    heads_ridge: float | None = None
    neurons_ridge: float | None = None
    heads_gap_factor: float | None = None
    neurons_gap_factor: float | None = None


@dataclass(frozen=True)
class MenuCurve:
    """The error of one sublayer against its cost, and what was chosen.

    Args:
        layer: Index of the layer.
        kind: "heads" or "neurons".
        costs: Shares of the sublayer's own dense cost, ascending.
        errors: Smallest error at each cost.
        chosen: Position of what was chosen; None where it is none of them.
    """

    layer: int
    kind: str
    costs: tuple[float, ...]
    errors: tuple[float, ...]
    chosen: int | None = None


@dataclass(frozen=True)
class PruningReport:
    """The figures of one pruning run.

    Args:
        config: The configuration that was used.
        layers: One report per layer.
        resolution: Side in pixels that MACs are counted at.
        dense_macs, macs: Multiply-accumulates of one image through the tower, before and after.
        dense_params, params: Parameters of the tower, before and after.
        realised_keep: Share of the unit that is left.
        predicted_error: What the menus expect the final tokens to lose in all: squared change of the class token plus
            mean squared change of the patch tokens, all of unit length. None for methods without menus.
        realised_error: The same, measured on the held-out calibration images. The last solve of every layer has seen
            them too, so that unseen images lose somewhat more.
        nominal_macs: MACs of a machine that skips every zero weight; only for method "imp".
        curves: For every menu, its cheapest error at each cost, as shares of the dense tower's cost; for `plot`.
        calibration_images, calibration_tokens: Size of the calibration set.
        seconds: Wall time by stage.
        notes: What the user should know: protected layers, small calibration sets.
    """

    config: dict[str, Any]
    layers: tuple[LayerReport, ...]
    resolution: int
    dense_macs: int
    macs: int
    dense_params: int
    params: int
    realised_keep: float
    calibration_images: int
    calibration_tokens: int
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()
    predicted_error: float | None = None
    realised_error: float | None = None
    nominal_macs: int | None = None
    curves: tuple[MenuCurve, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return asdict(self)

    def save(self, folder: str | Path) -> None:
        """Write `pruning_report.json` into `folder`."""
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        (Path(folder) / REPORT_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "PruningReport":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no report.
        """
        path = Path(folder) / REPORT_FILE
        if not path.exists():
            raise FileNotFoundError(f"There is no {REPORT_FILE} in {str(folder)!r}. Give a folder that pruning wrote.")
        values = json.loads(path.read_text(encoding="utf-8"))
        values["config"]["structures"] = tuple(values["config"].get("structures", ()))
        values["layers"] = tuple(LayerReport(**layer) for layer in values["layers"])
        curves: list[dict[str, Any]] = values.get("curves", [])
        values["curves"] = tuple(
            MenuCurve(c["layer"], c["kind"], tuple(c["costs"]), tuple(c["errors"]), c["chosen"]) for c in curves
        )
        return cls(**values | {"notes": tuple(values.get("notes", ()))})

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the kept widths and the errors per layer, and the error curves with what was chosen.

        Args:
            path: Where to save the picture; not saved without.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: If matplotlib is missing.
        """
        require("demo", "matplotlib")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(13, 7.5), layout="constrained")
        panels = figure.subplots(2, 2)
        self._plot_widths(panels[0, 0])
        self._plot_layer_errors(panels[0, 1])
        for panel, kind, title in ((panels[1, 0], "heads", "attention"), (panels[1, 1], "neurons", "MLP")):
            self._plot_curves(panel, kind, title)
        share = f"{self.macs / self.dense_macs:.1%} of the MACs"
        figure.suptitle(f"{self.config['method']}, {share} at {self.resolution} px")
        if path is not None:
            figure.savefig(path, dpi=130)
        return figure

    def _plot_widths(self, panel: Any) -> None:
        names = {"heads": "heads", "qk_head_dim": "query-key width", "v_head_dim": "value width", "neurons": "neurons"}
        for offset, (name, label) in enumerate(names.items()):
            shares = [getattr(x, name) / max(getattr(x, f"dense_{name}"), 1) for x in self.layers]
            panel.bar([i + 0.2 * (offset - 1.5) for i in range(len(shares))], shares, 0.19, label=label)
        panel.set(xlabel="layer", ylabel="kept share", ylim=(0, 1.25), title="kept widths")
        panel.set_xticks(range(len(self.layers)))
        panel.legend(ncols=4, fontsize=8, loc="upper center")

    def _plot_layer_errors(self, panel: Any) -> None:
        layers = range(len(self.layers))
        panel.set(
            xlabel="layer", ylabel="squared change of the final tokens", title="errors per layer, held-out images"
        )
        predicted = [x.predicted_error for x in self.layers]
        total = list(accumulate(value or 0.0 for value in predicted))
        series = [("predicted, this layer", predicted, "o:"), ("predicted, up to this layer", total, "o-")]
        for kind in ("heads", "neurons"):
            for name, label in (("error_uncompensated", "as sliced"), ("error", "refitted")):
                values = [getattr(x, f"{kind}_{name}") for x in self.layers]
                series.append((f"{kind}, {label}", values, "s--" if label == "as sliced" else "s-"))
        drawn = [s for s in series if any(value for value in s[1])]
        for label, values, style in drawn:
            panel.plot(layers, [value or float("nan") for value in values], style, markersize=4, label=label)
        if drawn:
            panel.set_yscale("log")
            panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
        else:
            panel.text(0.5, 0.5, "this method measures no errors", ha="center", transform=panel.transAxes)

    def _plot_curves(self, panel: Any, kind: str, title: str) -> None:
        curves = [curve for curve in self.curves if curve.kind == kind and len(curve.costs) > 1]
        panel.set(
            xlabel=f"kept cost of the {title}", ylabel="predicted error", title=f"{title}: error curves, choice marked"
        )
        for curve in curves:
            (line,) = panel.plot(curve.costs, [e or float("nan") for e in curve.errors], label=f"layer {curve.layer}")
            if curve.chosen is not None:
                panel.plot(
                    curve.costs[curve.chosen], curve.errors[curve.chosen] or float("nan"), "o", color=line.get_color()
                )
        if curves:
            panel.set_yscale("log")
            panel.legend(ncols=2 if len(curves) <= 12 else 3, fontsize=7)
        else:
            panel.text(0.5, 0.5, "nothing to choose here", ha="center", transform=panel.transAxes)
