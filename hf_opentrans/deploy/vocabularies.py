"""Vocabularies as a user names them, in the record of an export, and whose their embeddings are."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_opentrans.models.vocabulary import VOCABULARY_FILE, Vocabulary

_LIST_SUFFIXES = (".json", ".txt")
_SHOWN = 12  # digits of a fingerprint


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
            or the folder of a saved vocabulary (`Vocabulary.save_pretrained`) or its vocabulary.json.
        templates: Prompt templates for names; a saved vocabulary has its own.

    Raises:
        FileNotFoundError: If it looks like a file and there is none.
        ValueError: If the file cannot be read, or the names are not usable.
        TypeError: If a file holds no list, or a name is no text.
    """
    path = Path(text)
    if is_saved_vocabulary(path):
        return load_vocabulary(path)
    if path.suffix.lower() not in _LIST_SUFFIXES:
        return Vocabulary.parse(text, templates=templates)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no vocabulary file {text!r}. It must exist. Check the path, or give the names themselves: "
            "'cat; sofa, couch'."
        )
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as err:
        raise ValueError(
            f"The vocabulary {str(path)!r} is not UTF-8 ({err}). Names are read as UTF-8. Save it in that encoding."
        ) from err
    if path.suffix.lower() == ".txt":
        lines = [line.split(",") for line in content.splitlines() if line.strip()]
        return Vocabulary(lines, templates=templates)
    return Vocabulary(_classes_of_json(content, path), templates=templates)


def load_vocabulary(path: Path) -> Vocabulary:
    """Read what `Vocabulary.save_pretrained` wrote.

    Args:
        path: The folder, or the vocabulary.json in it.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a file is damaged.
    """
    if not is_saved_vocabulary(path):
        raise FileNotFoundError(
            f"There is no {VOCABULARY_FILE} in {str(path)!r}. A saved vocabulary has one. Write it with "
            "Vocabulary.save_pretrained, or give the names themselves."
        )
    return Vocabulary.from_pretrained(path.parent if path.name == VOCABULARY_FILE else path)


def is_saved_vocabulary(path: Path) -> bool:
    """Say whether a path is a folder that `Vocabulary.save_pretrained` wrote to, or the vocabulary.json in it."""
    try:
        return path.is_file() if path.name == VOCABULARY_FILE else (path / VOCABULARY_FILE).is_file()
    except OSError:  # names that are too long for a path
        return False


def check_encoder(vocabulary: Vocabulary, text_fingerprint: str | None) -> None:
    """Refuse a vocabulary whose embeddings another text tower made.

    Embeddings that the user made tell nothing of where they are from, and pass.

    Args:
        vocabulary: Encoded or not.
        text_fingerprint: Of the text tower that its embeddings must be of.

    Raises:
        ValueError: If another one made them.
    """
    encoder = vocabulary.encoder
    if vocabulary.text_embeddings is None or encoder is None or encoder == text_fingerprint:
        return
    raise ValueError(
        f"The vocabulary was made with another model: its text tower has the fingerprint {encoder[:_SHOWN]}, this "
        f"one's has {(text_fingerprint or 'none')[:_SHOWN]}. Embeddings of different text towers cannot be compared. "
        "Encode the names with this model."
    )


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
