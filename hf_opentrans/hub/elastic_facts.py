"""What a card says of a checkpoint of several budgets, and whether its report is of this very file."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open

from hf_opentrans._safety import FLOATS
from hf_opentrans.models.configuration_elastic_clip import ELASTIC_TYPES, ElasticCLIPConfig, ElasticCLIPVisionConfig
from hf_opentrans.models.configuration_sparse_clip import SparseCLIPVisionConfig
from hf_opentrans.models.modeling_elastic_clip import PREFIX, WEIGHTS
from hf_opentrans.pruning.elastic_report import ELASTIC_REPORT_FILE, ElasticReport
from hf_opentrans.pruning.macs import TowerCost, budget_widths

from .citations import Ledger

CONFIG_FILE = "config.json"
Table = tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]
_FIGURES = ("macs", "params", "cosine_class", "cosine_patches")


def is_elastic(documents: Mapping[str, Any]) -> bool:
    """Tell whether the configuration among some documents is of a checkpoint of several budgets."""
    return documents.get(CONFIG_FILE, {}).get("model_type") in ELASTIC_TYPES


def check_elastic(folder: Path, config: Mapping[str, Any]) -> None:
    """Compare the report of a checkpoint of several budgets with its configuration and with its weights.

    Args:
        folder: Of the model. Nothing is checked where it holds no report.
        config: The content of its config.json.

    Raises:
        ValueError: If a figure of the report is of another checkpoint, or the configuration is damaged.
        SafetensorError: If the weights are damaged.
    """
    if not (folder / ELASTIC_REPORT_FILE).is_file():
        return
    report = ElasticReport.load(folder)
    entries = config.get("elastic_budgets") or []
    known = [(entry.budget, *(getattr(entry, name) for name in _FIGURES)) for entry in report.budgets]
    stated = [(entry.get("budget"), *(entry.get(name) for name in _FIGURES)) for entry in entries]
    if known != stated:
        raise _of_another(f"the budgets {[line[0] for line in known]} with other figures than config.json")
    counted = _counted(config, report.resolution)
    alone, added = _stored_bytes(folder, len(entries), [params for _, params in counted])
    ratio = (alone[0] + sum(added)) / alone[0]
    if abs(ratio - report.size_ratio) > 1e-9:
        raise _of_another(f"{report.size_ratio:.4f} times the largest budget's bytes, and it has {ratio:.4f} times")
    for entry, (macs, params), own, more in zip(report.budgets, counted, alone, added, strict=True):
        pairs = {"macs": macs, "params": params, "bytes_alone": own, "bytes_added": more}
        for name, value in pairs.items():
            if getattr(entry, name) != value:
                raise _of_another(f"{name}={getattr(entry, name)} for budget {entry.budget:g}, and it has {value}")


def _of_another(what: str) -> ValueError:
    return ValueError(
        f"{ELASTIC_REPORT_FILE} states {what}. A card states what is true of its own checkpoint. Save the model again "
        "with `prune-elastic`, or delete the report."
    )


def _counted(config: Mapping[str, Any], resolution: int) -> list[tuple[int, int]]:
    """Count multiply-accumulates and parameters of every budget from its widths."""
    is_whole = config["model_type"] == ElasticCLIPConfig.model_type
    kind: Any = ElasticCLIPConfig if is_whole else ElasticCLIPVisionConfig
    read = kind.from_dict(dict(config))
    vision = cast("SparseCLIPVisionConfig", read.vision_config if is_whole else read)
    has_projection = is_whole or any("WithProjection" in name for name in config.get("architectures") or [])
    cost, found = TowerCost.of(vision, resolution=resolution, projection=has_projection), []
    for entry in read.elastic_budgets:
        widths = budget_widths(vision, entry)
        found.append((cost.total("macs", widths), cost.total("params", widths)))
    return found


def _stored_bytes(folder: Path, budgets: int, params: list[int]) -> tuple[list[int], list[int]]:
    """Return the bytes of every budget alone, in the precision of the file, and those that it adds to the file."""
    added, itemsize = [0] * budgets, 4
    with safe_open(folder / WEIGHTS, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (no mapping)
            piece = opened.get_slice(name)
            count = math.prod(piece.get_shape())
            if name.startswith(f"{PREFIX}."):
                index = int(name.split(".")[1])
                if index < budgets:
                    added[index] += count * (1 if piece.get_dtype() == "I8" else FLOATS[piece.get_dtype()].itemsize)
            elif piece.get_dtype() in FLOATS:
                itemsize = FLOATS[piece.get_dtype()].itemsize
    return [count * itemsize for count in params], added


def budget_table(ledger: Ledger) -> Table | None:
    """Return header and cells of a card's table of budgets; None for other models."""
    if not is_elastic(ledger.documents):
        return None
    has_report = ledger.has(ELASTIC_REPORT_FILE)
    file, key = (ELASTIC_REPORT_FILE, "budgets") if has_report else (CONFIG_FILE, "elastic_budgets")
    lines = []
    for index in range(len(ledger.documents[file][key])):
        place = (file, key, index)
        line = [
            ledger.number(*place, "budget", spec="g"),
            ledger.number(*place, "macs", spec=",.1f", scale=1e-6, unit=" M"),
        ]
        if has_report:
            line.append(ledger.number(*place, "macs", spec=".1f", over=("dense_macs",), scale=100.0, unit="%"))
        line.append(ledger.number(*place, "params", spec=",.2f", scale=1e-6, unit=" M"))
        line += [ledger.number(*place, name, spec=".4f") for name in ("cosine_class", "cosine_patches")]
        if has_report:
            names = ("bytes_alone", "bytes_added")
            line += [ledger.number(*place, name, spec=",.2f", scale=1e-6, unit=" MB") for name in names]
        lines.append(tuple(line))
    share, size = (("of dense",), ("alone", "adds to the file")) if has_report else ((), ())
    header = (
        "budget",
        "multiply-accumulates",
        *share,
        "parameters",
        "cosine, class token",
        "cosine, patch tokens",
        *size,
    )
    return header, tuple(lines)


def elastic_pruning(ledger: Ledger) -> dict[str, str] | None:
    """Return how a checkpoint of several budgets was made; None where no report says it."""
    if not ledger.has(ELASTIC_REPORT_FILE):
        return None
    file = ELASTIC_REPORT_FILE
    count = len(ledger.documents[file]["budgets"])
    keeps = [
        ledger.number(file, "budgets", index, "budget", spec=".3g", scale=100.0, unit="%") for index in range(count)
    ]
    last = count - 1
    return {
        "method": ledger.text(file, "config", "method"),
        "structures": ledger.text(file, "config", "structures").strip("[]").replace('"', ""),
        "unit": ledger.text(file, "config", "unit"),
        "keep": ", ".join(keeps),
        "largest": ledger.number(file, "budgets", 0, "macs", spec=".1f", over=("dense_macs",), scale=100.0, unit="%"),
        "smallest": ledger.number(
            file, "budgets", last, "macs", spec=".1f", over=("dense_macs",), scale=100.0, unit="%"
        ),
        "images": ledger.number(file, "calibration_images", spec=",d"),
        "held_out": ledger.number(file, "held_out_images", spec=",d"),
        "size_ratio": ledger.number(file, "size_ratio", spec=".2f"),
        "resolution": ledger.number(file, "resolution", spec="d", unit=" px"),
        "tower": "vision tower",
    }
