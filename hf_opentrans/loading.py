"""Load any CLIP folder or Hub id with its processor, and say in one sentence what is wrong with it."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPImageProcessorPil, CLIPProcessor, PreTrainedModel
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, extract_commit_hash

from hf_opentrans._checks import check_finite
from hf_opentrans._safety import (
    FLOATS,
    check_config,
    check_fits,
    check_folder,
    check_foreign_layers,
    check_foreign_size,
    read_headers,
    read_object,
    weight_files,
)
from hf_opentrans.models.auto_segmentation import SEGMENTERS
from hf_opentrans.models.configuration_clip_resnet import CLIPResNetVisionConfig
from hf_opentrans.models.configuration_elastic_clip import ELASTIC_TYPES, ElasticCLIPConfig, ElasticCLIPVisionConfig
from hf_opentrans.models.configuration_sparse_clip import (
    CLIP_MODEL_TYPES,
    VISION_MODEL_TYPES,
    SparseCLIPVisionConfig,
)
from hf_opentrans.models.modeling_clip_resnet import CLIPResNetVisionModel
from hf_opentrans.models.modeling_dense_clip import DenseCLIPForSegmentation
from hf_opentrans.models.modeling_elastic_clip import (
    PREFIX,
    ElasticCLIPForSegmentation,
    ElasticCLIPModel,
    ElasticCLIPVisionModel,
    ElasticCLIPVisionModelWithProjection,
    ElasticMixin,
)
from hf_opentrans.models.modeling_open_vocabulary import OpenVocabularyModel
from hf_opentrans.models.modeling_sparse_clip import SparseCLIPModel, SparseCLIPVisionModel
from hf_opentrans.models.modeling_sparse_clip import SparseCLIPVisionModelWithProjection as WithProjection
from hf_opentrans.models.processing_open_vocabulary import OpenVocabularyProcessor

EMBEDDED_MODEL = "clip-scenes"
# Of all loading here: safetensors alone, and no code of the folder.
SAFE = {"use_safetensors": True, "trust_remote_code": False}
MOST_PIXELS = 2**14  # side of the images that a processor may ask for
WHOLE_TYPES = (*CLIP_MODEL_TYPES, ElasticCLIPConfig.model_type)  # with both towers
TOWER_TYPES = (*VISION_MODEL_TYPES, ElasticCLIPVisionConfig.model_type)
# Classes by the plain one of their kind, for checkpoints of several budgets.
_ELASTIC: dict[Any, type[ElasticMixin]] = {
    DenseCLIPForSegmentation: ElasticCLIPForSegmentation,
    SparseCLIPModel: ElasticCLIPModel,
    SparseCLIPVisionModel: ElasticCLIPVisionModel,
    WithProjection: ElasticCLIPVisionModelWithProjection,
}


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


def load_clip(name: str | Path, *, revision: str | None = None, budget: float | None = None) -> Loaded:
    """Load any CLIP with a vision tower, as the sparse class of its kind, with its processor.

    Args:
        name: A folder, a Hub id, or "clip-scenes".
        revision: Commit, tag or branch on the Hub.
        budget: Of a checkpoint of several budgets the one to load, as a plain pruned model. Defaults to all of them,
            with the largest set.

    Raises:
        FileNotFoundError: If there is no such folder or model.
        ValueError: If it is no CLIP, it has no such budget, or its files are damaged.
    """
    path = resolve_model(name)
    with _clear_errors(path), quiet_transformers():
        revision = _commit_of(path, revision) or revision  # all files of one commit, and it is asked for once
        model_type, architectures = _kind(path, revision)
        target = _class_of_kind(model_type, architectures)
        model, disk_dtype = _load_checked(target, path, revision, budget)
        model.loaded_revision = revision
        processor = load_processor(path, revision=revision, text=model_type in WHOLE_TYPES)
    return Loaded(model, processor, path, disk_dtype)


def _class_of_kind(model_type: str, architectures: list[str]) -> Any:
    if model_type in WHOLE_TYPES:
        is_segmenter = any(name.endswith("CLIPForSegmentation") for name in architectures)
        plain: Any = DenseCLIPForSegmentation if is_segmenter else SparseCLIPModel
    else:
        has_projection = any("WithProjection" in architecture for architecture in architectures)
        plain = WithProjection if has_projection else SparseCLIPVisionModel
    is_elastic = model_type in ELASTIC_TYPES
    return _ELASTIC[plain] if is_elastic else plain


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
        values = _config_values(path, revision)
        if values.get("model_type") != CLIPResNetVisionConfig.model_type:
            return None
        model, disk_dtype = _load_checked(CLIPResNetVisionModel, path, revision)
        try:
            processor = load_processor(path, revision=revision, text=False)
        except OSError:  # of a model that was built from a state dict
            side = model.config.image_size
            processor = CLIPImageProcessorPil(
                size={"shortest_edge": side},  # pyright: ignore[reportCallIssue]
                crop_size={"height": side, "width": side},  # pyright: ignore[reportCallIssue]
            )
        return LoadedResNet(model, processor, path, disk_dtype)


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
        values = _config_values(path, revision)
        if str(values.get("model_type")) in (*WHOLE_TYPES, *TOWER_TYPES):
            loaded = load_clip(path, revision=revision)
            return cast("Any", loaded.model).to(dtype or loaded.disk_dtype)
        return _load_foreign(values, path, revision, dtype)


def load_segmenter(
    name: str | Path, *, revision: str | None = None, budget: float | None = None
) -> tuple[OpenVocabularyModel, OpenVocabularyProcessor]:
    """Load a trained segmenter, or any CLIP folder or Hub id as a training-free one, with its processor.

    Args:
        name: A folder, a Hub id, or "clip-scenes".
        revision: Commit, tag or branch on the Hub.
        budget: See `load_clip`.

    Raises:
        FileNotFoundError: If there is no such folder or model.
        ValueError: If it has no text tower, is no CLIP, has no such budget, or its files are damaged.
    """
    return _load_segmenter(None, name, revision, budget)


def load_dense_clip(
    name: str | Path, *, revision: str | None = None
) -> tuple[DenseCLIPForSegmentation, OpenVocabularyProcessor]:
    """Load any CLIP folder or Hub id as a training-free segmenter, with its processor; see `load_segmenter`."""
    return _load_segmenter(DenseCLIPForSegmentation, name, revision)


def _load_segmenter(
    kind: type[OpenVocabularyModel] | None, name: str | Path, revision: str | None, budget: float | None = None
) -> tuple[Any, OpenVocabularyProcessor]:
    path = resolve_model(name)
    with _clear_errors(path), quiet_transformers():
        model_type = _config_values(path, revision).get("model_type", "")
        target = kind or SEGMENTERS.get(model_type)
        if target is None:
            raise ValueError(
                f"{path!r} holds a model of type {model_type!r}. An open-vocabulary segmenter is one of "
                f"{', '.join(SEGMENTERS)}. Give a CLIP model with both towers, or a segmenter that this "
                "package trained."
            )
        model, _ = _load_checked(target, path, revision, budget)
        processor = _load_processor(OpenVocabularyProcessor, path, revision)
    return model, processor


def load_processor(path: str, *, revision: str | None = None, text: bool = True) -> Any:
    """Load the stock CLIP processor of a folder, or its image processor alone."""
    if not text:
        return _load_processor(CLIPImageProcessorPil, path, revision)
    loaded = _load_processor(OpenVocabularyProcessor, path, revision)
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


def _config_values(path: str, revision: str | None) -> dict[str, Any]:
    """Read config.json as it is; no class of transformers sees it before it is checked."""
    values = read_object(Path(str(cached_file(path, "config.json", revision=revision))))
    check_config(values, path)
    return values


def _commit_of(path: str, revision: str | None) -> str | None:
    """Return the commit of a model on the Hub; None for a folder."""
    return extract_commit_hash(cached_file(path, "config.json", revision=revision), None)


def _load_checked(
    target: Any, path: str, revision: str | None, budget: float | None = None
) -> tuple[Any, torch.dtype]:
    """Load a class of ours in float32 once its weights fit its configuration; return the files' precision, too."""
    values = _config_values(path, revision)
    has_budgets = target in _ELASTIC.values()
    if budget is not None and not has_budgets:
        raise ValueError(
            f"budget is {budget!r}, and {path!r} holds one model of type {values.get('model_type')!r}. Only a "
            "checkpoint that `prune-elastic` wrote has budgets to choose from. Leave the budget out, or give such a "
            "checkpoint."
        )
    stored = read_headers(weight_files(path, revision))
    with _config_errors(path):
        config = target.config_class.from_pretrained(path, revision=revision or "main")
        skeleton = _skeleton(target, config)
    prefixes = ("vision_model.", "clip.vision_model.") if target is SparseCLIPVisionModel else ("clip.",)
    ignored = target._keys_to_ignore_on_load_unexpected or ()
    check_fits(skeleton, stored, path, prefixes=prefixes, ignored=ignored)
    options: dict[str, Any] = {"revision": revision or "main", "dtype": torch.float32, **SAFE}
    if has_budgets:
        options["budget"] = budget
    model = target.from_pretrained(path, **options).eval()
    check_finite(model.state_dict())
    own = (tensor.dtype for name, tensor in stored.items() if not name.startswith(f"{PREFIX}."))
    return model, next((FLOATS[kind] for kind in own if kind in FLOATS), torch.float32)


