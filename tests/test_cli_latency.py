"""The command `latency-table`: what it writes and what it says."""

import itertools
import json

import torch
from typer.testing import CliRunner

from hf_opentrans.cli import app
from hf_opentrans.loading import load_clip
from hf_opentrans.pruning import latency
from hf_opentrans.pruning.latency import LatencyTable


def run(*arguments):
    """Return exit code, standard output and the error on one line."""
    result = CliRunner().invoke(app, ["latency-table", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.stdout.split()), " ".join(result.stderr.split())


def test_table_is_written_and_shown(tmp_path, monkeypatch, tiny_clip_folder):
    monkeypatch.chdir(tmp_path)
    # On a busy machine the tower without layers may take longest.
    ticks = itertools.count(1000, -1)
    monkeypatch.setattr(latency, "milliseconds", lambda run, device: (run(), next(ticks) / 100)[1])
    output, target = tmp_path / "latency-table.json", tmp_path / "figures.json"
    output.write_text("an older file")
    options = ["--rounds", 1, "--batch", 2, "--resolution", 48, "--threads", torch.get_num_threads()]
    code, out, error = run(tiny_clip_folder, *options, "--json", target)
    assert code == 0, error
    table = LatencyTable.load(output)
    table.check(load_clip(tiny_clip_folder).model, 48, 2)
    assert "Timing about" in out
    assert "Nothing else should run" in out
    for shown in (table.mlp(64), table.attention(4, 8, 8), table.attention(4, 1, 1), table.dense_ms, table.scale):
        assert f"{shown:.3f}" in out
    values = json.loads(target.read_text())
    assert LatencyTable.from_dict(values["table"]) == table
    assert values["environment"]["versions"]["torch"]


def test_mistakes_end_in_one_sentence(tmp_path, tiny_clip_folder):
    code, _, error = run(tmp_path / "none")
    assert (code, "There is no model folder" in error) == (2, True)
    output = tmp_path / "table.json"
    code, _, error = run(tiny_clip_folder, "--resolution", 4, "--output", output)
    assert (code, "resolution is 4" in error) == (1, True)
    assert not output.exists()
    assert run(tiny_clip_folder, "--rounds", 0)[0] == 2
