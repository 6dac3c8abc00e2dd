"""The benchmark of time and memory of pruning: what it runs, how it goes on, what it refuses."""

import json

import pytest
from typer.testing import CliRunner

from hf_opentrans import benchmark_scale
from hf_opentrans.benchmark_scale import ScaleRow, forecast, parse_run, random_images, random_tower, scale_table
from hf_opentrans.benchmark_tables import result_table
from hf_opentrans.cli import app
from hf_opentrans.cli._common import repeat_options
from hf_opentrans.pruning.macs import count_macs

USAGE = 2


def run(*arguments):
    """Return exit code, standard output and the error on one line."""
    result = CliRunner().invoke(app, repeat_options(["benchmark", "scale", *map(str, arguments)]))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(benchmark_scale.SIZES, "tiny", (64, 128, 2, 8, 32, 16))


def test_the_sizes_are_those_of_clip():
    # Multiply-accumulates of ViT-B/16 at 224 px: 17.6 G (Dosovitskiy et al. 2021, projection included).
    assert count_macs(benchmark_scale.tower_config("vit-b16"), resolution=224) == pytest.approx(17.6e9, rel=0.01)
    assert benchmark_scale.tower_config("vit-l14-336").num_hidden_layers == 24
    tower = random_tower("tiny")
    assert (tower.config.num_attention_heads, tower.visual_projection.out_features) == (1, 16)


def test_images_differ_and_are_repeatable():
    first, again = (list(random_images(3, 32)) for _ in range(2))
    assert [image.tobytes() for image in first] == [image.tobytes() for image in again]
    assert len({image.tobytes() for image in first}) == 3
    assert first[0].size == (32, 32)


@pytest.mark.parametrize("text", ["vit-b16", "vit-b16:", "vit-b16:0", "vit-b16:many", "vit-x:3", ""])
def test_runs_are_models_and_numbers(text):
    with pytest.raises(ValueError, match="It must be MODEL:IMAGES with a model of vit-b16"):
        parse_run(text)
    assert parse_run("vit-l14-336:128") == ("vit-l14-336", 128)


def test_more_images_take_longer():
    times = [min(forecast([run]) for _ in range(3)) for run in (("tiny", 10**4), ("tiny", 10**6), ("vit-b16", 10**6))]
    assert times[0] < times[1] < times[2]


@pytest.mark.filterwarnings("ignore:.* calibration images give")
def test_rows_are_measured_once(tmp_path):
    target = tmp_path / "scale.json"
    code, out, error = run("--runs", "tiny:16", "--keep", 0.7, "--json", target)
    assert code == 0, error
    assert "tiny, 16 images: about" in error
    code, out, error = run("--runs", "tiny:16", "tiny:24", "--keep", 0.7, "--json", target)
    assert code == 0, error
    assert "2 runs: 1 in the file already, 1 to do." in error
    values = json.loads(target.read_text())
    assert [(row["model"], row["images"]) for row in values["rows"]] == [("tiny", 16), ("tiny", 24)]
    for row in values["rows"]:
        assert 0 < row["selection_seconds"] + row["rebuild_seconds"] <= row["seconds"]
        assert row["cpu_seconds"] > 0
        assert row["peak_memory_mib"] > row["model_mib"] > 0
    assert "24" in out
    assert "| tiny | 32 | 16 | 0.7 |" in result_table(values)
    code, _, error = run("--runs", "tiny:16", "--keep", 0.6, "--json", target)
    assert (code, "keep was 0.7 and is 0.6" in error) == (USAGE, True), error


def test_bad_options_end_before_anything_runs():
    code, _, error = run("--runs", "vit-h:1")
    assert (code, "The run is 'vit-h:1'" in error) == (USAGE, True), error
    code, _, error = run("--runs", "tiny:16", "--keep", 2)
    assert (code, "keep is 2.0" in error) == (USAGE, True), error


def test_the_table_is_for_people():
    row = ScaleRow("vit-b16", 1024, 224, 0.6, 1800.0, 3400.0, 600.0, 1140.0, 8192.0, 334.0)
    header, (cells,) = scale_table([row])
    found = dict(zip(header, cells, strict=True))
    assert (found["images"], found["time"], found["rebuild"]) == ("1,024", "30.0 min", "19.0 min")
    assert (found["memory"], found["of it weights"]) == ("8.0 GiB", "0.3 GiB")
