"""Load any CLIP folder or Hub id with its processor, and say in one sentence what is wrong with it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError, safe_open
from transformers import AutoModel, CLIPImageProcessorPil, CLIPProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from hf_opentrans._checks import check_finite
from hf_opentrans.models.auto_segmentation import AutoModelForOpenVocabularySegmentation
from hf_opentrans.models.configuration_clip_resnet import CLIPResNetVisionConfig
from hf_opentrans.models.configuration_sparse_clip import (
    CLIP_MODEL_TYPES,
    VISION_MODEL_TYPES,
    SparseCLIPVisionConfig,
)
from hf_opentrans.models.modeling_clip_resnet import CLIPResNetVisionModel
from hf_opentrans.models.modeling_dense_clip import DenseCLIPForSegmentation
from hf_opentrans.models.modeling_open_vocabulary import OpenVocabularyModel
from hf_opentrans.models.modeling_sparse_clip import SparseCLIPModel, SparseCLIPVisionModel
from hf_opentrans.models.modeling_sparse_clip import SparseCLIPVisionModelWithProjection as WithProjection
from hf_opentrans.models.processing_open_vocabulary import OpenVocabularyProcessor

EMBEDDED_MODEL = "clip-scenes"
# What safetensors calls the precisions that weights come in.
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class Loaded:
    """A model with what prepares its input.

    Args:
        model: The model, in float32, in eval mode.
        processor: `CLIPProcessor`, or an image processor alone where the model has no text tower.
        path: Where it came from.
        disk_dtype: Precision of the weights in the files.
    """

    model: SparseCLIPModel | SparseCLIPVisionModel | WithProjection
    processor: Any
    path: str
    disk_dtype: torch.dtype

    @property
    def image_processor(self) -> Any:
        """The image processor."""
        return getattr(self.processor, "image_processor", self.processor)


def resolve_model(name: str | Path) -> str:
    """Return the folder of the embedded model for "clip-scenes", and `name` itself otherwise."""
    if str(name) == EMBEDDED_MODEL and not Path(name).exists():
        return str(embedded_folder())
    return str(name)


def embedded_folder() -> Path:
    """Return the folder of the model that ships with the package."""
    return Path(__file__).parent / "assets" / EMBEDDED_MODEL


def embedded_names() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names that the embedded model was trained on: drawings, and textures."""
    listed = json.loads((embedded_folder() / "names.json").read_text(encoding="utf-8"))
    return tuple(name for name in listed["seen"] if name not in listed["textures"]), tuple(listed["textures"])


def load_clip(name: str | Path, *, revision: str | None = None) -> Loaded:
    """Load any CLIP with a vision tower, as the sparse class of its kind, with its processor.

    Args:
        name: A folder, a Hub id, or "clip-scenes".
        revision: Commit, tag or branch on the Hub.

    Raises:
        FileNotFoundError: If there is no such folder or model.
        ValueError: If it is no CLIP, or its files are damaged.
    """
    path = resolve_model(name)
    with _clear_errors(path), quiet_transformers():
        options = {"revision": revision, "dtype": torch.float32}
        model_type, architectures = _kind(path, revision)
        if model_type in CLIP_MODEL_TYPES:
            is_segmenter = DenseCLIPForSegmentation.__name__ in architectures
            target = DenseCLIPForSegmentation if is_segmenter else SparseCLIPModel
        elif any("WithProjection" in architecture for architecture in architectures):
            target = WithProjection
        else:
            target = SparseCLIPVisionModel
        model = target.from_pretrained(path, **options).eval()
        processor = load_processor(path, revision=revision, text=model_type in CLIP_MODEL_TYPES)
        check_finite(model.state_dict())
        disk_dtype = _disk_dtype(path, revision)
    return Loaded(model, processor, path, disk_dtype)


@dataclass(frozen=True)
class LoadedResNet:
    """A CLIP ResNet with what prepares its input.

    Args:
        model: The model, in float32, in eval mode.
        image_processor: The folder's own, or CLIP's where it has none.
        path: Where it came from.
        disk_dtype: Precision of the weights in the files.
    """

    model: CLIPResNetVisionModel
    image_processor: Any
    path: str
    disk_dtype: torch.dtype


def load_clip_resnet(name: str | Path, *, revision: str | None = None) -> LoadedResNet | None:
    """Load a CLIP ResNet with its image processor; return None where the model is of another type.

    Raises:
        FileNotFoundError: If there is no such folder or model.
        ValueError: If its files are damaged.
    """
    path = resolve_model(name)
    with _clear_errors(path), quiet_transformers():
        values, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
        if values.get("model_type") != CLIPResNetVisionConfig.model_type:
            return None
        model = CLIPResNetVisionModel.from_pretrained(path, revision=revision or "main", dtype=torch.float32).eval()
        check_finite(model.state_dict())
        try:
            processor = load_processor(path, revision=revision, text=False)
        except OSError:  # of a model that was built from a state dict
            side = model.config.image_size
            processor = CLIPImageProcessorPil(
                size={"shortest_edge": side},  # pyright: ignore[reportCallIssue]
                crop_size={"height": side, "width": side},  # pyright: ignore[reportCallIssue]
            )
        return LoadedResNet(model, processor, path, _disk_dtype(path, revision))


