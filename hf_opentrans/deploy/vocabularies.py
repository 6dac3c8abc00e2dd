"""Vocabularies on disk: lists of names, and encoded ones that belong to one text tower."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_opentrans.models.vocabulary import Vocabulary

ENCODED_SUFFIX = ".safetensors"
_LIST_SUFFIXES = (".json", ".txt")


def vocabulary_to_dict(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return classes, templates and alias rule of a vocabulary, without its embeddings."""
    return {
        "classes": [list(group) for group in vocabulary.classes],
        "templates": list(vocabulary.templates),
        "is_merged": vocabulary.is_merged,
    }


def vocabulary_from_dict(values: Mapping[str, Any]) -> Vocabulary:
    """Return the vocabulary that `vocabulary_to_dict` was given, not encoded.

    Raises:
        ValueError: If a field is missing.
    """
    missing = {"classes", "templates", "is_merged"} - set(values)
    if missing:
        raise ValueError(f"The stored vocabulary lacks {sorted(missing)}. All fields are needed. Store it again.")
    found = Vocabulary(values["classes"], templates=values["templates"])
    return found.merged() if values["is_merged"] else found


def read_vocabulary(text: str, *, templates: str) -> Vocabulary:
    """Read what a user names as a vocabulary.

    Args:
        text: Names such as "cat; sofa, couch" (classes separated by ";", aliases by ","); or a file: .json with a list
            whose entries are names, "a; b", or lists of names; .txt with one class per line in the form of ",";
            .safetensors of `save_vocabulary`, without a check of where it comes from.
        templates: Prompt templates for names; an encoded file has its own.

    Raises:
        FileNotFoundError: If it looks like a file and there is none.
        ValueError: If the file cannot be read, or the names are not usable.
        TypeError: If a file holds no list, or a name is no text.
    """
    path = Path(text)
    if path.suffix.lower() not in (*_LIST_SUFFIXES, ENCODED_SUFFIX):
        return Vocabulary.parse(text, templates=templates)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no vocabulary file {text!r}. It must exist. Check the path, or give the names themselves: "
            "'cat; sofa, couch'."
        )
    if path.suffix.lower() == ENCODED_SUFFIX:
        return load_vocabulary(path)[0]
    content = path.read_text(encoding="utf-8")
    if path.suffix.lower() == ".txt":
        lines = [line.split(",") for line in content.splitlines() if line.strip()]
        return Vocabulary(lines, templates=templates)
    return Vocabulary(_classes_of_json(content, path), templates=templates)


def save_vocabulary(vocabulary: Vocabulary, path: str | Path, *, text_fingerprint: str) -> None:
    """Write an encoded vocabulary to a .safetensors file, with the text tower that it belongs to.

    Args:
        vocabulary: With text embeddings.
        path: File to write; an older one is replaced.
        text_fingerprint: Of the text tower that encoded it.

    Raises:
        ValueError: If it is not encoded, or the file is named otherwise.
    """
    target = Path(path)
    if target.suffix.lower() != ENCODED_SUFFIX:
        raise ValueError(f"The file is named {target.name!r}. It must end in {ENCODED_SUFFIX}. Rename it.")
    if vocabulary.text_embeddings is None:
        raise ValueError("The vocabulary is not encoded. Only its embeddings are worth a file. Encode it first.")
    metadata = {"vocabulary": json.dumps(vocabulary_to_dict(vocabulary)), "text_fingerprint": text_fingerprint}
    embeddings = vocabulary.text_embeddings.detach().cpu().float().contiguous()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}")
    try:
        save_file({"text_embeddings": embeddings}, temporary, metadata=metadata)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def load_vocabulary(path: str | Path, *, text_fingerprint: str | None = None) -> tuple[Vocabulary, str]:
    """Read an encoded vocabulary, and the fingerprint of its text tower.

    Args:
        path: File of `save_vocabulary`.
        text_fingerprint: Refuse a file that another text tower made.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such file, or another model made it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no vocabulary file {str(path)!r}. It must exist. Check the path.")
    try:
        with safe_open(str(path), framework="pt") as opened:
            metadata = opened.metadata() or {}
            embeddings = opened.get_tensor("text_embeddings")
        values, found = json.loads(metadata["vocabulary"]), metadata["text_fingerprint"]
    except (SafetensorError, KeyError, json.JSONDecodeError) as err:
        raise ValueError(
            f"{str(path)!r} is no encoded vocabulary ({err}). It must be a file of `save_vocabulary`. Encode the "
            "names again."
        ) from err
    vocabulary = vocabulary_from_dict(values)
    if embeddings.shape[0] != len(vocabulary.queries):
        raise ValueError(
            f"{str(path)!r} holds {embeddings.shape[0]} embeddings for {len(vocabulary.queries)} names. There must be "
            "one each. Encode the names again."
        )
    if text_fingerprint is not None and found != text_fingerprint:
        raise ValueError(
            f"The vocabulary {str(path)!r} was made with another model: its text tower has the fingerprint {found}, "
            f"this one's has {text_fingerprint}. Embeddings of different text towers cannot be compared. Encode the "
            "names with this model."
        )
    object.__setattr__(vocabulary, "text_embeddings", embeddings)  # frozen; nobody else holds it yet
    return vocabulary, found


def _classes_of_json(content: str, path: Path) -> list[Any]:
    try:
        values = json.loads(content)
    except json.JSONDecodeError as err:
        raise ValueError(f"The vocabulary {str(path)!r} is not valid JSON ({err}). Correct it.") from err
    if not isinstance(values, list):
        raise TypeError(
            f"The vocabulary {str(path)!r} holds a {type(values).__name__}. It must be a list of names, such as "
            '["cat", "sofa; couch", ["person", "child"]]. Correct it.'
        )
    return values
