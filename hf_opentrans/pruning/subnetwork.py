"""The subnetwork that pruning found: a folder with the plan, its origin, and the compensated tower."""

import json
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from hf_opentrans._checks import check_finite
from hf_opentrans._files import write_folder
from hf_opentrans._safety import FLOATS, read_headers, read_object
from hf_opentrans.models.configuration_sparse_clip import SparseCLIPVisionConfig
from hf_opentrans.models.modeling_sparse_clip import SparseCLIPVisionModel, SparseCLIPVisionModelWithProjection

from .macs import layer_widths
from .matching import SourceWeights
from .plan import PruningConfig, PruningPlan
from .tower import Tower
from .transfer import Source, TransferResult, transfer

SCHEMA_VERSION = 1
JSON_FILE, TENSOR_FILE = "subnetwork.json", "model.safetensors"
SUBNETWORK_FOLDER = "subnetwork"  # of a pruned model
MODEL_CONFIG = "config.json"
PROJECTION = "visual_projection.weight"

MAX_JSON_BYTES = 64 * 2**20  # 48 layers of 8192 neurons write six megabytes
MAX_VALUE = 1e39  # of a float32; a NaN is not below
_TYPES: dict[str, tuple[type, ...]] = {
    "base_model": (str,),
    "base_revision": (str, type(None)),
    "budget": (dict,),
    "calibration": (dict,),
    "vision_config": (dict,),
    "plan": (dict,),
    "source_hashes": (dict,),
    "source_samples": (dict,),
}
_OPTIONAL = ("source_samples",)  # older versions wrote none


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

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        subfolder: str = "",
        commit_message: str = "Upload subnetwork",
    ) -> CommitInfo:
        """Upload the files of `save_pretrained` in one commit; interrupted, the repository stays as it was.

        Args:
            repo_id: "user/name" on the Hub; it is created where it does not exist.
            private: Whether a new repository is private. Defaults to the account's setting.
            revision: Branch; it is created where it does not exist. Defaults to "main".
            token: Access token, or True for the stored one. Defaults to the one that `hf auth login` stored.
            subfolder: Folder of the repository, such as "subnetwork" beside a pruned model.
            commit_message: First line of the commit.

        Returns:
            The commit; as a string, its URL.

        Raises:
            FileExistsError: If a model lies where the subnetwork should: its weights would be overwritten.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        is_new = revision is not None and not api.revision_exists(repo_id, revision)
        place = f"{subfolder.strip('/')}/{MODEL_CONFIG}".lstrip("/")
        if api.file_exists(repo_id, place, revision=None if is_new else revision):
            raise FileExistsError(
                f"The repository {repo_id!r} holds a model: {place}. A subnetwork there would replace the model's "
                f"weights. Set subfolder={SUBNETWORK_FOLDER!r}, or choose another repository."
            )
        if is_new and revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / SUBNETWORK_FOLDER
            self.save_pretrained(folder)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo=subfolder,
                revision=revision,
                commit_message=commit_message,
            )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        subfolder: str = "",
        token: str | bool | None = None,
    ) -> "Subnetwork":
        """Read what `save_pretrained` or `push_to_hub` wrote. Nothing in the files is executed.

        Args:
            name: A folder, or "user/name" on the Hub. A pruned model may be given: its folder "subnetwork" is read.
            revision: Commit, tag or branch on the Hub.
            subfolder: Folder inside. Defaults to the root, and "subnetwork" where the root holds no subnetwork.
            token: Access token for the Hub, or True for the stored one.

        Raises:
            FileNotFoundError: If there is no such folder or repository, or a file is missing.
            ValueError: If its schema is newer than this version reads, or it is damaged or not a subnetwork.
        """
        root = Path(name) if _is_local(name) else _download(str(name), revision, subfolder, token)
        folder = root / _place(root, subfolder)
        values = _read_values(folder / JSON_FILE, str(name))
        plan = _read_plan(values.pop("plan"), folder / JSON_FILE)
        tensors = _read_tensors(folder, plan, values["vision_config"])
        return cls(plan=plan, tensors=tensors, **values)

    def to_model(self) -> SparseCLIPVisionModel | SparseCLIPVisionModelWithProjection:
        """Build the small tower, with its projection where there is one."""
        config = _config_of(self.vision_config)
        tensors = dict(self.tensors)
        projection = tensors.pop(PROJECTION, None)
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


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{str(path)!r} {what}. It must be as Subnetwork.save_pretrained wrote it. Download it again, or save the "
        "subnetwork again."
    )


def _is_local(name: str | Path) -> bool:
    """Tell a folder from a name on the Hub; what is neither is an error."""
    if Path(name).is_file():
        raise ValueError(f"{str(name)!r} is a file. A subnetwork is a folder with {JSON_FILE}. Give the folder.")
    if isinstance(name, Path) or Path(name).is_dir():
        return True
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is None:
        raise FileNotFoundError(
            f"There is no {JSON_FILE} in {name!r}. A subnetwork is a folder with one, or 'user/name' on the Hub. "
            "Check the path."
        )
    return False


def _place(root: Path, subfolder: str) -> str:
    """Return the folder inside `root`: the one that was asked for, or the one of a pruned model."""
    is_inside = (root / SUBNETWORK_FOLDER / JSON_FILE).is_file() and not (root / JSON_FILE).is_file()
    return SUBNETWORK_FOLDER if is_inside and not subfolder else subfolder


def _download(name: str, revision: str | None, subfolder: str, token: str | bool | None) -> Path:
    """Fetch the two files of a subnetwork; of a pruned model's repository not the model's weights."""
    folders = [f"{subfolder.strip('/')}/"] if subfolder else ["", f"{SUBNETWORK_FOLDER}/"]
    try:
        texts = [folder + JSON_FILE for folder in folders]
        root = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=texts))
        place = _place(root, subfolder)
        if not (root / place / JSON_FILE).is_file():
            raise FileNotFoundError(
                f"There is no {JSON_FILE} in the repository {name!r}, at {texts}. A subnetwork has one. Check name, "
                "revision and subfolder."
            )
        weights = [f"{place}/{TENSOR_FILE}".lstrip("/")]
        # The folder is named by its commit: both files are of one revision.
        return Path(snapshot_download(name, revision=root.name, token=token, allow_patterns=weights))
    except (RepositoryNotFoundError, RevisionNotFoundError, LocalEntryNotFoundError, HFValidationError) as err:
        reason = " ".join(str(err).split("\n\n")[-1].split())
        raise FileNotFoundError(
            f"The subnetwork {name!r} could not be downloaded ({reason.rstrip('.')}). It must be a folder, or a "
            "repository on the Hub that you may read. Check the name, the revision, the token and the network."
        ) from err


def _read_values(path: Path, name: str) -> dict[str, Any]:
    """Read the JSON file, and see that every key is there with a value of the right kind."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no {JSON_FILE} in {name!r}. A subnetwork folder holds one. Check the path.")
    values = read_object(path, MAX_JSON_BYTES)
    version = values.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{str(path)!r} has schema version {version!r}. hf_opentrans reads version {SCHEMA_VERSION} here. "
            "Update the package or save the subnetwork again."
        )
    _check_values(values, path)
    return values


