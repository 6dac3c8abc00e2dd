"""What an elastic checkpoint holds, in numbers: cost, fidelity and bytes of every budget."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hf_opentrans._files import write_json

ELASTIC_REPORT_FILE = "elastic_report.json"


@dataclass(frozen=True)
class BudgetReport:
    """One budget.

    Args:
        budget: Share of the dense tower that was asked for.
        realised_keep: Share that is left.
        macs: Multiply-accumulates of one image through the tower.
        params: Parameters of the tower.
        cosine_class: Mean cosine of the class token to the dense model's, on images that nothing was fitted on.
        cosine_patches: The same of the patch tokens.
        bytes_alone: Of the tower, were it the only one in its file.
        bytes_added: What it adds to the largest budget's file.
        predicted_error: What the menus expect the final tokens to lose.
    """

    budget: float
    realised_keep: float
    macs: int
    params: int
    cosine_class: float
    cosine_patches: float
    bytes_alone: int
    bytes_added: int
    predicted_error: float


@dataclass(frozen=True)
class ElasticReport:
    """The figures of one elastic pruning run.

    Args:
        config: The configuration that was used.
        budgets: One report per budget, largest first.
        dense_macs, dense_params: Of the dense tower.
        resolution: Side in pixels that MACs are counted at.
        calibration_images, held_out_images: Images that weights were fitted on, and that cosines were measured on.
        seconds: Wall time by stage.
        notes: What the user should know.
    """

    config: dict[str, Any]
    budgets: tuple[BudgetReport, ...]
    dense_macs: int
    dense_params: int
    resolution: int
    calibration_images: int
    held_out_images: int
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()

    @property
    def size_ratio(self) -> float:
        """Bytes of the tower with all budgets, relative to the largest budget alone (other towers not counted)."""
        largest = self.budgets[0].bytes_alone
        return (largest + sum(entry.bytes_added for entry in self.budgets)) / largest

    def in_precision(self, dtype: torch.dtype) -> "ElasticReport":
        """Return the report of the same budgets with weights of another precision; differences stay in 8 bits."""
        budgets = (replace(entry, bytes_alone=entry.params * dtype.itemsize) for entry in self.budgets)
        return replace(self, budgets=tuple(budgets))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {**asdict(self), "size_ratio": self.size_ratio}

    def save(self, folder: str | Path) -> None:
        """Write `elastic_report.json` into `folder`."""
        write_json(Path(folder) / ELASTIC_REPORT_FILE, self.to_dict())

    @classmethod
    def load(cls, folder: str | Path) -> "ElasticReport":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no report.
            ValueError: If it is damaged.
        """
        path = Path(folder) / ELASTIC_REPORT_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no {ELASTIC_REPORT_FILE} in {str(folder)!r}. A folder that `prune_elastic` wrote has one. "
                "Check the path."
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values.pop("size_ratio", None)
            values["budgets"] = tuple(BudgetReport(**entry) for entry in values["budgets"])
            values["notes"] = tuple(values["notes"])
            values["config"]["structures"] = tuple(values["config"]["structures"])
            return cls(**values)
        except (ValueError, KeyError, TypeError) as err:
            raise ValueError(
                f"{str(path)!r} is no report of `prune_elastic` ({err}). It must be as that wrote it. Get it again."
            ) from err
