"""What a card says, collected from reports: every figure is cited, and what was not measured is left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from hf_opentrans.data.benchmarks import BENCHMARKS
from hf_opentrans.pruning.channels import CHANNEL_REPORT_FILE
from hf_opentrans.pruning.elastic_report import ELASTIC_REPORT_FILE
from hf_opentrans.pruning.report import REPORT_FILE

from .citations import Citation, Ledger
from .elastic_facts import budget_table, elastic_pruning, is_elastic
from .evidence import (
    CONFIG_FILE,
    GIVEN,
    LICENCE,
    SEGMENTER,
    SIZES,
    SUBNETWORK_FILE,
    TRAINING_FILE,
    CardOptions,
    Evidence,
    recorded_base,
    short_command,
)
from .licence import Licence, is_hub_id

Table = tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]
Pairs = tuple[tuple[str, str], ...]
_MILLION: dict[str, Any] = {"spec": ",.1f", "scale": 1e-6}
_PERCENT: dict[str, Any] = {"scale": 100.0, "unit": "%"}
_SCORES = {
    "mIoU": "mean_iou",
    "pixel acc.": "pixel_accuracy",
    "mean acc.": "mean_accuracy",
    "fw IoU": "frequency_weighted_iou",
}
_TRAINED = {
    "mIoU": ("mean_iou", ".1f", _PERCENT),
    "pixel accuracy": ("pixel_accuracy", ".1f", _PERCENT),
    "cosine of the class token": ("class_token_cosine", ".4f", {}),
    "cosine of the patch tokens": ("patch_token_cosine", ".4f", {}),
}
_STACK = ("hf_opentrans", "torch", "transformers", "python")


@dataclass(frozen=True)
class CardFacts:
    """All that a card says that is not the same in every card.

    Figures are text already; parts that nothing is known of are None or empty.

    Args:
        title: Name of the model.
        name: What users load: the repository, or the folder where there is none yet.
        kind: See `Evidence`.
        class_name: The model's class.
        base: Name of the dense model.
        base_id: The same where it can be a repository on the Hub.
        base_revision: Its commit.
        licence: Of the base weights.
        licence_file: Name of its text, where that lies beside the weights.
        pruning: Method, unit, budget and more of the pruning.
        budgets: Cost, fidelity and bytes of every budget, where one checkpoint holds several.
        budget: One of these, for the snippets.
        costs: MACs, parameters and bytes, dense and now.
        widths: Kept and dense widths, layer by layer.
        fidelity: How far the outputs moved.
        latency: Measured times.
        latency_conditions: Device, threads and versions of these.
        evaluations: Scores of this model, and of others that were measured with it.
        protocols: How the scores were measured: all knobs, each protocol once.
        evaluation_conditions: Device and versions of these.
        commands: What was typed to measure.
        calibration: The images that pruning saw.
        training: What training changed, where the model was trained after pruning.
        notes: What the reports want users to know.
        datasets: Ids on the Hub of the data that the weights have seen.
        hub_results: Documents and positions of the scores that the Hub knows a data set for.
        citations: Where every figure was read.
    """

    title: str
    name: str
    kind: str
    class_name: str
    base: str | None
    base_id: str | None
    base_revision: str | None
    licence: Licence | None
    licence_file: str | None
    pruning: dict[str, str] | None
    budgets: Table | None
    budget: str | None
    costs: Table | None
    widths: Table | None
    fidelity: Pairs
    latency: Table | None
    latency_conditions: str | None
    evaluations: Table | None
    protocols: tuple[str, ...]
    evaluation_conditions: str | None
    commands: tuple[str, ...]
    calibration: Pairs
    training: Table | None
    notes: tuple[str, ...]
    datasets: tuple[str, ...]
    hub_results: tuple[tuple[str, int], ...]
    citations: tuple[Citation, ...]


def collect_facts(folder: str | Path, *, repo_id: str | None = None, **options: Unpack[CardOptions]) -> CardFacts:
    """Read what a card says from the reports of a folder and from the files of measurements.

    Args:
        folder: Of the model.
        repo_id: Where it shall be published.
        **options: See `build_card`.

    Raises:
        FileNotFoundError: If the folder or a file is missing.
        ValueError: If a file is damaged, or its figures are of another model.
    """
    return facts_of(Evidence.read(folder, repo_id, **options), options)


def facts_of(evidence: Evidence, options: CardOptions) -> CardFacts:
    """Write down what the documents say; see `collect_facts`."""
    ledger = Ledger(evidence.documents)
    base, base_id, revision = _base(ledger)
    name_key = "repo_id" if ledger.has(GIVEN, "repo_id") else "folder"
    report = _report_file(ledger)
    elastic = ELASTIC_REPORT_FILE if is_elastic(ledger.documents) and ledger.has(ELASTIC_REPORT_FILE) else None
    budgets = budget_table(ledger)
    protocols, conditions = _conditions(ledger, evidence)
    for key in ("license", "license_name"):
        ledger.text(LICENCE, key)
    return CardFacts(
        title=ledger.text(GIVEN, name_key, rule="name"),
        name=ledger.text(GIVEN, name_key),
        kind=evidence.kind,
        class_name=ledger.text(CONFIG_FILE, "architectures", 0),
        base=base,
        base_id=base_id,
        base_revision=revision,
        licence=evidence.licence,
        licence_file=next((path.name for path in evidence.licence_files), None),
        pruning=elastic_pruning(ledger) if elastic else _pruning(ledger, report),
        budgets=budgets,
        budget=None if budgets is None else budgets[1][min(1, len(budgets[1]) - 1)][0],
        costs=_costs(ledger, report),
        widths=_widths(ledger, report),
        fidelity=_fidelity(ledger, report),
        latency=_latency(ledger, evidence.latency),
        latency_conditions=_machine(ledger, evidence.latency),
        evaluations=_evaluations(ledger, evidence),
        protocols=protocols,
        evaluation_conditions=conditions,
        commands=_commands(evidence),
        calibration=_calibration(ledger, report or elastic),
        training=_training(ledger),
        notes=_notes(ledger, report or elastic),
        datasets=tuple(options.get("datasets") or ()),
        hub_results=tuple(
            sorted(
                (name, row)
                for (name, row), budget in evidence.own.items()
                if not budget and hub_data_set(evidence.evaluations[name][row].benchmark) is not None
            )
        ),
        citations=tuple(ledger.citations),
    )


def hub_data_set(benchmark: str) -> str | None:
    """Return the data set on the Hub of a benchmark's name; None where none is known."""
    known = BENCHMARKS.get(benchmark)
    return None if known is None else known.hub_id