def _check_values(values: dict[str, Any], path: Path) -> None:
    missing = [key for key in _TYPES if key not in values and key not in _OPTIONAL]
    unknown = [key for key in values if key not in _TYPES]
    if missing or unknown:
        raise _damaged(path, f"lacks {missing[:5]} and has the unknown keys {unknown[:5]}")
    for key, value in values.items():
        if not isinstance(value, _TYPES[key]):
            raise _damaged(path, f"has {key} of type {type(value).__name__}")
    if not all(isinstance(value, str) for value in values["source_hashes"].values()):
        raise _damaged(path, "has source_hashes that are no strings")
    for key, samples in values.get("source_samples", {}).items():
        if not isinstance(samples, list) or not all(_is_number(value) for value in samples):
            raise _damaged(path, f"has source_samples of {key!r} that are no list of numbers")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= MAX_VALUE


def _read_plan(values: dict[str, Any], path: Path) -> PruningPlan:
    layers = values.get("layers")
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, dict) for layer in layers):
        raise _damaged(path, "has a plan whose layers are no list of objects")
    for index, layer in enumerate(layers):
        for key in ("heads", "neurons"):
            kept = layer.get(key)
            if not isinstance(kept, list) or not all(type(unit) is int for unit in kept):
                raise _damaged(path, f"has a plan whose layer {index} has {key} that are no list of whole numbers")
        for key in ("qk_head_dim", "v_head_dim"):
            if layer.get(key) is not None and type(layer[key]) is not int:
                raise _damaged(path, f"has a plan whose layer {index} has {key}={layer[key]!r}")
    try:
        return PruningPlan.from_dict(values)
    except ValueError as err:
        raise _damaged(path, f"has a plan that cannot be read ({err})") from err


