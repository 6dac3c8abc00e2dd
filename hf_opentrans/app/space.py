"""The demo as a folder that runs as it is, here or as a Hugging Face Space: code, models, examples, versions."""

import json
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path
from typing import Any

from hf_opentrans._files import check_output_folder, write_folder
from hf_opentrans._optional import require
from hf_opentrans._safety import read_object
from hf_opentrans.data.scenes import CREDIT
from hf_opentrans.loading import EMBEDDED_MODEL, embedded_folder, resolve_model

from .interface import TITLE, build_interface, serve
from .preparation import EXAMPLES_FILE, Sources, read_examples
from .service import SegmentationService

SPACE_FILE = "space.json"  # what the folder shows; marks an exported folder
_PACKAGE = "hf_opentrans"
_APP = '''"""Start the demo: `python app.py`. A Space does the same."""

from pathlib import Path

from hf_opentrans.app import launch_space

if __name__ == "__main__":
    launch_space(Path(__file__).resolve().parent)
'''
_LFS = "".join(
    f"*.{kind} filter=lfs diff=lfs merge=lfs -text\n" for kind in ("safetensors", "png", "jpg", "jpeg", "webp")
)


def export_space(sources: Sources, output: str | Path) -> Path:
    """Write the demo as a folder that needs nothing but the packages in its requirements.txt.

    Models that are folders are copied, models on the Hub stay there. The folder holds a copy of this package.

    Args:
        sources: What the demo shows.
        output: New, empty, or an earlier export.

    Raises:
        ImportError: If the extra `app` is not installed.
        FileNotFoundError: If there is no such model.
        FileExistsError: If the folder holds foreign files.
        ValueError: If the models cannot be used for the demo.
    """
    require("app", "gradio")
    path = check_output_folder(output, marker=SPACE_FILE)
    SegmentationService.load(sources.model, sources.dense)  # what the Space would find out too late
    with write_folder(path, marker=SPACE_FILE) as folder:
        model = _place(sources.model, folder, "model")
        dense = None if sources.dense is None else _place(sources.dense, folder, "dense")
        _copy_examples(sources, folder / "examples")
        _copy_package(folder)
        values = {"model": model, "dense": dense, "examples": bool(sources.examples), "credit": sources.credit}
        _write(folder / SPACE_FILE, json.dumps(values, indent=1) + "\n")
        _write(folder / "app.py", _APP)
        _write(folder / "requirements.txt", "".join(f"{line}\n" for line in pinned_requirements()))
        _write(folder / ".gitattributes", _LFS)
        _write(folder / "README.md", _card(values, sources))
    return path


def read_space(folder: str | Path) -> Sources:
    """Read what an exported folder shows.

    Raises:
        FileNotFoundError: If it is no exported folder.
        ValueError: If space.json is damaged.
    """
    path = Path(folder)
    if not (path / SPACE_FILE).is_file():
        raise FileNotFoundError(
            f"The folder {str(path)!r} has no {SPACE_FILE}. It must come from `hf-opentrans app --export-space`. "
            "Export it again."
        )
    values = read_object(path / SPACE_FILE)
    missing = {"model", "dense", "examples", "credit"} - set(values)
    if missing:
        raise ValueError(f"{SPACE_FILE} lacks {', '.join(sorted(missing))}. All are needed. Export the folder again.")
    model, dense = (_found(path, values[name]) for name in ("model", "dense"))
    examples = read_examples(path / "examples") if values["examples"] else ()
    return Sources(str(model), dense, examples, str(values["credit"]))


def launch_space(folder: str | Path) -> None:
    """Serve an exported folder until it is stopped, at the address that the environment names.

    Args:
        folder: That `export_space` wrote.
    """
    sources = read_space(folder)
    service = SegmentationService.load(sources.model, sources.dense)
    serve(build_interface(service, sources), sources, host=None, port=None)