def load_any(
    name: str | Path, *, revision: str | None = None, dtype: torch.dtype | None = torch.float32
) -> PreTrainedModel:
    """Load any transformers model by the class that its config names; a CLIP as the sparse class of its kind.

    Args:
        name: A folder, a Hub id, or "clip-scenes".
        revision: Commit, tag or branch on the Hub.
        dtype: Precision of the weights; None for that of the files.

    Raises:
        FileNotFoundError: If there is no such folder or model.
        ValueError: If its files are damaged, or transformers does not know the model.
    """
    path = resolve_model(name)
    with _clear_errors(path), quiet_transformers():
        values, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
        if str(values.get("model_type")) in (*CLIP_MODEL_TYPES, *VISION_MODEL_TYPES):
            loaded = load_clip(path, revision=revision)
            return cast("Any", loaded.model).to(dtype or loaded.disk_dtype)
        named = getattr(transformers, (values.get("architectures") or [""])[0], AutoModel)
        model = named.from_pretrained(path, revision=revision, dtype=dtype or "auto").eval()
        check_finite(model.state_dict())
    return model


def load_segmenter(
    name: str | Path, *, revision: str | None = None
) -> tuple[OpenVocabularyModel, OpenVocabularyProcessor]:
    """Load a trained segmenter, or any CLIP folder or Hub id as a training-free one, with its processor.

    Raises:
        FileNotFoundError: If there is no such folder or model.
        ValueError: If it has no text tower, is no CLIP, or its files are damaged.
    """
    return _load_segmenter(AutoModelForOpenVocabularySegmentation, name, revision)


def load_dense_clip(
    name: str | Path, *, revision: str | None = None
) -> tuple[DenseCLIPForSegmentation, OpenVocabularyProcessor]:
    """Load any CLIP folder or Hub id as a training-free segmenter, with its processor; see `load_segmenter`."""
    return _load_segmenter(DenseCLIPForSegmentation, name, revision)


def _load_segmenter(kind: Any, name: str | Path, revision: str | None) -> tuple[Any, OpenVocabularyProcessor]:
    path = resolve_model(name)
    with _clear_errors(path), quiet_transformers():
        model = kind.from_pretrained(path, revision=revision, dtype=torch.float32).eval()
        check_finite(model.state_dict())
        processor = OpenVocabularyProcessor.from_pretrained(path, revision=revision)
    return model, processor


def load_processor(path: str, *, revision: str | None = None, text: bool = True) -> Any:
    """Load the stock CLIP processor of a folder, or its image processor alone."""
    if not text:
        return CLIPImageProcessorPil.from_pretrained(path, revision=revision or "main")
    loaded = OpenVocabularyProcessor.from_pretrained(path, revision=revision)
    return CLIPProcessor(loaded.image_processor, loaded.tokenizer)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and notes: what matters of them is raised as an error here."""
    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    hub_verbosity = hub_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


def _kind(path: str, revision: str | None) -> tuple[str, list[str]]:
    """Read model type and architectures of a checkpoint, and refuse what is no CLIP."""
    config, _ = SparseCLIPVisionConfig.get_config_dict(path, revision=revision)
    is_whole = "vision_config" in config
    return (CLIP_MODEL_TYPES if is_whole else VISION_MODEL_TYPES)[0], config.get("architectures") or []


def _disk_dtype(path: str, revision: str | None) -> torch.dtype:
    """Read the precision of the vision tower's weights from the header of the first weight file."""
    names = ("model.safetensors", "model.safetensors.index.json")
    files = [cached_file(path, n, revision=revision, _raise_exceptions_for_missing_entries=False) for n in names]
    if files[0] is None and files[1] is not None:
        shards = json.loads(Path(files[1]).read_text(encoding="utf-8"))["weight_map"]
        files[0] = cached_file(path, min(shards.values()), revision=revision)
    if files[0] is None:
        return torch.float32  # an old .bin checkpoint: transformers has read it, its precision is not kept
    with safe_open(files[0], framework="pt") as opened:
        stored = (opened.get_slice(name).get_dtype() for name in opened.keys())  # noqa: SIM118 (no mapping)
        return next((_FLOATS[name] for name in stored if name in _FLOATS), torch.float32)


@contextmanager
def _clear_errors(path: str) -> Iterator[None]:
    """Turn what loading raises into one sentence that names the folder."""
    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"{path!r} is a file. A model is a folder with config.json. Give the folder.")
    if not folder.is_dir() and _looks_like_path(path):
        raise FileNotFoundError(
            f"There is no model folder {path!r}. Give a folder with config.json, a Hub id, or {EMBEDDED_MODEL!r}."
        )
    if folder.is_dir() and not (folder / "config.json").exists():
        raise FileNotFoundError(f"The folder {path!r} has no config.json. A model folder needs one. Check the path.")
    try:
        _check_is_object(folder / "config.json")
        yield
    except SafetensorError as err:
        raise ValueError(
            f"The weights in {path!r} are damaged or cut short ({err}). The file must be complete. "
            "Copy or download it again."
        ) from err
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise ValueError(f"A JSON file in {path!r} is not valid ({err}). Save or download the model again.") from err
    except OSError as err:
        if isinstance(err, FileNotFoundError) and str(path) in str(err):
            raise
        first = str(err).splitlines()[0] if str(err) else type(err).__name__
        raise FileNotFoundError(
            f"The model {path!r} could not be loaded: {first.rstrip('.')}. It needs config.json, model.safetensors "
            "and the processor's files. Check the name, or the folder's content."
        ) from err


def _check_is_object(path: Path) -> None:
    if path.is_file() and not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
        raise ValueError(f"{str(path)!r} is not valid: it holds no JSON object. Save or download the model again.")


def _looks_like_path(name: str) -> bool:
    """Tell a local path from a Hub id ("name" or "owner/name")."""
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or os.sep * 2 in name or name.endswith("/")