def _read_tensors(folder: Path, plan: PruningPlan, vision_config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Read the weights, after their names and shapes were compared with what plan and configuration say."""
    path = folder / TENSOR_FILE
    if not path.is_file():
        raise FileNotFoundError(f"There is no {TENSOR_FILE} beside {JSON_FILE}. Both are needed. Copy {path} again.")
    try:
        stored = read_headers([path])
    except SafetensorError as err:
        raise _damaged(path, f"is cut short or no safetensors file ({err})") from err
    found = {name: entry.shape for name, entry in stored.items()}
    kinds = {entry.dtype for entry in stored.values()}
    if not kinds <= set(FLOATS):
        raise _damaged(path, f"holds numbers of the kinds {sorted(kinds)}, not only of {', '.join(FLOATS)}")
    expected = _expected_shapes(folder / JSON_FILE, plan, vision_config, PROJECTION in found)
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        first = wrong[0]
        raise _damaged(
            path,
            f"does not fit {JSON_FILE} in {len(wrong)} tensors: {first} has the shape {found.get(first, 'of none')}, "
            f"and should have {expected.get(first, 'none')}",
        )
    tensors = load_file(path)
    check_finite(tensors)
    return tensors


def _expected_shapes(
    path: Path, plan: PruningPlan, vision_config: dict[str, Any], has_projection: bool
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the small tower; nothing of its size is allocated."""
    code = [key for key in vision_config if "_implementation" in key]
    if code:  # transformers may fetch the code of an attention kernel by this name
        raise _damaged(path, f"has a vision_config that names code: {code}")
    kind = SparseCLIPVisionModelWithProjection if has_projection else SparseCLIPVisionModel
    try:
        config = _config_of(vision_config)
        with no_init_weights(), torch.device("meta"):
            tower = Tower.of(kind(config))
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as err:
        reason = " ".join(str(err).split())[:400].rstrip(".")
        raise _damaged(path, f"has a vision_config that gives no tower ({reason})") from err
    if config.num_hidden_layers != len(plan):
        raise _damaged(path, f"has a plan of {len(plan)} layers, and a vision_config of {config.num_hidden_layers}")
    _check_plan(path, plan, config)
    return {name: tuple(tensor.shape) for name, tensor in tower.named_tensors().items()}


def _check_plan(path: Path, plan: PruningPlan, config: SparseCLIPVisionConfig) -> None:
    """See that the plan keeps as much as the configuration says, and nothing that the dense tower never had."""
    heads, neurons = config.__dict__["num_attention_heads"], config.__dict__["intermediate_size"]  # global: the dense
    for index, (width, layer) in enumerate(zip(layer_widths(config), plan.layers, strict=True)):
        planned, stated = [len(layer.heads), len(layer.neurons)], [width.heads, width.neurons]
        if layer.heads:  # widths of heads that are gone do not matter
            planned += [layer.qk_head_dim or width.qk_head_dim, layer.v_head_dim or width.v_head_dim]
            stated += [width.qk_head_dim, width.v_head_dim]
        if planned != stated:
            raise _damaged(path, f"plans the widths {planned} for layer {index}, and vision_config says {stated}")
        if max(layer.heads, default=0) >= heads or max(layer.neurons, default=0) >= neurons:
            raise _damaged(path, f"keeps units in layer {index} beyond the dense {heads} heads, {neurons} neurons")


def _config_of(vision_config: dict[str, Any]) -> SparseCLIPVisionConfig:
    return SparseCLIPVisionConfig(**{key: value for key, value in vision_config.items() if key != "model_type"})
