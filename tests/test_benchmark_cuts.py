"""The benchmark of exact savings: equal outputs, honest rows where they are not, and how it goes on."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from typer.testing import CliRunner

from hf_opentrans import benchmark_cuts
from hf_opentrans.benchmark_cuts import (
    BLOCKS,
    IMAGE_PASSES,
    LAST_MLP,
    PROJECTIONS,
    CutCase,
    CutFile,
    CutRow,
    CutSizes,
    Pair,
    cuts_notes,
    cuts_table,
    forecast,
    measure,
    plan_cuts,
    run_cuts,
)
from hf_opentrans.benchmark_tables import fill_tables, result_table
from hf_opentrans.cli import app

TINY = CutSizes((64, 128, 12, 8), (64, 128, 4, 8), 32, 32, 32, 16, (32, 64, 2, 4, 60), tokens=4)
USAGE = 2
ROW = CutRow(BLOCKS, "LLaVA", 100.0, 80.0, 1.25, (1.2, 1.3), 1.24, 10**7, 8 * 10**6, "1 of 5 blocks", True, 0.0, 9, 2)


def run(*arguments):
    result = CliRunner().invoke(app, ["benchmark", "cuts", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def by_what(what):
    return [case for case in plan_cuts(TINY) if case.what == what]


@pytest.mark.parametrize("case", plan_cuts(TINY), ids=lambda case: f"{case.what}-{case.case}")
def test_outputs_are_equal_and_what_is_not_read_is_gone(case):
    row = measure(case, 1)
    assert row.key == (case.what, case.case)
    assert (row.rounds, row.quartiles) == (1, (row.speed_up, row.speed_up))
    if case.what == IMAGE_PASSES:  # a batch of prompts rounds otherwise than one image
        assert row.difference < 1e-5
        assert row.is_equal == (row.difference == 0)
    else:
        assert row.is_equal
        assert row.difference == 0
    assert (row.params_after < row.params_before) == (case.what in (LAST_MLP, BLOCKS))
    assert row.ms_before > 0


@pytest.mark.parametrize(
    ("case", "saved"),
    [*((case, 2) for case in by_what(LAST_MLP)), *zip(by_what(PROJECTIONS), (1, 1, 2), strict=True)],
    ids=lambda value: getattr(value, "case", None) and f"{value.what}-{value.case}",
)
def test_the_baseline_computes_what_is_dropped(case, saved):
    """A baseline that skips the work too would measure nothing: count the linear layers that run."""
    pair, counts = case.build(), []
    handle = register_module_forward_hook(
        lambda module, *_: counts.append(1) if isinstance(module, nn.Linear) else None
    )
    found = []
    try:
        for way in (pair.before, pair.after):
            counts.clear()
            way()
            found.append(len(counts))
    finally:
        handle.remove()
    assert found[0] - found[1] == saved


def test_the_real_sizes_are_those_of_the_models():
    cases = plan_cuts()
    assert [case.what for case in cases].count(LAST_MLP) == 3
    assert {"CLIPSeg, 20 prompts, 352 px", "LLaVA, image side, 24 blocks, patch 14, 336 px"} <= {c.case for c in cases}
    # ViT-B/16 at 224 px: 17.6 G multiply-accumulates; 336 px has 2.24 times the tokens.
    assert cases[0].macs == pytest.approx(2 * 41e9, rel=0.05)


def test_unequal_outputs_are_told():
    values = torch.ones(3)
    case = CutCase("blocks", "wrong", 1.0, lambda: Pair(lambda: values, lambda: values * 1.5, 2, 1, "all"))
    row = measure(case, 2)
    assert (row.is_equal, row.difference) == (False, 0.5)
    assert cuts_table([row])[1][0][-1] == "differs by 5e-01"
    assert "Differences are the largest" in cuts_notes([row])[-1]


def test_rows_that_other_work_disturbed_are_marked():
    # As measured on a busy machine: dropping 1 block of 24 cannot save 7 of 8 parts.
    disturbed = replace(ROW, speed_up=7.55, quartiles=(6.18, 8.27), cpu_speed_up=1.06)
    assert (ROW.is_disturbed, disturbed.is_disturbed) == (False, True)
    assert cuts_table([disturbed])[1][0][4:6] == ["7.55x (6.18-8.27)!", "1.06x"]
    assert "!: in 1 of 2 rows wall and CPU time differ" in cuts_notes([ROW, disturbed])[1]
    assert not any("!" in note for note in cuts_notes([ROW]))


def test_rows_are_measured_once(tmp_path):
    cases, said = by_what(BLOCKS), []
    run_cuts(cases[:1], 1, CutFile(tmp_path / "cuts.json", {"repeats": 1}, "command"), say=said.append)
    assert "1 rows: 0 in the file already, 1 to do, about" in said[0]
    run_cuts(cases, 1, CutFile(tmp_path / "cuts.json", {"repeats": 1}, "command"), say=said.append)
    assert "2 rows: 1 in the file already, 1 to do" in said[2]
    values = json.loads((tmp_path / "cuts.json").read_text())
    assert [row["case"] for row in values["rows"]] == [case.case for case in cases]
    with pytest.raises(ValueError, match=r"repeats was 1 and is 2"):
        CutFile(tmp_path / "cuts.json", {"repeats": 2}, "command")


def test_the_command_writes_what_the_tables_read(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_cuts, "plan_cuts", lambda _sizes: plan_cuts(TINY)[-1:])
    code, out, error = run("--repeats", 2, "--threads", 1, "--json", tmp_path / "cuts.json")
    assert code == 0, error
    assert "1 of 1: blocks, LLaVA, image side" in error
    assert "bit-equal" in out
    text = "<!-- table: cuts.json -->\n<!-- end of table -->\n"
    filled = fill_tables(text, tmp_path)
    assert "| 1 of 4 blocks | LLaVA, image side, 4 blocks, patch 8, 32 px |" in filled
    assert "bit-equal" in filled
    assert "Measured by `hf-opentrans" in filled
    code, _, error = run("--repeats", 3, "--threads", 1, "--json", tmp_path / "cuts.json")
    assert (code, "repeats was 2 and is 3" in error) == (USAGE, True), error


def test_more_rounds_take_longer():
    cases = [replace(case, macs=case.macs * 1e6) for case in plan_cuts(TINY)]
    assert min(forecast(cases, 30) for _ in range(3)) > min(forecast(cases, 3) for _ in range(3))
    assert forecast([], 3) == 0


def test_the_table_is_for_people():
    header, (cells,) = cuts_table([ROW])
    found = dict(zip(header, cells, strict=True))
    assert (found["before"], found["after"], found["output"]) == ("100 ms", "80.0 ms", "bit-equal")
    assert found["speed-up (quartiles)"] == "1.25x (1.20-1.30)"
    assert found["tower before / after"] == "10.0 / 8.0 M"
    assert "Random weights; medians over 9 paired" in cuts_notes([ROW])[0]
    assert "| 1 of 5 blocks |" in result_table({"rows": [ROW.to_dict()], "command": "hf-opentrans benchmark cuts"})
