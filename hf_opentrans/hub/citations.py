"""Numbers with a source: every figure of a card is written by a `Ledger`, which notes where it was read.

A number of a card is a run of digits in its text, inline code included. Not text are the metadata at the head, fenced
code blocks, HTML comments, and the targets of links and pictures.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_opentrans.evaluation_protocols import Protocol

Place = tuple[str | int, ...]
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
_NO_TEXT = re.compile(
    r"\A---\n.*?\n---\n|^```.*?^```[^\n]*$|<!--.*?-->|\]\([^)]*\)|https?://[^\s)>\]]+", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Citation:
    """One piece of text of a card, and where its figures come from.

    Args:
        text: As it stands in the card.
        file: Name of the document.
        place: Keys and positions that lead to the value in it.
        rule: "number": the value times `scale`, in the format `spec`. "text": the value itself. "name": the last part
            of a path. "protocol": all knobs of an evaluation protocol in one line. "length": how many values there
            are. "position": the last of `place`.
        spec: Python format of a number.
        scale: Factor on the value.
        over: Place of a value that the number is divided by.
        unit: What follows the number.
    """

    text: str
    file: str
    place: Place
    rule: str = "number"
    spec: str = ""
    scale: float = 1
    over: Place | None = None
    unit: str = ""

    def render(self, documents: Mapping[str, Any]) -> str:
        """Return the text that the documents give for this citation.

        Raises:
            KeyError: If a document or the value in it is missing.
        """
        value = look_up(documents, self.file, self.place)
        if value is None:
            raise KeyError(f"{self.source} is missing")
        if self.rule != "number":
            return _RULES[self.rule](value, self.place)
        number = value * self.scale
        if self.over is not None:
            number /= look_up(documents, self.file, self.over)
        return f"{number:{self.spec}}{self.unit}"

    @property
    def source(self) -> str:
        """Document and place, for people."""
        return f"{self.file}: {'.'.join(str(key) for key in self.place)}"


_RULES: dict[str, Callable[[Any, Place], str]] = {
    "text": lambda value, _: one_line(value),
    "name": lambda value, _: one_line(Path(str(value)).name),
    "protocol": lambda value, _: one_line(Protocol(**value).describe()),
    "length": lambda value, _: str(len(value)),
    "position": lambda _, place: str(place[-1]),
}


class Ledger:
    """Writes values of documents as text, and notes a `Citation` for each.

    Args:
        documents: JSON documents by name.
    """

    def __init__(self, documents: Mapping[str, Any]) -> None:
        self.documents = documents
        self.citations: list[Citation] = []

    def has(self, file: str, *place: str | int) -> bool:
        """Tell whether a document holds a value there that is not None."""
        try:
            return look_up(self.documents, file, place) is not None
        except KeyError:
            return False

    def number(
        self,
        file: str,
        *place: str | int,
        spec: str = "",
        scale: float = 1,
        over: Place | None = None,
        unit: str = "",
    ) -> str:
        """Return a number as text; "-" where there is none."""
        return self._write(Citation("", file, place, "number", spec, scale, over, unit), file, place)

    def text(self, file: str, *place: str | int, rule: str = "text") -> str:
        """Return a value as it is, or by another rule of `Citation`; "-" where there is none."""
        return self._write(Citation("", file, place, rule), file, place)

    def _write(self, draft: Citation, file: str, place: Place) -> str:
        if not self.has(file, *place):
            return "-"
        text = draft.render(self.documents)
        values = {name: getattr(draft, name) for name in ("rule", "spec", "scale", "over", "unit")}
        self.citations.append(Citation(text, file, place, **values))
        return text


def look_up(documents: Mapping[str, Any], file: str, place: Sequence[str | int]) -> Any:
    """Return the value at a place of a document.

    Raises:
        KeyError: If there is none.
    """
    value = documents[file]
    for key in place:
        try:
            value = value[key]
        except (IndexError, TypeError) as err:
            raise KeyError(key) from err
    return value


def one_line(value: Any) -> str:
    """Return a value as text on one line that no Markdown table breaks at."""
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.split()).replace("|", "/")


def card_numbers(text: str) -> list[str]:
    r"""Return every number in the text of a card, in order; see the head of this module for what is text.

    Args:
        text: Markdown.

    Example:
        >>> card_numbers("Keeps 50.1% of 1,122 M.\n\n```python\nf(3)\n```\n")
        ['50.1', '1,122']
    """
    return [match.group().rstrip(",") for match in _NUMBER.finditer(_prose(text))]


def uncited_numbers(text: str, citations: Iterable[Citation]) -> list[str]:
    """Return the numbers of a card that do not lie inside the text of a citation.

    Args:
        text: Markdown.
        citations: Of the card.
    """
    prose = _prose(text)
    covered = [False] * len(prose)
    for cited in {citation.text for citation in citations}:
        if _NUMBER.search(cited):
            whole = re.compile(rf"(?<![\d.,]){re.escape(cited)}(?![\d])(?![.,]\d)")
            for match in whole.finditer(prose):
                covered[match.start() : match.end()] = [True] * len(match.group())
    return [match.group() for match in _NUMBER.finditer(prose) if not covered[match.start()]]


def _prose(text: str) -> str:
    return _NO_TEXT.sub(" ", text)