def _load_foreign(
    values: dict[str, Any], path: str, revision: str | None, dtype: torch.dtype | None
) -> PreTrainedModel:
    """Load a model of any class that transformers has, never of one that the folder brings."""
    named = _class_in_transformers(values, path)
    stored = read_headers(weight_files(path, revision))
    check_foreign_layers(values, len(stored), path)
    with _config_errors(path):
        config_class = AutoConfig if named is AutoModel else named.config_class
        config = config_class.from_pretrained(path, revision=revision or "main")
        skeleton = _skeleton(named.from_config if named is AutoModel else named, config)
    check_foreign_size(skeleton, stored, path)
    options = {"revision": revision or "main", "dtype": dtype or "auto", **SAFE}
    model, info = named.from_pretrained(path, output_loading_info=True, **options)
    if info["missing_keys"]:
        raise ValueError(
            f"The checkpoint {path!r} lacks {len(info['missing_keys'])} of the weights that {type(model).__name__} "
            f"needs, among them {', '.join(sorted(info['missing_keys'])[:3])}. Missing weights would be random "
            "numbers. Give a complete checkpoint."
        )
    check_finite(model.state_dict())
    return model.eval()


def _class_in_transformers(values: dict[str, Any], path: str) -> Any:
    names = values.get("architectures") or [""]
    named = getattr(transformers, names[0], None)
    if isinstance(named, type) and issubclass(named, PreTrainedModel):
        return named
    if values.get("model_type") in CONFIG_MAPPING:
        return AutoModel
    code = " It brings code of its own, which is never run here." if values.get("auto_map") else ""
    raise ValueError(
        f"{path!r} holds a model of type {values.get('model_type')!r}, which transformers {transformers.__version__} "
        f"does not know.{code} Give a model of a class that transformers has."
    )


