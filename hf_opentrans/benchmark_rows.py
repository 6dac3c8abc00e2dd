"""The JSON file of a benchmark that goes on row by row, and how times are told."""

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from hf_opentrans._files import write_json
from hf_opentrans.benchmarks import environment


class _Row(Protocol):
    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        ...


_T = TypeVar("_T", bound=_Row)


class RowFile(Generic[_T]):
    """The rows of a benchmark and the JSON file that holds them after every row.

    Args:
        path: The file; None keeps the rows in memory alone.
        settings: What all rows depend on, JSON-ready. A file with other settings, or measured with other versions or
            on another machine, is not continued.
        command: What the user typed.

    Raises:
        ValueError: If the file is there and holds something else.
    """

    row_type: ClassVar[Any]
    written_by: ClassVar[str]

    def __init__(self, path: Path | None, settings: dict[str, Any], command: str) -> None:
        self.path, self.command = path, command
        self.settings = json.loads(json.dumps(settings))
        self.environment = environment()
        self.rows: list[_T] = []
        # A device such as /dev/stdout takes one object, at the end.
        self.is_device = path is not None and path.exists() and not path.is_file()
        if path is not None and path.exists() and not self.is_device:
            self._load(path)

    def _load(self, path: Path) -> None:
        fix = "Name another file with --json, or delete this one to measure everything again."
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            before, stack = values["settings"], values["environment"]
            self.rows = [self.row_type(**row) for row in values["rows"]]
            self.read_more(values)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"The file {str(path)!r} is no result of `{self.written_by}` that can be continued ({error!r}). A "
                f"benchmark only adds to its own results. {fix}"
            ) from error
        pairs = [(before, self.settings), (stack, self.environment)]
        changed = [
            f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
            for old, new in pairs
            for name in sorted({*old, *new})
            if old.get(name) != new.get(name)
        ]
        if changed:
            raise ValueError(
                f"The file {str(path)!r} was measured with other settings: {'; '.join(changed)}. All rows of a file "
                f"must be comparable. {fix}"
            )

    def read_more(self, values: dict[str, Any]) -> None:
        """Take what the file holds beside rows from its object; for subclasses."""

    def more(self) -> dict[str, Any]:
        """Return what the file holds beside rows; for subclasses."""
        return {}

    def add(self, row: _T) -> None:
        """Append a finished row and write the file."""
        self.rows.append(row)
        self.save()

    def put(self, position: int, row: _T) -> None:
        """Put another row in the place of one, and write the file."""
        self.rows[position] = row
        self.save()

    def save(self, *, at_end: bool = False) -> None:
        """Replace the file as a whole.

        Args:
            at_end: Whether no more rows will come; a device such as /dev/stdout is only written then.
        """
        if self.path is not None and self.is_device == at_end:
            values = {"command": self.command, "settings": self.settings, "rows": [row.to_dict() for row in self.rows]}
            write_json(self.path, {**values, **self.more(), "environment": self.environment})


def fingerprint(path: Path) -> str:
    """Return a short hash of the names and sizes of all files below a folder, or of one file's size.

    It notices other images under an old name, whatever folder the command was started in.
    """
    files = sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
    listed = "\n".join(f"{entry.relative_to(path).as_posix()} {entry.stat().st_size}" for entry in files)
    return hashlib.sha256(listed.encode()).hexdigest()[:12]


def duration(seconds: float) -> str:
    """Return a time for people: seconds below two minutes, minutes below two hours, then hours."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
