"""What pruning did, in numbers that can be printed, saved and compared."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPORT_FILE = "pruning_report.json"


@dataclass(frozen=True)
class LayerReport:
    """One layer before and after.

    Args:
        heads, neurons: Widths after pruning.
        dense_heads, dense_neurons: Widths before.
        predicted_error: Error of the removals by the curves; None for methods without curves.
        heads_error, neurons_error: Held-out error of the rebuilt sublayers under the output metric; None where nothing
            was rebuilt.
        heads_error_uncompensated, neurons_error_uncompensated: The same without compensation.
        heads_ridge, neurons_ridge: Ridge that was chosen, relative; None for a mean shift alone or no rebuild.
    """

    heads: int
    neurons: int
    dense_heads: int
    dense_neurons: int
    predicted_error: float | None = None
    heads_error: float | None = None
    neurons_error: float | None = None
    heads_error_uncompensated: float | None = None
    neurons_error_uncompensated: float | None = None
    heads_ridge: float | None = None
    neurons_ridge: float | None = None


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

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return asdict(self)

    def save(self, folder: str | Path) -> None:
        """Write `pruning_report.json` into `folder`."""
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        (Path(folder) / REPORT_FILE).write_text(text, encoding="utf-8")