def _skeleton(build: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    """Build a model that has shapes and no memory."""
    with no_init_weights(), torch.device("meta"), meta_device_safe_creation_ops():
        return build(config)


def _load_processor(kind: Any, path: str, revision: str | None) -> Any:
    """Load a processor, and say what is wrong with its files."""
    try:
        processor = kind.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    except (OSError, ImportError):
        raise
    except Exception as err:  # tokenizers raises nothing more special than Exception
        raise ValueError(
            f"The processor in {path!r} cannot be used ({_first_line(err)}). Its files must be those that "
            "`save_pretrained` writes. Save or download the model again."
        ) from err
    images = getattr(processor, "image_processor", processor)
    for name in ("size", "crop_size"):
        sides = getattr(images, name, None) or {}
        if any(isinstance(side, int) and not 1 <= side <= MOST_PIXELS for side in dict(sides).values()):
            raise ValueError(
                f"The image processor in {path!r} has {name}={dict(sides)}. Sides must lie in [1, {MOST_PIXELS}]. "
                "Correct preprocessor_config.json."
            )
    return processor


@contextmanager
def _config_errors(path: str) -> Iterator[None]:
    """Turn what a nonsensical configuration raises anywhere in transformers into one sentence."""
    try:
        yield
    except (
        StrictDataclassError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as err:
        cause = err.__cause__ if isinstance(err, StrictDataclassError) and err.__cause__ is not None else err
        raise ValueError(
            f"config.json of {path!r} cannot be used: {_first_line(cause)} It must describe a model as "
            "`save_pretrained` does. Correct it, or get it again."
        ) from err


def _first_line(err: BaseException) -> str:
    text = " ".join((str(err) or type(err).__name__).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def _kind(path: str, revision: str | None) -> tuple[str, list[str]]:
    """Read model type and architectures of a checkpoint, and refuse what is no CLIP."""
    values = _config_values(path, revision)
    if values.get("model_type") in ELASTIC_TYPES:
        return str(values["model_type"]), values.get("architectures") or []
    config, _ = SparseCLIPVisionConfig.get_config_dict(path, revision=revision)
    is_whole = "vision_config" in config
    return (CLIP_MODEL_TYPES if is_whole else VISION_MODEL_TYPES)[0], config.get("architectures") or []


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
        if folder.is_dir():
            check_folder(folder)
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
        what = "The model" if folder.is_dir() else f"There is no folder {path!r}, and the model of the Hub"
        raise FileNotFoundError(
            f"{what} {path!r} could not be loaded: {first.rstrip('.')}. It needs config.json, model.safetensors "
            "and the processor's files. Check the name, or the folder's content."
        ) from err


def _looks_like_path(name: str) -> bool:
    """Tell a local path from a Hub id ("name" or "owner/name")."""
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or os.sep * 2 in name or name.endswith("/")
