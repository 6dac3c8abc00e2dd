"""The subnetwork that pruning found: a folder with the plan, its origin, and the compensated tower."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hf_opentrans._files import write_folder
from hf_opentrans.models.configuration_sparse_clip import SparseCLIPVisionConfig
from hf_opentrans.models.modeling_sparse_clip import SparseCLIPVisionModel, SparseCLIPVisionModelWithProjection

from .plan import PruningPlan
from .tower import SparseModel, Tower

SCHEMA_VERSION = 1
JSON_FILE, TENSOR_FILE = "subnetwork.json", "model.safetensors"


@dataclass(frozen=True)
class Subnetwork:
    """A pruned vision tower and where it comes from.

    Args:
        plan: What every layer keeps.
        vision_config: Configuration of the small tower.
        tensors: Its weights under canonical names (no prefix; `visual_projection.weight` where there is one).
        base_model: Name or path of the dense model.
        base_revision: Its commit on the Hub, if known.
        source_hashes: SHA-256 of every tensor of the dense tower.
        calibration: Fingerprint, number of images, resolution and seed.
        budget: Unit, `keep`, dense and realised cost.
    """

    plan: PruningPlan
    vision_config: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(repr=False)
    base_model: str
    base_revision: str | None
    source_hashes: dict[str, str] = field(repr=False)
    calibration: dict[str, Any]
    budget: dict[str, Any]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `subnetwork.json` and `model.safetensors`; an older subnetwork there is replaced as a whole."""
        values = {
            "schema_version": SCHEMA_VERSION,
            "base_model": self.base_model,
            "base_revision": self.base_revision,
            "budget": self.budget,
            "calibration": self.calibration,
            "vision_config": self.vision_config,
            "plan": self.plan.to_dict(),
            "source_hashes": self.source_hashes,
        }
        with write_folder(folder, marker=JSON_FILE) as target:
            save_file({k: v.contiguous().cpu() for k, v in self.tensors.items()}, target / TENSOR_FILE)
            (target / JSON_FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Subnetwork":
        """Read a folder that `save_pretrained` wrote.

        Raises:
            FileNotFoundError: If the folder is none.
            ValueError: If its schema is newer than this version reads, or it is damaged.
        """
        path = Path(folder) / JSON_FILE
        if not path.exists():
            raise FileNotFoundError(f"There is no {JSON_FILE} in {str(folder)!r}. A subnetwork folder holds one.")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as err:
            raise ValueError(f"{str(path)!r} is not valid JSON ({err}). Save the subnetwork again.") from err
        if values.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"{str(path)!r} has schema version {values.get('schema_version')!r}. hf_opentrans reads "
                f"version {SCHEMA_VERSION} here. Update the package or save the subnetwork again."
            )
        values.pop("schema_version")
        plan = PruningPlan.from_dict(values.pop("plan"))
        return cls(plan=plan, tensors=load_file(Path(folder) / TENSOR_FILE), **values)

    def to_model(self) -> SparseCLIPVisionModel | SparseCLIPVisionModelWithProjection:
        """Build the small tower, with its projection where there is one."""
        config = SparseCLIPVisionConfig(**{k: v for k, v in self.vision_config.items() if k != "model_type"})
        tensors = dict(self.tensors)
        projection = tensors.pop("visual_projection.weight", None)
        model = SparseCLIPVisionModel(config) if projection is None else SparseCLIPVisionModelWithProjection(config)
        tower = Tower.of(model)
        tower.vision.load_state_dict(tensors, strict=True)
        if tower.projection is not None:
            tower.projection.load_state_dict({"weight": projection})
        return model.eval()


def hash_tensors(model: SparseModel) -> dict[str, str]:
    """Return the SHA-256 of the bytes of every tensor of the vision tower, by canonical name."""
    return {
        name: hashlib.sha256(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, tensor in Tower.of(model).named_tensors().items()
    }
