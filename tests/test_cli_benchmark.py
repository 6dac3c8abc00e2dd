"""The command `benchmark pruning`: what it writes, what it says, how it goes on, and what it refuses."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hf_opentrans.cli import app
from hf_opentrans.cli._common import repeat_options

USAGE, FAILURE = 2, 1


def run(*arguments):
    """Return exit code, standard output and the error on one line."""
    result = CliRunner().invoke(app, repeat_options([str(argument) for argument in arguments]))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.fixture
def base(tiny_clip_folder, images):
    given = ["benchmark", "pruning", "--model", tiny_clip_folder, "--images", images, "--fidelity-images", images]
    return [*given, "--num-images", 8]


def test_everything_is_measured_and_a_picture_drawn(tmp_path, tiny_images, images, base):
    target, dataset, classes = tmp_path / "out" / "pruning.json", tmp_path / "dataset", tmp_path / "classes"
    for name in ("images", "masks"):
        (dataset / name).mkdir(parents=True)
    tiny_images[0].save(dataset / "images" / "0.png")
    Image.fromarray(np.zeros((40, 48), np.uint8)).save(dataset / "masks" / "0.png")
    (dataset / "classes.json").write_text('{"id_to_name": {"0": "cat", "1": "dog"}, "ignore_id": 255}')
    for name in ("cat", "dog"):
        (classes / name).mkdir(parents=True)
        (classes / name / "0.png").write_bytes((images / "0.png").read_bytes())
    options = ["--segmentation", dataset, "--classification", classes, "--keep", 0.8, 0.7, "--seeds", 2, "--seed", 5]
    code, out, error = run(*base, *options, "--methods", "magnitude", "random", "--json", target)
    assert code == 0, error
    values = json.loads(target.read_text())
    keys = [(row["method"], row["keep"], row["seed"]) for row in values["rows"]]
    expected = [
        (m, k, s) for k in (0.8, 0.7) for s in (5, 6) for m in ("magnitude", "random") if (m, s) != ("magnitude", 6)
    ]
    assert keys == [("dense", 1.0, None), *expected]
    dense, *pruned = values["rows"]
    assert dense["class_token_cosine"] == pytest.approx(1)
    assert dense["top1"] == 0.5
    for row in pruned:
        assert row["macs"] < dense["macs"]
        assert row["speed_up"] > 0
        assert row["latency_ms"] > 0
        assert row["peak_memory_mib"] > 10
        assert row["seconds"] >= 0
        assert None not in (row["patch_token_cosine"], row["mean_iou"], row["pixel_accuracy"])
    assert (values["settings"]["num_images"], values["skipped"]) == (8, [])
    assert values["environment"]["versions"]["torch"]
    assert "6 runs: 0 in the file already, 6 to do." in error
    assert "The dense model is measured. 6 runs x" in error
    assert "left for 5 runs" in error
    assert "±" in out
    assert "what it costs" in out
    with Image.open(target.with_suffix(".png")) as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    code, again, error = run(*base, *options, "--methods", "magnitude", "random", "--json", target)
    assert (code, error, again) == (0, "6 runs: 6 in the file already, 0 to do.", out)


def test_other_settings_are_refused(tmp_path, base, images):
    target = tmp_path / "pruning.json"
    options = ["--methods", "random", "--json", target]
    assert run(*base, *options)[0] == 0
    before = target.read_text()
    code, _, error = run(*base, *options, "--mode", "vanilla")
    assert (code, "mode was None and is 'vanilla'" in error) == (USAGE, True), error
    assert "Name another file with --json" in error
    (images / "7.png").unlink()
    code, _, error = run(*base, *options)
    assert (code, "files was {" in error) == (USAGE, True), error
    assert target.read_text() == before
    target.write_text('{"rows": []}')
    code, _, error = run(*base, *options)
    assert (code, "can be continued" in error) == (USAGE, True), error


def test_the_ablation_compares_variants(tmp_path, base, monkeypatch):
    def refuse(_model, _images, config, **_):
        raise ValueError(f"keep={config.keep:g} is too low for {'+'.join(config.structures)}. Raise keep to 0.9.")

    monkeypatch.setattr("hf_opentrans.benchmarks.prune_model", refuse)
    target = tmp_path / "ablation.json"
    code, _, error = run(*base, "--ablation", "--keep", 0.4, "--json", target)
    assert (code, "No run gave a model. keep=0.4 is too low for mlp." in error) == (FAILURE, True), error
    assert "1 of 9: MLP only at keep 0.4, seed 0 skipped. keep=0.4 is too low for mlp. Raise keep to 0.9." in error
    skipped = json.loads(target.read_text())["skipped"]
    assert [entry["variant"] for entry in skipped][1:4] == ["+ heads", "+ ranks", "+ probes"]
    code, _, error = run(*base, "--ablation", "--methods", "obs", "random")
    assert (code, "--ablation is given too" in error) == (USAGE, True), error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", 0.7, 1.5], "keep is 1.5. It must lie in (0, 1]"),
        (["--methods", "magic"], "method is 'magic'. It must be one of obs,"),
        (["--num-images", 0], "num_images is 0"),
        (["--images", "nowhere"], "There is no folder 'nowhere'"),
    ],
)
def test_bad_options_end_before_anything_is_measured(base, options, message):
    code, _, error = run(*base, *options)
    assert (code, message in error) == (USAGE, True), error
    assert "to do" not in error


def test_without_matplotlib_there_is_a_warning_and_no_picture(tmp_path, base, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    target = tmp_path / "pruning.json"
    code, out, error = run(*base, "--methods", "random", "--json", target)
    assert code == 0, error
    assert "Warning: No picture was drawn. `matplotlib` is needed" in error
    assert "random" in out
    assert [path.name for path in tmp_path.glob("*.png")] == []
