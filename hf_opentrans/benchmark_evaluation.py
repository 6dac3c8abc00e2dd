"""What `evaluate` keeps and shows: rows of models and benchmarks, tables, and results for the Hugging Face Hub."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml, parse_eval_result_entries
from huggingface_hub.utils import validate_repo_id

from hf_opentrans._distributed import is_main_process
from hf_opentrans.benchmark_rows import RowFile
from hf_opentrans.evaluation_runs import EvaluationResult

METRICS = {
    "mIoU": "mean_iou",
    "pixel accuracy": "pixel_accuracy",
    "mean accuracy": "mean_accuracy",
    "frequency-weighted IoU": "frequency_weighted_iou",
}
EVAL_RESULTS_FOLDER, TASK = ".eval_results", "mean_iou"


@dataclass(frozen=True)
class EvaluationRow:
    """One model on one benchmark.

    Args:
        model: Folder or Hub id, as it was given.
        benchmark: Name or folder, as it was given.
        split: Of the data.
        result: All figures; what `EvaluationResult.to_dict` returned is taken too.
    """

    model: str
    benchmark: str
    split: str | None
    result: EvaluationResult

    def __post_init__(self) -> None:
        if isinstance(self.result, dict):  # from a file
            object.__setattr__(self, "result", EvaluationResult.from_dict(self.result))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary, ready for JSON."""
        names = {"model": self.model, "benchmark": self.benchmark, "split": self.split}
        return {**names, "result": self.result.to_dict()}


class EvaluationFile(RowFile[EvaluationRow]):
    """The rows of `evaluate`; see `RowFile`. In several processes the first one alone writes.

    A file with one row also holds its figures beside the rows.
    """

    row_type, written_by = EvaluationRow, "evaluate"

    def find(self, model: str, benchmark: str) -> EvaluationRow | None:
        """Return the row of a model and a benchmark, if there is one."""
        return next((row for row in self.rows if (row.model, row.benchmark) == (model, benchmark)), None)

    def store(self, row: EvaluationRow) -> None:
        """Put a row in the place of an older one of the same model and benchmark, or behind the others."""
        older = self.find(row.model, row.benchmark)
        if older is None:
            self.add(row)
        else:
            self.put(self.rows.index(older), row)

    def save(self, *, at_end: bool = False) -> None:
        """Replace the file as a whole, in the first process."""
        if is_main_process():
            super().save(at_end=at_end)

    def more(self) -> dict[str, Any]:
        """Return the figures of the only row."""
        if len(self.rows) != 1:
            return {}
        (row,) = self.rows
        result = row.result
        names = {"model": row.model, "dataset": row.benchmark, "split": row.split, "images": result.images}
        knobs = {name: getattr(result.protocol, name) for name in ("mode", "inference", "resolution")}
        figures = {title: getattr(result.scores, name) for title, name in METRICS.items()}
        per_class = {entry["name"]: entry["iou"] for entry in result.per_class}
        return {**names, "seed": None, **knobs, **figures, "per_class_iou": per_class}


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return the last part of every path or id, or all of it where several would look the same."""
    parts = [Path(name).name or name for name in names]
    return {name: part if parts.count(part) == 1 else name for name, part in zip(names, parts, strict=True)}


def evaluation_table(rows: Sequence[EvaluationRow]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells: one line per model and benchmark."""
    models = short_names(list(dict.fromkeys(row.model for row in rows)))
    benchmarks = short_names(list(dict.fromkeys(row.benchmark for row in rows)))
    header = ["model", "benchmark", "images", "mIoU", "pixel acc.", "mean acc.", "fw IoU", "images/s", "outside model"]
    cells = []
    for row in rows:
        result = row.result
        figures = [f"{getattr(result.scores, name):.2%}" for name in METRICS.values()]
        speed = [f"{result.images_per_second:.3g}", f"{result.outside_share:.0%}"]
        cells.append([models[row.model], benchmarks[row.benchmark], str(result.images), *figures, *speed])
    return header, cells


def protocol_notes(rows: Sequence[EvaluationRow]) -> list[str]:
    """Return every knob of every protocol that the rows were measured under, each protocol once."""
    return list(dict.fromkeys(row.result.protocol.describe() for row in rows))


def evaluation_markdown(rows: Sequence[EvaluationRow]) -> str:
    """Return the table and the protocols as Markdown."""
    header, cells = evaluation_table(rows)
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *cells]
    table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([*table, "", *protocol_notes(rows), ""])


def write_eval_results(rows: Sequence[EvaluationRow], folder: Path, hub_ids: dict[str, str | None]) -> list[Path]:
    """Write every row as a file of the `.eval_results` format, which model pages of the Hub show.

    Args:
        rows: The rows.
        folder: That `.eval_results` shall lie in; with several models it gets a folder for each of them.
        hub_ids: Data set on the Hub by benchmark; None where none is known: the name then stands in its place.

    Returns:
        The files.

    Raises:
        ValueError: If a score or the id of a data set would not be accepted.
    """
    models = short_names(list(dict.fromkeys(row.model for row in rows)))
    written = []
    for row in rows:
        own = folder if len(models) == 1 else folder / _file_name(models[row.model])
        name = f"{_file_name(Path(row.benchmark).name)}_{row.result.protocol.name.replace('+', '-changed')}.yaml"
        text = eval_results_yaml(row, hub_ids.get(row.benchmark))
        write_text(own / EVAL_RESULTS_FOLDER / name, text)
        written.append(own / EVAL_RESULTS_FOLDER / name)
    return written


def eval_results_yaml(row: EvaluationRow, hub_id: str | None) -> str:
    """Return one row in the `.eval_results` format: mIoU in percent, and in the notes how it was measured.

    Args:
        row: The row.
        hub_id: Data set on the Hub; None: the benchmark's name stands in its place.

    Raises:
        ValueError: If the score or the id would not be accepted.
    """
    result = row.result
    value = round(100 * result.scores.mean_iou, 2)
    if not math.isfinite(value):
        raise ValueError(f"The mIoU of {row.model!r} on {row.benchmark!r} is {value}. A result must be a number.")
    dataset_id = hub_id or _file_name(Path(row.benchmark).name)
    validate_repo_id(dataset_id)
    notes = f"mIoU in percent, {result.images} images of {row.benchmark}"
    notes += f"{'' if row.split is None else f', split {row.split}'}, hf_opentrans {result.versions['hf_opentrans']}. "
    entry = EvalResultEntry(
        dataset_id=dataset_id,
        task_id=TASK,
        value=value,
        date=result.date,
        notes=notes + result.protocol.describe(),
    )
    text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True, width=1000)
    if parse_eval_result_entries(yaml.safe_load(text)) != [entry]:
        raise ValueError(f"The result of {row.model!r} is not the same when it is read again. Report this fault.")
    return text


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole; /dev/stdout and the like are written to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _file_name(name: str) -> str:
    """Return a name that files and the Hub accept."""
    return re.sub(r"[^A-Za-z0-9._]+|-{2,}|\.{2,}", "-", name).strip("-.") or "data"