def _report_file(ledger: Ledger) -> str | None:
    return next((name for name in (REPORT_FILE, CHANNEL_REPORT_FILE) if ledger.has(name)), None)


def _base(ledger: Ledger) -> tuple[str | None, str | None, str | None]:
    """Return name, Hub id and commit of the base model, the latter two where they are known."""
    found, commit, place = recorded_base(ledger.documents)
    if ledger.has(GIVEN, "base_model"):
        name = ledger.text(GIVEN, "base_model")
        # The recorded commit is of the recorded name; a folder that was copied from the Hub has none.
        commit = commit if name == found else None
    elif place is not None:
        name = ledger.text(place[0], *place[1], "base_model")
    else:
        return None, None, None
    if commit is not None and place is not None:
        commit = ledger.text(place[0], *place[1], "base_revision")
    return name, name if is_hub_id(name) else None, commit


def _pruning(ledger: Ledger, report: str | None) -> dict[str, str] | None:
    if report is None:
        return None
    structures = ledger.text(report, "config", "structures") if report == REPORT_FILE else "-"
    return {
        "method": ledger.text(report, "config", "method"),
        "structures": structures.strip("[]").replace('"', ""),
        "unit": ledger.text(report, "config", "unit"),
        "keep": ledger.number(report, "config", "keep", spec=".3g", **_PERCENT),
        "realised": ledger.number(report, "realised_keep", spec=".1f", **_PERCENT),
        "macs": ledger.number(report, "macs", spec=".1f", over=("dense_macs",), **_PERCENT),
        "images": ledger.number(report, "calibration_images", spec=",d"),
        "tower": "vision tower" if report == REPORT_FILE else "convolutions",
    }


