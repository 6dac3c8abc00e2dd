"""The subnetwork that pruning found: a folder with the plan, its origin, and the compensated tower."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hf_opentrans._files import write_folder
from hf_opentrans.models.configuration_sparse_clip import SparseCLIPVisionConfig
from hf_opentrans.models.modeling_sparse_clip import SparseCLIPVisionModel, SparseCLIPVisionModelWithProjection

from .matching import SourceWeights
from .plan import PruningConfig, PruningPlan
from .tower import Tower
from .transfer import Source, TransferResult, transfer

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
        source_samples: Some values of every tensor of the dense tower; empty in folders of older versions.
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
    source_samples: dict[str, list[float]] = field(default_factory=dict, repr=False)

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
            "source_samples": self.source_samples,
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

    def apply_to(
        self,
        target: PreTrainedModel,
        images: Any = None,
        *,
        refit: bool = True,
        prefix: str | None = None,
        config: PruningConfig | None = None,
        image_processor: Any = None,
        drop_unused: bool = True,
        inplace: bool = False,
        progress: bool = False,
    ) -> TransferResult:
        """Put this subnetwork into a model that carries a CLIP vision tower of the same size.

        Where the target's tower is the one that the subnetwork was made from (bit for bit, or but for rounding), its
        compensated weights are taken over. Otherwise the plan is applied to the target's own weights, and, given
        images, what stays is rebuilt on them in closed form.

        Args:
            target: `CLIPModel`, `CLIPVisionModel*`, `CLIPSegForImageSegmentation`, `OwlViTForObjectDetection`,
                `Owlv2ForObjectDetection`, `LlavaForConditionalGeneration`, `GitForCausalLM`,
                `VisionTextDualEncoderModel`, or any model with a CLIP tower at `prefix`.
            images: Unlabelled images for the target: see `prune_model`. Used where the weights differ.
            refit: Whether to rebuild where the weights differ.
            prefix: Path of the tower in a class that is not known here.
            config: Number of images, resolution, batch size and seed of the refit.
            image_processor: The target's image processor, for the refit. Defaults to CLIP's mean and deviation.
            drop_unused: Whether to drop the blocks that the target computes and never reads: the output stays.
            inplace: Whether to change `target` itself; otherwise a copy. CLIP models are always copied: their class
                changes.
            progress: Whether to show a progress bar for the refit.

        Raises:
            TypeError: If there is no CLIP tower in the target, or its blocks are built otherwise (fused qkv).
            ValueError: If its size differs, or it is pruned already.
        """
        source = Source(
            self.plan, self.vision_config, self.tensors, SourceWeights(self.source_hashes, self.source_samples)
        )
        return transfer(
            source,
            target,
            images if refit else None,
            prefix=prefix,
            config=config,
            image_processor=image_processor,
            drop_unused=drop_unused,
            inplace=inplace,
            progress=progress,
        )
