"""The commands `analyze` and `benchmark spectra`: what they write, what they say, and what they refuse."""

import json
from typing import Any

import pytest
import torch
from transformers import GitVisionConfig, GitVisionModel
from typer.testing import CliRunner

from hf_opentrans import SpectralReport, analyze_spectra, benchmark_spectra
from hf_opentrans.cli import app
from hf_opentrans.loading import load_any
from hf_opentrans.spectra.selection import LayerSelection, select_layers

USAGE, FAILURE = 2, 1


def run(*arguments):
    """Return exit code, standard output and the error on one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.stdout.split()), " ".join(result.stderr.split())


def test_every_matrix_of_the_image_tower_is_reported(tmp_path, tiny_clip_folder, colours_of):
    target, picture = tmp_path / "a.json", tmp_path / "a.png"
    options = ["--fit", "ks", "--select", "alpha", "--plot", picture, "--json", target]
    code, out, error = run("analyze", tiny_clip_folder, *options)
    assert code == 0, error
    values = json.loads(target.read_text())
    names = [layer["name"] for layer in values["layers"]]
    assert "vision_model.encoder.layers.0.mlp.fc1" in names
    assert not any(name.startswith("text_model") for name in names)
    assert "The text tower was left out." in out
    assert {"name", "type", "shape", "alpha", "xmin", "ks_distance", "stable_rank"} <= set(values["layers"][0])
    assert values["environment"]["versions"]["torch"]
    report = SpectralReport.load(target)
    expected = analyze_spectra(load_any(tiny_clip_folder), fit="ks", target_modules=names, debias=True)
    assert report.values("alpha") == expected.values("alpha")
    chosen = select_layers(report, "alpha")
    assert values["selection"]["names"] == list(chosen.names)
    path = tmp_path / "selection.json"
    path.write_text(json.dumps(values["selection"]))
    assert LayerSelection.load(path) == chosen
    assert f"{len(chosen.names)} train, {len(chosen.frozen)} freeze." in out
    assert len(colours_of(picture)) > 20


def test_other_models_and_choices_of_layers(tmp_path):
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    GitVisionModel(GitVisionConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(tmp_path / "git")
    target = tmp_path / "a.json"
    options = ["--target-modules", r".*\.fc\d", "--metric", "stable_rank", "--json", target]
    code, out, error = run("analyze", tmp_path / "git", *options)
    assert code == 0, error
    layers = json.loads(target.read_text())["layers"]
    assert [layer["type"] for layer in layers] == ["fc1", "fc2"] * 2
    ranks = sorted((layer["stable_rank"] for layer in layers), reverse=True)
    assert [out.index(f" {rank:.1f} ") for rank in ranks] == sorted(out.index(f" {rank:.1f} ") for rank in ranks)
    assert "text tower" not in out


def test_one_layer_is_drawn(tmp_path, tiny_clip_folder, colours_of):
    picture = tmp_path / "layer.png"
    code, out, error = run("analyze", tiny_clip_folder, "--layer", "visual_projection", "--plot", picture)
    assert (code, f"Picture: {picture}" in out) == (0, True), error
    assert len(colours_of(picture)) > 20


@pytest.mark.parametrize(
    ("options", "message", "exit_code"),
    [
        (["--fit", "magic"], "The fit is 'magic'. It must be one of hill, peak, ks", USAGE),
        (["--metric", "beta"], "The metric is 'beta'. It must be one of alpha,", USAGE),
        (["--select", "best"], "rule is 'best'. It must be one of alpha, alpha_star", USAGE),
        (["--select", "alpha", "--fraction", 0], "fraction is 0.0. It must lie in (0, 1]", USAGE),
        (["--layer", "visual_projection"], "there is no --plot", USAGE),
        (["--layer", "layers.1", "--plot", "x.png"], "There is no linear or convolution layer 'layers.1'", FAILURE),
        (["--target-modules", "nothing"], "has no linear or convolution layer that target_modules", FAILURE),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path, monkeypatch, tiny_clip_folder, options, message, exit_code):
    monkeypatch.chdir(tmp_path)
    code, _, error = run("analyze", tiny_clip_folder, *options, "--json", "a.json")
    assert (code, message in error) == (exit_code, True), error
    assert [path.name for path in tmp_path.iterdir()] == [tiny_clip_folder.name]


def test_a_missing_model_is_named(tmp_path):
    code, _, error = run("analyze", tmp_path / "none")
    assert (code, "There is no model folder" in error) == (USAGE, True), error


@pytest.mark.filterwarnings("ignore")  # weightwatcher's own, at its import
def test_the_benchmark_compares_with_weightwatcher(tmp_path, monkeypatch):
    tower = benchmark_spectra.heavy_tower(128, 512, 1, 16)
    monkeypatch.setattr(benchmark_spectra, "heavy_tower", lambda *_, **__: tower)
    monkeypatch.setattr(benchmark_spectra, "LARGE", {"tiny": (128, 512, 1, 16)})
    target = tmp_path / "a.json"
    code, out, error = run("benchmark", "spectra", "--layers", 1, "--rounds", 1, "--json", target)
    assert code == 0, error
    rows = {(row["model"], row["method"]): row for row in json.loads(target.read_text())["rows"]}
    ours = rows["ViT-B/16, 1 layers", "ours fp64"]
    assert ours["alpha_difference"] < 1e-10
    assert rows["ViT-B/16, 1 layers", "ours fp32"]["alpha_difference"] < 1e-3
    assert ours["speed_up"] > 0
    assert ours["over_eigenvalues"] > 0
    assert rows["tiny", "ours fp32"]["matrices"] == 7
    assert "minutes on one thread" in out
    assert "Round 1 of 1" in error
