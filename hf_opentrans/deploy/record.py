"""What lies beside exported files: `export.json`, with their origin, how they were checked, and their hashes."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hf_opentrans.deploy.vocabularies import vocabulary_from_dict

EXPORT_FILE = "export.json"
# Number of the layout of export.json; a reader refuses others.
SCHEMA = 1
MODEL_STEM, TEXT_STEM = "model", "text"
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2"}
# What exports of earlier versions lack.
_OPTIONAL = {"ensemble"}
_CHUNK = 2**20

# What the fields must be in the file, of those that loading depends on.
_KINDS = {"image_size": list, "inputs": list, "outputs": list, "folded": list, "files": dict, "patch_size": int}
_KINDS |= {"format": str, "precision": str, "model_class": str, "templates": str}


@dataclass(frozen=True)
class ExportRecord:
    """The content of `export.json`.

    Args:
        format: "onnx", "openvino" or "torch-export".
        precision: See `PRECISIONS`; it is applied again when the files are loaded.
        model_class: Class of the exported model.
        source: Hub id of the exported model, or the last part of its folder.
        fingerprint: Hash of class, configuration and weights of the exported model.
        text_fingerprint: Hash of its text tower; None where it has none. Text embeddings belong to one text tower.
        text_dim: Width of its text embeddings; None where it has none.
        mode: How the last block is read; None for towers.
        image_size: `(height, width)` of the images in pixels, fixed.
        patch_size: In pixels.
        templates: Prompt templates that names go through by default.
        vocabulary: The fixed one, see `vocabulary_to_dict`; None where text embeddings are an input.
        inputs: Names of the graph's inputs.
        outputs: Names of the graph's outputs.
        folded: What was computed once and for all, in words.
        computed_in: What the runtime computed in during the comparison: "f32" where it was asked for bfloat16 and the
            processor has none.
        parity: Comparison with the model in PyTorch by kind of input, see `Parity`, and its limits.
        versions: Of what took part.
        files: Bytes and SHA-256 of every file, by name.
        schema: Number of this layout.
        ensemble: Of FC-CLIP without a fixed vocabulary, what the weights of its two classifications follow from: the
            names seen in training, and the weights of seen and of other classes.
    """

    format: str
    precision: str
    model_class: str
    source: str
    fingerprint: str
    text_fingerprint: str | None
    text_dim: int | None
    mode: str | None
    image_size: tuple[int, int]
    patch_size: int
    templates: str
    vocabulary: dict[str, Any] | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    folded: tuple[str, ...]
    computed_in: str
    parity: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]
    schema: int = SCHEMA
    ensemble: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what `export.json` holds."""
        return asdict(self)

    @property
    def model_file(self) -> str:
        """Name of the file with the graph."""
        return MODEL_STEM + SUFFIXES[self.format]

    @property
    def text_file(self) -> str | None:
        """Name of the file with the text tower; None where there is none."""
        name = TEXT_STEM + SUFFIXES[self.format]
        return name if name in self.files else None

    @classmethod
    def load(cls, folder: str | Path) -> "ExportRecord":
        """Read `export.json`.

        Raises:
            FileNotFoundError: If the folder holds no export.
            ValueError: If the file is damaged or of another version of this package.
        """
        path = Path(folder) / EXPORT_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no {EXPORT_FILE} in {str(folder)!r}. An exported model is a folder that `hf-opentrans "
                "export` wrote. Check the path, or export the model."
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as err:
            raise ValueError(f"{str(path)!r} is not valid JSON ({err}). Export or copy the model again.") from err
        known = {item.name for item in fields(cls)}
        needed = known - _OPTIONAL
        if not isinstance(values, dict) or values.get("schema") != SCHEMA or not needed <= set(values) <= known:
            found = values.get("schema") if isinstance(values, dict) else None
            raise ValueError(
                f"{str(path)!r} has the layout {found!r}. This version of hf_opentrans reads layout {SCHEMA} with the "
                f"fields {', '.join(sorted(known))}. Export the model again."
            )
        wrong = [name for name, kind in _KINDS.items() if not isinstance(values[name], kind)]
        wrong = wrong or [name for name, is_right in _CHECKS.items() if not is_right(values[name])]
        if wrong:
            raise ValueError(
                f"{str(path)!r} is damaged: {', '.join(wrong)} cannot be read. It must be as `hf-opentrans export` "
                "wrote it. Copy it again, or export the model again."
            )
        if values["format"] not in SUFFIXES:
            raise ValueError(
                f"{str(path)!r} names the format {values['format']!r}. It must be one of {', '.join(SUFFIXES)}. "
                "Export the model again."
            )
        for name in ("image_size", "inputs", "outputs", "folded"):
            values[name] = tuple(values[name])
        return cls(**values)

    def check_files(self, folder: str | Path) -> None:
        """Compare size and hash of every file with what was written.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is not what was written.
        """
        for name, written in self.files.items():
            path = Path(folder) / name
            if not path.is_file():
                raise FileNotFoundError(
                    f"{name} is missing in {str(folder)!r}. {EXPORT_FILE} lists {', '.join(self.files)}. "
                    "Copy the whole folder, or export the model again."
                )
            size = path.stat().st_size
            if size != written["bytes"]:
                cut = "cut short" if size < written["bytes"] else "longer than it was"
                raise ValueError(
                    f"{str(path)!r} is {cut}: it has {size} bytes, and {EXPORT_FILE} says {written['bytes']}. "
                    "Copy the file again, or export the model again."
                )
            if file_sha256(path) != written["sha256"]:
                raise ValueError(
                    f"{str(path)!r} was changed or is damaged: its SHA-256 is not the one in {EXPORT_FILE}. "
                    "Copy the file again, or export the model again."
                )


def _are_file_entries(entries: dict[str, Any]) -> bool:
    return all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        for entry in entries.values()
    )


def _is_vocabulary(values: Any) -> bool:
    try:
        return values is None or len(vocabulary_from_dict(values).queries) > 0
    except (TypeError, ValueError):
        return False


# What the fields must hold, where they are of the right kind.
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "image_size": lambda sides: len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides),
    "patch_size": lambda side: side > 0,
    "files": _are_file_entries,
    "vocabulary": _is_vocabulary,
}


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return bytes and SHA-256 of all files of a folder, by name."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths}


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, reading it in parts."""
    found = hashlib.sha256()
    with path.open("rb") as opened:
        while part := opened.read(_CHUNK):
            found.update(part)
    return found.hexdigest()


def total_bytes(files: Mapping[str, Mapping[str, Any]], stem: str) -> int:
    """Return the bytes of the files of a graph: it and its weights, where they lie beside it."""
    return sum(entry["bytes"] for name, entry in files.items() if name.startswith(f"{stem}."))
