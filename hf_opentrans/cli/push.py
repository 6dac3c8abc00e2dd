"""The commands `push` and `card`: publish a folder on the Hugging Face Hub, or only write its model card."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from hf_opentrans.cli._common import UsageError, app, command_line, err, guarded, out, show_table
from hf_opentrans.hub.card import write_card
from hf_opentrans.hub.card_facts import facts_of, missing_parts
from hf_opentrans.hub.evidence import Evidence
from hf_opentrans.hub.folder import PreparedFolder, prepare_folder
from hf_opentrans.hub.push import push_folder

Folder = Annotated[Path, typer.Argument(help="Folder of the model, as prune, transfer or finetune wrote it.")]
Evaluations = Annotated[
    list[Path] | None,
    typer.Option("--evaluation", help="JSON file of `evaluate` on this folder; several go together."),
]
LatencyFile = Annotated[Path | None, typer.Option(help="JSON file of `benchmark latency --models BASE FOLDER`.")]
Base = Annotated[Path | None, typer.Option(help="Folder of the dense model: for its licence and its size.")]
BaseModel = Annotated[str | None, typer.Option(help="Name of the dense model on the Hub; default: as recorded.")]
BaseLicence = Annotated[
    str | None, typer.Option(help="Licence of the base weights, as the Hub names it; default: that of their card.")
]
Datasets = Annotated[
    list[str] | None,
    typer.Option("--data", help="Data set on the Hub that the weights have seen; several go together."),
]


@app.command()
@guarded
def push(
    folder: Folder,
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub; created where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; default: the main one.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    evaluation: Evaluations = None,
    latency: LatencyFile = None,
    base: Base = None,
    base_model: BaseModel = None,
    base_licence: BaseLicence = None,
    datasets: Datasets = None,
    dry_run: Annotated[Path | None, typer.Option(help="Only write what would be published into this folder.")] = None,
) -> None:
    """Publish a model with its card on the Hub, in one commit: loadable with this package and without."""
    options = _options(evaluation, latency, base, base_model, base_licence, datasets)
    if dry_run is not None:
        prepared = prepare_folder(folder, dry_run, repo_id=repo, **options)
        _show(prepared, f"{repo}: would be published")
        out.print(f"Look at {escape(str(dry_run / 'README.md'))}. Nothing was sent.", soft_wrap=True, highlight=False)
        return
    result = push_folder(folder, repo, private=private, revision=revision, create_pr=create_pr, **options)
    _show(result.prepared, f"{result.repo_id}, {result.revision}")
    if result.pull_request is not None:
        out.print(f"Pull request: {escape(result.pull_request)}", soft_wrap=True, highlight=False)
    out.print(f"Published: {escape(result.url)} (commit {result.commit[:8]})", soft_wrap=True, highlight=False)


@app.command()
@guarded
def card(
    folder: Folder,
    output: Annotated[Path, typer.Option(help="Markdown file for the card; its picture lies beside it.")],
    repo: Annotated[str | None, typer.Option(help="OWNER/NAME that the snippets name; default: the folder.")] = None,
    evaluation: Evaluations = None,
    latency: LatencyFile = None,
    base: Base = None,
    base_model: BaseModel = None,
    base_licence: BaseLicence = None,
    datasets: Datasets = None,
) -> None:
    """Write the model card of a folder from its reports: every number in it has a source."""
    if output.is_dir():
        raise UsageError(f"--output is {str(output)!r}, a folder. The card is a file. Name one, such as README.md.")
    options = _options(evaluation, latency, base, base_model, base_licence, datasets)
    evidence = Evidence.read(folder, repo, **options)
    facts = facts_of(evidence, options)
    write_card(evidence, facts, output, command_line())
    out.print(f"Wrote {escape(str(output))}: {len(facts.citations)} figures, each with a source.", highlight=False)
    _hint(missing_parts(facts))


def _options(
    evaluation: list[Path] | None,
    latency: Path | None,
    base: Path | None,
    base_model: str | None,
    base_licence: str | None,
    datasets: list[str] | None,
) -> Any:
    names = {"base": base, "base_model": base_model, "base_licence": base_licence}
    return {"evaluations": evaluation or (), "latency": latency, "datasets": datasets or (), **names}


def _show(prepared: PreparedFolder, title: str) -> None:
    total = sum(size for _, size in prepared.files)
    cells = [[name, f"{size / 1e6:,.3f} MB"] for name, size in prepared.files]
    show_table((["file", "size"], [*cells, ["all", f"{total / 1e6:,.3f} MB"]]), title=title)
    if prepared.left_out:
        out.print(f"Not published: {escape(', '.join(prepared.left_out))}.", soft_wrap=True, highlight=False)
    _hint(prepared.hints)


def _hint(hints: Any) -> None:
    for hint in hints:
        err.print(f"[yellow]Left out of the card:[/] {escape(hint)}", soft_wrap=True, highlight=False)