def _costs(ledger: Ledger, report: str | None) -> Table | None:
    lines: list[tuple[str, ...]] = []
    if report is not None:
        resolution = ledger.number(report, "resolution", spec="d", unit=" px")
        for title, name in ((f"multiply-accumulates at {resolution}", "macs"), ("parameters", "params")):
            values = [ledger.number(report, key, unit=" M", **_MILLION) for key in (f"dense_{name}", name)]
            share = ledger.number(report, name, spec=".1f", over=(f"dense_{name}",), **_PERCENT)
            lines.append((title, *values, share))
        if ledger.has(report, "nominal_macs"):
            nominal = ledger.number(report, "nominal_macs", unit=" M", **_MILLION)
            lines.append(("the same, if zeros cost nothing", "", nominal, ""))
    sizes = [ledger.number(SIZES, name, unit=" MB", **_MILLION) for name in ("base", "weights")]
    if sizes[1] != "-":
        both = sizes[0] != "-"
        share = ledger.number(SIZES, "weights", spec=".1f", over=("base",), **_PERCENT) if both else "-"
        lines.append(("weights on disk, whole model", *sizes, share))
    return (("", "dense", "this model", "share"), tuple(lines)) if lines else None


def _widths(ledger: Ledger, report: str | None) -> Table | None:
    if report is None:
        return None
    if report == REPORT_FILE:
        key, first = "layers", "layer"
        columns = {"heads": "heads", "q, k width": "qk_head_dim", "v width": "v_head_dim", "neurons": "neurons"}
    else:
        key, first, columns = "bottlenecks", "bottleneck", {"first width": "first", "second width": "second"}
    lines = []
    for index in range(len(ledger.documents[report][key])):
        place = (report, key, index)
        name = ledger.text(*place, "name") if ledger.has(*place, "name") else _position(ledger, index)
        pairs = [
            f"{ledger.number(*place, field, spec='d')} / {ledger.number(*place, f'dense_{field}', spec='d')}"
            for field in columns.values()
        ]
        lines.append((name, *pairs))
    return (first, *columns), tuple(lines)


def _position(ledger: Ledger, index: int) -> str:
    """Return the number of a layer: its place in the report is its source."""
    ledger.citations.append(Citation(str(index), REPORT_FILE, ("layers", index), "position"))
    return str(index)


def _fidelity(ledger: Ledger, report: str | None) -> Pairs:
    if report is None:
        return ()
    titles = {
        "realised_error": "change of the final tokens, measured on held-out calibration images",
        "predicted_error": "the same, as the error curves predicted it",
        "embedding_error": "relative change of the embedding, root mean square",
    }
    return tuple(
        (title, ledger.number(report, key, spec=".3g")) for key, title in titles.items() if ledger.has(report, key)
    )


def _latency(ledger: Ledger, file: str | None) -> Table | None:
    if file is None:
        return None
    lines = []
    header = ("vision tower", "batch", "side", "median time", "times as fast (range)", "ratio of MACs", "threads")
    for index in range(len(ledger.documents[file]["rows"])):
        place = (file, "rows", index)
        span = [ledger.number(*place, "speed_up_range", end, spec=".2f") for end in (0, 1)]
        line = (
            ledger.text(*place, "model", rule="name"),
            ledger.number(*place, "batch_size", spec="d"),
            ledger.number(*place, "resolution", spec="d", unit=" px"),
            ledger.number(*place, "median_ms", spec=".2f", unit=" ms"),
            f"{ledger.number(*place, 'speed_up', spec='.2f')} ({span[0]} to {span[1]})",
            ledger.number(*place, "mac_ratio", spec=".2f"),
            ledger.number(*place, "threads", spec="d"),
        )
        if ledger.has(*place, "runtime"):  # older files are of eager PyTorch alone, and do not say so
            runtime = f"{ledger.text(*place, 'runtime')} {ledger.text(*place, 'precision')}"
            line, header = (line[0], runtime, *line[1:]), ("vision tower", "runtime", *header[-6:])
        lines.append(line)
    return header, tuple(lines)


def _machine(ledger: Ledger, file: str | None) -> str | None:
    if file is None:
        return None
    place = (file, "environment", "versions")
    versions = [f"{name} {ledger.text(*place, name)}" for name in _STACK if ledger.has(*place, name)]
    return ", ".join([ledger.text(file, "environment", "processor"), *versions])


