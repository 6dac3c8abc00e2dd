"""The names to segment by: classes, their aliases, prompt templates and the text embeddings of all of them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .prompt_templates import resolve_templates

BACKGROUND_NAME = "background"
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
