"""The names to segment by: classes, their aliases, prompt templates and the text embeddings of all of them."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import load_state_dict_from_file, save_torch_state_dict
from transformers.utils.hub import cached_file

from .prompt_templates import resolve_templates

BACKGROUND_NAME = "background"
VOCABULARY_FILE = "vocabulary.json"
EMBEDDINGS_FILE = "vocabulary.safetensors"
_FORMAT = {"format": "open-vocabulary", "version": 1}
_MAX_FILE_BYTES = 64 * 2**20  # a hundred thousand names have about 2 MB
# The 26 words that SCLIP and NACLIP use for "everything else" on Pascal VOC with background and COCO-Object, and
# ProxyCLIP and Trident on Pascal VOC.
_WORDS26 = """sky wall tree wood grass road sea river mountain sands desk bed building cloud lamp door window wardrobe
ceiling shelf curtain stair floor hill rail fence"""
# The 17 words of ProxyCLIP and Trident on COCO-Object.
_WORDS17 = "sky wall tree wood grass road sea river mountain sands desk bed building cloud floor hill rail"
BACKGROUND_WORDS = tuple(_WORDS26.split())
# "background" itself is what ClearCLIP says everywhere, and all of them on PASCAL-Context.
BACKGROUND_PRESETS: dict[str, tuple[str, ...]] = {
    "words26": BACKGROUND_WORDS,
    "words17": tuple(_WORDS17.split()),
    BACKGROUND_NAME: (BACKGROUND_NAME,),
}


@dataclass(frozen=True)
class Vocabulary:
    """Class names with aliases, ready to be compared with image tokens.

    Args:
        classes: One entry per class: a name, names joined by ";" (`"sofa; couch"`), or a sequence of names. The first
            name is the label that results show; every alias becomes a query of its own.
        templates: Name of the prompt templates ("plain", "photo", "vild14", "imagenet80"), or templates with one `{}`.
        background: Words that together form one more class, "background", behind the others; or the name of one of
            the published lists in `BACKGROUND_PRESETS`: "words26" (SCLIP, NACLIP), "words17" (ProxyCLIP, Trident), or
            "background", the word itself. None adds no class.

    Raises:
        ValueError: If there is no class, a name is empty, or two classes have the same label (an alias may recur).

    Example:
        >>> Vocabulary(["cat", "sofa; couch"]).names
        ('cat', 'sofa')
    """

    classes: Sequence[str | Sequence[str]]
    templates: str | Sequence[str] = "photo"
    background: str | Sequence[str] | None = None
    text_embeddings: torch.Tensor | None = field(default=None, repr=False, compare=False)
    is_merged: bool = field(default=False, repr=False)
    encoder: str | None = field(default=None, repr=False, compare=False)  # fingerprint of what made the embeddings

    def __post_init__(self) -> None:
        if isinstance(self.classes, str):
            raise TypeError(
                f"The classes are one string, {self.classes!r}. They must be a list with one entry per class. "
                'Give ["cat", "dog"], or use Vocabulary.parse("cat; dog").'
            )
        aliases = [_aliases(entry, index) for index, entry in enumerate(self.classes)]
        if not aliases:
            raise ValueError("The vocabulary has no class. It needs at least one. Give names such as ['cat', 'dog'].")
        if self.background is not None:
            aliases.append(background_class(self.background, aliases))
        _refuse_duplicates([group[0] for group in aliases])
        object.__setattr__(self, "classes", tuple(aliases))
        object.__setattr__(self, "templates", resolve_templates(self.templates))
        object.__setattr__(self, "background", None)

    @classmethod
    def parse(cls, text: str, **options: Any) -> "Vocabulary":
        """Read the command line's form: classes separated by ";", aliases of one class by ","."""
        parts = text.split(";")
        if len(parts) > 1 and not parts[-1].strip():
            parts = parts[:-1]  # a trailing separator
        return cls([part.split(",") for part in parts], **options)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None, **hub: Any) -> "Vocabulary":
        """Read the vocabulary of a folder or Hub repository.

        Args:
            source: A folder, or the name of a repository.
            revision: Commit, tag or branch on the Hub.
            **hub: `token`, `cache_dir`, `local_files_only`, `subfolder`.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If its file is damaged.
        """
        found = cls.find(source, revision=revision, **hub)
        if found is None:
            raise FileNotFoundError(
                f"There is no {VOCABULARY_FILE} in {str(source)!r}. A saved vocabulary has one. Write it with "
                "Vocabulary.save_pretrained, or check the name."
            )
        return found

    @classmethod
    def find(cls, source: str | Path, **hub: Any) -> "Vocabulary | None":
        """Read as `from_pretrained` does; None where the folder or repository has no vocabulary or is out of reach."""
        path = _locate(source, VOCABULARY_FILE, hub)
        if path is None:
            return None
        values = _read_object(path)
        try:
            read = cls(values["names"], templates=values["templates"], background=values["background"])
            read = replace(read, is_merged=bool(values["merged"]))
            made_by = values["embeddings"]
            # Names that were edited by hand have other embeddings.
            if made_by is None or made_by["vocabulary"] != read.fingerprint:
                return read
            encoder = str(made_by["encoder"])
        except (KeyError, TypeError, ValueError) as err:
            raise ValueError(
                f"{str(path)!r} is no valid vocabulary: {err}. It needs names, templates, background, merged and "
                "embeddings, as Vocabulary.save_pretrained writes them. Write it again."
            ) from err
        return replace(
            read, text_embeddings=_read_embeddings(_locate(source, EMBEDDINGS_FILE, hub), read), encoder=encoder
        )

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `vocabulary.json`, and `vocabulary.safetensors` if the vocabulary is encoded.

        Beside a model it is what the pipeline asks for where no labels are given. Embeddings are stored with the
        fingerprint of the text tower that made them: another model makes its own.

        Args:
            folder: Where to; created if it is missing. An earlier vocabulary in it is replaced.

        Returns:
            The path of `vocabulary.json`.
        """
        target = Path(folder) / VOCABULARY_FILE
        target.parent.mkdir(parents=True, exist_ok=True)
        groups, background = list(self.classes), None
        *others, last = groups
        words = list(last[1:] or last)
        if others and last == background_class(words, others):
            groups, background = others, words
        # Of embeddings that the user made nobody could tell whose they are.
        tensor = None if self.encoder is None else self.text_embeddings
        embeddings = None if tensor is None else {"encoder": self.encoder, "vocabulary": self.fingerprint}
        values = {
            **_FORMAT,
            "names": [list(group) for group in groups],
            "templates": list(self.templates),
            "background": background,
            "merged": self.is_merged,
            "embeddings": embeddings,
        }
        with tempfile.TemporaryDirectory(prefix=".vocabulary.", dir=target.parent) as temporary:
            if tensor is None:
                target.with_name(EMBEDDINGS_FILE).unlink(missing_ok=True)
            else:
                tensors = {"text_embeddings": tensor.detach().cpu()}
                save_torch_state_dict(tensors, temporary, filename_pattern="vocabulary{suffix}.safetensors")
                Path(temporary, EMBEDDINGS_FILE).replace(target.with_name(EMBEDDINGS_FILE))
            Path(temporary, VOCABULARY_FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
            Path(temporary, VOCABULARY_FILE).replace(target)
        return target

    @property
    def names(self) -> tuple[str, ...]:
        """The label of each class."""
        return tuple(group[0] for group in self.classes)

    @property
    def queries(self) -> tuple[str, ...]:
        """All names of all classes, in the order of `text_embeddings`; of a merged vocabulary the labels."""
        return self.names if self.is_merged else self._all_names

    @property
    def query_to_class(self) -> torch.Tensor:
        """Class index of every query, of shape `(queries,)`."""
        return torch.arange(len(self.classes)) if self.is_merged else self._owners

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the names, aliases and templates, and of whether aliases are merged."""
        merged = ["merged"] if self.is_merged else []
        return hashlib.sha256(json.dumps([self.classes, self.templates, *merged]).encode()).hexdigest()

    @property
    def _all_names(self) -> tuple[str, ...]:
        return tuple(name for group in self.classes for name in self._spoken(group))

    @property
    def _owners(self) -> torch.Tensor:
        return torch.tensor([i for i, group in enumerate(self.classes) for _ in self._spoken(group)])

    def encode(self, embed: Callable[[list[str]], torch.Tensor], batch_size: int = 256) -> "Vocabulary":
        """Return the same vocabulary with `text_embeddings` of shape `(queries, dim)`, unit length.

        Every name goes through every template; the unit embeddings are averaged and normalised again (CLIP). Of a
        merged vocabulary the names of a class are then averaged and normalised once more.

        Args:
            embed: Maps a list of texts to embeddings of shape `(texts, dim)`.
            batch_size: Texts per call.
        """
        texts = [template.format(name) for name in self._all_names for template in self.templates]
        parts = [embed(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)]
        embeddings = torch.nn.functional.normalize(torch.cat(parts).float(), dim=-1)
        mean = torch.nn.functional.normalize(embeddings.unflatten(0, (-1, len(self.templates))).mean(1), dim=-1)
        return replace(self, text_embeddings=self._class_means(mean) if self.is_merged else mean)

    def merged(self) -> "Vocabulary":
        """Return the vocabulary with one query per class: the normalised mean of its names' embeddings.

        This is the alias rule "mean_embedding". The labels stay; a vocabulary that is not encoded yet is merged when
        it is encoded.

        Example:
            >>> Vocabulary(["cat", "sofa; couch"]).merged().queries
            ('cat', 'sofa')
        """
        embeddings = self.text_embeddings
        if embeddings is not None and not self.is_merged:
            embeddings = self._class_means(embeddings)
        return replace(self, text_embeddings=embeddings, is_merged=True)

    def _class_means(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Average the unit embeddings of all names by class; the mean points where their sum does."""
        sums = embeddings.new_zeros(len(self.classes), embeddings.shape[1])
        sums.index_add_(0, self._owners.to(embeddings.device), embeddings)
        return torch.nn.functional.normalize(sums, dim=-1)

    @staticmethod
    def _spoken(group: Sequence[str]) -> Sequence[str]:
        # "background" with a list of words stands for the words, not for the word itself.
        return group[1:] if group[0] == BACKGROUND_NAME and len(group) > 1 else group


def background_class(background: str | Sequence[str], others: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return the names of the class "background": its label, then the words that it stands for.

    Args:
        background: A name in `BACKGROUND_PRESETS`, words joined by ";", or a sequence of words.
        others: Names of the other classes. A word that the user asks for is a class of its own, not background.
    """
    known = BACKGROUND_PRESETS.get(background) if isinstance(background, str) else None
    wanted = {name.casefold() for group in others for name in group}
    words = known or _aliases(background, len(others))
    return tuple(dict.fromkeys([BACKGROUND_NAME, *(word for word in words if word.casefold() not in wanted)]))


def _aliases(entry: str | Iterable[str], index: int) -> tuple[str, ...]:
    """Split and clean the names of one class; the first is its label."""
    names = entry.split(";") if isinstance(entry, str) else list(entry)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise TypeError(f"Class {index + 1} holds {wrong[0]!r}. Names must be strings. Correct the labels.")
    cleaned = [" ".join(name.split()) for name in names]
    if not cleaned or not all(cleaned):
        raise ValueError(
            f"Class {index + 1} of the labels has an empty name. Every class and alias needs at least one letter. "
            "Remove the extra separator or fill in the name."
        )
    return tuple(dict.fromkeys(cleaned))


def _refuse_duplicates(names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name.casefold() in seen:
            raise ValueError(
                f"The label {name!r} occurs twice. Class names must be unique. Remove one, or make it an alias of "
                "another class."
            )
        seen.add(name.casefold())


def _locate(source: str | Path, name: str, hub: dict[str, Any]) -> Path | None:
    """Return the path of a file of a folder or repository, downloaded if need be; None where there is none."""
    found = cached_file(
        str(source),
        name,
        **hub,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _read_object(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise ValueError(f"{str(path)!r} is larger than {_MAX_FILE_BYTES} bytes. No vocabulary is. Remove it.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:  # bad JSON, bad UTF-8
        raise ValueError(f"{str(path)!r} is not valid JSON ({err}). Save or download the vocabulary again.") from err
    if not isinstance(values, dict) or {key: values.get(key) for key in _FORMAT} != _FORMAT:
        raise ValueError(
            f"{str(path)!r} is no vocabulary that this version reads. It must say {_FORMAT}. Write it with "
            "Vocabulary.save_pretrained, or use a newer version."
        )
    return values


def _read_embeddings(path: Path | None, vocabulary: Vocabulary) -> torch.Tensor:
    if path is None:
        raise ValueError(
            f"{VOCABULARY_FILE} names embeddings, and {EMBEDDINGS_FILE} is missing. Both belong together. Copy it, or "
            "save the vocabulary again."
        )
    try:
        embeddings = load_state_dict_from_file(path)["text_embeddings"]
    except (KeyError, OSError, ValueError, RuntimeError) as err:
        # Not with the library's own words: they advise to load pickles.
        raise ValueError(
            f"{str(path)!r} is damaged. It must be a safetensors file with text_embeddings. Save or download the "
            "vocabulary again."
        ) from err
    if embeddings.ndim != 2 or len(embeddings) != len(vocabulary.queries):
        raise ValueError(
            f"{str(path)!r} holds embeddings of shape {tuple(embeddings.shape)}. There must be one row for each of "
            f"the {len(vocabulary.queries)} names. Save the vocabulary again."
        )
    return embeddings
