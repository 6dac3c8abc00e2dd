"""The command `evaluate`: every model on every benchmark, under one protocol."""

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from tqdm.auto import tqdm

from hf_opentrans._distributed import is_main_process, process_count, start_processes, wait_for_all
from hf_opentrans._fingerprints import model_fingerprint
from hf_opentrans.benchmark_evaluation import (
    EvaluationFile,
    EvaluationRow,
    evaluation_markdown,
    evaluation_table,
    protocol_notes,
    write_eval_results,
    write_text,
)
from hf_opentrans.cli._common import app, command_line, err, guarded, out, show_table, shows_progress, usage
from hf_opentrans.cli.commands import BudgetOption, Mode, Resolution, say_budget
from hf_opentrans.data.benchmarks import BENCHMARKS, find_benchmark, open_benchmark
from hf_opentrans.data.folder import SegmentationData, SegmentationFolder
from hf_opentrans.evaluation_protocols import PROTOCOLS, Protocol, find_protocol, knobs_of_text
from hf_opentrans.evaluation_runs import data_fingerprint, evaluate_data, forget_state
from hf_opentrans.loading import load_segmenter

Parts = tuple[Any, Any]  # a segmenter and its processor
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@app.command()
@guarded
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Folders or Hub ids of CLIPs or trained segmenters.")],
    dataset: Annotated[Path | None, typer.Option(help="Folder with images/, masks/ and classes.json.")] = None,
    benchmark: Annotated[
        list[str] | None, typer.Option(help=f"Instead of --dataset, of {', '.join(BENCHMARKS)}; several go together.")
    ] = None,
    protocol: Annotated[
        str, typer.Option(help=f"{' | '.join(PROTOCOLS)}: resolution, windows, templates and rules of scoring.")
    ] = "native",
    data_root: Annotated[
        Path | None, typer.Option(help="Folder of the benchmarks; default: the variable OVS_DATA.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Default: val of a benchmark, the only one of a folder.")] = None,
    mode: Mode = None,
    inference: Annotated[str | None, typer.Option(help="whole | slide; default: the protocol's.")] = None,
    resolution: Resolution = None,
    knob: Annotated[
        list[str] | None,
        typer.Option("--set", help="Other knobs of the protocol, KNOB=VALUE: threshold=0.3 templates=imagenet80 ..."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N images of each.")] = None,
    budget: BudgetOption = None,
    precision: Annotated[str, typer.Option(help=f"{' | '.join(_PRECISIONS)}: what the models compute in.")] = "fp32",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every figure here after every row; go on from it.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table to this Markdown file.")] = None,
    eval_results: Annotated[
        Path | None, typer.Option(help="Also write .eval_results files for the Hub into this folder.")
    ] = None,
) -> None:
    """Measure mIoU and more of models on folders or benchmarks of images and masks, under a protocol."""
    knobs = {"mode": mode, "inference": inference, "resolution": resolution}
    with usage():
        given = {name: value for name, value in knobs.items() if value is not None}
        more = knobs_of_text(knob or [])
        twice = sorted(set(given) & set(more))
        if twice:
            raise ValueError(f"--{twice[0]} is given, and --set {twice[0]} too. One of them decides. Keep one.")
        chosen = find_protocol(protocol, **given, **more)
        dtype = _dtype(precision)
        if (dataset is None) == (not benchmark):
            raise ValueError(
                f"--dataset is {None if dataset is None else str(dataset)!r} and --benchmark {benchmark or None}. "
                "Exactly one of them says what is scored. Give one."
            )
    start_processes()
    data = _open(dataset, benchmark or [], data_root, split)  # before any model is loaded
    with usage():
        settings = {"protocol": chosen.to_dict(), "limit": limit, "split": split}
        results = EvaluationFile(json_file, settings, command_line())
    wait_for_all()  # nobody writes before all have read
    rows = []
    for model in dict.fromkeys(models):
        parts = _load(model, budget, dtype, chosen)
        shown = model if budget is None else f"{model} at budget {budget:g}"
        shown += "" if precision == "fp32" else f" in {precision}"
        rows += [_row(shown, parts, name, data[name], chosen, limit, results) for name in data]
    if is_main_process():
        _show(rows, markdown, eval_results, {name: _hub_id(part) for name, part in data.items()})
        results.save(at_end=True)


def _dtype(precision: str) -> torch.dtype:
    if precision not in _PRECISIONS:
        raise ValueError(f"--precision is {precision!r}. It must be one of {', '.join(_PRECISIONS)}.")
    return _PRECISIONS[precision]


def _load(name: str, budget: float | None, dtype: torch.dtype, protocol: Protocol) -> Parts:
    """Return a segmenter that can follow the protocol, on the device and in the precision, and its processor."""
    parts: Parts = load_segmenter(name, budget=budget)
    parts[0].to(_device(), dtype)
    with usage():
        protocol.check_model(parts[0])
    if is_main_process():
        say_budget(parts[0])
    return parts


def _open(
    dataset: Path | None, benchmarks: list[str], root: Path | None, split: str | None
) -> dict[str, SegmentationData]:
    """Return the data by name.

    Raises:
        FileNotFoundError: If something is missing on disk.
    """
    if dataset is not None:
        return {str(dataset): SegmentationFolder(dataset, split)}
    with usage():
        for name in benchmarks:
            if not Path(name).exists():
                find_benchmark(name)
    return {name: open_benchmark(name, root, split) for name in dict.fromkeys(benchmarks)}


def _row(
    model: str,
    parts: Parts,
    name: str,
    data: SegmentationData,
    protocol: Protocol,
    limit: int | None,
    results: EvaluationFile,
) -> EvaluationRow:
    """Measure one row, or take it from the file if model and data are still the same."""
    older = results.find(model, name)
    if older is not None:
        now = (model_fingerprint(parts[0]), data_fingerprint(data))
        if now == (older.result.model_fingerprint, older.result.data_fingerprint):
            return older
        _say(
            f"The weights of {model} or the files of {name} are not those of the row in {results.path}: measured anew."
        )
    state = None
    if results.path is not None and not results.is_device:
        key = hashlib.sha256(f"{model}\n{name}".encode()).hexdigest()[:12]
        state = results.path.with_name(f".{results.path.name}.{key}")
    count = len(data) if limit is None else min(limit, len(data))
    title = f"{Path(model).name} on {Path(name).name}"
    shown = shows_progress() and is_main_process()
    share = -(-count // process_count())
    with tqdm(total=share, desc=title, unit="image", disable=not shown, leave=False) as bar:
        result = evaluate_data(*parts, data, protocol, state=state, limit=limit, on_image=bar.update)
    row = EvaluationRow(model, name, data.split, result)
    results.store(row)
    wait_for_all()
    if state is not None:
        forget_state(state)
    return row


def _show(
    rows: list[EvaluationRow], markdown: Path | None, eval_results: Path | None, hub_ids: dict[str, str | None]
) -> None:
    for note in protocol_notes(rows):
        out.print(escape(note), soft_wrap=True, highlight=False)
    classes = dict.fromkeys(f"{len(row.result.class_names)} classes in {Path(row.benchmark).name}" for row in rows)
    show_table(evaluation_table(rows), title=", ".join(classes))
    if markdown is not None:
        write_text(markdown, evaluation_markdown(rows))
    if eval_results is not None:
        for path in write_eval_results(rows, eval_results, hub_ids):
            out.print(f"Result for the Hub: {escape(str(path))}", soft_wrap=True, highlight=False)
        unknown = [Path(name).name for name, hub_id in hub_ids.items() if hub_id is None]
        if unknown:
            _say(f"No data set on the Hub is known for {', '.join(unknown)}: put its id into these files.")


def _hub_id(data: SegmentationData) -> str | None:
    return getattr(getattr(data, "benchmark", None), "hub_id", None)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _say(line: str) -> None:
    if is_main_process():
        err.print(escape(line), soft_wrap=True, highlight=False)