def pinned_requirements() -> list[str]:
    """Return `name==version` of Gradio and of everything that this package needs, as it is installed here.

    Raises:
        RuntimeError: If the package itself is not installed, so that nobody knows what it needs.
    """
    try:
        listed = requires(_PACKAGE) or []
    except PackageNotFoundError as err:
        raise RuntimeError(
            "The package runs from a folder and is not installed. What it needs stands in its metadata. Install it, "
            "or export from where it is installed."
        ) from err
    names = [re.split(r"[\s<>=!~;\[(]", line, maxsplit=1)[0] for line in listed if "extra ==" not in line]
    return sorted(f"{name}=={version(name).partition('+')[0]}" for name in [*names, "gradio"])


def _place(name: str, folder: Path, kind: str) -> str:
    """Copy a model's folder; return its name in the exported folder, or the Hub id as it is."""
    source = Path(resolve_model(name))
    if not source.is_dir():
        return name
    shutil.copytree(source, folder / kind, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return kind


def _found(folder: Path, name: Any) -> str | None:
    if name is None:
        return None
    return str(folder / name) if (folder / str(name)).is_dir() else str(name)


def _copy_examples(sources: Sources, target: Path) -> None:
    if not sources.examples:
        return
    target.mkdir()
    for example in sources.examples:
        shutil.copyfile(example.path, target / example.path.name)
    classes = {example.path.name: example.classes for example in sources.examples if example.classes}
    _write(target / EXAMPLES_FILE, json.dumps(classes, indent=1) + "\n")


def _copy_package(folder: Path) -> None:
    """Copy this package without caches, and without the embedded model: a Space has its models beside it."""
    source = Path(__file__).parents[1]
    embedded = embedded_folder()

    def ignored(path: str, names: list[str]) -> set[str]:
        skipped = {name for name in names if name.startswith((".", "__pycache__")) or name.endswith(".pyc")}
        return skipped | ({EMBEDDED_MODEL} if Path(path) == embedded.parent else set())

    shutil.copytree(source, folder / _PACKAGE, ignore=ignored)
    licence = distribution(_PACKAGE).read_text("licenses/LICENSE")
    if licence is None:
        raise RuntimeError("The installed package has no licence file. A copy must carry it. Install it again.")
    _write(folder / _PACKAGE / "LICENSE", licence)


def _card(values: dict[str, Any], sources: Sources) -> str:
    given = [name for name in (sources.model, sources.dense) if name is not None]
    is_embedded = any(Path(resolve_model(name)) == embedded_folder() for name in given)
    on_hub = [name for kind in ("model", "dense") if (name := values[kind]) not in (None, kind)]
    # Folders of other models lie beside the code, and only their authors know the licence.
    own = "apache-2.0" if len(on_hub) == len(given) else "other"
    front = {
        "title": "Pruned open-vocabulary segmentation",
        "emoji": "\u2702\ufe0f",
        "colorFrom": "indigo",
        "colorTo": "green",
        "sdk": "gradio",
        "sdk_version": version("gradio"),
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        "pinned": False,
        "license": "cc-by-sa-4.0" if is_embedded else own,
        "short_description": "Dense and pruned CLIP side by side, any classes",
    }
    if on_hub:
        front["models"] = on_hub
    # JSON values are YAML, whatever characters a name has.
    lines = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items())
    weights = (
        f"Weights in `model/` and `dense/`: CC BY-SA 4.0. {CREDIT}"
        if is_embedded
        else "The models have the licences of their authors."
    )
    return f"""---
{lines}
---
# {TITLE}

Upload a picture, name anything, and compare a pruned CLIP with the model that it was made from: masks, time,
multiply-accumulates and weights of the same request, on the machine that this Space runs on. The slider sets how
much of the dense model runs, without loading anything.

Run it here with `pip install -r requirements.txt` and `python app.py`.

Code in `hf_opentrans/`: Apache-2.0. {weights}
"""


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
