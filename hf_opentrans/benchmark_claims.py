"""What was claimed beside what was measured: tables over several published results, next to the paper's figures."""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_opentrans.benchmark_selection_tables import LEVEL, Difference, SelectionRow, interval
from hf_opentrans.benchmark_transfer_tables import CONSTANT, DENSE, HEAD, OURS, TransferRow
from hf_opentrans.benchmarks import MethodRow

Table = tuple[list[str], list[list[str]]]
RANDOM, ALPHA, REVERSED, FULL = "random", "alpha", "alpha_star", "full"
# A score of every method or rule by seed.
Scores = Mapping[str, Mapping[int, float]]
_METHOD_SCORES = {"mean_iou": "mIoU, training-free", "top1": "top-1", "patch_token_cosine": "patch cosine"}
_PERCENT = {"mean_iou", "top1"}


@dataclass(frozen=True)
class Kind:
    """How a claim is shown.

    Args:
        columns: Methods or rules by heading of their column.
        compared: Pairs of them whose difference is shown.
        cost: Heading of the last column.
    """

    columns: Mapping[str, str]
    compared: tuple[tuple[str, str], ...]
    cost: str


KINDS = {
    "pruning": Kind({DENSE: "dense", OURS: "subnetwork", RANDOM: "random"}, ((OURS, RANDOM),), "cost of the model"),
    "selection": Kind(
        {FULL: "full", ALPHA: "alpha", RANDOM: "random half", REVERSED: "alpha*"},
        ((ALPHA, RANDOM), (ALPHA, REVERSED)),
        "training cost: alpha / random / alpha*",
    ),
}


@dataclass(frozen=True)
class Line:
    """One setting.

    Args:
        source: Who measured it.
        setting: Data, model, budget.
        scores: By method or rule, over the seeds.
        cost: In words.
        is_percent: Whether the scores are shares that are shown in percent.
    """

    source: str
    setting: str
    scores: Scores
    cost: str
    is_percent: bool = True


def claim_text(values: Mapping[str, Any], results: Path) -> str:
    """Return the Markdown of one claim: a table, and where its figures come from.

    Args:
        values: A claim file: `kind` (one of `KINDS`), `paper` with its `source` and `rows`, and `measured`, the names
            of the result files.
        results: Folder of the result files.

    Raises:
        ValueError: If the kind is unknown, or a result file is of a study that does not fit.
    """
    if values["kind"] not in KINDS:
        raise ValueError(f"`kind` is {values['kind']!r}. A claim is one of {', '.join(KINDS)}. Correct the file.")
    kind = KINDS[values["kind"]]
    lines = [
        Line("paper", row["setting"], {k: {0: v / 100} for k, v in row["scores"].items()}, row["cost"])
        for row in values["paper"]["rows"]
    ]
    for name in values["measured"]:
        measured = json.loads((results / name).read_text(encoding="utf-8"))
        lines += list(_measured(measured, name))
    header, cells = claim_table(lines, kind)
    table = "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *cells))
    files = ", ".join(f"`results/{name}`" for name in values["measured"])
    return (
        f"{table}\n\nOurs: means over the seeds; differences are paired over the seeds, with their {LEVEL:.0%} "
        f"interval; * marks those that leave out zero. From {files}, each with the command that measured it. "
        f"Paper: {values['paper']['source']}\n"
    )


def claim_table(lines: Sequence[Line], kind: Kind) -> Table:
    """Return header and cells."""
    compared = [f"{kind.columns[a]} - {kind.columns[b]}" for a, b in kind.compared]
    header = ["measured by", "setting", *kind.columns.values(), *compared, kind.cost]
    return header, [[line.source, line.setting, *_cells(line, kind), line.cost] for line in lines]


def _cells(line: Line, kind: Kind) -> Iterator[str]:
    scale, form = (100, ".1f") if line.is_percent else (1, ".3f")
    for method in kind.columns:
        found = line.scores.get(method)
        yield format(scale * statistics.fmean(found.values()), form) if found else "-"
    for one, other in kind.compared:
        yield _difference(line.scores, one, other, scale, form)


