"""Writing folders and files as a whole: under a temporary name first, then renamed."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_output_folder(folder: str | Path, *, marker: str) -> Path:
    """Return `folder` as a path if it can be written: absent, empty, or an earlier output (it holds `marker`).

    Raises:
        FileExistsError: If it is a file, lies under one, or holds files of someone else.
        OSError: If nothing can be written there.
    """
    path = Path(folder)
    if path.is_file():
        raise FileExistsError(f"{str(path)!r} is a file. The output must be a folder. Choose another name.")
    if path.is_dir() and not (path / marker).exists():
        foreign = sorted(entry.name for entry in path.iterdir())
        if foreign:
            raise FileExistsError(
                f"The folder {str(path)!r} already holds {', '.join(foreign[:3])}{' ...' * (len(foreign) > 3)}. "
                "An output folder must be new, empty, or an earlier output of this command. Choose another folder."
            )
    _check_writable(path.resolve().parent)
    return path


def _check_writable(parent: Path) -> None:
    """Refuse a place where no folder can be made, before work starts whose result would have no place."""
    base = next(place for place in (parent, *parent.parents) if place.exists())
    if not base.is_dir():
        raise FileExistsError(f"{str(base)!r} is a file. No folder can lie in it. Choose another name.")
    try:
        Path(tempfile.mkdtemp(prefix=".writable.", dir=base)).rmdir()
    except OSError as err:
        if is_disk_full(err):
            return  # said when the files are written
        raise OSError(
            err.errno,
            f"{str(base)!r} cannot be written to ({err.strerror}). The output needs a folder of its own. "
            "Choose another place.",
        ) from err


@contextmanager
def write_folder(folder: str | Path, *, marker: str) -> Iterator[Path]:
    """Yield a temporary folder beside `folder` that takes its place when the block ends without an error.

    Args:
        folder: Where the files shall be.
        marker: A file name that every such output holds; an existing folder without it is left alone.

    Raises:
        FileExistsError: See `check_output_folder`.
        OSError: If the disk is full; nothing is left behind.
    """
    path = check_output_folder(folder, marker=marker).resolve()  # through a link, which stays one
    temporary = previous = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        previous = temporary.with_name(temporary.name + ".old")
        yield temporary
        _open_to_others(temporary)
        if path.exists():
            path.rename(previous)
        temporary.rename(path)
        shutil.rmtree(previous, ignore_errors=True)
    except BaseException as err:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if previous is not None and previous.exists() and not path.exists():
            previous.rename(path)
        if is_disk_full(err):
            raise OSError(
                errno.ENOSPC,
                f"No space is left for {str(path)!r}. Nothing was written. Free some space or choose another disk.",
            ) from err
        raise
    finally:
        if previous is not None and path.exists():  # once more, after an interrupt; never the only copy
            shutil.rmtree(previous, ignore_errors=True)


def write_json(path: str | Path, values: Any) -> None:
    """Write one JSON object, replacing an older file as a whole."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_file():  # /dev/stdout and the like cannot be replaced
        target.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def is_disk_full(err: BaseException) -> bool:
    """Tell whether an error means that no space is left (safetensors wraps it in an error of its own)."""
    return getattr(err, "errno", None) == errno.ENOSPC or "No space left on device" in str(err)


def folder_bytes(folder: str | Path, pattern: str = "*") -> int:
    """Return the bytes of all files below `folder` whose names match."""
    return sum(path.stat().st_size for path in Path(folder).rglob(pattern) if path.is_file())


def _open_to_others(folder: Path) -> None:
    """Give a folder and its files the usual permissions: mkdtemp and safetensors make them private to the user."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
