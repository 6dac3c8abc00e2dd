"""Tables of measured figures, generated from the rows, for the terminal, for reports and for published Markdown."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_opentrans.benchmarks import LatencyRow, MethodRow

# A published table stands between these lines; the first names the file that it is generated from.
_BLOCK = re.compile(r"(<!-- table: (?P<file>\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def method_table(rows: Sequence[MethodRow]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of the comparison, for Markdown and for the terminal."""
    header = ["model", "MACs", "kept", "params", "size", "CLS cos", "patch cos", "top-1", "mIoU", "pixAcc"]
    cells = []
    for row in rows:
        cells.append(
            [
                "ours" if row.method == "obs" else row.method,
                f"{row.macs / 1e6:,.0f} M",
                f"{row.macs / rows[0].macs:.1%}",
                f"{row.params / 1e6:.2f} M",
                f"{row.bytes / 1e6:.1f} MB",
                _number(row.class_token_cosine),
                _number(row.patch_token_cosine),
                _percent(row.top1),
                _percent(row.mean_iou),
                _percent(row.pixel_accuracy),
            ]
        )
    measured = [i for i in range(len(header)) if any(line[i] != "-" for line in cells)]
    return [header[i] for i in measured], [[line[i] for i in measured] for line in cells]


def latency_table(rows: Sequence[LatencyRow]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of paired latencies."""
    header = ["model", "batch", "px", "median", "speed-up (range)", "MACs", "of MACs"]
    cells = [
        [
            row.model,
            str(row.batch_size),
            str(row.resolution),
            f"{row.median_ms:.1f} ms",
            f"{row.speed_up:.2f}x ({row.speed_up_range[0]:.2f}-{row.speed_up_range[1]:.2f})",
            f"{row.mac_ratio:.2f}x",
            f"{row.efficiency:.0%}",
        ]
        for row in rows
    ]
    return header, cells


def markdown_table(table: tuple[list[str], list[list[str]]]) -> str:
    """Format header and cells as a Markdown table."""
    header, cells = table
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def result_table(values: dict[str, Any]) -> str:
    """Format a benchmark's JSON object as a Markdown table with the machine and the command that made it.

    Raises:
        ValueError: If the object is no benchmark result.
    """
    rows = values.get("rows") or [{}]
    machine = values.get("environment", {})
    versions = machine.get("versions", {})
    stack = f"{machine.get('threads')} threads, {machine.get('processor')}, torch {versions.get('torch')}"
    if "method" in rows[0]:
        table = method_table([MethodRow(**row) for row in rows])
    elif "speed_up" in rows[0]:
        table = latency_table([LatencyRow(**row) for row in rows])
    else:
        raise ValueError("The file holds no rows of a benchmark. Write it with `hf-opentrans benchmark ... --json`.")
    return f"{markdown_table(table)}\n\nMeasured by `{values['command']}` ({stack}).\n"


def fill_tables(text: str, results: Path) -> str:
    """Return Markdown whose marked blocks hold the tables of the files that they name.

    A block starts with `<!-- table: FILE.json -->` and ends with `<!-- end of table -->`.

    Args:
        text: The Markdown.
        results: Folder of the files.
    """

    def fill(block: re.Match[str]) -> str:
        values = json.loads((results / block["file"]).read_text(encoding="utf-8"))
        return f"{block[1]}{result_table(values)}{block[3]}"

    return _BLOCK.sub(fill, text)