def _difference(scores: Scores, one: str, other: str, scale: float, form: str) -> str:
    # A single dense run or random draw has no seeds to pair.
    both = sorted(set(scores.get(one, ())) & set(scores.get(other, ())))
    if not both:
        return "-"
    changes = [scale * (scores[one][seed] - scores[other][seed]) for seed in both]
    if len(changes) == 1:
        return format(changes[0], f"+{form}")
    found: Difference = interval(changes)
    mark = " *" if found.is_clear else ""
    return f"{found.mean:+{form}} ({found.low:+{form}} to {found.high:+{form}}){mark}"


def _measured(values: Mapping[str, Any], name: str) -> Iterator[Line]:
    rows, settings = values["rows"], values["settings"]
    if "framework" in rows[0]:
        yield from _transfer_lines([TransferRow(**row) for row in rows], settings)
    elif "rule" in rows[0]:
        yield from _selection_lines([SelectionRow(**row) for row in rows], settings)
    elif "method" in rows[0]:
        yield from _pruning_lines([MethodRow(**row) for row in rows], settings)
    else:
        raise ValueError(
            f"{name!r} is no result of `benchmark pruning`, `transfer` or `layer-selection`. A claim is shown from "
            "these. Leave it out."
        )


def _where(settings: Mapping[str, Any]) -> str:
    return f"{Path(settings['model']).name} on {Path(settings['dataset']).name}"


def _by_seed(rows: Sequence[Any], score: str, of: Callable[[Any], str]) -> Scores:
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        value = getattr(row, score)
        if value is not None:
            found.setdefault(of(row), {})[row.seed] = value
    return found


def _pruning_lines(rows: Sequence[MethodRow], settings: Mapping[str, Any]) -> Iterator[Line]:
    dense = next(row for row in rows if row.method == DENSE)
    for score, label in _METHOD_SCORES.items():
        for keep in sorted({row.keep for row in rows if row.method == OURS}, reverse=True):
            compared = [row for row in rows if row.method == DENSE or row.keep == keep]
            scores = _by_seed(compared, score, lambda row: row.method)
            if OURS in scores and RANDOM in scores:
                macs = next(row.macs for row in rows if row.method == OURS and row.keep == keep)
                cost = f"{macs / dense.macs:.0%} of the MACs, really removed"
                yield Line("ours", f"{Path(settings['model']).name}: {label}", scores, cost, score in _PERCENT)


def _transfer_lines(rows: Sequence[TransferRow], settings: Mapping[str, Any]) -> Iterator[Line]:
    tower = next(row.tower_macs for row in rows if row.method == DENSE)
    for framework in dict.fromkeys(row.framework for row in rows if row.framework != CONSTANT):
        own = [row for row in rows if row.framework == framework and row.trained in ("", HEAD)]
        keep = min(row.keep for row in own)
        compared = [row for row in own if row.method == DENSE or row.keep == keep]
        kept = next(row.tower_macs for row in compared if row.method == OURS) / tower
        for score in ("seen", "unseen"):
            where = f"{framework}, {_where(settings)}: mIoU, {score} names"
            cost = f"{kept:.0%} of the tower's MACs, really removed"
            yield Line("ours", where, _by_seed(compared, score, lambda row: row.method), cost)


def _selection_lines(rows: Sequence[SelectionRow], settings: Mapping[str, Any]) -> Iterator[Line]:
    def share(rule: str) -> str:
        own = [row.macs_per_sample / row.full_macs_per_sample for row in rows if row.rule == rule]
        return f"{statistics.fmean(own):.0%}"

    cost = " / ".join(share(rule) for rule in (ALPHA, RANDOM, REVERSED))
    for score in ("seen", "unseen"):
        where = f"{_where(settings)}: mIoU, {score} names"
        yield Line("ours", where, _by_seed(rows, score, lambda row: row.rule), cost)
