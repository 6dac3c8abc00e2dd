"""The licence of the base weights, which pruned weights carry on: given, read from a model card, or unknown."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hf_opentrans.loading import EMBEDDED_MODEL, embedded_folder

CARD_FILE = "README.md"
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True)
class Licence:
    """A licence as the metadata of a model card name it.

    Args:
        identifier: Of the Hub's list, for example "mit" or "cc-by-sa-4.0"; "other" needs a name.
        name: Of another licence.
        link: To its text.

    Raises:
        ValueError: If the identifier cannot be one.
    """

    identifier: str
    name: str | None = None
    link: str | None = None

    def __post_init__(self) -> None:
        if not _IDENTIFIER.fullmatch(self.identifier):
            raise ValueError(
                f"The licence is {self.identifier!r}. The Hub names licences in small letters, such as mit, "
                "apache-2.0 or cc-by-sa-4.0. Give one of its list, or leave it out."
            )

    def to_dict(self) -> dict[str, str]:
        """Return the fields of a card's metadata."""
        values = {"license": self.identifier, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in values.items() if value}

    @classmethod
    def from_metadata(cls, values: Any) -> "Licence | None":
        """Read the metadata of a card; None where they name no licence, or several."""
        found = values.get("license") if values else None
        if not isinstance(found, str) or not _IDENTIFIER.fullmatch(found.lower()):
            return None
        name, link = values.get("license_name"), values.get("license_link")
        return cls(found.lower(), str(name) if name else None, str(link) if link else None)


def is_hub_id(name: str) -> bool:
    """Tell whether a name can be "owner/name" on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        ValueError: If it cannot.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as err:
        raise ValueError(
            f"The repository is {repo_id!r}. It must be owner/name, of letters, digits, '-', '_' and '.'. Correct it."
        ) from err


def base_folder(base: str | Path | None, base_model: str | None) -> Path | None:
    """Return the folder of the base model: the one given, or that of the shipped model.

    Raises:
        FileNotFoundError: If the one given is none.
    """
    if base is None:
        return embedded_folder() if base_model == EMBEDDED_MODEL else None
    folder = embedded_folder() if str(base) == EMBEDDED_MODEL else Path(base)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"There is no model folder {str(base)!r}. The base is the folder of the dense model, with config.json. "
            "Check the path, or leave it out."
        )
    return folder


def find_licence(
    given: "str | Licence | None", folder: Path | None, base_model: str | None, revision: str | None
) -> Licence | None:
    """Return the licence of the base weights: as given, of the base's folder, or of its card in the local cache.

    Args:
        given: An identifier of the Hub, or a licence.
        folder: Of the base model.
        base_model: Its name.
        revision: Its commit.

    Returns:
        None where it is unknown: a licence is never guessed.

    Raises:
        ValueError: If the given one cannot be a licence.
    """
    if given is not None:
        return given if isinstance(given, Licence) else Licence(given)
    if folder is not None and (folder / CARD_FILE).is_file():
        return licence_of_card(folder / CARD_FILE)
    if base_model is not None and is_hub_id(base_model):
        cached = try_to_load_from_cache(base_model, CARD_FILE, revision=revision)
        return licence_of_card(Path(cached)) if isinstance(cached, str) else None
    return None


def licence_of_card(path: Path) -> Licence | None:
    """Return the licence that the metadata of a model card name; None where they name none."""
    text = path.read_text(encoding="utf-8")
    if not text.startswith("---"):
        return None
    return Licence.from_metadata(ModelCard(text, ignore_metadata_errors=True).data.to_dict())
