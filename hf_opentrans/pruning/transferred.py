"""Write and read models that carry a transferred tower: the host's own files, and the tower's widths in its config."""

import json
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_opentrans._files import write_folder
from hf_opentrans.models import modeling_sparse_clip
from hf_opentrans.models.configuration_sparse_clip import SparseCLIPVisionConfig

from .hosts import HostTower
from .transfer import SPARSE_TOWER, TransferReport
from .unused import guard

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
READ_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def save_transferred(
    model: PreTrainedModel, folder: str | Path, *, processor: Any = None, report: TransferReport | None = None
) -> None:
    """Write a model that `Subnetwork.apply_to` made, trained on or not, as one folder, or nothing at all.

    `config.json` is the host's own, with the tower's widths under `sparse_tower`; hosts that build their tower by its
    type (LLaVA) and CLIP models are saved as transformers saves them, and load by plain `from_pretrained` too.

    Args:
        model: The model.
        folder: New, empty, or an earlier output.
        processor: Saved with it.
        report: Saved with it.
    """
    with write_folder(folder, marker=CONFIG_FILE) as target:
        if getattr(model.config, SPARSE_TOWER, None) is None:
            model.save_pretrained(target)
        else:
            model.config.architectures = [type(model).__name__]
            model.config.dtype = model.dtype
            model.config.save_pretrained(target)
            if model.can_generate():
                cast("Any", model).generation_config.save_pretrained(target)
            save_torch_state_dict(model.state_dict(), target)
        if processor is not None:
            processor.save_pretrained(target)
        if report is not None:
            report.save(target)


def load_transferred(name: str | Path, *, revision: str | None = None, dtype: torch.dtype | None = None) -> Any:
    """Load a model that `save_transferred` wrote: the host is rebuilt, its tower gets its widths, then the weights.

    Args:
        name: A folder or a Hub id.
        revision: Commit, tag or branch on the Hub.
        dtype: Precision. Defaults to the saved one.

    Raises:
        FileNotFoundError: If there is no config.json or no weights.
        ValueError: If a weight is missing, left over, or of another shape, or the class is unknown.
    """
    folder = (
        Path(name)
        if Path(name).is_dir()
        else Path(snapshot_download(str(name), revision=revision, allow_patterns=READ_FILES))
    )
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"There is no {CONFIG_FILE} in {str(name)!r}. A saved model holds one. Check the path."
        )
    config = AutoConfig.from_pretrained(folder)
    host_class = _class_of(config, str(name))
    spec = getattr(config, SPARSE_TOWER, None)
    if spec is None:
        model, info = host_class.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True)
        _check_keys(str(name), info["missing_keys"], info["unexpected_keys"])
        return model.eval()
    with no_init_weights():
        model = host_class._from_config(config, dtype=dtype or getattr(config, "dtype", None) or torch.float32)
    values = {key: value for key, value in spec["vision_config"].items() if key != "model_type"}
    HostTower.of(model, spec["prefix"]).install(SparseCLIPVisionConfig(**values))
    _load_weights(model, folder, str(name))
    if spec["has_cuts"]:
        guard(model)
    return model.eval()


def _class_of(config: Any, name: str) -> Any:
    architecture = (config.architectures or [""])[0]
    found = getattr(transformers, architecture, None) or getattr(modeling_sparse_clip, architecture, None)
    if found is None:
        raise ValueError(
            f"{name!r} holds a model of class {architecture!r}. It must be one of transformers or a sparse CLIP. "
            "Update transformers, or load the model with its own class."
        )
    return found


def _load_weights(model: PreTrainedModel, folder: Path, name: str) -> None:
    files = [folder / WEIGHTS_FILE]
    if (folder / INDEX_FILE).is_file():
        shards = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / shard for shard in sorted(set(shards))]
    missing, unexpected = set(model.state_dict()), set()
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"There is no {file.name} in {name!r}. The weights must be complete. Copy them again."
            )
        tensors = load_file(file)
        try:
            unexpected |= set(model.load_state_dict(tensors, strict=False).unexpected_keys)
        except RuntimeError as err:
            raise ValueError(
                f"The weights in {name!r} do not have the shapes that its config.json states: "
                f"{str(err).splitlines()[-1].strip()} Both must come from the same model. Save the model again."
            ) from err
        missing -= set(tensors)
    model.tie_weights()
    _check_keys(name, _untied(model, missing), unexpected)


def _untied(model: PreTrainedModel, missing: set[str]) -> set[str]:
    """Return the missing names whose storage no loaded tensor shares."""
    state = model.state_dict()
    loaded = {tensor.data_ptr() for key, tensor in state.items() if key not in missing}
    return {key for key in missing if state[key].data_ptr() not in loaded}


def _check_keys(name: str, missing: Any, unexpected: Any) -> None:
    if missing or unexpected:
        listed = ", ".join(sorted([*missing, *unexpected])[:3])
        raise ValueError(
            f"{name!r} lacks {len(missing)} of the model's weights and holds {len(unexpected)} that it does not know, "
            f"among them {listed}. Missing weights would be random numbers, so nothing was loaded. Save it again."
        )