def _evaluations(ledger: Ledger, evidence: Evidence) -> Table | None:
    if not evidence.evaluations:
        return None
    lines = []
    for file, rows in evidence.evaluations.items():
        for index in range(len(rows)):
            place = (file, "rows", index)
            is_own = (file, index) in evidence.own
            split = ledger.text(*place, "split")
            data = ledger.text(*place, "benchmark", rule="name") + ("" if split == "-" else f", {split}")
            scores = [
                ledger.number(*place, "result", "scores", key, spec=".2f", **_PERCENT) for key in _SCORES.values()
            ]
            images = ledger.number(*place, "result", "images", spec=",d")
            classes = _count(ledger, file, ("rows", index, "result", "class_names"))
            name = (
                _own_name(ledger, evidence.own[file, index]) if is_own else ledger.text(*place, "model", rule="name")
            )
            protocol = ledger.text(*place, "result", "protocol", "name")
            lines.append((name, data, images, classes, protocol, *scores))
    return ("model", "data", "images", "classes", "protocol", *_SCORES), tuple(lines)


def _own_name(ledger: Ledger, budget: int | None) -> str:
    if budget is None:
        return "**this model**"
    return f"**this model**, budget {ledger.number(CONFIG_FILE, 'elastic_budgets', budget, 'budget', spec='g')}"


def _count(ledger: Ledger, file: str, place: tuple[str | int, ...]) -> str:
    count = str(len(ledger.documents[file]["rows"][place[1]]["result"]["class_names"]))
    ledger.citations.append(Citation(count, file, place, "length"))
    return count


def _conditions(ledger: Ledger, evidence: Evidence) -> tuple[tuple[str, ...], str | None]:
    """Return every protocol once, and devices and versions."""
    protocols, machines = [], []
    for file, rows in evidence.evaluations.items():
        for index in range(len(rows)):
            place = (file, "rows", index, "result")
            protocols.append(ledger.text(*place, "protocol", rule="protocol"))
            versions = [f"{name} {ledger.text(*place, 'versions', name)}" for name in _STACK]
            machines.append(", ".join([ledger.text(*place, "device"), *versions]))
    return tuple(dict.fromkeys(protocols)), "; ".join(dict.fromkeys(machines)) or None


def _commands(evidence: Evidence) -> tuple[str, ...]:
    files = [*evidence.evaluations, *([evidence.latency] if evidence.latency else [])]
    found = [evidence.documents[file].get("command") for file in files]
    return tuple(dict.fromkeys(short_command(command) for command in found if command))


def _calibration(ledger: Ledger, report: str | None) -> Pairs:
    if report is None:
        return ()
    images = ledger.number(report, "calibration_images", spec=",d")
    pairs = [
        ("unlabelled images", images),
        ("side of the crops", ledger.number(report, "resolution", spec="d", unit=" px")),
    ]
    pairs.append(("seed", ledger.number(report, "config", "seed", spec="d")))
    for file, place in ((SUBNETWORK_FILE, ("calibration", "fingerprint")), (report, ("calibration_fingerprint",))):
        if ledger.has(file, *place):
            pairs.append(("fingerprint of the pixels", f"`{ledger.text(file, *place)}`"))
            break
    return tuple(pairs)


def _training(ledger: Ledger) -> Table | None:
    if not ledger.has(TRAINING_FILE):
        return None
    lines = []
    for title, (key, spec, options) in _TRAINED.items():
        if ledger.has(TRAINING_FILE, "after", key):
            pair = [ledger.number(TRAINING_FILE, when, key, spec=spec, **options) for when in ("before", "after")]
            lines.append((title, *pair))
    steps = ledger.number(TRAINING_FILE, "config", "steps", spec=",d")
    return ("", "before", f"after {steps} steps"), tuple(lines)


def _notes(ledger: Ledger, report: str | None) -> tuple[str, ...]:
    if report is None:
        return ()
    return tuple(
        ledger.text(report, "notes", index) for index in range(len(ledger.documents[report].get("notes", ())))
    )


def missing_parts(facts: CardFacts) -> Sequence[str]:
    """Return what the card leaves out and how to get it, one sentence each."""
    hints = []
    if facts.licence is None:
        hints.append(
            f"The licence of the base weights ({facts.base or 'unknown'}) is not known: name it with --base-licence."
        )
    if facts.kind == SEGMENTER and facts.evaluations is None:
        hints.append(
            "There are no scores: run `hf-opentrans evaluate FOLDER ... --json FILE`, give --evaluation FILE."
        )
    if facts.pruning is not None and facts.latency is None:
        hints.append(
            "There are no times: run `hf-opentrans benchmark latency --models BASE FOLDER --json FILE`, give "
            "--latency FILE."
        )
    return hints
