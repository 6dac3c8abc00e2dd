"""The benchmark of recovery by distillation: what it runs, how it goes on, what it refuses."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_opentrans.benchmark_recovery_tables import RecoveryRow, recovery_notes, recovery_table
from hf_opentrans.benchmark_tables import result_table
from hf_opentrans.cli import app
from hf_opentrans.cli._common import repeat_options

USAGE = 2


def run(*arguments):
    """Return exit code, standard output and the error on one line."""
    result = CliRunner().invoke(app, repeat_options(["benchmark", "recovery", *map(str, arguments)]))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.fixture
def options(tmp_path, tiny_clip_folder, tiny_images) -> list[Any]:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(40):
        tiny_images[index % 8].rotate(9 * index).save(folder / f"{index}.png")
    return ["--model", tiny_clip_folder, "--images", folder, "--steps", 30, "--batch-size", 4]


@pytest.mark.filterwarnings("ignore:.*calibration images")
def test_methods_are_pruned_and_recovered_once(tmp_path, options):
    target = tmp_path / "recovery.json"
    code, shown, error = run(*options, "--methods", "obs", "magnitude", "--json", target)
    assert code == 0, error
    rows = json.loads(target.read_text())["rows"]
    assert [(row["method"], row["seed"], row["steps"], row["images"]) for row in rows] == [
        ("obs", 0, 30, 36),
        ("magnitude", 0, 30, 36),
    ]
    assert rows[1]["patch_after"] > rows[1]["patch_before"]
    assert rows[0]["patch_before"] > rows[1]["patch_before"]
    assert "ours" in shown
    assert "2 of 2: magnitude, seed 0: patches" in error
    again = run(*options, "--methods", "obs", "magnitude", "--json", target)
    assert again[0] == 0
    assert "2 in the file already, 0 to do" in again[2]
    assert json.loads(target.read_text())["rows"] == rows
    table = result_table(json.loads(target.read_text()))
    assert table.count("| ours |") == 1
    code, _, error = run(*options, "--steps", 5, "--json", target)
    assert code == USAGE
    assert "steps was 30 and is 5" in error


def test_mistakes_are_told_before_work_starts(options):
    for more, message in (
        (["--methods", "guess"], "method is 'guess'"),
        (["--keep", "0"], "keep is 0"),
        (["--steps", "0"], "steps is 0"),
    ):
        code, _, error = run(*options, *more)
        assert code == USAGE
        assert message in error


def test_seeds_become_mean_and_spread():
    rows = [RecoveryRow("obs", 0.5, seed, 0.9, 0.95, 0.8, 0.9 + 0.02 * seed, 4, 8, 36, 1.0, 2.0) for seed in (0, 1)]
    header, (line,) = recovery_table(rows)
    cells = dict(zip(header, line, strict=False))
    assert cells["method"] == "ours"
    assert line[5] == "0.9100 ± 0.0100"
    assert cells["steps x batch"] == "4 x 8"
    assert "Means over 2 seeds; ± is half their range." in recovery_notes(rows)[0]
