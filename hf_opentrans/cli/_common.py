"""What all commands share: the app, errors in one sentence, tables, JSON."""

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_opentrans._files import is_disk_full, write_json
from hf_opentrans.benchmarks import environment

USAGE_EXIT, FAILURE_EXIT, INTERRUPTED_EXIT = 2, 1, 130
# Options that take several values: `--keep 0.7 0.5` is `--keep 0.7 --keep 0.5`.
SEVERAL = {"--benchmark", "--frameworks", "--keep", "--methods", "--batch", "--models", "--rules", "--runs", "--set"}
SEVERAL |= {"--budgets", "--data", "--evaluation", "--precision", "--resolution", "--resolutions", "--runtimes"}
SEVERAL |= {"--structures"}

app = typer.Typer(
    help="Prune a CLIP image encoder once, without labels; segment by text; save it; load it anywhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Rich assumes 80 columns where nobody watches: too few for the tables of a log.
LOG_WIDTH = None if sys.stdout.isatty() else 120
out, err = Console(width=LOG_WIDTH), Console(stderr=True)


LIST_ITEM = "\n  - "


def repeat_options(arguments: list[str]) -> list[str]:
    """Rewrite `benchmark ... --keep 0.7 0.5` as repeated options, the only form that the parser knows."""
    several = ("autotune", "benchmark", "card", "evaluate", "prune-elastic", "push", "sparsify")
    if not arguments or arguments[0] not in several:
        return arguments
    result: list[str] = []
    current: str | None = None
    fresh = False
    for argument in arguments:
        if argument.startswith("--"):
            current, fresh = (argument, True) if argument in SEVERAL else (None, False)
        elif current is not None and not fresh:
            result.append(current)
        else:
            fresh = False
        result.append(argument)
    return result


class UsageError(ValueError):
    """What the user typed cannot be used, whatever the files hold; ends with exit code 2."""


@contextmanager
def usage() -> Iterator[None]:
    """Mark the errors of a block as mistakes of usage."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command end in one clear sentence and an exit code instead of a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)  # told in one line, never fatal
            warnings.showwarning = _show_warning
            try:
                command(*args, **kwargs)
            except (UsageError, FileNotFoundError, FileExistsError, ImportError) as error:
                _fail(error, USAGE_EXIT)
            except KeyboardInterrupt:
                err.print("Interrupted. Nothing was left half-written.")
                raise typer.Exit(INTERRUPTED_EXIT) from None
            except (ValueError, TypeError, RuntimeError, OSError, MemoryError) as error:
                _fail(error, FAILURE_EXIT)

    return run


def _fail(error: BaseException, code: int) -> None:
    message = str(error) or type(error).__name__
    if is_disk_full(error):
        known = getattr(error, "strerror", None) or ""  # ours names the folder and the way out
        message = known if "Nothing was written" in known else f"No space is left ({message}). Free some space."
    elif isinstance(error, PermissionError):
        message = f"Access to {error.filename!r} is not allowed. Choose a place that you may write to."
    err.print(f"[bold red]Error:[/] {escape(_unwrapped(message))}", soft_wrap=True)
    raise typer.Exit(code)


def _unwrapped(message: str) -> str:
    """Put a message on one line, but for lists in it."""
    if LIST_ITEM not in message:
        return " ".join(message.split())
    lines = [(line.startswith(LIST_ITEM[1:]), " ".join(line.split())) for line in message.splitlines()]
    return "\n".join(f"  {line}" if is_item else line for is_item, line in lines)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    err.print(f"[yellow]Warning:[/] {escape(' '.join(str(message).split()))}", soft_wrap=True)


def show_table(table: tuple[list[str], list[list[str]]], title: str | None = None) -> None:
    """Print header and cells."""
    header, cells = table
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for index, name in enumerate(header):
        drawn.add_column(name, justify="left" if index == 0 else "right", overflow="fold", no_wrap=index == 0)
    for line in cells:
        drawn.add_row(*(escape(cell) for cell in line))
    if title is not None:
        out.print(f"[bold]{escape(title)}[/]")
    out.print(drawn)


def save_json(path: Path | None, command: str, values: dict[str, Any]) -> None:
    """Write one object with every figure, the versions and the command, if `--json` was given."""
    if path is not None:
        write_json(path, {"command": command, **values, "environment": environment()})


def say(line: str) -> None:
    """Print a line of what comes next, or of how far it is, where it does not mix with results."""
    err.print(escape(line), soft_wrap=True, highlight=False)


def command_line() -> str:
    """Return what the user typed."""
    return " ".join(["hf-opentrans", *sys.argv[1:]])


def shows_progress() -> bool:
    """Tell whether somebody watches."""
    return err.is_terminal
