"""The benchmark of the metric: the same scores by every way, rows that go on, and its table."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hf_opentrans import benchmark_metric
from hf_opentrans.benchmark_metric import (
    HISTOGRAMS,
    IGNORED,
    KINDS,
    NOISE,
    REFERENCES,
    REGIONS,
    STORED,
    UNLABELLED,
    MetricFile,
    MetricRow,
    compare,
    histogram_scores,
    metric_notes,
    metric_table,
    our_scores,
    random_maps,
    run_metric,
)
from hf_opentrans.benchmark_tables import fill_tables
from hf_opentrans.cli import app


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch, request):
    """Do not measure memory but where a test asks for it: every peak collects all garbage of the test run first."""
    if "memory" not in request.node.name:
        monkeypatch.setattr(benchmark_metric, "_growth", lambda way, maps: way(maps) and 0.25)


ROW = MetricRow(HISTOGRAMS, "", NOISE, "uint8", 24, 0.5, 7.0, 14.0, (13.5, 14.2), 13.9, 0.0, 0.0, 0.5, 0.0, 7)
SETTINGS = {"images": 2, "classes": 9, "side": 40, "rounds": 1}


def run(*arguments):
    result = CliRunner().invoke(app, ["benchmark", "metric", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.mark.parametrize("kind", [REGIONS, NOISE])
def test_maps_are_what_the_notes_say(kind):
    maps = random_maps(3, 80, 20, kind, "uint8")
    share = np.mean([(target == IGNORED).mean() for _, target in maps])
    assert share == pytest.approx(UNLABELLED, abs=0.02)
    right = np.mean([(prediction == target)[target != IGNORED].mean() for prediction, target in maps])
    assert 0.2 < right < 0.95
    assert not np.array_equal(maps[0][0], maps[1][0])
    again = random_maps(3, 80, 20, kind, "int64")
    assert all(
        np.array_equal(a, b) for one, other in zip(maps, again, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("dtype", ["uint8", "int64"])
def test_every_way_gives_the_same_scores(reference, dtype):
    pytest.importorskip("datasets")
    row = compare(reference, random_maps(2, 40, 9, NOISE, dtype), 9, 2, NOISE)
    assert row.difference <= 1e-12
    assert (row.reference, row.dtype, row.images, row.rounds) == (reference, dtype, 2, 2)
    assert row.ours_growth == row.reference_growth == 0.25
    assert (row.disk_growth > 0) == bool(row.through) == (reference == STORED)
    assert row.quartiles[0] <= row.times_faster <= row.quartiles[1]


def test_other_scores_are_told(monkeypatch):
    monkeypatch.setattr(
        "hf_opentrans.benchmark_metric.our_scores",
        lambda pairs, classes: histogram_scores([(1 - np.minimum(p, 1), t) for p, t in pairs], classes),
    )
    row = compare(HISTOGRAMS, random_maps(1, 40, 9, NOISE, "uint8"), 9, 1, NOISE)
    assert row.difference > 0.01
    assert "differ by" in metric_table([row])[1][0][5]
    with pytest.raises(ValueError, match="`reference` is 'torchmetrics'"):
        compare("torchmetrics", [], 9, 1, NOISE)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_counts_what_is_kept():
    maps = random_maps(2, 40, 9, NOISE, "uint8")
    kept = []

    def keeps(pairs):
        for _ in pairs:
            kept.append(np.ones(2**18))  # 2 MiB of 8 bytes each
        return {}

    assert benchmark_metric._growth(keeps, maps) == pytest.approx(2, abs=1)
    assert len(kept) == 2 * (1 + 6)


def test_a_class_that_is_nan_in_one_alone_differs():
    maps = random_maps(1, 40, 9, REGIONS, "uint8")
    assert our_scores(maps, 9).keys() == histogram_scores(maps, 9).keys()
    row = compare(HISTOGRAMS, maps, 12, 1, REGIONS)  # three classes are nowhere: nan in both
    assert row.difference <= 1e-12


def test_rows_are_measured_once(tmp_path):
    pytest.importorskip("datasets")
    said = []
    results = MetricFile(tmp_path / "metric.json", SETTINGS, "command")
    run_metric(results, rounds=1, side=40, say=said.append)
    assert said[0].startswith("6 rows to do")
    again = MetricFile(tmp_path / "metric.json", SETTINGS, "command")
    again.rows.pop()
    run_metric(again, rounds=1, side=40, say=said.append)
    assert said[-2].startswith("1 rows to do")
    values = json.loads((tmp_path / "metric.json").read_text())
    keys = [(row["reference"], row["kind"], row["dtype"]) for row in values["rows"]]
    assert keys == [(reference, *kind) for kind in KINDS for reference in REFERENCES]
    with pytest.raises(ValueError, match="classes was 9 and is 8"):
        MetricFile(tmp_path / "metric.json", SETTINGS | {"classes": 8}, "command")


def test_the_command_writes_what_the_tables_read(tmp_path):
    pytest.importorskip("datasets")
    options = ("--images", 1, "--classes", 9, "--side", 40, "--rounds", 1)
    code, out, error = run(*options, "--json", tmp_path / "metric.json")
    assert code == 0, error
    assert "regions of int64" in error
    assert "9 classes, 40 px" in out
    filled = fill_tables("<!-- table: metric.json -->\n<!-- end of table -->\n", tmp_path)
    assert "| three histograms per image | noise, uint8 |" in filled
    assert "Measured by `hf-opentrans" in filled
    code, _, error = run("--images", 2, "--json", tmp_path / "metric.json")
    assert (code, "images was 1 and is 2" in error) == (2, True), error


def test_the_table_is_for_people():
    header, (cells,) = metric_table([ROW])
    assert cells[2:6] == ["7.00 ms", "0.50 ms", "14.0x (13.5-14.2)", "equal"]
    assert len(header) == len(cells)
    assert not any("!" in note for note in metric_notes([ROW], SETTINGS))
    disturbed = replace(ROW, wall_ratio=20.0)
    assert metric_table([disturbed])[1][0][4].endswith("!")
    assert metric_notes([disturbed], SETTINGS)[-1].startswith("!: wall and CPU time differ")
    replaced = replace(ROW, reference=STORED, through="datasets 5.2.0")
    assert "evaluate was not installed" in metric_notes([replaced], SETTINGS)[1]
